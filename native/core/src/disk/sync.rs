//! Files by plain system calls, on a few threads: for where io_uring is refused, and to compare it with.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::inline::Inline;
use super::pool::Pool;
use super::transfer::{Step, Target, Transfer};
use super::{Completion, Engine, Kind, Operation};
use crate::memory::IoVec;
use crate::sys::poll::PollSet;

/// Threads of one engine.
const THREADS: usize = 4;

/// One worker's way to a file or block device, without io_uring.
#[derive(Debug)]
pub struct SyncEngine {
    target: Arc<Target>,
    pool: Pool,
    polls: PollSet,
    pending: usize,
    inline: Inline,
    /// Given back by the pool; empty between calls.
    ended: Vec<Transfer>,
}

impl SyncEngine {
    pub(super) fn new(target: Arc<Target>) -> io::Result<Self> {
        let pool = Pool::new(Arc::clone(&target), THREADS)?;
        let mut polls = PollSet::default();
        polls.watch(pool.event(), None)?;
        Ok(Self { inline: Inline::new(&target), target, pool, polls, pending: 0, ended: Vec::new() })
    }
}

impl Drop for SyncEngine {
    fn drop(&mut self) {
        self.inline.ends(&self.target);
    }
}

impl Engine for SyncEngine {
    fn inline(&self) -> bool {
        false
    }

    #[inline]
    fn move_now(&mut self, kind: Kind, offset: u64, durable: bool, runs: &[IoVec]) -> bool {
        self.inline.move_now(&self.target, kind, offset, durable, runs)
    }

    fn wants_hints(&self) -> bool {
        self.target.map.is_some()
    }

    #[inline]
    fn hint(&mut self, offset: u64) {
        self.inline.hint(&self.target, offset);
    }

    fn tick(&mut self, now_ns: u64) {
        self.inline.tick(now_ns);
    }

    fn submit(&mut self, operation: Operation) -> Option<Completion> {
        let mut transfer = Transfer::new(operation, &self.target);
        if let Step::End(result) = transfer.step() {
            return Some(transfer.complete(result));
        }
        self.pending += 1;
        self.pool.push(transfer);
        None
    }

    fn kick(&mut self) -> io::Result<()> {
        self.pool.kick();
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.pool.take(&mut self.ended);
        self.pending -= self.ended.len();
        for mut transfer in self.ended.drain(..) {
            let result = transfer.result();
            done.push(transfer.complete(result));
        }
    }

    fn pending(&self) -> usize {
        self.pending
    }

    fn watch(&mut self, fd: libc::c_int, token: u32) -> io::Result<()> {
        self.polls.watch(fd, Some(token))
    }

    fn unwatch(&mut self, token: u32) {
        self.polls.unwatch(token);
    }

    fn wait(&mut self, timeout: Option<Duration>, ready: &mut Vec<u32>) -> io::Result<()> {
        self.inline.sleeps(&self.target);
        self.pool.kick();
        self.polls.wait(timeout, ready)
    }
}
