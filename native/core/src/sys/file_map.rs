//! A whole file as memory: bytes of the page cache, copied without a system call.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::Ordering;

use super::anon::page_size;
use super::{fd, sigbus};
use crate::memory::IoVec;

/// Address space set aside for a file to grow in; it costs nothing until used.
const ROOM: usize = 1 << 40;
/// What is replaced at once where the file is gone.
const PIECE: usize = 1 << 21;

/// A shared mapping of a file from its first byte on, reaching beyond its end.
///
/// The file is anybody's: it may be shortened, its storage may fail, its file system may be full. A page that the kernel
/// cannot give raises SIGBUS, for which zero pages come into its place and the mapping counts as lost, for good: what
/// was copied then is worth nothing, and has to be copied once more by a system call, which can say what is wrong.
#[derive(Debug)]
pub struct FileMap {
    base: NonNull<u8>,
    len: usize,
    protection: libc::c_int,
    guard: sigbus::Registration,
}

// SAFETY: plain memory, reached by raw copies only.
unsafe impl Send for FileMap {}
// SAFETY: as above.
unsafe impl Sync for FileMap {}

impl FileMap {
    /// Maps the file behind `fd`, readable, and with `writable` writable, too, if `fd` is.
    ///
    /// Fails as `mmap` does, with `EINVAL` for what is no regular file, and with `EACCES` where the kernel would not tell what
    /// of it is in memory: that is for who may write the file. Nothing is read, and nothing is locked into
    /// memory, whatever the process has asked for (`mlockall`).
    pub fn new(fd: BorrowedFd<'_>, writable: bool) -> io::Result<Self> {
        let stat = fd::stat(fd.as_raw_fd())?;
        if stat.st_mode & libc::S_IFMT != libc::S_IFREG {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        may_write(fd)?;
        let size = usize::try_from(stat.st_size).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let whole = size.max(1).checked_next_multiple_of(PIECE).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: asks for flags.
        let flags = fd::check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })?;
        let writable = writable && flags & libc::O_ACCMODE == libc::O_RDWR;
        // Without room (RLIMIT_AS) what the file grows by is not in the mapping.
        let (base, len) = match map(fd, whole.saturating_mul(4).max(ROOM)) {
            Ok(mapped) => mapped,
            Err(_) => map(fd, whole)?,
        };
        let guard = match sigbus::Registration::new(base.as_ptr() as usize, len, PIECE) {
            Ok(guard) => guard,
            Err(error) => {
                unmap(base, len);
                return Err(error);
            }
        };
        let protection = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        // From here on it is unmapped when it is dropped.
        let map = Self { base, len, protection, guard };
        let at = base.as_ptr().cast::<libc::c_void>();
        // SAFETY: this value's own mapping, which nobody has touched yet.
        unsafe {
            // As long as it is not accessible nothing can have been read for a lock.
            libc::munlock(at, len);
            libc::madvise(at, len, libc::MADV_DONTDUMP);
            fd::check(libc::mprotect(at, len, protection))?;
        }
        Ok(map)
    }

    /// Whether a page was missing once.
    #[inline]
    pub fn lost(&self) -> bool {
        self.guard.poisoned().load(Ordering::Acquire)
    }

    /// Copies bytes from `offset` on into `runs`. False when that came to nothing: beyond the mapping, or it is lost.
    ///
    /// Waits for storage where a page is not in memory. What races for the same bytes finds some mixture of them.
    #[inline]
    pub fn read(&self, offset: u64, runs: &[IoVec]) -> bool {
        self.copy(offset, runs, |file, memory, len| {
            // SAFETY: `copy` checked the source, the run promises the target; any overlap is allowed.
            unsafe { std::ptr::copy(file.cast_const(), memory, len) }
        })
    }

    /// Copies the bytes of `runs` to `offset` on; likewise, and false where `fd` was not writable. Not for beyond the end of
    /// the file: bytes in its last page get lost there.
    #[inline]
    pub fn write(&self, offset: u64, runs: &[IoVec]) -> bool {
        let writable = self.protection & libc::PROT_WRITE != 0;
        writable
            && self.copy(offset, runs, |file, memory, len| {
                // SAFETY: `copy` checked the target, the run promises the source; any overlap is allowed.
                unsafe { std::ptr::copy(memory.cast_const(), file, len) }
            })
    }

    /// Has the processor fetch the first line at `offset`, soon to be read or written.
    #[inline]
    pub fn prefetch(&self, offset: u64) {
        let Ok(offset) = usize::try_from(offset) else { return };
        if offset < self.len {
            // SAFETY: within the mapping, and not used longer than here.
            unsafe { IoVec::from_raw_parts(self.base.as_ptr().add(offset), 1) }.prefetch();
        }
    }

    #[inline]
    fn copy(&self, offset: u64, runs: &[IoVec], copy: impl Fn(*mut u8, *mut u8, usize)) -> bool {
        let Ok(mut offset) = usize::try_from(offset) else { return false };
        for run in runs {
            if offset > self.len || run.len() > self.len - offset {
                return false;
            }
            // SAFETY: within the mapping, just checked.
            copy(unsafe { self.base.as_ptr().add(offset) }, run.as_ptr(), run.len());
            offset += run.len();
        }
        // Whoever replaces a page says so first. Here the kernel has the other processors finish what they do with the old
        // page; elsewhere a store may be on its way while the load below has been made already.
        if cfg!(not(target_arch = "x86_64")) {
            std::sync::atomic::fence(Ordering::SeqCst);
        }
        !self.lost()
    }

    /// Has the kernel prepare a range of pages that are in memory, which it would do one fault at a time otherwise.
    pub fn prepare(&self, offset: u64, len: usize) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        if start <= self.len && len <= self.len - start && start % page_size() == 0 {
            // SAFETY: a part of this value's own mapping; what cannot be prepared is left, and no signal is sent.
            unsafe { libc::madvise(self.base.as_ptr().add(start).cast(), len, libc::MADV_POPULATE_READ) };
        }
    }

    /// Lets go of what the kernel keeps to reach a range of pages, 8 bytes a page and more; it comes back with the next
    /// access, from any thread. `fd`: the same file.
    pub fn forget(&self, fd: BorrowedFd<'_>, offset: u64, len: usize) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        if self.lost() || start > self.len || len > self.len - start || (start | len) % page_size() != 0 {
            return;
        }
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_FIXED;
        // Mapping it anew is the only way to be rid of the tables as well. Whoever touches it meanwhile waits for that.
        // SAFETY: replaces a part of this value's own mapping by the same part of the same file.
        let again = unsafe {
            let at = self.base.as_ptr().add(start).cast();
            libc::mmap(at, len, self.protection, flags, fd.as_raw_fd(), offset as libc::off_t)
        };
        if again == libc::MAP_FAILED {
            self.guard.poisoned().store(true, Ordering::Release);
        }
    }

    /// `forget` for all of it.
    pub fn forget_all(&self, fd: BorrowedFd<'_>) {
        self.forget(fd, 0, self.len);
    }

    /// Whether all pages of the range are in memory; a hole is not. `pages` is room, used again. False when the kernel does
    /// not tell.
    pub fn in_memory(&self, offset: u64, len: usize, pages: &mut Vec<u8>) -> bool {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        if len == 0 || offset > self.len || len > self.len - offset || offset % page_size() != 0 {
            return false;
        }
        pages.clear();
        pages.resize(len.div_ceil(page_size()), 0);
        // SAFETY: within the mapping, with a byte for each page.
        let asked = unsafe { libc::mincore(self.base.as_ptr().add(offset).cast(), len, pages.as_mut_ptr()) };
        asked == 0 && pages.iter().all(|page| page & 1 != 0)
    }
}

impl Drop for FileMap {
    fn drop(&mut self) {
        self.guard.release();
        unmap(self.base, self.len);
    }
}

fn may_write(fd: BorrowedFd<'_>) -> io::Result<()> {
    let (itself, flags) = (c"".as_ptr(), libc::AT_EMPTY_PATH | libc::AT_EACCESS);
    // SAFETY: a string that ends; only asks.
    fd::check(unsafe { libc::faccessat(fd.as_raw_fd(), itself, libc::W_OK, flags) }).map(drop)
}

/// Maps `len` bytes of a file at a multiple of [`PIECE`], not accessible yet: the kernel's tables begin there.
fn map(fd: BorrowedFd<'_>, len: usize) -> io::Result<(NonNull<u8>, usize)> {
    let whole = len.checked_add(PIECE).ok_or(io::ErrorKind::OutOfMemory)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping, at a place that the kernel chooses.
    let found = unsafe { libc::mmap(std::ptr::null_mut(), whole, libc::PROT_NONE, flags, -1, 0) };
    if found == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let found = NonNull::new(found.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
    let before = (found.as_ptr() as usize).next_multiple_of(PIECE) - found.as_ptr() as usize;
    // SAFETY: both within what was mapped just now, and `whole` is longer by as much as `before` can be.
    let (base, end) = unsafe { (found.add(before), found.add(before + len)) };
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: replaces what was mapped just now, and nobody knows of.
    let mapped = unsafe { libc::mmap(base.as_ptr().cast(), len, libc::PROT_NONE, flags, fd.as_raw_fd(), 0) };
    if mapped == libc::MAP_FAILED {
        let error = io::Error::last_os_error();
        unmap(found, whole);
        return Err(error);
    }
    for (rest, len) in [(found, before), (end, PIECE - before)] {
        if len > 0 {
            unmap(rest, len);
        }
    }
    Ok((base, len))
}

fn unmap(base: NonNull<u8>, len: usize) {
    // SAFETY: mapped by `map`, and nobody else holds it any more.
    unsafe { libc::munmap(base.as_ptr().cast(), len) };
}
