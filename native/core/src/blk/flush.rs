//! One fdatasync of a disk at a time, whoever asks.
//!
//! The kernel reports a failed write-back once per open file: of two fdatasyncs that run together one
//! hears of it, the other hears success. So they take turns, and the failure is marked before the next one runs.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::worker::Waker;

#[derive(Debug, Default)]
struct Turn {
    taken: bool,
    waiting: Vec<Waker>,
}

/// Whose turn it is to flush a disk. Held for as long as the fdatasync takes; its lock for some instructions.
#[derive(Debug, Default)]
pub(super) struct FlushGate {
    turn: Mutex<Turn>,
    freed: Condvar,
}

impl FlushGate {
    fn turn(&self) -> MutexGuard<'_, Turn> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the turn. When somebody has it, `waker` is woken once it is free: ask again then.
    pub(super) fn try_take(&self, waker: &Waker) -> bool {
        let mut turn = self.turn();
        if turn.taken {
            turn.waiting.push(waker.clone());
            return false;
        }
        turn.taken = true;
        true
    }

    /// Takes the turn, waiting for it; false when `timeout` passed. Not for workers.
    pub(super) fn take(&self, timeout: Duration) -> bool {
        let waited = self.freed.wait_timeout_while(self.turn(), timeout, |turn| turn.taken);
        let (mut turn, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !std::mem::replace(&mut turn.taken, true)
    }

    /// Gives the turn back.
    pub(super) fn give_back(&self) {
        let waiting = {
            let mut turn = self.turn();
            turn.taken = false;
            std::mem::take(&mut turn.waiting)
        };
        self.freed.notify_one();
        waiting.iter().for_each(Waker::wake);
    }
}
