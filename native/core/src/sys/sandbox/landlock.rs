//! Landlock: which files, TCP ports and processes the calling thread can still reach.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::give_up_new_privileges;
use crate::sys::fd::check;

const CREATE_RULESET_VERSION: u32 = 1;
const RULE_PATH_BENEATH: u32 = 1;

/// `LANDLOCK_ACCESS_FS_*`: all rights of the first version, from EXECUTE on.
const FILES: u64 = (1 << 13) - 1;
const REMOVE_FILE: u64 = 1 << 5;
const REFER: u64 = 1 << 13;
const TRUNCATE: u64 = 1 << 14;
const IOCTL_DEV: u64 = 1 << 15;
/// `LANDLOCK_ACCESS_NET_*`: bind and connect.
const TCP: u64 = 3;
/// `LANDLOCK_SCOPE_*`: abstract Unix sockets and signals.
const SCOPES: u64 = 3;

/// `struct landlock_ruleset_attr`; older kernels know only its beginning.
#[repr(C)]
struct Ruleset {
    files: u64,
    net: u64,
    scopes: u64,
}

/// `struct landlock_path_beneath_attr`.
#[repr(C, packed)]
struct PathBeneath {
    allowed: u64,
    parent: i32,
}

/// What a kernel of some version of Landlock refuses from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Confined {
    /// The version that the kernel speaks, at least 1.
    pub abi: u32,
    /// No TCP connection is made and no TCP port is taken (Linux 6.7).
    pub tcp: bool,
    /// No process outside is signalled, and no abstract Unix socket outside is connected to (Linux 6.12).
    pub scopes: bool,
}

impl Confined {
    fn by(abi: u32) -> Self {
        Self { abi, tcp: abi >= 4, scopes: abi >= 6 }
    }

    fn ruleset(self) -> (Ruleset, usize) {
        let mut files = FILES;
        files |= if self.abi >= 2 { REFER } else { 0 };
        files |= if self.abi >= 3 { TRUNCATE } else { 0 };
        files |= if self.abi >= 5 { IOCTL_DEV } else { 0 };
        let net = if self.tcp { TCP } else { 0 };
        let scopes = if self.scopes { SCOPES } else { 0 };
        let size = match (self.tcp, self.scopes) {
            (false, _) => 8,
            (true, false) => 16,
            (true, true) => 24,
        };
        (Ruleset { files, net, scopes }, size)
    }
}

/// Lets the calling thread, and the threads it makes from now on, open, make, change and run no file at all: what is open
/// stays usable. Files may be removed from the directories `removable`, and nothing else be done there.
///
/// Fails as the kernel does: `ENOSYS` or `EOPNOTSUPP` where it has no Landlock or has it switched off, and with
/// `ENOENT` for a directory that is none; nothing is restricted then.
pub fn restrict(removable: &[&Path]) -> io::Result<Confined> {
    let confined = Confined::by(abi()?);
    let (rules, size) = confined.ruleset();
    // SAFETY: reads `size` bytes of a structure that is at least as long, and makes a descriptor or fails.
    let fd = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, &raw const rules, size, 0_u32) };
    let fd = check(fd as libc::c_int)?;
    // SAFETY: just made, and nobody else's.
    let ruleset = unsafe { OwnedFd::from_raw_fd(fd) };
    for path in removable {
        allow_removing(&ruleset, path)?;
    }
    give_up_new_privileges()?;
    // SAFETY: numbers only.
    let result = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0_u32) };
    check(result as libc::c_int)?;
    Ok(confined)
}

fn abi() -> io::Result<u32> {
    let (none, size) = (std::ptr::null::<Ruleset>(), 0_usize);
    // SAFETY: with this flag the kernel reads nothing and tells its version.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, size, CREATE_RULESET_VERSION) };
    Ok(check(version as libc::c_int)?.unsigned_abs())
}

fn allow_removing(ruleset: &OwnedFd, directory: &Path) -> io::Result<()> {
    let name = CString::new(directory.as_os_str().as_bytes())?;
    // SAFETY: a string that ends; makes a descriptor, or fails.
    let fd = check(unsafe { libc::open(name.as_ptr(), libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC) })?;
    // SAFETY: just made, and nobody else's.
    let parent = unsafe { OwnedFd::from_raw_fd(fd) };
    let rule = PathBeneath { allowed: REMOVE_FILE, parent: parent.as_raw_fd() };
    // SAFETY: the kernel reads a structure of the type that belongs to this kind of rule.
    let result = unsafe {
        libc::syscall(libc::SYS_landlock_add_rule, ruleset.as_raw_fd(), RULE_PATH_BENEATH, &raw const rule, 0_u32)
    };
    check(result as libc::c_int)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_asked_for_no_right_that_its_version_does_not_know() {
        let asked = |abi| {
            let (rules, size) = Confined::by(abi).ruleset();
            (rules.files, rules.net, rules.scopes, size)
        };
        assert_eq!(asked(1), (0x1fff, 0, 0, 8));
        assert_eq!(asked(2), (0x3fff, 0, 0, 8));
        assert_eq!(asked(3), (0x7fff, 0, 0, 8));
        assert_eq!(asked(4), (0x7fff, 3, 0, 16));
        assert_eq!(asked(5), (0xffff, 3, 0, 16));
        assert_eq!(asked(6), (0xffff, 3, 3, 24));
        assert_eq!(asked(7), asked(6), "version 7 adds what is logged");
        assert_eq!(asked(99), asked(6), "what is newer than this program is not asked for");
    }
}
