//! A worker asleep where a peer put it: who waits for the worker wakes it.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Duration;

use vhostuser_core::disk::{AnyEngine, Spec};
use vhostuser_core::memory::GuestMemory;
use vhostuser_core::ring::Chain;
use vhostuser_core::worker::{Begun, Events, Finished, Queues, Serve};

const LIMIT: Duration = Duration::from_secs(20);

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
