//! `Arena`: a front-end's shared memory, and its export as a buffer.
#![allow(unsafe_code)]

use std::ffi::{c_int, CStr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use vhostuser_core::memory::{GuestSlice, Mapping};
use vhostuser_core::sys::memfd;

use crate::error::{Failure, Fallible};

/// A sealed memfd, mapped.
#[pyclass(frozen, module = "vhostuser._native")]
pub(crate) struct Arena {
    file: OwnedFd,
    map: Arc<Mapping>,
}

impl Arena {
    /// The memory.
    pub(crate) fn mapping(&self) -> Arc<Mapping> {
        Arc::clone(&self.map)
    }

    /// A run of the arena.
    pub(crate) fn slice(&self, offset: usize, len: usize) -> Fallible<GuestSlice> {
        GuestSlice::new(Arc::clone(&self.map), offset, len)
            .map_err(|_| Failure::Setup(format!("{len} bytes at offset {offset:#x} do not lie in the arena")))
    }
}

#[pymethods]
impl Arena {
    #[new]
    #[pyo3(signature = (size, *, huge_pages = false))]
    fn new(size: u64, huge_pages: bool) -> Fallible<Self> {
        if size == 0 {
            return Err(Failure::Setup("an arena has at least one byte".into()));
        }
        let file = memfd::sealed(c"vhostuser-arena", size, huge_pages)?;
        let map = Mapping::of_file(file.as_fd(), 0, size)?;
        Ok(Self { file, map })
    }

    #[getter]
    fn fd(&self) -> i32 {
        self.file.as_raw_fd()
    }

    #[getter]
    fn address(&self) -> u64 {
        self.map.start().as_ptr() as u64
    }

    #[getter]
    fn size(&self) -> usize {
        self.map.len()
    }

    /// A writable view of all bytes. The device writes them too.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        const BYTES: &CStr = c"B";
        if view.is_null() {
            return Err(PyBufferError::new_err("no place for the view"));
        }
        let arena = slf.get();
        let (base, len) = (arena.map.start(), arena.map.len());
        // SAFETY: CPython passes a `Py_buffer` to fill; every field is set. The owner that `into_ptr` hands over keeps
        // the mapping until the view is released. `shape` and `strides` point into the view itself, as
        // `PyBuffer_FillInfo` does, and the format is a static string.
        unsafe {
            (*view).obj = slf.clone().into_any().into_ptr();
            (*view).buf = base.as_ptr().cast();
            (*view).len = len as isize;
            (*view).readonly = 0;
            (*view).itemsize = 1;
            (*view).format =
                if flags & ffi::PyBUF_FORMAT != 0 { BYTES.as_ptr().cast_mut() } else { std::ptr::null_mut() };
            (*view).ndim = 1;
            (*view).shape = if flags & ffi::PyBUF_ND != 0 { &raw mut (*view).len } else { std::ptr::null_mut() };
            (*view).strides = if flags & ffi::PyBUF_STRIDES == ffi::PyBUF_STRIDES {
                &raw mut (*view).itemsize
            } else {
                std::ptr::null_mut()
            };
            (*view).suboffsets = std::ptr::null_mut();
            (*view).internal = std::ptr::null_mut();
        }
        Ok(())
    }
}
