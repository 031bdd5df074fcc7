//! The owner's side of a device's rings: set up, start, stop, change memory.

#[cfg(feature = "count")]
mod stepper;

use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::mpsc::{sync_channel, Receiver, RecvTimeoutError};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::mailbox::{Command, Mailbox};
use super::run::Worker;
use super::served::{Kicks, LogState, Served, StopMode, Stopping};
use super::{Events, QueueStats, Reply, Serve};
use crate::memory::{DirtyLog, GuestMemory, InflightRegion};
use crate::ring::{feature, layout, DeviceRing, RingSetup, SetupError};
use crate::sys::eventfd::{classify, FdKind, PeerEvent};
use crate::sys::thread;

#[cfg(feature = "count")]
pub use stepper::Stepper;

/// A worker never blocks on storage, so it answers soon what needs none; the limit is for one that is lost.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// Why an owner's call failed.
#[derive(Debug)]
pub enum QueueError {
    /// Refused; nothing was changed.
    Setup(SetupError),
    /// Storage did not answer in time. What was asked for still happens when it does.
    DrainTimeout,
    /// A worker ended by itself; its rings are dead.
    WorkerGone,
}

impl fmt::Display for QueueError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Setup(error) => error.fmt(f),
            Self::DrainTimeout => f.write_str("storage did not answer within the time limit"),
            Self::WorkerGone => f.write_str("the queue worker has ended"),
        }
    }
}

impl From<SetupError> for QueueError {
    fn from(error: SetupError) -> Self {
        Self::Setup(error)
    }
}

fn refuse<T>(why: impl Into<String>) -> Result<T, QueueError> {
    Err(QueueError::Setup(SetupError::Other(why.into())))
}

/// How long workers may take to answer kept chains with their errors: they do it at once, when storage does not hang.
const FAIL_KEPT_TIME: Duration = Duration::from_secs(1);
/// How long a worker may be silent before it is interrupted.
const SILENCE: Duration = Duration::from_millis(200);

/// A ring's descriptors, all optional.
#[derive(Debug, Default)]
pub struct Notifiers {
    /// The driver's kicks; without it the ring is polled.
    pub kick: Option<OwnedFd>,
    /// Our notifications.
    pub call: Option<OwnedFd>,
    /// Signalled when the ring breaks.
    pub err: Option<OwnedFd>,
}

/// Wakes one worker from any thread.
#[derive(Clone, Debug)]
pub struct Waker(Arc<Mailbox>);

impl Waker {
    /// Makes the worker look at its `Serve`.
    pub fn wake(&self) {
        self.0.nudge();
    }

    /// Whether both wake the same worker.
    pub fn same_as(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

#[derive(Debug)]
struct WorkerHandle {
    mailbox: Arc<Mailbox>,
    thread: Option<JoinHandle<()>>,
    ended: Receiver<()>,
}

impl WorkerHandle {
    /// Waits for an answer of this worker.
    ///
    /// It sleeps nowhere but at its wait point, with one exception: a peer that fills its own eventfd between our look
    /// at it and our write, or that changes its mind about whether writes to it wait, has the write wait for as long as it
    /// likes. Who waits here ends that.
    fn wait<T>(&self, receiver: &Receiver<T>, deadline: Instant) -> Result<T, QueueError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match receiver.recv_timeout(left.min(SILENCE)) {
                Ok(answer) => return Ok(answer),
                Err(RecvTimeoutError::Disconnected) => return Err(QueueError::WorkerGone),
                Err(RecvTimeoutError::Timeout) if left <= SILENCE => return Err(QueueError::DrainTimeout),
                Err(RecvTimeoutError::Timeout) => self.thread.iter().for_each(thread::interrupt),
            }
        }
    }
}

/// All rings of one device and the workers that serve them. One thread at a time, the session's.
#[derive(Debug)]
pub struct Queues {
    workers: Vec<WorkerHandle>,
    started: Vec<bool>,
    stats: Vec<Arc<QueueStats>>,
    memory: Arc<GuestMemory>,
    log: LogState,
    /// Where the dirty log notes each used ring.
    log_used: Vec<Option<u64>>,
    used_len: Vec<u64>,
    events: Arc<Events>,
    closed: bool,
}

impl Queues {
    /// Starts the workers; ring `i` is served by worker `i % num_workers`. `make` runs on each worker's own
    /// thread. An idle worker looks for `poll` before it sleeps.
    pub fn new<S, F>(
        num_queues: u16,
        num_workers: u16,
        poll: Duration,
        events: Arc<Events>,
        make: F,
    ) -> std::io::Result<Self>
    where
        S: Serve + 'static,
        F: Fn(usize, Waker) -> std::io::Result<S> + Send + Sync + 'static,
    {
        let make = Arc::new(make);
        let mut queues = Self::without_workers(num_queues, events);
        for number in 0..usize::from(num_workers.max(1)) {
            let mailbox = Arc::new(Mailbox::new()?);
            let (ready, is_ready) = sync_channel(1);
            let (end, ended) = sync_channel(1);
            let num_rings = usize::from(num_queues).div_ceil(usize::from(num_workers.max(1)));
            let (make, inbox, events) = (Arc::clone(&make), Arc::clone(&mailbox), Arc::clone(&queues.events));
            let thread = thread::spawn(&format!("vhost-queue-{number}"), move || {
                match make(number, Waker(Arc::clone(&inbox))) {
                    Ok(serve) => {
                        let _ = ready.send(Ok(()));
                        if let Err(error) = Worker::new(serve, num_rings, inbox, Arc::clone(&events), poll).run() {
                            events.push(super::EventKind::WorkerFailed, None, error.to_string());
                        }
                    }
                    Err(error) => {
                        let _ = ready.send(Err(error));
                    }
                }
                let _ = end.send(());
            })?;
            queues.workers.push(WorkerHandle { mailbox, thread: Some(thread), ended });
            is_ready.recv().map_err(|_| std::io::Error::other("the queue worker ended while starting"))??;
        }
        Ok(queues)
    }

    fn without_workers(num_queues: u16, events: Arc<Events>) -> Self {
        Self {
            workers: Vec::new(),
            started: vec![false; usize::from(num_queues)],
            stats: (0..num_queues).map(|_| Arc::default()).collect(),
            memory: Arc::default(),
            log: LogState::default(),
            log_used: vec![None; usize::from(num_queues)],
            used_len: vec![0; usize::from(num_queues)],
            events,
            closed: false,
        }
    }

    /// How many rings there are.
    pub fn num_queues(&self) -> usize {
        self.started.len()
    }

    /// What the workers have to say.
    pub fn events(&self) -> &Arc<Events> {
        &self.events
    }

    /// The counters of each queue.
    pub fn stats(&self) -> &[Arc<QueueStats>] {
        &self.stats
    }

    /// Whether ring `index` was started and not stopped.
    pub fn is_started(&self, index: u16) -> bool {
        self.started.get(usize::from(index)).copied().unwrap_or(false)
    }

    fn place(&self, index: u16) -> Result<(&WorkerHandle, u16), QueueError> {
        if self.closed {
            return refuse("the queues are closed");
        }
        if usize::from(index) >= self.started.len() {
            return refuse(format!("there is no queue {index}; the device has {}", self.started.len()));
        }
        let workers = self.workers.len();
        let worker = &self.workers[usize::from(index) % workers];
        Ok((worker, (usize::from(index) / workers) as u16))
    }

    fn started_place(&self, index: u16) -> Result<(&WorkerHandle, u16), QueueError> {
        let place = self.place(index)?;
        if !self.started[usize::from(index)] {
            return refuse(format!("queue {index} is not started"));
        }
        Ok(place)
    }

    /// Changes the memory under all rings; waits until nothing uses the old one. Chains that storage failed and that are
    /// kept for another attempt are answered with an error when `timeout` has passed.
    pub fn set_memory(&mut self, memory: Arc<GuestMemory>, timeout: Duration) -> Result<(), QueueError> {
        if self.closed {
            return refuse("the queues are closed");
        }
        let deadline = Instant::now() + timeout;
        let mut waits = Vec::new();
        for worker in &self.workers {
            let (sender, receiver) = sync_channel(1);
            worker.mailbox.post(Command::Memory(Arc::clone(&memory), Reply(sender)));
            waits.push(receiver);
        }
        self.memory = memory;
        self.wait_for_storage(&waits, deadline)
    }

    /// Waits until every worker has answered, and for chains that are kept until `deadline` only.
    fn wait_for_storage(&self, waits: &[Receiver<()>], deadline: Instant) -> Result<(), QueueError> {
        for (worker, receiver) in self.workers.iter().zip(waits) {
            match worker.wait(receiver, deadline) {
                Err(QueueError::DrainTimeout) if self.stats.iter().any(|stats| stats.keeps()) => {
                    worker.mailbox.post(Command::FailKept(None));
                    worker.wait(receiver, deadline + FAIL_KEPT_TIME)?;
                }
                other => other?,
            }
        }
        Ok(())
    }

    /// Notes what the device writes in `log` from now on: data and status bytes where `data` says so, used rings where
    /// `set_log_used` has told their guest addresses. When this returns nothing more goes into the log before.
    /// `notify` is signalled after something was noted. Waits, as `set_memory` does, where `log` has no bits for pages
    /// that storage may write.
    pub fn set_log(
        &mut self,
        log: Option<Arc<DirtyLog>>,
        data: bool,
        notify: Option<OwnedFd>,
        timeout: Duration,
    ) -> Result<(), QueueError> {
        if let Some(fd) = &notify {
            check_notifier(std::os::fd::AsFd::as_fd(fd))?;
        }
        if self.closed {
            return refuse("the queues are closed");
        }
        for index in (0..self.started.len()).filter(|&index| self.started[index]) {
            check_log(log.as_deref(), self.log_used[index], self.used_len[index])?;
        }
        self.log = LogState { log, data, notify: notify.map(Arc::new) };
        let deadline = Instant::now() + timeout;
        let mut waits = Vec::new();
        for worker in &self.workers {
            let (sender, receiver) = sync_channel(1);
            worker.mailbox.post(Command::Log(self.log.clone(), Reply(sender)));
            waits.push(receiver);
        }
        self.wait_for_storage(&waits, deadline)
    }

    /// Where the used ring of queue `index` is for the dirty log; `None`: it is not noted. For a ring that runs and for
    /// one that is yet to start.
    pub fn set_log_used(&mut self, index: u16, used: Option<u64>) -> Result<(), QueueError> {
        let (worker, at) = self.place(index)?;
        let queue = usize::from(index);
        if self.started[queue] {
            check_log(self.log.log.as_deref(), used, self.used_len[queue])?;
            let (sender, receiver) = sync_channel(1);
            worker.mailbox.post(Command::LogUsed(at, used, Reply(sender)));
            worker.wait(&receiver, Instant::now() + ANSWER_LIMIT)?;
        }
        self.log_used[queue] = used;
        Ok(())
    }

    /// Starts a ring: looked at once at once.
    ///
    /// With an in-flight region it goes on where a predecessor stopped, whatever the base of `setup`; when that region
    /// belongs to another ring it starts broken.
    pub fn start(
        &mut self,
        index: u16,
        setup: RingSetup,
        enabled: bool,
        notifiers: Notifiers,
        inflight: Option<&InflightRegion>,
    ) -> Result<(), QueueError> {
        let (worker, at) = self.place(index)?;
        if self.started[usize::from(index)] {
            return refuse(format!("queue {index} is started already"));
        }
        check_notifiers(&notifiers)?;
        let mut ring = DeviceRing::new(setup, &self.memory)?;
        let used_len = layout::used_len(setup.size, setup.features & feature::EVENT_IDX != 0) as u64;
        let log_used = self.log_used[usize::from(index)];
        check_log(self.log.log.as_deref(), log_used, used_len)?;
        let part = inflight.map(|region| region.queue(index, setup.size)).transpose();
        let part = part.map_err(|error| SetupError::Other(error.to_string()))?;
        let recovered = part.map_or(Ok(false), |part| ring.track(part));
        let stats = Arc::clone(&self.stats[usize::from(index)]);
        let Notifiers { kick, call, err } = notifiers;
        let served = Served {
            index,
            ring,
            features: setup.features,
            enabled,
            broken: false,
            stopping: None,
            impatient: false,
            kick,
            call: call.map(PeerEvent::new),
            err,
            kicks: Kicks::Polled,
            in_flight: stats.restart(setup.size),
            log_used,
            stats,
        };
        worker.mailbox.post(Command::Start(at, Box::new(served), recovered));
        self.started[usize::from(index)] = true;
        self.used_len[usize::from(index)] = used_len;
        Ok(())
    }

    /// Stops a ring and returns its next available index, once every taken chain is used or left, as `mode` says.
    ///
    /// Chains that storage failed and that are kept for another attempt are waited for until `kept_timeout`, and
    /// answered with an error then.
    pub fn stop(
        &mut self,
        index: u16,
        mode: StopMode,
        timeout: Duration,
        kept_timeout: Duration,
    ) -> Result<u16, QueueError> {
        let (worker, at) = self.started_place(index)?;
        let (sender, receiver) = sync_channel(1);
        let deadline = Instant::now() + timeout;
        let kept_deadline = deadline.min(Instant::now() + kept_timeout);
        worker.mailbox.post(Command::Stop(at, Stopping { mode, reply: Reply(sender) }));
        let base = match worker.wait(&receiver, kept_deadline) {
            Err(QueueError::DrainTimeout) => {
                worker.mailbox.post(Command::FailKept(Some(at)));
                let grace = if self.stats[usize::from(index)].keeps() { FAIL_KEPT_TIME } else { Duration::ZERO };
                worker.wait(&receiver, deadline.max(kept_deadline + grace))?
            }
            other => other?,
        };
        self.started[usize::from(index)] = false;
        Ok(base)
    }

    /// Lets a ring run or rest; waits for the worker to have heard it, not for operations.
    pub fn enable(&mut self, index: u16, enabled: bool) -> Result<(), QueueError> {
        let (worker, at) = self.started_place(index)?;
        let (sender, receiver) = sync_channel(1);
        worker.mailbox.post(Command::Enable(at, enabled, Reply(sender)));
        worker.wait(&receiver, Instant::now() + ANSWER_LIMIT)
    }

    /// Replaces a descriptor of a started ring, without waiting.
    pub fn set_kick(&mut self, index: u16, fd: Option<OwnedFd>) -> Result<(), QueueError> {
        self.replace(index, fd, Command::Kick)
    }

    /// Replaces a descriptor of a started ring, without waiting; the new one is signalled once.
    pub fn set_call(&mut self, index: u16, fd: Option<OwnedFd>) -> Result<(), QueueError> {
        self.replace(index, fd, Command::Call)
    }

    /// Replaces a descriptor of a started ring, without waiting.
    pub fn set_err(&mut self, index: u16, fd: Option<OwnedFd>) -> Result<(), QueueError> {
        self.replace(index, fd, Command::Err)
    }

    fn replace(
        &mut self,
        index: u16,
        fd: Option<OwnedFd>,
        command: fn(u16, Option<OwnedFd>) -> Command,
    ) -> Result<(), QueueError> {
        let (worker, at) = self.started_place(index)?;
        if let Some(fd) = &fd {
            check_notifier(std::os::fd::AsFd::as_fd(fd))?;
        }
        worker.mailbox.post(command(at, fd));
        Ok(())
    }

    /// Ends the workers once storage has answered. Rings are not stopped in order: nobody waits for their bases.
    pub fn close(&mut self, timeout: Duration) -> Result<(), QueueError> {
        self.leave();
        let deadline = Instant::now() + timeout;
        for worker in &mut self.workers {
            if worker.thread.is_some() {
                if let Err(QueueError::DrainTimeout) = worker.wait(&worker.ended, deadline) {
                    return Err(QueueError::DrainTimeout);
                }
            }
            if let Some(thread) = worker.thread.take() {
                let _ = thread.join();
            }
        }
        Ok(())
    }

    fn leave(&mut self) {
        if !self.closed {
            self.closed = true;
            self.workers.iter().for_each(|worker| worker.mailbox.post(Command::Exit));
        }
    }
}

impl Drop for Queues {
    fn drop(&mut self) {
        // The threads end by themselves when storage has answered; they own all they use.
        self.leave();
    }
}

/// A used ring without bits in the log could not be noted.
fn check_log(log: Option<&DirtyLog>, used: Option<u64>, len: u64) -> Result<(), QueueError> {
    match (log, used) {
        (Some(log), Some(used)) if !log.covers(used, len) => {
            refuse(format!("the dirty log ends before the used ring at guest address {used:#x}"))
        }
        _ => Ok(()),
    }
}

fn check_notifiers(notifiers: &Notifiers) -> Result<(), QueueError> {
    let all = [&notifiers.kick, &notifiers.call, &notifiers.err];
    all.into_iter().flatten().try_for_each(|fd| check_notifier(std::os::fd::AsFd::as_fd(fd)))
}

/// Only what can be waited for and never makes a worker spin: a file is readable for ever.
fn check_notifier(fd: BorrowedFd<'_>) -> Result<(), QueueError> {
    match classify(fd) {
        Ok(FdKind::EventFd | FdKind::Pipe | FdKind::Socket) => Ok(()),
        Ok(FdKind::Other) => refuse("a notification descriptor is neither an eventfd, a pipe nor a socket"),
        Err(error) => refuse(format!("a notification descriptor cannot be used: {error}")),
    }
}
