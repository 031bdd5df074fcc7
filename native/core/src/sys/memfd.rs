//! Anonymous files in memory, of a size that nobody can change.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::fd::check;

/// A file of `size` zero bytes, sealed against growing and shrinking. `huge_pages` takes it from the
/// system's reserved huge pages; then `size` is a multiple of their size.
pub fn sealed(name: &CStr, size: u64, huge_pages: bool) -> io::Result<OwnedFd> {
    let huge = if huge_pages { libc::MFD_HUGETLB } else { 0 };
    // SAFETY: a valid C string; the descriptor returned is new.
    let fd = check(unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | huge) })?;
    // SAFETY: just made, and nobody else's.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(size)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: an open descriptor and an integer.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) })?;
    Ok(file.into())
}
