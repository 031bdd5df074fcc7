//! What a request asks for (virtio: Block Device, Device Operation). Pure: a function of the chain,
//! the disk's limits and the negotiated features.

use crate::disk::Kind;
use crate::memory::IoVec;
use crate::ring::{feature, Chain, Status as StatusPlace};

/// Bytes of a sector, the unit of the protocol whatever the block size.
pub const SECTOR: u64 = 512;
/// VIRTIO_BLK_F_DISCARD.
const BLK_F_DISCARD: u64 = 1 << 13;
/// VIRTIO_BLK_F_WRITE_ZEROES.
const BLK_F_WRITE_ZEROES: u64 = 1 << 14;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_FLUSH_OUT: u32 = 5;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;
const T_BARRIER: u32 = 1 << 31;

const ID_LEN: usize = 20;
const RANGE_LEN: u64 = 16;
const FLAG_UNMAP: u32 = 1;

/// Status byte: done.
pub(super) const S_OK: u8 = 0;
/// Status byte: failed.
pub(super) const S_IOERR: u8 = 1;
/// Status byte: not known or not offered.
pub(super) const S_UNSUPP: u8 = 2;

/// What the disk can take. A copy is made for each batch, so one request sees one set.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Capacity in sectors of 512 bytes.
    pub num_sectors: u64,
    /// Logical block size in bytes: a power of two, 512 at least.
    pub block_size: u32,
    /// Nothing may be changed.
    pub read_only: bool,
    /// Sectors of one discard range; 0 when discards are not offered.
    pub max_discard_sectors: u32,
    /// Ranges of one discard request.
    pub max_discard_seg: u32,
    /// Sectors of one range of zeroes; 0 when they are not offered.
    pub max_write_zeroes_sectors: u32,
    /// Ranges of one request for zeroes.
    pub max_write_zeroes_seg: u32,
}

/// A run of the disk to discard or to zero, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Bytes, not 0.
    pub len: u64,
    /// What to do: `Kind::Discard` or `Kind::WriteZeroes`.
    pub kind: Kind,
}

/// A request that can be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Fill the writable stream from the disk.
    In {
        /// First byte.
        offset: u64,
    },
    /// Store the readable stream.
    Out {
        /// First byte.
        offset: u64,
    },
    /// Make what was written durable.
    Flush,
    /// The disk's identity was asked for.
    GetId,
    /// The ranges that were put into the caller's list; none is left when all were empty.
    Ranges {
        /// `Kind::Discard` or `Kind::WriteZeroes`.
        discard: bool,
    },
    /// Nothing to do but to say so.
    Refused(u8),
}

/// What `parse` found.
#[derive(Clone, Copy, Debug)]
pub enum Parsed {
    /// There is a place for the status byte.
    Answerable {
        /// What to do.
        request: Request,
        /// For statistics: the request's type, before any check.
        kind: RequestType,
        /// Where the answer goes.
        status: IoVec,
    },
    /// No status byte can be written: the chain goes back with length 0.
    Unanswerable,
}

/// What statistics tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum RequestType {
    /// IN.
    Read,
    /// OUT.
    Write,
    /// FLUSH.
    Flush,
    /// DISCARD.
    Discard,
    /// WRITE_ZEROES.
    WriteZeroes,
    /// GET_ID.
    GetId,
    /// Everything else.
    Other,
}

impl RequestType {
    /// What people and programs read.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes => "write_zeroes",
            Self::GetId => "get_id",
            Self::Other => "other",
        }
    }
}

/// Reads the request out of `chain`, whose streams are left with just the data. The ranges of a
/// discard or of zeroes go into `ranges`, which is emptied first: all of them are checked before any is started.
#[inline]
pub fn parse(chain: &mut Chain, limits: &Limits, features: u64, ranges: &mut Vec<Range>) -> Parsed {
    let StatusPlace::At(status) = chain.take_status() else { return Parsed::Unanswerable };
    let (request, kind) = read_header(chain, limits, features, ranges);
    Parsed::Answerable { request, kind, status }
}

/// Where a request with this header would read or write, for who prepares for it; nothing is checked but that it is there.
#[inline]
pub(super) fn expected([first, sector]: [u64; 2], limits: &Limits) -> Option<u64> {
    let moves = matches!(first as u32, T_IN | T_OUT);
    (moves && sector < limits.num_sectors).then_some(sector * SECTOR)
}

#[inline]
fn read_header(chain: &mut Chain, limits: &Limits, features: u64, ranges: &mut Vec<Range>) -> (Request, RequestType) {
    if chain.fault.is_some() {
        return (Request::Refused(S_IOERR), RequestType::Other);
    }
    let Some([first, sector]) = chain.take_header() else { return (Request::Refused(S_IOERR), RequestType::Other) };
    let legacy = features & feature::VERSION_1 == 0;
    let kind = if legacy { first as u32 & !T_BARRIER } else { first as u32 };
    match kind {
        T_IN => (read(chain, limits, sector), RequestType::Read),
        T_OUT => (write(chain, limits, sector), RequestType::Write),
        T_FLUSH => (Request::Flush, RequestType::Flush),
        T_FLUSH_OUT if legacy => (Request::Flush, RequestType::Flush),
        T_GET_ID if chain.readable_len > 0 => (Request::Refused(S_IOERR), RequestType::GetId),
        T_GET_ID => (Request::GetId, RequestType::GetId),
        T_DISCARD => (discard_or_zero(chain, limits, features, true, ranges), RequestType::Discard),
        T_WRITE_ZEROES => (discard_or_zero(chain, limits, features, false, ranges), RequestType::WriteZeroes),
        // SCSI commands, lifetime, secure erase and zones are never offered.
        _ => (Request::Refused(S_UNSUPP), RequestType::Other),
    }
}

#[inline]
fn read(chain: &Chain, limits: &Limits, sector: u64) -> Request {
    match place(limits, sector, chain.writable_len) {
        Some(offset) if chain.readable_len == 0 => Request::In { offset },
        _ => Request::Refused(S_IOERR),
    }
}

#[inline]
fn write(chain: &Chain, limits: &Limits, sector: u64) -> Request {
    match place(limits, sector, chain.readable_len) {
        Some(offset) if chain.writable_len == 0 && !limits.read_only => Request::Out { offset },
        _ => Request::Refused(S_IOERR),
    }
}

/// The first byte of `len` bytes at `sector`, when they lie on the disk and on block boundaries.
#[inline]
fn place(limits: &Limits, sector: u64, len: u64) -> Option<u64> {
    let block = u64::from(limits.block_size);
    let capacity = limits.num_sectors.checked_mul(SECTOR)?;
    let offset = sector.checked_mul(SECTOR)?;
    let inside = offset.checked_add(len)? <= capacity;
    // A block is a power of two of bytes: `Limits::block_size`.
    (inside && (offset | len) & (block - 1) == 0).then_some(offset)
}

fn discard_or_zero(
    chain: &mut Chain,
    limits: &Limits,
    features: u64,
    discard: bool,
    ranges: &mut Vec<Range>,
) -> Request {
    ranges.clear();
    let (bit, max_sectors, max_seg) = if discard {
        (BLK_F_DISCARD, limits.max_discard_sectors, limits.max_discard_seg)
    } else {
        (BLK_F_WRITE_ZEROES, limits.max_write_zeroes_sectors, limits.max_write_zeroes_seg)
    };
    if features & bit == 0 || max_sectors == 0 {
        return Request::Refused(S_UNSUPP);
    }
    let (len, count) = (chain.readable_len, chain.readable_len / RANGE_LEN);
    if limits.read_only || chain.writable_len > 0 || len == 0 || len % RANGE_LEN != 0 {
        return Request::Refused(S_IOERR);
    }
    if count > u64::from(max_seg) {
        return Request::Refused(S_UNSUPP);
    }
    for _ in 0..count {
        let Some(words) = chain.take_header() else { return Request::Refused(S_IOERR) };
        match range(words, limits, discard, max_sectors) {
            Ok(Some(range)) => ranges.push(range),
            Ok(None) => {}
            Err(status) => {
                ranges.clear();
                return Request::Refused(status);
            }
        }
    }
    Request::Ranges { discard }
}

fn range([sector, rest]: [u64; 2], limits: &Limits, discard: bool, max_sectors: u32) -> Result<Option<Range>, u8> {
    let (num_sectors, flags) = (rest as u32, (rest >> 32) as u32);
    let unmap = flags & FLAG_UNMAP != 0;
    if flags & !FLAG_UNMAP != 0 || (discard && unmap) {
        return Err(S_UNSUPP);
    }
    if num_sectors > max_sectors {
        return Err(S_IOERR);
    }
    let len = u64::from(num_sectors) * SECTOR;
    let offset = place(limits, sector, len).ok_or(S_IOERR)?;
    let kind = if discard { Kind::Discard } else { Kind::WriteZeroes { unmap } };
    Ok((len > 0).then_some(Range { offset, len, kind }))
}

/// Writes the identity, padded with zeroes, into the writable stream; returns the bytes stored.
pub(super) fn write_id(chain: &Chain, id: &[u8]) -> u32 {
    let mut padded = [0; ID_LEN];
    let len = id.len().min(ID_LEN);
    padded[..len].copy_from_slice(&id[..len]);
    crate::ring::copy_in(&chain.writable, 0, &padded) as u32
}
