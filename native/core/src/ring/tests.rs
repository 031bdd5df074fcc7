//! The two halves against each other, and the device half against hostile drivers.

use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use super::layout::{Descriptor, F_INDIRECT, F_NEXT, F_WRITE};
use super::*;
use crate::memory::{GuestMemory, RegionSpec};

const BASE: u64 = 0x10_0000;
const USER: u64 = 0x7000_0000;
const LEN: u64 = 0x40_0000;

#[allow(unsafe_code)]
fn memory() -> GuestMemory {
    // SAFETY: a literal name; the returned descriptor is new.
    let fd = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"ring".as_ptr(), libc::MFD_CLOEXEC)) };
    std::fs::File::from(fd.try_clone().unwrap()).set_len(LEN).unwrap();
    let spec = RegionSpec { guest_addr: BASE, size: LEN, user_addr: USER, mmap_offset: 0 };
    GuestMemory::new([(spec, fd.as_fd())]).unwrap()
}

fn setup(size: u16, features: u64, base: u16) -> RingSetup {
    RingSetup { size, desc: USER, avail: USER + 0x10_0000, used: USER + 0x20_0000, base, features }
}

fn pair(memory: &GuestMemory, size: u16, features: u64, base: u16) -> (DriverRing, DeviceRing) {
    let setup = setup(size, features, base);
    let driver = DriverRing::new(Areas::find(&setup, memory).unwrap(), features, base).unwrap();
    (driver, DeviceRing::new(setup, memory).unwrap())
}

fn segment(addr: u64, len: u32, writable: bool) -> Segment {
    Segment { addr, len, writable }
}

#[test]
fn chains_go_over_and_come_back_across_the_wrap_of_the_index() {
    let memory = memory();
    for size in [1, 2, 8, 256] {
        let (mut driver, mut device) = pair(&memory, size, feature::EVENT_IDX, 65000);
        let mut chain = Chain::default();
        for round in 0..70_000u32 {
            let data = BASE + 0x30_0000 + u64::from(round % 512) * 8;
            memory.write(data, &round.to_le_bytes()).unwrap();
            let head = driver.add(&[segment(data, 4, false)]).unwrap();
            driver.publish().unwrap();
            assert!(device.take(&memory, &mut chain).unwrap());
            assert_eq!((chain.head, chain.readable_len, chain.writable_len), (head, 4, 0));
            assert_eq!(chain.take_bytes::<4>().unwrap(), round.to_le_bytes());
            device.push(head, 0).unwrap();
            device.publish().unwrap();
            assert_eq!(driver.reap().unwrap(), Some((head, 0)));
            assert_eq!(driver.reap().unwrap(), None);
        }
    }
}

#[test]
fn streams_ignore_where_descriptors_end() {
    let memory = memory();
    let (mut driver, mut device) = pair(&memory, 16, 0, 0);
    let data = BASE + 0x30_0000;
    memory.write(data, b"0123456789abcdefXY").unwrap();
    driver
        .add(&[
            segment(data, 3, false),
            segment(data + 3, 0, false),
            segment(data + 3, 15, false),
            segment(data + 0x100, 5, true),
        ])
        .unwrap();
    driver.publish().unwrap();
    let mut chain = Chain::default();
    assert!(device.take(&memory, &mut chain).unwrap());
    assert_eq!(&chain.take_bytes::<16>().unwrap(), b"0123456789abcdef");
    assert_eq!((chain.readable_len, chain.readable().len()), (2, 1));
    assert!(matches!(chain.take_status(), Status::At(_)));
    assert_eq!((chain.writable_len, chain.fault), (4, None));
}

#[test]
fn an_indirect_table_may_have_any_alignment_and_follow_direct_descriptors() {
    let memory = memory();
    let (mut driver, mut device) = pair(&memory, 8, feature::INDIRECT_DESC, 0);
    let table = BASE + 0x30_0003;
    let entries = [
        Descriptor { addr: BASE + 0x38_0000, len: 100, flags: F_NEXT, next: 2 },
        Descriptor { addr: 0, len: 1, flags: 0, next: 0 },
        Descriptor { addr: BASE + 0x38_1000, len: 200, flags: F_WRITE, next: 0 },
    ];
    for (at, entry) in entries.iter().enumerate() {
        memory.write(table + 16 * at as u64, &entry.to_bytes()).unwrap();
    }
    let head = driver.add(&[segment(BASE + 0x38_2000, 7, false), segment(0, 0, false)]).unwrap();
    let first = driver.areas().descriptor(head).unwrap();
    driver
        .areas()
        .set_descriptor(first.next, Descriptor { addr: table, len: 48, flags: F_INDIRECT | F_WRITE, next: 0 })
        .unwrap();
    driver.publish().unwrap();
    let mut chain = Chain::default();
    assert!(device.take(&memory, &mut chain).unwrap());
    assert_eq!((chain.readable_len, chain.writable_len, chain.fault), (107, 200, None));
    // Without the feature the same chain breaks the ring.
    let (mut driver, mut device) = pair(&memory, 8, 0, 0);
    driver.add(&[segment(0, 1, false)]).unwrap();
    driver.areas().set_descriptor(0, Descriptor { addr: table, len: 48, flags: F_INDIRECT, next: 0 }).unwrap();
    driver.publish().unwrap();
    assert_eq!(device.take(&memory, &mut chain), Err(Broken::Indirect { head: 0 }));
}

#[test]
fn what_cannot_be_a_chain_breaks_the_ring() {
    let memory = memory();
    let table = BASE + 0x30_0000;
    let direct = |flags, next| Descriptor { addr: BASE, len: 16, flags, next };
    let nested = Descriptor { addr: table, len: 16, flags: F_INDIRECT, next: 0 };
    let looping = Descriptor { addr: BASE, len: 16, flags: F_NEXT, next: 0 };
    let far = Descriptor { addr: BASE, len: 16, flags: F_NEXT, next: 1 };
    let indirect = |len| Descriptor { addr: table, len, flags: F_INDIRECT, next: 0 };
    let cases = [
        (direct(F_NEXT, 0), None, Broken::Loop { head: 0 }),
        (direct(F_NEXT, 8), None, Broken::Next { head: 0, next: 8 }),
        (direct(F_INDIRECT | F_NEXT, 1), None, Broken::Indirect { head: 0 }),
        (indirect(0), None, Broken::IndirectLength { head: 0, len: 0 }),
        (indirect(17), None, Broken::IndirectLength { head: 0, len: 17 }),
        (indirect(16 * 4097), None, Broken::IndirectLength { head: 0, len: 16 * 4097 }),
        (indirect(16), Some(nested), Broken::Indirect { head: 0 }),
        (indirect(16), Some(looping), Broken::Loop { head: 0 }),
        (indirect(16), Some(far), Broken::Next { head: 0, next: 1 }),
    ];
    for (descriptor, entry, broken) in cases {
        let (mut driver, mut device) = pair(&memory, 8, feature::INDIRECT_DESC, 0);
        if let Some(entry) = entry {
            memory.write(table, &entry.to_bytes()).unwrap();
        }
        driver.add(&[segment(BASE, 1, false)]).unwrap();
        driver.areas().set_descriptor(0, descriptor).unwrap();
        driver.publish().unwrap();
        assert_eq!(device.take(&memory, &mut Chain::default()), Err(broken), "{descriptor:?}");
    }
}

#[test]
fn an_index_that_jumps_a_head_beyond_the_table_and_a_head_twice_break_the_ring() {
    let memory = memory();
    let mut chain = Chain::default();
    let (driver, mut device) = pair(&memory, 8, 0, 5);
    driver.areas().avail.store_u16(layout::IDX, 14).unwrap();
    assert_eq!(device.take(&memory, &mut chain), Err(Broken::AvailJump { index: 5, seen: 14 }));
    driver.areas().avail.store_u16(layout::IDX, 4).unwrap();
    assert_eq!(device.take(&memory, &mut chain), Err(Broken::AvailJump { index: 5, seen: 4 }));

    let (mut driver, mut device) = pair(&memory, 8, 0, 0);
    driver.add(&[segment(BASE, 1, false)]).unwrap();
    driver.add(&[segment(BASE, 1, false)]).unwrap();
    driver.areas().avail.store_u16(layout::avail_entry(1), 0).unwrap();
    driver.publish().unwrap();
    assert!(device.take(&memory, &mut chain).unwrap());
    assert_eq!(device.take(&memory, &mut chain), Err(Broken::HeadTwice { head: 0 }));
    driver.areas().avail.store_u16(layout::avail_entry(1), 8).unwrap();
    assert_eq!(device.take(&memory, &mut chain), Err(Broken::Head { head: 8 }));
}

#[test]
fn what_was_not_decided_for_a_broken_ring_is_not_decided_later() {
    for early in [false, true] {
        let memory = memory();
        let mut chain = Chain::default();
        let (mut driver, mut device) = pair(&memory, 8, feature::NOTIFY_ON_EMPTY, 0);
        driver.add(&[segment(BASE, 1, false)]).unwrap();
        driver.publish().unwrap();
        assert!(device.take(&memory, &mut chain).unwrap());
        device.push(chain.head, 0).unwrap();
        driver.areas().avail.store_u16(layout::IDX, 100).unwrap();
        let outcome = if early { device.publish_early() } else { device.publish() };
        assert_eq!(outcome, Err(Broken::AvailJump { index: 1, seen: 100 }));
        assert_eq!(device.publish(), Ok(false), "a call for nothing");
    }
}

#[test]
fn a_chain_with_a_bad_buffer_still_says_where_its_status_goes() {
    let memory = memory();
    let good = segment(BASE + 0x30_0000, 16, true);
    let outside = BASE + LEN - 8;
    let cases = [
        (vec![segment(outside, 16, false), good], Some(Fault::Unmapped), true),
        (vec![segment(u64::MAX - 3, 16, false), good], Some(Fault::Unmapped), true),
        (vec![good, segment(BASE, 16, false)], Some(Fault::Order), true),
        (vec![good, segment(BASE, 0, false)], None, true),
        (vec![segment(BASE, 16, false), good, segment(outside, 16, true)], Some(Fault::Unmapped), false),
        (vec![segment(BASE, u32::MAX, false), good], Some(Fault::Length), true),
        (vec![segment(BASE, 16, false)], None, false),
    ];
    for (segments, fault, answerable) in cases {
        let (mut driver, mut device) = pair(&memory, 8, 0, 0);
        driver.add(&segments).unwrap();
        driver.publish().unwrap();
        let mut chain = Chain::default();
        assert!(device.take(&memory, &mut chain).unwrap());
        assert_eq!(chain.fault, fault, "{segments:?}");
        assert_eq!(matches!(chain.take_status(), Status::At(_)), answerable, "{segments:?}");
    }
}

#[test]
fn an_indirect_table_outside_of_memory_is_a_fault_of_its_chain_only() {
    let memory = memory();
    let (mut driver, mut device) = pair(&memory, 8, feature::INDIRECT_DESC, 0);
    driver.add(&[segment(BASE, 1, false)]).unwrap();
    driver.areas().set_descriptor(0, Descriptor { addr: 0, len: 32, flags: F_INDIRECT, next: 0 }).unwrap();
    driver.publish().unwrap();
    let mut chain = Chain::default();
    assert!(device.take(&memory, &mut chain).unwrap());
    assert_eq!(chain.fault, Some(Fault::Unmapped));
    assert!(matches!(chain.take_status(), Status::Unmapped));
}

#[test]
fn notifications_follow_the_drivers_wish() {
    let memory = memory();
    let mut chain = Chain::default();
    let mut one = |driver: &mut DriverRing, device: &mut DeviceRing| {
        driver.add(&[segment(BASE, 1, false)]).unwrap();
        driver.publish().unwrap();
        assert!(device.take(&memory, &mut chain).unwrap());
        device.push(chain.head, 0).unwrap();
        device.publish().unwrap()
    };
    let (mut driver, mut device) = pair(&memory, 8, 0, 0);
    assert!(one(&mut driver, &mut device));
    driver.disable_calls().unwrap();
    assert!(!one(&mut driver, &mut device));
    assert!(driver.enable_calls(1).unwrap(), "two are used and not reaped");

    let (mut driver, mut device) = pair(&memory, 8, feature::EVENT_IDX, 0);
    assert!(one(&mut driver, &mut device), "the first decision after a start notifies in any case");
    driver.reap().unwrap();
    driver.disable_calls().unwrap();
    assert!(!one(&mut driver, &mut device));
    driver.reap().unwrap();
    assert!(!driver.enable_calls(2).unwrap());
    assert!(!one(&mut driver, &mut device));
    assert!(one(&mut driver, &mut device));

    let (mut driver, mut device) = pair(&memory, 8, feature::NOTIFY_ON_EMPTY, 0);
    driver.disable_calls().unwrap();
    assert!(one(&mut driver, &mut device));
}

#[test]
fn kicks_follow_the_devices_wish() {
    let memory = memory();
    for features in [0, feature::EVENT_IDX] {
        let (mut driver, mut device) = pair(&memory, 8, features, 65535);
        assert!(!device.enable_kicks().unwrap());
        driver.add(&[segment(BASE, 1, false)]).unwrap();
        assert!(driver.publish().unwrap());
        assert!(!driver.publish().unwrap(), "nothing new to publish");
        let mut chain = Chain::default();
        assert!(device.take(&memory, &mut chain).unwrap());
        device.suppress_kicks().unwrap();
        driver.add(&[segment(BASE, 1, false)]).unwrap();
        assert!(!driver.publish().unwrap());
        assert!(device.enable_kicks().unwrap(), "it must be seen without a kick");
    }
}

#[test]
fn a_device_that_lies_is_found_out() {
    let memory = memory();
    let used = |driver: &DriverRing, id: u32, len: u32, idx: u16| {
        driver.areas().used.store_u32(layout::used_entry(0), id).unwrap();
        driver.areas().used.store_u32(layout::used_entry(0) + 4, len).unwrap();
        driver.areas().used.store_u16(layout::IDX, idx).unwrap();
    };
    let fresh = || {
        let (mut driver, device) = pair(&memory, 8, 0, 0);
        driver.add(&[segment(BASE, 1, false), segment(BASE, 10, true)]).unwrap();
        driver.publish().unwrap();
        (driver, device)
    };
    let (mut driver, _) = fresh();
    used(&driver, 1, 0, 1);
    assert_eq!(driver.reap(), Err(DriverError::UsedId(1)));
    used(&driver, 70000, 0, 1);
    assert_eq!(driver.reap(), Err(DriverError::UsedId(70000)));
    used(&driver, 0, 11, 1);
    assert_eq!(driver.reap(), Err(DriverError::UsedLength { head: 0, written: 11, room: 10 }));
    used(&driver, 0, 10, 2);
    assert_eq!(driver.reap(), Err(DriverError::UsedJump { seen: 2, reaped: 0, outstanding: 1 }));
    used(&driver, 0, 10, 1);
    assert_eq!(driver.reap(), Ok(Some((0, 10))));
    used(&driver, 0, 10, 2);
    assert!(driver.reap().is_err(), "nothing is outstanding");
    let (mut driver, _) = fresh();
    let unpublished = driver.add(&[segment(BASE, 1, false)]).unwrap();
    used(&driver, u32::from(unpublished), 0, 1);
    assert_eq!(driver.reap(), Err(DriverError::UsedId(u32::from(unpublished))));
}

#[test]
fn a_ring_that_cannot_be_is_not_started() {
    let memory = memory();
    let good = setup(8, 0, 0);
    let bad = [
        RingSetup { size: 0, ..good },
        RingSetup { size: 3, ..good },
        RingSetup { size: 65535, ..good },
        RingSetup { desc: USER + 8, ..good },
        RingSetup { avail: USER + 1, ..good },
        RingSetup { used: USER + 2, ..good },
        RingSetup { desc: USER + LEN - 16, ..good },
        RingSetup { used: USER - 4, ..good },
        RingSetup { avail: u64::MAX - 1, ..good },
    ];
    assert!(DeviceRing::new(good, &memory).is_ok());
    for setup in bad {
        assert!(DeviceRing::new(setup, &memory).is_err(), "{setup:?}");
    }
}

#[test]
fn what_comes_is_told_once_each_and_before_it_is_taken() {
    let memory = memory();
    for features in [0, feature::INDIRECT_DESC] {
        let (mut driver, mut device) = pair(&memory, 16, features, 65534);
        let mut chain = Chain::default();
        for number in 0..6u64 {
            let at = BASE + 0x30_0000 + 64 * number;
            memory.write(at, &[number.to_le_bytes(), (100 + number).to_le_bytes()].concat()).unwrap();
            let segments = [segment(at, 16, false), segment(at + 16, 1, true)];
            let head = driver.add(&segments).unwrap();
            if features != 0 {
                let table = BASE + 0x38_0000 + 64 * number;
                let first = driver.areas().descriptor(head).unwrap();
                let second = driver.areas().descriptor(first.next).unwrap();
                let second = Descriptor { next: 0, ..second };
                memory.write(table, &[Descriptor { next: 1, ..first }.to_bytes(), second.to_bytes()].concat()).unwrap();
                let whole = Descriptor { addr: table, len: 32, flags: F_INDIRECT, next: 0 };
                driver.areas().set_descriptor(head, whole).unwrap();
            }
        }
        driver.publish().unwrap();
        let mut told = Vec::new();
        for taken in 0..6 {
            assert!(device.take(&memory, &mut chain).unwrap());
            told.extend(std::iter::from_fn(|| device.upcoming(&memory)));
            assert_eq!(told.len(), [2, 3, 4, 5, 5, 5][taken], "chain {taken}");
        }
        assert_eq!(told, (1..6).map(|number| [number, 100 + number]).collect::<Vec<_>>());
    }
}

#[test]
fn what_comes_may_be_anything() {
    let memory = memory();
    let (mut driver, mut device) = pair(&memory, 8, feature::INDIRECT_DESC, 0);
    let mut chain = Chain::default();
    let heads: Vec<_> = (0..8).map(|_| driver.add(&[segment(BASE + 0x30_0000, 16, false)]).unwrap()).collect();
    let bad = [
        Descriptor { addr: 0, len: 32, flags: F_INDIRECT, next: 0 },
        Descriptor { addr: u64::MAX, len: u32::MAX, flags: F_INDIRECT, next: 0 },
        Descriptor { addr: BASE + LEN - 8, len: 8, flags: F_INDIRECT, next: 0 },
        Descriptor { addr: BASE + LEN - 8, len: 8, flags: 0, next: 0 },
        Descriptor { addr: u64::MAX - 15, len: 16, flags: 0, next: 0 },
    ];
    for (head, descriptor) in heads[2..].iter().zip(bad) {
        driver.areas().set_descriptor(*head, descriptor).unwrap();
    }
    driver.areas().avail.store_u16(layout::avail_entry(7), u16::MAX).unwrap();
    driver.publish().unwrap();
    for _ in 0..2 {
        assert!(device.take(&memory, &mut chain).unwrap());
        assert_eq!(device.upcoming(&memory), None);
    }
}
