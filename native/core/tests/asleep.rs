//! A worker asleep where a peer put it: who waits for the worker wakes it.
#![allow(unsafe_code)]

mod host;

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use host::{header, Host, LIMIT};
use vhostuser_core::disk::{AnyEngine, Spec};
use vhostuser_core::memory::GuestMemory;
use vhostuser_core::ring::Chain;
use vhostuser_core::worker::{Begun, Events, Finished, Queues, Serve, StopMode};

/// Writes to a full eventfd at its first pass, as a notification does that a peer was quicker than.
struct Sleeper {
    engine: AnyEngine,
    full: OwnedFd,
    passes: Arc<AtomicUsize>,
}

impl Serve for Sleeper {
    type Engine = AnyEngine;

    fn engine(&mut self) -> &mut AnyEngine {
        &mut self.engine
    }

    fn start_batch(&mut self, _now_ns: u64) {
        if self.passes.fetch_add(1, Ordering::SeqCst) == 0 {
            let one = 1_u64;
            // SAFETY: eight bytes, of a local.
            let count = unsafe { libc::write(self.full.as_raw_fd(), (&raw const one).cast(), 8) };
            assert_eq!(count, -1, "it is full and nobody reads it");
        }
    }

    fn begin(&mut self, _: u16, _: u64, _: &mut Chain, _: &Arc<GuestMemory>) -> Begun {
        unreachable!("there is no ring")
    }

    fn finish_batch(&mut self, _: &mut Vec<Finished>) {}

    fn pending(&self) -> usize {
        0
    }

    fn memory_fault(&mut self) -> bool {
        false
    }
}

fn full_eventfd() -> OwnedFd {
    // SAFETY: makes a descriptor, or fails; a blocking one.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
    assert!(fd >= 0);
    let most = u64::MAX - 1;
    // SAFETY: eight bytes, of a local.
    assert_eq!(unsafe { libc::write(fd, (&raw const most).cast(), 8) }, 8);
    // SAFETY: just made, and nobody else's.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn asleep() -> (Queues, Arc<AtomicUsize>) {
    let passes = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&passes);
    let queues = Queues::new(1, 1, Duration::ZERO, Arc::new(Events::new().unwrap()), move |_, _| {
        Ok(Sleeper { engine: Spec::null().build()?, full: full_eventfd(), passes: Arc::clone(&passes) })
    })
    .unwrap();
    (queues, seen)
}

#[test]
fn a_change_of_memory_wakes_a_worker_that_sleeps_on_a_peers_descriptor() {
    let (mut queues, passes) = asleep();
    queues.set_memory(Arc::default(), LIMIT).unwrap();
    assert!(passes.load(Ordering::SeqCst) >= 1);
    queues.close(LIMIT).unwrap();
}

#[test]
fn the_end_wakes_a_worker_that_sleeps_on_a_peers_descriptor() {
    let (mut queues, passes) = asleep();
    queues.close(LIMIT).unwrap();
    assert!(passes.load(Ordering::SeqCst) >= 1);
}

#[test]
fn a_peer_that_has_notifications_wait_after_all_holds_up_its_own_ring_until_somebody_waits_for_it() {
    let mut host = Host::new(&Spec::null(), 1, 1);
    let mut driver = host.driver(0, 16, 0);
    let call = driver.call.as_raw_fd();
    // It was nonblocking when it came; the flags are the peer's too.
    // SAFETY: numbers only, and eight bytes of a local.
    unsafe {
        let flags = libc::fcntl(call, libc::F_GETFL);
        assert_ne!(flags & libc::O_NONBLOCK, 0);
        let most = u64::MAX - 1;
        assert_eq!(libc::write(call, (&raw const most).cast(), 8), 8);
        assert_eq!(libc::fcntl(call, libc::F_SETFL, flags & !libc::O_NONBLOCK), 0);
    }
    driver.send(&host, &header(4, 0), 0);
    driver.ring.publish().unwrap();
    driver.kick();
    let end = Instant::now() + LIMIT;
    while driver.ring.reap().unwrap().is_none() {
        assert!(Instant::now() < end, "the answer comes before the notification that waits");
    }
    assert_eq!(host.queues.stop(0, StopMode::Finish, LIMIT, LIMIT).unwrap(), 1);
}
