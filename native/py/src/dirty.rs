//! `DirtyLog`.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use vhostuser_core::memory as core;
use vhostuser_core::sys::fd::duplicate;
use vhostuser_core::sys::memfd;

use crate::error::{Failure, Fallible};

/// A bitmap of written pages, mapped.
#[pyclass(frozen, module = "vhostuser._native")]
pub(crate) struct DirtyLog {
    pub(crate) log: Arc<core::DirtyLog>,
    file: OwnedFd,
    offset: u64,
}

impl DirtyLog {
    fn over(file: OwnedFd, offset: u64, size: u64) -> Fallible<Self> {
        let log = core::DirtyLog::map(file.as_fd(), offset, size)
            .map_err(|error| Failure::Memory(format!("the dirty log cannot be mapped: {error}")))?;
        Ok(Self { log: Arc::new(log), file, offset })
    }
}

#[pymethods]
impl DirtyLog {
    #[new]
    #[pyo3(signature = (fd, *, offset, size))]
    fn new(fd: i32, offset: u64, size: u64) -> Fallible<Self> {
        Self::over(duplicate(fd)?, offset, size)
    }

    #[staticmethod]
    fn create(size: u64) -> Fallible<Self> {
        Self::over(memfd::sealed(c"vhostuser-log", size, false)?, 0, size)
    }

    #[getter]
    fn fd(&self) -> i32 {
        self.file.as_raw_fd()
    }

    #[getter]
    fn offset(&self) -> u64 {
        self.offset
    }

    #[getter]
    fn size(&self) -> usize {
        self.log.len()
    }

    fn take<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        PyBytes::new_with(py, self.log.len(), |into| {
            self.log.take(into);
            Ok(())
        })
    }
}
