//! The driver: rings and buffers in shared memory, requests, and what it holds against their answers.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhostuser_core::blk::{Answer, ClientQueue, ClientRequest, Piece};
use vhostuser_core::memory::inflight::Format;
use vhostuser_core::memory::{GuestSlice, InflightRegion, Mapping};
use vhostuser_core::ring::DriverError;
use vhostuser_core::sys::eventfd::{self, EventFd};
use vhostuser_core::sys::poll::PollSet;
use vhostuser_core::sys::{memfd, process};

use crate::backend::{make_image, Backend, End};
use crate::chance::Chance;
use crate::model::{Disk, Read, Violation, Write, UNIT};
use crate::shape::{Shape, BASE, DATA, SECTORS};

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_WRITE_ZEROES: u32 = 13;
/// How long an answer may take while a back-end runs, on a machine that others use too.
const PATIENCE: Duration = Duration::from_secs(20);
/// What a read's buffer holds before: no write's word.
const POISON: u8 = 0xa5;

/// Why the harness stops.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// The back-end did what it must not.
    Violation(Violation),
    /// The harness cannot go on.
    Io(io::Error),
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Violation> for Trouble {
    fn from(violation: Violation) -> Self {
        Self::Violation(violation)
    }
}

impl From<DriverError> for Trouble {
    fn from(error: DriverError) -> Self {
        Self::Violation(Violation(error.to_string()))
    }
}

fn violation<T>(text: String) -> Result<T, Trouble> {
    Err(Violation(text).into())
}

/// A request under way.
#[derive(Debug)]
enum Job {
    Read(Read, usize),
    Write(Write),
    Flush,
    GetId,
}

/// One ring and its requests.
struct Lane {
    queue: ClientQueue,
    kick: EventFd,
    call: EventFd,
    /// By the number that is the token of the request and the place of its data.
    jobs: Vec<Option<Job>>,
    free: Vec<u16>,
    data: Vec<GuestSlice>,
    submitted: u64,
    answered: u64,
    /// Requests that are answered in the order in which they were made.
    in_order: VecDeque<u16>,
}

/// The driver of one disk. Its rings live as long as it does, whoever serves them.
pub(crate) struct Host {
    shape: Shape,
    image: PathBuf,
    lanes: Vec<Lane>,
    disk: Disk,
    chance: Chance,
    memory: OwnedFd,
    inflight: InflightRegion,
    /// Whether back-ends wait for the image.
    fence: bool,
    /// Back-ends that were killed and may still have something in the kernel.
    dying: Vec<Backend>,
    /// It waits for a call, and looks at nothing before that comes: a back-end that dies calls nobody.
    asleep: bool,
}

impl Host {
    /// Fresh rings and an image of zeroes at `image`.
    pub(crate) fn new(shape: Shape, image: &Path, seed: u64, fence: bool) -> Result<Self, Trouble> {
        make_image(image, SECTORS * UNIT)?;
        let memory = memfd::sealed(c"kill-memory", shape.len().next_multiple_of(4096) as u64, false)?;
        let map = Mapping::of_file(memory.as_fd(), 0, shape.len() as u64)?;
        let inflight = InflightRegion::create(Format::Split, shape.queues, shape.size, 0)
            .map_err(|error| io::Error::other(error.to_string()))?;
        process::inherit(memory.as_raw_fd())?;
        process::inherit(inflight.file().as_raw_fd())?;
        let mut lanes = Vec::new();
        for index in 0..shape.queues {
            let layout = shape.layout(index);
            let queue = ClientQueue::starting_at(Arc::clone(&map), BASE, layout, shape.features(), shape.first)?;
            let (kick, call) = (EventFd::new()?, EventFd::new()?);
            process::inherit(kick.as_raw_fd())?;
            process::inherit(call.as_raw_fd())?;
            let slice = |slot| GuestSlice::new(Arc::clone(&map), shape.data(index, slot), DATA);
            let data = (0..shape.size).map(slice).collect::<Result<_, _>>().map_err(DriverError::from)?;
            let jobs = (0..shape.size).map(|_| None).collect();
            let free = (0..shape.size).rev().collect();
            let in_order = VecDeque::new();
            lanes.push(Lane { queue, kick, call, jobs, free, data, submitted: 0, answered: 0, in_order });
        }
        let (disk, chance) = (Disk::new(SECTORS), Chance::new(seed));
        let dying = Vec::new();
        Ok(Self { shape, image: image.to_owned(), lanes, disk, chance, memory, inflight, fence, dying, asleep: false })
    }

    /// Requests under way, over all rings.
    pub(crate) fn outstanding(&self) -> usize {
        self.lanes.iter().map(|lane| usize::from(lane.queue.outstanding())).sum()
    }

    /// Requests answered so far.
    pub(crate) fn answered(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.answered).sum()
    }

    /// The generator of everything that is left to chance.
    pub(crate) fn chance(&mut self) -> &mut Chance {
        &mut self.chance
    }

    /// Starts a back-end over the rings as they are; `step`, if any, is where it kills itself. What it is told as base
    /// is what one front-end or another would say: with a region in use it must not matter.
    pub(crate) fn start(&mut self, step: Option<&str>) -> Result<Backend, Trouble> {
        let mut words = self.shape.words();
        words.push(format!("image={}", self.image.display()));
        words.push(format!("seed={}", self.chance.below(1 << 30)));
        words.push(format!("fence={}", u8::from(self.fence)));
        words.push(format!("arena={}", self.memory.as_raw_fd()));
        words.push(format!("inflight={}", self.inflight.file().as_raw_fd()));
        for (index, lane) in self.lanes.iter().enumerate() {
            let (next_avail, next_used) = lane.queue.indices();
            let others = [next_avail, next_used, 0];
            // While nothing was answered the region may be a fresh one, and then the base counts.
            let fresh = lane.answered == 0;
            let base = if fresh { self.shape.first } else { others[self.chance.below(3) as usize] };
            words.push(format!("base{index}={base}"));
            words.push(format!("kick{index}={}", lane.kick.as_raw_fd()));
            words.push(format!("call{index}={}", lane.call.as_raw_fd()));
        }
        Ok(Backend::start(&words, step)?)
    }

    /// Sends requests through every ring until `depth` are under way on it or it is full.
    pub(crate) fn fill(&mut self, depth: usize) -> Result<(), Trouble> {
        for index in 0..self.lanes.len() {
            while usize::from(self.lanes[index].queue.outstanding()) < depth {
                if !self.submit(index)? {
                    break;
                }
            }
            let lane = &mut self.lanes[index];
            if lane.queue.publish()? {
                lane.kick.signal();
            }
        }
        Ok(())
    }

    /// One request of some kind; false when the ring has no room for it.
    fn submit(&mut self, index: usize) -> Result<bool, Trouble> {
        let Self { lanes, disk, chance, .. } = self;
        let lane = &mut lanes[index];
        let pieces = 1 + chance.below(3) as usize;
        if !lane.queue.has_room(pieces) {
            return Ok(false);
        }
        let Some(slot) = lane.free.pop() else { return Ok(false) };
        let data = &lane.data[usize::from(slot)];
        let (first, count) = some_units(chance, disk.len());
        let mut bytes = vec![POISON; count * UNIT];
        let (kind, sector, len, writable, job) = match chance.below(100) {
            0..55 => {
                let write = disk.write(first, count, Some(&mut bytes));
                (T_OUT, first as u64, bytes.len(), false, Job::Write(write))
            }
            55..85 => (T_IN, first as u64, bytes.len(), true, Job::Read(disk.read(first, count), count)),
            85..92 => {
                let range = [&(first as u64).to_le_bytes()[..], &(count as u32).to_le_bytes(), &[0; 4]].concat();
                bytes[..range.len()].copy_from_slice(&range);
                (T_WRITE_ZEROES, 0, range.len(), false, Job::Write(disk.write(first, count, None)))
            }
            92..96 => (T_GET_ID, 0, 20, true, Job::GetId),
            _ => (T_FLUSH, 0, 0, false, Job::Flush),
        };
        data.as_iovec().copy_from(&bytes);
        let addr = BASE + self.shape.data(index as u16, slot) as u64;
        let data = cut(addr, len, pieces);
        lane.queue.submit(&ClientRequest { kind, sector, data: &data, writable, token: u64::from(slot) })?;
        lane.jobs[usize::from(slot)] = Some(job);
        lane.submitted += 1;
        Ok(true)
    }

    /// Sends `count` requests that are answered without storage, through the first ring.
    pub(crate) fn ask_ids(&mut self, count: usize) -> Result<(), Trouble> {
        for _ in 0..count {
            let lane = &mut self.lanes[0];
            let Some(slot) = lane.free.pop() else { return violation("the ring is full".into()) };
            let data = [Piece { addr: BASE + self.shape.data(0, slot) as u64, len: 20 }];
            lane.queue.submit(&ClientRequest {
                kind: T_GET_ID,
                sector: 0,
                data: &data,
                writable: true,
                token: u64::from(slot),
            })?;
            lane.jobs[usize::from(slot)] = Some(Job::GetId);
            lane.in_order.push_back(slot);
            lane.submitted += 1;
        }
        if self.lanes[0].queue.publish()? {
            self.lanes[0].kick.signal();
        }
        Ok(())
    }

    /// Takes what was answered, and judges it.
    pub(crate) fn reap(&mut self) -> Result<usize, Trouble> {
        let mut count = 0;
        let Self { lanes, disk, .. } = self;
        for lane in lanes {
            while let Some(Answer { token, status, .. }) = lane.queue.reap()? {
                let slot = token as usize;
                let Some(job) = lane.jobs[slot].take() else {
                    return violation(format!("request {token} was answered twice"));
                };
                if status != 0 {
                    return violation(format!("{job:?} was answered with status {status:#x}"));
                }
                if lane.in_order.pop_front().is_some_and(|first| usize::from(first) != slot) {
                    return violation(format!("request {token} was replayed before one that came first"));
                }
                let mut bytes = vec![0; DATA];
                lane.data[slot].as_iovec().copy_to(&mut bytes);
                match job {
                    Job::Read(read, count) => disk.check(read, &bytes[..count * UNIT])?,
                    Job::Write(write) => disk.written(write),
                    Job::GetId if !bytes.starts_with(b"killed\0") => return violation("a wrong serial number".into()),
                    Job::GetId | Job::Flush => {}
                }
                lane.free.push(slot as u16);
                lane.answered += 1;
                count += 1;
            }
        }
        Ok(count)
    }

    /// Whether nothing may be looked at before a call comes.
    pub(crate) fn asleep(&self) -> bool {
        self.asleep
    }

    /// Sleeps until a call or the back-end's end comes; true for the end, through which the driver sleeps on. A call that
    /// does not come although there is an answer is a violation, and so is no answer at all.
    pub(crate) fn wait(&mut self, backend: &Backend, timeout: Option<Duration>) -> Result<bool, Trouble> {
        const END: u32 = u32::MAX;
        if !self.asleep {
            for lane in &mut self.lanes {
                if lane.queue.enable_calls(1)? {
                    return Ok(false);
                }
            }
        }
        self.asleep = true;
        let mut polls = PollSet::default();
        polls.watch(backend.end_fd(), Some(END))?;
        for (token, lane) in (0..).zip(&self.lanes) {
            polls.watch(lane.call.as_raw_fd(), Some(token))?;
        }
        let (mut ready, deadline) = (Vec::new(), Instant::now() + timeout.unwrap_or(PATIENCE));
        while ready.is_empty() && Instant::now() < deadline {
            polls.wait(Some(deadline.saturating_duration_since(Instant::now())), &mut ready)?;
        }
        for &token in ready.iter().filter(|token| **token != END) {
            eventfd::drain(self.lanes[token as usize].call.as_fd())?;
            self.asleep = false;
        }
        if ready.is_empty() && timeout.is_none() {
            let late = self.reap()?;
            let left = self.outstanding();
            return violation(if late > 0 {
                format!("{late} answers came without a call")
            } else {
                format!("{left} requests are lost")
            });
        }
        Ok(ready.contains(&END))
    }

    /// Lets `backend` answer all that is under way.
    pub(crate) fn finish(&mut self, backend: &mut Backend) -> Result<(), Trouble> {
        loop {
            if !self.asleep {
                self.reap()?;
                if self.outstanding() == 0 {
                    return Ok(());
                }
            }
            if self.wait(backend, None)? {
                return violation(format!("the back-end ended by itself: {:?}", backend.wait()?));
            }
        }
    }

    /// After `finish`: each request was answered once, and the image holds what it must. Kills the back-end.
    pub(crate) fn check(&mut self, backend: Backend) -> Result<(), Trouble> {
        self.kill(backend, false)?;
        if self.reap()? > 0 {
            return violation("an answer too many".into());
        }
        for lane in &self.lanes {
            let used = lane.queue.indices().1.wrapping_sub(self.shape.first);
            if lane.answered != lane.submitted || used != lane.submitted as u16 {
                let Lane { submitted, answered, .. } = lane;
                return violation(format!("{submitted} requests, {answered} answers, {used} used entries"));
            }
        }
        Ok(self.disk.check_image(&self.image_bytes()?)?)
    }

    /// The image, once nobody holds its lock any more.
    fn image_bytes(&self) -> io::Result<Vec<u8>> {
        let file = std::fs::OpenOptions::new().read(true).write(true).open(&self.image)?;
        process::lock_file(file.as_raw_fd())?;
        std::fs::read(&self.image)
    }

    /// Kills a back-end. `hurry`: its end is not waited for, so that its successor starts while it dies.
    pub(crate) fn kill(&mut self, mut backend: Backend, hurry: bool) -> Result<(), Trouble> {
        backend.signal()?;
        self.dying.push(backend);
        let keep = if hurry { 1 } else { 0 };
        while self.dying.len() > keep {
            let end = self.dying.remove(0).wait()?;
            self.killed(end)?;
        }
        Ok(())
    }

    /// A back-end has ended; it must have been killed.
    pub(crate) fn killed(&self, end: End) -> Result<(), Trouble> {
        match end {
            End::Killed => Ok(()),
            End::Otherwise(said) => violation(format!("the back-end ended by itself, {said}")),
        }
    }
}

/// Some units in a row, most often few: where requests meet.
fn some_units(chance: &mut Chance, units: usize) -> (usize, usize) {
    let count = [1, 1, 1, 2, 4, DATA / UNIT][chance.below(6) as usize];
    let narrow = if chance.below(4) == 0 { units } else { 16 };
    (chance.below((narrow - count + 1) as u64) as usize, count)
}

/// `len` bytes from `addr` in at most `pieces` pieces.
fn cut(addr: u64, len: usize, pieces: usize) -> Vec<Piece> {
    let mut made = Vec::new();
    let mut at = 0;
    for piece in 0..pieces {
        let end = if piece + 1 == pieces { len } else { len * (piece + 1) / pieces };
        if end > at {
            made.push(Piece { addr: addr + at as u64, len: (end - at) as u32 });
        }
        at = end;
    }
    made
}
