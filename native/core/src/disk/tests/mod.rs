//! Engines against what they promise. File engines run one list of cases, each by io_uring and by system calls, through the
//! page cache and past it.

mod block;
mod faults;
mod files;
mod inline;
mod memory;
mod transfers;
mod waiting;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

pub(super) use self::inline::forget_cached;
use super::{AnyEngine, Completion, Engine, FileOptions, Kind, Method, Operation, Spec};
use crate::memory::IoVec;
use crate::sys::buffer::AlignedBuffer;

/// What O_DIRECT demands in these tests: no file system asks for more.
const BLOCK: usize = 4096;

/// What a file system may need for itself when a file gets holes.
const SLACK: u64 = 64 << 10;

/// One way to reach a file.
#[derive(Clone, Copy, Debug)]
struct Way {
    method: Method,
    direct: bool,
    /// On this thread where that does not wait.
    inline: bool,
}

const WAYS: [Way; 6] = [
    Way { method: Method::IoUring, direct: false, inline: false },
    Way { method: Method::IoUring, direct: false, inline: true },
    Way { method: Method::IoUring, direct: true, inline: true },
    Way { method: Method::Syscalls, direct: false, inline: false },
    Way { method: Method::Syscalls, direct: false, inline: true },
    Way { method: Method::Syscalls, direct: true, inline: true },
];

/// A file that is removed in the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(dir: &Path) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        Self(dir.join(format!("vhostuser-test-{}-{number}", std::process::id())))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// An engine on a file of its own, the file seen through the page cache, and memory to move.
struct Setup {
    way: Way,
    engine: AnyEngine,
    file: File,
    memory: AlignedBuffer,
    _scratch: Scratch,
}

impl Setup {
    /// A file of `size` bytes in `dir`; `None`, loudly, where the system does not have this way.
    fn new(way: Way, dir: &Path, size: u64) -> Option<Self> {
        let scratch = Scratch::new(dir);
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&scratch.0).unwrap();
        file.set_len(size).unwrap();
        let flags = if way.direct { libc::O_DIRECT } else { 0 };
        let Ok(own) = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&scratch.0) else {
            eprintln!("SKIPPED {way:?}: {} has no direct I/O", dir.display());
            return None;
        };
        let options = FileOptions {
            method: way.method,
            direct: way.direct,
            memory_align: BLOCK,
            offset_align: BLOCK,
            block_device: false,
            inline: way.inline,
        };
        let spec = match Spec::file(own.into(), options) {
            Ok(spec) => spec,
            Err(error) => {
                eprintln!("SKIPPED {way:?}: {error}");
                return None;
            }
        };
        assert_eq!(spec.name(), if way.method == Method::IoUring { "io_uring" } else { "syscalls" });
        let memory = AlignedBuffer::new(8 << 20, BLOCK).unwrap();
        Some(Self { way, engine: spec.build().unwrap(), file, memory, _scratch: scratch })
    }

    /// Every way that there is here, on a file of `size` bytes.
    fn each(size: u64) -> impl Iterator<Item = Self> {
        WAYS.into_iter().filter_map(move |way| Self::new(way, &std::env::temp_dir(), size))
    }

    fn on_disk(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0xee; len];
        self.file.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }

    fn allocated(&self) -> u64 {
        // Delayed allocation does not count yet.
        self.file.sync_all().unwrap();
        self.file.metadata().unwrap().blocks() * 512
    }

    fn run(&mut self, kind: Kind, offset: u64, len: u64, runs: &[IoVec]) -> Completion {
        run(&mut self.engine, operation(7, kind, offset, len, runs))
    }
}

fn operation(token: u64, kind: Kind, offset: u64, len: u64, runs: &[IoVec]) -> Operation {
    Operation { token, kind, offset, len, durable: false, runs: runs.to_vec(), pin: None }
}

fn total(runs: &[IoVec]) -> u64 {
    runs.iter().map(|run| run.len() as u64).sum()
}

/// Carries out one operation, alone, as a worker does: at once if that can be.
fn run(engine: &mut impl Engine, operation: Operation) -> Completion {
    let (token, kind) = (operation.token, operation.kind);
    let moves =
        matches!(kind, Kind::Read | Kind::Write) && operation.len == total(&operation.runs) && operation.len > 0;
    if moves && engine.move_now(kind, operation.offset, operation.durable, &operation.runs) {
        return Completion::of(operation, Ok(()));
    }
    let mut done = Vec::from_iter(engine.submit(operation));
    finish(engine, 1, &mut done);
    let completion = done.pop().unwrap();
    assert_eq!((completion.token, completion.kind), (token, kind));
    completion
}

/// Waits until there are `count` completions and nothing is pending.
fn finish(engine: &mut impl Engine, count: usize, done: &mut Vec<Completion>) {
    let mut ready = Vec::new();
    engine.kick().unwrap();
    while done.len() < count {
        engine.wait(None, &mut ready).unwrap();
        engine.reap(done);
    }
    assert_eq!((done.len(), engine.pending()), (count, 0));
}

/// Puts `bytes` into memory from `offset`.
fn fill(memory: &AlignedBuffer, offset: usize, bytes: &[u8]) {
    assert_eq!(memory.run(offset, bytes.len()).copy_from(bytes), bytes.len());
}

/// The bytes in memory behind `runs`, in order.
fn gather(runs: &[IoVec]) -> Vec<u8> {
    let mut bytes = vec![0; total(runs) as usize];
    let mut at = 0;
    for run in runs {
        at += run.copy_to(&mut bytes[at..]);
    }
    bytes
}

/// Bytes that differ everywhere, by seed.
fn pattern(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 8) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}
