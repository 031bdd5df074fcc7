//! The in-flight region: which chains a device has taken and not given back, kept where it outlives the device
//! (vhost-user: Inflight I/O tracking).
//!
//! The file is the peer's and its content is not trusted: every number is checked before it is followed.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::{GuestSlice, Mapping, OutOfBounds};
use crate::sys::memfd;

/// The queues of a region begin at multiples of this.
const ALIGN: u64 = 64;
/// The largest queue, and so the most entries of one part.
const MAX_SIZE: u16 = 32768;

/// What the parts of a region are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `DescStateSplit`.
    Split,
    /// `DescStatePacked`.
    Packed,
}

impl Format {
    /// Bytes of the part of one queue. The specification leaves it to the back-end; this is what others use.
    pub const fn stride(self, queue_size: u16) -> u64 {
        let bytes = match self {
            Self::Split => split::desc(queue_size) as u64,
            Self::Packed => packed::desc(queue_size) as u64,
        };
        bytes.next_multiple_of(ALIGN)
    }
}

/// Where things are in the part of a split queue (vhost-user: Inflight I/O tracking, QueueRegionSplit).
pub mod split {
    /// u16: 0 in a buffer that nobody has used, 1 in one of this layout.
    pub const VERSION: usize = 8;
    /// u16: entries, the size of the ring.
    pub const DESC_NUM: usize = 10;
    /// u16: the head given back last.
    pub const LAST_BATCH_HEAD: usize = 12;
    /// u16: used.idx as of the last batch whose marks were cleared.
    pub const USED_IDX: usize = 14;
    /// In an entry, u8: the chain was taken and not given back.
    pub const INFLIGHT: usize = 0;
    /// In an entry, u16: the head given back before this one.
    pub const NEXT: usize = 6;
    /// In an entry, u64: how many chains were taken before it.
    pub const COUNTER: usize = 8;

    /// Byte of entry `at`.
    pub const fn desc(at: u16) -> usize {
        16 + 16 * at as usize
    }
}

/// Where things are in the part of a packed queue (vhost-user: Inflight I/O tracking, QueueRegionPacked).
pub mod packed {
    /// u16, as in a split part.
    pub const VERSION: usize = 8;
    /// u16: entries, the size of the ring.
    pub const DESC_NUM: usize = 10;
    /// u16: the first free entry.
    pub const FREE_HEAD: usize = 12;
    /// u16: likewise, before the batch that is being given back.
    pub const OLD_FREE_HEAD: usize = 14;
    /// u16: where the next used descriptor goes.
    pub const USED_IDX: usize = 16;
    /// u16: likewise, before the batch.
    pub const OLD_USED_IDX: usize = 18;
    /// u8: the device's wrap counter.
    pub const USED_WRAP_COUNTER: usize = 20;
    /// u8: likewise, before the batch.
    pub const OLD_USED_WRAP_COUNTER: usize = 21;
    /// In an entry, u8: the list was taken and not given back; heads only.
    pub const INFLIGHT: usize = 0;
    /// In an entry, u16: the next free one, or the next of the list.
    pub const NEXT: usize = 2;
    /// In an entry, u16: the last one of the list; heads only.
    pub const LAST: usize = 4;
    /// In an entry, u16: descriptors of the list; heads only.
    pub const NUM: usize = 6;
    /// In an entry, u64: how many lists were taken before it; heads only.
    pub const COUNTER: usize = 8;
    /// In an entry, u16: the descriptor's buffer id.
    pub const ID: usize = 16;
    /// In an entry, u16: the descriptor's flags.
    pub const FLAGS: usize = 18;
    /// In an entry, u32: the descriptor's length.
    pub const LEN: usize = 20;
    /// In an entry, u64: the descriptor's address.
    pub const ADDR: usize = 24;

    /// Byte of entry `at`.
    pub const fn desc(at: u16) -> usize {
        32 + 32 * at as usize
    }
}

/// Why a region cannot be used as described.
#[derive(Debug)]
pub enum InflightError {
    /// A number of its description makes no sense; in words.
    Shape(String),
    /// It cannot be made or mapped.
    Io(std::io::Error),
}

impl fmt::Display for InflightError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shape(why) => write!(f, "the in-flight region {why}"),
            Self::Io(error) => write!(f, "the in-flight region cannot be mapped: {error}"),
        }
    }
}

impl From<std::io::Error> for InflightError {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

/// The shared memory of all queues of a device. Mapped while anybody uses a part of it.
#[derive(Clone, Debug)]
pub struct InflightRegion {
    map: Arc<Mapping>,
    offset: u64,
    num_queues: u16,
    queue_size: u16,
    format: Format,
}

impl InflightRegion {
    /// A fresh region of zeroes, in a file that nobody can make shorter. `spare` bytes of the file are left behind it.
    pub fn create(format: Format, num_queues: u16, queue_size: u16, spare: u16) -> Result<Self, InflightError> {
        let size = size_of(format, num_queues, queue_size)?;
        let file: OwnedFd = memfd::sealed(c"vhostuser-inflight", size + u64::from(spare), false)?;
        Self::map(file.as_fd(), 0, size, format, num_queues, queue_size)
    }

    /// The region that lies in `size` bytes of `fd` from `offset`. The descriptor is duplicated.
    pub fn map(
        fd: BorrowedFd<'_>,
        offset: u64,
        size: u64,
        format: Format,
        num_queues: u16,
        queue_size: u16,
    ) -> Result<Self, InflightError> {
        let needed = size_of(format, num_queues, queue_size)?;
        if size < needed {
            let why = format!("has {size} bytes: {num_queues} queues of {queue_size} take {needed}");
            return Err(InflightError::Shape(why));
        }
        if offset % 8 != 0 {
            return Err(InflightError::Shape(format!("begins at byte {offset}, which is no multiple of 8")));
        }
        // Only what is used is mapped: a peer may say any size.
        let map = Mapping::of_file(fd, offset, needed)?;
        Ok(Self { map, offset, num_queues, queue_size, format })
    }

    /// The file.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.map.file()
    }

    /// Where it begins in the file.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Its bytes.
    pub fn size(&self) -> u64 {
        self.map.len() as u64
    }

    /// How many queues it has parts for.
    pub fn num_queues(&self) -> u16 {
        self.num_queues
    }

    /// The largest ring that fits a part.
    pub fn queue_size(&self) -> u16 {
        self.queue_size
    }

    /// The part of split queue `index`, for a ring of `size`.
    pub fn queue(&self, index: u16, size: u16) -> Result<InflightQueue, InflightError> {
        if index >= self.num_queues {
            let why = format!("has no part for queue {index}: it has {}", self.num_queues);
            return Err(InflightError::Shape(why));
        }
        if size > self.queue_size {
            let why = format!("is made for rings of {}, not of {size}", self.queue_size);
            return Err(InflightError::Shape(why));
        }
        if self.format != Format::Split {
            return Err(InflightError::Shape("is one for packed rings".into()));
        }
        let stride = self.format.stride(self.queue_size) as usize;
        let part = GuestSlice::new(Arc::clone(&self.map), stride * usize::from(index), stride)
            .map_err(|OutOfBounds| InflightError::Shape("is too small".into()))?;
        Ok(InflightQueue { part, size, counter: 0, last_batch_head: 0 })
    }
}

fn size_of(format: Format, num_queues: u16, queue_size: u16) -> Result<u64, InflightError> {
    if num_queues == 0 || queue_size == 0 || queue_size > MAX_SIZE {
        let why = format!("cannot have {num_queues} queues of {queue_size}");
        return Err(InflightError::Shape(why));
    }
    Ok(format.stride(queue_size) * u64::from(num_queues))
}

/// What a region says that cannot be: it belongs to another ring, or its writer means harm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the fields are what `Display` says they are
pub enum Stale {
    /// Not a layout we know.
    Version { version: u16 },
    /// Made for a ring of another size.
    Size { desc_num: u16, size: u16 },
    /// The ring is further ahead of the region than a batch can be.
    Used { region: u16, ring: u16 },
    /// The list of the last batch leaves the table.
    Next { next: u16 },
    /// More chains are in flight than the driver has made available.
    InFlight { marked: u16, available: u16 },
}

impl fmt::Display for Stale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the in-flight region does not belong to this ring: ")?;
        match self {
            Self::Version { version } => write!(f, "its version is {version}"),
            Self::Size { desc_num, size } => write!(f, "it has {desc_num} entries for a ring of {size}"),
            Self::Used { region, ring } => write!(f, "used.idx is {ring} and it was left at {region}"),
            Self::Next { next } => write!(f, "its last batch goes on at {next}, beyond its entries"),
            Self::InFlight { marked, available } => {
                write!(f, "it has {marked} requests in flight where {available} were made")
            }
        }
    }
}

/// What a region tells about a ring at its start.
#[derive(Debug)]
pub enum Left {
    /// Nobody has used the region.
    Nothing,
    /// What a predecessor left: the heads in flight, first taken first.
    Heads(Vec<u16>),
}

/// The part of one split queue. The ring's worker alone writes it while the ring runs.
///
/// A process may die between any two stores: each is ordered after those before it, and what they mean together is
/// right at every point in between.
#[derive(Debug)]
pub struct InflightQueue {
    part: GuestSlice,
    size: u16,
    counter: u64,
    last_batch_head: u16,
}

impl InflightQueue {
    /// Whether the peer took the memory away.
    pub fn poisoned(&self) -> bool {
        self.part.poisoned()
    }

    /// Takes the part over for a ring whose used index is `used` and whose driver has made `available` more chains
    /// available than were used. What an unfinished batch left is finished.
    pub fn take_over(&mut self, used: u16, available: u16) -> Result<Result<Left, Stale>, OutOfBounds> {
        match self.part.load_u16(split::VERSION)? {
            0 => {
                self.begin(used)?;
                Ok(Ok(Left::Nothing))
            }
            1 => self.recover(used, available),
            version => Ok(Err(Stale::Version { version })),
        }
    }

    /// A buffer that nobody has used; the version comes last, since it says that all else is there.
    fn begin(&mut self, used: u16) -> Result<(), OutOfBounds> {
        for head in 0..self.size {
            self.part.store_u8(split::desc(head) + split::INFLIGHT, 0)?;
        }
        self.part.store_u16(split::LAST_BATCH_HEAD, 0)?;
        self.part.store_u16(split::DESC_NUM, self.size)?;
        self.part.store_u16(split::USED_IDX, used)?;
        step!("begin_used_idx");
        self.part.store_u16(split::VERSION, 1)?;
        step!("begin_version");
        Ok(())
    }

    fn recover(&mut self, used: u16, available: u16) -> Result<Result<Left, Stale>, OutOfBounds> {
        let (desc_num, region) = (self.part.load_u16(split::DESC_NUM)?, self.part.load_u16(split::USED_IDX)?);
        if desc_num != self.size {
            return Ok(Err(Stale::Size { desc_num, size: self.size }));
        }
        let batch = used.wrapping_sub(region);
        if batch > desc_num {
            return Ok(Err(Stale::Used { region, ring: used }));
        }
        // Looked at as a whole before anything is changed.
        self.last_batch_head = self.part.load_u16(split::LAST_BATCH_HEAD)?;
        let mut published = Vec::with_capacity(usize::from(batch));
        let mut next = self.last_batch_head;
        for _ in 0..batch {
            if next >= desc_num {
                return Ok(Err(Stale::Next { next }));
            }
            published.push(next);
            next = self.part.load_u16(split::desc(next) + split::NEXT)?;
        }
        let mut given_back = vec![false; usize::from(desc_num)];
        published.iter().for_each(|&head| given_back[usize::from(head)] = true);
        let mut marked = Vec::new();
        for head in 0..desc_num {
            let entry = split::desc(head);
            if !given_back[usize::from(head)] && self.part.load_u8(entry + split::INFLIGHT)? != 0 {
                marked.push((self.part.load_u64(entry + split::COUNTER)?, head));
            }
        }
        if marked.len() > usize::from(available) {
            return Ok(Err(Stale::InFlight { marked: marked.len() as u16, available }));
        }
        for &head in &published {
            self.part.store_u8(split::desc(head) + split::INFLIGHT, 0)?;
            step!("recover_cleared");
        }
        self.part.store_u16(split::USED_IDX, used)?;
        step!("recover_used_idx");
        marked.sort_unstable();
        self.counter = marked.last().map_or(0, |&(last, _)| last.wrapping_add(1));
        Ok(Ok(Left::Heads(marked.into_iter().map(|(_, head)| head).collect())))
    }

    /// A chain was taken: noted before anything is done about it.
    #[inline]
    pub fn mark(&mut self, head: u16) -> Result<(), OutOfBounds> {
        let entry = split::desc(head);
        self.part.store_u64(entry + split::COUNTER, self.counter)?;
        self.counter = self.counter.wrapping_add(1);
        self.part.store_u8(entry + split::INFLIGHT, 1)
    }

    /// A chain joins the batch that is given back next.
    #[inline]
    pub fn link(&mut self, head: u16) -> Result<(), OutOfBounds> {
        self.part.store_u16(split::desc(head) + split::NEXT, self.last_batch_head)?;
        self.part.store_u16(split::LAST_BATCH_HEAD, head)?;
        self.last_batch_head = head;
        Ok(())
    }

    /// The driver sees the batch: its marks go, and then the index that said they were to go.
    #[inline]
    pub fn clear(&mut self, batch: &[u16], used: u16) -> Result<(), OutOfBounds> {
        for &head in batch {
            self.part.store_u8(split::desc(head) + split::INFLIGHT, 0)?;
            step!("cleared");
        }
        self.part.store_u16(split::USED_IDX, used)
    }
}
