//! From a request to operations on storage, and from their completions to a status byte.

mod trouble;

use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

use super::kept::{End, Kept};
use super::operator::Desk;
use super::request::{self, parse, Limits, Parsed, Range, Request, RequestType, SECTOR, S_IOERR, S_OK, S_UNSUPP};
use super::shared::BlkShared;
use crate::disk::{AnyEngine, Completion, Engine, Kind, Operation};
use crate::memory::{GuestMemory, IoVec};
use crate::ring::Chain;
use crate::worker::{now_ns, Begun, EventKind, Events, Finished, Outcome, RingFacts, Serve, Waker, Whereabouts};

/// A request that storage has.
#[derive(Debug)]
struct Slot {
    ring: u16,
    head: u16,
    status: IoVec,
    kind: RequestType,
    code: u8,
    operations: u32,
    bytes: u64,
    /// The used length when it succeeds, and when it fails. The status byte comes after the data: it
    /// only counts when everything before it was written.
    written: [u32; 2],
    bounced: bool,
    /// First byte on the disk.
    offset: u64,
    /// Of its failed operations: what the last one said, and whether all of them may be submitted again.
    errno: i32,
    repeatable: bool,
    whereabouts: Whereabouts,
}

/// Serves the requests of the rings of one worker.
pub struct BlkServe {
    shared: Arc<BlkShared>,
    engine: AnyEngine,
    events: Arc<Events>,
    waker: Waker,
    limits: Limits,
    writeback: bool,
    slots: Vec<Slot>,
    free: Vec<u32>,
    spare: Vec<Vec<IoVec>>,
    ranges: Vec<Range>,
    done: Vec<Completion>,
    /// FLUSH requests served by the fdatasync that runs, and those that came after it began or wait for its turn.
    flushing: Vec<u32>,
    flush_next: Vec<u32>,
    memory_fault: bool,
    /// Requests that storage failed, and where the operator's decisions about them arrive.
    kept: Kept,
    desk: Arc<Desk>,
    /// Slots that were just taken out of `kept`; empty between calls.
    chosen: Vec<u32>,
    /// By the worker's number of the ring.
    facts: Vec<Option<RingFacts>>,
    /// Whether there is a rate limit, the clock of this batch, and whether a chain was refused in it.
    limited: bool,
    now_ns: u64,
    refused: bool,
}

/// The token of the one fdatasync; slots are numbered from 0.
const FLUSH_TOKEN: u64 = u64::MAX;

impl BlkServe {
    /// Made on the worker's own thread, with the engine.
    pub fn new(shared: Arc<BlkShared>, engine: AnyEngine, events: Arc<Events>, waker: Waker) -> Self {
        Self {
            limits: shared.limits,
            writeback: shared.writeback.load(Ordering::Acquire),
            kept: Kept::new(shared.policy),
            desk: shared.enlist(waker.clone()),
            shared,
            engine,
            events,
            waker,
            slots: Vec::new(),
            free: Vec::new(),
            spare: Vec::new(),
            ranges: Vec::new(),
            done: Vec::new(),
            flushing: Vec::new(),
            flush_next: Vec::new(),
            memory_fault: false,
            chosen: Vec::new(),
            facts: Vec::new(),
            limited: false,
            now_ns: 0,
            refused: false,
        }
    }

    fn open_slot(&mut self, slot: Slot) -> u32 {
        match self.free.pop() {
            Some(at) => {
                self.slots[at as usize] = slot;
                at
            }
            None => {
                self.slots.push(slot);
                (self.slots.len() - 1) as u32
            }
        }
    }

    /// Hands one operation over; what ends at once is kept for `settle`.
    fn submit(&mut self, operation: Operation) {
        if let Some(completion) = self.engine.submit(operation) {
            self.done.push(completion);
        }
    }

    fn pin(&self, memory: &Arc<GuestMemory>) -> Option<Arc<GuestMemory>> {
        (!self.engine.inline()).then(|| Arc::clone(memory))
    }

    /// One `Read` or `Write` over the runs of a stream.
    fn transfer(&mut self, at: u32, kind: Kind, offset: u64, stream: &mut Vec<IoVec>, memory: &Arc<GuestMemory>) {
        let runs = std::mem::replace(stream, self.spare.pop().unwrap_or_default());
        let len = runs.iter().map(|run| run.len() as u64).sum();
        let durable = kind == Kind::Write && !self.writeback;
        let pin = self.pin(memory);
        if self.kept.is_on() {
            self.kept.remember_runs(at, offset, &runs, pin.as_ref());
        }
        self.submit(Operation { token: u64::from(at), kind, offset, len, durable, runs, pin });
    }

    fn change_ranges(&mut self, at: u32) {
        let ranges = std::mem::take(&mut self.ranges);
        if self.kept.is_on() {
            self.kept.remember_ranges(at, &ranges);
        }
        self.submit_ranges(at, &ranges);
        self.ranges = ranges;
    }

    fn submit_ranges(&mut self, at: u32, ranges: &[Range]) {
        for range in ranges {
            let &Range { offset, len, kind } = range;
            let durable = !self.writeback;
            self.submit(Operation { token: u64::from(at), kind, offset, len, durable, runs: Vec::new(), pin: None });
        }
    }

    fn flush(&mut self, at: u32) {
        self.flush_next.push(at);
        self.start_flush();
    }

    /// One fdatasync for all who wait, unless one runs; whoever has the turn wakes us when it is free.
    fn start_flush(&mut self) {
        if self.flush_next.is_empty() || !self.flushing.is_empty() || !self.shared.flush_gate.try_take(&self.waker) {
            return;
        }
        std::mem::swap(&mut self.flushing, &mut self.flush_next);
        let operation = Operation {
            token: FLUSH_TOKEN,
            kind: Kind::Flush,
            offset: 0,
            len: 0,
            durable: true,
            runs: Vec::new(),
            pin: None,
        };
        self.submit(operation);
    }

    /// Works off what storage has given back; requests whose last operation ended go to `finished`.
    fn settle(&mut self, finished: &mut Vec<Finished>) {
        while let Some(completion) = self.done.pop() {
            let Completion { token, kind, result, runs, bounced, repeatable } = completion;
            if result == Err(libc::EFAULT) {
                self.memory_fault = true;
            }
            if token == FLUSH_TOKEN {
                self.end_flush(result, finished);
                continue;
            }
            if runs.capacity() > 0 {
                let mut runs = runs;
                runs.clear();
                self.spare.push(runs);
            }
            let slot = &mut self.slots[token as usize];
            slot.operations -= 1;
            slot.bounced |= bounced;
            if let Err(errno) = result {
                let code = match (kind, errno) {
                    (Kind::Discard | Kind::WriteZeroes { .. }, libc::EOPNOTSUPP) => S_UNSUPP,
                    _ => S_IOERR,
                };
                slot.code = slot.code.max(code);
                slot.errno = errno;
                slot.repeatable &= repeatable;
            }
            if slot.operations == 0 && !(slot.code == S_IOERR && slot.repeatable && self.keep(token as u32)) {
                self.finish(token as u32, finished);
            }
        }
    }

    fn end_flush(&mut self, result: Result<(), i32>, finished: &mut Vec<Finished>) {
        if let Err(errno) = result {
            if !self.shared.flush_failed.swap(true, Ordering::AcqRel) {
                self.events.push(EventKind::FlushFailed, None, std::io::Error::from_raw_os_error(errno).to_string());
            }
        }
        self.shared.flush_gate.give_back();
        let code = if self.shared.flush_failed() { S_IOERR } else { S_OK };
        let mut ended = std::mem::take(&mut self.flushing);
        for &at in &ended {
            self.slots[at as usize].code = code;
            self.finish(at, finished);
        }
        ended.clear();
        self.flushing = ended;
    }

    fn finish(&mut self, at: u32, finished: &mut Vec<Finished>) {
        let slot = &self.slots[at as usize];
        let outcome = slot.outcome();
        finished.push(Finished { ring: slot.ring, head: slot.head, outcome });
        if slot.whereabouts != Whereabouts::Storage {
            self.trouble_over(at, if outcome.failed { End::Failed } else { End::Done });
        }
        self.kept.forget(at);
        self.free.push(at);
    }

    /// Says what a request is, for who lists those in flight.
    #[inline]
    fn describe(&self, slot: &Slot) {
        if let Some(Some(facts)) = self.facts.get(usize::from(slot.ring)) {
            facts.in_flight.describe(slot.head, slot.kind, slot.offset / SECTOR, slot.bytes);
        }
    }

    /// Has the engine move the data at once if it can.
    #[inline]
    fn move_now(&mut self, ring: u16, chain: &Chain, kind: Kind, offset: u64) -> bool {
        let durable = kind == Kind::Write && !self.writeback;
        let (stream, bytes, name) = match kind {
            Kind::Read => (&chain.writable[..], chain.writable_len, RequestType::Read),
            _ => (chain.readable(), chain.readable_len, RequestType::Write),
        };
        if bytes == 0 {
            return false;
        }
        if !self.engine.inline() {
            // It may take a moment, and is in flight meanwhile.
            if let Some(Some(facts)) = self.facts.get(usize::from(ring)) {
                facts.in_flight.describe(chain.head, name, offset / SECTOR, bytes);
                facts.in_flight.taken(chain.head, self.now_ns);
            }
        }
        self.engine.move_now(kind, offset, durable, stream)
    }

    /// Answers at once with `code`; the device has stored `data` bytes of the `room` before the status byte.
    #[inline]
    fn answer(status: IoVec, code: u8, kind: RequestType, data: u32, room: u64) -> Begun {
        Self::answer_moved(status, code, kind, 0, if u64::from(data) == room { data + 1 } else { data })
    }

    #[inline]
    fn answer_moved(status: IoVec, code: u8, kind: RequestType, bytes: u64, written: u32) -> Begun {
        status.set_first(code);
        step!("status");
        Begun::Done(Outcome { written, kind, bytes, failed: code != S_OK, bounced: false })
    }
}

impl Slot {
    /// Writes the status byte.
    fn outcome(&self) -> Outcome {
        self.status.set_first(self.code);
        step!("status");
        let ok = self.code == S_OK;
        let written = self.written[usize::from(!ok)];
        Outcome { written, kind: self.kind, bytes: if ok { self.bytes } else { 0 }, failed: !ok, bounced: self.bounced }
    }
}

impl Drop for BlkServe {
    fn drop(&mut self) {
        self.shared.dismiss(&self.desk);
    }
}

impl Serve for BlkServe {
    type Engine = AnyEngine;

    fn engine(&mut self) -> &mut AnyEngine {
        &mut self.engine
    }

    fn start_batch(&mut self, now_ns: u64) {
        self.engine.tick(now_ns);
        self.now_ns = now_ns;
        self.limits.num_sectors = self.shared.num_sectors.load(Ordering::Acquire);
        self.writeback = self.shared.writeback.load(Ordering::Acquire);
        self.limited = self.shared.rate.is_on();
        self.refused = false;
    }

    fn wants_hints(&self) -> bool {
        self.engine.wants_hints()
    }

    #[inline]
    fn hint(&mut self, header: [u64; 2]) {
        if let Some(offset) = request::expected(header, &self.limits) {
            self.engine.hint(offset);
        }
    }

    #[inline]
    fn admits(&mut self) -> bool {
        if !self.limited {
            return true;
        }
        let admitted = self.shared.rate.wait(self.now_ns) == 0;
        self.refused |= !admitted;
        admitted
    }

    fn patience(&mut self) -> Option<Duration> {
        let due = self.kept.next_due();
        if due.is_none() && !self.refused {
            return None;
        }
        let now = now_ns();
        let retry = due.map(|due| due.saturating_sub(now));
        let rate = self.refused.then(|| self.shared.rate.wait(now));
        [retry, rate].into_iter().flatten().min().map(Duration::from_nanos)
    }

    fn ring_started(&mut self, ring: u16, facts: RingFacts) {
        let at = usize::from(ring);
        if self.facts.len() <= at {
            self.facts.resize_with(at + 1, || None);
        }
        self.facts[at] = Some(facts);
    }

    fn fail_kept(&mut self, ring: Option<u16>, finished: &mut Vec<Finished>) {
        self.fail_matching(finished, |slot| ring.is_none_or(|ring| slot.ring == ring));
    }

    fn leave_kept(&mut self, ring: u16, left: &mut Vec<u16>) {
        self.leave_matching(left, |slot| slot.ring == ring);
    }

    fn begin(&mut self, ring: u16, features: u64, chain: &mut Chain, memory: &Arc<GuestMemory>) -> Begun {
        let (request, kind, status) = match parse(chain, &self.limits, features, &mut self.ranges) {
            Parsed::Answerable { request, kind, status } => (request, kind, status),
            Parsed::Unanswerable => {
                return Begun::Done(Outcome {
                    written: 0,
                    kind: RequestType::Other,
                    bytes: 0,
                    failed: true,
                    bounced: false,
                })
            }
        };
        if self.limited {
            let moved = match request {
                Request::In { .. } => chain.writable_len,
                Request::Out { .. } => chain.readable_len,
                _ => 0,
            };
            self.shared.rate.charge(moved, self.now_ns);
        }
        let room = chain.writable_len;
        let moved = match request {
            Request::In { offset } => self.move_now(ring, chain, Kind::Read, offset),
            Request::Out { offset } => self.move_now(ring, chain, Kind::Write, offset),
            _ => false,
        };
        if moved {
            // A read has filled all of the room and a write had none; the status byte comes on top.
            let written = u32::try_from(room + 1).unwrap_or(u32::MAX);
            return Self::answer_moved(status, S_OK, kind, room.max(chain.readable_len), written);
        }
        let (operations, bytes) = match request {
            Request::Refused(code) => return Self::answer(status, code, kind, 0, room),
            Request::GetId => {
                let stored = request::write_id(chain, &self.shared.device_id);
                return Self::answer(status, S_OK, kind, stored, room);
            }
            Request::Flush if self.shared.flush_failed() => return Self::answer(status, S_IOERR, kind, 0, room),
            Request::In { .. } if room == 0 => return Self::answer(status, S_OK, kind, 0, room),
            Request::Out { .. } if chain.readable_len == 0 => return Self::answer(status, S_OK, kind, 0, room),
            Request::Ranges { .. } if self.ranges.is_empty() => return Self::answer(status, S_OK, kind, 0, room),
            Request::In { .. } => (1, room),
            Request::Out { .. } => (1, chain.readable_len),
            Request::Flush => (1, 0),
            Request::Ranges { .. } => {
                (self.ranges.len() as u32, self.ranges.iter().map(|range| range.len).sum::<u64>())
            }
        };
        let written = match request {
            Request::In { .. } => [u32::try_from(room + 1).unwrap_or(u32::MAX), 0],
            // A FLUSH may come with a data buffer it should not have; that is left alone.
            _ => [u32::from(room == 0); 2],
        };
        let offset = match request {
            Request::In { offset } | Request::Out { offset } => offset,
            Request::Ranges { .. } => self.ranges.first().map_or(0, |range| range.offset),
            _ => 0,
        };
        let slot = Slot {
            ring,
            head: chain.head,
            status,
            kind,
            code: S_OK,
            operations,
            bytes,
            written,
            bounced: false,
            offset,
            errno: 0,
            repeatable: true,
            whereabouts: Whereabouts::Storage,
        };
        self.describe(&slot);
        let at = self.open_slot(slot);
        match request {
            Request::In { offset } => self.transfer(at, Kind::Read, offset, &mut chain.writable, memory),
            Request::Out { offset } => self.transfer(at, Kind::Write, offset, chain.readable_mut(), memory),
            Request::Ranges { .. } => self.change_ranges(at),
            _ => self.flush(at),
        }
        Begun::Pending
    }

    fn finish_batch(&mut self, finished: &mut Vec<Finished>) {
        self.engine.reap(&mut self.done);
        self.settle(finished);
        self.carry_on(finished);
        if !self.flush_next.is_empty() {
            self.start_flush();
            self.settle(finished);
        }
    }

    fn pending(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn memory_fault(&mut self) -> bool {
        std::mem::take(&mut self.memory_fault)
    }
}
