//! `ChainQueues` and `Chain`.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use vhostuser_core::chains::{ChainServe, HeldChain, Hub};
use vhostuser_core::disk::Spec;
use vhostuser_core::worker::{self as core, Events};

use crate::error::Failure;
use crate::queues::{timeout, Queues};

/// Rings whose chains are handed to Python.
#[pyclass(frozen, extends = Queues, module = "vhostuser._native")]
pub(crate) struct ChainQueues {
    hub: Arc<Hub>,
}

#[pymethods]
impl ChainQueues {
    #[new]
    #[pyo3(signature = (*, num_queues, num_workers = 1))]
    fn new(num_queues: u16, num_workers: u16) -> PyResult<PyClassInitializer<Self>> {
        if num_queues == 0 || num_workers == 0 {
            return Err(Failure::Setup("a device has at least one queue and one worker".into()).into());
        }
        let hub = Hub::new(num_queues, num_workers);
        let make = {
            let hub = Arc::clone(&hub);
            move |worker, waker| {
                let engine = Spec::null().build()?;
                Ok(ChainServe::new(Arc::clone(&hub), worker, usize::from(num_workers), waker, engine))
            }
        };
        let queues = core::Queues::new(num_queues, num_workers, Duration::ZERO, Arc::new(Events::new()?), make)?;
        Ok(PyClassInitializer::from(Queues::over(queues)).add_subclass(Self { hub }))
    }

    #[pyo3(signature = (index, timeout_s = None))]
    fn take(&self, py: Python<'_>, index: u16, timeout_s: Option<f64>) -> PyResult<Option<Chain>> {
        let limit = timeout_s.map(timeout).transpose()?;
        let chain = py.detach(|| self.hub.take(index, limit));
        Ok(chain.map(|held| Chain { held, read: AtomicUsize::new(0), written: AtomicUsize::new(0) }))
    }

    #[getter]
    fn closed(&self) -> bool {
        self.hub.is_closed()
    }

    /// Sends away who waits in `take` and ends the workers.
    #[pyo3(signature = (timeout_s = 30.0))]
    fn close(slf: &Bound<'_, Self>, timeout_s: f64) -> PyResult<()> {
        slf.get().hub.close();
        slf.as_super().get().close(slf.py(), timeout_s)
    }
}

/// One chain of a ring, in Python's hands.
#[pyclass(frozen, module = "vhostuser._native")]
pub(crate) struct Chain {
    held: HeldChain,
    read: AtomicUsize,
    written: AtomicUsize,
}

fn given_back() -> Failure {
    Failure::Setup("the chain was given back already".into())
}

#[pymethods]
impl Chain {
    #[getter]
    fn index(&self) -> u16 {
        self.held.index()
    }

    #[getter]
    fn head(&self) -> u16 {
        self.held.head()
    }

    #[getter]
    fn readable(&self) -> u64 {
        self.held.readable()
    }

    #[getter]
    fn writable(&self) -> u64 {
        self.held.writable()
    }

    #[pyo3(signature = (length = -1), text_signature = "($self, length=-1)")]
    fn read<'py>(&self, py: Python<'py>, length: i64) -> PyResult<Bound<'py, PyBytes>> {
        let offset = self.read.load(Ordering::Relaxed);
        let left = (self.held.readable() as usize).saturating_sub(offset);
        let length = usize::try_from(length).map_or(left, |length| length.min(left));
        let bytes = PyBytes::new_with(py, length, |into| {
            self.held.read(offset, into).map(drop).ok_or_else(|| given_back().into())
        })?;
        self.read.store(offset + length, Ordering::Relaxed);
        Ok(bytes)
    }

    fn write(&self, data: &[u8]) -> PyResult<usize> {
        let offset = self.written.load(Ordering::Relaxed);
        let stored = self.held.write(offset, data).ok_or_else(given_back)?;
        self.written.store(offset + stored, Ordering::Relaxed);
        Ok(stored)
    }

    #[pyo3(signature = (written = None))]
    fn complete(&self, written: Option<u32>) -> PyResult<()> {
        let written = written.unwrap_or(self.written.load(Ordering::Relaxed) as u32);
        if self.held.complete(written, false) {
            return Ok(());
        }
        Err(given_back().into())
    }
}
