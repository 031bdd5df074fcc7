//! `RequestQueue`, `StopFlag`, `LoadResult` and `run_load`: the driver's side of a disk.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pyo3::prelude::*;
use vhostuser_core::blk::{ClientLayout, ClientQueue, ClientRequest, Piece};
use vhostuser_core::load::{self, Histogram, LoadError, LoadSpec, Place};
use vhostuser_core::ring::DriverError;
use vhostuser_core::sys::fd::duplicate;

use crate::arena::Arena;
use crate::error::{Failure, Fallible};
use crate::queues::timeout;

/// The driver half of one queue of a virtio disk.
#[pyclass(frozen, module = "vhostuser._native")]
pub(crate) struct RequestQueue {
    queue: Mutex<ClientQueue>,
    arena: Py<Arena>,
    layout: ClientLayout,
}

impl RequestQueue {
    fn lock(&self) -> MutexGuard<'_, ClientQueue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn pieces(data: Vec<(u64, u32)>) -> Vec<Piece> {
    data.into_iter().map(|(addr, len)| Piece { addr, len }).collect()
}

fn layout(size: u16, seg_max: u16, offset: usize) -> Fallible<ClientLayout> {
    if !size.is_power_of_two() || seg_max == 0 || offset % 4096 != 0 {
        let why =
            "a queue has a power of two of descriptors, at least one data segment, and starts at a multiple of 4096";
        return Err(Failure::Setup(why.into()));
    }
    Ok(ClientLayout { size, seg_max, offset })
}

#[pymethods]
impl RequestQueue {
    #[staticmethod]
    fn bytes_needed(size: u16, seg_max: u16) -> Fallible<usize> {
        Ok(layout(size, seg_max, 0)?.len())
    }

    #[new]
    #[pyo3(signature = (arena, *, base, offset, size, seg_max, features))]
    fn new(
        arena: Bound<'_, Arena>,
        base: u64,
        offset: usize,
        size: u16,
        seg_max: u16,
        features: u64,
    ) -> Fallible<Self> {
        let layout = layout(size, seg_max, offset)?;
        let queue = ClientQueue::new(arena.get().mapping(), base, layout, features)?;
        Ok(Self { queue: Mutex::new(queue), arena: arena.unbind(), layout })
    }

    #[getter]
    fn areas(&self) -> (usize, usize, usize) {
        self.layout.areas()
    }

    #[getter]
    fn outstanding(&self) -> u16 {
        self.lock().outstanding()
    }

    fn has_room(&self, pieces: usize) -> bool {
        self.lock().has_room(pieces)
    }

    fn submit(&self, kind: u32, sector: u64, data: Vec<(u64, u32)>, writable: bool, token: u64) -> Fallible<u64> {
        let data = pieces(data);
        Ok(self.lock().submit(&ClientRequest { kind, sector, data: &data, writable, token })?)
    }

    fn publish(&self) -> Fallible<bool> {
        Ok(self.lock().publish()?)
    }

    fn reap(&self) -> Fallible<Vec<(u64, u8, u32)>> {
        let mut queue = self.lock();
        let mut answers = Vec::new();
        while let Some(answer) = queue.reap()? {
            answers.push((answer.token, answer.status, answer.written));
        }
        Ok(answers)
    }

    #[pyo3(signature = (after = 1))]
    fn enable_calls(&self, after: u16) -> Fallible<bool> {
        Ok(self.lock().enable_calls(after)?)
    }

    fn disable_calls(&self) -> Fallible<()> {
        Ok(self.lock().disable_calls()?)
    }
}

/// Ends loads early, from any thread.
#[pyclass(frozen, module = "vhostuser._native")]
#[derive(Default)]
pub(crate) struct StopFlag(Arc<AtomicBool>);

#[pymethods]
impl StopFlag {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

type Buckets = Vec<(u64, u64)>;

/// What came of a load.
#[pyclass(frozen, get_all, module = "vhostuser._native")]
pub(crate) struct LoadResult {
    reads: Buckets,
    writes: Buckets,
    flushes: Buckets,
    errors: u64,
    mismatches: u64,
    first_mismatch: Option<u64>,
    elapsed_s: f64,
    kicks: u64,
    sleeps: u64,
}

/// Runs a load on one queue until it is done.
#[pyfunction]
#[pyo3(signature = (queue, *, data, address, kick, call, stop, block_size, depth, first_block, num_blocks,
    read_share = 1.0, sequential = false, flush_every = 0, verify = false, sleeping = false, duration_s = 1.0,
    max_requests = u64::MAX, answer_limit_s = 30.0, seed = 0))]
#[allow(clippy::too_many_arguments)] // keyword arguments of the Python side
pub(crate) fn run_load(
    py: Python<'_>,
    queue: &RequestQueue,
    data: usize,
    address: u64,
    kick: i32,
    call: i32,
    stop: &StopFlag,
    block_size: u32,
    depth: u16,
    first_block: u64,
    num_blocks: u64,
    read_share: f64,
    sequential: bool,
    flush_every: u32,
    verify: bool,
    sleeping: bool,
    duration_s: f64,
    max_requests: u64,
    answer_limit_s: f64,
    seed: u64,
) -> PyResult<LoadResult> {
    let spec = LoadSpec {
        block_size,
        depth,
        read_share,
        sequential,
        first_block,
        num_blocks,
        flush_every,
        verify,
        sleeping,
        duration: timeout(duration_s)?,
        max_requests,
        answer_limit: timeout(answer_limit_s)?.min(Duration::from_secs(86_400)),
        seed,
    };
    let room = usize::from(depth) * block_size as usize;
    let place = Place { data: queue.arena.get().slice(data, room)?, addr: address };
    let (kick, call) = (duplicate(kick)?, duplicate(call)?);
    let flag = Arc::clone(&stop.0);
    let result = py.detach(|| load::run(&mut queue.lock(), &place, kick.as_fd(), call.as_fd(), &flag, spec));
    let result = result.map_err(Failure::from)?;
    let buckets = |histogram: &Histogram| histogram.filled().collect();
    let [reads, writes, flushes] = &result.latencies;
    Ok(LoadResult {
        reads: buckets(reads),
        writes: buckets(writes),
        flushes: buckets(flushes),
        errors: result.errors,
        mismatches: result.mismatches,
        first_mismatch: result.first_mismatch,
        elapsed_s: result.elapsed.as_secs_f64(),
        kicks: result.kicks,
        sleeps: result.sleeps,
    })
}

impl From<LoadError> for Failure {
    fn from(error: LoadError) -> Self {
        match error {
            LoadError::Ring(error @ DriverError::Chain) => {
                Self::Setup(format!("the load does not fit the queue, its buffers or its blocks: {error}"))
            }
            LoadError::Ring(error) => Self::Driver(error),
            LoadError::Silent { .. } => Self::Silent(error.to_string()),
            LoadError::Descriptor(errno) => Self::Io(std::io::Error::from_raw_os_error(errno)),
        }
    }
}
