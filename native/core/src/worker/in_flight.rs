//! What a ring has in flight, readable at any time without stopping it.

use std::sync::atomic::{fence, AtomicU64, Ordering};

use crate::blk::RequestType;

/// Where a request is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Whereabouts {
    /// Storage has it, or it waits for its turn there.
    #[default]
    Storage,
    /// Storage failed it; the operator decides.
    Held,
    /// Storage failed it; it is tried again.
    Retrying,
}

/// One request in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestInFlight {
    /// Its chain.
    pub head: u16,
    /// What it asks for.
    pub kind: RequestType,
    /// Where on the disk, in sectors of 512 bytes; of several ranges the first.
    pub sector: u64,
    /// How many bytes it moves or changes.
    pub bytes: u64,
    /// Microseconds since it was taken.
    pub age_us: u64,
    /// Where it is.
    pub whereabouts: Whereabouts,
    /// What storage said when it failed last; 0 for one that has not failed.
    pub errno: i32,
}

const BYTES_BITS: u32 = 40;
const KIND_BITS: u32 = 4;
const WHERE_BITS: u32 = 4;
const BYTES: u64 = (1 << BYTES_BITS) - 1;

/// What is known of one head. `what` packs, from its lowest bit: bytes (40), type and 1 (4), whereabouts (4), errno (16).
#[derive(Debug, Default)]
struct Entry {
    /// When it was taken, on the workers' clock; 0: not in flight.
    taken_ns: AtomicU64,
    sector: AtomicU64,
    what: AtomicU64,
}

/// The requests in flight of one started ring, by head. Its worker writes; anybody reads.
#[derive(Debug, Default)]
pub struct InFlight(Box<[Entry]>);

const TYPES: [RequestType; 7] = [
    RequestType::Read,
    RequestType::Write,
    RequestType::Flush,
    RequestType::Discard,
    RequestType::WriteZeroes,
    RequestType::GetId,
    RequestType::Other,
];
const PLACES: [Whereabouts; 3] = [Whereabouts::Storage, Whereabouts::Held, Whereabouts::Retrying];

impl InFlight {
    pub(super) fn new(size: u16) -> Self {
        Self((0..size).map(|_| Entry::default()).collect())
    }

    /// Says what the request at `head` is: before `taken` makes it visible.
    #[inline]
    pub(crate) fn describe(&self, head: u16, kind: RequestType, sector: u64, bytes: u64) {
        if let Some(entry) = self.0.get(usize::from(head)) {
            // The end of the head's last request is seen before what its next one is.
            fence(Ordering::Release);
            entry.sector.store(sector, Ordering::Relaxed);
            let what = bytes.min(BYTES) | (kind as u64 + 1) << BYTES_BITS;
            entry.what.store(what, Ordering::Relaxed);
        }
    }

    /// Notes that a chain is in flight.
    #[inline]
    pub(crate) fn taken(&self, head: u16, now_ns: u64) {
        if let Some(entry) = self.0.get(usize::from(head)) {
            // Whoever sees the time sees what was said before.
            entry.taken_ns.store(now_ns, Ordering::Release);
        }
    }

    /// Notes where it is now, and why.
    pub(crate) fn moved(&self, head: u16, whereabouts: Whereabouts, errno: i32) {
        if let Some(entry) = self.0.get(usize::from(head)) {
            let errno = u64::from(u16::try_from(errno).unwrap_or(u16::MAX));
            let kept = entry.what.load(Ordering::Relaxed) & ((1 << (BYTES_BITS + KIND_BITS)) - 1);
            let place = (whereabouts as u64) << (BYTES_BITS + KIND_BITS);
            let errno = errno << (BYTES_BITS + KIND_BITS + WHERE_BITS);
            entry.what.store(kept | place | errno, Ordering::Relaxed);
        }
    }

    /// Notes that it is not in flight any more.
    #[inline]
    pub(super) fn ended(&self, head: u16) {
        if let Some(entry) = self.0.get(usize::from(head)) {
            entry.taken_ns.store(0, Ordering::Relaxed);
            entry.what.store(0, Ordering::Relaxed);
        }
    }

    pub(super) fn oldest_age_us(&self, now_ns: u64) -> u64 {
        let times = self.0.iter().map(|entry| entry.taken_ns.load(Ordering::Relaxed));
        times.filter(|&at| at != 0).min().map_or(0, |at| now_ns.saturating_sub(at) / 1000)
    }

    /// All of them, oldest first. One that ends meanwhile may be missing.
    pub(super) fn list(&self, now_ns: u64) -> Vec<RequestInFlight> {
        let mut found: Vec<_> = (0..).zip(&self.0).filter_map(|(head, entry)| entry.read(head, now_ns)).collect();
        found.sort_by_key(|request| std::cmp::Reverse(request.age_us));
        found
    }
}

impl Entry {
    fn read(&self, head: u16, now_ns: u64) -> Option<RequestInFlight> {
        let taken_ns = self.taken_ns.load(Ordering::Acquire);
        let (sector, what) = (self.sector.load(Ordering::Relaxed), self.what.load(Ordering::Relaxed));
        fence(Ordering::Acquire);
        if taken_ns == 0 || self.taken_ns.load(Ordering::Relaxed) != taken_ns {
            return None;
        }
        let field = |shift: u32, bits: u32| (what >> shift & ((1 << bits) - 1)) as usize;
        let kind = field(BYTES_BITS, KIND_BITS).checked_sub(1).and_then(|at| TYPES.get(at));
        let place = PLACES.get(field(BYTES_BITS + KIND_BITS, WHERE_BITS));
        Some(RequestInFlight {
            head,
            kind: kind.copied().unwrap_or(RequestType::Other),
            sector,
            bytes: what & BYTES,
            age_us: now_ns.saturating_sub(taken_ns) / 1000,
            whereabouts: place.copied().unwrap_or_default(),
            errno: (what >> (BYTES_BITS + KIND_BITS + WHERE_BITS)) as i32,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_listed_with_what_was_said_of_it_until_it_ends() {
        let table = InFlight::new(4);
        for (at, &kind) in TYPES.iter().enumerate() {
            table.describe(3, kind, u64::MAX, 1 << 32);
            table.taken(3, 1_000_000);
            table.moved(3, PLACES[at % 3], libc::ENOSPC);
            let expected = RequestInFlight {
                head: 3,
                kind,
                sector: u64::MAX,
                bytes: 1 << 32,
                age_us: 2000,
                whereabouts: PLACES[at % 3],
                errno: libc::ENOSPC,
            };
            assert_eq!(table.list(3_000_000), [expected]);
            table.ended(3);
            assert_eq!(table.list(3_000_000), []);
        }
    }

    #[test]
    fn the_oldest_comes_first_and_gives_the_age() {
        let table = InFlight::new(8);
        for (head, at) in [(1, 30_000), (2, 10_000), (7, 20_000)] {
            table.describe(head, RequestType::Read, u64::from(head), 512);
            table.taken(head, at);
        }
        assert_eq!(table.list(50_000).iter().map(|request| request.head).collect::<Vec<_>>(), [2, 7, 1]);
        assert_eq!(table.oldest_age_us(50_000), 40);
    }

    #[test]
    fn a_head_beyond_the_table_is_left_alone_and_an_undescribed_one_is_of_no_type() {
        let table = InFlight::new(1);
        table.describe(1, RequestType::Read, 0, 0);
        table.taken(1, 5);
        table.moved(1, Whereabouts::Held, 5);
        table.ended(1);
        assert_eq!(table.list(10), []);
        table.taken(0, 5);
        assert_eq!(table.list(10)[0].kind, RequestType::Other);
    }
}
