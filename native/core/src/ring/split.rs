//! The three areas of a split ring in guest memory, and the checks before they are used.

use std::fmt;

use super::{feature, index, layout};
use crate::memory::{GuestMemory, GuestSlice, OutOfBounds};

/// What a ring needs to start: the payloads of NUM, ADDR and BASE, and the negotiated features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingSetup {
    /// Descriptors, a power of two up to 32768.
    pub size: u16,
    /// User address of the descriptor table.
    pub desc: u64,
    /// User address of the available ring.
    pub avail: u64,
    /// User address of the used ring.
    pub used: u64,
    /// Next available entry to take.
    pub base: u16,
    /// Negotiated feature bits.
    pub features: u64,
}

/// Why a ring cannot start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SetupError {
    /// Not a power of two from 1 to 32768.
    Size(u32),
    /// An area is not at a multiple of what it must be.
    Alignment(&'static str, u64),
    /// An area is not wholly within one region of the memory table.
    Unmapped(&'static str, u64),
    /// Anything else, said in words.
    Other(String),
}

impl fmt::Display for SetupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Size(size) => write!(f, "queue size {size} is not a power of two from 1 to 32768"),
            Self::Alignment(area, at) => write!(f, "the {area} at user address {at:#x} is not aligned"),
            Self::Unmapped(area, at) => {
                write!(f, "the {area} at user address {at:#x} is not within one region of guest memory")
            }
            Self::Other(why) => f.write_str(why),
        }
    }
}

/// The three areas, found in memory.
#[derive(Clone, Debug)]
pub struct Areas {
    /// Descriptor table.
    pub desc: GuestSlice,
    /// Available ring: the driver writes it.
    pub avail: GuestSlice,
    /// Used ring: the device writes it.
    pub used: GuestSlice,
    /// Descriptors in the table.
    pub size: u16,
}

impl Areas {
    /// Looks the areas of `setup` up in `memory`.
    pub fn find(setup: &RingSetup, memory: &GuestMemory) -> Result<Self, SetupError> {
        let size = setup.size;
        if !size.is_power_of_two() {
            return Err(SetupError::Size(u32::from(size)));
        }
        let event_idx = setup.features & feature::EVENT_IDX != 0;
        let find = |area: &'static str, at: u64, len: usize, align: u64| {
            if at % align != 0 {
                return Err(SetupError::Alignment(area, at));
            }
            let slice = memory.user_slice(at, len).map_err(|_| SetupError::Unmapped(area, at))?;
            // The user address is the peer's; what counts for atomics is where the bytes are here.
            if slice.is_aligned(align.min(8) as usize) {
                Ok(slice)
            } else {
                Err(SetupError::Alignment(area, at))
            }
        };
        Ok(Self {
            desc: find("descriptor table", setup.desc, layout::desc_len(size), 16)?,
            avail: find("available ring", setup.avail, layout::avail_len(size, event_idx), 2)?,
            used: find("used ring", setup.used, layout::used_len(size, event_idx), 4)?,
            size,
        })
    }

    /// Copies descriptor `at` of the table.
    #[inline]
    pub fn descriptor(&self, at: u16) -> Result<layout::Descriptor, OutOfBounds> {
        let byte = usize::from(at) * layout::DESC_SIZE;
        Ok(layout::Descriptor::from_words(self.desc.load_u64(byte)?, self.desc.load_u64(byte + 8)?))
    }

    /// Stores descriptor `at` of the table.
    pub fn set_descriptor(&self, at: u16, descriptor: layout::Descriptor) -> Result<(), OutOfBounds> {
        let byte = usize::from(at) * layout::DESC_SIZE;
        self.desc.store_u64(byte, descriptor.addr)?;
        self.desc.store_u64(byte + 8, descriptor.rest())
    }

    /// The slot of a free-running index.
    #[inline]
    pub fn slot(&self, at: u16) -> u16 {
        index::slot(at, self.size)
    }
}
