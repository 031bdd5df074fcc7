//! `Queues`, what all device types share, and `BlockQueues`.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use vhostuser_core::blk::{Action, BlkServe, BlkShared, Decision, ErrorPolicy, Limits};
use vhostuser_core::ring::RingSetup;
use vhostuser_core::sys::fd::duplicate;
use vhostuser_core::worker::{self as core, EventKind, Events, Notifiers, QueueStats, StopMode, Whereabouts, COUNTERS};

use crate::dirty::DirtyLog;
use crate::engine::EngineSpec;
use crate::error::{Failure, Fallible};
use crate::inflight::InflightRegion;
use crate::memory::GuestMemory;

/// Something a worker wants its session to know.
#[pyclass(frozen, get_all, module = "vhostuser._native")]
pub(crate) struct Event {
    kind: &'static str,
    index: Option<u16>,
    reason: String,
}

#[pymethods]
impl Event {
    fn __repr__(&self) -> String {
        format!("Event(kind={:?}, index={:?}, reason={:?})", self.kind, self.index, self.reason)
    }
}

/// A request that was taken and not answered.
#[pyclass(frozen, get_all, module = "vhostuser._native")]
pub(crate) struct InFlight {
    queue: u16,
    head: u16,
    kind: &'static str,
    sector: u64,
    bytes: u64,
    age_us: u64,
    state: &'static str,
    errno: i32,
}

/// The rings of one device and the workers that serve them.
#[pyclass(frozen, subclass, module = "vhostuser._native")]
pub(crate) struct Queues {
    queues: Mutex<core::Queues>,
    events: Arc<Events>,
    stats: Vec<Arc<QueueStats>>,
}

impl Queues {
    pub(crate) fn over(queues: core::Queues) -> Self {
        let (events, stats) = (Arc::clone(queues.events()), queues.stats().to_vec());
        Self { queues: Mutex::new(queues), events, stats }
    }

    fn lock(&self) -> MutexGuard<'_, core::Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) fn timeout(seconds: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(seconds).map_err(|error| PyValueError::new_err(error.to_string()))
}

fn optional(fd: Option<i32>) -> std::io::Result<Option<OwnedFd>> {
    fd.map(duplicate).transpose()
}

fn small<T: TryFrom<u64>>(name: &str, value: u64) -> Fallible<T> {
    T::try_from(value).map_err(|_| Failure::Setup(format!("{name} {value} is out of range")))
}

#[pymethods]
impl Queues {
    #[getter]
    fn num_queues(&self) -> usize {
        self.stats.len()
    }

    #[pyo3(signature = (memory, timeout_s = 30.0))]
    fn set_memory(&self, py: Python<'_>, memory: &GuestMemory, timeout_s: f64) -> PyResult<()> {
        let (memory, limit) = (Arc::clone(&memory.0), timeout(timeout_s)?);
        Ok(py.detach(|| self.lock().set_memory(memory, limit)).map_err(Failure::from)?)
    }

    #[pyo3(signature = (index, *, size, desc, used, avail, base, features, enabled, kick = None, call = None, err = None,
        inflight = None))]
    #[allow(clippy::too_many_arguments)] // keyword arguments of the Python side
    fn start(
        &self,
        py: Python<'_>,
        index: u64,
        size: u64,
        desc: u64,
        used: u64,
        avail: u64,
        base: u64,
        features: u64,
        enabled: bool,
        kick: Option<i32>,
        call: Option<i32>,
        err: Option<i32>,
        inflight: Option<&InflightRegion>,
    ) -> Fallible<()> {
        let notifiers = Notifiers { kick: optional(kick)?, call: optional(call)?, err: optional(err)? };
        let (size, base) = (small("queue size", size)?, small("base", base)?);
        let setup = RingSetup { size, desc, avail, used, base, features };
        let index = small("queue", index)?;
        let inflight = inflight.map(|region| &region.0);
        Ok(py.detach(|| self.lock().start(index, setup, enabled, notifiers, inflight))?)
    }

    #[pyo3(signature = (log, *, data, notify = None, timeout_s = 30.0))]
    fn set_log(
        &self,
        py: Python<'_>,
        log: Option<&DirtyLog>,
        data: bool,
        notify: Option<i32>,
        timeout_s: f64,
    ) -> PyResult<()> {
        let (log, notify, limit) = (log.map(|log| Arc::clone(&log.log)), optional(notify)?, timeout(timeout_s)?);
        Ok(py.detach(|| self.lock().set_log(log, data, notify, limit)).map_err(Failure::from)?)
    }

    fn set_log_used(&self, py: Python<'_>, index: u64, guest_addr: Option<u64>) -> Fallible<()> {
        let index = small("queue", index)?;
        Ok(py.detach(|| self.lock().set_log_used(index, guest_addr))?)
    }

    #[pyo3(signature = (index, timeout_s = 30.0, *, leave = false, kept_timeout_s = None))]
    fn stop(
        &self,
        py: Python<'_>,
        index: u64,
        timeout_s: f64,
        leave: bool,
        kept_timeout_s: Option<f64>,
    ) -> PyResult<u16> {
        let kept = timeout(kept_timeout_s.unwrap_or(timeout_s))?;
        let (index, limit) = (small("queue", index)?, timeout(timeout_s)?);
        let mode = if leave { StopMode::Leave } else { StopMode::Finish };
        Ok(py.detach(|| self.lock().stop(index, mode, limit, kept)).map_err(Failure::from)?)
    }

    fn enable(&self, py: Python<'_>, index: u64, enabled: bool) -> Fallible<()> {
        let index = small("queue", index)?;
        Ok(py.detach(|| self.lock().enable(index, enabled))?)
    }

    fn set_kick(&self, index: u64, fd: Option<i32>) -> Fallible<()> {
        Ok(self.lock().set_kick(small("queue", index)?, optional(fd)?)?)
    }

    fn set_call(&self, index: u64, fd: Option<i32>) -> Fallible<()> {
        Ok(self.lock().set_call(small("queue", index)?, optional(fd)?)?)
    }

    fn set_err(&self, index: u64, fd: Option<i32>) -> Fallible<()> {
        Ok(self.lock().set_err(small("queue", index)?, optional(fd)?)?)
    }

    #[getter]
    fn events_fd(&self) -> i32 {
        self.events.fd().as_raw_fd()
    }

    fn take_events(&self) -> Vec<Event> {
        let name = |kind| match kind {
            EventKind::RingBroken => "ring_broken",
            EventKind::MemoryLost => "memory_lost",
            EventKind::FlushFailed => "flush_failed",
            EventKind::RequestHeld => "request_held",
            EventKind::RequestRetried => "request_retried",
            EventKind::RequestsSettled => "requests_settled",
            EventKind::WorkerFailed => "worker_failed",
        };
        let events = self.events.take();
        events.into_iter().map(|e| Event { kind: name(e.kind), index: e.index, reason: e.reason }).collect()
    }

    fn stats(&self) -> Vec<std::collections::BTreeMap<&'static str, u64>> {
        let one = |stats: &Arc<QueueStats>| {
            let counters = COUNTERS.iter().map(|&(name, place)| (name, stats.get(place)));
            counters.chain([("oldest_age_us", stats.oldest_age_us())]).collect()
        };
        self.stats.iter().map(one).collect()
    }

    fn in_flight(&self) -> Vec<InFlight> {
        let one = |queue: u16, request: core::RequestInFlight| InFlight {
            queue,
            head: request.head,
            kind: request.kind.name(),
            sector: request.sector,
            bytes: request.bytes,
            age_us: request.age_us,
            state: match request.whereabouts {
                Whereabouts::Storage => "storage",
                Whereabouts::Held => "held",
                Whereabouts::Retrying => "retrying",
            },
            errno: request.errno,
        };
        let queues = (0..).zip(&self.stats);
        queues
            .flat_map(|(queue, stats)| stats.in_flight().into_iter().map(move |request| one(queue, request)))
            .collect()
    }

    #[pyo3(signature = (timeout_s = 30.0))]
    pub(crate) fn close(&self, py: Python<'_>, timeout_s: f64) -> PyResult<()> {
        let limit = timeout(timeout_s)?;
        Ok(py.detach(|| self.lock().close(limit)).map_err(Failure::from)?)
    }
}

/// The rings of a virtio disk.
#[pyclass(frozen, extends = Queues, module = "vhostuser._native")]
pub(crate) struct BlockQueues {
    shared: Arc<BlkShared>,
}

fn action(name: &str) -> PyResult<Action> {
    match name {
        "report" => Ok(Action::Report),
        "retry" => Ok(Action::Retry),
        "hold" => Ok(Action::Hold),
        other => Err(PyValueError::new_err(format!("no action is called {other:?}"))),
    }
}

impl BlockQueues {
    fn decide(
        &self,
        py: Python<'_>,
        decision: Decision,
        queue: Option<u16>,
        head: Option<u16>,
        timeout_s: f64,
    ) -> PyResult<u64> {
        let which = match (queue, head) {
            (None, None) => None,
            (Some(queue), Some(head)) => Some((queue, head)),
            _ => return Err(PyValueError::new_err("a request is named by its queue and its head")),
        };
        let limit = timeout(timeout_s)?;
        Ok(py.detach(|| self.shared.decide(decision, which, limit)))
    }
}

#[pymethods]
impl BlockQueues {
    #[new]
    #[pyo3(signature = (engine, *, num_queues, num_workers, num_sectors, block_size = 512, read_only = false,
        writeback = true, device_id = b"".as_slice(), poll_us = 0, max_discard_sectors = 0, max_discard_seg = 0,
        max_write_zeroes_sectors = 0, max_write_zeroes_seg = 0, on_error = "report", on_enospc = "report",
        retry_for_s = None),
        text_signature = "(engine, *, num_queues, num_workers, num_sectors, block_size=512, read_only=False, \
            writeback=True, device_id=b'', poll_us=0, max_discard_sectors=0, max_discard_seg=0, \
            max_write_zeroes_sectors=0, max_write_zeroes_seg=0, on_error='report', on_enospc='report', \
            retry_for_s=None)")]
    #[allow(clippy::too_many_arguments)] // keyword arguments of the Python side
    fn new(
        engine: &EngineSpec,
        num_queues: u16,
        num_workers: u16,
        num_sectors: u64,
        block_size: u32,
        read_only: bool,
        writeback: bool,
        device_id: &[u8],
        poll_us: u64,
        max_discard_sectors: u32,
        max_discard_seg: u32,
        max_write_zeroes_sectors: u32,
        max_write_zeroes_seg: u32,
        on_error: &str,
        on_enospc: &str,
        retry_for_s: Option<f64>,
    ) -> PyResult<PyClassInitializer<Self>> {
        if num_queues == 0 || num_workers == 0 {
            return Err(Failure::Setup("a disk has at least one queue and one worker".into()).into());
        }
        if block_size < 512 || !block_size.is_power_of_two() {
            return Err(Failure::Setup(format!("block size {block_size} is no power of two from 512 on")).into());
        }
        let limits = Limits {
            num_sectors,
            block_size,
            read_only,
            max_discard_sectors,
            max_discard_seg,
            max_write_zeroes_sectors,
            max_write_zeroes_seg,
        };
        let policy = ErrorPolicy {
            on_error: action(on_error)?,
            on_enospc: action(on_enospc)?,
            retry_for: retry_for_s.map(timeout).transpose()?,
        };
        let shared = Arc::new(BlkShared::new(limits, writeback, device_id).with_policy(policy));
        let events = Arc::new(Events::new()?);
        let make = {
            let (spec, shared, events) = (engine.0.clone(), Arc::clone(&shared), Arc::clone(&events));
            move |_, waker| Ok(BlkServe::new(Arc::clone(&shared), spec.build()?, Arc::clone(&events), waker))
        };
        let queues = core::Queues::new(num_queues, num_workers, Duration::from_micros(poll_us), events, make)?;
        Ok(PyClassInitializer::from(Queues::over(queues)).add_subclass(Self { shared }))
    }

    fn set_num_sectors(&self, num_sectors: u64) {
        self.shared.set_num_sectors(num_sectors);
    }

    fn set_writeback(&self, writeback: bool) {
        self.shared.set_writeback(writeback);
    }

    fn set_rate_limit(&self, iops: u64, bps: u64) {
        self.shared.set_rate_limit(iops, bps);
    }

    #[getter]
    fn rate_limit(&self) -> (u64, u64) {
        self.shared.rate_limit()
    }

    #[pyo3(signature = (queue = None, head = None, *, timeout_s = 10.0))]
    fn retry(&self, py: Python<'_>, queue: Option<u16>, head: Option<u16>, timeout_s: f64) -> PyResult<u64> {
        self.decide(py, Decision::Retry, queue, head, timeout_s)
    }

    #[pyo3(signature = (queue = None, head = None, *, timeout_s = 10.0))]
    fn fail(&self, py: Python<'_>, queue: Option<u16>, head: Option<u16>, timeout_s: f64) -> PyResult<u64> {
        self.decide(py, Decision::Fail, queue, head, timeout_s)
    }

    #[getter]
    fn flush_failed(&self) -> bool {
        self.shared.flush_failed()
    }
}
