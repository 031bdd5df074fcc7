//! How the owner reaches a worker: a list of commands, and a descriptor that wakes it.

use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError};

use super::served::{LogState, Served, Stopping};
use super::Reply;
use crate::memory::GuestMemory;
use crate::ring::Broken;
use crate::sys::sync::{AtomicBool, EventFd, Mutex, Ordering};

/// What an owner asks of a worker. Rings are named by the worker's own numbers.
#[derive(Debug)]
pub(super) enum Command {
    /// With what was found in its in-flight region: whether it goes on where a predecessor stopped.
    Start(u16, Box<Served>, Result<bool, Broken>),
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

impl Command {
    fn gives_way_to(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Kick(at, _), Self::Kick(other, _))
            | (Self::Call(at, _), Self::Call(other, _))
            | (Self::Err(at, _), Self::Err(other, _)) => at == other,
            _ => false,
        }
    }
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
    ///
    /// A descriptor that nobody has begun to use yet gives way to the one that replaces it: a peer that replaces its
    /// own faster than the worker looks would have us keep them all.
    pub(super) fn post(&self, command: Command) {
        let mut replaced = None;
        {
            let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(place) = list.iter().position(|waiting| waiting.gives_way_to(&command)) {
                replaced = Some(list.remove(place));
            }
            list.push(command);
        }
        // Closed without the lock.
        drop(replaced);
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

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::sys::fd::duplicate;

    #[test]
    fn descriptors_that_are_replaced_before_they_are_used_are_not_kept() {
        use std::os::fd::AsRawFd;
        let mailbox = Mailbox::new().unwrap();
        let fresh = || Some(duplicate(mailbox.wake.as_raw_fd()).unwrap());
        mailbox.post(Command::Call(0, fresh()));
        mailbox.post(Command::Call(1, fresh()));
        for _ in 0..10_000 {
            mailbox.post(Command::Kick(0, fresh()));
            mailbox.post(Command::Call(0, fresh()));
            mailbox.post(Command::Err(0, fresh()));
        }
        mailbox.post(Command::Call(0, None));
        let left = mailbox.take();
        let kinds: Vec<_> = left
            .iter()
            .map(|command| match command {
                Command::Kick(at, fd) => ("kick", *at, fd.is_some()),
                Command::Call(at, fd) => ("call", *at, fd.is_some()),
                Command::Err(at, fd) => ("err", *at, fd.is_some()),
                other => panic!("{other:?} was not posted"),
            })
            .collect();
        assert_eq!(kinds, [("call", 1, true), ("kick", 0, true), ("err", 0, true), ("call", 0, false)]);
    }
}
