//! Which storage a disk has, and making an engine for it on each worker.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::Duration;

use super::file::FileEngine;
use super::inject::FaultyEngine;
use super::memory::{MemoryDisk, MemoryEngine};
use super::null::NullEngine;
use super::sync::SyncEngine;
use super::transfer::{Alignment, Target};
use super::{Completion, Engine, Faults, Kind, Operation};
use crate::memory::IoVec;
use crate::sys::uring;

/// Longer delays than this are a mistake of the tester.
const MAX_DELAY: Duration = Duration::from_secs(3600);

/// Greater alignments than this are a mistake.
const MAX_ALIGN: usize = 1 << 20;

/// Which system calls reach a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Method {
    /// io_uring, or plain system calls where the kernel refuses it.
    #[default]
    Auto,
    /// io_uring.
    IoUring,
    /// Plain system calls, on a few threads.
    Syscalls,
}

/// What an engine has to know about a file.
#[derive(Clone, Copy, Debug, Default)]
pub struct FileOptions {
    /// Which system calls.
    pub method: Method,
    /// The descriptor was opened with O_DIRECT.
    pub direct: bool,
    /// What O_DIRECT demands of memory addresses, in bytes: a power of two, or 0 for nothing.
    pub memory_align: usize,
    /// What O_DIRECT demands of offsets and lengths, likewise.
    pub offset_align: usize,
    /// Discard and zero by BLKDISCARD and BLKZEROOUT.
    pub block_device: bool,
    /// Workers move by themselves what is in memory anyway.
    pub inline: bool,
}

impl FileOptions {
    fn alignment(&self) -> io::Result<Option<Alignment>> {
        let (memory, offset) = (self.memory_align.max(1), self.offset_align.max(1));
        if ![memory, offset].iter().all(|align| align.is_power_of_two() && *align <= MAX_ALIGN) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        Ok(self.direct.then_some(Alignment { memory, offset }))
    }
}

#[derive(Clone, Debug)]
enum Storage {
    File { target: Arc<Target>, method: Method, uring: bool },
    Memory(Arc<MemoryDisk>),
    Null,
}

/// How a disk reaches its storage. Cheap to clone, usable from any thread; all engines built from it
/// and its clones work on the same storage.
#[derive(Clone, Debug)]
pub struct Spec {
    storage: Storage,
    faults: Option<Faults>,
    /// How many more operations may fail on purpose.
    failures_left: Arc<AtomicU64>,
    /// Engines built so far, so that each has random numbers of its own.
    built: Arc<AtomicU64>,
}

impl Spec {
    fn over(storage: Storage) -> Self {
        Self { storage, faults: None, failures_left: Arc::default(), built: Arc::default() }
    }

    /// The file or block device behind `fd`, which it takes. Fails with `EINVAL` for alignments that are none, and
    /// as the kernel does when io_uring was demanded and is refused.
    pub fn file(fd: OwnedFd, options: FileOptions) -> io::Result<Self> {
        let target = Arc::new(Target::new(fd, options.block_device, options.alignment()?, options.inline));
        let uring = match options.method {
            Method::Auto => uring::probe().is_ok(),
            Method::IoUring => uring::probe().map(|()| true)?,
            Method::Syscalls => false,
        };
        Ok(Self::over(Storage::File { target, method: options.method, uring }))
    }

    /// `size` bytes of zeroes in this process. Fails with `ENOMEM` when the system refuses so much address space.
    pub fn memory(size: u64) -> io::Result<Self> {
        Ok(Self::over(Storage::Memory(Arc::new(MemoryDisk::new(size)?))))
    }

    /// Reads leave the buffers as they are, everything else succeeds at once.
    pub fn null() -> Self {
        Self::over(Storage::Null)
    }

    /// The same storage made slow and unreliable. Replaces earlier faults. Fails with `EINVAL` for a
    /// share that is not in 0..1, a delay of more than an hour, or no errno.
    pub fn with_faults(&self, faults: Faults) -> io::Result<Self> {
        let shares = [faults.error_read, faults.error_write, faults.error_flush];
        let delays = [faults.delay_read, faults.delay_write, faults.delay_flush];
        if !shares.iter().all(|share| (0.0..=1.0).contains(share)) || delays.iter().any(|delay| *delay > MAX_DELAY) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        if !(1..4096).contains(&faults.errno) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let failures_left = Arc::new(AtomicU64::new(faults.error_limit.unwrap_or(u64::MAX)));
        Ok(Self { storage: self.storage.clone(), faults: Some(faults), failures_left, built: Arc::default() })
    }

    /// Memory only: makes the disk `size` bytes long; what is cut off reads as zeroes when grown again.
    /// Other storage has its own size, or none: `EOPNOTSUPP`.
    pub fn resize(&self, size: u64) -> io::Result<()> {
        match &self.storage {
            Storage::Memory(disk) => disk.resize(size),
            _ => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
        }
    }

    /// The engine that runs: "io_uring", "syscalls", "memory" or "null".
    pub fn name(&self) -> &'static str {
        match &self.storage {
            Storage::File { uring: true, .. } => "io_uring",
            Storage::File { uring: false, .. } => "syscalls",
            Storage::Memory(_) => "memory",
            Storage::Null => "null",
        }
    }

    /// Makes an engine for the calling thread, which alone uses and drops it.
    pub fn build(&self) -> io::Result<AnyEngine> {
        let engine = match &self.storage {
            Storage::File { target, method, uring: true } => match FileEngine::new(Arc::clone(target)) {
                Ok(engine) => AnyEngine::File(Box::new(engine)),
                // It worked when it was tried; what is short now (memory, a limit) is no reason not to serve.
                Err(_) if *method == Method::Auto => AnyEngine::Sync(Box::new(SyncEngine::new(Arc::clone(target))?)),
                Err(error) => return Err(error),
            },
            Storage::File { target, .. } => AnyEngine::Sync(Box::new(SyncEngine::new(Arc::clone(target))?)),
            Storage::Memory(disk) => AnyEngine::Memory(MemoryEngine::new(Arc::clone(disk))),
            Storage::Null => AnyEngine::Null(NullEngine::default()),
        };
        Ok(match self.faults {
            Some(faults) => {
                let stream = self.built.fetch_add(1, Ordering::Relaxed);
                AnyEngine::Faulty(Box::new(FaultyEngine::new(engine, faults, stream, Arc::clone(&self.failures_left))))
            }
            None => engine,
        })
    }
}

/// Any of the engines, without a virtual call per operation.
#[derive(Debug)]
pub enum AnyEngine {
    /// A file through io_uring.
    File(Box<FileEngine>),
    /// A file by plain system calls.
    Sync(Box<SyncEngine>),
    /// Memory of this process.
    Memory(MemoryEngine),
    /// Nothing.
    Null(NullEngine),
    /// Another one, disturbed on purpose.
    Faulty(Box<FaultyEngine<AnyEngine>>),
}

macro_rules! each {
    ($self:ident, $engine:ident => $call:expr) => {
        match $self {
            AnyEngine::File($engine) => $call,
            AnyEngine::Sync($engine) => $call,
            AnyEngine::Memory($engine) => $call,
            AnyEngine::Null($engine) => $call,
            AnyEngine::Faulty($engine) => $call,
        }
    };
}

impl Engine for AnyEngine {
    fn inline(&self) -> bool {
        each!(self, engine => engine.inline())
    }

    #[inline]
    fn move_now(&mut self, kind: Kind, offset: u64, durable: bool, runs: &[IoVec]) -> bool {
        each!(self, engine => engine.move_now(kind, offset, durable, runs))
    }

    fn wants_hints(&self) -> bool {
        each!(self, engine => engine.wants_hints())
    }

    #[inline]
    fn hint(&mut self, offset: u64) {
        each!(self, engine => engine.hint(offset));
    }

    #[inline]
    fn tick(&mut self, now_ns: u64) {
        each!(self, engine => engine.tick(now_ns));
    }

    #[inline]
    fn submit(&mut self, operation: Operation) -> Option<Completion> {
        each!(self, engine => engine.submit(operation))
    }

    fn kick(&mut self) -> io::Result<()> {
        each!(self, engine => engine.kick())
    }

    #[inline]
    fn reap(&mut self, done: &mut Vec<Completion>) {
        each!(self, engine => engine.reap(done))
    }

    fn pending(&self) -> usize {
        each!(self, engine => engine.pending())
    }

    fn watch(&mut self, fd: libc::c_int, token: u32) -> io::Result<()> {
        each!(self, engine => engine.watch(fd, token))
    }

    fn unwatch(&mut self, token: u32) {
        each!(self, engine => engine.unwatch(token));
    }

    fn wait(&mut self, timeout: Option<Duration>, ready: &mut Vec<u32>) -> io::Result<()> {
        each!(self, engine => engine.wait(timeout, ready))
    }
}
