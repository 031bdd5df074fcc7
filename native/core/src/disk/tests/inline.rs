//! What a worker moves by itself, and what it leaves to others.

use super::*;

const WAY: Way = Way { method: Method::Syscalls, direct: false, inline: true };
const PAGE: u64 = 4096;

/// A file in memory, where there is one, and one on the disk of temporary files.
fn setups() -> impl Iterator<Item = (bool, Setup)> {
    let place = |dir: PathBuf| {
        let setup = Setup::new(WAY, &dir, 1 << 20)?;
        Some((crate::sys::storage::file_system(std::os::fd::AsFd::as_fd(&setup.file)) == 0x0102_1994, setup))
    };
    [PathBuf::from("/dev/shm"), std::env::temp_dir()].into_iter().filter(|dir| dir.is_dir()).filter_map(place)
}

#[test]
fn what_was_just_written_is_in_memory_and_moved_at_once() {
    for (_, mut setup) in setups() {
        let (data, room) = (setup.memory.run(0, 8192), setup.memory.run(16384, 8192));
        fill(&setup.memory, 0, &pattern(8192, 1));
        // Some file systems cannot write without waiting, and say so; whoever writes, the page cache has it then.
        if !setup.engine.move_now(Kind::Write, PAGE, false, &[data]) {
            assert!(setup.run(Kind::Write, PAGE, 8192, &[data]).result.is_ok());
        }
        assert_eq!(setup.on_disk(PAGE, 8192), pattern(8192, 1));
        assert!(setup.engine.move_now(Kind::Read, PAGE, false, &[room]));
        assert_eq!(gather(&[room]), pattern(8192, 1));
        let halves = [setup.memory.run(40960, 100), setup.memory.run(50000, 8092)];
        assert!(setup.engine.move_now(Kind::Read, PAGE, false, &halves));
        assert_eq!(gather(&halves), pattern(8192, 1));
    }
}

#[test]
fn what_may_wait_is_left_to_others() {
    for (in_memory, mut setup) in setups() {
        let page = setup.memory.run(0, 4096);
        let engine = &mut setup.engine;
        assert!(!engine.move_now(Kind::Write, 0, true, &[page]), "on stable storage");
        assert!(!engine.move_now(Kind::Read, (1 << 20) - 2048, false, &[page]), "half of it is beyond the end");
        assert!(!engine.move_now(Kind::Read, u64::MAX - 100, false, &[page]));
        let long = setup.memory.run(0, 2 << 20);
        assert!(!setup.engine.move_now(Kind::Read, 0, false, &[long]), "it takes too long");
        let many = vec![setup.memory.run(0, 1); 1025];
        assert!(!setup.engine.move_now(Kind::Read, 0, false, &many), "no call takes so many");
        let part = [setup.memory.run(0, 512)];
        assert_eq!(
            setup.engine.move_now(Kind::Write, 512, false, &part),
            in_memory,
            "the rest of the page is not read for it"
        );
    }
}

#[test]
fn what_is_not_in_the_page_cache_is_not_waited_for() {
    let Some(mut setup) = Setup::new(WAY, &std::env::temp_dir(), 1 << 20) else { return };
    setup.file.write_all_at(&pattern(1 << 20, 2), 0).unwrap();
    setup.file.sync_all().unwrap();
    forget_cached(&setup.file);
    let room = setup.memory.run(0, 4096);
    if crate::sys::storage::file_system(std::os::fd::AsFd::as_fd(&setup.file)) == 0x0102_1994 {
        eprintln!("SKIPPED: temporary files are in memory");
        return;
    }
    assert!(!setup.engine.move_now(Kind::Read, 512 << 10, false, &[room]));
    assert!(setup.run(Kind::Read, 512 << 10, 4096, &[room]).result.is_ok());
    assert_eq!(gather(&[room]), pattern(1 << 20, 2)[512 << 10..][..4096]);
}

#[test]
fn nothing_is_moved_past_the_page_cache_or_where_it_is_switched_off() {
    for way in [Way { direct: true, ..WAY }, Way { inline: false, ..WAY }] {
        let Some(mut setup) = Setup::new(way, &std::env::temp_dir(), 1 << 20) else { continue };
        let page = setup.memory.run(0, 4096);
        assert!(!setup.engine.move_now(Kind::Read, 0, false, &[page]));
        assert!(!setup.engine.move_now(Kind::Write, 0, false, &[page]));
    }
}

#[allow(unsafe_code)]
pub(in crate::disk) fn forget_cached(file: &File) {
    use std::os::fd::AsRawFd;
    // SAFETY: a descriptor and numbers.
    assert_eq!(unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) }, 0);
}
