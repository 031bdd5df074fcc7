//! What becomes of the requests that storage failed: kept, tried again, failed, left.

use super::super::kept::{End, Verdict};
use super::super::operator::{Decision, Order};
use super::super::request::{RequestType, SECTOR, S_OK};
use super::{BlkServe, Slot};
use crate::disk::{Kind, Operation};
use crate::worker::{now_ns, Counter, EventKind, Finished, Whereabouts};

impl BlkServe {
    /// Keeps a request whose operations have ended and failed, if the policy says so.
    pub(super) fn keep(&mut self, at: u32) -> bool {
        if !self.kept.is_on() {
            return false;
        }
        let slot = &self.slots[at as usize];
        let (errno, first) = (slot.errno, slot.whereabouts == Whereabouts::Storage);
        let (to, event) = match self.kept.failed(at, errno, now_ns()) {
            Verdict::Report => return false,
            Verdict::Hold => (Whereabouts::Held, EventKind::RequestHeld),
            Verdict::Retry => (Whereabouts::Retrying, EventKind::RequestRetried),
        };
        self.goes(at, to);
        let begins = first && self.shared.episode.joined();
        if begins || (to == Whereabouts::Held && self.shared.episode.was_reopened()) {
            let slot = &self.slots[at as usize];
            self.events.push(event, self.queue(slot), slot.describe_failure());
        }
        true
    }

    /// Notes where a request is now, for who counts and lists them.
    fn goes(&mut self, at: u32, to: Whereabouts) {
        let slot = &mut self.slots[at as usize];
        let from = std::mem::replace(&mut slot.whereabouts, to);
        let Some(Some(facts)) = self.facts.get(usize::from(slot.ring)) else { return };
        for (place, by) in [(from, u64::MAX), (to, 1)] {
            match place {
                Whereabouts::Storage => {}
                Whereabouts::Held => facts.stats.add(Counter::Held, by),
                Whereabouts::Retrying => facts.stats.add(Counter::Retrying, by),
            }
        }
        facts.in_flight.moved(slot.head, to, slot.errno);
    }

    /// A kept request is over.
    pub(super) fn trouble_over(&mut self, at: u32, end: End) {
        self.goes(at, Whereabouts::Storage);
        if let Some(summary) = self.shared.episode.left(end) {
            self.events.push(EventKind::RequestsSettled, None, summary);
        }
    }

    fn queue(&self, slot: &Slot) -> Option<u16> {
        self.facts.get(usize::from(slot.ring))?.as_ref().map(|facts| facts.index)
    }

    /// Tries again what is due, and carries out what the operator decided.
    pub(super) fn carry_on(&mut self, finished: &mut Vec<Finished>) {
        let mut submitted = false;
        if self.kept.next_due().is_some() {
            let now = now_ns();
            while let Some(at) = self.kept.take_due(now) {
                self.submit_again(at);
                submitted = true;
            }
        }
        for order in self.desk.take() {
            submitted |= self.obey(order, finished);
        }
        if submitted {
            self.settle(finished);
        }
    }

    /// True when something was submitted.
    fn obey(&mut self, order: Order, finished: &mut Vec<Finished>) -> bool {
        let which = order.which;
        let queues: Vec<_> = self.facts.iter().map(|facts| facts.as_ref().map(|facts| facts.index)).collect();
        let matches = |slot: &Slot| {
            which.is_none_or(|(queue, head)| {
                queues.get(usize::from(slot.ring)) == Some(&Some(queue)) && slot.head == head
            })
        };
        if order.decision == Decision::Fail {
            let count = self.fail_matching(finished, matches);
            order.done(count);
            return false;
        }
        let chosen = self.choose(matches);
        // What is held once more after this is news.
        self.shared.episode.reopen();
        for &at in &chosen {
            self.goes(at, Whereabouts::Retrying);
            self.submit_again(at);
        }
        order.done(chosen.len() as u64);
        let submitted = !chosen.is_empty();
        self.give_back(chosen);
        submitted
    }

    fn submit_again(&mut self, at: u32) {
        let slot = &mut self.slots[at as usize];
        let (kind, bytes) = (slot.kind, slot.bytes);
        (slot.code, slot.repeatable) = (S_OK, true);
        if let Some(Some(facts)) = self.facts.get(usize::from(slot.ring)) {
            facts.stats.add(Counter::Retried, 1);
        }
        let kind = match kind {
            RequestType::Read => Kind::Read,
            RequestType::Write => Kind::Write,
            _ => {
                let mut ranges = std::mem::take(&mut self.ranges);
                self.kept.ranges(at, &mut ranges);
                self.slots[at as usize].operations = ranges.len() as u32;
                self.submit_ranges(at, &ranges);
                self.ranges = ranges;
                return;
            }
        };
        slot.operations = 1;
        let mut runs = self.spare.pop().unwrap_or_default();
        let (offset, pin) = self.kept.runs(at, &mut runs);
        let durable = kind == Kind::Write && !self.writeback;
        self.submit(Operation { token: u64::from(at), kind, offset, len: bytes, durable, runs, pin });
    }

    /// Takes the kept requests that `matches` out; to be given back with `give_back`.
    fn choose(&mut self, matches: impl Fn(&Slot) -> bool) -> Vec<u32> {
        let mut chosen = std::mem::take(&mut self.chosen);
        let slots = &self.slots;
        self.kept.take_matching(&mut chosen, |at| matches(&slots[at as usize]));
        chosen
    }

    fn give_back(&mut self, mut chosen: Vec<u32>) {
        chosen.clear();
        self.chosen = chosen;
    }

    /// Answers kept requests with their errors. Those that are being tried again just now are with storage.
    pub(super) fn fail_matching(&mut self, finished: &mut Vec<Finished>, matches: impl Fn(&Slot) -> bool) -> u64 {
        let chosen = self.choose(matches);
        for &at in &chosen {
            self.finish(at, finished);
        }
        let count = chosen.len() as u64;
        self.give_back(chosen);
        count
    }

    /// Drops kept requests without an answer, and says which.
    pub(super) fn leave_matching(&mut self, left: &mut Vec<u16>, matches: impl Fn(&Slot) -> bool) {
        let chosen = self.choose(matches);
        for &at in &chosen {
            left.push(self.slots[at as usize].head);
            self.trouble_over(at, End::Left);
            self.kept.forget(at);
            self.free.push(at);
        }
        self.give_back(chosen);
    }
}

impl Slot {
    fn describe_failure(&self) -> String {
        let error = std::io::Error::from_raw_os_error(self.errno);
        format!("{} of {} bytes at sector {}: {error}", self.kind.name(), self.bytes, self.offset / SECTOR)
    }
}
