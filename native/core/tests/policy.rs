//! Requests that storage fails: reported, tried again, held for the operator. And how many are taken a second.
//! Nothing here sleeps: a test waits on the call descriptor, on an event, or for a state that must come.

mod host;

use std::time::{Duration, Instant};

use host::{header, memfd, range, Driver, Host, FEATURES, LIMIT, SECTORS};
use vhostuser_core::blk::{Action, Decision, ErrorPolicy, RequestType};
use vhostuser_core::disk::{Faults, FileOptions, Method, Spec};
use vhostuser_core::memory::inflight::{Format, InflightRegion};
use vhostuser_core::sys::eventfd;
use vhostuser_core::worker::{Event, EventKind, Notifiers, RequestInFlight, StopMode, Whereabouts, COUNTERS};

const HOLD: ErrorPolicy = ErrorPolicy { on_error: Action::Hold, on_enospc: Action::Hold, retry_for: None };
const RETRY: ErrorPolicy = ErrorPolicy { on_error: Action::Retry, on_enospc: Action::Retry, retry_for: None };

/// Writes fail `times` times, then all is well.
fn full(times: u64) -> Faults {
    Faults { error_write: 1.0, errno: libc::ENOSPC, error_limit: Some(times), ..Faults::default() }
}

fn faulty(faults: Faults) -> Spec {
    Spec::memory(SECTORS * 512).unwrap().with_faults(faults).unwrap()
}

/// The same faults in front of memory and of a file, by io_uring and by system calls.
fn each_engine(faults: Faults) -> Vec<Spec> {
    let file = |method| {
        let options = FileOptions { method, ..FileOptions::default() };
        Spec::file(memfd(SECTORS * 512).into(), options).unwrap().with_faults(faults).unwrap()
    };
    vec![faulty(faults), file(Method::IoUring), file(Method::Syscalls)]
}

/// The next events; waits for them.
fn events(host: &Host) -> Vec<Event> {
    assert!(eventfd::poll_readable(host.queues.events().fd(), Some(LIMIT)).unwrap(), "no event in time");
    host.queues.events().take()
}

fn event(host: &Host) -> Event {
    let mut all = events(host);
    assert_eq!(all.len(), 1, "{all:?}");
    all.remove(0)
}

fn count(host: &Host, name: &str) -> u64 {
    let place = COUNTERS.iter().find(|(key, _)| *key == name).unwrap().1;
    host.queues.stats().iter().map(|stats| stats.get(place)).sum()
}

fn wait_for(what: &str, mut state: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !state() {
        assert!(Instant::now() < end, "{what} did not come");
        std::thread::yield_now();
    }
}

fn listed(host: &Host) -> Vec<RequestInFlight> {
    host.queues.stats()[0].in_flight()
}

fn write_of(sector: u64, byte: u8) -> Vec<u8> {
    [header(1, sector), vec![byte; 1024]].concat()
}

/// The status of a request that was sent, once it is answered.
fn status(host: &Host, driver: &mut Driver, to: u64) -> u8 {
    driver.reap();
    host.get(to, 1)[0]
}

#[test]
fn a_held_request_is_told_listed_and_done_when_the_operator_says_so() {
    for spec in each_engine(full(1)) {
        let mut host = Host::keeping(&spec, 1, 1, HOLD);
        let mut driver = host.driver(0, 16, FEATURES);
        let to = driver.send(&host, &write_of(3, 0x5a), 0);
        let told = event(&host);
        assert_eq!((told.kind, told.index), (EventKind::RequestHeld, Some(0)));
        assert_eq!(told.reason, "write of 1024 bytes at sector 3: No space left on device (os error 28)");
        let found = listed(&host)[0];
        assert_eq!((found.kind, found.sector, found.bytes), (RequestType::Write, 3, 1024));
        assert_eq!((found.whereabouts, found.errno), (Whereabouts::Held, libc::ENOSPC));
        assert_eq!([count(&host, "held"), count(&host, "in_flight"), count(&host, "errors")], [1, 1, 0]);
        assert_eq!(driver.read(&host, 3, 512), (0, vec![0; 512]), "others are served meanwhile");
        assert_eq!(host.shared.decide(Decision::Retry, Some((0, found.head + 1)), LIMIT), 0, "another one");
        assert_eq!(host.shared.decide(Decision::Retry, Some((0, found.head)), LIMIT), 1);
        assert_eq!(status(&host, &mut driver, to), 0);
        assert_eq!(driver.read(&host, 3, 1024), (0, vec![0x5a; 1024]));
        let told = event(&host);
        assert_eq!(
            (told.kind, told.reason.as_str()),
            (EventKind::RequestsSettled, "1 done, 0 failed, 0 left unanswered")
        );
        assert_eq!([count(&host, "held"), count(&host, "retried"), count(&host, "in_flight")], [0, 1, 0]);
        assert_eq!(listed(&host), []);
        host.queues.close(LIMIT).unwrap();
    }
}

#[test]
fn a_request_that_is_held_again_after_the_operator_tried_is_told_again() {
    let mut host = Host::keeping(&faulty(full(2)), 1, 1, HOLD);
    let mut driver = host.driver(0, 16, FEATURES);
    let to = driver.send(&host, &write_of(0, 1), 0);
    assert_eq!(event(&host).kind, EventKind::RequestHeld);
    assert_eq!(host.shared.decide(Decision::Retry, None, LIMIT), 1);
    assert_eq!(event(&host).kind, EventKind::RequestHeld);
    assert_eq!(host.shared.decide(Decision::Retry, None, LIMIT), 1);
    assert_eq!(status(&host, &mut driver, to), 0);
}

#[test]
fn a_held_request_fails_when_the_operator_says_so() {
    let mut host = Host::keeping(&faulty(full(2)), 1, 1, HOLD);
    let mut driver = host.driver(0, 16, FEATURES);
    let places = [0, 8].map(|sector| driver.send(&host, &write_of(sector, 1), 0));
    wait_for("two held", || count(&host, "held") == 2);
    assert_eq!(host.shared.decide(Decision::Fail, None, LIMIT), 2);
    assert_eq!(places.map(|to| status(&host, &mut driver, to)), [1, 1]);
    let all = events(&host);
    assert_eq!(all.len(), 2, "one for the first and one for the end: {all:?}");
    assert_eq!(all[1].reason, "0 done, 2 failed, 0 left unanswered");
    assert_eq!(count(&host, "errors"), 2);
    assert_eq!(host.shared.decide(Decision::Fail, None, LIMIT), 0, "none is left");
}

#[test]
fn every_type_but_a_flush_is_kept_and_tried_again_as_it_was() {
    let all = Faults { error_read: 1.0, error_limit: Some(1), ..full(1) };
    let requests = [
        (write_of(4, 7), 0, RequestType::Write),
        (header(0, 0), 2048, RequestType::Read),
        ([header(11, 0), range(8, 8, 0), range(32, 8, 0)].concat(), 0, RequestType::Discard),
        ([header(13, 0), range(8, 8, 1), range(32, 8, 0)].concat(), 0, RequestType::WriteZeroes),
    ];
    for (readable, room, kind) in requests {
        for spec in each_engine(all) {
            let mut host = Host::keeping(&spec, 1, 1, HOLD);
            let mut driver = host.driver(0, 16, FEATURES);
            let to = driver.send(&host, &readable, room);
            assert_eq!(event(&host).kind, EventKind::RequestHeld, "{kind:?}");
            assert_eq!(listed(&host)[0].kind, kind);
            assert_eq!(host.shared.decide(Decision::Retry, None, LIMIT), 1);
            assert_eq!(status(&host, &mut driver, to + room as u64), 0, "{kind:?}");
        }
    }
}

#[test]
fn a_retried_request_succeeds_by_itself_and_its_failures_are_one_event() {
    for spec in each_engine(full(3)) {
        let mut host = Host::keeping(&spec, 1, 1, RETRY);
        let mut driver = host.driver(0, 16, FEATURES);
        let start = Instant::now();
        assert_eq!(driver.request(&host, &write_of(0, 9), 0).0, 0);
        assert!(start.elapsed() >= Duration::from_millis(700), "100, 200 and 400 ms of pauses");
        assert_eq!([count(&host, "retried"), count(&host, "retrying"), count(&host, "errors")], [3, 0, 0]);
        let kinds: Vec<_> = events(&host).iter().map(|event| event.kind).collect();
        assert_eq!(kinds, [EventKind::RequestRetried, EventKind::RequestsSettled]);
        assert_eq!(driver.read(&host, 0, 1024), (0, vec![9; 1024]));
    }
}

#[test]
fn a_request_is_reported_when_its_time_for_retries_is_over() {
    let policy = ErrorPolicy { retry_for: Some(Duration::from_millis(250)), ..RETRY };
    let mut host = Host::keeping(&faulty(full(u64::MAX)), 1, 1, policy);
    let mut driver = host.driver(0, 16, FEATURES);
    assert_eq!(driver.request(&host, &write_of(0, 9), 0).0, 1);
    assert_eq!(count(&host, "retried"), 1, "a second attempt would come after 300 ms");
    assert_eq!(events(&host).last().unwrap().reason, "0 done, 1 failed, 0 left unanswered");
}

#[test]
fn the_operator_may_hurry_or_fail_what_waits_for_its_next_attempt() {
    for (decision, expected) in [(Decision::Retry, 0), (Decision::Fail, 1)] {
        let mut host = Host::keeping(&faulty(full(8)), 1, 1, RETRY);
        let mut driver = host.driver(0, 16, FEATURES);
        let start = Instant::now();
        let to = driver.send(&host, &write_of(0, 9), 0);
        let mut answered = 0;
        while answered == 0 || (decision == Decision::Retry && count(&host, "in_flight") > 0) {
            answered += host.shared.decide(decision, None, LIMIT);
            assert!(start.elapsed() < LIMIT);
        }
        assert_eq!(status(&host, &mut driver, to), expected);
        assert!(start.elapsed() < Duration::from_millis(12_700), "sooner than all pauses together");
    }
}

#[test]
fn a_flush_is_never_kept() {
    for policy in [HOLD, RETRY] {
        let failing = Faults { error_flush: 1.0, error_limit: Some(1), ..Faults::default() };
        let mut host = Host::keeping(&faulty(failing), 1, 1, policy);
        let mut driver = host.driver(0, 16, FEATURES);
        assert_eq!(driver.request(&host, &header(4, 0), 0).0, 1);
        assert_eq!(event(&host).kind, EventKind::FlushFailed);
        assert_eq!([count(&host, "held"), count(&host, "retried")], [0, 0]);
    }
}

#[test]
fn each_error_has_its_own_policy() {
    let policy = ErrorPolicy { on_error: Action::Report, on_enospc: Action::Hold, retry_for: None };
    let mut host = Host::keeping(&faulty(Faults { errno: libc::EIO, ..full(1) }), 1, 1, policy);
    let mut driver = host.driver(0, 16, FEATURES);
    assert_eq!(driver.request(&host, &write_of(0, 1), 0).0, 1);
    let mut host = Host::keeping(&faulty(Faults { errno: libc::EDQUOT, ..full(1) }), 1, 1, policy);
    let mut driver = host.driver(0, 16, FEATURES);
    driver.send(&host, &write_of(0, 1), 0);
    assert_eq!(event(&host).kind, EventKind::RequestHeld);
}

#[test]
fn what_holds_up_a_stop_is_answered_when_its_time_is_over() {
    let mut host = Host::keeping(&faulty(full(2)), 2, 2, HOLD);
    let (mut driver, mut other) = (host.driver(0, 16, FEATURES), host.driver(1, 16, FEATURES));
    let to = driver.send(&host, &write_of(0, 1), 0);
    let to_other = other.send(&host, &write_of(8, 1), 0);
    wait_for("two held", || count(&host, "held") == 2);
    let start = Instant::now();
    assert_eq!(host.queues.stop(0, StopMode::Finish, LIMIT, Duration::from_millis(50)).unwrap(), 1);
    assert!(start.elapsed() >= Duration::from_millis(50));
    assert_eq!(status(&host, &mut driver, to), 1);
    assert_eq!(count(&host, "held"), 1, "the other ring is left alone");
    assert_eq!(host.shared.decide(Decision::Retry, None, LIMIT), 1);
    assert_eq!(status(&host, &mut other, to_other), 0);
}

#[test]
fn what_holds_up_a_change_of_memory_is_answered_and_the_next_failure_is_held_again() {
    let mut host = Host::keeping(&faulty(full(2)), 1, 1, HOLD);
    let mut driver = host.driver(0, 16, FEATURES);
    let to = driver.send(&host, &write_of(0, 1), 0);
    wait_for("a held one", || count(&host, "held") == 1);
    let memory = std::sync::Arc::clone(&host.memory);
    host.queues.set_memory(memory, Duration::from_millis(50)).unwrap();
    assert_eq!(status(&host, &mut driver, to), 1);
    let to = driver.send(&host, &write_of(0, 1), 0);
    wait_for("a held one", || count(&host, "held") == 1);
    assert_eq!(host.shared.decide(Decision::Retry, None, LIMIT), 1);
    assert_eq!(status(&host, &mut driver, to), 0);
}

#[test]
fn a_held_request_stays_in_the_region_and_a_successor_completes_it_once() {
    for (policy, spec) in
        [HOLD, RETRY].into_iter().flat_map(|policy| each_engine(full(1)).into_iter().map(move |spec| (policy, spec)))
    {
        let mut host = Host::keeping(&spec, 1, 1, policy);
        let region = InflightRegion::create(Format::Split, 1, 16, 0).unwrap();
        let mut driver = host.unstarted(0, 16, FEATURES);
        let start = |host: &mut Host, driver: &Driver| {
            let notifiers = Notifiers {
                kick: Some(driver.kick.try_clone().unwrap()),
                call: Some(driver.call.try_clone().unwrap()),
                err: None,
            };
            let setup = host.setup(0, 16, FEATURES, 0);
            host.queues.start(0, setup, true, notifiers, Some(&region)).unwrap();
        };
        start(&mut host, &driver);
        assert_eq!(driver.request(&host, &header(0, 0), 512).0, 0);
        let to = driver.send(&host, &write_of(2, 0x77), 0);
        assert!(matches!(event(&host).kind, EventKind::RequestHeld | EventKind::RequestRetried));
        host.queues.stop(0, StopMode::Leave, LIMIT, LIMIT).unwrap();
        assert_eq!(event(&host).reason, "0 done, 0 failed, 1 left unanswered");
        assert_eq!(driver.ring.reap().unwrap(), None, "nothing was answered");
        assert_eq!([count(&host, "held"), count(&host, "retrying"), count(&host, "in_flight")], [0, 0, 0]);
        start(&mut host, &driver);
        assert_eq!(status(&host, &mut driver, to), 0);
        assert_eq!(driver.read(&host, 2, 1024), (0, vec![0x77; 1024]));
        assert_eq!(count(&host, "writes"), 1);
        assert_eq!(driver.ring.reap().unwrap(), None, "and not twice");
    }
}

#[test]
fn a_worker_ends_with_requests_held() {
    for policy in [HOLD, RETRY] {
        let mut host = Host::keeping(&faulty(full(u64::MAX)), 1, 1, policy);
        let mut driver = host.driver(0, 16, FEATURES);
        driver.send(&host, &write_of(0, 1), 0);
        event(&host);
        host.queues.close(LIMIT).unwrap();
        assert_eq!(host.shared.decide(Decision::Retry, None, LIMIT), 0, "there is nobody any more");
    }
}

#[test]
fn held_requests_are_given_up_with_the_memory_they_point_into() {
    let mut host = Host::keeping(&faulty(full(1)), 1, 1, HOLD);
    let mut driver = host.driver(0, 16, FEATURES);
    driver.send(&host, &write_of(0, 1), 0);
    assert_eq!(event(&host).kind, EventKind::RequestHeld);
    host.file.set_len(0).unwrap();
    // The worker finds out when it next looks at the ring.
    driver.kick();
    wait_for("nothing held", || count(&host, "held") == 0);
    assert_eq!(host.shared.decide(Decision::Retry, None, LIMIT), 0, "zeroes would be written");
    host.queues.stop(0, StopMode::Finish, LIMIT, LIMIT).unwrap();
}

#[test]
fn many_requests_on_several_workers_are_one_episode() {
    let mut host = Host::keeping(&faulty(full(64)), 4, 2, HOLD);
    let mut drivers: Vec<Driver> = (0..4).map(|index| host.driver(index, 64, FEATURES)).collect();
    let mut places = Vec::new();
    for (number, driver) in drivers.iter_mut().enumerate() {
        places.push(
            (0..16).map(|at| driver.send(&host, &write_of(64 * number as u64 + at * 2, 3), 0)).collect::<Vec<_>>(),
        );
    }
    wait_for("all held", || count(&host, "held") == 64);
    assert_eq!(events(&host).len(), 1);
    assert_eq!(host.shared.decide(Decision::Retry, None, LIMIT), 64);
    for (driver, places) in drivers.iter_mut().zip(places) {
        for _ in &places {
            driver.reap();
        }
        assert!(places.iter().all(|&to| host.get(to, 1) == [0]));
    }
    assert_eq!(event(&host).reason, "64 done, 0 failed, 0 left unanswered");
}

#[test]
fn a_rate_limit_holds_over_all_workers_and_ends_when_it_is_lifted() {
    let mut host = Host::new(&Spec::null(), 2, 2);
    let mut drivers = [host.driver(0, 128, FEATURES), host.driver(1, 128, FEATURES)];
    host.shared.set_rate_limit(200, 0);
    let start = Instant::now();
    for driver in &mut drivers {
        for _ in 0..60 {
            driver.send(&host, &header(0, 0), 512);
        }
    }
    for driver in &mut drivers {
        for _ in 0..60 {
            driver.reap();
        }
    }
    // 120 requests, of which the burst is 20; each of two workers may take one more at a time.
    let taken = start.elapsed();
    assert!(taken >= Duration::from_millis((120 - 20 - 2) * 5), "{taken:?}");
    host.shared.set_rate_limit(0, 1);
    assert_eq!(drivers[0].request(&host, &header(0, 0), 512).0, 0, "the burst is never less than one request");
    let to = drivers[0].send(&host, &header(0, 0), 512);
    host.shared.set_rate_limit(0, 0);
    assert_eq!(status(&host, &mut drivers[0], to + 512), 0, "not 512 seconds later");
}

#[test]
fn what_waits_for_the_rate_limit_stays_in_the_ring_and_is_not_taken_when_it_stops() {
    let mut host = Host::new(&Spec::null(), 1, 1);
    let mut driver = host.driver(0, 16, FEATURES);
    host.shared.set_rate_limit(0, 512);
    assert_eq!(driver.request(&host, &header(0, 0), 4096).0, 0);
    for _ in 0..3 {
        driver.send(&host, &header(0, 0), 512);
    }
    assert_eq!(host.queues.stop(0, StopMode::Finish, LIMIT, LIMIT).unwrap(), 1);
    assert_eq!(driver.ring.reap().unwrap(), None);
    host.shared.set_rate_limit(0, 0);
    host.start(0, 16, FEATURES, 1, &driver);
    for _ in 0..3 {
        driver.reap();
    }
}
