//! One operation on a file, as the system calls it takes.
//!
//! A [`Transfer`] says what to do next ([`Transfer::step`]) and is told how that ended
//! ([`Transfer::advance`]), until it ends. It knows how reads and writes go on after a short one,
//! how long lists are split, when direct I/O needs an aligned buffer, and what to try when the file
//! cannot discard or zero. Who makes the calls, io_uring or a thread, it does not know.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use super::inline::Ways;
use super::mapped::Mapped;
use super::{Completion, Kind, Operation};
use crate::memory::IoVec;
use crate::sys::buffer::{copy, no_bytes, zeroes, AlignedBuffer};
use crate::sys::file_map::FileMap;
use crate::sys::storage::{Outcome, MAX_RUNS};

/// Bytes of one step: a multiple of any alignment, and below the 2 GiB at which the kernel cuts.
const MAX_STEP: usize = 1 << 30;
/// Bytes of a bounce buffer; longer requests go through it piece by piece.
const BOUNCE: usize = 256 << 10;
/// Interrupted or refused for the moment so many times in a row, a step has failed.
const MAX_RETRIES: u32 = 100;

/// What direct I/O demands of a file, in bytes, powers of two (`statx`: stx_dio_mem_align, stx_dio_offset_align).
#[derive(Clone, Copy, Debug)]
pub(super) struct Alignment {
    pub(super) memory: usize,
    pub(super) offset: usize,
}

impl Alignment {
    /// A transfer cut at a multiple of this can go on.
    fn unit(self) -> usize {
        self.memory.max(self.offset)
    }
}

/// A file or block device, shared by the engines of one disk, and what it turned out not to do.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) fd: OwnedFd,
    pub(super) block_device: bool,
    /// Some for a descriptor opened with O_DIRECT.
    pub(super) direct: Option<Alignment>,
    /// How it is read and written without waiting.
    pub(super) ways: Ways,
    /// Its bytes, where they can be had without system calls.
    pub(super) map: Option<FileMap>,
    no_punch: AtomicBool,
    no_zero_range: AtomicBool,
    no_block_zero: AtomicBool,
}

impl Target {
    pub(super) fn new(fd: OwnedFd, block_device: bool, direct: Option<Alignment>, inline: bool) -> Self {
        let ways = if inline && direct.is_none() { Ways::of(fd.as_fd()) } else { Ways::NONE };
        let map = match ways.mapped {
            Mapped::Nothing => None,
            mapped => FileMap::new(fd.as_fd(), mapped == Mapped::Whole).ok(),
        };
        Self {
            ways,
            map,
            fd,
            block_device,
            direct,
            no_punch: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
            no_block_zero: AtomicBool::new(false),
        }
    }

    /// A buffer to bounce through.
    pub(super) fn buffer(&self) -> std::io::Result<AlignedBuffer> {
        let unit = self.direct.map_or(1, Alignment::unit);
        AlignedBuffer::new(BOUNCE.max(unit), unit.max(4096))
    }

    /// Where the range `kind` is tried first.
    fn first_method(&self, kind: Kind) -> Method {
        match (self.block_device, kind) {
            (true, Kind::Discard) => Method::BlockDiscard,
            (false, Kind::Discard) | (_, Kind::WriteZeroes { unmap: true }) => self.known(Method::Punch, kind),
            (true, _) => self.known(Method::BlockZeroOut, kind),
            (false, _) => self.known(Method::ZeroRange, kind),
        }
    }

    /// `method`, or what comes after it when it is known to be refused.
    fn known(&self, method: Method, kind: Kind) -> Method {
        let refused = match method {
            Method::Punch => &self.no_punch,
            Method::ZeroRange => &self.no_zero_range,
            Method::BlockZeroOut => &self.no_block_zero,
            _ => return method,
        };
        if refused.load(Ordering::Relaxed) {
            return self.next_method(method, kind);
        }
        method
    }

    /// What to try when `method` is not supported. A hole reads as zero but is no allocation: it never stands
    /// in for zeroes that must stay allocated.
    fn next_method(&self, method: Method, kind: Kind) -> Method {
        let refused = match method {
            Method::Punch => &self.no_punch,
            Method::ZeroRange => &self.no_zero_range,
            Method::BlockZeroOut => &self.no_block_zero,
            _ => return Method::Nothing,
        };
        refused.store(true, Ordering::Relaxed);
        match method {
            Method::Punch if kind == Kind::Discard => Method::Nothing,
            Method::Punch if self.block_device => self.known(Method::BlockZeroOut, kind),
            Method::Punch => self.known(Method::ZeroRange, kind),
            _ => Method::Write,
        }
    }
}

/// A way to discard or to zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    Punch,
    ZeroRange,
    BlockDiscard,
    BlockZeroOut,
    /// Write zeroes, piece by piece.
    Write,
    /// A discard that storage cannot do is done: it was advice.
    Nothing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Move the runs themselves.
    Runs,
    /// Move pieces of them through the buffer: `piece` bytes are in it, `moved` of them done.
    Bounce {
        piece: usize,
        moved: usize,
    },
    Range(Method),
    Sync,
    Ended(Result<(), i32>),
}

/// What to do next.
#[derive(Debug)]
pub(super) enum Step<'a> {
    /// Fill one to [`MAX_RUNS`] runs.
    Read { runs: &'a [IoVec], offset: u64 },
    /// Store one to [`MAX_RUNS`] runs.
    Write { runs: &'a [IoVec], offset: u64, durable: bool },
    /// `fallocate`.
    Allocate { mode: i32, offset: u64, len: u64 },
    /// BLKDISCARD.
    BlockDiscard { offset: u64, len: u64 },
    /// BLKZEROOUT.
    BlockZeroOut { offset: u64, len: u64 },
    /// `fdatasync`.
    Sync,
    /// [`Transfer::lend`] an aligned buffer.
    Buffer,
    /// Nothing: it has ended.
    End(Result<(), i32>),
}

/// An operation under way.
#[derive(Debug)]
pub(super) struct Transfer {
    operation: Operation,
    stage: Stage,
    /// Bytes of the operation that are done.
    done: u64,
    /// The first run with something left.
    first: usize,
    retries: u32,
    /// Bytes that the step under way moves when it is not cut short.
    asked: usize,
    /// The run of a step that has only one.
    single: [IoVec; 1],
    buffer: Option<AlignedBuffer>,
    bounced: bool,
    repeatable: bool,
}

impl Transfer {
    pub(super) fn new(operation: Operation, target: &Target) -> Self {
        let stage = match operation.kind {
            Kind::Flush => Stage::Sync,
            _ if operation.len == 0 => Stage::Ended(Ok(())),
            _ if operation.offset.checked_add(operation.len).is_none_or(|end| end > i64::MAX as u64) => {
                Stage::Ended(Err(libc::EINVAL))
            }
            Kind::Read | Kind::Write => Self::first_stage(&operation, target),
            kind => Stage::Range(target.first_method(kind)),
        };
        let bounced = matches!(stage, Stage::Bounce { .. });
        let repeatable = operation.kind != Kind::Flush;
        Self {
            operation,
            stage,
            done: 0,
            first: 0,
            retries: 0,
            asked: 0,
            single: [no_bytes()],
            buffer: None,
            bounced,
            repeatable,
        }
    }

    fn first_stage(operation: &Operation, target: &Target) -> Stage {
        let total = operation.runs.iter().map(|run| run.len() as u64).sum::<u64>();
        if total != operation.len {
            return Stage::Ended(Err(libc::EINVAL));
        }
        let Some(align) = target.direct else { return Stage::Runs };
        if operation.offset % align.offset as u64 != 0 || operation.len % align.offset as u64 != 0 {
            // A part of a block cannot be written without racing for the rest of it.
            return Stage::Ended(Err(libc::EINVAL));
        }
        let fits = |run: &IoVec| run.as_ptr() as usize % align.memory == 0 && run.len() % align.offset == 0;
        if operation.runs.iter().all(fits) {
            Stage::Runs
        } else {
            Stage::Bounce { piece: 0, moved: 0 }
        }
    }

    /// What to do next. Asked once per step.
    pub(super) fn step(&mut self) -> Step<'_> {
        let offset = self.operation.offset.wrapping_add(self.done);
        let left = self.operation.len - self.done;
        match self.stage {
            Stage::Ended(result) => Step::End(result),
            Stage::Sync => Step::Sync,
            Stage::Runs => self.step_runs(offset),
            Stage::Bounce { .. } if self.buffer.is_none() => Step::Buffer,
            Stage::Bounce { piece, moved } => self.step_bounce(piece, moved, offset, left),
            Stage::Range(method) => match method {
                Method::Punch => {
                    Step::Allocate { mode: libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, len: left }
                }
                Method::ZeroRange => {
                    Step::Allocate { mode: libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE, offset, len: left }
                }
                Method::BlockDiscard => Step::BlockDiscard { offset, len: left },
                Method::BlockZeroOut => Step::BlockZeroOut { offset, len: left },
                Method::Nothing => Step::End(Ok(())),
                Method::Write => match zeroes() {
                    Ok(mut run) => {
                        run.truncate(usize::try_from(left).unwrap_or(usize::MAX));
                        self.asked = run.len();
                        self.single = [run];
                        Step::Write { runs: &self.single, offset, durable: false }
                    }
                    Err(error) => Step::End(Err(error.raw_os_error().unwrap_or(libc::ENOMEM))),
                },
            },
        }
    }

    fn step_runs(&mut self, offset: u64) -> Step<'_> {
        while self.operation.runs.get(self.first).is_some_and(IoVec::is_empty) {
            self.first += 1;
        }
        let rest = &self.operation.runs[self.first..];
        let (mut count, mut bytes) = (0, 0_usize);
        for run in rest.iter().take(MAX_RUNS) {
            match bytes.checked_add(run.len()) {
                Some(sum) if sum <= MAX_STEP => bytes = sum,
                _ => break,
            }
            count += 1;
        }
        let runs = match rest {
            [] => return Step::End(Err(libc::EINVAL)),
            _ if count > 0 => &rest[..count],
            [long, ..] => {
                self.single = [*long];
                self.single[0].truncate(MAX_STEP);
                bytes = MAX_STEP;
                &self.single
            }
        };
        self.asked = bytes;
        match self.operation.kind {
            Kind::Read => Step::Read { runs, offset },
            _ => Step::Write { runs, offset, durable: self.operation.durable },
        }
    }

    fn step_bounce(&mut self, piece: usize, moved: usize, offset: u64, left: u64) -> Step<'_> {
        let Some(buffer) = &self.buffer else { return Step::Buffer };
        let mut piece = piece;
        if piece == 0 {
            piece = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
            self.stage = Stage::Bounce { piece, moved: 0 };
            if self.operation.kind == Kind::Write {
                exchange(&mut self.operation.runs, &mut self.first, buffer.run(0, piece), Direction::Gather);
            }
        }
        self.asked = piece - moved;
        self.single = [buffer.run(moved, self.asked)];
        let (runs, offset) = (&self.single, offset + moved as u64);
        match self.operation.kind {
            Kind::Read => Step::Read { runs, offset },
            _ => Step::Write { runs, offset, durable: self.operation.durable },
        }
    }

    /// Whether the last try was refused for the moment: the next one had better be allowed to block.
    pub(super) fn retrying(&self) -> bool {
        self.retries > 0
    }

    /// Hands over the buffer that [`Step::Buffer`] asked for.
    pub(super) fn lend(&mut self, buffer: AlignedBuffer) {
        self.buffer = Some(buffer);
    }

    /// Takes the buffer back, once the transfer has ended.
    pub(super) fn take_buffer(&mut self) -> Option<AlignedBuffer> {
        self.buffer.take()
    }

    /// Ends the transfer before its time, while nothing of it is under way.
    pub(super) fn fail(&mut self, errno: i32) {
        self.stage = Stage::Ended(Err(errno));
    }

    /// Tells how the last step ended.
    pub(super) fn advance(&mut self, outcome: Outcome, target: &Target) {
        let outcome = match outcome {
            Err(libc::EINTR | libc::EAGAIN) if self.retries < MAX_RETRIES => {
                self.retries += 1;
                return;
            }
            other => other,
        };
        self.retries = 0;
        self.stage = match (self.stage, outcome) {
            (Stage::Range(method), Err(libc::EOPNOTSUPP | libc::ENOTTY | libc::ENOSYS)) if method != Method::Write => {
                Stage::Range(target.next_method(method, self.operation.kind))
            }
            (stage, Err(errno)) => {
                self.repeatable &= !self.synced_by(stage, target);
                Stage::Ended(Err(errno))
            }
            (Stage::Runs, Ok(count)) => self.advance_runs(count, target),
            (Stage::Bounce { piece, moved }, Ok(count)) => self.advance_bounce(piece, moved, count, target),
            (Stage::Range(Method::Write), Ok(count)) => {
                self.done += self.usable(count, target) as u64;
                match self.usable(count, target) {
                    0 => Stage::Ended(Err(libc::EIO)),
                    _ if self.done == self.operation.len => self.after_range(),
                    _ => self.stage,
                }
            }
            (Stage::Range(_), Ok(_)) => self.after_range(),
            (Stage::Sync, Ok(_)) => Stage::Ended(Ok(())),
            (ended @ Stage::Ended(_), Ok(_)) => ended,
        };
    }

    /// Whether the step of `stage` syncs the page cache, so that its failure may have cost dirty pages.
    fn synced_by(&self, stage: Stage, target: &Target) -> bool {
        match stage {
            Stage::Sync => true,
            Stage::Runs | Stage::Bounce { .. } => {
                self.operation.kind == Kind::Write && self.operation.durable && target.direct.is_none()
            }
            Stage::Range(_) | Stage::Ended(_) => false,
        }
    }

    /// Discards and zeroes reach stable storage by a sync of their own; writes do by their flag.
    fn after_range(&self) -> Stage {
        if self.operation.durable {
            Stage::Sync
        } else {
            Stage::Ended(Ok(()))
        }
    }

    fn advance_runs(&mut self, count: usize, target: &Target) -> Stage {
        let mut count = self.usable(count, target);
        if count == 0 {
            return Stage::Ended(Err(libc::EIO));
        }
        self.done += count as u64;
        if self.done == self.operation.len {
            return Stage::Ended(Ok(()));
        }
        while let Some(run) = self.operation.runs.get_mut(self.first) {
            if count < run.len() {
                run.advance(count);
                break;
            }
            count -= run.len();
            self.first += 1;
        }
        Stage::Runs
    }

    fn advance_bounce(&mut self, piece: usize, moved: usize, count: usize, target: &Target) -> Stage {
        let count = self.usable(count, target);
        if count == 0 {
            return Stage::Ended(Err(libc::EIO));
        }
        if moved + count < piece {
            return Stage::Bounce { piece, moved: moved + count };
        }
        if let (Kind::Read, Some(buffer)) = (self.operation.kind, &self.buffer) {
            exchange(&mut self.operation.runs, &mut self.first, buffer.run(0, piece), Direction::Scatter);
        }
        self.done += piece as u64;
        if self.done == self.operation.len {
            return Stage::Ended(Ok(()));
        }
        Stage::Bounce { piece: 0, moved: 0 }
    }

    /// How much of `count` bytes counts. Direct I/O goes on at a whole unit only, so the rest is moved again;
    /// at the end of a file, and for nothing at all, that is nothing.
    fn usable(&self, count: usize, target: &Target) -> usize {
        match target.direct {
            Some(align) if count < self.asked => count - count % align.unit(),
            _ => count.min(self.asked),
        }
    }

    /// How it ended; `EIO` for one that has not.
    pub(super) fn result(&mut self) -> Result<(), i32> {
        match self.step() {
            Step::End(result) => result,
            _ => Err(libc::EIO),
        }
    }

    /// Gives the operation back, after [`Step::End`] said how it ended.
    pub(super) fn complete(self, result: Result<(), i32>) -> Completion {
        let (bounced, repeatable) = (self.bounced, self.repeatable);
        Completion { bounced, repeatable, ..Completion::of(self.operation, result) }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Gather,
    Scatter,
}

/// Copies between `piece` and the next bytes of `runs`, and moves on in them.
fn exchange(runs: &mut [IoVec], first: &mut usize, mut piece: IoVec, direction: Direction) {
    while let Some(run) = runs.get_mut(*first) {
        let count = match direction {
            Direction::Gather => copy(run, &piece),
            Direction::Scatter => copy(&piece, run),
        };
        run.advance(count);
        piece.advance(count);
        if !run.is_empty() {
            return;
        }
        *first += 1;
    }
}
