//! Files and block devices through io_uring.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use super::inline::Inline;
use super::pool::Pool;
use super::transfer::{Step, Target, Transfer};
use super::{Completion, Engine, Kind, Operation};
use crate::memory::IoVec;
use crate::sys::buffer::AlignedBuffer;
use crate::sys::uring::{Request, Ring};

/// Bounce buffers of one engine; transfers that find none wait for one.
const MAX_BUFFERS: usize = 64;
/// Threads for the requests of block devices that io_uring does not know.
const THREADS: usize = 2;

/// One worker's way to a file or block device. The ring is the worker's wait point too.
#[derive(Debug)]
pub struct FileEngine {
    ring: Ring<Transfer>,
    target: Arc<Target>,
    /// Made when first needed: BLKDISCARD and BLKZEROOUT block.
    pool: Option<Pool>,
    /// Bounce buffers that nobody uses.
    buffers: Vec<AlignedBuffer>,
    lent: usize,
    /// Transfers that need a bounce buffer.
    waiting: VecDeque<Transfer>,
    pending: usize,
    inline: Inline,
    /// Given back by the pool; empty between calls.
    ended: Vec<Transfer>,
}

impl FileEngine {
    pub(super) fn new(target: Arc<Target>) -> io::Result<Self> {
        Ok(Self {
            ring: Ring::new()?,
            inline: Inline::new(&target),
            target,
            pool: None,
            buffers: Vec::new(),
            lent: 0,
            waiting: VecDeque::new(),
            pending: 0,
            ended: Vec::new(),
        })
    }

    /// Queues the next step of a transfer, or ends it.
    fn proceed(&mut self, mut transfer: Transfer) -> Option<Completion> {
        loop {
            let may_block = transfer.retrying();
            let request = match transfer.step() {
                Step::Read { runs, offset } => Request::Read { runs, offset },
                Step::Write { runs, offset, durable } => Request::Write { runs, offset, durable },
                Step::Allocate { mode, offset, len } => Request::Allocate { mode, offset, len },
                Step::Sync => Request::Sync,
                Step::BlockDiscard { .. } | Step::BlockZeroOut { .. } => match self.pool() {
                    Ok(pool) => {
                        pool.push(transfer);
                        return None;
                    }
                    Err(error) => {
                        transfer.fail(error.raw_os_error().unwrap_or(libc::ENOMEM));
                        continue;
                    }
                },
                Step::Buffer => {
                    match self.take_buffer() {
                        Some(Ok(buffer)) => transfer.lend(buffer),
                        Some(Err(_)) => transfer.fail(libc::ENOMEM),
                        None => {
                            self.waiting.push_back(transfer);
                            return None;
                        }
                    }
                    continue;
                }
                Step::End(result) => {
                    if let Some(buffer) = transfer.take_buffer() {
                        self.lent -= 1;
                        self.buffers.push(buffer);
                    }
                    return Some(transfer.complete(result));
                }
            };
            let prepared = self.ring.prepare(self.target.fd.as_fd(), request, may_block);
            self.ring.start(prepared, transfer);
            return None;
        }
    }

    fn pool(&mut self) -> io::Result<&mut Pool> {
        if self.pool.is_none() {
            let pool = Pool::new(Arc::clone(&self.target), THREADS)?;
            self.ring.watch(pool.event(), None)?;
            self.pool = Some(pool);
        }
        self.pool.as_mut().ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    /// A bounce buffer; `None` when one has to be waited for.
    fn take_buffer(&mut self) -> Option<io::Result<AlignedBuffer>> {
        let buffer = match self.buffers.pop() {
            Some(buffer) => Ok(buffer),
            None if self.lent < MAX_BUFFERS => self.target.buffer(),
            None => return None,
        };
        if buffer.is_err() && self.lent > 0 {
            return None;
        }
        self.lent += usize::from(buffer.is_ok());
        Some(buffer)
    }
}

impl Drop for FileEngine {
    fn drop(&mut self) {
        self.inline.ends(&self.target);
    }
}

impl Engine for FileEngine {
    fn inline(&self) -> bool {
        false
    }

    #[inline]
    fn move_now(&mut self, kind: Kind, offset: u64, durable: bool, runs: &[IoVec]) -> bool {
        self.inline.move_now(&self.target, kind, offset, durable, runs)
    }

    fn wants_hints(&self) -> bool {
        self.target.map.is_some()
    }

    #[inline]
    fn hint(&mut self, offset: u64) {
        self.inline.hint(&self.target, offset);
    }

    fn tick(&mut self, now_ns: u64) {
        self.inline.tick(now_ns);
    }

    fn submit(&mut self, operation: Operation) -> Option<Completion> {
        let completion = self.proceed(Transfer::new(operation, &self.target));
        self.pending += usize::from(completion.is_none());
        completion
    }

    fn kick(&mut self) -> io::Result<()> {
        if let Some(pool) = &mut self.pool {
            pool.kick();
        }
        self.ring.submit()
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        if self.pending == 0 {
            return;
        }
        let before = done.len();
        let mut continued = false;
        self.ring.look();
        while let Some((mut transfer, outcome)) = self.ring.take_finished() {
            transfer.advance(outcome, &self.target);
            let completion = self.proceed(transfer);
            continued |= completion.is_none();
            done.extend(completion);
        }
        if let Some(pool) = &mut self.pool {
            pool.take(&mut self.ended);
            for mut transfer in self.ended.drain(..) {
                let result = transfer.result();
                done.push(transfer.complete(result));
            }
        }
        while !self.waiting.is_empty() && (!self.buffers.is_empty() || self.lent == 0) {
            let Some(transfer) = self.waiting.pop_front() else { break };
            let completion = self.proceed(transfer);
            continued |= completion.is_none();
            done.extend(completion);
        }
        self.pending -= done.len() - before;
        if continued {
            // Half-done requests do not wait for the next `kick`. A refusal comes again there.
            let _ = self.kick();
        }
    }

    fn pending(&self) -> usize {
        self.pending
    }

    fn watch(&mut self, fd: libc::c_int, token: u32) -> io::Result<()> {
        self.ring.watch(fd, Some(token))
    }

    fn unwatch(&mut self, token: u32) {
        self.ring.unwatch(token);
    }

    fn wait(&mut self, timeout: Option<Duration>, ready: &mut Vec<u32>) -> io::Result<()> {
        self.inline.sleeps(&self.target);
        if let Some(pool) = &mut self.pool {
            pool.kick();
        }
        self.ring.wait(timeout, ready)
    }
}
