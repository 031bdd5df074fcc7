//! The two hand-shakes about notifications, in every order that the memory model allows: no driver waits for a call that
//! does not come, no device for a kick. loom reports a thread that waits for ever as a deadlock.

use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use super::*;
use crate::memory::{GuestMemory, RegionSpec};
use crate::sys::sync::{modelled::every_order, EventFd};

const SIZE: u16 = 4;

#[allow(unsafe_code)]
fn guest_memory() -> Arc<GuestMemory> {
    // SAFETY: a literal name; the returned descriptor is new.
    let fd = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"loom".as_ptr(), libc::MFD_CLOEXEC)) };
    std::fs::File::from(fd.try_clone().unwrap()).set_len(0x1000).unwrap();
    let spec = RegionSpec { guest_addr: 0, size: 0x1000, user_addr: 0, mmap_offset: 0 };
    Arc::new(GuestMemory::new([(spec, fd.as_fd())]).unwrap())
}

fn pair(memory: &GuestMemory, features: u64, base: u16) -> (DriverRing, DeviceRing) {
    let setup = RingSetup { size: SIZE, desc: 0, avail: 0x400, used: 0x800, base, features };
    let driver = DriverRing::new(Areas::find(&setup, memory).unwrap(), features, base).unwrap();
    know(driver.areas(), features);
    (driver, DeviceRing::new(setup, memory).unwrap())
}

/// Touches every number of the ring before there are threads: loom counts from then on.
fn know(areas: &Areas, features: u64) {
    let words = |ring: &crate::memory::GuestSlice, step, len| {
        for at in (4..len).step_by(step) {
            assert_eq!(if step == 2 { u32::from(ring.load_u16(at).unwrap()) } else { ring.load_u32(at).unwrap() }, 0);
        }
        for at in [layout::FLAGS, layout::IDX] {
            ring.load_u16(at).unwrap();
        }
    };
    (0..SIZE).for_each(|at| assert_eq!(areas.descriptor(at).unwrap().len, 0));
    words(&areas.avail, 2, layout::avail_len(SIZE, false));
    words(&areas.used, 4, layout::used_len(SIZE, false));
    if features & feature::EVENT_IDX != 0 {
        areas.avail.load_u16(layout::used_event(SIZE)).unwrap();
        areas.used.load_u16(layout::avail_event(SIZE)).unwrap();
    }
}

/// The driver offers `count` chains one by one and kicks when told to; the device sleeps when it finds none.
fn kicks(memory: &Arc<GuestMemory>, features: u64, count: u16) {
    let (mut driver, mut device) = pair(memory, features, 65535);
    let kick = Arc::new(EventFd::new().unwrap());
    let bell = Arc::clone(&kick);
    let guest = loom::thread::spawn(move || {
        for _ in 0..count {
            driver.add(&[Segment { addr: 0xc00, len: 1, writable: false }]).unwrap();
            if driver.publish().unwrap() {
                bell.signal();
            }
        }
    });
    let mut chain = Chain::default();
    let mut seen = 0;
    while seen < count {
        while device.take(memory, &mut chain).unwrap() {
            device.suppress_kicks().unwrap();
            assert_eq!((chain.head, chain.readable_len), (seen, 1), "what was published is whole");
            seen += 1;
        }
        if seen < count && !device.enable_kicks().unwrap() {
            kick.wait();
            kick.drain();
        }
    }
    guest.join().unwrap();
}

/// The device uses `count` chains one by one and calls when told to, `EARLY`: all but the last while more are to come; the
/// driver sleeps when it finds none.
fn calls<const EARLY: bool>(memory: &Arc<GuestMemory>, features: u64, count: u16) {
    let (mut driver, mut device) = pair(memory, features, 65535);
    let memory = Arc::clone(memory);
    for _ in 0..count {
        driver.add(&[Segment { addr: 0xc00, len: 9, writable: true }]).unwrap();
    }
    driver.publish().unwrap();
    let call = Arc::new(EventFd::new().unwrap());
    let bell = Arc::clone(&call);
    let worker = loom::thread::spawn(move || {
        let mut chain = Chain::default();
        for number in 0..count {
            assert!(device.take(&memory, &mut chain).unwrap());
            device.push(chain.head, u32::from(number) + 1).unwrap();
            let early = EARLY && number + 1 < count;
            if if early { device.publish_early() } else { device.publish() }.unwrap() {
                bell.signal();
            }
        }
    });
    let mut seen = 0;
    while seen < count {
        while let Some(used) = driver.reap().unwrap() {
            driver.disable_calls().unwrap();
            assert_eq!(used, (seen, u32::from(seen) + 1), "what was published is whole");
            seen += 1;
        }
        if seen < count && !driver.enable_calls(1).unwrap() {
            call.wait();
            call.drain();
        }
    }
    worker.join().unwrap();
}

/// Tries every order of `test`; `without_fences` leaves those of a source file out.
fn try_all(test: fn(&Arc<GuestMemory>, u64, u16), features: u64, count: u16, without_fences: Option<&'static str>) {
    let memory = guest_memory();
    every_order(without_fences, move || test(&memory, features, count));
}

#[test]
fn loom_no_kick_is_lost() {
    for features in [0, feature::EVENT_IDX] {
        try_all(kicks, features, 2, None);
    }
}

#[test]
fn loom_no_call_is_lost() {
    for features in [0, feature::EVENT_IDX] {
        try_all(calls::<false>, features, 2, None);
    }
}

#[test]
fn loom_no_call_is_lost_of_those_that_are_early() {
    for features in [0, feature::EVENT_IDX] {
        try_all(calls::<true>, features, 2, None);
    }
}

#[test]
#[should_panic(expected = "deadlock")]
fn loom_finds_a_device_without_its_fence_asleep_beside_a_chain() {
    try_all(kicks, feature::EVENT_IDX, 1, Some("device.rs"));
}

#[test]
#[should_panic(expected = "deadlock")]
fn loom_finds_a_driver_without_its_fence_leaving_the_device_asleep() {
    try_all(kicks, feature::EVENT_IDX, 1, Some("driver.rs"));
}

#[test]
#[should_panic(expected = "deadlock")]
fn loom_finds_a_device_without_its_fence_leaving_the_driver_asleep() {
    try_all(calls::<false>, feature::EVENT_IDX, 2, Some("device.rs"));
}

#[test]
#[should_panic(expected = "deadlock")]
fn loom_finds_a_driver_without_its_fence_asleep_beside_an_answer() {
    try_all(calls::<false>, 0, 2, Some("driver.rs"));
}
