//! Any chain as a request to a memory disk. What comes of it is held against a short model of the disk: the
//! status, the used length, every byte of guest memory, and in the end every byte of the disk.
#![no_main]

use std::sync::{mpsc, Arc};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use vhostuser_core::blk::{BlkServe, BlkShared, Limits};
use vhostuser_core::disk::{Engine, Kind, Operation, Spec};
use vhostuser_core::ring::{feature, Areas, Chain, DeviceRing, DriverRing, RingSetup, Segment};
use vhostuser_core::worker::{Begun, Events, Queues, Serve, Waker};
use vhostuser_fuzz::{Guest, Input, REGIONS};

const SECTORS: u64 = 40;
const SIZE: u16 = 32;
const ID: &[u8] = b"a serial number that is too long";
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;
const REQUESTS: usize = 8;

/// What the specification says of one request (virtio: Block Device, Device Operation).
struct Expected {
    status: u8,
    /// What is put into the writable stream before the status byte.
    data: Vec<u8>,
    /// All of the room before the status byte is written.
    full: bool,
}

fn refused(status: u8) -> Expected {
    Expected { status, data: Vec::new(), full: false }
}

fn done() -> Expected {
    refused(0)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// The bytes of the disk from `sector` on, where they are whole blocks of it.
fn place(limits: &Limits, sector: u64, len: u64) -> Option<std::ops::Range<usize>> {
    let (start, block) = (u128::from(sector) * 512, u128::from(limits.block_size));
    let end = start + u128::from(len);
    let fits = end <= u128::from(limits.num_sectors) * 512 && start % block == 0 && end % block == 0;
    fits.then_some(start as usize..end as usize)
}

fn model(disk: &mut [u8], readable: &[u8], room: u64, limits: &Limits, features: u64) -> Expected {
    if readable.len() < 16 {
        return refused(1);
    }
    let (header, data) = readable.split_at(16);
    let legacy = features & feature::VERSION_1 == 0;
    let kind = if legacy { word(header, 0) & 0x7fff_ffff } else { word(header, 0) };
    let sector = long(header, 8);
    match kind {
        0 => match place(limits, sector, room) {
            Some(range) if data.is_empty() => Expected { status: 0, data: disk[range].to_vec(), full: true },
            _ => refused(1),
        },
        1 => match place(limits, sector, data.len() as u64) {
            Some(range) if room == 0 && !limits.read_only => {
                disk[range].copy_from_slice(data);
                done()
            }
            _ => refused(1),
        },
        4 => done(),
        5 if legacy => done(),
        8 if !data.is_empty() => refused(1),
        8 => {
            let mut id = ID[..20].to_vec();
            id.truncate(room.min(20) as usize);
            Expected { status: 0, full: id.len() as u64 == room, data: id }
        }
        11 if features & F_DISCARD == 0 || limits.max_discard_sectors == 0 => refused(2),
        13 if features & F_WRITE_ZEROES == 0 || limits.max_write_zeroes_sectors == 0 => refused(2),
        11 | 13 => clear(disk, data, room, limits, kind == 11),
        _ => refused(2),
    }
}

fn clear(disk: &mut [u8], data: &[u8], room: u64, limits: &Limits, discard: bool) -> Expected {
    let (most, num_ranges) = if discard {
        (limits.max_discard_sectors, limits.max_discard_seg)
    } else {
        (limits.max_write_zeroes_sectors, limits.max_write_zeroes_seg)
    };
    if limits.read_only || room > 0 || data.is_empty() || data.len() % 16 != 0 {
        return refused(1);
    }
    if data.len() / 16 > num_ranges as usize {
        return refused(2);
    }
    let mut ranges = Vec::new();
    for range in data.chunks(16) {
        let (sector, num_sectors, flags) = (long(range, 0), word(range, 8), word(range, 12));
        if flags & !1 != 0 || discard && flags != 0 {
            return refused(2);
        }
        match place(limits, sector, u64::from(num_sectors) * 512) {
            Some(range) if num_sectors <= most => ranges.push(range),
            _ => return refused(1),
        }
    }
    ranges.into_iter().for_each(|range| disk[range].fill(0));
    done()
}

/// A worker at rest and what wakes it: a `BlkServe` has to have one, and nothing here runs on a worker.
fn worker() -> (Queues, Waker) {
    let (sender, receiver) = mpsc::channel();
    let make = move |_, waker: Waker| {
        let _ = sender.send(waker.clone());
        let shared = Arc::new(BlkShared::new(limits(&mut Input::new(&[])), true, ID));
        Ok(BlkServe::new(shared, Spec::null().build()?, Arc::new(Events::new()?), waker))
    };
    let events = Arc::new(Events::new().expect("a descriptor"));
    let queues = Queues::new(1, 1, Duration::ZERO, events, make).expect("a worker");
    (queues, receiver.recv().expect("the worker's own"))
}

fn limits(input: &mut Input<'_>) -> Limits {
    Limits {
        num_sectors: SECTORS.min(u64::from(input.u8())),
        block_size: input.pick(&[512, 512, 1024, 4096]),
        read_only: input.u8() == 255,
        max_discard_sectors: input.pick(&[8, 0, 1, u32::MAX]),
        max_discard_seg: u32::from(input.u8() % 4),
        max_write_zeroes_sectors: input.pick(&[8, 0, 1, u32::MAX]),
        max_write_zeroes_seg: u32::from(input.u8() % 4),
    }
}

struct Play<'a> {
    guest: &'a Guest,
    driver: DriverRing,
    device: DeviceRing,
    serve: BlkServe,
    limits: Limits,
    features: u64,
    disk: Vec<u8>,
}

impl Play<'_> {
    fn request(&mut self, input: &mut Input<'_>) {
        let segments = self.segments(input);
        if self.driver.add(&segments).is_err() {
            return;
        }
        self.driver.publish().expect("the ring is mapped");
        let mut chain = Chain::default();
        assert!(self.device.take(&self.guest.memory, &mut chain).expect("an honest driver"));
        let last = segments.iter().rev().find(|segment| segment.writable && segment.len > 0);
        let mapped =
            |segment: &Segment| self.guest.memory.runs(segment.addr, u64::from(segment.len), &mut Vec::new()).is_ok();
        let answerable = last.is_some_and(mapped);
        let (before, readable) = (self.guest.snapshot(), self.guest.gather(chain.readable()));
        let places: Vec<_> =
            chain.writable.iter().flat_map(|run| (0..run.len()).map(|at| self.guest.place(run) + at)).collect();
        let room = chain.writable_len.saturating_sub(1);
        let expected = match chain.fault {
            None if answerable => model(&mut self.disk, &readable, room, &self.limits, self.features),
            _ => refused(1),
        };
        let written = self.serve(&mut chain);

        let mut after = before;
        if answerable {
            for (at, byte) in places.iter().zip(&expected.data) {
                after[*at] = *byte;
            }
            // The streams of a chain with a fault have holes; its last byte is there.
            after[*places.last().expect("the status byte is mapped")] = expected.status;
            let data = expected.data.len() as u64;
            assert_eq!(u64::from(written), if expected.full || data == room { data + 1 } else { data });
        } else {
            assert_eq!(written, 0, "no answer could be written");
        }
        assert!(self.guest.snapshot() == after, "{segments:?}: status {}", expected.status);
        self.device.push(chain.head, written).expect("the ring is mapped");
        self.device.publish().expect("the ring is mapped");
        assert_eq!(self.driver.reap(), Ok(Some((chain.head, written))));
    }

    /// One chain, and exactly one answer.
    fn serve(&mut self, chain: &mut Chain) -> u32 {
        let (head, mut finished) = (chain.head, Vec::new());
        self.serve.start_batch(0);
        let begun = self.serve.begin(0, self.features, chain, &self.guest.memory);
        self.serve.engine().kick().expect("memory");
        self.serve.finish_batch(&mut finished);
        assert_eq!(self.serve.pending(), 0);
        match begun {
            Begun::Done(outcome) => {
                assert!(finished.is_empty());
                outcome.written
            }
            Begun::Pending => {
                assert_eq!(finished.iter().map(|finished| finished.head).collect::<Vec<_>>(), [head]);
                finished[0].outcome.written
            }
        }
    }

    /// Buffers anywhere, and a request in those that the device reads.
    fn segments(&mut self, input: &mut Input<'_>) -> Vec<Segment> {
        let count = 1 + usize::from(input.u8() % 8);
        let mut content = self.content(input);
        let mut segments = Vec::new();
        for _ in 0..count {
            let writable = input.u8() % 2 == 1;
            let (mut addr, len) = (input.address(), input.length());
            // The ring is left alone here: what a driver does to it is the other target's matter.
            if (REGIONS[0].guest_addr..REGIONS[0].guest_addr + 0x1000).contains(&addr) || len > 4096 {
                addr = 0x2000 + addr % 0x1000;
            }
            segments.push(Segment { addr, len, writable });
            if !writable {
                let part: Vec<u8> = content.drain(..content.len().min(len as usize)).collect();
                let _ = self.guest.memory.write(addr, &part);
            }
        }
        segments
    }

    fn content(&self, input: &mut Input<'_>) -> Vec<u8> {
        let kind = match input.u8() {
            255 => input.u32(),
            kind => u32::from(kind % 16) | u32::from(kind / 128) << 31,
        };
        let sector = |input: &mut Input<'_>| match input.u8() {
            255 => input.u64(),
            sector => u64::from(sector % 48),
        };
        let mut content = [&kind.to_le_bytes()[..], &[0; 4], &sector(input).to_le_bytes()].concat();
        for _ in 0..input.u8() % 4 {
            let (first, count) = (sector(input), u32::from(input.u8()));
            let flags = input.pick(&[0, 1, 2, u32::MAX]);
            content.extend([&first.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat());
        }
        let count = usize::from(input.u8());
        content.extend(input.take(count));
        content
    }

    /// The disk holds what the model holds.
    fn compare(&mut self) {
        for (number, part) in self.disk.chunks(512).enumerate() {
            let mut runs = Vec::new();
            self.guest.memory.runs(REGIONS[3].guest_addr, 512, &mut runs).expect("it is mapped");
            let offset = number as u64 * 512;
            let read = Operation { token: 0, kind: Kind::Read, offset, len: 512, durable: false, runs, pin: None };
            let completion = self.serve.engine().submit(read).expect("memory answers at once");
            assert_eq!(completion.result, Ok(()));
            let mut found = [0; 512];
            self.guest.memory.read(REGIONS[3].guest_addr, &mut found).expect("it is mapped");
            assert!(found == part, "sector {number} differs");
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    thread_local!(static FIXED: (Guest, (Queues, Waker)) = (Guest::default(), worker()));
    FIXED.with(|(guest, (_, waker))| {
        guest.clear();
        let mut input = Input::new(bytes);
        let limits = limits(&mut input);
        let bits = u64::from(input.u8());
        let features = (bits & 1) << 32 | (bits & 2) << 12 | (bits & 4) << 12;
        let shared = Arc::new(BlkShared::new(limits, bits & 8 == 0, ID));
        let spec = Spec::memory(SECTORS * 512).expect("address space");
        let events = Arc::new(Events::new().expect("a descriptor"));
        let engine = spec.build().expect("an engine");
        let at = REGIONS[0].user_addr;
        let setup = RingSetup { size: SIZE, desc: at, avail: at + 0x400, used: at + 0x800, base: 65530, features: 0 };
        let areas = Areas::find(&setup, &guest.memory).expect("the ring is mapped");
        let driver = DriverRing::new(areas, 0, setup.base).expect("the ring is mapped");
        let device = DeviceRing::new(setup, &guest.memory).expect("the ring is mapped");
        let serve = BlkServe::new(shared, engine, events, waker.clone());
        let disk = vec![0; SECTORS as usize * 512];
        let mut play = Play { guest, driver, device, serve, limits, features, disk };
        for _ in 0..REQUESTS {
            if input.is_empty() {
                break;
            }
            play.request(&mut input);
        }
        play.compare();
    });
});
