//! Storage engines: what a worker hands its operations to.
//!
//! An [`Engine`] belongs to one worker. It takes an [`Operation`], which owns the list of memory runs
//! it moves and the guest memory they point into, and gives it back as a [`Completion`]. Engines
//! check nothing about sectors or limits: `blk` has done so before.

mod file;
mod inject;
mod inline;
mod mapped;
mod memory;
mod null;
mod pool;
mod spec;
mod sync;
#[cfg(test)]
mod tests;
mod transfer;

use std::io;
use std::sync::Arc;
use std::time::Duration;

pub use self::inject::Faults;
pub use self::memory::MemoryDisk;
pub use self::spec::{AnyEngine, FileOptions, Method, Spec};
use crate::memory::{GuestMemory, IoVec};

/// What an operation asks of storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Fill the runs from `offset`.
    Read,
    /// Store the runs at `offset`.
    Write,
    /// Make every completed write durable (fdatasync).
    Flush,
    /// Give `len` bytes at `offset` back to storage; their content is undefined afterwards.
    Discard,
    /// Make `len` bytes at `offset` read as zero; `unmap` allows deallocation.
    WriteZeroes {
        /// Storage may deallocate the range as long as it then reads as zero.
        unmap: bool,
    },
}

/// One piece of work for storage. It owns its runs until it comes back in a [`Completion`].
#[derive(Debug)]
pub struct Operation {
    /// Given back in the completion, never interpreted.
    pub token: u64,
    /// What to do.
    pub kind: Kind,
    /// Where in the disk, in bytes.
    pub offset: u64,
    /// How many bytes; for `Read` and `Write` the total of `runs`.
    pub len: u64,
    /// `Write`, `Discard`, `WriteZeroes`: complete only when the data is on stable storage.
    pub durable: bool,
    /// Memory to move; empty for all but `Read` and `Write`. Any number, any alignment.
    pub runs: Vec<IoVec>,
    /// Keeps the memory behind `runs` mapped. `None` only towards an engine whose [`Engine::inline`] is true.
    pub pin: Option<Arc<GuestMemory>>,
}

/// How an operation ended.
#[derive(Debug)]
pub struct Completion {
    /// From the operation.
    pub token: u64,
    /// From the operation.
    pub kind: Kind,
    /// `Ok`: all `len` bytes were moved. `Err(errno)`: a positive errno; a short file is `EIO`.
    pub result: Result<(), i32>,
    /// The operation's own list, to be used again; what it says is of no meaning any more.
    pub runs: Vec<IoVec>,
    /// The data went through an aligned buffer because direct I/O demanded it.
    pub bounced: bool,
    /// Of a failed one: it may be submitted again, and a success then means what it says. Not so where a sync of the
    /// page cache failed: the kernel has dropped its dirty pages, and the next sync would report success without them.
    pub repeatable: bool,
}

impl Completion {
    /// The end of `operation`, which lets go of its memory.
    #[inline]
    pub(crate) fn of(operation: Operation, result: Result<(), i32>) -> Self {
        let Operation { token, kind, runs, .. } = operation;
        Self { token, kind, result, runs, bounced: false, repeatable: kind != Kind::Flush }
    }
}

/// A worker's way to storage, and what the worker sleeps on.
///
/// `watch`, `unwatch` and `wait` are here because the thread has one wait point: for io_uring the
/// ring itself is it, with the watched descriptors armed in it; for all others it is `ppoll`.
pub trait Engine: Send {
    /// True when `submit` always completes before it returns; then operations need no `pin`.
    fn inline(&self) -> bool;

    /// Moves the bytes of `runs` from (`Kind::Read`) or to (`Kind::Write`) the disk on this thread, when that takes no
    /// longer than copying does. True when all of it is done. False promises nothing: `submit` it then, which may do a
    /// part of it twice.
    fn move_now(&mut self, kind: Kind, offset: u64, durable: bool, runs: &[IoVec]) -> bool;

    /// Whether it makes use of `hint`.
    fn wants_hints(&self) -> bool {
        false
    }

    /// Soon something is read or written at `offset`. Only a hint, and maybe wrong.
    fn hint(&mut self, _offset: u64) {}

    /// What time it is, in nanoseconds on the workers' clock: told before each batch. For who wants to know how long
    /// the last one took.
    fn tick(&mut self, _now_ns: u64) {}

    /// Takes an operation. Returns its completion when it ended at once.
    /// May only queue it: nothing is promised to move before `kick`, and nothing blocks.
    fn submit(&mut self, operation: Operation) -> Option<Completion>;

    /// Hands everything queued to storage, in one system call where possible.
    fn kick(&mut self) -> io::Result<()>;

    /// Appends what has ended since to `done`. Never blocks; makes a system call only when there may be something to get.
    fn reap(&mut self, done: &mut Vec<Completion>);

    /// Operations taken and not yet given back.
    fn pending(&self) -> usize;

    /// Reports `token` from `wait` whenever `fd` is readable, until `unwatch`. Level-triggered: the
    /// owner drains the descriptor. `fd` stays open until `unwatch(token)` has returned.
    fn watch(&mut self, fd: libc::c_int, token: u32) -> io::Result<()>;

    /// Forgets `token`; it is not reported afterwards.
    fn unwatch(&mut self, token: u32);

    /// Hands over what is queued like `kick`, then blocks until a watched descriptor is readable
    /// (its tokens are appended to `ready`), an operation has ended, or `timeout` has passed.
    /// It may return earlier with nothing to tell, and report a descriptor that somebody drained just now.
    fn wait(&mut self, timeout: Option<Duration>, ready: &mut Vec<u32>) -> io::Result<()>;
}
