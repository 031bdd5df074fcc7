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

/// What a system call returned. The C library's functions for them are points where a thread may be cancelled, which
/// costs two atomic operations each; nobody cancels ours.
#[inline]
fn returned(result: libc::c_long) -> Outcome {
    outcome(result as isize)
}

/// Reads at `offset` into at most [`MAX_RUNS`] runs.
#[inline]
pub fn read(fd: BorrowedFd<'_>, runs: &[IoVec], offset: u64) -> Outcome {
    let fd = fd.as_raw_fd();
    // The kernel takes a list apart at a price, so a list of one is no list.
    returned(match runs {
        // SAFETY: the bytes of a run are mapped; the kernel checks the rest.
        [run] => unsafe { libc::syscall(libc::SYS_pread64, fd, run.as_ptr(), run.len(), offset) },
        // SAFETY: an `IoVec` is an `iovec`; else as above. The offset is in one word where words have 64 bits.
        _ => unsafe { libc::syscall(libc::SYS_preadv, fd, runs.as_ptr(), runs.len(), offset, 0) },
    })
}

/// Writes at most [`MAX_RUNS`] runs at `offset`; `durable`: returns once they are on stable storage.
#[inline]
pub fn write(fd: BorrowedFd<'_>, runs: &[IoVec], offset: u64, durable: bool) -> Outcome {
    let fd = fd.as_raw_fd();
    let flags = if durable { libc::RWF_DSYNC } else { 0 };
    returned(match runs {
        // SAFETY: as in `read`.
        [run] if !durable => unsafe { libc::syscall(libc::SYS_pwrite64, fd, run.as_ptr(), run.len(), offset) },
        // SAFETY: as in `read`.
        _ => unsafe { libc::syscall(libc::SYS_pwritev2, fd, runs.as_ptr(), runs.len(), offset, 0, flags) },
    })
}

/// `read`, but `EAGAIN` instead of waiting for storage: RWF_NOWAIT, `EOPNOTSUPP` where the file has none of it.
#[inline]
pub fn read_cached(fd: BorrowedFd<'_>, runs: &[IoVec], offset: u64) -> Outcome {
    let (fd, list) = (fd.as_raw_fd(), runs.as_ptr());
    // SAFETY: as in `read`.
    returned(unsafe { libc::syscall(libc::SYS_preadv2, fd, list, runs.len(), offset, 0, libc::RWF_NOWAIT) })
}

/// `write` into the page cache, likewise.
#[inline]
pub fn write_cached(fd: BorrowedFd<'_>, runs: &[IoVec], offset: u64) -> Outcome {
    let (fd, list) = (fd.as_raw_fd(), runs.as_ptr());
    // SAFETY: as in `read`.
    returned(unsafe { libc::syscall(libc::SYS_pwritev2, fd, list, runs.len(), offset, 0, libc::RWF_NOWAIT) })
}

/// The magic number of the file system (`statfs`); 0 when it does not tell.
pub fn file_system(fd: BorrowedFd<'_>) -> i64 {
    // SAFETY: all-zero is a valid `statfs`; the kernel fills it.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: an open descriptor and a place to write to.
    match unsafe { libc::fstatfs(fd.as_raw_fd(), &mut stat) } {
        0 => stat.f_type as i64,
        _ => 0,
    }
}

/// How long a regular file is, in bytes.
pub fn size(fd: BorrowedFd<'_>) -> Option<u64> {
    u64::try_from(super::fd::stat(fd.as_raw_fd()).ok()?.st_size).ok()
}

/// Says that the file was changed just now. A refusal is of no consequence.
pub fn touch(fd: BorrowedFd<'_>) {
    let times = [libc::UTIME_OMIT, libc::UTIME_NOW].map(|tv_nsec| libc::timespec { tv_sec: 0, tv_nsec });
    // SAFETY: two times; without a name the descriptor itself is meant.
    unsafe { libc::syscall(libc::SYS_utimensat, fd.as_raw_fd(), std::ptr::null::<libc::c_char>(), times.as_ptr(), 0) };
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
