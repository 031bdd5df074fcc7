//! `GuestMemory`.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};
use vhostuser_core::memory::{self as core, RegionSpec};
use vhostuser_core::sys::fd::duplicate;

use crate::error::Fallible;

type RegionTuple = (u64, u64, u64, u64, i32);

/// An immutable table of mapped guest memory regions.
#[pyclass(frozen, module = "vhostuser._native")]
pub(crate) struct GuestMemory(pub(crate) Arc<core::GuestMemory>);

fn region(tuple: RegionTuple) -> std::io::Result<(RegionSpec, OwnedFd)> {
    let (guest_addr, size, user_addr, mmap_offset, fd) = tuple;
    Ok((RegionSpec { guest_addr, size, user_addr, mmap_offset }, duplicate(fd)?))
}

#[pymethods]
impl GuestMemory {
    #[new]
    #[pyo3(signature = (regions = Vec::new()), text_signature = "(regions=())")]
    fn new(regions: Vec<RegionTuple>) -> Fallible<Self> {
        let regions = regions.into_iter().map(region).collect::<Result<Vec<_>, _>>()?;
        let table = core::GuestMemory::new(regions.iter().map(|(spec, fd)| (*spec, fd.as_fd())))?;
        Ok(Self(Arc::new(table)))
    }

    fn add(&self, region: RegionTuple) -> Fallible<Self> {
        let (spec, fd) = self::region(region)?;
        Ok(Self(Arc::new(self.0.add(spec, fd.as_fd())?)))
    }

    fn remove(&self, guest_addr: u64, size: u64, user_addr: u64) -> Fallible<Self> {
        Ok(Self(Arc::new(self.0.remove(guest_addr, size, user_addr)?)))
    }

    #[getter]
    fn regions<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let all: Vec<_> = self.0.regions().map(|r| (r.guest_addr, r.size, r.user_addr, r.mmap_offset)).collect();
        PyTuple::new(py, all)
    }

    #[getter]
    fn poisoned(&self) -> bool {
        self.0.poisoned()
    }

    fn read<'py>(&self, py: Python<'py>, guest_addr: u64, length: usize) -> PyResult<Bound<'py, PyBytes>> {
        PyBytes::new_with(py, length, |into| {
            self.0.read(guest_addr, into).map_err(|error| crate::error::Failure::from(error).into())
        })
    }

    fn write(&self, guest_addr: u64, data: &[u8]) -> Fallible<()> {
        Ok(self.0.write(guest_addr, data)?)
    }
}
