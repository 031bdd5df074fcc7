//! Giving up, for good, what serving a disk never needs: files (Landlock), then system calls (seccomp).
//!
//! Neither needs a privilege. [`files`] reaches the calling thread and those it makes later, so it comes before any
//! other thread; [`calls`] reaches every thread of the process, so it can come once the rings of io_uring are made.
#![allow(unsafe_code)]

mod landlock;
mod seccomp;
#[cfg(test)]
mod tests;

use std::io;

pub use self::landlock::{restrict as files, Confined};
pub use self::seccomp::restrict as calls;

/// Promises the kernel that this thread gains no right by executing a program: both restrictions ask for that.
fn give_up_new_privileges() -> io::Result<()> {
    let (on, none): (libc::c_ulong, libc::c_ulong) = (1, 0);
    // SAFETY: five numbers; sets a flag of this thread.
    super::fd::check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, on, none, none, none) })?;
    Ok(())
}
