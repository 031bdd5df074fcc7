//! `DeviceRing`: the device half without a worker, for tests that play the device step by step.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use vhostuser_core::memory as core_memory;
use vhostuser_core::ring::{self as core, Chain, Fault, RingSetup};

use crate::error::{Failure, Fallible};
use crate::inflight::InflightRegion;
use crate::memory::GuestMemory;

/// Head, bytes to read, bytes of room, and what is wrong with the chain.
type Taken = (u16, u64, u64, Option<&'static str>);

struct State {
    ring: core::DeviceRing,
    /// The chains in flight, by head.
    taken: Vec<Option<Chain>>,
    /// Chains to be used again, as a worker does.
    spare: Vec<Chain>,
}

impl State {
    fn chain(&self, head: u16) -> Fallible<&Chain> {
        let chain = self.taken.get(usize::from(head)).and_then(Option::as_ref);
        chain.ok_or_else(|| Failure::Setup(format!("chain {head} is not in flight")))
    }
}

/// The device half of a split ring in guest memory.
#[pyclass(frozen, module = "vhostuser._native")]
pub(crate) struct DeviceRing {
    state: Mutex<State>,
    memory: Arc<core_memory::GuestMemory>,
}

impl DeviceRing {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn name(fault: Fault) -> &'static str {
    match fault {
        Fault::Unmapped => "unmapped",
        Fault::Order => "order",
        Fault::Length => "length",
    }
}

#[pymethods]
impl DeviceRing {
    #[new]
    #[pyo3(signature = (memory, *, size, desc, avail, used, features, base = 0, inflight = None, index = 0))]
    #[allow(clippy::too_many_arguments)] // keyword arguments of the Python side
    fn new(
        memory: &GuestMemory,
        size: u16,
        desc: u64,
        avail: u64,
        used: u64,
        features: u64,
        base: u16,
        inflight: Option<&InflightRegion>,
        index: u16,
    ) -> Fallible<Self> {
        let memory = Arc::clone(&memory.0);
        let setup = RingSetup { size, desc, avail, used, base, features };
        let mut ring = core::DeviceRing::new(setup, &memory)?;
        if let Some(region) = inflight {
            ring.track(region.0.queue(index, size)?)?;
        }
        let taken = (0..size).map(|_| None).collect();
        Ok(Self { state: Mutex::new(State { ring, taken, spare: Vec::new() }), memory })
    }

    fn take(&self) -> Fallible<Option<Taken>> {
        let mut state = self.lock();
        let mut chain = state.spare.pop().unwrap_or_default();
        match state.ring.take(&self.memory, &mut chain) {
            Ok(true) => {}
            none => {
                state.spare.push(chain);
                none?;
                return Ok(None);
            }
        }
        let head = chain.head;
        let taken = (head, chain.readable_len, chain.writable_len, chain.fault.map(name));
        state.taken[usize::from(head)] = Some(chain);
        Ok(Some(taken))
    }

    fn read<'py>(&self, py: Python<'py>, head: u16) -> PyResult<Bound<'py, PyBytes>> {
        let state = self.lock();
        let runs = state.chain(head)?.readable();
        PyBytes::new_with(py, runs.iter().map(core_memory::IoVec::len).sum(), |into| {
            let mut at = 0;
            for run in runs {
                at += run.copy_to(&mut into[at..]);
            }
            Ok(())
        })
    }

    fn write(&self, head: u16, data: &[u8]) -> Fallible<usize> {
        let state = self.lock();
        let mut stored = 0;
        for run in &state.chain(head)?.writable {
            stored += run.copy_from(&data[stored..]);
        }
        Ok(stored)
    }

    fn push(&self, head: u16, written: u32) -> Fallible<()> {
        let mut state = self.lock();
        state.chain(head)?;
        state.ring.push(head, written)?;
        let chain = state.taken[usize::from(head)].take();
        state.spare.extend(chain);
        Ok(())
    }

    fn publish(&self) -> Fallible<bool> {
        Ok(self.lock().ring.publish()?)
    }

    fn suppress_kicks(&self) -> Fallible<()> {
        Ok(self.lock().ring.suppress_kicks()?)
    }

    fn enable_kicks(&self) -> Fallible<bool> {
        Ok(self.lock().ring.enable_kicks()?)
    }

    #[getter]
    fn base(&self) -> u16 {
        self.lock().ring.base()
    }

    #[getter]
    fn in_flight(&self) -> u16 {
        self.lock().ring.in_flight()
    }

    #[getter]
    fn used_index(&self) -> u16 {
        self.lock().ring.published()
    }
}
