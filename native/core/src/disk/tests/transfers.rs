//! The state machine of one operation against a scripted kernel.

use super::*;
use crate::disk::transfer::{Alignment, Step, Target, Transfer};
use crate::sys::anon::Anon;
use crate::sys::storage::Outcome;

fn target(direct: Option<Alignment>) -> Target {
    Target::new(File::open("/dev/null").unwrap().into(), false, direct, false)
}

/// What a step asks for, without its memory.
#[derive(Clone, Debug, PartialEq)]
enum Asked {
    Read { runs: usize, len: usize, offset: u64 },
    Write { runs: usize, len: usize, offset: u64, durable: bool },
    Allocate { mode: i32, offset: u64, len: u64 },
    Sync,
    End(Result<(), i32>),
}

fn ask(transfer: &mut Transfer, target: &Target) -> Asked {
    let sum = |runs: &[IoVec]| total(runs) as usize;
    match transfer.step() {
        Step::Read { runs, offset } => Asked::Read { runs: runs.len(), len: sum(runs), offset },
        Step::Write { runs, offset, durable } => Asked::Write { runs: runs.len(), len: sum(runs), offset, durable },
        Step::Allocate { mode, offset, len } => Asked::Allocate { mode, offset, len },
        Step::Sync => Asked::Sync,
        Step::End(result) => Asked::End(result),
        Step::Buffer => {
            transfer.lend(target.buffer().unwrap());
            ask(transfer, target)
        }
        step => panic!("unexpected {step:?}"),
    }
}

/// Plays `script` (what is expected, how it ends) and expects `result` afterwards.
fn play(operation: Operation, target: &Target, script: &[(Asked, Outcome)], result: Result<(), i32>) {
    let mut transfer = Transfer::new(operation, target);
    for (number, (expected, outcome)) in script.iter().enumerate() {
        assert_eq!(ask(&mut transfer, target), *expected, "step {number}");
        transfer.advance(*outcome, target);
    }
    assert_eq!(ask(&mut transfer, target), Asked::End(result));
}

fn read(runs: usize, len: usize, offset: u64) -> Asked {
    Asked::Read { runs, len, offset }
}

fn write(runs: usize, len: usize, offset: u64) -> Asked {
    Asked::Write { runs, len, offset, durable: false }
}

#[test]
fn a_short_read_goes_on_where_it_stopped() {
    let memory = AlignedBuffer::new(64, 8).unwrap();
    let runs = [memory.run(0, 10), memory.run(20, 0), memory.run(30, 20)];
    let asked = || operation(1, Kind::Read, 100, 30, &runs);
    let script = [
        (read(3, 30, 100), Ok(1)),
        (read(3, 29, 101), Err(libc::EINTR)),
        (read(3, 29, 101), Ok(9)),
        (read(1, 20, 110), Ok(19)),
        (read(1, 1, 129), Ok(1)),
    ];
    play(asked(), &target(None), &script, Ok(()));
    play(asked(), &target(None), &[script[0].clone(), (read(3, 29, 101), Ok(0))], Err(libc::EIO));
    play(asked(), &target(None), &[(read(3, 30, 100), Err(libc::ENOMEM))], Err(libc::ENOMEM));
}

#[test]
fn a_refusal_for_the_moment_does_not_last_for_ever() {
    let memory = AlignedBuffer::new(64, 8).unwrap();
    let target = target(None);
    let mut transfer = Transfer::new(operation(1, Kind::Write, 0, 10, &[memory.run(0, 10)]), &target);
    let mut tries = 0;
    while ask(&mut transfer, &target) == write(1, 10, 0) {
        assert_eq!(transfer.retrying(), tries > 0);
        transfer.advance(Err(libc::EAGAIN), &target);
        tries += 1;
    }
    assert_eq!(ask(&mut transfer, &target), Asked::End(Err(libc::EAGAIN)));
    assert!((50..1000).contains(&tries));
}

#[test]
fn no_step_is_longer_than_a_gibibyte_or_1024_runs() {
    let long = Anon::reserve(3 << 30).unwrap();
    long.make_usable(3 << 30).unwrap();
    let one = operation(1, Kind::Write, 0, 3 << 30, &[long.run(0, 3 << 30).unwrap()]);
    let gib = 1 << 30;
    let script = [
        (write(1, gib, 0), Ok(gib)),
        (write(1, gib, 1 << 30), Ok(gib - 4096)),
        (write(1, gib, (2 << 30) - 4096), Ok(gib)),
        (write(1, 4096, (3 << 30) - 4096), Ok(4096)),
    ];
    play(one, &target(None), &script, Ok(()));

    let runs = vec![long.run(0, 1 << 20).unwrap(); 2500];
    let many = operation(1, Kind::Read, 0, 2500 << 20, &runs);
    let script = [
        (read(1024, gib, 0), Ok(gib)),
        (read(1024, gib, 1 << 30), Ok(gib)),
        (read(452, 452 << 20, 2 << 30), Ok(452 << 20)),
    ];
    play(many, &target(None), &script, Ok(()));

    let mixed = [long.run(0, 100).unwrap(), long.run(0, 2 << 30).unwrap()];
    let script = [(read(1, 100, 0), Ok(100)), (read(1, gib, 100), Ok(gib)), (read(1, gib, gib as u64 + 100), Ok(gib))];
    play(operation(1, Kind::Read, 0, (2 << 30) + 100, &mixed), &target(None), &script, Ok(()));
}

#[test]
fn direct_io_goes_on_at_whole_blocks_only() {
    let direct = target(Some(Alignment { memory: 512, offset: 512 }));
    let memory = AlignedBuffer::new(4096, 4096).unwrap();
    let asked = || operation(1, Kind::Read, 0, 2048, &[memory.run(0, 1024), memory.run(2048, 1024)]);
    let script = [(read(2, 2048, 0), Ok(1000)), (read(2, 1536, 512), Ok(512)), (read(1, 1024, 1024), Ok(1024))];
    play(asked(), &direct, &script, Ok(()));
    // The end of a file inside of a block gives the same part of it again and again.
    play(asked(), &direct, &[script[0].clone(), (read(2, 1536, 512), Ok(488))], Err(libc::EIO));
}

#[test]
fn a_bounced_read_copies_what_was_read_piece_by_piece() {
    let direct = target(Some(Alignment { memory: 512, offset: 512 }));
    let memory = AlignedBuffer::new(1 << 20, 4096).unwrap();
    fill(&memory, 0, &vec![9; 1 << 20]);
    let piece = 256 << 10;
    let len = piece + 1024;
    let run = memory.run(1, len);
    let script = [
        (read(1, piece, 0), Ok(700)),
        (read(1, piece - 512, 512), Ok(piece - 512)),
        (read(1, 1024, piece as u64), Ok(0)),
    ];
    play(operation(1, Kind::Read, 0, len as u64, &[run]), &direct, &script, Err(libc::EIO));
    // The first piece came (as the zeroes of a fresh buffer), of the second one nothing.
    let bytes = gather(&[run]);
    assert!(bytes[..piece].iter().all(|&byte| byte == 0));
    assert!(bytes[piece..].iter().all(|&byte| byte == 9));
}

#[test]
fn zeroes_are_written_where_nothing_else_may_stand_for_them() {
    let file = target(None);
    let zero =
        Asked::Allocate { mode: libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE, offset: 0, len: 3 << 20 };
    let punch =
        Asked::Allocate { mode: libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset: 0, len: 3 << 20 };
    let asked = |kind, durable| Operation { durable, ..operation(1, kind, 0, 3 << 20, &[]) };
    let mib = 1 << 20;
    let written = [
        (write(1, mib, 0), Ok(mib - 1)),
        (write(1, mib, (1 << 20) - 1), Ok(mib)),
        (write(1, mib, (2 << 20) - 1), Ok(mib)),
        (write(1, 1, (3 << 20) - 1), Ok(1)),
    ];
    let refused = Err(libc::EOPNOTSUPP);
    let script = |first: &[(Asked, Outcome)], last: &[(Asked, Outcome)]| [first, &written, last].concat();
    let keep = Kind::WriteZeroes { unmap: false };
    let unmap = Kind::WriteZeroes { unmap: true };
    play(asked(keep, false), &file, &[(zero.clone(), Ok(0))], Ok(()));
    play(asked(keep, true), &file, &[(zero.clone(), Ok(0)), (Asked::Sync, Ok(0))], Ok(()));
    play(asked(keep, false), &file, &script(&[(zero.clone(), refused)], &[]), Ok(()));
    // What was refused once is not tried again; a hole is tried only where it may be.
    play(asked(keep, true), &file, &script(&[], &[(Asked::Sync, Err(libc::EIO))]), Err(libc::EIO));
    play(asked(unmap, true), &file, &[(punch.clone(), Ok(0)), (Asked::Sync, Ok(0))], Ok(()));
    play(asked(unmap, false), &file, &script(&[(punch.clone(), refused)], &[]), Ok(()));
    play(asked(unmap, false), &file, &script(&[], &[]), Ok(()));
    play(asked(unmap, false), &file, &[(written[0].0.clone(), Err(libc::ENOSPC))], Err(libc::ENOSPC));
}

#[test]
fn a_discard_is_advice_but_its_errors_are_not() {
    let file = target(None);
    let punch = Asked::Allocate { mode: libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset: 0, len: 4096 };
    let asked = |durable| Operation { durable, ..operation(1, Kind::Discard, 0, 4096, &[]) };
    play(asked(false), &file, &[(punch.clone(), Err(libc::EIO))], Err(libc::EIO));
    play(asked(true), &file, &[(punch.clone(), Ok(0)), (Asked::Sync, Ok(0))], Ok(()));
    play(asked(true), &file, &[(punch, Err(libc::EOPNOTSUPP))], Ok(()));
    play(asked(true), &file, &[], Ok(()));
}

#[test]
fn what_failed_may_be_submitted_again_unless_the_page_cache_was_synced() {
    let direct = Some(Alignment { memory: 8, offset: 8 });
    let memory = AlignedBuffer::new(64, 8).unwrap();
    let runs = [memory.run(0, 64)];
    let zeroes = Kind::WriteZeroes { unmap: true };
    // Who fails: the step of this number, counted from 0.
    let cases = [
        (Kind::Read, false, None, 0, true),
        (Kind::Write, false, None, 0, true),
        (Kind::Write, true, None, 0, false),
        (Kind::Write, true, direct, 0, true),
        (Kind::Flush, true, direct, 0, false),
        (Kind::Discard, false, None, 0, true),
        (zeroes, true, None, 0, true),
        (zeroes, true, None, 1, false),
        (zeroes, true, direct, 1, false),
    ];
    for (kind, durable, alignment, failing, repeatable) in cases {
        let target = target(alignment);
        let moves = matches!(kind, Kind::Read | Kind::Write);
        let mut asked = operation(1, kind, 0, 64, if moves { &runs } else { &[] });
        asked.durable = durable;
        let mut transfer = Transfer::new(asked, &target);
        for _ in 0..failing {
            transfer.step();
            transfer.advance(Ok(0), &target);
        }
        transfer.step();
        transfer.advance(Err(libc::ENOSPC), &target);
        let completion = transfer.complete(Err(libc::ENOSPC));
        assert_eq!(completion.repeatable, repeatable, "{kind:?}, durable {durable}, step {failing}");
    }
}
