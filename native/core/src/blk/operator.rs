//! How an operator's decisions about kept requests reach the worker that has them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{sync_channel, Receiver, SyncSender};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::worker::Waker;

/// What an operator decides about a request that storage failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Submit it again, now.
    Retry,
    /// Answer it with its error.
    Fail,
}

/// A decision on its way.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) decision: Decision,
    /// The device's queue, and the head; `None`: all.
    pub(super) which: Option<(u16, u16)>,
    reply: SyncSender<u64>,
}

impl Order {
    /// Says for how many requests it was carried out.
    pub(super) fn done(self, count: u64) {
        // Whoever asked may have stopped waiting.
        let _ = self.reply.send(count);
    }
}

/// Where one worker finds its orders.
#[derive(Debug)]
pub(super) struct Desk {
    /// `None` once the worker has ended.
    orders: Mutex<Option<Vec<Order>>>,
    waiting: AtomicBool,
    waker: Waker,
}

impl Desk {
    pub(super) fn new(waker: Waker) -> Self {
        Self { orders: Mutex::new(Some(Vec::new())), waiting: AtomicBool::new(false), waker }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Vec<Order>>> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Posts an order. The answer is how many requests it concerned; none comes from a worker that has ended.
    pub(super) fn order(&self, decision: Decision, which: Option<(u16, u16)>) -> Receiver<u64> {
        let (reply, answer) = sync_channel(1);
        if let Some(orders) = &mut *self.lock() {
            orders.push(Order { decision, which, reply });
            self.waiting.store(true, Ordering::Release);
        }
        self.wake();
        answer
    }

    /// Makes the worker look.
    pub(super) fn wake(&self) {
        self.waker.wake();
    }

    /// Takes the orders, one load when there are none.
    #[inline]
    pub(super) fn take(&self) -> Vec<Order> {
        if !self.waiting.load(Ordering::Acquire) {
            return Vec::new();
        }
        let mut orders = self.lock();
        self.waiting.store(false, Ordering::Release);
        orders.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Refuses orders from now on.
    pub(super) fn close(&self) {
        *self.lock() = None;
    }
}
