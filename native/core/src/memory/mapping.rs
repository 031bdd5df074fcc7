//! One shared mapping of a peer's file, and what happens when the peer takes the file away.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::Ordering;
use std::sync::Arc;

use crate::sys::sigbus;

const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// A shared, readable and writable mapping of a run of a file, unmapped when the last user drops it.
///
/// The file belongs to a peer that may truncate it: the mapping is registered with the SIGBUS handler,
/// which puts zero pages in its place and marks it poisoned.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    mapped: usize,
    delta: usize,
    len: usize,
    file_end: u64,
    file: OwnedFd,
    guard: sigbus::Registration,
}

// SAFETY: a mapping is plain memory; all access to its bytes is by raw copies and atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `fd` from `offset`, of any alignment. The descriptor is duplicated.
    ///
    /// Fails with `InvalidInput` when the file is too short or of a kind that cannot be guest memory.
    pub fn of_file(fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<Arc<Self>> {
        let file = fd.try_clone_to_owned()?;
        let end = offset.checked_add(len).ok_or_else(|| invalid("offset and size wrap around"))?;
        check_size(&file, end)?;
        let page = page_size(&file)?;
        let aligned = offset - offset % page;
        let mapped = (end - aligned).checked_next_multiple_of(page).ok_or_else(|| invalid("size wraps around"))?;
        let mapped = usize::try_from(mapped).map_err(|_| invalid("size wraps around"))?;
        let at = i64::try_from(aligned).map_err(|_| invalid("offset is beyond what a file can have"))?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                at,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: not MAP_FAILED, and the kernel maps nothing at 0 unasked.
        let base = unsafe { NonNull::new_unchecked(base.cast::<u8>()) };
        match sigbus::Registration::new(base.as_ptr() as usize, mapped, mapped) {
            Ok(guard) => Ok(Arc::new(Self {
                base,
                mapped,
                delta: (offset - aligned) as usize,
                len: len as usize,
                file_end: end,
                file,
                guard,
            })),
            Err(error) => {
                // SAFETY: mapped above and known to nobody else.
                unsafe { libc::munmap(base.as_ptr().cast(), mapped) };
                Err(error)
            }
        }
    }

    /// Where byte 0 of the run is.
    pub fn start(&self) -> NonNull<u8> {
        // SAFETY: `delta + len <= mapped`.
        unsafe { self.base.add(self.delta) }
    }

    /// Bytes in the run.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the run is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The file behind.
    pub fn file(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.file.as_fd()
    }

    /// Whether the file was truncated and the pages are zeroes now.
    pub fn poisoned(&self) -> bool {
        self.guard.poisoned().load(Ordering::Acquire)
    }

    /// Looks whether the file still reaches to the end of the mapping and poisons it when not.
    ///
    /// For use after a system call said `EFAULT`: the kernel sends no signal then.
    pub fn check(&self) -> bool {
        if check_size(&self.file, self.file_end).is_err() {
            self.guard.poison();
        }
        self.poisoned()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.guard.release();
        // SAFETY: mapped in `of_file`; the last user is gone.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.mapped) };
    }
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

fn check_size(file: &OwnedFd, end: u64) -> io::Result<()> {
    // SAFETY: all-zero is a valid `stat`; the kernel fills it.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: an open descriptor and a place to write to.
    if unsafe { libc::fstat(file.as_raw_fd(), &mut stat) } != 0 {
        return Err(io::Error::last_os_error());
    }
    match stat.st_mode & libc::S_IFMT {
        libc::S_IFREG if (stat.st_size as u64) < end => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("the file has {} bytes, the region ends at {end}", stat.st_size),
        )),
        // A character device (device DAX) has no size to compare with.
        libc::S_IFREG | libc::S_IFCHR => Ok(()),
        _ => Err(invalid("the descriptor is not a file that can be mapped")),
    }
}

fn page_size(file: &OwnedFd) -> io::Result<u64> {
    // SAFETY: all-zero is a valid `statfs`; the kernel fills it.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: an open descriptor and a place to write to.
    if unsafe { libc::fstatfs(file.as_raw_fd(), &mut stat) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if stat.f_type as i64 == HUGETLBFS_MAGIC {
        return Ok(stat.f_bsize as u64);
    }
    // SAFETY: takes no pointers.
    Ok(unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64)
}
