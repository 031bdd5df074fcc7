//! The loop: keep a queue full, time every answer.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::pattern::{fill, holds, Random};
use super::Histogram;
use crate::blk::{Answer, ClientQueue, ClientRequest, Piece};
use crate::memory::GuestSlice;
use crate::ring::DriverError;
use crate::sys::eventfd;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const SECTOR: u64 = 512;
/// Empty looks at a ring between two looks at the clock.
const SPINS: u32 = 256;

/// What to do. Blocks are `block_size` bytes and counted from the disk's start.
#[derive(Clone, Copy, Debug)]
pub struct LoadSpec {
    /// Bytes of one request: a multiple of 512.
    pub block_size: u32,
    /// Requests kept outstanding.
    pub depth: u16,
    /// The share of reads among reads and writes, 0..1.
    pub read_share: f64,
    /// One block after the other, instead of any.
    pub sequential: bool,
    /// The first block that is used.
    pub first_block: u64,
    /// How many blocks are used, from there on.
    pub num_blocks: u64,
    /// A FLUSH after so many writes; 0: none.
    pub flush_every: u32,
    /// What is written is remembered and what is read is compared.
    pub verify: bool,
    /// Sleep until the device calls, instead of looking all the time.
    pub sleeping: bool,
    /// How long requests are made.
    pub duration: Duration,
    /// How many are made at most.
    pub max_requests: u64,
    /// How long the device may stay silent.
    pub answer_limit: Duration,
    /// Where the random numbers start.
    pub seed: u64,
}

/// Buffers for `depth` requests.
#[derive(Clone, Debug)]
pub struct Place {
    /// `depth * block_size` bytes.
    pub data: GuestSlice,
    /// Their guest address.
    pub addr: u64,
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct LoadResult {
    /// Latencies of reads, writes and flushes.
    pub latencies: [Histogram; 3],
    /// Answers with another status than OK.
    pub errors: u64,
    /// Reads that brought something else than what was written.
    pub mismatches: u64,
    /// The first block that did, if any.
    pub first_mismatch: Option<u64>,
    /// From the first request to the last answer.
    pub elapsed: Duration,
    /// Kicks sent.
    pub kicks: u64,
    /// Times it went to sleep.
    pub sleeps: u64,
}

/// Why a load ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadError {
    /// The device broke the ring, or the ring does not fit the load.
    Ring(DriverError),
    /// The device did not answer in time.
    Silent {
        /// Requests without an answer.
        outstanding: u16,
    },
    /// The kick or call descriptor failed.
    Descriptor(i32),
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ring(error) => error.fmt(f),
            Self::Silent { outstanding } => write!(f, "the device left {outstanding} requests without an answer"),
            Self::Descriptor(errno) => {
                write!(f, "a notification descriptor failed: {}", std::io::Error::from_raw_os_error(*errno))
            }
        }
    }
}

impl From<DriverError> for LoadError {
    fn from(error: DriverError) -> Self {
        Self::Ring(error)
    }
}

impl From<std::io::Error> for LoadError {
    fn from(error: std::io::Error) -> Self {
        Self::Descriptor(error.raw_os_error().unwrap_or(0))
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Pending {
    kind: usize,
    block: u64,
    generation: u64,
    since: u64,
}

struct Load<'a> {
    spec: LoadSpec,
    queue: &'a mut ClientQueue,
    place: &'a Place,
    random: Random,
    /// Random numbers of 53 bits below this make reads.
    reads_below: u64,
    next_block: u64,
    writes: u32,
    made: u64,
    pending: Vec<Pending>,
    free: Vec<u16>,
    /// With `verify`: the generation each block holds (0: never written), and whether a request has it.
    generations: Vec<u64>,
    busy: Vec<bool>,
    result: LoadResult,
}

/// Runs a load on one queue, on this thread, until it is done or `stop` is set. Nothing is outstanding afterwards
/// unless it fails.
pub fn run(
    queue: &mut ClientQueue,
    place: &Place,
    kick: BorrowedFd<'_>,
    call: BorrowedFd<'_>,
    stop: &AtomicBool,
    spec: LoadSpec,
) -> Result<LoadResult, LoadError> {
    let room = usize::from(spec.depth) * spec.block_size as usize;
    if spec.depth == 0 || spec.num_blocks == 0 || u64::from(spec.block_size) % SECTOR != 0 || place.data.len() < room {
        return Err(LoadError::Ring(DriverError::Chain));
    }
    // Blocks in use are not chosen again, so there must be more of them than requests.
    if spec.verify && spec.num_blocks < 2 * u64::from(spec.depth) {
        return Err(LoadError::Ring(DriverError::Chain));
    }
    let blocks = if spec.verify { spec.num_blocks as usize } else { 0 };
    let mut load = Load {
        random: Random::new(spec.seed),
        reads_below: (spec.read_share * (1u64 << 53) as f64) as u64,
        next_block: 0,
        writes: 0,
        made: 0,
        pending: vec![Pending::default(); usize::from(spec.depth)],
        free: (0..spec.depth).rev().collect(),
        generations: vec![0; blocks],
        busy: vec![false; blocks],
        result: LoadResult::default(),
        spec,
        queue,
        place,
    };
    let started = Instant::now();
    let outcome = load.turn(kick, call, stop, started);
    load.result.elapsed = started.elapsed();
    outcome.map(|()| load.result)
}

impl Load<'_> {
    fn turn(
        &mut self,
        kick: BorrowedFd<'_>,
        call: BorrowedFd<'_>,
        stop: &AtomicBool,
        started: Instant,
    ) -> Result<(), LoadError> {
        let now_ns = || started.elapsed().as_nanos() as u64;
        let end = self.spec.duration.as_nanos() as u64;
        if !self.spec.sleeping {
            self.queue.disable_calls()?;
        }
        let mut now = 0;
        let mut last_answer = 0;
        let mut making = true;
        loop {
            making = making && now < end && self.made < self.spec.max_requests && !stop.load(Ordering::Relaxed);
            if making {
                self.make(now)?;
                if self.queue.publish()? {
                    eventfd::signal(kick)?;
                    self.result.kicks += 1;
                }
            } else if self.queue.outstanding() == 0 {
                return Ok(());
            }
            let mut spins = 0;
            loop {
                if let Some(answered) = self.take(&now_ns)? {
                    (now, last_answer) = (answered, answered);
                    break;
                }
                spins += 1;
                if spins < SPINS && !self.spec.sleeping {
                    std::hint::spin_loop();
                    continue;
                }
                spins = 0;
                now = now_ns();
                let limit = self.spec.answer_limit.as_nanos() as u64;
                if now - last_answer > limit {
                    return Err(LoadError::Silent { outstanding: self.queue.outstanding() });
                }
                if self.spec.sleeping && !self.queue.enable_calls(1)? {
                    self.result.sleeps += 1;
                    let left = Duration::from_nanos(limit - (now - last_answer));
                    eventfd::poll_readable(call, Some(left))?;
                    eventfd::drain(call)?;
                }
            }
        }
    }

    /// Fills the queue.
    fn make(&mut self, now: u64) -> Result<(), LoadError> {
        while !self.free.is_empty() && self.made < self.spec.max_requests && self.queue.has_room(1) {
            let flush = self.spec.flush_every > 0 && self.writes >= self.spec.flush_every;
            let Some(slot) = self.free.pop() else { break };
            self.pending[usize::from(slot)] = if flush {
                self.writes = 0;
                Pending { kind: 2, since: now, ..Pending::default() }
            } else {
                let block = self.choose();
                let kind = usize::from(self.random.next() >> 11 >= self.reads_below);
                self.writes += u32::from(kind == 1);
                Pending { kind, block, generation: 0, since: now }
            };
            self.send(slot)?;
            self.made += 1;
        }
        Ok(())
    }

    fn choose(&mut self) -> u64 {
        loop {
            let block = if self.spec.sequential {
                let block = self.next_block;
                self.next_block = (block + 1) % self.spec.num_blocks;
                block
            } else {
                self.random.below(self.spec.num_blocks)
            };
            match self.busy.get_mut(block as usize) {
                Some(true) => {}
                Some(busy) => {
                    *busy = true;
                    return block;
                }
                None => return block,
            }
        }
    }

    fn send(&mut self, slot: u16) -> Result<(), LoadError> {
        let pending = &mut self.pending[usize::from(slot)];
        let size = self.spec.block_size;
        let offset = u64::from(slot) * u64::from(size);
        if self.spec.verify && pending.kind == 1 {
            // Never used before: a failed write may have left any older one.
            pending.generation = self.made + 1;
            let mut buffer = self.place.data.as_iovec();
            buffer.advance(offset as usize);
            buffer.truncate(size as usize);
            fill(buffer, self.spec.first_block + pending.block, pending.generation);
        }
        let data = [Piece { addr: self.place.addr + offset, len: size }];
        let sector = (self.spec.first_block + pending.block) * u64::from(size) / SECTOR;
        let (kind, data, sector) = match pending.kind {
            0 => (T_IN, &data[..], sector),
            1 => (T_OUT, &data[..], sector),
            _ => (T_FLUSH, &data[..0], 0),
        };
        let request = ClientRequest { kind, sector, data, writable: kind == T_IN, token: u64::from(slot) };
        self.queue.submit(&request)?;
        Ok(())
    }

    /// Takes what was answered; the time when anything was.
    fn take(&mut self, now_ns: &impl Fn() -> u64) -> Result<Option<u64>, LoadError> {
        let Some(first) = self.queue.reap()? else { return Ok(None) };
        let now = now_ns();
        self.settle(first, now);
        while let Some(answer) = self.queue.reap()? {
            self.settle(answer, now);
        }
        Ok(Some(now))
    }

    fn settle(&mut self, answer: Answer, now: u64) {
        let slot = answer.token as usize;
        let pending = self.pending[slot];
        self.result.latencies[pending.kind].add(now - pending.since);
        let failed = answer.status != 0;
        self.result.errors += u64::from(failed);
        if self.spec.verify && pending.kind < 2 {
            self.check(slot, pending, failed);
        }
        self.free.push(answer.token as u16);
    }

    fn check(&mut self, slot: usize, pending: Pending, failed: bool) {
        let held = &mut self.generations[pending.block as usize];
        self.busy[pending.block as usize] = false;
        if failed {
            // A failed write may have stored anything.
            *held = if pending.kind == 1 { 0 } else { *held };
            return;
        }
        if pending.kind == 1 {
            *held = pending.generation;
            return;
        }
        let mut buffer = self.place.data.as_iovec();
        buffer.advance(slot * self.spec.block_size as usize);
        buffer.truncate(self.spec.block_size as usize);
        let block = self.spec.first_block + pending.block;
        if *held > 0 && !holds(buffer, block, *held) {
            self.result.mismatches += 1;
            self.result.first_mismatch.get_or_insert(block);
        }
    }
}
