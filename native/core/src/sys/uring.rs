//! An io_uring that carries storage requests and waits for descriptors: a worker's one wait point.
//!
//! A [`Ring`] belongs to the thread that made it. What a request needs is moved in and comes back with its
//! outcome, so the kernel never works on memory that was freed; dropping a ring waits for what is under way.
#![allow(unsafe_code)]

mod setup;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::{Duration, Instant};

use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{opcode, squeue, EnterFlags, IoUring};

pub use self::setup::probe;
use self::setup::{build, Posting, POSTINGS};
use super::eventfd::poll_readable;
use super::fd::require_pollable;
use super::poll::remaining;
use super::storage::Outcome;
use crate::memory::IoVec;

/// Room for requests on their way to the kernel; more are handed over in several system calls.
const ENTRIES: u32 = 256;
/// Room for completions; more wait inside the kernel.
const COMPLETIONS: u32 = 4096;
/// How long to leave a kernel alone that has no memory for a request.
const PAUSE: Duration = Duration::from_millis(10);

/// `user_data` is a tag in the top two bits, a generation in the next thirty, an index in the low 32.
const TAG: u64 = 3 << 62;
const REQUEST: u64 = 0;
const POLL: u64 = 1 << 62;
const REMOVAL: u64 = 2 << 62;
const GENERATIONS: u32 = (1 << 30) - 1;

/// What a ring can be asked for.
#[derive(Debug)]
pub enum Request<'a> {
    /// Fill one to 1024 runs, 1 GiB at most.
    Read {
        /// Where to.
        runs: &'a [IoVec],
        /// Where from, in bytes.
        offset: u64,
    },
    /// Store one to 1024 runs, 1 GiB at most.
    Write {
        /// Where from.
        runs: &'a [IoVec],
        /// Where to, in bytes.
        offset: u64,
        /// End only when they are on stable storage.
        durable: bool,
    },
    /// `fallocate`.
    Allocate {
        /// FALLOC_FL_*.
        mode: i32,
        /// The first byte.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// `fdatasync`.
    Sync,
}

/// A request that is complete but for what it keeps alive.
#[must_use = "its place in the ring stays taken until it is started"]
pub struct Prepared {
    slot: u32,
    entry: squeue::Entry,
}

struct Slot<T> {
    /// Some while the request is under way.
    held: Option<T>,
    /// The kernel's copy of a list of runs. Its place on the heap stays while the request is under way.
    runs: Vec<IoVec>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Arming {
    Free,
    Unarmed,
    Armed,
}

struct Watch {
    fd: RawFd,
    token: Option<u32>,
    /// Raised when forgotten, so that a late completion is not taken for that of a successor.
    generation: u32,
    arming: Arming,
}

impl Watch {
    fn user_data(&self, index: usize) -> u64 {
        POLL | u64::from(self.generation) << 32 | index as u64
    }
}

/// An io_uring with what its requests keep alive, of type `T`.
pub struct Ring<T> {
    ring: IoUring,
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    /// Requests started and not yet in `finished`.
    in_flight: usize,
    /// Entries that found no room; none is ever lost.
    backlog: VecDeque<squeue::Entry>,
    /// The kernel did not take everything the last time.
    refused: bool,
    finished: VecDeque<(T, Outcome)>,
    watches: Vec<Watch>,
    unarmed: Vec<u32>,
    /// Tokens whose descriptors became readable during this wait.
    fired: Vec<u32>,
    /// A descriptor without token became readable.
    woken: bool,
}

impl<T> fmt::Debug for Ring<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring").field("fd", &self.ring.as_raw_fd()).field("in_flight", &self.in_flight).finish()
    }
}

impl<T> Ring<T> {
    /// A ring for the calling thread, which alone uses and drops it. Fails as the kernel does: `ENOSYS`, `EPERM`
    /// where io_uring is switched off, `ENOMEM`.
    pub fn new() -> io::Result<Self> {
        Self::posting(&POSTINGS)
    }

    fn posting(postings: &[Posting]) -> io::Result<Self> {
        Ok(Self {
            ring: build(ENTRIES, COMPLETIONS, postings)?,
            slots: Vec::new(),
            free: Vec::new(),
            in_flight: 0,
            backlog: VecDeque::new(),
            refused: false,
            finished: VecDeque::new(),
            watches: Vec::new(),
            unarmed: Vec::new(),
            fired: Vec::new(),
            woken: false,
        })
    }

    /// Makes a request about `fd`. `may_block`: the kernel gives it to a thread of its own at once.
    pub fn prepare(&mut self, fd: BorrowedFd<'_>, request: Request<'_>, may_block: bool) -> Prepared {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { held: None, runs: Vec::new() });
            (self.slots.len() - 1) as u32
        });
        let fd = Fd(fd.as_raw_fd());
        let kept = &mut self.slots[slot as usize].runs;
        let entry = match request {
            Request::Read { runs: [run], offset } => {
                opcode::Read::new(fd, run.as_ptr(), run.len() as u32).offset(offset).build()
            }
            Request::Write { runs: [run], offset, durable } => {
                let write = opcode::Write::new(fd, run.as_ptr(), run.len() as u32);
                write.offset(offset).rw_flags(durability(durable)).build()
            }
            Request::Read { runs, offset } => {
                let (list, count) = keep(kept, runs);
                opcode::Readv::new(fd, list, count).offset(offset).build()
            }
            Request::Write { runs, offset, durable } => {
                let (list, count) = keep(kept, runs);
                opcode::Writev::new(fd, list, count).offset(offset).rw_flags(durability(durable)).build()
            }
            Request::Allocate { mode, offset, len } => {
                opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build()
            }
            Request::Sync => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
        };
        let flags = if may_block { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
        Prepared { slot, entry: entry.flags(flags).user_data(REQUEST | u64::from(slot)) }
    }

    /// Queues a request; `held` keeps its memory and comes back with the outcome.
    pub fn start(&mut self, prepared: Prepared, held: T) {
        self.slots[prepared.slot as usize].held = Some(held);
        self.in_flight += 1;
        self.push(prepared.entry);
    }

    /// The next request that has ended, with what it held.
    pub fn take_finished(&mut self) -> Option<(T, Outcome)> {
        self.finished.pop_front()
    }

    /// Hands over what is queued. What the kernel has no room for now stays queued for the next time.
    pub fn submit(&mut self) -> io::Result<()> {
        let result = self.hand_over();
        self.refused = !self.backlog.is_empty() || self.queued() > 0;
        result
    }

    fn hand_over(&mut self) -> io::Result<()> {
        loop {
            self.refill();
            let before = self.queued();
            if before == 0 && !self.wants_entering() {
                return Ok(());
            }
            match self.ring.submit() {
                Ok(_) if self.backlog.is_empty() && self.queued() == 0 => return Ok(()),
                Ok(count) if count > 0 => {}
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => match error.raw_os_error() {
                    // Too many completions wait for room; make some.
                    Some(libc::EBUSY) if self.collect() > 0 => {}
                    Some(libc::EBUSY | libc::EAGAIN | libc::ENOMEM) => return Ok(()),
                    _ => return Err(error),
                },
            }
        }
    }

    /// Looks for what has ended; enters the kernel only when it has said that it holds something back, or did not
    /// take what it was handed.
    pub fn look(&mut self) {
        if self.refused || self.wants_entering() {
            // An error comes again at the next `submit` or `wait`, where it is told.
            let _ = self.submit();
        }
        self.collect();
    }

    /// Reports `token` from `wait` while `fd` is readable, has an error or is hung up; `None` only ends a wait.
    /// `fd` stays open until `unwatch`. Fails with `EEXIST` for a token in use, `EBADF` or `EPERM` for a
    /// descriptor that cannot be waited for.
    pub fn watch(&mut self, fd: RawFd, token: Option<u32>) -> io::Result<()> {
        if self.watches.iter().any(|watch| watch.arming != Arming::Free && watch.token == token) {
            return Err(io::Error::from_raw_os_error(libc::EEXIST));
        }
        require_pollable(fd)?;
        let index = self.watches.iter().position(|watch| watch.arming == Arming::Free).unwrap_or_else(|| {
            self.watches.push(Watch { fd, token, generation: 0, arming: Arming::Free });
            self.watches.len() - 1
        });
        let watch = &mut self.watches[index];
        (watch.fd, watch.token, watch.arming) = (fd, token, Arming::Unarmed);
        self.unarmed.push(index as u32);
        Ok(())
    }

    /// Forgets `token`; the kernel lets go of its descriptor before this returns. One that is not watched is no error.
    pub fn unwatch(&mut self, token: u32) {
        let watched = |watch: &Watch| watch.arming != Arming::Free && watch.token == Some(token);
        let Some(index) = self.watches.iter().position(watched) else { return };
        let watch = &mut self.watches[index];
        let (armed, user_data) = (watch.arming == Arming::Armed, watch.user_data(index));
        watch.arming = Arming::Free;
        watch.generation = (watch.generation + 1) & GENERATIONS;
        self.unarmed.retain(|&other| other as usize != index);
        if armed {
            self.backlog.retain(|entry| entry.get_user_data() != user_data);
            self.push(opcode::PollRemove::new(user_data).build().user_data(REMOVAL));
            // Refused, the removal is made later; what it removes is ignored from now on in any case.
            let _ = self.submit();
        }
    }

    /// Hands over what is queued, then blocks until a watched descriptor is readable (tokens are appended to
    /// `ready`), a request has ended, or `timeout` has passed.
    pub fn wait(&mut self, timeout: Option<Duration>, ready: &mut Vec<u32>) -> io::Result<()> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        self.collect();
        // What fired before may have been drained since: arming it again tells.
        self.fired.clear();
        self.woken = false;
        loop {
            self.arm();
            let left = remaining(deadline);
            if self.has_news() || left == Some(Duration::ZERO) {
                self.submit()?;
            } else {
                self.enter(left)?;
            }
            self.collect();
            if self.has_news() || remaining(deadline) == Some(Duration::ZERO) {
                ready.append(&mut self.fired);
                return Ok(());
            }
        }
    }

    fn has_news(&self) -> bool {
        self.woken || !self.fired.is_empty() || !self.finished.is_empty()
    }

    fn queued(&mut self) -> usize {
        self.ring.submission().len()
    }

    /// Whether the kernel has completions that it posts only when entered.
    fn wants_entering(&mut self) -> bool {
        let queue = self.ring.submission();
        queue.taskrun() || queue.cq_overflow()
    }

    fn push(&mut self, entry: squeue::Entry) {
        if self.backlog.is_empty() && self.try_push(&entry) {
            return;
        }
        self.backlog.push_back(entry);
        // Refused, it stays in the backlog; an error comes again where it is told.
        let _ = self.submit();
    }

    fn try_push(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: lists of runs lie in their slot, and the bytes they name are mapped as long as a copy of the
        // run is in use, which is until the slot's holder has come back; other entries name no memory.
        unsafe { self.ring.submission().push(entry) }.is_ok()
    }

    fn refill(&mut self) {
        while let Some(entry) = self.backlog.pop_front() {
            if !self.try_push(&entry) {
                self.backlog.push_front(entry);
                return;
            }
        }
    }

    /// Queues a poll for every watched descriptor that has none.
    fn arm(&mut self) {
        // Counted before: a poll that fires at once, during this, is not armed a second time.
        for _ in 0..self.unarmed.len() {
            let index = self.unarmed.remove(0) as usize;
            let watch = &mut self.watches[index];
            watch.arming = Arming::Armed;
            let poll = opcode::PollAdd::new(Fd(watch.fd), libc::POLLIN as u32);
            let entry = poll.build().user_data(watch.user_data(index));
            self.push(entry);
        }
    }

    /// Hands over what is queued and blocks until something is posted or `timeout` has passed.
    fn enter(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let mut timeout = timeout;
        if !self.backlog.is_empty() {
            self.submit()?;
            if !self.backlog.is_empty() {
                timeout = Some(timeout.map_or(PAUSE, |timeout| timeout.min(PAUSE)));
            }
        }
        let mut flags = EnterFlags::EXT_ARG | EnterFlags::GETEVENTS;
        if self.in_flight == 0 && self.ring.params().is_feature_no_iowait() {
            // Waiting for a guest is not waiting for storage.
            flags |= EnterFlags::NO_IOWAIT;
        }
        let spec = timeout.map(Timespec::from);
        let arguments = match &spec {
            Some(spec) => SubmitArgs::new().timespec(spec),
            None => SubmitArgs::new(),
        };
        let queued = self.queued() as u32;
        // SAFETY: the arguments are of the type that EXT_ARG asks for and live through the call.
        let result = unsafe { self.ring.submitter().enter(queued, 1, flags.bits(), Some(&arguments)) };
        let Err(error) = result else { return Ok(()) };
        match error.raw_os_error() {
            Some(libc::ETIME | libc::EINTR | libc::EBUSY) => Ok(()),
            Some(libc::EAGAIN | libc::ENOMEM) => {
                let pause = timeout.map_or(PAUSE, |timeout| timeout.min(PAUSE));
                // SAFETY: the ring's own descriptor, open for the length of the call.
                poll_readable(unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }, Some(pause)).map(drop)
            }
            _ => Err(error),
        }
    }

    /// Takes everything that was posted; returns how much.
    fn collect(&mut self) -> usize {
        let Self { ring, slots, free, in_flight, finished, watches, unarmed, fired, woken, .. } = self;
        let mut count = 0;
        for entry in ring.completion() {
            count += 1;
            let (user_data, result) = (entry.user_data(), entry.result());
            let index = user_data as u32;
            if user_data & TAG == REQUEST {
                let Some(held) = slots.get_mut(index as usize).and_then(|slot| slot.held.take()) else { continue };
                free.push(index);
                *in_flight -= 1;
                finished.push_back((held, usize::try_from(result).map_err(|_| -result)));
            } else if user_data & TAG == POLL {
                let Some(watch) = watches.get_mut(index as usize) else { continue };
                if watch.arming != Arming::Armed || watch.user_data(index as usize) != user_data {
                    continue;
                }
                watch.arming = Arming::Unarmed;
                unarmed.push(index);
                // One that failed is told too: who then reads the descriptor finds out why.
                match watch.token {
                    Some(token) => fired.push(token),
                    None => *woken = true,
                }
            }
        }
        count
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        for entry in std::mem::take(&mut self.backlog) {
            let user_data = entry.get_user_data();
            if user_data & TAG == REQUEST {
                self.slots[user_data as u32 as usize].held = None;
                self.in_flight -= 1;
            }
        }
        while self.in_flight > 0 {
            if self.enter(None).is_err() {
                // On another thread than its own a ring cannot be asked. The kernel still works on
                // this memory, so it is given up rather than freed.
                std::mem::forget(std::mem::take(&mut self.slots));
                return;
            }
            self.collect();
        }
    }
}

fn durability(durable: bool) -> i32 {
    if durable {
        libc::RWF_DSYNC
    } else {
        0
    }
}

fn keep(kept: &mut Vec<IoVec>, runs: &[IoVec]) -> (*const libc::iovec, u32) {
    kept.clear();
    kept.extend_from_slice(runs);
    (kept.as_ptr().cast(), runs.len() as u32)
}
