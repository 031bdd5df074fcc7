//! The memory and null disks.

use super::*;

const SIZE: usize = 1 << 20;

#[test]
fn random_operations_and_sizes_match_a_plain_array() {
    let spec = Spec::memory(SIZE as u64).unwrap();
    let mut engines = [spec.build().unwrap(), spec.build().unwrap()];
    let memory = AlignedBuffer::new(2 * SIZE, 4096).unwrap();
    let mut model = vec![0_u8; SIZE];
    let numbers = pattern(8 * 1500, 5);
    for (round, number) in numbers.chunks(8).enumerate() {
        let wide = |at: usize| usize::from(number[at]) << 8 | usize::from(number[at + 1]);
        let at = wide(0) * 16 % model.len();
        let len = (wide(2) * 3).min(model.len() - at);
        let split = wide(4) % (len + 1);
        let runs = [memory.run(3, split), memory.run(SIZE + 1, len - split)];
        let kind = match number[6] % 8 {
            0 | 1 => Kind::Read,
            2..=4 => Kind::Write,
            5 => Kind::Discard,
            6 => Kind::WriteZeroes { unmap: number[7] & 1 == 1 },
            _ => {
                let size = SIZE / 4 + wide(4) * 40;
                spec.resize(size as u64).unwrap();
                model.resize(size, 0);
                continue;
            }
        };
        let runs = if matches!(kind, Kind::Read | Kind::Write) { &runs[..] } else { &[] };
        match kind {
            Kind::Write => {
                let data = pattern(len, round as u32);
                runs[0].copy_from(&data);
                runs[1].copy_from(&data[split..]);
                model[at..at + len].copy_from_slice(&data);
            }
            Kind::Discard | Kind::WriteZeroes { .. } => model[at..at + len].fill(0),
            _ => {}
        }
        let done = engines[round % 2].submit(operation(round as u64, kind, at as u64, len as u64, runs)).unwrap();
        assert_eq!((done.token, done.result), (round as u64, Ok(())));
        if kind == Kind::Read {
            assert_eq!(gather(runs), model[at..at + len]);
        }
    }
}

#[test]
fn what_was_cut_off_is_zero_when_grown_again() {
    let spec = Spec::memory(3 * 4096 + 100).unwrap();
    let mut engine = spec.build().unwrap();
    let memory = AlignedBuffer::new(4 * 4096, 4096).unwrap();
    fill(&memory, 0, &[1; 3 * 4096 + 100]);
    let all = memory.run(0, 3 * 4096 + 100);
    assert_eq!(run(&mut engine, operation(1, Kind::Write, 0, all.len() as u64, &[all])).result, Ok(()));
    spec.resize(4096 + 10).unwrap();
    // A write that was on its way when the disk shrank.
    assert_eq!(run(&mut engine, operation(1, Kind::Write, 8192, 4096, &[memory.run(0, 4096)])).result, Ok(()));
    spec.resize(3 * 4096 + 100).unwrap();
    assert_eq!(run(&mut engine, operation(1, Kind::Read, 0, all.len() as u64, &[all])).result, Ok(()));
    let bytes = gather(&[all]);
    assert!(bytes[..4096 + 10].iter().all(|&byte| byte == 1));
    assert!(bytes[4096 + 10..].iter().all(|&byte| byte == 0));
}

#[test]
fn beyond_the_memory_is_an_io_error() {
    let mut engine = Spec::memory(4096).unwrap().build().unwrap();
    let memory = AlignedBuffer::new(8192, 4096).unwrap();
    for (kind, offset) in
        [(Kind::Read, 1 << 30), (Kind::Write, 1 << 30), (Kind::Discard, u64::MAX), (Kind::Read, u64::MAX)]
    {
        let run = if kind == Kind::Discard { vec![] } else { vec![memory.run(0, 8192)] };
        assert_eq!(super::run(&mut engine, operation(1, kind, offset, 8192, &run)).result, Err(libc::EIO));
    }
}

#[test]
fn a_disk_larger_than_the_machine_takes_only_what_is_written() {
    let spec = Spec::memory(1 << 42).unwrap();
    let mut engine = spec.build().unwrap();
    let memory = AlignedBuffer::new(4096, 4096).unwrap();
    let last = (1 << 42) - 4096;
    fill(&memory, 0, &[3; 4096]);
    assert_eq!(run(&mut engine, operation(1, Kind::Write, last, 4096, &[memory.run(0, 4096)])).result, Ok(()));
    spec.resize(1 << 43).unwrap();
    assert_eq!(run(&mut engine, operation(1, Kind::Read, last + 4096, 4096, &[memory.run(0, 4096)])).result, Ok(()));
    assert_eq!(gather(&[memory.run(0, 4096)]), [0; 4096]);
    assert_eq!(run(&mut engine, operation(1, Kind::Read, last, 4096, &[memory.run(0, 4096)])).result, Ok(()));
    assert_eq!(gather(&[memory.run(0, 4096)]), [3; 4096]);
}

#[test]
fn sizes_change_while_others_copy() {
    let spec = Spec::memory(1 << 20).unwrap();
    let threads = (0..2_u8).map(|number| {
        let spec = spec.clone();
        std::thread::spawn(move || {
            let mut engine = spec.build().unwrap();
            let memory = AlignedBuffer::new(1 << 16, 4096).unwrap();
            fill(&memory, 0, &[number + 1; 1 << 16]);
            for round in 0..2000_u64 {
                let kind = if round % 3 == 0 { Kind::Read } else { Kind::Write };
                let asked = operation(round, kind, (round % 16) << 16, 1 << 16, &[memory.run(0, 1 << 16)]);
                assert_eq!(run(&mut engine, asked).result, Ok(()));
            }
        })
    });
    let threads = threads.collect::<Vec<_>>();
    for round in 0..200_u64 {
        spec.resize((1 << 20) - ((round % 7) << 16)).unwrap();
    }
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn only_memory_is_resized() {
    assert_eq!(Spec::null().resize(1).unwrap_err().raw_os_error(), Some(libc::EOPNOTSUPP));
}

#[test]
fn the_null_disk_touches_no_buffer() {
    let mut engine = Spec::null().build().unwrap();
    let memory = AlignedBuffer::new(4096, 4096).unwrap();
    fill(&memory, 0, &[8; 4096]);
    assert!(engine.inline());
    assert_eq!(run(&mut engine, operation(1, Kind::Read, 1 << 40, 4096, &[memory.run(0, 4096)])).result, Ok(()));
    assert_eq!(gather(&[memory.run(0, 4096)]), [8; 4096]);
}
