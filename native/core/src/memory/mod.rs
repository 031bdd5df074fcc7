//! Guest memory: mapping it, finding bytes in it, reading and writing them while the guest does so too.
#![allow(unsafe_code)]

mod dirty;
pub mod inflight;
mod iovec;
mod mapping;
mod slice;
mod space;

pub use dirty::{BeyondLog, DirtyLog, PAGE};
pub use inflight::{InflightQueue, InflightRegion};
pub(crate) use iovec::words_of;
pub use iovec::IoVec;
pub use mapping::Mapping;
pub use slice::{GuestSlice, OutOfBounds};
pub use space::{GuestMemory, MemoryError, RegionSpec, Unmapped, MAX_REGIONS};
