//! `DriverRing`.

use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use vhostuser_core::memory::GuestSlice;
use vhostuser_core::ring::{self as core, feature, layout, Areas, DriverError, Segment};

use crate::arena::Arena;
use crate::error::{Failure, Fallible};

/// The driver half of a split ring in an arena.
#[pyclass(frozen, module = "vhostuser._native")]
pub(crate) struct DriverRing {
    ring: Mutex<core::DriverRing>,
    arena: Py<Arena>,
}

impl DriverRing {
    fn lock(&self) -> MutexGuard<'_, core::DriverRing> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn area(arena: &Arena, name: &str, offset: usize, len: usize, align: usize) -> Fallible<GuestSlice> {
    let slice = arena.slice(offset, len)?;
    if offset % align != 0 {
        return Err(Failure::Setup(format!("the {name} at offset {offset:#x} is not aligned to {align}")));
    }
    Ok(slice)
}

#[pymethods]
impl DriverRing {
    #[new]
    #[pyo3(signature = (arena, *, size, desc, avail, used, features, base = 0))]
    fn new(
        arena: Bound<'_, Arena>,
        size: u16,
        desc: usize,
        avail: usize,
        used: usize,
        features: u64,
        base: u16,
    ) -> Fallible<Self> {
        if !size.is_power_of_two() {
            return Err(Failure::Setup(format!("queue size {size} is not a power of two from 1 to 32768")));
        }
        let event_idx = features & feature::EVENT_IDX != 0;
        let areas = {
            let arena = arena.get();
            Areas {
                desc: area(arena, "descriptor table", desc, layout::desc_len(size), 16)?,
                avail: area(arena, "available ring", avail, layout::avail_len(size, event_idx), 2)?,
                used: area(arena, "used ring", used, layout::used_len(size, event_idx), 4)?,
                size,
            }
        };
        let ring = core::DriverRing::new(areas, features, base)?;
        Ok(Self { ring: Mutex::new(ring), arena: arena.unbind() })
    }

    #[pyo3(signature = (readable, writable, *, table = None))]
    fn add(&self, readable: Vec<(u64, u32)>, writable: Vec<(u64, u32)>, table: Option<(usize, u64)>) -> Fallible<u16> {
        let segment = |writable| move |(addr, len)| Segment { addr, len, writable };
        let segments: Vec<_> =
            readable.into_iter().map(segment(false)).chain(writable.into_iter().map(segment(true))).collect();
        let Some((offset, addr)) = table else { return Ok(self.lock().add(&segments)?) };
        let table = self.arena.get().slice(offset, segments.len() * layout::DESC_SIZE)?;
        Ok(self.lock().add_indirect(&segments, &table, addr)?)
    }

    fn publish(&self) -> Fallible<bool> {
        Ok(self.lock().publish()?)
    }

    fn reap(&self) -> Fallible<Vec<(u16, u32)>> {
        let mut ring = self.lock();
        let mut used = Vec::new();
        while let Some(chain) = ring.reap()? {
            used.push(chain);
        }
        Ok(used)
    }

    #[pyo3(signature = (after = 1))]
    fn enable_calls(&self, after: u16) -> Fallible<bool> {
        Ok(self.lock().enable_calls(after)?)
    }

    fn disable_calls(&self) -> Result<(), Failure> {
        Ok::<(), DriverError>(self.lock().disable_calls()?).map_err(Failure::from)
    }

    #[getter]
    fn free(&self) -> u16 {
        self.lock().free()
    }

    #[getter]
    fn outstanding(&self) -> u16 {
        self.lock().outstanding()
    }

    #[getter]
    fn avail_index(&self) -> u16 {
        self.lock().avail_index()
    }

    #[getter]
    fn used_index(&self) -> u16 {
        self.lock().used_index()
    }
}
