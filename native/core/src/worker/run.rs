//! The worker's thread.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use super::mailbox::{Command, Mailbox};
use super::polling::Polling;
use super::served::{Kicks, LogState, Served};
use super::stats::now_ns;
use super::{Begun, EventKind, Events, Finished, Reply, Serve};
use crate::disk::Engine;
use crate::memory::{DirtyLog, GuestMemory};
use crate::ring::{Broken, Chain};
use crate::sys::eventfd::{self, PeerEvent};
use crate::sys::sigbus;

/// Chains taken from one ring before the next one has its turn: an endless refill starves nobody.
const BUDGET: usize = 128;
/// Likewise the bytes that are moved at once: somebody may wait for the worker meanwhile.
const BYTE_BUDGET: u64 = 4 << 20;
/// Looks at the rings between two looks at the clock.
const LOOKS: u32 = 16;
/// How often a ring without a kick descriptor is looked at when nothing else happens.
const POLL_INTERVAL: Duration = Duration::from_micros(100);
const MAILBOX: u32 = u32::MAX;

/// A thread's state. Everything in it is its own.
pub(super) struct Worker<S> {
    serve: S,
    rings: Vec<Option<Served>>,
    memory: Arc<GuestMemory>,
    /// Memory that takes the old one's place once nothing uses that, and who waits for it.
    next_memory: Option<(Arc<GuestMemory>, Reply<()>)>,
    log: LogState,
    /// A log that cannot note all that is under way: it takes the other's place once nothing is.
    next_log: Option<(LogState, Reply<()>)>,
    mailbox: Arc<Mailbox>,
    events: Arc<Events>,
    polling: Polling,
    /// The time as of the last busy pass, look-out or sleep.
    now_ns: u64,
    poisonings: u64,
    /// Whether somebody wants to know what comes.
    hints: bool,
    memory_lost: bool,
    leaving: bool,
    /// Somebody waits for a ring to stop.
    stopping: bool,
    /// Whoever waits for another memory or log has waited long enough for chains that storage failed.
    impatient: bool,
    chain: Chain,
    finished: Vec<Finished>,
    left: Vec<u16>,
    ready: Vec<u32>,
}

impl<S: Serve> Worker<S> {
    pub(super) fn new(serve: S, num_rings: usize, mailbox: Arc<Mailbox>, events: Arc<Events>, poll: Duration) -> Self {
        Self {
            serve,
            rings: (0..num_rings).map(|_| None).collect(),
            memory: Arc::default(),
            next_memory: None,
            log: LogState::default(),
            next_log: None,
            mailbox,
            events,
            polling: Polling::new(poll),
            now_ns: now_ns(),
            poisonings: sigbus::poisonings(),
            hints: false,
            memory_lost: false,
            leaving: false,
            stopping: false,
            impatient: false,
            chain: Chain::default(),
            finished: Vec::new(),
            left: Vec::new(),
            ready: Vec::new(),
        }
    }

    /// Runs until `Command::Exit` and until storage has answered everything.
    pub(super) fn run(mut self) -> std::io::Result<()> {
        use std::os::fd::AsRawFd;
        let wake = self.mailbox.wake.as_raw_fd();
        self.serve.engine().watch(wake, MAILBOX)?;
        self.hints = self.serve.wants_hints();
        loop {
            let busy = self.round()?;
            if self.leaving && self.serve.pending() == 0 {
                return Ok(());
            }
            if !busy && !self.look_out() && !self.enable_kicks() {
                self.sleep()?;
            }
        }
    }

    /// Looks at the rings for as long as it is worth while; true when there is something to do.
    fn look_out(&mut self) -> bool {
        // What storage has is waited for, not looked for: it takes long, and the wait ends with it.
        let window = self.polling.window_ns();
        if window == 0 || self.serve.pending() > 0 || self.waits_for_storage() || self.leaving || !self.serve.admits() {
            return false;
        }
        let until = self.now_ns + window;
        while self.now_ns < until {
            for _ in 0..LOOKS {
                if self.mailbox.has_commands() || self.rings.iter_mut().flatten().any(Served::has_chains) {
                    return true;
                }
                std::hint::spin_loop();
            }
            self.now_ns = now_ns();
        }
        false
    }

    /// What it takes for the time in the next round.
    #[cfg(feature = "count")]
    pub(super) fn set_time(&mut self, now_ns: u64) {
        self.now_ns = now_ns;
    }

    /// Commands, rings and storage once. True when there was anything for a ring.
    #[inline]
    pub(super) fn round(&mut self) -> std::io::Result<bool> {
        if self.mailbox.has_commands() {
            self.carry_out();
        }
        let busy = self.pass()?;
        self.settle();
        if busy {
            self.now_ns = now_ns();
        }
        Ok(busy)
    }

    /// Takes what the drivers made available, works off what storage has done. True when there was anything.
    fn pass(&mut self) -> std::io::Result<bool> {
        let mut busy = false;
        self.serve.start_batch(self.now_ns);
        if !self.waits_for_storage() && !self.leaving {
            for at in 0..self.rings.len() {
                busy |= self.take_from(at);
            }
        }
        self.serve.engine().kick()?;
        step!("submitted", if busy);
        self.serve.finish_batch(&mut self.finished);
        step!("reaped", if !self.finished.is_empty());
        self.give_up();
        busy |= !self.finished.is_empty();
        for finished in self.finished.drain(..) {
            if let Some(served) = &mut self.rings[usize::from(finished.ring)] {
                served.give_back(finished.head, &finished.outcome, &self.memory, &self.events);
                served.publish_early(&self.events);
            }
        }
        if busy {
            for served in self.rings.iter_mut().flatten() {
                served.publish(&self.events);
            }
            if let LogState { log: Some(_), notify: Some(notify), .. } = &self.log {
                // A full descriptor has been signalled already.
                let _ = eventfd::signal(notify.as_fd());
            }
        }
        let poisonings = sigbus::poisonings();
        if poisonings != self.poisonings || self.serve.memory_fault() {
            self.poisonings = poisonings;
            self.check_memory();
        }
        Ok(busy)
    }

    /// Gives up chains that storage failed and that are kept, where nobody waits for them (any longer).
    fn give_up(&mut self) {
        if self.impatient {
            self.serve.fail_kept(None, &mut self.finished);
        }
        let gone = self.leaving || self.memory_lost;
        if !gone && !self.stopping {
            return;
        }
        for at in 0..self.rings.len() {
            let Some(served) = &mut self.rings[at] else { continue };
            if gone || served.leaves() {
                self.serve.leave_kept(at as u16, &mut self.left);
                self.left.drain(..).for_each(|head| served.forget(head));
            } else if served.impatient {
                self.serve.fail_kept(Some(at as u16), &mut self.finished);
            }
        }
    }

    fn take_from(&mut self, at: usize) -> bool {
        let Some(served) = &mut self.rings[at] else { return false };
        if !served.runs() && !served.finishes() {
            return false;
        }
        let mut moved = 0;
        for taken in 0..BUDGET {
            if !served.runs() && !served.finishes() || !self.serve.admits() {
                return taken > 0;
            }
            match served.ring.take(&self.memory, &mut self.chain) {
                Ok(false) => return taken > 0,
                Err(broken) => {
                    served.break_ring(broken, &self.events);
                    return true;
                }
                Ok(true) => {}
            }
            if taken == 0 {
                if let Err(broken) = served.ring.suppress_kicks() {
                    served.break_ring(broken, &self.events);
                }
            }
            if self.hints {
                while let Some(header) = served.ring.upcoming(&self.memory) {
                    self.serve.hint(header);
                }
            }
            let head = self.chain.head;
            match self.serve.begin(at as u16, served.features, &mut self.chain, &self.memory) {
                Begun::Done(outcome) => {
                    moved += outcome.bytes;
                    served.give_back(head, &outcome, &self.memory, &self.events);
                    served.publish_early(&self.events);
                }
                Begun::Pending => served.taken(head, self.now_ns),
            }
            step!("begun");
            if moved > BYTE_BUDGET {
                break;
            }
        }
        true
    }

    /// A peer took memory away: its rings hold zeroes now. None is served until it is set up anew.
    fn check_memory(&mut self) {
        let tracking_lost = self.rings.iter().flatten().any(|served| served.ring.tracking_lost());
        if self.memory_lost || !(self.memory.check() || tracking_lost) {
            return;
        }
        self.memory_lost = true;
        for served in self.rings.iter_mut().flatten() {
            served.break_ring(Broken::Memory, &self.events);
        }
        self.events.push(EventKind::MemoryLost, None, "the front-end truncated a file of its memory".into());
    }

    fn carry_out(&mut self) {
        for command in self.mailbox.take() {
            match command {
                Command::Start(at, mut served, recovered) => {
                    served.set_log(&self.log, &self.events);
                    self.serve.ring_started(at, served.facts());
                    match recovered {
                        Ok(false) => {}
                        // Whoever served it before may have died just before it told the driver.
                        Ok(true) => served.notify(),
                        Err(broken) => served.break_ring(broken, &self.events),
                    }
                    self.rings[usize::from(at)] = Some(*served);
                    self.watch(at);
                }
                Command::Stop(at, stopping) => {
                    if let Some(served) = &mut self.rings[usize::from(at)] {
                        served.stopping = Some(stopping);
                    }
                }
                Command::Enable(at, enabled, reply) => {
                    if let Some(served) = &mut self.rings[usize::from(at)] {
                        served.enabled = enabled;
                    }
                    reply.send(());
                }
                Command::Kick(at, kick) => {
                    self.unwatch(at);
                    if let Some(served) = &mut self.rings[usize::from(at)] {
                        served.kick = kick;
                    }
                    self.watch(at);
                }
                Command::Call(at, call) => {
                    if let Some(served) = &mut self.rings[usize::from(at)] {
                        served.call = call.map(PeerEvent::new);
                        // What the old descriptor was told may not have arrived.
                        served.notify();
                    }
                }
                Command::Err(at, err) => {
                    if let Some(served) = &mut self.rings[usize::from(at)] {
                        served.err = err;
                    }
                }
                Command::Memory(memory, reply) => self.next_memory = Some((memory, reply)),
                Command::FailKept(None) => self.impatient = self.waits_for_storage(),
                Command::FailKept(Some(at)) => {
                    if let Some(served) = &mut self.rings[usize::from(at)] {
                        served.impatient = served.stopping.is_some();
                    }
                }
                Command::Log(log, reply) => {
                    // What storage writes into guest memory now is noted in the new log, when it has a bit for it.
                    let covers = |log: &DirtyLog| self.memory.regions().all(|r| log.covers(r.guest_addr, r.size));
                    if self.serve.pending() > 0 && log.data && !log.log.as_deref().is_none_or(covers) {
                        self.next_log = Some((log, reply));
                    } else {
                        self.set_log(log);
                        reply.send(());
                    }
                }
                Command::LogUsed(at, gpa, reply) => {
                    if let Some(served) = &mut self.rings[usize::from(at)] {
                        served.log_used = gpa;
                        served.set_log(&self.log, &self.events);
                    }
                    reply.send(());
                }
                Command::Exit => self.leaving = true,
            }
        }
        self.stopping = self.rings.iter().flatten().any(|served| served.stopping.is_some());
    }

    fn set_log(&mut self, log: LogState) {
        self.log = log;
        for served in self.rings.iter_mut().flatten() {
            served.set_log(&self.log, &self.events);
        }
    }

    /// Whether nothing is taken until storage has answered everything.
    fn waits_for_storage(&self) -> bool {
        self.next_memory.is_some() || self.next_log.is_some()
    }

    /// Gives up rings that have stopped.
    fn let_go(&mut self) {
        for at in 0..self.rings.len() {
            if self.rings[at].as_ref().is_some_and(Served::has_stopped) {
                self.unwatch(at as u16);
                if let Some(mut served) = self.rings[at].take() {
                    // The driver kicks whoever comes next.
                    let _ = served.ring.enable_kicks();
                    let (base, stopping) = (served.ring.base(), served.stopping.take());
                    // Whoever waited finds its descriptors closed and the memory let go.
                    drop(served);
                    if let Some(stopping) = stopping {
                        stopping.reply.send(base);
                    }
                }
            }
        }
        self.stopping = self.rings.iter().flatten().any(|served| served.stopping.is_some());
    }

    /// Answers who waits for operations to end: a stopping ring, a change of memory.
    fn settle(&mut self) {
        if self.stopping {
            self.let_go();
        }
        if self.next_memory.is_some() && self.serve.pending() == 0 {
            let Some((memory, reply)) = self.next_memory.take() else { return };
            self.memory = memory;
            self.memory_lost = false;
            for served in self.rings.iter_mut().flatten() {
                if served.ring.relocate(&self.memory).is_err() {
                    served.break_ring(Broken::Memory, &self.events);
                }
            }
            reply.send(());
        }
        if self.next_log.is_some() && self.serve.pending() == 0 {
            let Some((log, reply)) = self.next_log.take() else { return };
            self.set_log(log);
            reply.send(());
        }
        self.impatient &= self.waits_for_storage();
    }

    /// Asks for kicks and looks once more; true when something came.
    fn enable_kicks(&mut self) -> bool {
        // While the rate limit allows nothing, chains stay where they are, and nobody needs to tell of more.
        if self.waits_for_storage() || !self.serve.admits() {
            return false;
        }
        let mut more = false;
        for served in self.rings.iter_mut().flatten() {
            if served.runs() {
                match served.ring.enable_kicks() {
                    Ok(available) => more |= available,
                    Err(broken) => {
                        served.break_ring(broken, &self.events);
                        more = true;
                    }
                }
            }
        }
        more
    }

    fn sleep(&mut self) -> std::io::Result<()> {
        let polls = self.rings.iter().flatten().any(Served::polled).then_some(POLL_INTERVAL);
        let timeout = [polls, self.serve.patience()].into_iter().flatten().min();
        self.ready.clear();
        let (idle, since) = (self.serve.pending() == 0, now_ns());
        self.serve.engine().wait(timeout, &mut self.ready)?;
        self.now_ns = now_ns();
        if idle {
            self.polling.slept(self.now_ns - since);
        }
        for &token in &self.ready {
            if token == MAILBOX {
                self.mailbox.wake.drain();
            } else if let Some(served) = &mut self.rings[token as usize] {
                if !served.drain_kick() {
                    self.serve.engine().unwatch(token);
                    served.kicks = Kicks::Silent;
                }
            }
        }
        Ok(())
    }

    fn watch(&mut self, at: u16) {
        if let Some(served) = &mut self.rings[usize::from(at)] {
            if let Some(kick) = served.kick_fd() {
                // What cannot be watched is polled.
                if self.serve.engine().watch(kick, u32::from(at)).is_ok() {
                    served.kicks = Kicks::Watched;
                }
            }
        }
    }

    fn unwatch(&mut self, at: u16) {
        if let Some(served) = &mut self.rings[usize::from(at)] {
            if std::mem::replace(&mut served.kicks, Kicks::Polled) == Kicks::Watched {
                self.serve.engine().unwatch(u32::from(at));
            }
        }
    }
}
