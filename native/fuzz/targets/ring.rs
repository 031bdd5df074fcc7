//! A hostile driver: any bytes in the ring, its tables and its indices, while the device half takes and gives back.
#![no_main]

use std::collections::HashMap;

use libfuzzer_sys::fuzz_target;
use vhostuser_core::memory::IoVec;
use vhostuser_core::ring::layout::{self, Descriptor};
use vhostuser_core::ring::{feature, Broken, Chain, DeviceRing, Fault, RingSetup, Status};
use vhostuser_fuzz::{Guest, Input, REGIONS};

const DESC: u64 = 0;
const AVAIL: u64 = 0x1002;
const USED: u64 = 0x1404;

struct Play<'a> {
    guest: &'a Guest,
    input: Input<'a>,
    ring: DeviceRing,
    size: u16,
    /// Chains in flight, by head.
    taken: HashMap<u16, Chain>,
    pushed: u16,
}

fn bytes_of(runs: &[IoVec]) -> u64 {
    runs.iter().map(|run| run.len() as u64).sum()
}

impl Play<'_> {
    fn store(&self, at: u64, bytes: &[u8]) {
        // What does not fit is not stored: that is the driver's business.
        let _ = self.guest.memory.write(at, bytes);
    }

    fn ring_word(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        self.guest.memory.read(REGIONS[0].guest_addr + at, &mut bytes).expect("the ring is mapped");
        u16::from_le_bytes(bytes)
    }

    fn descriptor(&mut self) -> [u8; 16] {
        let (addr, len) = (self.input.address(), self.input.length());
        let flags = match self.input.u8() {
            255 => self.input.u16(),
            flags => u16::from(flags & 7),
        };
        let next = u16::from(self.input.u8());
        Descriptor { addr, len, flags, next }.to_bytes()
    }

    fn step(&mut self) {
        let ring = REGIONS[0].guest_addr;
        match self.input.u8() % 16 {
            0 => {
                let (at, count) = (self.input.address(), usize::from(self.input.u8()));
                let bytes = self.input.take(count);
                self.store(at, bytes);
            }
            1..=3 => {
                let at = u64::from(self.input.u8() % 64) * 16;
                let bytes = self.descriptor();
                self.store(ring + DESC + at, &bytes);
            }
            4 => {
                let at = self.input.address();
                for place in 0..u64::from(self.input.u8() % 8) {
                    let bytes = self.descriptor();
                    self.store(at.wrapping_add(place * 16), &bytes);
                }
            }
            5 => {
                let slot = u64::from(self.input.u8() % 64);
                let head = u16::from(self.input.u8());
                self.store(ring + AVAIL + 4 + 2 * slot, &head.to_le_bytes());
            }
            6 => {
                let more = u16::from(self.input.u8() % 8);
                let idx = self.ring_word(AVAIL + 2).wrapping_add(more);
                self.store(ring + AVAIL + 2, &idx.to_le_bytes());
            }
            7 => {
                let area = self.input.pick(&[AVAIL, USED]);
                let (at, value) = (u64::from(self.input.u8()), self.input.u16());
                self.store(ring + area + 2 * at, &value.to_le_bytes());
            }
            8..=10 => self.take(),
            11 | 12 => self.push(),
            13 => {
                let before = self.ring_word(USED + 2);
                let called = self.ring.publish();
                assert!(matches!(called, Ok(_) | Err(Broken::AvailJump { .. })), "{called:?}");
                assert!(called == Ok(false) || self.pushed > 0, "a call for nothing");
                let now = self.ring_word(USED + 2);
                assert!(self.pushed > 0 || now == before, "an index that moved by itself");
                assert!(self.pushed == 0 || now == self.ring.published());
                self.pushed = 0;
            }
            14 => self.ring.suppress_kicks().expect("the ring is mapped"),
            _ => {
                let outcome = self.ring.enable_kicks();
                assert!(matches!(outcome, Ok(_) | Err(Broken::AvailJump { .. })), "{outcome:?}");
            }
        }
    }

    fn take(&mut self) {
        let (base, in_flight) = (self.ring.base(), self.ring.in_flight());
        let mut chain = Chain::default();
        match self.ring.take(&self.guest.memory, &mut chain) {
            Ok(true) => {
                assert_eq!((self.ring.base(), self.ring.in_flight()), (base.wrapping_add(1), in_flight + 1));
                assert!(chain.head < self.size);
                self.check(&mut chain);
                assert!(self.taken.insert(chain.head, chain).is_none(), "a head twice");
                assert!((0..4).any(|_| self.ring.upcoming(&self.guest.memory).is_none()), "no end of what comes");
            }
            Ok(false) | Err(_) => assert_eq!((self.ring.base(), self.ring.in_flight()), (base, in_flight)),
        }
    }

    fn check(&mut self, chain: &mut Chain) {
        for run in chain.readable().iter().chain(&chain.writable) {
            assert!(!run.is_empty());
            self.guest.place(run);
        }
        let found = (bytes_of(chain.readable()), bytes_of(&chain.writable));
        match chain.fault {
            None => assert_eq!(found, (chain.readable_len, chain.writable_len)),
            Some(_) => assert!(found.0 <= chain.readable_len && found.1 <= chain.writable_len),
        }
        assert!(chain.fault == Some(Fault::Length) || chain.readable_len + chain.writable_len <= 1 << 32);
        // Only to chains without a fault a device looks closer.
        if chain.fault.is_some() {
            return;
        }
        let before = (chain.writable_len, chain.writable.last().copied());
        match chain.take_status() {
            Status::None => assert_eq!(before.0, 0),
            Status::Unmapped => panic!("a chain without a fault"),
            Status::At(byte) => {
                let last = before.1.expect("a byte comes from a run");
                assert_eq!((byte.len(), byte.as_ptr() as usize), (1, last.as_ptr() as usize + last.len() - 1));
                assert_eq!((chain.writable_len, bytes_of(&chain.writable)), (before.0 - 1, before.0 - 1));
            }
        }
        if chain.readable_len < 1 << 16 {
            let whole = self.guest.gather(chain.readable());
            let header = chain.take_bytes::<16>();
            assert_eq!(header.as_ref().map(|header| &header[..]), whole.get(..16));
            let rest = self.guest.gather(chain.readable());
            assert_eq!(rest, whole[if header.is_some() { 16 } else { 0 }..]);
            assert_eq!(chain.readable_len, rest.len() as u64);
        }
    }

    fn push(&mut self) {
        let mut heads: Vec<_> = self.taken.keys().copied().collect();
        heads.sort_unstable();
        if heads.is_empty() {
            return;
        }
        let head = heads[usize::from(self.input.u8()) % heads.len()];
        let written = self.input.u32();
        self.taken.remove(&head);
        let in_flight = self.ring.in_flight();
        self.ring.push(head, written).expect("the ring is mapped");
        assert_eq!(self.ring.in_flight(), in_flight - 1);
        self.pushed += 1;
    }
}

fuzz_target!(|bytes: &[u8]| {
    thread_local!(static GUEST: Guest = Guest::default());
    GUEST.with(|guest| {
        guest.clear();
        let mut input = Input::new(bytes);
        let size = 1 << (input.u8() % 7);
        let bits = input.u8();
        let features = [feature::INDIRECT_DESC, feature::EVENT_IDX, feature::NOTIFY_ON_EMPTY, feature::VERSION_1];
        let features = (0..4).filter(|bit| bits & 1 << bit != 0).map(|bit| features[bit]).sum();
        let base = input.pick(&[0, 0, 65535, 65500, 7]);
        let start = |index: u16| {
            let at = REGIONS[0].guest_addr;
            guest.memory.write(at + AVAIL + 2, &index.to_le_bytes()).expect("the ring is mapped");
            guest.memory.write(at + USED + 2, &index.to_le_bytes()).expect("the ring is mapped");
        };
        start(base);
        let user = REGIONS[0].user_addr;
        let setup = RingSetup { size, desc: user + DESC, avail: user + AVAIL, used: user + USED, base, features };
        let ring = DeviceRing::new(setup, &guest.memory).expect("the ring is mapped and aligned");
        assert!(layout::used_len(size, true) as u64 <= REGIONS[0].size - USED);
        let mut play = Play { guest, input, ring, size, taken: HashMap::new(), pushed: 0 };
        while !play.input.is_empty() {
            play.step();
            assert_eq!(usize::from(play.ring.in_flight()), play.taken.len());
        }
        // Whatever happened: what was taken can be given back, and then the ring is at rest.
        while !play.taken.is_empty() {
            play.push();
        }
        assert_eq!(play.ring.in_flight(), 0);
    });
});
