//! The ring itself, in every set-up that older kernels would give.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};

use super::*;
use crate::sys::buffer::AlignedBuffer;
use crate::sys::eventfd::EventFd;

/// One ring of each kind, unless io_uring is refused here altogether.
fn rings() -> Vec<(Posting, Ring<u32>)> {
    if let Err(error) = probe() {
        eprintln!("SKIPPED: no io_uring: {error}");
        return Vec::new();
    }
    let made = POSTINGS.into_iter().filter_map(|posting| match Ring::posting(&[posting]) {
        Ok(ring) => Some((posting, ring)),
        Err(error) => {
            eprintln!("SKIPPED {posting:?}: {error}");
            None
        }
    });
    made.collect()
}

/// A read from a pipe: under way for as long as nothing is written.
fn start_read(ring: &mut Ring<u32>, pipe: BorrowedFd<'_>, memory: &AlignedBuffer, held: u32) {
    let runs = [memory.run(0, 5), memory.run(5, memory.len())];
    let prepared = ring.prepare(pipe, Request::Read { runs: &runs, offset: 0 }, false);
    ring.start(prepared, held);
}

#[test]
fn a_request_ends_a_wait_beside_a_quiet_descriptor() {
    for (posting, mut ring) in rings() {
        let (reader, mut writer) = io::pipe().unwrap();
        let (event, memory) = (EventFd::new().unwrap(), AlignedBuffer::new(64, 64).unwrap());
        ring.watch(event.as_raw_fd(), Some(3)).unwrap();
        start_read(&mut ring, reader.as_fd(), &memory, 77);
        let mut ready = Vec::new();
        ring.wait(Some(Duration::from_millis(1)), &mut ready).unwrap();
        assert!(ready.is_empty() && ring.take_finished().is_none(), "{posting:?}");
        event.signal();
        ring.wait(None, &mut ready).unwrap();
        assert_eq!(ready, [3], "{posting:?}");
        event.drain();
        ready.clear();
        writer.write_all(b"hello, ring").unwrap();
        while ring.take_finished().is_none_or(|(held, outcome)| {
            assert_eq!((held, outcome), (77, Ok(11)), "{posting:?}");
            false
        }) {
            ring.wait(None, &mut ready).unwrap();
        }
        let mut bytes = [0; 11];
        memory.run(0, 11).copy_to(&mut bytes);
        assert_eq!(&bytes, b"hello, ring", "{posting:?}");
    }
}

#[test]
fn looking_alone_finds_what_has_ended() {
    for (posting, mut ring) in rings() {
        let (reader, mut writer) = io::pipe().unwrap();
        let memory = AlignedBuffer::new(64, 64).unwrap();
        start_read(&mut ring, reader.as_fd(), &memory, 1);
        ring.submit().unwrap();
        ring.look();
        assert!(ring.take_finished().is_none(), "{posting:?}");
        writer.write_all(b"x").unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        let found = loop {
            ring.look();
            if let Some(found) = ring.take_finished() {
                break found;
            }
            assert!(Instant::now() < deadline, "{posting:?}");
        };
        assert_eq!(found, (1, Ok(1)), "{posting:?}");
    }
}

#[test]
fn more_completions_than_there_is_room_for_are_kept() {
    for (posting, mut ring) in rings() {
        let memory = AlignedBuffer::new(64, 64).unwrap();
        let zero: OwnedFd = std::fs::File::open("/dev/zero").unwrap().into();
        let count = 3 * COMPLETIONS;
        for held in 0..count {
            start_read(&mut ring, zero.as_fd(), &memory, held);
        }
        let mut ended = Vec::new();
        let mut ready = Vec::new();
        while ended.len() < count as usize {
            ring.wait(None, &mut ready).unwrap();
            while let Some((held, outcome)) = ring.take_finished() {
                assert_eq!(outcome, Ok(64), "{posting:?}");
                ended.push(held);
            }
        }
        ended.sort_unstable();
        assert!(ended.into_iter().eq(0..count), "{posting:?}");
    }
}

#[test]
fn dropping_a_ring_waits_for_what_is_under_way() {
    for (posting, mut ring) in rings() {
        let (reader, mut writer) = io::pipe().unwrap();
        let memory = AlignedBuffer::new(64, 64).unwrap();
        start_read(&mut ring, reader.as_fd(), &memory, 1);
        ring.submit().unwrap();
        let other = std::thread::spawn(move || writer.write_all(&[7; 64]).unwrap());
        drop(ring);
        let mut bytes = [0; 64];
        memory.run(0, 64).copy_to(&mut bytes);
        assert_eq!(bytes, [7; 64], "{posting:?}");
        other.join().unwrap();
    }
}

#[test]
fn a_ring_dropped_by_another_thread_does_not_hang_it() {
    for (posting, mut ring) in rings() {
        let (reader, mut writer) = io::pipe().unwrap();
        let memory = AlignedBuffer::new(64, 64).unwrap();
        start_read(&mut ring, reader.as_fd(), &memory, 1);
        ring.submit().unwrap();
        if !matches!(posting, Posting::Deferred) {
            // Any thread may ask these, so this one waits for the read.
            writer.write_all(&[1; 64]).unwrap();
        }
        std::thread::spawn(move || drop(ring)).join().unwrap();
    }
}
