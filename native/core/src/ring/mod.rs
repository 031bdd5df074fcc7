//! Split virtqueues, both halves (virtio: Split Virtqueues).
//!
//! `layout` and `index` are functions of their arguments; `split` reads and writes the three areas of
//! a ring in guest memory; `device` takes chains and gives them back; `driver` makes them.

mod ahead;
mod chain;
mod device;
mod driver;
pub mod index;
pub mod layout;
mod split;

pub(crate) use chain::{copy_in, copy_out};
pub use chain::{Chain, Fault, Status};
pub use device::{DeviceRing, RingLog};
pub(crate) use driver::write_table;
pub use driver::{DriverError, DriverRing, Segment};
pub use split::{Areas, RingSetup, SetupError};

use std::fmt;

use crate::memory::inflight::Stale;
use crate::memory::OutOfBounds;

/// Feature bits that change how a ring works (virtio: Reserved Feature Bits).
pub mod feature {
    /// VIRTIO_F_NOTIFY_ON_EMPTY (legacy).
    pub const NOTIFY_ON_EMPTY: u64 = 1 << 24;
    /// VIRTIO_F_INDIRECT_DESC.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// VIRTIO_F_EVENT_IDX.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// VIRTIO_F_VERSION_1.
    pub const VERSION_1: u64 = 1 << 32;
}

/// The driver broke the ring: nothing more can be taken from it until it is set up anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the fields are what `Display` says they are
pub enum Broken {
    /// avail.idx is further ahead than the ring is long.
    AvailJump { index: u16, seen: u16 },
    /// An available head is not a descriptor of the table.
    Head { head: u16 },
    /// A head was made available again before it was used.
    HeadTwice { head: u16 },
    /// `next` is not a descriptor of its table.
    Next { head: u16, next: u16 },
    /// A chain is longer than its tables: it loops.
    Loop { head: u16 },
    /// An indirect descriptor without the feature, inside of an indirect table, or with NEXT.
    Indirect { head: u16 },
    /// An indirect table whose length is zero, no multiple of 16, or too large.
    IndirectLength { head: u16, len: u32 },
    /// The ring's own memory cannot be reached any more.
    Memory,
    /// What the in-flight region says cannot be.
    Stale(Stale),
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AvailJump { index, seen } => {
                write!(f, "avail.idx jumped to {seen} while the next entry is {index}")
            }
            Self::Head { head } => write!(f, "head {head} is beyond the descriptor table"),
            Self::HeadTwice { head } => write!(f, "head {head} was made available twice"),
            Self::Next { head, next } => {
                write!(f, "the chain at head {head} goes on at {next}, beyond its descriptor table")
            }
            Self::Loop { head } => write!(f, "the chain at head {head} loops"),
            Self::Indirect { head } => {
                write!(f, "the chain at head {head} has an indirect descriptor where none is allowed")
            }
            Self::IndirectLength { head, len } => {
                write!(f, "the chain at head {head} has an indirect table of {len} bytes")
            }
            Self::Memory => f.write_str("the ring lies outside of guest memory"),
            Self::Stale(stale) => stale.fmt(f),
        }
    }
}

impl From<OutOfBounds> for Broken {
    fn from(_: OutOfBounds) -> Self {
        Self::Memory
    }
}

#[cfg(all(test, loom))]
mod orders;
#[cfg(test)]
mod tests;
