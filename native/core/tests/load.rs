//! The load loop against disks served in this process.

mod host;

use std::os::fd::AsFd;
use std::sync::atomic::AtomicBool;
use std::sync::Arc;
use std::time::Duration;

use host::{eventfd, Host, FEATURES, GUEST, LIMIT, SECTORS, USER};
use vhostuser_core::blk::{ClientLayout, ClientQueue};
use vhostuser_core::disk::{Faults, Spec};
use vhostuser_core::load::{self, LoadError, LoadResult, LoadSpec, Place};
use vhostuser_core::memory::GuestSlice;
use vhostuser_core::ring::RingSetup;
use vhostuser_core::worker::{Notifiers, StopMode};

const DATA: usize = 16 << 20;

fn spec() -> LoadSpec {
    LoadSpec {
        block_size: 4096,
        depth: 16,
        read_share: 0.5,
        sequential: false,
        first_block: 0,
        num_blocks: SECTORS / 8,
        flush_every: 10,
        verify: true,
        sleeping: false,
        duration: LIMIT,
        max_requests: 5000,
        answer_limit: LIMIT,
        seed: 7,
    }
}

fn run(host: &mut Host, features: u64, spec: LoadSpec) -> Result<LoadResult, LoadError> {
    let layout = ClientLayout { size: 64, seg_max: 4, offset: 0 };
    let mut queue = ClientQueue::new(Arc::clone(&host.map), GUEST, layout, features).unwrap();
    let (desc, avail, used) = layout.areas();
    let at = |offset: usize| USER + offset as u64;
    let setup = RingSetup { size: 64, desc: at(desc), avail: at(avail), used: at(used), base: 0, features };
    let (kick, call) = (eventfd(), eventfd());

    let notifiers =
        Notifiers { kick: Some(kick.try_clone().unwrap()), call: Some(call.try_clone().unwrap()), err: None };
    host.queues.start(0, setup, true, notifiers, None).unwrap();
    let data = GuestSlice::new(Arc::clone(&host.map), DATA, 16 * 4096).unwrap();
    let place = Place { data, addr: GUEST + DATA as u64 };
    let result = load::run(&mut queue, &place, kick.as_fd(), call.as_fd(), &AtomicBool::new(false), spec);
    host.queues.stop(0, StopMode::Finish, LIMIT, LIMIT).unwrap();
    result
}

#[test]
fn a_good_disk_is_found_good() {
    let shaky = Faults { delay_read: Duration::from_micros(100), ..Faults::default() };
    for disk in [Spec::memory(SECTORS * 512).unwrap(), Spec::memory(SECTORS * 512).unwrap().with_faults(shaky).unwrap()]
    {
        for (features, sleeping, sequential) in
            [(FEATURES, false, false), (FEATURES, true, true), (1 << 32, true, false), (1 << 32, false, true)]
        {
            let mut host = Host::new(&disk, 1, 1);
            let result = run(&mut host, features, LoadSpec { sleeping, sequential, ..spec() }).unwrap();
            assert_eq!(result.latencies.iter().map(|kind| kind.count()).sum::<u64>(), 5000);
            assert!(result.latencies.iter().all(|kind| kind.count() > 100));
            assert_eq!((result.errors, result.mismatches), (0, 0));
        }
    }
}

#[test]
fn a_disk_that_forgets_what_was_written_is_found_out() {
    let mut host = Host::new(&Spec::null(), 1, 1);
    let result = run(&mut host, FEATURES, spec()).unwrap();
    assert!(result.mismatches > 0 && result.first_mismatch.is_some());
}

#[test]
fn failed_requests_are_counted_and_not_taken_for_wrong_data() {
    let faults = Faults { error_read: 0.1, error_write: 0.1, ..Faults::default() };
    let disk = Spec::memory(SECTORS * 512).unwrap().with_faults(faults).unwrap();
    let mut host = Host::new(&disk, 1, 1);
    let result = run(&mut host, FEATURES, spec()).unwrap();
    assert!(result.errors > 100);
    assert_eq!(result.mismatches, 0);
}

#[test]
fn a_silent_device_is_left_after_the_limit() {
    for sleeping in [false, true] {
        // Storage takes longer than the client waits.
        let slow = Faults {
            delay_read: Duration::from_millis(500),
            delay_write: Duration::from_millis(500),
            ..Faults::default()
        };
        let disk = Spec::memory(SECTORS * 512).unwrap().with_faults(slow).unwrap();
        let mut host = Host::new(&disk, 1, 1);
        let answer_limit = Duration::from_millis(20);
        let result = run(&mut host, FEATURES, LoadSpec { sleeping, answer_limit, ..spec() });
        assert_eq!(result.unwrap_err(), LoadError::Silent { outstanding: 16 });
    }
}
