//! How the owner reaches a worker: a list of commands, and a descriptor that wakes it.

use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError};

use super::served::{LogState, Served, Stopping};
use super::Reply;
use crate::memory::GuestMemory;
use crate::sys::sync::{AtomicBool, EventFd, Mutex, Ordering};

/// What an owner asks of a worker. Rings are named by the worker's own numbers.
#[derive(Debug)]
pub(super) enum Command {
    Start(u16, Box<Served>),
    Stop(u16, Stopping),
    Enable(u16, bool, Reply<()>),
    Kick(u16, Option<OwnedFd>),
    Call(u16, Option<OwnedFd>),
    Err(u16, Option<OwnedFd>),
    Memory(Arc<GuestMemory>, Reply<()>),
    /// Whoever waits for a ring to stop, or (`None`) for a change of memory, waits for no kept request any longer.
    FailKept(Option<u16>),
    Log(LogState, Reply<()>),
    LogUsed(u16, Option<u64>, Reply<()>),
    Exit,
}

/// One worker's commands.
#[derive(Debug)]
pub(super) struct Mailbox {
    list: Mutex<Vec<Command>>,
    waiting: AtomicBool,
    pub(super) wake: EventFd,
}

impl Mailbox {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self { list: Mutex::new(Vec::new()), waiting: AtomicBool::new(false), wake: EventFd::new()? })
    }

    /// Adds a command and wakes the worker. Commands are carried out in order.
    pub(super) fn post(&self, command: Command) {
        self.list.lock().unwrap_or_else(PoisonError::into_inner).push(command);
        self.waiting.store(true, Ordering::Release);
        self.wake.signal();
    }

    /// Wakes the worker without a command.
    pub(super) fn nudge(&self) {
        self.wake.signal();
    }

    /// Whether there are commands: one load, for the worker's loop.
    #[inline]
    pub(super) fn has_commands(&self) -> bool {
        self.waiting.load(Ordering::Acquire)
    }

    /// Takes all commands.
    pub(super) fn take(&self) -> Vec<Command> {
        self.waiting.store(false, Ordering::Release);
        std::mem::take(&mut *self.list.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
