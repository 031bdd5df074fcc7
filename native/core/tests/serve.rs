//! A disk served to our own driver half: workers, requests, statuses, life cycle. Nothing here sleeps: a
//! test waits on the call descriptor, as a driver does.

mod host;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use host::{header, memfd, pipe, range, Host, FEATURES, GUEST, LEN, LIMIT, SECTORS};
use vhostuser_core::disk::{Faults, Spec};
use vhostuser_core::memory::{GuestMemory, GuestSlice, RegionSpec};
use vhostuser_core::ring::{feature, layout, Segment};
use vhostuser_core::sys::eventfd;
use vhostuser_core::worker::{EventKind, Notifiers, QueueError, StopMode, COUNTERS};

fn memory_disk() -> Spec {
    Spec::memory(SECTORS * 512).unwrap()
}

#[test]
fn what_is_written_is_read_back() {
    for features in [FEATURES, feature::VERSION_1, 0] {
        let mut host = Host::new(&memory_disk(), 1, 1);
        let mut driver = host.driver(0, 16, features);
        let data: Vec<u8> = (0..8192u32).map(|i| (i % 253) as u8).collect();
        assert_eq!(driver.write(&host, 7, &data), 0);
        assert_eq!(driver.read(&host, 7, data.len()), (0, data.clone()));
        assert_eq!(driver.read(&host, 6, 512), (0, vec![0; 512]));
        let (status, _, written) = driver.request(&host, &header(0, 0), 1024);
        assert_eq!((status, written), (0, 1025));
        let (status, _, written) = driver.request(&host, &[header(1, 0), vec![1; 512]].concat(), 0);
        assert_eq!((status, written), (0, 1));
    }
}

#[test]
fn every_status_is_what_the_specification_says() {
    let mut host = Host::new(&memory_disk(), 1, 1);
    let mut driver = host.driver(0, 16, FEATURES);
    let last = SECTORS - 1;
    let big = vec![0; 513];
    let cases: Vec<(&str, Vec<u8>, usize, u8)> = vec![
        ("read of the last sector", header(0, last), 512, 0),
        ("read beyond the end", header(0, last), 1024, 1),
        ("read far beyond the end", header(0, u64::MAX), 512, 1),
        ("read of an odd length", header(0, 0), 100, 1),
        ("empty read", header(0, 0), 0, 0),
        ("read with data to write", [header(0, 0), vec![0; 512]].concat(), 512, 1),
        ("write of the last sector", [header(1, last), vec![0; 512]].concat(), 0, 0),
        ("write beyond the end", [header(1, last), vec![0; 1024]].concat(), 0, 1),
        ("write of an odd length", [header(1, 0), big].concat(), 0, 1),
        ("write with room to read", [header(1, 0), vec![0; 512]].concat(), 512, 1),
        ("flush", header(4, 0), 0, 0),
        ("flush with data", header(4, 9), 512, 0),
        ("legacy flush to a modern device", header(5, 0), 0, 2),
        ("scsi command", header(2, 0), 0, 2),
        ("get lifetime", header(10, 0), 6, 2),
        ("secure erase", [header(14, 0), range(0, 8, 0)].concat(), 0, 2),
        ("zone report", header(16, 0), 64, 2),
        ("an unknown type", header(77, 0), 0, 2),
        ("discard", [header(11, 0), range(0, 8, 0)].concat(), 0, 0),
        ("discard of nothing", [header(11, 0), range(0, 0, 0)].concat(), 0, 0),
        ("discard with unmap", [header(11, 0), range(0, 8, 1)].concat(), 0, 2),
        ("discard beyond the end", [header(11, 0), range(last, 2, 0)].concat(), 0, 1),
        ("discard of too much", [header(11, 0), range(0, 1025, 0)].concat(), 0, 1),
        ("discard without a range", header(11, 0), 0, 1),
        ("discard of half a range", [header(11, 0), vec![0; 8]].concat(), 0, 1),
        ("four ranges", [header(11, 0), range(0, 8, 0).repeat(4)].concat(), 0, 0),
        ("five ranges", [header(11, 0), range(0, 8, 0).repeat(5)].concat(), 0, 2),
        ("zeroes", [header(13, 0), range(0, 8, 0)].concat(), 0, 0),
        ("zeroes with unmap", [header(13, 0), range(0, 8, 1)].concat(), 0, 0),
        ("zeroes with a reserved flag", [header(13, 0), range(0, 8, 2)].concat(), 0, 2),
        ("zeroes, the second range bad", [header(13, 0), range(0, 8, 0), range(last, 9, 0)].concat(), 0, 1),
        ("a header cut short", header(0, 0)[..15].to_vec(), 512, 1),
    ];
    for (what, readable, room, status) in cases {
        assert_eq!(driver.request(&host, &readable, room).0, status, "{what}");
    }
    let (status, id, written) = driver.request(&host, &header(8, 0), 20);
    assert_eq!((status, &id[..], written), (0, &b"a serial number\0\0\0\0\0"[..], 21));
}

#[test]
fn features_that_were_not_negotiated_are_not_served() {
    let mut host = Host::new(&memory_disk(), 1, 1);
    let mut driver = host.driver(0, 16, feature::VERSION_1);
    assert_eq!(driver.request(&host, &[header(11, 0), range(0, 8, 0)].concat(), 0).0, 2);
    assert_eq!(driver.request(&host, &[header(13, 0), range(0, 8, 0)].concat(), 0).0, 2);
}

#[test]
fn a_legacy_driver_may_use_the_old_flush_and_the_barrier_flag() {
    let mut host = Host::new(&memory_disk(), 1, 1);
    let mut driver = host.driver(0, 16, 0);
    assert_eq!(driver.request(&host, &header(5, 0), 0).0, 0);
    assert_eq!(driver.request(&host, &header(0x8000_0000, 0), 512).0, 0);
}

#[test]
fn nothing_is_changed_on_a_read_only_disk() {
    let mut host = Host::with(&memory_disk(), 1, 1, Duration::ZERO, |limits| limits.read_only = true);
    let mut driver = host.driver(0, 16, FEATURES);
    for (kind, payload) in [(1, vec![1; 512]), (11, range(0, 8, 0)), (13, range(0, 8, 0))] {
        assert_eq!(driver.request(&host, &[header(kind, 0), payload].concat(), 0).0, 1);
    }
    assert_eq!(driver.read(&host, 0, 512), (0, vec![0; 512]));
}

#[test]
fn requests_must_lie_on_blocks() {
    let mut host = Host::with(&memory_disk(), 1, 1, Duration::ZERO, |limits| limits.block_size = 4096);
    let mut driver = host.driver(0, 16, FEATURES);
    for (sector, len, status) in [(0, 4096, 0), (8, 8192, 0), (1, 4096, 1), (0, 512, 1), (8, 4608, 1)] {
        assert_eq!(driver.read(&host, sector, len).0, status, "{len} bytes at sector {sector}");
    }
}

#[test]
fn any_framing_is_a_request() {
    let mut host = Host::new(&memory_disk(), 1, 1);
    let mut driver = host.driver(0, 16, FEATURES);
    assert_eq!(driver.write(&host, 3, &[0x5a; 1024]), 0);
    let (from, to) = (driver.room(16), driver.room(1025));
    host.put(from, &header(0, 3));
    let byte = |at: u64, len: u32, writable| Segment { addr: at, len, writable };
    let segments = [
        byte(from, 1, false),
        byte(from + 1, 14, false),
        byte(from + 15, 1, false),
        byte(to, 1000, true),
        byte(to + 1000, 0, true),
        byte(to + 1000, 25, true),
    ];
    driver.ring.add(&segments).unwrap();
    assert_eq!(driver.run().1, 1025);
    assert_eq!(host.get(to, 1025), [vec![0x5a; 1024], vec![0]].concat());
}

#[test]
fn a_chain_that_cannot_be_answered_comes_back_empty() {
    let mut host = Host::new(&memory_disk(), 1, 1);
    let mut driver = host.driver(0, 16, FEATURES);
    let from = driver.room(16);
    host.put(from, &header(0, 0));
    driver.ring.add(&[Segment { addr: from, len: 16, writable: false }]).unwrap();
    assert_eq!(driver.run().1, 0);
    driver
        .ring
        .add(&[Segment { addr: from, len: 16, writable: false }, Segment { addr: 0, len: 513, writable: true }])
        .unwrap();
    assert_eq!(driver.run().1, 0, "the status byte is outside of memory");
    assert_eq!(driver.read(&host, 0, 512).0, 0, "the ring goes on");
}

#[test]
fn a_bad_address_costs_one_request() {
    let mut host = Host::new(&memory_disk(), 1, 1);
    let mut driver = host.driver(0, 16, FEATURES);
    let from = driver.room(512);
    host.put(from, &header(0, 0));
    let segments = [
        Segment { addr: from, len: 16, writable: false },
        Segment { addr: GUEST + LEN - 100, len: 512, writable: true },
        Segment { addr: from + 64, len: 1, writable: true },
    ];
    driver.ring.add(&segments).unwrap();
    assert_eq!(driver.run().1, 0);
    assert_eq!(host.get(from + 64, 1), [1]);
    assert_eq!(driver.read(&host, 0, 512).0, 0);
}

#[test]
fn a_broken_ring_costs_no_other_ring() {
    for num_workers in [1, 2] {
        let mut host = Host::new(&memory_disk(), 2, num_workers);
        let (bad, mut good) = (host.driver(0, 16, FEATURES), host.driver(1, 16, FEATURES));
        bad.ring.areas().avail.store_u16(layout::IDX, 99).unwrap();
        bad.kick();
        assert!(eventfd::poll_readable(bad.err.as_fd(), Some(LIMIT)).unwrap());
        let events = host.queues.events().take();
        assert_eq!(events.len(), 1);
        assert_eq!((events[0].kind, events[0].index), (EventKind::RingBroken, Some(0)));
        assert_eq!(good.write(&host, 0, &[1; 512]), 0);
        assert_eq!(host.queues.stop(0, StopMode::Finish, LIMIT, LIMIT).unwrap(), 0, "a broken ring answers its base");
        let mut again = host.driver(0, 16, FEATURES);
        assert_eq!(again.read(&host, 0, 512), (0, vec![1; 512]));
    }
}

#[test]
fn a_stopped_ring_goes_on_where_it_was() {
    let mut host = Host::new(&memory_disk(), 1, 1);
    let mut driver = host.driver(0, 4, FEATURES);
    for round in 0..10u16 {
        assert_eq!(driver.write(&host, 0, &[round as u8; 512]), 0);
        assert_eq!(host.queues.stop(0, StopMode::Finish, LIMIT, LIMIT).unwrap(), round + 1);
        assert!(matches!(host.queues.stop(0, StopMode::Finish, LIMIT, LIMIT), Err(QueueError::Setup(_))));
        host.start(0, 4, FEATURES, round + 1, &driver);
        assert!(matches!(
            host.queues.start(0, host.setup(0, 4, FEATURES, 0), true, Notifiers::default(), None),
            Err(QueueError::Setup(_))
        ));
    }
}

#[test]
fn a_stopped_ring_has_closed_its_descriptors() {
    use std::io::Read;
    let mut host = Host::new(&memory_disk(), 1, 1);
    drop(host.unstarted(0, 4, FEATURES));
    for _ in 0..300 {
        let (mut reader, writer) = pipe();
        let notifiers = Notifiers { call: Some(writer), ..Notifiers::default() };
        host.queues.start(0, host.setup(0, 4, FEATURES, 0), true, notifiers, None).unwrap();
        host.queues.stop(0, StopMode::Finish, LIMIT, LIMIT).unwrap();
        assert_eq!(reader.read(&mut [0]).unwrap(), 0, "nobody can write to it any more");
    }
}

#[test]
fn a_request_made_before_the_start_is_served_without_a_kick() {
    let mut host = Host::new(&memory_disk(), 1, 1);
    let mut driver = host.unstarted(0, 4, FEATURES);
    let (from, to) = (driver.room(16), driver.room(1));
    host.put(from, &header(4, 0));
    driver
        .ring
        .add(&[Segment { addr: from, len: 16, writable: false }, Segment { addr: to, len: 1, writable: true }])
        .unwrap();
    driver.ring.publish().unwrap();
    host.start(0, 4, FEATURES, 0, &driver);
    assert_eq!(driver.reap().1, 1);
}

#[test]
fn nothing_is_in_flight_once_all_is_answered() {
    // Storage that has them for a moment, and gives all of them back at once.
    let faults = Faults { delay_read: Duration::from_nanos(1), ..Faults::default() };
    let in_flight = COUNTERS.iter().find(|(name, _)| *name == "in_flight").unwrap().1;
    for features in [feature::VERSION_1, FEATURES] {
        let mut host = Host::new(&memory_disk().with_faults(faults).unwrap(), 1, 1);
        let mut driver = host.unstarted(0, 16, features);
        for _ in 0..4 {
            driver.send(&host, &header(0, 0), 512);
        }
        host.start(0, 16, features, 0, &driver);
        for _ in 0..4 {
            driver.reap();
        }
        // The worker says so right after the driver has seen it.
        let deadline = Instant::now() + LIMIT;
        while host.queues.stats()[0].get(in_flight) > 0 {
            assert!(Instant::now() < deadline, "{} are still in flight", host.queues.stats()[0].get(in_flight));
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_disabled_ring_is_left_alone_and_looked_at_when_enabled() {
    let mut host = Host::new(&memory_disk(), 1, 1);
    let mut driver = host.driver(0, 4, FEATURES);
    host.queues.enable(0, false).unwrap();
    let (from, to) = (driver.room(16), driver.room(1));
    host.put(from, &header(4, 0));
    driver
        .ring
        .add(&[Segment { addr: from, len: 16, writable: false }, Segment { addr: to, len: 1, writable: true }])
        .unwrap();
    driver.ring.publish().unwrap();
    driver.kick();
    host.queues.enable(0, false).unwrap();
    assert!(!driver.ring.has_used().unwrap());
    host.queues.enable(0, true).unwrap();
    assert_eq!(driver.reap().1, 1);
}

#[test]
fn a_ring_without_a_kick_descriptor_is_polled() {
    let mut host = Host::new(&memory_disk(), 1, 1);
    let mut driver = host.unstarted(0, 4, FEATURES);
    let notifiers = Notifiers { call: Some(driver.call.try_clone().unwrap()), ..Notifiers::default() };
    host.queues.start(0, host.setup(0, 4, FEATURES, 0), true, notifiers, None).unwrap();
    assert_eq!(driver.write(&host, 0, &[7; 512]), 0);
}

#[test]
fn a_new_call_descriptor_is_signalled_and_used() {
    let mut host = Host::new(&memory_disk(), 1, 1);
    let mut driver = host.driver(0, 4, FEATURES);
    driver.call = host::eventfd();
    host.queues.set_call(0, Some(driver.call.try_clone().unwrap())).unwrap();
    assert!(eventfd::poll_readable(driver.call.as_fd(), Some(LIMIT)).unwrap());
    eventfd::drain(driver.call.as_fd()).unwrap();
    assert_eq!(driver.write(&host, 0, &[7; 512]), 0);
    let file = File::open("/dev/zero").unwrap();
    assert!(host.queues.set_call(0, Some(file.into())).is_err(), "not a notification descriptor");
}

#[test]
fn memory_may_change_under_a_running_ring() {
    let mut host = Host::new(&memory_disk(), 1, 1);
    let mut driver = host.driver(0, 4, FEATURES);
    assert_eq!(driver.write(&host, 0, &[7; 512]), 0);
    let more = memfd(1 << 20);
    let extra = RegionSpec { guest_addr: 0, size: 1 << 20, user_addr: 0x1000, mmap_offset: 0 };
    let larger = Arc::new(host.memory.add(extra, more.as_fd()).unwrap());
    host.queues.set_memory(larger, LIMIT).unwrap();
    assert_eq!(driver.read(&host, 0, 512), (0, vec![7; 512]));
    let elsewhere = GuestMemory::new([(extra, more.as_fd())]).unwrap();
    host.queues.set_memory(Arc::new(elsewhere), LIMIT).unwrap();
    assert_eq!(host.queues.events().take().len(), 1, "the ring is not in the new memory");
}

#[test]
fn memory_that_is_taken_away_is_reported_and_survived() {
    let mut host = Host::new(&memory_disk(), 1, 1);
    let driver = host.driver(0, 4, FEATURES);
    host.file.set_len(0).unwrap();
    driver.kick();
    assert!(eventfd::poll_readable(host.queues.events().fd(), Some(LIMIT)).unwrap());
    let mut kinds = Vec::new();
    while !kinds.contains(&EventKind::MemoryLost) {
        assert!(eventfd::poll_readable(host.queues.events().fd(), Some(LIMIT)).unwrap());
        kinds.extend(host.queues.events().take().iter().map(|event| event.kind));
    }
    host.queues.close(LIMIT).unwrap();
}

#[test]
fn a_smaller_disk_refuses_what_lies_beyond() {
    let mut host = Host::new(&memory_disk(), 1, 1);
    let mut driver = host.driver(0, 4, FEATURES);
    assert_eq!(driver.read(&host, 100, 512).0, 0);
    host.shared.set_num_sectors(100);
    assert_eq!(driver.read(&host, 100, 512).0, 1);
    host.shared.set_num_sectors(101);
    assert_eq!(driver.read(&host, 100, 512).0, 0);
}

#[test]
fn stopping_waits_for_storage_and_says_so_when_it_takes_too_long() {
    let slow = Faults { delay_write: Duration::from_millis(400), ..Faults::default() };
    let mut host = Host::new(&memory_disk().with_faults(slow).unwrap(), 1, 1);
    let mut driver = host.driver(0, 4, FEATURES);
    let (from, to) = (driver.room(528), driver.room(1));
    host.put(from, &[header(1, 0), vec![9; 512]].concat());
    driver
        .ring
        .add(&[Segment { addr: from, len: 528, writable: false }, Segment { addr: to, len: 1, writable: true }])
        .unwrap();
    driver.ring.publish().unwrap();
    driver.kick();
    while host.queues.stats()[0].get(16) == 0 {
        std::thread::yield_now();
    }
    assert!(host.queues.stats()[0].oldest_age_us() < 20_000_000);
    let soon = Duration::from_millis(1);
    assert!(matches!(host.queues.stop(0, StopMode::Finish, soon, soon), Err(QueueError::DrainTimeout)));
    assert!(matches!(host.queues.close(Duration::from_millis(1)), Err(QueueError::DrainTimeout)));
    host.queues.close(LIMIT).unwrap();
    assert_eq!(driver.ring.reap().unwrap().unwrap().1, 1, "it was answered before the worker left");
}

#[test]
fn a_failed_flush_fails_every_later_one() {
    let failing = Faults { error_flush: 1.0, ..Faults::default() };
    let mut host = Host::new(&memory_disk().with_faults(failing).unwrap(), 2, 2);
    let (mut one, mut two) = (host.driver(0, 4, FEATURES), host.driver(1, 4, FEATURES));
    assert!(!host.shared.flush_failed());
    assert_eq!(one.request(&host, &header(4, 0), 0).0, 1);
    assert!(host.shared.flush_failed());
    assert_eq!(two.request(&host, &header(4, 0), 0).0, 1);
    assert_eq!(one.write(&host, 0, &[1; 512]), 0);
    assert_eq!(host.queues.events().take().len(), 1, "said once");
}

#[test]
fn many_requests_on_many_rings_all_come_back_right() {
    let shaky =
        Faults { delay_read: Duration::from_micros(200), delay_write: Duration::from_micros(200), ..Faults::default() };
    for (spec, poll) in [
        (memory_disk(), Duration::ZERO),
        (memory_disk(), Duration::from_micros(50)),
        (memory_disk().with_faults(shaky).unwrap(), Duration::ZERO),
    ] {
        let mut host = Host::with(&spec, 4, 2, poll, |_| {});
        let mut drivers: Vec<_> = (0..4).map(|index| host.driver(index, 64, FEATURES)).collect();
        for round in 0..50u64 {
            for (at, driver) in drivers.iter_mut().enumerate() {
                for place in 0..8u64 {
                    let sector = (at as u64 * 8 + place) * 4 + round % 3;
                    let data = [round as u8 ^ place as u8 ^ (at as u8) << 5; 512];
                    assert_eq!(driver.write(&host, sector, &data), 0);
                    assert_eq!(driver.read(&host, sector, 512), (0, data.to_vec()));
                }
                driver.next = GUEST + (16 << 20) + at as u64 * (8 << 20);
            }
        }
        let stats = host.queues.stats();
        assert!(stats.iter().all(|queue| (queue.get(0), queue.get(1)) == (400, 400)));
        for index in 0..4 {
            assert_eq!(host.queues.stop(index, StopMode::Finish, LIMIT, LIMIT).unwrap(), 800);
        }
    }
}

#[test]
fn a_full_ring_of_32768_is_worked_off() {
    let mut host = Host::new(&Spec::null(), 1, 1);
    let mut driver = host.driver(0, 32768, FEATURES);
    let (from, to) = (driver.room(16), driver.room(1));
    host.put(from, &header(4, 0));
    for round in 0..3 {
        for _ in 0..16384 {
            driver
                .ring
                .add(&[Segment { addr: from, len: 16, writable: false }, Segment { addr: to, len: 1, writable: true }])
                .unwrap();
        }
        assert_eq!(driver.ring.free(), 0, "round {round}");
        driver.run();
        for _ in 1..16384 {
            driver.reap();
        }
    }
}

#[test]
fn a_chain_may_have_thousands_of_segments() {
    let mut host = Host::new(&memory_disk(), 1, 1);
    let mut driver = host.driver(0, 1024, FEATURES);
    let (from, to, table) = (driver.room(16), driver.room(1 << 20), driver.room(4096 * 16));
    host.put(from, &header(0, 0));
    let mut segments = vec![Segment { addr: from, len: 16, writable: false }];
    segments.extend((0..2048).map(|i| Segment { addr: to + i * 512, len: 512, writable: true }));
    segments.push(Segment { addr: from + 100, len: 1, writable: true });
    let slice = GuestSlice::new(Arc::clone(&host.map), (table - GUEST) as usize, 4096 * 16).unwrap();
    driver.ring.add_indirect(&segments, &slice, table).unwrap();
    assert_eq!(driver.run().1, 2048 * 512 + 1);
}

#[test]
fn descriptors_are_given_back() {
    let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let cycle = || {
        let mut host = Host::new(&memory_disk(), 2, 2);
        let mut driver = host.driver(0, 16, FEATURES);
        assert_eq!(driver.write(&host, 0, &[1; 512]), 0);
        host.queues.close(LIMIT).unwrap();
        assert!(driver.kick.as_raw_fd() > 0);
    };
    // Other tests run beside this one in the same process: what leaks grows with the cycles, noise does not.
    let before = count();
    (0..50).for_each(|_| cycle());
    assert!(count() < before + 50 * 4);
}

#[test]
fn flushes_of_all_workers_take_turns() {
    let slow = Faults { delay_flush: Duration::from_millis(20), ..Faults::default() };
    let mut host = Host::new(&memory_disk().with_faults(slow).unwrap(), 2, 2);
    let mut drivers = [host.driver(0, 64, FEATURES), host.driver(1, 64, FEATURES)];
    for driver in &mut drivers {
        for _ in 0..20 {
            let (from, to) = (driver.room(16), driver.room(1));
            host.put(from, &header(4, 0));
            driver
                .ring
                .add(&[Segment { addr: from, len: 16, writable: false }, Segment { addr: to, len: 1, writable: true }])
                .unwrap();
        }
        driver.ring.publish().unwrap();
        driver.kick();
    }
    for driver in &mut drivers {
        (0..20).for_each(|_| assert_eq!(driver.reap().1, 1));
    }
}
