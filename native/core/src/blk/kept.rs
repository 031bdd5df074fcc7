//! Requests that storage failed and that are kept, to be tried again later or when the operator says so.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;

use super::policy::{Action, ErrorPolicy};
use super::request::Range;
use crate::memory::{GuestMemory, IoVec};

/// What a request was submitted with, and how it fared. One per slot, used again with it.
#[derive(Debug, Default)]
struct Copy {
    offset: u64,
    runs: Vec<IoVec>,
    ranges: Vec<Range>,
    /// Keeps the memory behind `runs` mapped.
    pin: Option<Arc<GuestMemory>>,
    /// On the workers' clock; 0: it has not failed.
    first_failure_ns: u64,
    failures: u32,
}

/// What to do with a request that just failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Answer it.
    Report,
    /// It is kept for the operator.
    Hold,
    /// It is kept and comes back from `take_due`.
    Retry,
}

/// The requests of one worker that can be submitted again, by slot.
#[derive(Debug, Default)]
pub(super) struct Kept {
    policy: ErrorPolicy,
    copies: Vec<Copy>,
    held: Vec<u32>,
    /// When, and which.
    due: BinaryHeap<Reverse<(u64, u32)>>,
}

impl Kept {
    pub(super) fn new(policy: ErrorPolicy) -> Self {
        Self { policy, ..Self::default() }
    }

    /// Whether anything may be kept: without it no copies are made.
    #[inline]
    pub(super) fn is_on(&self) -> bool {
        self.policy.keeps()
    }

    fn copy(&mut self, at: u32) -> &mut Copy {
        let at = at as usize;
        if self.copies.len() <= at {
            self.copies.resize_with(at + 1, Copy::default);
        }
        &mut self.copies[at]
    }

    /// Remembers how to submit a read or write. The engine uses up its own list.
    pub(super) fn remember_runs(&mut self, at: u32, offset: u64, runs: &[IoVec], pin: Option<&Arc<GuestMemory>>) {
        let copy = self.copy(at);
        copy.offset = offset;
        copy.runs.clear();
        copy.runs.extend_from_slice(runs);
        copy.pin = pin.cloned();
        copy.ranges.clear();
    }

    /// Remembers how to submit a discard or zeroes.
    pub(super) fn remember_ranges(&mut self, at: u32, ranges: &[Range]) {
        let copy = self.copy(at);
        copy.runs.clear();
        copy.ranges.clear();
        copy.ranges.extend_from_slice(ranges);
    }

    /// The runs to submit again: where, into `runs`, and what keeps them mapped.
    pub(super) fn runs(&self, at: u32, runs: &mut Vec<IoVec>) -> (u64, Option<Arc<GuestMemory>>) {
        let copy = &self.copies[at as usize];
        runs.clear();
        runs.extend_from_slice(&copy.runs);
        (copy.offset, copy.pin.clone())
    }

    /// The ranges to submit again.
    pub(super) fn ranges(&self, at: u32, ranges: &mut Vec<Range>) {
        ranges.clear();
        ranges.extend_from_slice(&self.copies[at as usize].ranges);
    }

    /// Decides about a request that failed with `errno`, and keeps it where it is to be kept.
    pub(super) fn failed(&mut self, at: u32, errno: i32, now_ns: u64) -> Verdict {
        let (action, retry_for) = (self.policy.action(errno), self.policy.retry_for);
        if action == Action::Report {
            return Verdict::Report;
        }
        let copy = self.copy(at);
        if copy.failures == 0 {
            copy.first_failure_ns = now_ns;
        }
        if action == Action::Hold {
            copy.failures += 1;
            self.held.push(at);
            return Verdict::Hold;
        }
        let pause = ErrorPolicy::pause(copy.failures + 1).as_nanos() as u64;
        let due = now_ns.saturating_add(pause);
        let end = retry_for.map_or(u64::MAX, |limit| {
            copy.first_failure_ns.saturating_add(u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX))
        });
        if due > end {
            return Verdict::Report;
        }
        copy.failures = copy.failures.saturating_add(1);
        self.due.push(Reverse((due, at)));
        Verdict::Retry
    }

    /// Forgets a request that is over; lets go of its memory.
    #[inline]
    pub(super) fn forget(&mut self, at: u32) {
        if let Some(copy) = self.copies.get_mut(at as usize) {
            copy.pin = None;
            copy.failures = 0;
        }
    }

    /// When the next one is due.
    pub(super) fn next_due(&self) -> Option<u64> {
        self.due.peek().map(|&Reverse((due, _))| due)
    }

    /// The next one whose time has come.
    pub(super) fn take_due(&mut self, now_ns: u64) -> Option<u32> {
        if self.next_due()? > now_ns {
            return None;
        }
        self.due.pop().map(|Reverse((_, at))| at)
    }

    /// Moves those that `matches` out of their places and into `taken`.
    pub(super) fn take_matching(&mut self, taken: &mut Vec<u32>, matches: impl Fn(u32) -> bool) {
        let mut keeps = |at: u32| {
            let found = matches(at);
            taken.extend(found.then_some(at));
            !found
        };
        self.held.retain(|&at| keeps(at));
        self.due.retain(|&Reverse((_, at))| keeps(at));
    }
}

/// How a request that had failed ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Done = 0,
    Failed = 1,
    /// Not answered: it stays in the in-flight region, or its guest is gone.
    Left = 2,
}

/// A time of trouble of one disk: it begins with the first request that is kept and ends with the last one, whatever
/// worker has them. An operator is told twice, not once for each request and attempt.
#[derive(Debug, Default)]
pub(super) struct Episode {
    kept: AtomicU64,
    ends: [AtomicU64; 3],
    reopened: AtomicBool,
}

impl Episode {
    /// One more is kept. True for the first.
    pub(super) fn joined(&self) -> bool {
        let first = self.kept.fetch_add(1, Ordering::AcqRel) == 0;
        if first {
            self.reopened.store(false, Ordering::Release);
        }
        first
    }

    /// The operator has decided: the next request that is held is news again.
    pub(super) fn reopen(&self) {
        self.reopened.store(true, Ordering::Release);
    }

    /// Whether it was reopened since; true once.
    pub(super) fn was_reopened(&self) -> bool {
        self.reopened.swap(false, Ordering::AcqRel)
    }

    /// One is over. For the last one: how many ended how.
    pub(super) fn left(&self, end: End) -> Option<String> {
        self.ends[end as usize].fetch_add(1, Ordering::AcqRel);
        if self.kept.fetch_sub(1, Ordering::AcqRel) > 1 {
            return None;
        }
        let [done, failed, left] = [0, 1, 2].map(|at: usize| self.ends[at].swap(0, Ordering::AcqRel));
        Some(format!("{done} done, {failed} failed, {left} left unanswered"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const SECOND: u64 = 1_000_000_000;

    fn kept(on_error: Action, retry_for: Option<Duration>) -> Kept {
        Kept::new(ErrorPolicy { on_error, on_enospc: Action::Report, retry_for })
    }

    #[test]
    fn a_retried_request_comes_due_after_growing_pauses() {
        let mut kept = kept(Action::Retry, None);
        let mut now = SECOND;
        for pause in [100, 200, 400] {
            assert_eq!(kept.failed(2, libc::EIO, now), Verdict::Retry);
            assert_eq!(kept.next_due(), Some(now + pause * 1_000_000));
            assert_eq!(kept.take_due(now), None);
            now += pause * 1_000_000;
            assert_eq!(kept.take_due(now), Some(2));
        }
        kept.forget(2);
        assert_eq!(kept.failed(2, libc::EIO, now), Verdict::Retry);
        assert_eq!(kept.next_due(), Some(now + 100_000_000), "the slot's next request begins anew");
        assert_eq!(kept.failed(3, libc::ENOSPC, now), Verdict::Report);
    }

    #[test]
    fn a_request_is_answered_once_its_time_for_retries_is_over() {
        let mut kept = kept(Action::Retry, Some(Duration::from_secs(1)));
        assert_eq!(kept.failed(0, libc::EIO, SECOND), Verdict::Retry);
        assert_eq!(kept.failed(0, libc::EIO, SECOND * 3 / 2), Verdict::Retry);
        assert_eq!(kept.failed(0, libc::EIO, SECOND * 9 / 5), Verdict::Report, "the next attempt would come too late");
    }

    #[test]
    fn those_that_match_are_taken_wherever_they_wait() {
        let mut held = kept(Action::Hold, None);
        for at in 0..4 {
            assert_eq!(held.failed(at, libc::EIO, SECOND), Verdict::Hold);
        }
        let mut taken = Vec::new();
        held.take_matching(&mut taken, |at| at % 2 == 0);
        assert_eq!(taken, [0, 2]);
        let mut retried = kept(Action::Retry, None);
        for at in 0..4 {
            assert_eq!(retried.failed(at, libc::EIO, SECOND), Verdict::Retry);
        }
        taken.clear();
        retried.take_matching(&mut taken, |at| at == 3);
        assert_eq!(taken, [3]);
        assert_eq!(std::iter::from_fn(|| retried.take_due(u64::MAX)).count(), 3);
    }

    #[test]
    fn an_episode_has_one_beginning_and_one_end() {
        let episode = Episode::default();
        assert_eq!([episode.joined(), episode.joined(), episode.joined()], [true, false, false]);
        assert_eq!(episode.left(End::Done), None);
        assert_eq!(episode.left(End::Failed), None);
        assert_eq!(episode.left(End::Done).as_deref(), Some("2 done, 1 failed, 0 left unanswered"));
        assert!(episode.joined(), "the next one");
    }
}
