//! A disk served in this process, with drivers of our own for its rings.
#![allow(dead_code, unreachable_pub, unsafe_code)] // each test program uses a part of it

use std::fs::File;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use vhostuser_core::blk::{BlkServe, BlkShared, ErrorPolicy, Limits};
use vhostuser_core::disk::Spec;
use vhostuser_core::memory::{GuestMemory, GuestSlice, Mapping, RegionSpec};
use vhostuser_core::ring::{feature, layout, Areas, DriverRing, RingSetup, Segment};
use vhostuser_core::sys::eventfd::{self, EventFd};
use vhostuser_core::worker::{Events, Notifiers, Queues};

pub const GUEST: u64 = 0x4000_0000;
pub const USER: u64 = 0x7f00_0000_0000;
pub const LEN: u64 = 64 << 20;
pub const RINGS: u64 = 0x10_0000;
pub const LIMIT: Duration = Duration::from_secs(20);
pub const SECTORS: u64 = 4096;
pub const FEATURES: u64 = feature::VERSION_1 | feature::INDIRECT_DESC | feature::EVENT_IDX | 1 << 13 | 1 << 14;

const LIMITS: Limits = Limits {
    num_sectors: SECTORS,
    block_size: 512,
    read_only: false,
    max_discard_sectors: 1024,
    max_discard_seg: 4,
    max_write_zeroes_sectors: 1024,
    max_write_zeroes_seg: 4,
};

pub fn memfd(len: u64) -> File {
    // SAFETY: a literal name; the returned descriptor is new.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"serve".as_ptr(), libc::MFD_CLOEXEC)) };
    file.set_len(len).unwrap();
    file
}

pub fn eventfd() -> OwnedFd {
    EventFd::new().unwrap().as_fd().try_clone_to_owned().unwrap()
}

/// A pipe that never waits: its read end and its write end.
pub fn pipe() -> (File, OwnedFd) {
    let mut ends = [0; 2];
    // SAFETY: a place for two descriptors.
    assert_eq!(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) }, 0);
    // SAFETY: both are new.
    unsafe { (File::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) }
}

/// One disk, its shared memory, and drivers for its rings.
pub struct Host {
    pub file: File,
    pub map: Arc<Mapping>,
    pub memory: Arc<GuestMemory>,
    pub queues: Queues,
    pub shared: Arc<BlkShared>,
}

pub struct Driver {
    pub ring: DriverRing,
    pub kick: OwnedFd,
    pub call: OwnedFd,
    pub err: OwnedFd,
    pub next: u64,
}

impl Host {
    pub fn new(spec: &Spec, num_queues: u16, num_workers: u16) -> Self {
        Self::with(spec, num_queues, num_workers, Duration::ZERO, |_| {})
    }

    pub fn with(spec: &Spec, num_queues: u16, num_workers: u16, poll: Duration, change: fn(&mut Limits)) -> Self {
        let mut limits = LIMITS;
        change(&mut limits);
        Self::over(spec, num_queues, num_workers, poll, BlkShared::new(limits, true, b"a serial number"))
    }

    /// Whose requests obey a policy when storage fails them.
    pub fn keeping(spec: &Spec, num_queues: u16, num_workers: u16, policy: ErrorPolicy) -> Self {
        let shared = BlkShared::new(LIMITS, true, b"a serial number").with_policy(policy);
        Self::over(spec, num_queues, num_workers, Duration::ZERO, shared)
    }

    fn over(spec: &Spec, num_queues: u16, num_workers: u16, poll: Duration, shared: BlkShared) -> Self {
        let shared = Arc::new(shared);
        let events = Arc::new(Events::new().unwrap());
        let make = {
            let (spec, shared, events) = (spec.clone(), Arc::clone(&shared), Arc::clone(&events));
            move |_, waker| Ok(BlkServe::new(Arc::clone(&shared), spec.build()?, Arc::clone(&events), waker))
        };
        let mut queues = Queues::new(num_queues, num_workers, poll, events, make).unwrap();
        let file = memfd(LEN);
        let map = Mapping::of_file(file.as_fd(), 0, LEN).unwrap();
        let memory = Arc::new(GuestMemory::new([(region(), file.as_fd())]).unwrap());
        queues.set_memory(Arc::clone(&memory), LIMIT).unwrap();
        Self { file, map, memory, queues, shared }
    }

    pub fn setup(&self, index: u16, size: u16, features: u64, base: u16) -> RingSetup {
        let at = USER + RINGS * u64::from(index);
        RingSetup { size, desc: at, avail: at + 0x8_0000, used: at + 0xa_0000, base, features }
    }

    pub fn driver(&mut self, index: u16, size: u16, features: u64) -> Driver {
        let driver = self.unstarted(index, size, features);
        self.start(index, size, features, 0, &driver);
        driver
    }

    pub fn unstarted(&self, index: u16, size: u16, features: u64) -> Driver {
        let at = (RINGS * u64::from(index)) as usize;
        let slice = |offset, len| GuestSlice::new(Arc::clone(&self.map), at + offset, len).unwrap();
        let areas = Areas {
            desc: slice(0, layout::desc_len(size)),
            avail: slice(0x8_0000, layout::avail_len(size, true)),
            used: slice(0xa_0000, layout::used_len(size, true)),
            size,
        };
        let ring = DriverRing::new(areas, features, 0).unwrap();
        let next = GUEST + (16 << 20) + u64::from(index) * (8 << 20);
        Driver { ring, kick: eventfd(), call: eventfd(), err: eventfd(), next }
    }

    pub fn start(&mut self, index: u16, size: u16, features: u64, base: u16, driver: &Driver) {
        let setup = self.setup(index, size, features, base);
        let notifiers = Notifiers {
            kick: Some(driver.kick.try_clone().unwrap()),
            call: Some(driver.call.try_clone().unwrap()),
            err: Some(driver.err.try_clone().unwrap()),
        };
        self.queues.start(index, setup, true, notifiers, None).unwrap();
    }

    pub fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write(at, bytes).unwrap();
    }

    pub fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(at, &mut bytes).unwrap();
        bytes
    }
}

pub fn region() -> RegionSpec {
    RegionSpec { guest_addr: GUEST, size: LEN, user_addr: USER, mmap_offset: 0 }
}

pub fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

pub fn range(sector: u64, num_sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &num_sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

impl Driver {
    pub fn room(&mut self, len: usize) -> u64 {
        let at = self.next;
        self.next += (len as u64).next_multiple_of(512);
        at
    }

    pub fn kick(&self) {
        eventfd::signal(self.kick.as_fd()).unwrap();
    }

    /// Publishes and waits for the next used chain.
    pub fn run(&mut self) -> (u16, u32) {
        if self.ring.publish().unwrap() {
            self.kick();
        }
        self.reap()
    }

    pub fn reap(&mut self) -> (u16, u32) {
        loop {
            if let Some(used) = self.ring.reap().unwrap() {
                return used;
            }
            if !self.ring.enable_calls(1).unwrap() {
                assert!(eventfd::poll_readable(self.call.as_fd(), Some(LIMIT)).unwrap(), "no call in time");
                eventfd::drain(self.call.as_fd()).unwrap();
            }
        }
    }

    /// Makes a request of readable bytes and room to write available; returns where its answer goes.
    pub fn send(&mut self, host: &Host, readable: &[u8], room: usize) -> u64 {
        let (from, to) = (self.room(readable.len()), self.room(room + 1));
        host.put(from, readable);
        host.put(to + room as u64, &[0xff]);
        let segments = [
            Segment { addr: from, len: readable.len() as u32, writable: false },
            Segment { addr: to, len: room as u32 + 1, writable: true },
        ];
        self.ring.add(&segments).unwrap();
        if self.ring.publish().unwrap() {
            self.kick();
        }
        to
    }

    /// One request; returns the status, what was written and the used length.
    pub fn request(&mut self, host: &Host, readable: &[u8], room: usize) -> (u8, Vec<u8>, u32) {
        let to = self.send(host, readable, room);
        let (_, written) = self.reap();
        let bytes = host.get(to, room + 1);
        (bytes[room], bytes[..room].to_vec(), written)
    }

    pub fn write(&mut self, host: &Host, sector: u64, data: &[u8]) -> u8 {
        self.request(host, &[&header(1, sector)[..], data].concat(), 0).0
    }

    pub fn read(&mut self, host: &Host, sector: u64, len: usize) -> (u8, Vec<u8>) {
        let (status, data, _) = self.request(host, &header(0, sector), len);
        (status, data)
    }
}
