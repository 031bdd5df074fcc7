//! What a worker wants its session to know: rare things, off the request path.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, PoisonError};

use crate::sys::eventfd::EventFd;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// The driver broke a ring; it is not served until it is set up anew.
    RingBroken,
    /// The peer truncated a file of its memory.
    MemoryLost,
    /// An fdatasync failed: every FLUSH fails from now on.
    FlushFailed,
    /// Storage failed a request, which is kept until the operator decides; more may follow without an event.
    RequestHeld,
    /// Storage failed a request, which is tried again; more may follow without an event.
    RequestRetried,
    /// No request is kept any more.
    RequestsSettled,
    /// A worker ended by itself: its rings are dead.
    WorkerFailed,
}

/// One thing that happened.
#[derive(Clone, Debug)]
pub struct Event {
    /// What.
    pub kind: EventKind,
    /// The ring concerned.
    pub index: Option<u16>,
    /// In words.
    pub reason: String,
}

/// Events on their way to the session.
#[derive(Debug)]
pub struct Events {
    list: Mutex<Vec<Event>>,
    fd: EventFd,
}

impl Events {
    /// An empty list.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { list: Mutex::new(Vec::new()), fd: EventFd::new()? })
    }

    /// Adds an event.
    pub fn push(&self, kind: EventKind, index: Option<u16>, reason: String) {
        self.list.lock().unwrap_or_else(PoisonError::into_inner).push(Event { kind, index, reason });
        self.fd.signal();
    }

    /// Takes all events.
    pub fn take(&self) -> Vec<Event> {
        self.fd.drain();
        std::mem::take(&mut *self.list.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Readable while there are events.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
