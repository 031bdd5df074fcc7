//! seccomp: which system calls every thread of the process can still make.
//!
//! A list of what serving needs; everything else fails with `EPERM`, so that a mistake of ours is an error in one place
//! and no dead process. What is allowed whatever its arguments costs next to nothing: Linux remembers those (5.11).

mod allowed;
mod program;
#[cfg(test)]
mod tests;

use std::io;

use self::program::program;
use super::give_up_new_privileges;

/// Holds every thread of this process, and those made later, to the calls that serving a disk needs.
///
/// Nothing can be opened, connected, mounted or executed, no process made, no memory made executable, no io_uring set
/// up or registered with. Fails as the kernel does, and with `ESRCH` when a thread follows rules of its own; then
/// nothing is restricted.
pub fn restrict() -> io::Result<()> {
    give_up_new_privileges()?;
    let filter = program(std::process::id());
    let whole = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // Without SPEC_ALLOW older kernels slow the whole process down against a code that is not here: one that this
    // process runs and does not trust.
    let flags = libc::SECCOMP_FILTER_FLAG_TSYNC | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    // SAFETY: the program lives through the call; the kernel copies it, and changes nothing of ours.
    match unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const whole) } {
        0 => Ok(()),
        error if error < 0 => Err(io::Error::last_os_error()),
        _thread => Err(io::Error::from_raw_os_error(libc::ESRCH)),
    }
}
