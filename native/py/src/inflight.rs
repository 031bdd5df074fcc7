//! `InflightRegion`.

use std::os::fd::{AsFd, AsRawFd};

use pyo3::prelude::*;
use vhostuser_core::memory::inflight::{self as core, Format};
use vhostuser_core::sys::fd::duplicate;

use crate::error::Fallible;

/// The shared memory of in-flight tracking, mapped.
#[pyclass(frozen, module = "vhostuser._native")]
pub(crate) struct InflightRegion(pub(crate) core::InflightRegion);

#[pymethods]
impl InflightRegion {
    #[new]
    #[pyo3(signature = (fd, *, offset, size, num_queues, queue_size))]
    fn new(fd: i32, offset: u64, size: u64, num_queues: u16, queue_size: u16) -> Fallible<Self> {
        let fd = duplicate(fd)?;
        Ok(Self(core::InflightRegion::map(fd.as_fd(), offset, size, Format::Split, num_queues, queue_size)?))
    }

    #[staticmethod]
    #[pyo3(signature = (num_queues, queue_size, *, spare = 0))]
    fn create(num_queues: u16, queue_size: u16, spare: u16) -> Fallible<Self> {
        Ok(Self(core::InflightRegion::create(Format::Split, num_queues, queue_size, spare)?))
    }

    #[getter]
    fn fd(&self) -> i32 {
        self.0.file().as_raw_fd()
    }

    #[getter]
    fn offset(&self) -> u64 {
        self.0.offset()
    }

    #[getter]
    fn size(&self) -> u64 {
        self.0.size()
    }

    #[getter]
    fn num_queues(&self) -> u16 {
        self.0.num_queues()
    }

    #[getter]
    fn queue_size(&self) -> u16 {
        self.0.queue_size()
    }
}
