//! A bounds-checked run of guest memory, for the structures of a ring.

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use super::{IoVec, Mapping};
use crate::sys::sync::{AtomicU16, AtomicU32, AtomicU64, AtomicU8, Ordering};

/// An access that does not fit into a slice, or is not aligned for its type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfBounds;

impl fmt::Display for OutOfBounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("access outside of a ring's memory")
    }
}

/// A run of guest memory. The guest writes it at any time: no `&[u8]` is made of it; a value is
/// copied out once, and the copy checked and used. Numbers in it are little-endian.
#[derive(Clone, Debug)]
pub struct GuestSlice {
    base: NonNull<u8>,
    len: usize,
    map: Arc<Mapping>,
}

// SAFETY: a pointer into a mapping that the slice keeps; accesses are atomics or raw copies.
unsafe impl Send for GuestSlice {}
// SAFETY: as above.
unsafe impl Sync for GuestSlice {}

impl GuestSlice {
    /// `len` bytes from byte `offset` of `map`.
    pub fn new(map: Arc<Mapping>, offset: usize, len: usize) -> Result<Self, OutOfBounds> {
        if offset.checked_add(len).is_none_or(|end| end > map.len()) {
            return Err(OutOfBounds);
        }
        // SAFETY: within the mapping, just checked.
        let base = unsafe { map.start().add(offset) };
        Ok(Self { base, len, map })
    }

    /// Bytes in the slice.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether the first byte lies at a multiple of `align` in this process.
    pub fn is_aligned(&self, align: usize) -> bool {
        self.base.as_ptr() as usize % align == 0
    }

    /// Whether the peer took the memory away.
    pub fn poisoned(&self) -> bool {
        self.map.poisoned()
    }

    /// The whole slice as one run. It must not outlive the slice.
    pub fn as_iovec(&self) -> IoVec {
        // SAFETY: in bounds; the caller keeps the slice, and with it the mapping.
        unsafe { IoVec::from_raw_parts(self.base.as_ptr(), self.len) }
    }

    #[inline]
    fn at<T>(&self, offset: usize) -> Result<NonNull<T>, OutOfBounds> {
        let size = std::mem::size_of::<T>();
        if self.len < size || offset > self.len - size {
            return Err(OutOfBounds);
        }
        // SAFETY: within the slice, just checked.
        let at = unsafe { self.base.add(offset) }.cast::<T>();
        if at.as_ptr() as usize % std::mem::align_of::<T>() != 0 {
            return Err(OutOfBounds);
        }
        Ok(at)
    }

    /// Loads the byte at `offset`.
    #[inline]
    pub fn load_u8(&self, offset: usize) -> Result<u8, OutOfBounds> {
        let at = self.at::<AtomicU8>(offset)?;
        // SAFETY: in bounds (`at`), mapped (`self.map`); an atomic may race with the guest.
        Ok(unsafe { at.as_ref() }.load(Ordering::Relaxed))
    }

    /// Stores the byte at `offset`, ordered after earlier writes.
    #[inline]
    pub fn store_u8(&self, offset: usize, value: u8) -> Result<(), OutOfBounds> {
        let at = self.at::<AtomicU8>(offset)?;
        // SAFETY: as in `load_u8`.
        unsafe { at.as_ref() }.store(value, Ordering::Release);
        Ok(())
    }

    /// Sets `bits` of the byte at `offset`, ordered after earlier writes.
    #[inline]
    pub fn set_bits(&self, offset: usize, bits: u8) -> Result<(), OutOfBounds> {
        let at = self.at::<AtomicU8>(offset)?;
        // SAFETY: as in `load_u8`.
        unsafe { at.as_ref() }.fetch_or(bits, Ordering::SeqCst);
        Ok(())
    }

    /// Loads the byte at `offset` and makes it zero, in one step, ordered before later reads.
    pub fn take_byte(&self, offset: usize) -> Result<u8, OutOfBounds> {
        let at = self.at::<AtomicU8>(offset)?;
        // SAFETY: as in `load_u8`.
        Ok(unsafe { at.as_ref() }.swap(0, Ordering::SeqCst))
    }

    /// Loads the `u16` at byte `offset`, ordered before later reads.
    #[inline]
    pub fn load_u16(&self, offset: usize) -> Result<u16, OutOfBounds> {
        let at = self.at::<AtomicU16>(offset)?;
        // SAFETY: in bounds and aligned (`at`), mapped (`self.map`); an atomic may race with the guest.
        Ok(u16::from_le(unsafe { at.as_ref() }.load(Ordering::Acquire)))
    }

    /// Stores the `u16` at byte `offset`, ordered after earlier writes.
    #[inline]
    pub fn store_u16(&self, offset: usize, value: u16) -> Result<(), OutOfBounds> {
        let at = self.at::<AtomicU16>(offset)?;
        // SAFETY: as in `load_u16`.
        unsafe { at.as_ref() }.store(value.to_le(), Ordering::Release);
        Ok(())
    }

    /// Stores the `u32` at byte `offset`.
    #[inline]
    pub fn store_u32(&self, offset: usize, value: u32) -> Result<(), OutOfBounds> {
        let at = self.at::<AtomicU32>(offset)?;
        // SAFETY: as in `load_u16`.
        unsafe { at.as_ref() }.store(value.to_le(), Ordering::Relaxed);
        Ok(())
    }

    /// Loads the `u32` at byte `offset`.
    #[inline]
    pub fn load_u32(&self, offset: usize) -> Result<u32, OutOfBounds> {
        let at = self.at::<AtomicU32>(offset)?;
        // SAFETY: as in `load_u16`.
        Ok(u32::from_le(unsafe { at.as_ref() }.load(Ordering::Relaxed)))
    }

    /// Loads the `u64` at byte `offset`.
    #[inline]
    pub fn load_u64(&self, offset: usize) -> Result<u64, OutOfBounds> {
        let at = self.at::<AtomicU64>(offset)?;
        // SAFETY: as in `load_u16`.
        Ok(u64::from_le(unsafe { at.as_ref() }.load(Ordering::Relaxed)))
    }

    /// Stores the `u64` at byte `offset`.
    #[inline]
    pub fn store_u64(&self, offset: usize, value: u64) -> Result<(), OutOfBounds> {
        let at = self.at::<AtomicU64>(offset)?;
        // SAFETY: as in `load_u16`.
        unsafe { at.as_ref() }.store(value.to_le(), Ordering::Relaxed);
        Ok(())
    }
}
