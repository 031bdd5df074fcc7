//! Descriptors that come from outside: taking a copy of one, asking what it is.
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Turns the -1 of a system call into its errno.
pub(crate) fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// A copy of the descriptor `fd`, owned by the caller and closed on exec. Fails with `EBADF` when there is none.
pub fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: makes a new descriptor, or fails.
    let copy = check(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) })?;
    // SAFETY: just made, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// What `fstat` says about `fd`.
pub(crate) fn stat(fd: RawFd) -> io::Result<libc::stat> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: the kernel fills a structure of this type.
    check(unsafe { libc::fstat(fd, stat.as_mut_ptr()) })?;
    // SAFETY: filled, since the call succeeded.
    Ok(unsafe { stat.assume_init() })
}

/// Fails with `EPERM` for what is always readable and so cannot be waited for (regular files, directories), as epoll does.
pub(crate) fn require_pollable(fd: RawFd) -> io::Result<()> {
    match stat(fd)?.st_mode & libc::S_IFMT {
        libc::S_IFREG | libc::S_IFDIR => Err(io::Error::from_raw_os_error(libc::EPERM)),
        _ => Ok(()),
    }
}
