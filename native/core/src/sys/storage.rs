//! System calls on files and block devices. Each may block for as long as storage takes.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use crate::memory::IoVec;

/// The runs that one vectored call takes: UIO_MAXIOV of the kernel.
pub const MAX_RUNS: usize = 1024;

/// `_IO(0x12, 119)` of linux/fs.h.
const BLKDISCARD: libc::Ioctl = 0x1277;
/// `_IO(0x12, 127)` of linux/fs.h.
const BLKZEROOUT: libc::Ioctl = 0x127f;

/// How a system call ended: what it returned, or a positive errno.
pub type Outcome = Result<usize, i32>;

fn outcome(result: isize) -> Outcome {
    usize::try_from(result).map_err(|_| std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
}

/// Reads at `offset` into at most [`MAX_RUNS`] runs.
pub fn read(fd: BorrowedFd<'_>, runs: &[IoVec], offset: u64) -> Outcome {
    // SAFETY: an `IoVec` is an `iovec` whose bytes are mapped; the kernel checks the rest.
    outcome(unsafe { libc::preadv(fd.as_raw_fd(), runs.as_ptr().cast(), runs.len() as i32, offset as i64) })
}

/// Writes at most [`MAX_RUNS`] runs at `offset`; `durable`: returns once they are on stable storage.
pub fn write(fd: BorrowedFd<'_>, runs: &[IoVec], offset: u64, durable: bool) -> Outcome {
    let (runs, count) = (runs.as_ptr().cast(), runs.len() as i32);
    let flags = if durable { libc::RWF_DSYNC } else { 0 };
    // SAFETY: as in `read`.
    outcome(unsafe { libc::pwritev2(fd.as_raw_fd(), runs, count, offset as i64, flags) })
}

/// Brings the data of everything written to stable storage.
pub fn sync(fd: BorrowedFd<'_>) -> Outcome {
    // SAFETY: a descriptor and nothing else.
    outcome(unsafe { libc::fdatasync(fd.as_raw_fd()) } as isize)
}

/// `fallocate` with `mode`.
pub fn allocate(fd: BorrowedFd<'_>, mode: i32, offset: u64, len: u64) -> Outcome {
    // SAFETY: numbers only.
    outcome(unsafe { libc::fallocate(fd.as_raw_fd(), mode, offset as i64, len as i64) } as isize)
}

/// BLKDISCARD: gives a part of a block device back to it; the content is undefined afterwards.
pub fn block_discard(fd: BorrowedFd<'_>, offset: u64, len: u64) -> Outcome {
    block_range(fd, BLKDISCARD, offset, len)
}

/// BLKZEROOUT: zeroes a part of a block device, keeping it allocated.
pub fn block_zero_out(fd: BorrowedFd<'_>, offset: u64, len: u64) -> Outcome {
    block_range(fd, BLKZEROOUT, offset, len)
}

fn block_range(fd: BorrowedFd<'_>, request: libc::Ioctl, offset: u64, len: u64) -> Outcome {
    let range = [offset, len];
    // SAFETY: both requests read two 64-bit numbers.
    outcome(unsafe { libc::ioctl(fd.as_raw_fd(), request, range.as_ptr()) } as isize)
}
