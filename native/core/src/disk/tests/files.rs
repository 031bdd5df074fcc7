//! What goes to a file and what comes from it.

use super::*;

#[test]
fn what_is_written_is_read_back() {
    for mut setup in Setup::each(1 << 20) {
        let data = pattern(3 * BLOCK, 1);
        fill(&setup.memory, 0, &data);
        let runs = [setup.memory.run(0, BLOCK), setup.memory.run(BLOCK, 2 * BLOCK)];
        let done = setup.run(Kind::Write, 5 * BLOCK as u64, 3 * BLOCK as u64, &runs);
        assert_eq!((done.result, done.bounced), (Ok(()), false), "{:?}", setup.way);
        assert_eq!(setup.on_disk(5 * BLOCK as u64, data.len()), data);
        let into = [setup.memory.run(8 * BLOCK, 2 * BLOCK), setup.memory.run(16 * BLOCK, BLOCK)];
        let done = setup.run(Kind::Read, 5 * BLOCK as u64, 3 * BLOCK as u64, &into);
        assert_eq!((done.result, done.bounced), (Ok(()), false), "{:?}", setup.way);
        assert_eq!(gather(&into), data);
    }
}

#[test]
fn misaligned_runs_bounce_only_past_the_page_cache() {
    for mut setup in Setup::each(4 << 20) {
        // More than one bounce buffer, in runs of odd lengths at odd addresses.
        let len = 1 << 20;
        let data = pattern(len, 2);
        fill(&setup.memory, 1, &data);
        let cuts = [0, 1, 511, 70_001, 300_000, 300_001, len];
        let parts = |base: usize| {
            cuts.windows(2).map(|cut| setup.memory.run(base + cut[0], cut[1] - cut[0])).collect::<Vec<_>>()
        };
        let (from, into) = (parts(1), parts((4 << 20) + 3));
        let done = setup.run(Kind::Write, BLOCK as u64, len as u64, &from);
        assert_eq!((done.result, done.bounced), (Ok(()), setup.way.direct), "{:?}", setup.way);
        assert_eq!(setup.on_disk(BLOCK as u64, len), data);
        let done = setup.run(Kind::Read, BLOCK as u64, len as u64, &into);
        assert_eq!((done.result, done.bounced), (Ok(()), setup.way.direct), "{:?}", setup.way);
        assert_eq!(gather(&into), data);
        let around = [setup.memory.run((4 << 20) + 2, 1), setup.memory.run((4 << 20) + 3 + len, 1)];
        assert_eq!(gather(&around), [0, 0], "nothing beside the runs was touched");
    }
}

#[test]
fn a_part_of_a_block_is_refused_past_the_page_cache_only() {
    for mut setup in Setup::each(1 << 20) {
        let expected = if setup.way.direct { Err(libc::EINVAL) } else { Ok(()) };
        let (aligned, short) = (setup.memory.run(0, BLOCK), setup.memory.run(0, 512));
        assert_eq!(setup.run(Kind::Write, 512, BLOCK as u64, &[aligned]).result, expected);
        assert_eq!(setup.run(Kind::Read, 0, 512, &[short]).result, expected);
    }
}

#[test]
fn more_runs_than_one_call_takes() {
    for mut setup in Setup::each(8 << 20) {
        let data = pattern(1500 * BLOCK, 3);
        fill(&setup.memory, 0, &data);
        // Every second block from the end: nothing is contiguous, nothing can be merged.
        let runs = (0..1500).map(|at| setup.memory.run((1499 - at) * BLOCK, BLOCK)).collect::<Vec<_>>();
        let reversed = data.chunks(BLOCK).rev().flatten().copied().collect::<Vec<_>>();
        let done = setup.run(Kind::Write, 0, total(&runs), &runs);
        assert_eq!((done.result, done.bounced), (Ok(()), false), "{:?}", setup.way);
        assert_eq!(setup.on_disk(0, reversed.len()), reversed);
        setup.file.write_all_at(&data, 0).unwrap();
        assert_eq!(setup.run(Kind::Read, 0, total(&runs), &runs).result, Ok(()));
        assert_eq!(gather(&runs), data);
    }
}

#[test]
fn many_tiny_runs_with_empty_ones_between() {
    for mut setup in Setup::each(1 << 20) {
        let data = pattern(3 * BLOCK, 4);
        fill(&setup.memory, 0, &data);
        let runs = (0..1536).flat_map(|at| [setup.memory.run(at * 8, 8), setup.memory.run(at, 0)]).collect::<Vec<_>>();
        let done = setup.run(Kind::Write, 0, total(&runs), &runs);
        assert_eq!((done.result, done.bounced), (Ok(()), setup.way.direct), "{:?}", setup.way);
        assert_eq!(setup.on_disk(0, data.len()), data);
    }
}

#[test]
fn a_file_that_ends_early_is_an_io_error() {
    for mut setup in Setup::each(10_000) {
        let memory = setup.memory.run(0, 4 * BLOCK);
        let odd = setup.memory.run(1, 4 * BLOCK);
        for run in [memory, odd] {
            let len = run.len() as u64;
            assert_eq!(setup.run(Kind::Read, 0, len, &[run]).result, Err(libc::EIO), "{:?}", setup.way);
            assert_eq!(setup.run(Kind::Read, 1 << 20, len, &[run]).result, Err(libc::EIO), "{:?}", setup.way);
        }
    }
}

#[test]
fn errors_of_storage_keep_their_number() {
    for way in [Method::IoUring, Method::Syscalls] {
        let memory = AlignedBuffer::new(BLOCK, BLOCK).unwrap();
        let runs = [memory.run(0, BLOCK)];
        let full = OpenOptions::new().read(true).write(true).open("/dev/full").unwrap();
        let read_only = File::open("/dev/zero").unwrap();
        for (file, errno) in [(full, libc::ENOSPC), (read_only, libc::EBADF)] {
            let options = FileOptions { method: way, ..FileOptions::default() };
            let Ok(spec) = Spec::file(file.into(), options) else {
                eprintln!("SKIPPED {way:?}: refused here");
                continue;
            };
            let mut engine = spec.build().unwrap();
            let done = run(&mut engine, operation(1, Kind::Write, 0, BLOCK as u64, &runs));
            assert_eq!(done.result, Err(errno), "{way:?}");
        }
    }
}

#[test]
fn auto_is_io_uring_unless_that_is_refused() {
    let spec = |method| {
        let file = File::open("/dev/zero").unwrap();
        Spec::file(file.into(), FileOptions { method, ..FileOptions::default() })
    };
    let expected = if spec(Method::IoUring).is_ok() { "io_uring" } else { "syscalls" };
    let auto = spec(Method::Auto).unwrap();
    assert_eq!(auto.name(), expected);
    assert_eq!(matches!(auto.build().unwrap(), AnyEngine::File(_)), expected == "io_uring");
}

#[test]
fn alignments_that_are_none_are_refused() {
    for (memory_align, offset_align) in [(3, 512), (512, 1000), (usize::MAX, 1)] {
        let file = File::open("/dev/zero").unwrap();
        let options = FileOptions { direct: true, memory_align, offset_align, ..FileOptions::default() };
        assert_eq!(Spec::file(file.into(), options).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }
}

#[test]
fn durable_operations_and_flushes_succeed() {
    for mut setup in Setup::each(1 << 20) {
        fill(&setup.memory, 0, &[7; BLOCK]);
        for (kind, runs) in [
            (Kind::Write, vec![setup.memory.run(0, BLOCK)]),
            (Kind::Write, vec![setup.memory.run(1, BLOCK)]),
            (Kind::Discard, vec![]),
            (Kind::WriteZeroes { unmap: false }, vec![]),
            (Kind::WriteZeroes { unmap: true }, vec![]),
        ] {
            let durable = Operation { durable: true, ..operation(1, kind, 0, BLOCK as u64, &runs) };
            assert_eq!(run(&mut setup.engine, durable).result, Ok(()), "{kind:?} {:?}", setup.way);
        }
        assert_eq!(setup.run(Kind::Flush, 0, 0, &[]).result, Ok(()));
    }
}

#[test]
fn nothing_to_do_is_done_and_nonsense_is_refused() {
    for mut setup in Setup::each(1 << 20) {
        for kind in [Kind::Read, Kind::Write, Kind::Discard, Kind::WriteZeroes { unmap: true }] {
            assert_eq!(setup.run(kind, 0, 0, &[]).result, Ok(()), "{kind:?}");
            assert_eq!(setup.run(kind, u64::MAX - 4095, 4096, &[]).result, Err(libc::EINVAL), "{kind:?}");
            assert_eq!(setup.run(kind, 1 << 63, 4096, &[]).result, Err(libc::EINVAL), "{kind:?}");
        }
        let run = setup.memory.run(0, BLOCK);
        assert_eq!(setup.run(Kind::Read, 0, 2 * BLOCK as u64, &[run]).result, Err(libc::EINVAL));
    }
}

#[test]
fn a_discard_gives_the_space_back() {
    for mut setup in Setup::each(0) {
        setup.file.write_all_at(&vec![5; 2 << 20], 0).unwrap();
        let before = setup.allocated();
        assert_eq!(setup.run(Kind::Discard, 1 << 20, 1 << 20, &[]).result, Ok(()));
        assert!(setup.allocated() <= before - (1 << 20) + SLACK, "{:?}", setup.way);
        assert_eq!(setup.file.metadata().unwrap().len(), 2 << 20);
        assert_eq!(setup.on_disk((1 << 20) - 1, 1), [5]);
    }
}

#[test]
fn zeroes_keep_their_space_unless_they_may_be_unmapped() {
    // A file system with FALLOC_FL_ZERO_RANGE, most likely, and one without.
    for dir in [std::env::temp_dir(), PathBuf::from("/dev/shm")] {
        if !dir.is_dir() {
            eprintln!("SKIPPED: no {}", dir.display());
            continue;
        }
        for mut setup in WAYS.into_iter().filter_map(|way| Setup::new(way, &dir, 0)) {
            setup.file.write_all_at(&vec![5; 4 << 20], 0).unwrap();
            let before = setup.allocated();
            // Twice: the second one knows what is refused here.
            for offset in [1 << 20, (1 << 20) + BLOCK as u64] {
                let done = setup.run(Kind::WriteZeroes { unmap: false }, offset, (2 << 20) - BLOCK as u64, &[]);
                assert_eq!(done.result, Ok(()), "{:?} {}", setup.way, dir.display());
            }
            assert!(setup.allocated() >= before, "{:?} {}", setup.way, dir.display());
            let mut expected = vec![5; 4 << 20];
            expected[1 << 20..3 << 20].fill(0);
            assert_eq!(setup.on_disk(0, 4 << 20), expected);
            setup.file.write_all_at(&vec![6; 2 << 20], 1 << 20).unwrap();
            let done = setup.run(Kind::WriteZeroes { unmap: true }, 1 << 20, 2 << 20, &[]);
            assert_eq!(done.result, Ok(()), "{:?} {}", setup.way, dir.display());
            assert!(setup.allocated() <= before - (2 << 20) + SLACK, "{:?} {}", setup.way, dir.display());
            assert_eq!(setup.on_disk(0, 4 << 20), expected);
        }
    }
}

#[test]
fn more_operations_than_the_queue_has_room_for() {
    for mut setup in Setup::each(1 << 20) {
        for byte in 0..=255_u8 {
            setup.file.write_all_at(&[byte; BLOCK], u64::from(byte) * BLOCK as u64).unwrap();
        }
        let count = 2000_usize;
        let mut done = Vec::new();
        for token in 0..count {
            // A third of them misaligned: with direct I/O more than there are bounce buffers.
            let odd = usize::from(token % 3 == 0);
            let runs = [setup.memory.run(token * BLOCK + odd, BLOCK - odd), setup.memory.run(count * BLOCK, odd)];
            let offset = (token % 256 * BLOCK) as u64;
            done.extend(setup.engine.submit(operation(token as u64, Kind::Read, offset, BLOCK as u64, &runs)));
        }
        assert_eq!(setup.engine.pending(), count);
        finish(&mut setup.engine, count, &mut done);
        done.sort_by_key(|completion| completion.token);
        for (token, completion) in done.iter().enumerate() {
            let bounced = setup.way.direct && token % 3 == 0;
            assert_eq!((completion.token, completion.result, completion.bounced), (token as u64, Ok(()), bounced));
            let bytes = gather(&[setup.memory.run(token * BLOCK + 1, BLOCK - 1)]);
            assert!(bytes.iter().all(|&byte| byte == (token % 256) as u8), "{:?} {token}", setup.way);
        }
    }
}

#[test]
fn dropping_an_engine_waits_for_what_is_under_way() {
    for mut setup in Setup::each(2 << 20) {
        fill(&setup.memory, 0, &[9; 2 << 20]);
        for token in 0..512_usize {
            let run = setup.memory.run(token * BLOCK, BLOCK);
            let at = (token * BLOCK) as u64;
            assert!(setup.engine.submit(operation(token as u64, Kind::Write, at, BLOCK as u64, &[run])).is_none());
        }
        setup.engine.kick().unwrap();
        let Setup { engine, file, .. } = setup;
        drop(engine);
        let mut bytes = vec![0; 2 << 20];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes.iter().all(|&byte| byte == 9));
    }
}

#[test]
fn random_operations_match_a_plain_array() {
    for mut setup in Setup::each(64 * BLOCK as u64) {
        let mut model = vec![0_u8; 64 * BLOCK];
        let numbers = pattern(4 * 300, 11);
        for (round, number) in numbers.chunks(4).enumerate() {
            let first = usize::from(number[0]) % 64;
            let count = 1 + usize::from(number[1]) % (64 - first);
            let (at, len) = (first * BLOCK, count * BLOCK);
            let split = usize::from(number[2]) * 31 % len;
            let shift = usize::from(number[3] & 1);
            let runs = [setup.memory.run(shift, split), setup.memory.run((1 << 20) + shift, len - split)];
            let kind = match number[3] >> 1 & 7 {
                0..=2 => Kind::Read,
                3..=5 => Kind::Write,
                6 => Kind::WriteZeroes { unmap: number[3] >= 128 },
                _ => Kind::Flush,
            };
            match kind {
                Kind::Write => {
                    let data = pattern(len, round as u32);
                    runs[0].copy_from(&data);
                    runs[1].copy_from(&data[split..]);
                    model[at..at + len].copy_from_slice(&data);
                }
                Kind::WriteZeroes { .. } => model[at..at + len].fill(0),
                _ => {}
            }
            let runs = if matches!(kind, Kind::Read | Kind::Write) { &runs[..] } else { &[] };
            let durable = number[2] & 1 == 1;
            let asked = Operation { durable, ..operation(1, kind, at as u64, len as u64, runs) };
            assert_eq!(run(&mut setup.engine, asked).result, Ok(()), "{kind:?} {:?}", setup.way);
            if kind == Kind::Read {
                assert_eq!(gather(runs), model[at..at + len], "{:?}", setup.way);
            }
        }
        assert_eq!(setup.on_disk(0, model.len()), model, "{:?}", setup.way);
    }
}
