//! Storage made slow and unreliable.

use std::sync::atomic::AtomicU64;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::disk::Faults;

fn order(faults: Faults) -> Vec<(u64, Result<(), i32>)> {
    let mut engine = Spec::memory(1 << 20).unwrap().with_faults(faults).unwrap().build().unwrap();
    let memory = AlignedBuffer::new(4096, 4096).unwrap();
    let mut done = Vec::new();
    for token in 0..32 {
        let asked = operation(token, Kind::Write, token * 512, 512, &[memory.run(0, 512)]);
        done.extend(engine.submit(asked));
    }
    assert_eq!(engine.pending() + done.len(), 32);
    finish(&mut engine, 32, &mut done);
    done.iter().map(|completion| (completion.token, completion.result)).collect()
}

#[test]
fn held_operations_end_out_of_order_and_none_is_lost() {
    let slow = Faults { delay_write: Duration::from_millis(40), seed: 3, ..Faults::default() };
    let seen = order(slow);
    let mut sorted = seen.clone();
    sorted.sort_unstable_by_key(|(token, _)| *token);
    assert_ne!(seen, sorted);
    assert!(sorted.iter().enumerate().all(|(index, entry)| *entry == (index as u64, Ok(()))));
}

#[test]
fn the_same_seed_fails_the_same_requests() {
    let failing = Faults { error_write: 0.5, seed: 9, ..Faults::default() };
    let first = order(failing);
    assert_eq!(first, order(failing));
    assert_ne!(first, order(Faults { seed: 10, ..failing }));
    let failed = first.iter().filter(|(_, result)| *result == Err(libc::EIO)).count();
    assert!((4..=28).contains(&failed), "{failed} of 32");
}

#[test]
fn a_failed_write_stores_nothing() {
    for delay_write in [Duration::ZERO, Duration::from_millis(1)] {
        let spec = Spec::memory(4096).unwrap();
        let faults = Faults { error_write: 1.0, delay_write, ..Faults::default() };
        let mut failing = spec.with_faults(faults).unwrap().build().unwrap();
        let memory = AlignedBuffer::new(4096, 4096).unwrap();
        fill(&memory, 0, &[1; 4096]);
        for kind in [Kind::Write, Kind::Discard, Kind::WriteZeroes { unmap: false }] {
            let runs = if kind == Kind::Write { vec![memory.run(0, 4096)] } else { vec![] };
            assert_eq!(run(&mut failing, operation(1, kind, 0, 4096, &runs)).result, Err(libc::EIO), "{kind:?}");
        }
        assert_eq!(run(&mut failing, operation(1, Kind::Flush, 0, 0, &[])).result, Ok(()));
        assert_eq!(run(&mut failing, operation(1, Kind::Read, 0, 4096, &[memory.run(0, 4096)])).result, Ok(()));
        assert_eq!(gather(&[memory.run(0, 4096)]), [0; 4096]);
    }
}

#[test]
fn a_flush_is_held_for_as_long_as_said() {
    let delay = Duration::from_millis(20);
    let faults = Faults { delay_flush: delay, ..Faults::default() };
    for setup in Setup::each(1 << 20) {
        let mut engine = crate::disk::inject::FaultyEngine::new(setup.engine, faults, 0, Arc::new(AtomicU64::new(0)));
        assert!(!engine.inline());
        let start = Instant::now();
        assert_eq!(run(&mut engine, operation(1, Kind::Flush, 0, 0, &[])).result, Ok(()));
        assert!(start.elapsed() >= delay / 2, "{:?} {:?}", setup.way, start.elapsed());
    }
}

#[test]
fn a_held_flush_holds_up_no_write() {
    let faults = Faults { delay_flush: Duration::from_secs(3600), ..Faults::default() };
    for setup in Setup::each(1 << 20) {
        let Setup { way, engine, file, memory, _scratch } = setup;
        let mut engine = crate::disk::inject::FaultyEngine::new(engine, faults, 0, Arc::new(AtomicU64::new(0)));
        fill(&memory, 0, &[4; BLOCK]);
        assert!(engine.submit(operation(2, Kind::Flush, 0, 0, &[])).is_none());
        let write = operation(1, Kind::Write, 0, BLOCK as u64, &[memory.run(0, BLOCK)]);
        let mut done = Vec::from_iter(engine.submit(write));
        while done.is_empty() {
            engine.wait(None, &mut Vec::new()).unwrap();
            engine.reap(&mut done);
        }
        assert_eq!((done[0].token, done[0].result, engine.pending()), (1, Ok(()), 1), "{way:?}");
        let mut bytes = [0; BLOCK];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [4; BLOCK], "{way:?}");
    }
}

#[test]
fn so_many_operations_of_the_whole_disk_fail_as_was_said_and_then_it_is_well() {
    let faults = Faults { error_write: 1.0, errno: libc::ENOSPC, error_limit: Some(3), ..Faults::default() };
    let spec = Spec::memory(4096).unwrap().with_faults(faults).unwrap();
    let (mut one, mut other) = (spec.build().unwrap(), spec.build().unwrap());
    let mut write = |first: bool| {
        let engine = if first { &mut one } else { &mut other };
        run(engine, operation(1, Kind::WriteZeroes { unmap: false }, 0, 512, &[])).result
    };
    let seen: Vec<_> = [true, false, true, false, true].into_iter().map(&mut write).collect();
    assert_eq!(seen, [Err(libc::ENOSPC), Err(libc::ENOSPC), Err(libc::ENOSPC), Ok(()), Ok(())]);
}

#[test]
fn impossible_faults_are_refused() {
    for faults in [
        Faults { error_read: 1.5, ..Faults::default() },
        Faults { error_write: -0.1, ..Faults::default() },
        Faults { error_flush: f64::NAN, ..Faults::default() },
        Faults { delay_read: Duration::MAX, ..Faults::default() },
        Faults { errno: 0, ..Faults::default() },
        Faults { errno: -5, ..Faults::default() },
    ] {
        assert_eq!(Spec::null().with_faults(faults).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }
}
