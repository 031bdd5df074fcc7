//! `EngineSpec`.

use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use vhostuser_core::disk::{Faults, FileOptions, Method, Spec};
use vhostuser_core::sys::fd::duplicate;

use crate::error::Fallible;

/// How a disk reaches its storage natively.
#[pyclass(frozen, module = "vhostuser._native")]
pub(crate) struct EngineSpec(pub(crate) Spec);

fn delay(seconds: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(seconds).map_err(|error| PyValueError::new_err(error.to_string()))
}

#[pymethods]
impl EngineSpec {
    #[staticmethod]
    #[pyo3(signature = (fd, *, engine = "auto", direct = false, memory_align = 1, offset_align = 1, block_device = false))]
    fn file(
        fd: i32,
        engine: &str,
        direct: bool,
        memory_align: usize,
        offset_align: usize,
        block_device: bool,
    ) -> PyResult<Self> {
        let method = match engine {
            "auto" => Method::Auto,
            "io_uring" => Method::IoUring,
            "syscalls" => Method::Syscalls,
            other => return Err(PyValueError::new_err(format!("no engine is called {other:?}"))),
        };
        let options = FileOptions { method, direct, memory_align, offset_align, block_device, inline: true };
        Ok(Self(Spec::file(duplicate(fd)?, options)?))
    }

    #[staticmethod]
    fn memory(size: u64) -> Fallible<Self> {
        Ok(Self(Spec::memory(size)?))
    }

    #[staticmethod]
    fn null() -> Self {
        Self(Spec::null())
    }

    #[pyo3(signature = (*, delay_read_s = 0.0, delay_write_s = 0.0, delay_flush_s = 0.0, error_read = 0.0,
        error_write = 0.0, error_flush = 0.0, errno = 5, error_limit = None, seed = 0))]
    #[allow(clippy::too_many_arguments)] // keyword arguments of the Python side
    fn with_faults(
        &self,
        delay_read_s: f64,
        delay_write_s: f64,
        delay_flush_s: f64,
        error_read: f64,
        error_write: f64,
        error_flush: f64,
        errno: i32,
        error_limit: Option<u64>,
        seed: u64,
    ) -> PyResult<Self> {
        let faults = Faults {
            delay_read: delay(delay_read_s)?,
            delay_write: delay(delay_write_s)?,
            delay_flush: delay(delay_flush_s)?,
            error_read,
            error_write,
            error_flush,
            errno,
            error_limit,
            seed,
        };
        Ok(Self(self.0.with_faults(faults)?))
    }

    fn resize(&self, size: u64) -> Fallible<()> {
        Ok(self.0.resize(size)?)
    }

    #[getter]
    fn name(&self) -> &'static str {
        self.0.name()
    }
}
