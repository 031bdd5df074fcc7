//! Copies through a mapping of the file, where that makes nobody wait and changes nothing but the bytes.
//!
//! It takes less than half of the time of a system call that copies. But who touches a page that is not in memory waits
//! for storage, and touching a hole of a file in memory fills it. So the kernel is asked before, for a window of the file
//! at a time, and believed for a moment. What is wrong by then costs a wait, or a page; never data ([`FileMap`]).

use std::os::fd::AsFd;

use super::transfer::Target;
use crate::memory::IoVec;
use crate::sys::file_map::FileMap;
use crate::sys::storage;

/// Bytes of a window, as a power of two: a table of pages on most processors.
const WINDOW_BITS: u32 = 21;
const WINDOW: u64 = 1 << WINDOW_BITS;
/// Windows that are remembered. The kernel keeps 4 KiB for each, and it counts as memory of this process, though it is
/// the page cache's.
const REMEMBERED: usize = 4096;
/// Pages that are moved in a window before the kernel is asked about it, for the first time or again: what the question
/// costs has to be worth it.
const PROOF: u32 = 32;
/// So many times as many after each answer that was no.
const MOST_DOUBLINGS: u32 = 6;
/// How long an answer is believed.
const BELIEVED_NS: u64 = 100_000_000;
/// The kernel notes the time of a write at each system call; those through the mapping it does not see. One of the writes
/// in this time is a system call, and the last one's time is noted when the worker sleeps.
const TOUCHED_NS: u64 = 10_000_000;

/// What is copied through the mapping of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mapped {
    Nothing,
    /// Reads of what is in the page cache. Writes are not: the kernel would write whole folios back, of up to 2 MiB.
    Cached,
    /// Reads and writes of a file that is nowhere but in memory.
    Whole,
}

#[derive(Clone, Copy, Debug, Default)]
struct Window {
    number: u64,
    /// Until when it is open; 0: it never was, and the kernel keeps nothing for it.
    until_ns: u64,
    /// Pages moved since the last question.
    pages: u32,
    refusals: u32,
}

/// One worker's knowledge of the mapping.
#[derive(Debug)]
pub(super) struct Copier {
    windows: Box<[Window]>,
    /// Room for the kernel's answer.
    pages: Vec<u8>,
    /// When the kernel last saw a write.
    touched_ns: u64,
    /// Whether there were writes since that it did not see.
    stale: bool,
}

impl Copier {
    pub(super) fn new(target: &Target) -> Self {
        Self {
            windows: vec![Window::default(); if target.map.is_some() { REMEMBERED } else { 0 }].into(),
            pages: Vec::new(),
            touched_ns: 0,
            stale: false,
        }
    }

    /// Copies `len` bytes into `runs` if it may; false: use a system call.
    #[inline]
    pub(super) fn read(&mut self, target: &Target, now_ns: u64, offset: u64, runs: &[IoVec], len: usize) -> bool {
        let Some(map) = &target.map else { return false };
        self.admits(target, map, now_ns, offset, len) && map.read(offset, runs)
    }

    /// Copies the `len` bytes of `runs` if it may; false: use a system call.
    #[inline]
    pub(super) fn write(&mut self, target: &Target, now_ns: u64, offset: u64, runs: &[IoVec], len: usize) -> bool {
        let Some(map) = &target.map else { return false };
        if target.ways.mapped != Mapped::Whole || now_ns >= self.touched_ns + TOUCHED_NS {
            self.touched_ns = now_ns;
            return false;
        }
        if !self.admits(target, map, now_ns, offset, len) {
            return false;
        }
        self.stale = true;
        map.write(offset, runs)
    }

    /// Has the processor fetch what is soon copied, if it is.
    #[inline]
    pub(super) fn hint(&self, target: &Target, now_ns: u64, offset: u64) {
        let Some(map) = &target.map else { return };
        let number = offset >> WINDOW_BITS;
        let window = &self.windows[number as usize % REMEMBERED];
        if window.number == number && now_ns < window.until_ns {
            map.prefetch(offset);
        }
    }

    /// The worker is about to sleep.
    #[inline]
    pub(super) fn rests(&mut self, target: &Target) {
        if std::mem::take(&mut self.stale) {
            storage::touch(target.fd.as_fd());
        }
    }

    /// The worker ends; nothing is copied any more.
    pub(super) fn ends(&mut self, target: &Target) {
        self.rests(target);
        if let Some(map) = target.map.as_ref().filter(|_| self.windows.iter().any(|window| window.until_ns > 0)) {
            map.forget_all(target.fd.as_fd());
        }
    }

    /// Whether all windows of a range are open.
    #[inline]
    fn admits(&mut self, target: &Target, map: &FileMap, now_ns: u64, offset: u64, len: usize) -> bool {
        let last = offset.saturating_add(len as u64 - 1) >> WINDOW_BITS;
        let pages = (len as u32).div_ceil(4096);
        for number in offset >> WINDOW_BITS..=last {
            let window = &mut self.windows[number as usize % REMEMBERED];
            if window.number == number && now_ns < window.until_ns {
                window.pages = window.pages.saturating_add(pages);
            } else if !self.consider(target, map, now_ns, number, pages) {
                return false;
            }
        }
        !map.lost()
    }

    /// Opens a window that is worth it, if the kernel agrees.
    #[cold]
    fn consider(&mut self, target: &Target, map: &FileMap, now_ns: u64, number: u64, pages: u32) -> bool {
        let window = &mut self.windows[number as usize % REMEMBERED];
        if window.number != number {
            let before = std::mem::replace(window, Window { number, ..Window::default() });
            if before.until_ns > 0 {
                map.forget(target.fd.as_fd(), before.number << WINDOW_BITS, WINDOW as usize);
            }
        }
        window.pages = window.pages.saturating_add(pages);
        if window.pages < PROOF << window.refusals || map.lost() {
            return false;
        }
        window.pages = 0;
        let start = number << WINDOW_BITS;
        let len = storage::size(target.fd.as_fd()).unwrap_or(0).saturating_sub(start).min(WINDOW) as usize;
        // The answer is no for holes, too.
        let agreed = map.in_memory(start, len, &mut self.pages);
        if agreed {
            if window.until_ns == 0 {
                map.prepare(start, len);
            }
            (window.until_ns, window.refusals) = (now_ns + BELIEVED_NS, 0);
        } else {
            window.refusals = (window.refusals + 1).min(MOST_DOUBLINGS);
        }
        agreed
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::{FileExt, MetadataExt};
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::sys::buffer::AlignedBuffer;

    const PAGE: usize = 4096;
    const NOW: u64 = 1 << 40;

    /// A file of three windows and a bit, written everywhere, and one worker's copier.
    struct Setup {
        target: Target,
        file: File,
        copier: Copier,
        memory: AlignedBuffer,
        path: PathBuf,
    }

    impl Setup {
        fn new(dir: &Path, name: &str) -> Option<Self> {
            let path = dir.join(format!("vhostuser-mapped-{name}-{}", std::process::id()));
            let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
            file.write_all_at(&vec![7; 3 * WINDOW as usize + 512], 0).unwrap();
            let target = Target::new(file.try_clone().unwrap().into(), false, None, true);
            if target.map.is_none() {
                eprintln!("SKIPPED: files in {} are not mapped", dir.display());
                std::fs::remove_file(&path).unwrap();
                return None;
            }
            let (copier, memory) = (Copier::new(&target), AlignedBuffer::new(1 << 20, PAGE).unwrap());
            Some(Self { target, file, copier, memory, path })
        }

        fn in_memory(name: &str) -> Option<Self> {
            Self::new(Path::new("/dev/shm"), name)
        }

        /// What moves `len` bytes at `offset` through the mapping, at `NOW` and so many nanoseconds.
        fn read(&mut self, later: u64, offset: u64, len: usize) -> bool {
            self.copier.read(&self.target, NOW + later, offset, &[self.memory.run(0, len)], len)
        }

        fn write(&mut self, later: u64, offset: u64, len: usize) -> bool {
            self.copier.write(&self.target, NOW + later, offset, &[self.memory.run(0, len)], len)
        }

        /// Opens the window at `offset`, and tells how many reads by system calls that took.
        fn open(&mut self, later: u64, offset: u64) -> usize {
            (0..PROOF).position(|_| self.read(later, offset, PAGE)).unwrap()
        }

        fn byte(&self) -> u8 {
            let mut byte = [0];
            self.memory.run(0, 1).copy_to(&mut byte);
            byte[0]
        }

        /// Kibibytes that the kernel keeps for the mappings of this process.
        fn tables() -> u64 {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("VmPTE:")).unwrap();
            line.split_whitespace().next().unwrap().parse().unwrap()
        }
    }

    impl Drop for Setup {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.path);
        }
    }

    #[test]
    fn a_window_opens_once_it_is_worth_it_and_for_a_moment() {
        for dir in [Path::new("/dev/shm"), &std::env::temp_dir()] {
            let Some(mut setup) = Setup::new(dir, "opens") else { continue };
            assert_eq!(setup.open(0, 100 * PAGE as u64), PROOF as usize - 1);
            assert_eq!(setup.byte(), 7);
            setup.file.write_all_at(&[9], 0).unwrap();
            assert!(setup.read(BELIEVED_NS - 1, 0, PAGE), "all of the window");
            assert_eq!(setup.byte(), 9, "the same bytes as anybody's");
            assert!(!setup.read(0, WINDOW, PAGE), "another window");
            assert!(!setup.read(0, WINDOW - 512, 1024), "half of it in another window");
            setup.open(1, WINDOW + 8 * PAGE as u64);
            assert!(setup.read(1, WINDOW - 512, 1024));
            assert!(!setup.read(BELIEVED_NS, 0, PAGE), "it was used little");
            assert!((0..PROOF).all(|_| setup.read(1, WINDOW, PAGE)));
            assert!(setup.read(BELIEVED_NS + 1, WINDOW, PAGE), "another question is worth it");
            setup.open(0, 3 * WINDOW);
        }
    }

    #[test]
    fn long_requests_count_as_many() {
        let Some(mut setup) = Setup::in_memory("long") else { return };
        assert!(!setup.read(0, 0, (PROOF as usize - 1) * PAGE));
        assert!(setup.read(0, 0, 512));
    }

    #[test]
    fn holes_are_left_to_the_kernel() {
        let Some(mut setup) = Setup::in_memory("holes") else { return };
        setup.file.set_len(WINDOW + 4096).unwrap();
        setup.file.set_len(3 * WINDOW).unwrap();
        let before = setup.file.metadata().unwrap().blocks();
        for offset in [WINDOW, 2 * WINDOW] {
            assert!((0..1000).all(|_| !setup.read(0, offset, PAGE)), "its neighbours are holes");
        }
        assert_eq!(setup.file.metadata().unwrap().blocks(), before, "reading has filled nothing");
        setup.file.write_all_at(&vec![1; WINDOW as usize], WINDOW).unwrap();
        let asked_again = (0..PROOF << MOST_DOUBLINGS).any(|_| setup.read(0, WINDOW, PAGE));
        assert!(asked_again);
    }

    #[test]
    fn what_is_not_in_memory_is_not_waited_for() {
        let Some(mut setup) = Setup::new(&std::env::temp_dir(), "cold") else { return };
        setup.file.sync_all().unwrap();
        crate::disk::tests::forget_cached(&setup.file);
        assert!((0..1000).all(|_| !setup.read(0, 0, PAGE)));
    }

    #[test]
    fn writes_are_seen_by_others_and_leave_their_time() {
        let Some(mut setup) = Setup::in_memory("times") else { return };
        setup.open(0, 0);
        setup.memory.run(0, PAGE).copy_from(&[5; PAGE]);
        assert!(!setup.write(0, 0, PAGE), "the first one is the kernel's to see");
        assert!(setup.write(1, PAGE as u64, PAGE));
        let mut bytes = [0; PAGE];
        setup.file.read_exact_at(&mut bytes, PAGE as u64).unwrap();
        assert_eq!(bytes, [5; PAGE]);
        assert!(setup.write(TOUCHED_NS - 1, PAGE as u64, PAGE));
        assert!(!setup.write(TOUCHED_NS, PAGE as u64, PAGE), "one of many again");

        let changed = |setup: &Setup| setup.file.metadata().unwrap().modified().unwrap();
        let before = changed(&setup);
        std::thread::sleep(std::time::Duration::from_millis(20));
        setup.copier.rests(&setup.target);
        let after = changed(&setup);
        assert!(after > before);
        std::thread::sleep(std::time::Duration::from_millis(20));
        setup.copier.rests(&setup.target);
        assert_eq!(changed(&setup), after, "nothing was written since");
    }

    #[test]
    fn a_file_that_may_only_be_read_is_not_written() {
        let Some(mut setup) = Setup::in_memory("reader") else { return };
        setup.target = Target::new(File::open(&setup.path).unwrap().into(), false, None, true);
        setup.open(0, 0);
        assert!(!setup.write(0, 0, PAGE) && !setup.write(1, 0, PAGE));
        assert!(setup.read(1, 0, PAGE));
    }

    #[test]
    fn files_with_a_file_system_behind_are_only_read() {
        let Some(mut setup) = Setup::new(&std::env::temp_dir(), "only-read") else { return };
        if setup.target.ways.mapped != Mapped::Cached {
            return eprintln!("SKIPPED: temporary files are in memory");
        }
        setup.open(0, 0);
        assert!(!setup.write(0, 0, PAGE) && !setup.write(1, 0, PAGE));
    }

    #[test]
    fn a_file_that_is_shortened_costs_the_mapping_only() {
        let (Some(mut setup), Some(mut other)) = (Setup::in_memory("short"), Setup::in_memory("other")) else { return };
        setup.open(0, 0);
        other.open(0, 0);
        setup.file.set_len(WINDOW / 2).unwrap();
        assert!(setup.read(1, 0, PAGE), "what is left of it");
        assert!(!setup.read(1, WINDOW / 2, PAGE), "nothing is there");
        assert!(!setup.read(1, 0, PAGE) && !setup.write(1, 0, PAGE), "it is not used any more");
        setup.file.read_exact_at(&mut [0], 0).unwrap();
        assert!((0..1000).all(|_| !setup.read(2 * BELIEVED_NS, 0, PAGE)), "for good");
        assert!(other.read(1, 0, PAGE));
    }

    #[test]
    fn what_the_kernel_keeps_is_given_back() {
        let dir = Path::new("/dev/shm");
        let path = dir.join(format!("vhostuser-mapped-tables-{}", std::process::id()));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        // Windows that have the same place, so that each new one makes the one before be forgotten.
        let step = REMEMBERED as u64 * WINDOW;
        const COUNT: u64 = 64;
        file.set_len(COUNT * step).unwrap();
        for number in 0..COUNT {
            file.write_all_at(&vec![1; WINDOW as usize], number * step).unwrap();
        }
        let target = Target::new(file.into(), false, None, true);
        let Some(map) = &target.map else { return eprintln!("SKIPPED: nothing is mapped") };
        let (mut copier, memory) = (Copier::new(&target), AlignedBuffer::new(PAGE, PAGE).unwrap());
        let before = Setup::tables();
        for number in 0..COUNT {
            let opens = |_| copier.read(&target, NOW, number * step, &[memory.run(0, PAGE)], PAGE);
            assert!((0..PROOF).any(opens), "window {number}");
        }
        // A table of pages each would be 4 KiB more: what is left is the one above it, which reaches for 1 GiB.
        let kept = Setup::tables().saturating_sub(before);
        assert!(kept < 6 * COUNT, "{kept} KiB");
        assert!(map.read(0, &[memory.run(0, PAGE)]), "what was forgotten comes back");
        assert!(map.read((COUNT - 1) * step, &[memory.run(0, PAGE)]));
        copier.ends(&target);
        assert!(map.read(0, &[memory.run(0, PAGE)]));
    }
}
