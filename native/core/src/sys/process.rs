//! For tests that kill: a process that ends where it is; a child that inherits descriptors, ends with its parent, and
//! waits for an image. Nothing of it is in a release.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::RawFd;

use super::fd::check;

/// The flag of `open`.
pub const O_DIRECT: i32 = libc::O_DIRECT;

/// Lets children inherit `fd`.
pub fn inherit(fd: RawFd) -> io::Result<()> {
    // SAFETY: a descriptor and an integer.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) }).map(drop)
}

/// Has the kernel kill this process when the thread that started it ends.
pub fn die_with_parent() -> io::Result<()> {
    // SAFETY: integers.
    check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) })?;
    Ok(())
}

/// Waits for the exclusive open-file-description lock on byte 0 of `fd` and takes it.
pub fn lock_file(fd: RawFd) -> io::Result<()> {
    // SAFETY: all-zero is a valid `flock`; an open file description's lock has process 0.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_len = 1;
    // SAFETY: the kernel reads a structure of this type.
    check(unsafe { libc::fcntl(fd, libc::F_OFD_SETLKW, &raw const lock) }).map(drop)
}

/// Ends the process where it is, as SIGKILL from outside would.
pub(crate) fn kill_process() -> ! {
    // SAFETY: takes no pointers.
    unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    unreachable!("SIGKILL cannot be survived")
}
