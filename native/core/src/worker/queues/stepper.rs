//! One ring and its worker without a thread: its owner steps it, so that what a request costs can be counted.

use std::io;
use std::sync::mpsc::sync_channel;
use std::sync::Arc;
use std::time::Duration;

use super::{Notifiers, QueueError, Queues, Waker, WorkerHandle};
use crate::memory::GuestMemory;
use crate::ring::RingSetup;
use crate::worker::mailbox::{Command, Mailbox};
use crate::worker::run::Worker;
use crate::worker::{now_ns, Events, Reply, Serve};

const STEP_NS: u64 = 1000;

/// A worker that runs when it is told to, on the caller's thread, over one ring.
pub struct Stepper<S> {
    queues: Queues,
    worker: Worker<S>,
    /// What the worker takes for the time: a microsecond a step, so that what depends on it is the same in every run.
    now_ns: u64,
}

impl<S: Serve> Stepper<S> {
    /// A worker over `memory` for the device type that `make` makes. It never sleeps, so a waker wakes nobody.
    pub fn new(
        memory: Arc<GuestMemory>,
        events: Arc<Events>,
        make: impl FnOnce(Waker) -> io::Result<S>,
    ) -> io::Result<Self> {
        let mailbox = Arc::new(Mailbox::new()?);
        let serve = make(Waker(Arc::clone(&mailbox)))?;
        let worker = Worker::new(serve, 1, Arc::clone(&mailbox), Arc::clone(&events), Duration::ZERO);
        // Nobody waits for the answer: the worker is this thread, and has the memory after its first step.
        let (answer, _) = sync_channel(1);
        mailbox.post(Command::Memory(Arc::clone(&memory), Reply(answer)));
        let mut queues = Queues::without_workers(1, events);
        queues.memory = memory;
        let (_, ended) = sync_channel(1);
        queues.workers.push(WorkerHandle { mailbox, thread: None, ended });
        Ok(Self { queues, worker, now_ns: now_ns() })
    }

    /// Starts the ring. The worker takes its first chains in the second step after that.
    pub fn start(&mut self, setup: RingSetup, notifiers: Notifiers) -> Result<(), QueueError> {
        self.queues.start(0, setup, true, notifiers, None)
    }

    /// What a worker does between two looks at whether it should rest. True when there was anything for the ring.
    pub fn step(&mut self) -> io::Result<bool> {
        self.now_ns += STEP_NS;
        self.worker.set_time(self.now_ns);
        self.worker.round()
    }
}
