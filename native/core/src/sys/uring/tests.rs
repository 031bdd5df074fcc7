//! The ring itself, in every set-up that older kernels would give.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

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

/// Pushes an entry that no request of ours makes, and returns what becomes of it.
fn try_entry(ring: &mut Ring<u32>, entry: &squeue::Entry) -> i32 {
    // SAFETY: what the entries of this test name are constants.
    unsafe { ring.ring.submission().push(entry) }.unwrap();
    ring.ring.submit_and_wait(1).unwrap();
    ring.ring.completion().next().unwrap().result()
}

#[test]
fn a_ring_opens_connects_and_links_nothing() {
    for (posting, mut ring) in rings() {
        let here = Fd(libc::AT_FDCWD);
        let pair = UnixStream::pair().unwrap();
        let socket = Fd(pair.0.as_raw_fd());
        let address = libc::sockaddr_un { sun_family: libc::AF_UNIX as u16, sun_path: [0; 108] };
        let size = std::mem::size_of_val(&address) as u32;
        let entries = [
            opcode::OpenAt::new(here, c"/dev/null".as_ptr()).flags(libc::O_RDONLY).build(),
            opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build(),
            opcode::Connect::new(socket, (&raw const address).cast(), size).build(),
            opcode::Accept::new(socket, std::ptr::null_mut(), std::ptr::null_mut()).build(),
            opcode::Shutdown::new(socket, libc::SHUT_RDWR).build(),
            opcode::Close::new(socket).build(),
            opcode::UnlinkAt::new(here, c"/nowhere".as_ptr()).build(),
            opcode::RenameAt::new(here, c"/nowhere".as_ptr(), here, c"/elsewhere".as_ptr()).build(),
            opcode::Nop::new().build(),
            opcode::PollAdd::new(socket, libc::POLLIN as u32).build().flags(squeue::Flags::IO_LINK),
            opcode::Fsync::new(Fd(0)).build().flags(squeue::Flags::FIXED_FILE),
        ];
        for entry in &entries {
            assert_eq!(try_entry(&mut ring, entry), -libc::EACCES, "{posting:?} {entry:?}");
        }
        let fds = [0];
        assert_eq!(
            ring.ring.submitter().register_files(&fds).unwrap_err().raw_os_error(),
            Some(libc::EACCES),
            "{posting:?}"
        );
    }
}
