//! One fdatasync of a disk at a time, whoever asks.
//!
//! The kernel reports a failed write-back once per open file: of two fdatasyncs that run together one
//! hears of it, the other hears success. So they take turns, and the failure is marked before the next one runs.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::worker::Waker;

#[derive(Debug, Default)]
struct Turn {
    taken: bool,
    waiting: Vec<Waker>,
}

/// Whose turn it is to flush a disk. Held for as long as the fdatasync takes; its lock for some instructions.
#[derive(Debug, Default)]
pub(super) struct FlushGate(Mutex<Turn>);

impl FlushGate {
    fn turn(&self) -> MutexGuard<'_, Turn> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the turn. When somebody has it, `waker` is woken once it is free: ask again then.
    pub(super) fn try_take(&self, waker: &Waker) -> bool {
        let mut turn = self.turn();
        if turn.taken {
            if !turn.waiting.iter().any(|other| other.same_as(waker)) {
                turn.waiting.push(waker.clone());
            }
            return false;
        }
        turn.taken = true;
        true
    }

    /// Gives the turn back.
    pub(super) fn give_back(&self) {
        let waiting = {
            let mut turn = self.turn();
            turn.taken = false;
            std::mem::take(&mut turn.waiting)
        };
        waiting.iter().for_each(Waker::wake);
    }
}
