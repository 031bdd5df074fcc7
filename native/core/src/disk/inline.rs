//! Reads and writes that a worker makes itself, since they only copy: between guest memory and the page cache.
//!
//! Handing a request to the kernel's threads, or to ours, and being told of its end costs several times what the copy
//! does. What may make a worker wait for storage must not be done here for long: where the kernel can be asked to
//! refuse instead of waiting (RWF_NOWAIT), it is; where it cannot, [`Guard`] bounds what waiting costs.

use std::os::fd::{AsFd, BorrowedFd};

use super::mapped::{Copier, Mapped};
use super::transfer::Target;
use super::Kind;
use crate::memory::IoVec;
use crate::sys::storage::{self, Outcome, MAX_RUNS};
use crate::sys::thread::times_slept;
use crate::worker::now_ns;

/// The longest that is copied here, in bytes: some 0.1 ms.
const MAX_LEN: usize = 1 << 20;
/// Writes that begin or end within a page may have to read it first.
const PAGE: u64 = 4096;
/// A batch that took longer is looked at.
const LONG_NS: u64 = 1_000_000;
/// After a wait nothing that could wait again is done here for so many times as long: workers spend no more than a
/// hundredth of their time waiting.
const REST: u64 = 100;
/// Most reads in a row that are not tried after some that found nothing in memory.
const MAX_SKIPPED: u32 = 64;

const TMPFS: i64 = 0x0102_1994;
const RAMFS: i64 = 0x8584_58f6;
/// ext2, ext3 and ext4: the kernel has one number for them.
const EXT4: i64 = 0xef53;

/// How a file is read, or written, without waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Not at all.
    Never,
    /// The kernel refuses what would wait.
    Asked,
    /// It hardly ever waits, and does not refuse.
    Guarded,
}

/// How a file is read and written without waiting.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ways {
    reads: Way,
    writes: Way,
    /// Writes that touch a part of a page are made elsewhere.
    whole_pages: bool,
    /// What needs no system call.
    pub(super) mapped: Mapped,
}

impl Ways {
    /// Not at all.
    pub(super) const NONE: Self =
        Self { reads: Way::Never, writes: Way::Never, whole_pages: false, mapped: Mapped::Nothing };

    /// What the file system of `fd` suggests. The first call shows whether it has RWF_NOWAIT.
    pub(super) fn of(fd: BorrowedFd<'_>) -> Self {
        match storage::file_system(fd) {
            // The page cache is all there is; only what was swapped out, or a limit on memory, makes one wait.
            TMPFS => Self { reads: Way::Guarded, writes: Way::Guarded, whole_pages: false, mapped: Mapped::Whole },
            RAMFS => Self { reads: Way::Guarded, writes: Way::Guarded, whole_pages: false, mapped: Mapped::Nothing },
            // Buffered writes have no RWF_NOWAIT there. They wait for a commit of the journal, for memory, and when
            // too much is dirty.
            EXT4 => Self { reads: Way::Asked, writes: Way::Guarded, whole_pages: true, mapped: Mapped::Cached },
            _ => Self { reads: Way::Asked, writes: Way::Asked, whole_pages: true, mapped: Mapped::Nothing },
        }
    }
}

/// Bounds the time that a thread waits in calls that may wait: it looks at the clock once a batch, and only when that
/// took long, asks the kernel whether the thread slept or was merely kept from running.
#[derive(Debug, Default)]
struct Guard {
    /// When this batch began, as far as is known.
    since_ns: Option<u64>,
    /// How often the thread had slept by then.
    slept: u64,
    /// Something was done in this batch that could have waited.
    used: bool,
    closed_until_ns: u64,
    /// Whether the guard is closed, in this batch.
    closed: bool,
}

impl Guard {
    /// Whether something that may wait may be done now.
    fn admits(&mut self) -> bool {
        if !self.used && !self.closed {
            let now = *self.since_ns.get_or_insert_with(|| {
                self.slept = times_slept();
                now_ns()
            });
            self.closed = now < self.closed_until_ns;
            self.used = !self.closed;
        }
        self.used
    }

    /// A batch is over and the next one begins.
    fn tick(&mut self, now_ns: u64) {
        if self.used {
            let took = now_ns.saturating_sub(self.since_ns.unwrap_or(now_ns));
            if took > LONG_NS {
                let slept = times_slept();
                if slept != std::mem::replace(&mut self.slept, slept) {
                    self.closed_until_ns = now_ns.saturating_add(took.saturating_mul(REST));
                }
            }
        }
        (self.used, self.closed) = (false, false);
        self.since_ns = self.since_ns.map(|_| now_ns);
    }

    /// The thread has slept, of its own will: what is known of clock and sleep is of no use.
    fn forget(&mut self) {
        self.since_ns = None;
    }
}

/// One worker's own reads and writes of a file.
#[derive(Debug)]
pub(super) struct Inline {
    ways: Ways,
    guard: Guard,
    copier: Copier,
    /// The time of this batch.
    now_ns: u64,
    /// Reads in a row that found too little in memory, and how many of those that come are not tried.
    misses: u32,
    skipped: u32,
}

impl Inline {
    pub(super) fn new(target: &Target) -> Self {
        Self {
            ways: target.ways,
            guard: Guard::default(),
            copier: Copier::new(target),
            now_ns: now_ns(),
            misses: 0,
            skipped: 0,
        }
    }

    /// See [`super::Engine::move_now`].
    pub(super) fn move_now(&mut self, target: &Target, kind: Kind, offset: u64, durable: bool, runs: &[IoVec]) -> bool {
        let way = match kind {
            Kind::Read => self.ways.reads,
            Kind::Write if durable => return false,
            _ => self.ways.writes,
        };
        if way == Way::Never || runs.len() > MAX_RUNS {
            return false;
        }
        let len = runs.iter().map(IoVec::len).sum::<usize>();
        if len > MAX_LEN || offset.checked_add(len as u64).is_none_or(|end| end > i64::MAX as u64) {
            return false;
        }
        if target.map.is_some() && self.guard.admits() && self.copy(target, kind, offset, runs, len) {
            return true;
        }
        match (way, kind) {
            (Way::Asked, Kind::Read) => self.read_cached(target, offset, runs, len),
            (_, Kind::Read) => self.guard.admits() && storage::read(target.fd.as_fd(), runs, offset) == Ok(len),
            _ if self.ways.whole_pages && (offset | len as u64) % PAGE != 0 => false,
            (Way::Asked, _) => {
                let outcome = storage::write_cached(target.fd.as_fd(), runs, offset);
                Self::learn(&mut self.ways.writes, outcome) == Ok(len)
            }
            _ => self.guard.admits() && storage::write(target.fd.as_fd(), runs, offset, false) == Ok(len),
        }
    }

    #[inline]
    fn copy(&mut self, target: &Target, kind: Kind, offset: u64, runs: &[IoVec], len: usize) -> bool {
        match kind {
            Kind::Read => self.copier.read(target, self.now_ns, offset, runs, len),
            _ => self.copier.write(target, self.now_ns, offset, runs, len),
        }
    }

    /// Reads what is in the page cache. Where reads mostly find nothing there, they stop trying for a while.
    fn read_cached(&mut self, target: &Target, offset: u64, runs: &[IoVec], len: usize) -> bool {
        if self.skipped > 0 {
            self.skipped -= 1;
            return false;
        }
        let outcome = storage::read_cached(target.fd.as_fd(), runs, offset);
        let hit = Self::learn(&mut self.ways.reads, outcome) == Ok(len);
        self.misses = if hit { 0 } else { (self.misses + 1).min(MAX_SKIPPED.ilog2()) };
        self.skipped = (1 << self.misses) - 1 - u32::from(self.misses > 0);
        hit
    }

    fn learn(way: &mut Way, outcome: Outcome) -> Outcome {
        if matches!(outcome, Err(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS)) {
            *way = Way::Never;
        }
        outcome
    }

    /// See [`super::Engine::tick`].
    #[inline]
    pub(super) fn tick(&mut self, now_ns: u64) {
        self.guard.tick(now_ns);
        self.now_ns = now_ns;
    }

    /// See [`super::Engine::hint`].
    #[inline]
    pub(super) fn hint(&self, target: &Target, offset: u64) {
        self.copier.hint(target, self.now_ns, offset);
    }

    /// The worker ends.
    pub(super) fn ends(&mut self, target: &Target) {
        self.copier.ends(target);
    }

    /// The worker is about to sleep.
    pub(super) fn sleeps(&mut self, target: &Target) {
        self.copier.rests(target);
        if self.guard.used {
            self.guard.tick(now_ns());
        }
        self.guard.forget();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guard_closes_for_a_hundred_times_as_long_as_the_thread_slept() {
        let mut guard = Guard::default();
        assert!(guard.admits());
        let began = guard.since_ns.unwrap();
        std::thread::sleep(std::time::Duration::from_millis(2));
        let now = now_ns();
        guard.tick(now);
        assert!(!guard.admits(), "it slept");
        guard.tick(now + REST * (now - began) - 1);
        assert!(!guard.admits(), "it still rests");
        guard.tick(now + REST * (now - began));
        assert!(guard.admits(), "it has rested");
    }

    #[test]
    fn a_thread_that_was_only_busy_or_kept_from_running_is_not_held_back() {
        let mut guard = Guard::default();
        assert!(guard.admits());
        let began = guard.since_ns.unwrap();
        while now_ns() < began + 2 * LONG_NS {
            std::hint::spin_loop();
        }
        guard.tick(now_ns());
        assert!(guard.admits());
    }

    #[test]
    fn sleep_between_batches_is_nobodys_fault() {
        let mut guard = Guard::default();
        assert!(guard.admits());
        guard.tick(now_ns());
        guard.forget();
        std::thread::sleep(std::time::Duration::from_millis(2));
        guard.tick(now_ns());
        assert!(guard.admits());
        guard.tick(now_ns());
        assert!(guard.admits());
    }
}
