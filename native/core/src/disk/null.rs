//! No storage: what a queue costs by itself, for measurements.

use std::io;
use std::time::Duration;

use super::{Completion, Engine, Kind, Operation};
use crate::memory::IoVec;
use crate::sys::poll::PollSet;

/// An engine for which everything succeeds at once and reads leave the buffers as they are.
#[derive(Debug, Default)]
pub struct NullEngine {
    polls: PollSet,
}

impl Engine for NullEngine {
    fn inline(&self) -> bool {
        true
    }

    #[inline]
    fn move_now(&mut self, _kind: Kind, _offset: u64, _durable: bool, _runs: &[IoVec]) -> bool {
        true
    }

    #[inline]
    fn submit(&mut self, operation: Operation) -> Option<Completion> {
        Some(Completion::of(operation, Ok(())))
    }

    fn kick(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self, _done: &mut Vec<Completion>) {}

    fn pending(&self) -> usize {
        0
    }

    fn watch(&mut self, fd: libc::c_int, token: u32) -> io::Result<()> {
        self.polls.watch(fd, Some(token))
    }

    fn unwatch(&mut self, token: u32) {
        self.polls.unwatch(token);
    }

    fn wait(&mut self, timeout: Option<Duration>, ready: &mut Vec<u32>) -> io::Result<()> {
        self.polls.wait(timeout, ready)
    }
}
