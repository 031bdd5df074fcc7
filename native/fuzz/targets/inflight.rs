//! A device that takes over what a predecessor, or somebody who means harm, left in an in-flight region and in a ring.
//!
//! What the region says is held against a short model of its words: what is replayed and in which order, what is
//! refused, and which marks stand after each step. A device dies at any time here, also in the middle of a batch.
#![no_main]

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use vhostuser_core::memory::inflight::{split, Format, InflightRegion};
use vhostuser_core::memory::{GuestSlice, IoVec, Mapping};
use vhostuser_core::ring::layout::Descriptor;
use vhostuser_core::ring::{feature, Broken, Chain, DeviceRing, RingSetup};
use vhostuser_fuzz::{Guest, Input, REGIONS};

const DESC: u64 = 0;
const AVAIL: u64 = 0x1002;
const USED: u64 = 0x1404;
const QUEUES: u16 = 3;
const LARGEST: u16 = 64;
const MAX_STEPS: usize = 120;
const CANARY: u8 = 0xee;

/// The part of our queue, as plain bytes.
#[derive(Clone, PartialEq, Eq)]
struct Part(Vec<u8>);

impl Part {
    fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.0[at], self.0[at + 1]])
    }

    fn set_word(&mut self, at: usize, value: u16) {
        self.0[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    fn marked(&self, head: u16) -> bool {
        self.0[split::desc(head) + split::INFLIGHT] != 0
    }

    fn counter(&self, head: u16) -> u64 {
        let at = split::desc(head) + split::COUNTER;
        u64::from_le_bytes(self.0[at..at + 8].try_into().expect("eight bytes"))
    }

    fn marks(&self, size: u16) -> Vec<u16> {
        (0..size).filter(|head| self.marked(*head)).collect()
    }

    /// What becomes of the part when a ring of `size` starts on it: the heads to replay, and the part afterwards.
    /// `None`: it is refused.
    fn taken_over(&self, size: u16, used: u16, available: u16) -> Option<(Option<Vec<u16>>, Self)> {
        let mut after = self.clone();
        match self.word(split::VERSION) {
            0 => {
                (0..size).for_each(|head| after.0[split::desc(head) + split::INFLIGHT] = 0);
                after.set_word(split::LAST_BATCH_HEAD, 0);
                after.set_word(split::DESC_NUM, size);
                after.set_word(split::USED_IDX, used);
                after.set_word(split::VERSION, 1);
                Some((None, after))
            }
            1 if self.word(split::DESC_NUM) == size => {
                let batch = used.wrapping_sub(self.word(split::USED_IDX));
                let mut at = self.word(split::LAST_BATCH_HEAD);
                for step in 0..batch {
                    if step == size || at >= size {
                        return None;
                    }
                    after.0[split::desc(at) + split::INFLIGHT] = 0;
                    at = self.word(split::desc(at) + split::NEXT);
                }
                after.set_word(split::USED_IDX, used);
                let mut replay = after.marks(size);
                replay.sort_by_key(|head| (self.counter(*head), *head));
                (replay.len() <= usize::from(available)).then_some((Some(replay), after))
            }
            _ => None,
        }
    }
}

struct Play<'a> {
    guest: &'a Guest,
    region: &'a InflightRegion,
    /// The region's bytes, mapped once more.
    bytes: &'a Arc<Mapping>,
    input: Input<'a>,
    size: u16,
    queue: u16,
    features: u64,
}

/// One device, from its start to its death.
struct Life {
    ring: DeviceRing,
    /// Still to be replayed, in order.
    replay: Vec<u16>,
    taken: HashMap<u16, Chain>,
    /// Given back and not published, in order.
    pushed: Vec<u16>,
    /// What is marked. A driver that offers a head again before it has seen it used spoils the mark; that is its own loss.
    marks: BTreeSet<u16>,
    /// Nobody wrote into the region since the start.
    honest: bool,
}

impl Play<'_> {
    fn stride(&self) -> usize {
        Format::Split.stride(LARGEST) as usize
    }

    fn part(&self) -> Part {
        let mut bytes = vec![0; self.stride()];
        self.run(0).copy_to(&mut bytes);
        Part(bytes)
    }

    fn set_part(&self, at: usize, bytes: &[u8]) {
        self.run(at).copy_from(bytes);
    }

    /// Our part from byte `at` on.
    fn run(&self, at: usize) -> IoVec {
        let mut run = whole(self.bytes);
        run.advance(self.stride() * usize::from(self.queue) + at);
        run.truncate(self.stride() - at);
        run
    }

    fn ring_word(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        self.guest.memory.read(REGIONS[0].guest_addr + at, &mut bytes).expect("the ring is mapped");
        u16::from_le_bytes(bytes)
    }

    fn set_ring_word(&self, at: u64, value: u16) {
        self.guest.memory.write(REGIONS[0].guest_addr + at, &value.to_le_bytes()).expect("the ring is mapped");
    }

    /// Somebody else writes into the region.
    fn scribble(&mut self) {
        let head = u16::from(self.input.u8()) % LARGEST;
        let near = self.input.pick(&[0, 1, self.size - 1, self.size, self.size + 1, u16::MAX]);
        let any = u16::from(self.input.u8());
        let (at, value) = match self.input.u8() % 8 {
            0 => (split::VERSION, self.input.pick(&[1, 1, 1, 0, 2, u16::MAX])),
            1 => (split::DESC_NUM, self.input.pick(&[self.size, self.size, 0, LARGEST, u16::MAX])),
            2 => (split::LAST_BATCH_HEAD, near),
            3 => (split::USED_IDX, self.ring_word(USED + 2).wrapping_sub(any % 80)),
            4 => {
                let mark = self.input.pick(&[1, 1, 0, 255]);
                return self.set_part(split::desc(head) + split::INFLIGHT, &[mark]);
            }
            5 => (split::desc(head) + split::NEXT, if near == 0 { any } else { near }),
            6 => {
                let counter: u64 = self.input.pick(&[0, 1, u64::from(head), u64::MAX, u64::MAX - 1]);
                return self.set_part(split::desc(head) + split::COUNTER, &counter.to_le_bytes());
            }
            _ => {
                let at = usize::from(self.input.u16()) % self.stride();
                let bytes = self.input.take(usize::from(any));
                return self.set_part(at, bytes);
            }
        };
        self.set_part(at, &value.to_le_bytes());
    }

    /// The driver makes a chain available, most often a good one.
    fn offer(&mut self) {
        let at = u16::from(self.input.u8());
        let head = if at < 200 { at % self.size } else { at };
        let flags = self.input.pick(&[0, 0, 0, 2, 1, 4]);
        let descriptor = Descriptor { addr: self.input.address(), len: 16, flags, next: u16::from(self.input.u8()) };
        if head < self.size {
            let place = REGIONS[0].guest_addr + DESC + 16 * u64::from(head);
            self.guest.memory.write(place, &descriptor.to_bytes()).expect("the ring is mapped");
        }
        let index = self.ring_word(AVAIL + 2);
        self.set_ring_word(AVAIL + 4 + 2 * u64::from(index % self.size), head);
        self.set_ring_word(AVAIL + 2, index.wrapping_add(1));
    }

    /// A ring starts on what is there.
    fn start(&mut self) -> Option<Life> {
        let user = REGIONS[0].user_addr;
        let (size, features, base) = (self.size, self.features, self.input.pick(&[0, 7, 65535]));
        let setup = RingSetup { size, desc: user + DESC, avail: user + AVAIL, used: user + USED, base, features };
        let mut ring = DeviceRing::new(setup, &self.guest.memory).expect("the ring is mapped and aligned");
        let (used, before) = (self.ring_word(USED + 2), self.part());
        let available = self.ring_word(AVAIL + 2).wrapping_sub(used);
        let expected = before.taken_over(self.size, used, available);
        let queue = self.region.queue(self.queue, self.size).expect("there is a part");
        let outcome = ring.track(queue);
        let Some((left, after)) = expected else {
            assert!(matches!(outcome, Err(Broken::Stale(_))), "{outcome:?}");
            assert!(self.part() == before, "what is refused is left as it is");
            assert!(!ring.tracked());
            return None;
        };
        assert_eq!(outcome, Ok(left.is_some()));
        assert!(self.part() == after);
        let replay = left.clone().unwrap_or_default();
        let index = if left.is_some() { used.wrapping_add(replay.len() as u16) } else { base };
        assert_eq!((ring.base(), ring.to_replay(), ring.in_flight()), (index, replay.len(), 0));
        let marks = replay.iter().copied().collect();
        Some(Life { ring, replay, taken: HashMap::new(), pushed: Vec::new(), marks, honest: true })
    }

    /// One step of a device; false when it is over.
    fn step(&mut self, life: &mut Life) -> bool {
        match self.input.u8() % 16 {
            0..=3 => self.offer(),
            4..=7 => return self.take(life),
            8..=10 => self.push(life),
            11 | 12 => self.publish(life),
            13 => return self.die_in_publish(life),
            14 if self.input.u8() % 4 == 0 => {
                self.scribble();
                life.honest = false;
            }
            14 => return life.ring.enable_kicks().is_ok(),
            _ => return false,
        }
        true
    }

    fn take(&mut self, life: &mut Life) -> bool {
        let mut chain = Chain::default();
        let (base, next) = (life.ring.base(), (!life.replay.is_empty()).then(|| life.replay.remove(0)));
        match life.ring.take(&self.guest.memory, &mut chain) {
            Ok(true) => {
                let moved = u16::from(next.is_none());
                assert_eq!(life.ring.base(), base.wrapping_add(moved), "a replayed chain is no new one");
                assert!(next.is_none_or(|head| head == chain.head), "replayed in order, before anything new");
                assert!(chain.head < self.size);
                life.marks.insert(chain.head);
                assert!(life.taken.insert(chain.head, chain).is_none(), "a head twice");
            }
            Ok(false) => assert!(next.is_none()),
            Err(_) => {
                // The ring is broken: whatever was not served stays marked.
                life.replay.splice(0..0, next);
                return false;
            }
        }
        true
    }

    fn push(&mut self, life: &mut Life) {
        let mut heads: Vec<_> = life.taken.keys().copied().collect();
        heads.sort_unstable();
        if heads.is_empty() {
            return;
        }
        let head = heads[usize::from(self.input.u8()) % heads.len()];
        life.taken.remove(&head);
        life.ring.push(head, 0).expect("the ring is mapped");
        life.pushed.push(head);
    }

    fn publish(&mut self, life: &mut Life) {
        let outcome = life.ring.publish();
        assert!(matches!(outcome, Ok(_) | Err(Broken::AvailJump { .. })), "{outcome:?}");
        for head in life.pushed.drain(..) {
            life.marks.remove(&head);
        }
    }

    /// Dies between the used index and the region's: some marks are cleared, the rest is the successor's to do.
    fn die_in_publish(&mut self, life: &mut Life) -> bool {
        let (mut before, pushed) = (self.part(), life.pushed.clone());
        self.publish(life);
        let cleared = usize::from(self.input.u8()) % (pushed.len() + 1);
        for head in &pushed[..cleared] {
            before.0[split::desc(*head) + split::INFLIGHT] = 0;
        }
        self.set_part(0, &before.0);
        let used = self.ring_word(USED + 2);
        let whole = pushed.iter().collect::<BTreeSet<_>>().len() == pushed.len();
        let honest_index = used.wrapping_sub(before.word(split::USED_IDX)) == pushed.len() as u16;
        if life.honest && whole && honest_index {
            let (replay, _) = before.taken_over(self.size, used, u16::MAX).expect("an honest region");
            let mut replay = replay.expect("somebody was here");
            replay.sort_unstable();
            assert_eq!(replay, life.marks.iter().copied().collect::<Vec<_>>(), "exactly what was not used");
        }
        false
    }

    /// The marks are those of the chains that the driver has not got back.
    fn check(&self, life: &Life) {
        assert_eq!(usize::from(life.ring.in_flight()), life.taken.len());
        if life.honest {
            assert!(self.part().marks(self.size).iter().eq(&life.marks));
        }
    }
}

fn fresh() -> (Guest, InflightRegion, Arc<Mapping>) {
    let region = InflightRegion::create(Format::Split, QUEUES, LARGEST, 0).expect("a region");
    let bytes = Mapping::of_file(region.file(), 0, region.size()).expect("a mapping");
    (Guest::default(), region, bytes)
}

/// All bytes of a mapping that is kept.
fn whole(map: &Arc<Mapping>) -> IoVec {
    GuestSlice::new(Arc::clone(map), 0, map.len()).expect("all of it").as_iovec()
}

/// A region is mapped exactly when its description makes sense and its file holds it.
fn describe(region: &InflightRegion, input: &mut Input<'_>) {
    let stride = |size: u16| (16 + 16 * u64::from(size)).next_multiple_of(64);
    let offset = input.pick(&[0, 0, 8, 4, 64, 1 << 63, u64::MAX - 7]);
    let (queues, size) = (input.pick(&[1, QUEUES, 0, 4, u16::MAX]), input.pick(&[LARGEST, 1, 0, 32768, 32769, 3]));
    let needed = stride(size) * u64::from(queues);
    let said = input.pick(&[needed, needed, needed.wrapping_sub(1), 0, u64::MAX]);
    let mapped = InflightRegion::map(region.file(), offset, said, Format::Split, queues, size);
    let fits = offset.checked_add(needed).is_some_and(|end| end <= region.size());
    let legal = queues > 0 && (1..=32768).contains(&size) && offset % 8 == 0 && said >= needed;
    assert_eq!(mapped.is_ok(), fits && legal, "{offset:#x}, {said}, {queues} of {size}: {:?}", mapped.err());
}

fuzz_target!(|bytes: &[u8]| {
    thread_local!(static FIXED: (Guest, InflightRegion, Arc<Mapping>) = fresh());
    FIXED.with(|(guest, region, bytes_of_region)| {
        guest.clear();
        let mut input = Input::new(bytes);
        if input.u8() % 8 == 0 {
            describe(region, &mut input);
        }
        let size = 1 << (input.u8() % 7);
        let queue = input.pick(&[0, 1, 2]);
        let features = input.pick(&[0, feature::EVENT_IDX, feature::EVENT_IDX | feature::INDIRECT_DESC]);
        let mut play = Play { guest, region, bytes: bytes_of_region, input, size, queue, features };
        whole(bytes_of_region).copy_from(&vec![CANARY; bytes_of_region.len()]);
        play.run(0).zero();
        let index = play.input.pick(&[0, 7, 65535, 65500]);
        let ahead = u16::from(play.input.pick(&[0u8, 0, 1, 3, 64, 200]));
        play.set_ring_word(USED + 2, index);
        play.set_ring_word(AVAIL + 2, index.wrapping_add(ahead));
        for _ in 0..play.input.u8() % 24 {
            play.scribble();
        }
        let mut steps = 0;
        while steps < MAX_STEPS && !play.input.is_empty() {
            let Some(mut life) = play.start() else {
                steps += 1;
                play.scribble();
                continue;
            };
            steps += 1;
            play.check(&life);
            while steps < MAX_STEPS && play.step(&mut life) {
                steps += 1;
                play.check(&life);
            }
        }
        let mut others = vec![0; bytes_of_region.len()];
        whole(bytes_of_region).copy_to(&mut others);
        for (number, part) in others.chunks(play.stride()).enumerate() {
            assert!(number == usize::from(queue) || part.iter().all(|byte| *byte == CANARY), "another queue's part");
        }
    });
});
