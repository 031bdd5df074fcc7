//! What a worker sleeps on, for every engine alike.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::disk::Faults;
use crate::sys::eventfd::EventFd;

const SHORT: Option<Duration> = Some(Duration::from_millis(2));

/// One engine of every kind that there is here.
fn engines() -> Vec<(String, AnyEngine)> {
    let mut specs = vec![Spec::null(), Spec::memory(4096).unwrap()];
    for method in [Method::IoUring, Method::Syscalls] {
        let file = OpenOptions::new().read(true).write(true).open("/dev/zero").unwrap();
        match Spec::file(file.into(), FileOptions { method, ..FileOptions::default() }) {
            Ok(spec) => specs.push(spec),
            Err(error) => eprintln!("SKIPPED {method:?}: {error}"),
        }
    }
    let faulty = specs.iter().map(|spec| spec.with_faults(Faults::default()).unwrap()).collect::<Vec<_>>();
    specs.extend(faulty);
    specs.iter().map(|spec| (format!("{spec:?}"), spec.build().unwrap())).collect()
}

fn wait(engine: &mut AnyEngine, timeout: Option<Duration>) -> Vec<u32> {
    let mut ready = Vec::new();
    engine.wait(timeout, &mut ready).unwrap();
    ready.sort_unstable();
    ready
}

#[test]
fn a_readable_descriptor_is_reported_until_it_is_drained() {
    for (name, mut engine) in engines() {
        let (a, b) = (EventFd::new().unwrap(), EventFd::new().unwrap());
        engine.watch(a.as_raw_fd(), 1).unwrap();
        engine.watch(b.as_raw_fd(), u32::MAX).unwrap();
        assert!(wait(&mut engine, Some(Duration::ZERO)).is_empty(), "{name}");
        assert!(wait(&mut engine, SHORT).is_empty(), "{name}");
        a.signal();
        for timeout in [None, Some(Duration::ZERO), SHORT] {
            assert_eq!(wait(&mut engine, timeout), [1], "{name}");
        }
        b.signal();
        assert_eq!(wait(&mut engine, None), [1, u32::MAX], "{name}");
        assert!(a.drain());
        assert_eq!(wait(&mut engine, None), [u32::MAX], "{name}");
        assert!(b.drain());
        assert!(wait(&mut engine, SHORT).is_empty(), "{name}");
    }
}

#[test]
fn what_fired_and_was_drained_since_is_reported_once_at_most() {
    for (name, mut engine) in engines() {
        let event = EventFd::new().unwrap();
        engine.watch(event.as_raw_fd(), 1).unwrap();
        assert!(wait(&mut engine, Some(Duration::ZERO)).is_empty());
        event.signal();
        assert!(event.drain());
        assert!(matches!(wait(&mut engine, SHORT)[..], [] | [1]), "{name}");
        assert!(wait(&mut engine, SHORT).is_empty(), "{name}");
    }
}

#[test]
fn a_forgotten_descriptor_is_not_reported_and_its_token_is_free() {
    for (name, mut engine) in engines() {
        let (a, b) = (EventFd::new().unwrap(), EventFd::new().unwrap());
        engine.watch(a.as_raw_fd(), 1).unwrap();
        assert_eq!(engine.watch(b.as_raw_fd(), 1).unwrap_err().raw_os_error(), Some(libc::EEXIST), "{name}");
        assert!(wait(&mut engine, SHORT).is_empty());
        a.signal();
        engine.unwatch(1);
        engine.unwatch(1);
        assert!(wait(&mut engine, SHORT).is_empty(), "{name}");
        engine.watch(b.as_raw_fd(), 1).unwrap();
        assert!(wait(&mut engine, SHORT).is_empty(), "{name}");
        b.signal();
        assert_eq!(wait(&mut engine, None), [1], "{name}");
        engine.unwatch(1);
        assert!(wait(&mut engine, SHORT).is_empty(), "{name}");
    }
}

#[test]
fn a_forgotten_pipe_is_let_go_of() {
    for (name, mut engine) in engines() {
        let (reader, writer) = std::io::pipe().unwrap();
        engine.watch(reader.as_raw_fd(), 1).unwrap();
        assert!(wait(&mut engine, Some(Duration::ZERO)).is_empty());
        engine.unwatch(1);
        drop(reader);
        // The write end has an error as soon as nobody holds the read end, however that is let go of.
        engine.watch(writer.as_raw_fd(), 2).unwrap();
        assert_eq!(wait(&mut engine, Some(Duration::from_secs(10))), [2], "{name}");
    }
}

#[test]
fn what_cannot_be_waited_for_is_refused() {
    for (name, mut engine) in engines() {
        let file = File::open("/proc/self/exe").unwrap();
        assert_eq!(engine.watch(file.as_raw_fd(), 1).unwrap_err().raw_os_error(), Some(libc::EPERM), "{name}");
        assert_eq!(engine.watch(-1, 1).unwrap_err().raw_os_error(), Some(libc::EBADF), "{name}");
    }
}

#[test]
fn more_descriptors_than_the_queue_has_room_for() {
    for (name, mut engine) in engines() {
        let events = (0..300).map(|_| EventFd::new().unwrap()).collect::<Vec<_>>();
        for (token, event) in events.iter().enumerate() {
            engine.watch(event.as_raw_fd(), token as u32).unwrap();
            event.signal();
        }
        for _ in 0..3 {
            let mut seen = wait(&mut engine, None);
            while seen.len() < events.len() {
                let more = wait(&mut engine, None);
                assert!(!more.is_empty(), "{name}");
                seen.extend(more);
                seen.sort_unstable();
                seen.dedup();
            }
            assert_eq!(seen, (0..300).collect::<Vec<_>>(), "{name}");
        }
    }
}

#[test]
fn a_signal_from_another_thread_ends_a_wait() {
    for (name, mut engine) in engines() {
        let event = Arc::new(EventFd::new().unwrap());
        engine.watch(event.as_raw_fd(), 5).unwrap();
        let other = Arc::clone(&event);
        let thread = std::thread::spawn(move || other.signal());
        assert_eq!(wait(&mut engine, None), [5], "{name}");
        thread.join().unwrap();
    }
}

#[test]
fn a_wait_lasts_as_long_as_it_was_told() {
    for (name, mut engine) in engines() {
        let event = EventFd::new().unwrap();
        engine.watch(event.as_raw_fd(), 5).unwrap();
        let start = Instant::now();
        assert!(wait(&mut engine, Some(Duration::from_millis(20))).is_empty());
        assert!(start.elapsed() >= Duration::from_millis(20), "{name}: {:?}", start.elapsed());
    }
}

#[test]
fn an_operation_that_ends_ends_a_wait() {
    for (name, mut engine) in engines() {
        let memory = AlignedBuffer::new(4096, 4096).unwrap();
        let event = EventFd::new().unwrap();
        engine.watch(event.as_raw_fd(), 5).unwrap();
        for round in 0..50 {
            let mut done = Vec::new();
            done.extend(engine.submit(operation(round, Kind::Read, 0, 4096, &[memory.run(0, 4096)])));
            // Without a kick: a wait hands over by itself.
            while done.is_empty() {
                assert!(wait(&mut engine, None).is_empty(), "{name}");
                engine.reap(&mut done);
            }
            assert_eq!((done[0].token, done[0].result, engine.pending()), (round, Ok(()), 0), "{name}");
            assert!(wait(&mut engine, SHORT).is_empty(), "{name}");
        }
    }
}

#[test]
fn polling_without_a_wait_sees_the_end_of_operations() {
    for (name, mut engine) in engines() {
        let memory = AlignedBuffer::new(4096, 4096).unwrap();
        let mut done = Vec::new();
        done.extend(engine.submit(operation(1, Kind::Read, 0, 4096, &[memory.run(0, 4096)])));
        engine.kick().unwrap();
        let start = Instant::now();
        while done.is_empty() && start.elapsed() < Duration::from_secs(10) {
            engine.reap(&mut done);
        }
        assert_eq!(done.len(), 1, "{name}");
    }
}
