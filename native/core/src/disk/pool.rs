//! A few threads that make system calls which block, for one engine.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::transfer::{Step, Target, Transfer};
use crate::sys::buffer::AlignedBuffer;
use crate::sys::eventfd::EventFd;
use crate::sys::{storage, thread};

#[derive(Debug, Default)]
struct Work {
    queue: VecDeque<Transfer>,
    /// Threads that wait for something to do.
    idle: usize,
    stop: bool,
}

#[derive(Debug)]
struct Shared {
    target: Arc<Target>,
    work: Mutex<Work>,
    wake: Condvar,
    ended: Mutex<Vec<Transfer>>,
    /// Signalled, under the lock of `ended`, when that stops being empty.
    event: EventFd,
}

/// Threads that carry transfers out from beginning to end. They start when there is work for them; dropping
/// the pool lets them finish what they were given and waits for them.
#[derive(Debug)]
pub(super) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    limit: usize,
    /// Taken, and not yet given to the threads.
    queued: Vec<Transfer>,
    /// Taken, and not yet given back.
    outstanding: usize,
}

impl Pool {
    /// A pool of at most `limit` threads for transfers on `target`.
    pub(super) fn new(target: Arc<Target>, limit: usize) -> io::Result<Self> {
        let shared = Shared {
            target,
            work: Mutex::default(),
            wake: Condvar::new(),
            ended: Mutex::default(),
            event: EventFd::new()?,
        };
        Ok(Self { shared: Arc::new(shared), threads: Vec::new(), limit, queued: Vec::new(), outstanding: 0 })
    }

    /// Readable while `take` has something; the pool drains it.
    pub(super) fn event(&self) -> RawFd {
        self.shared.event.as_raw_fd()
    }

    /// Queues a transfer for the next `kick`.
    pub(super) fn push(&mut self, transfer: Transfer) {
        self.outstanding += 1;
        self.queued.push(transfer);
    }

    /// Hands what is queued to the threads, and starts some when they are few.
    pub(super) fn kick(&mut self) {
        if self.queued.is_empty() {
            return;
        }
        let missing = {
            let mut work = lock(&self.shared.work);
            work.queue.extend(self.queued.drain(..));
            work.queue.len().saturating_sub(work.idle).min(self.limit - self.threads.len())
        };
        self.shared.wake.notify_all();
        for _ in 0..missing {
            let shared = Arc::clone(&self.shared);
            match thread::spawn("vhu-io", move || shared.serve()) {
                Ok(thread) => self.threads.push(thread),
                Err(error) if self.threads.is_empty() => return self.refuse(&error),
                // Fewer threads do it too.
                Err(_) => return,
            }
        }
    }

    /// Fails everything: there is no thread, and the system makes none.
    fn refuse(&self, error: &io::Error) {
        let errno = error.raw_os_error().unwrap_or(libc::EAGAIN);
        let queue = std::mem::take(&mut lock(&self.shared.work).queue);
        for mut transfer in queue {
            transfer.fail(errno);
            self.shared.give_back(transfer);
        }
    }

    /// Appends the transfers that have ended.
    pub(super) fn take(&mut self, ended: &mut Vec<Transfer>) {
        if self.outstanding == 0 {
            return;
        }
        let mut list = lock(&self.shared.ended);
        if list.is_empty() {
            return;
        }
        self.shared.event.drain();
        self.outstanding -= list.len();
        ended.append(&mut list);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.shared.work).stop = true;
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has ended too, which is all that matters here.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// What a thread does until the pool is dropped and its queue is empty.
    fn serve(&self) {
        let mut buffer = None;
        let mut work = lock(&self.work);
        loop {
            if let Some(mut transfer) = work.queue.pop_front() {
                drop(work);
                carry_out(&mut transfer, &self.target, &mut buffer);
                step!("stored");
                self.give_back(transfer);
                work = lock(&self.work);
            } else if work.stop {
                return;
            } else {
                work.idle += 1;
                work = self.wake.wait(work).unwrap_or_else(PoisonError::into_inner);
                work.idle -= 1;
            }
        }
    }

    fn give_back(&self, transfer: Transfer) {
        let mut ended = lock(&self.ended);
        if ended.is_empty() {
            self.event.signal();
        }
        ended.push(transfer);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes all the system calls of a transfer. `buffer` is the thread's own, made when first needed.
fn carry_out(transfer: &mut Transfer, target: &Target, buffer: &mut Option<AlignedBuffer>) {
    let fd = target.fd.as_fd();
    loop {
        let outcome = match transfer.step() {
            Step::Read { runs, offset } => storage::read(fd, runs, offset),
            Step::Write { runs, offset, durable } => storage::write(fd, runs, offset, durable),
            Step::Allocate { mode, offset, len } => storage::allocate(fd, mode, offset, len),
            Step::BlockDiscard { offset, len } => storage::block_discard(fd, offset, len),
            Step::BlockZeroOut { offset, len } => storage::block_zero_out(fd, offset, len),
            Step::Sync => storage::sync(fd),
            Step::Buffer => {
                match buffer.take().map_or_else(|| target.buffer(), Ok) {
                    Ok(buffer) => transfer.lend(buffer),
                    Err(_) => transfer.fail(libc::ENOMEM),
                }
                continue;
            }
            Step::End(_) => break,
        };
        transfer.advance(outcome, target);
    }
    if let Some(lent) = transfer.take_buffer() {
        *buffer = Some(lent);
    }
}
