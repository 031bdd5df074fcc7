//! A disk in the memory of this process. It takes pages when they are written and gives them back on discard.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::{Completion, Engine, Kind, Operation};
use crate::memory::IoVec;
use crate::sys::anon::{Anon, BeyondEnd};
use crate::sys::poll::PollSet;

/// Address space set aside for a disk to grow in; it costs nothing until used.
const ROOM: usize = 1 << 40;

/// The bytes of a memory disk, shared by all its engines.
#[derive(Debug)]
pub struct MemoryDisk {
    bytes: Anon,
    /// Held while the size changes; what reads and writes never takes it.
    size: Mutex<u64>,
}

impl MemoryDisk {
    /// `size` bytes of zeroes. Fails with `ENOMEM` when the system refuses so much address space.
    pub fn new(size: u64) -> io::Result<Self> {
        let fixed = usize::try_from(size).map_err(|_| io::ErrorKind::OutOfMemory)?.max(1);
        let room = fixed.saturating_mul(4).max(ROOM);
        // Without room (RLIMIT_AS, strict overcommit) the disk works but cannot grow.
        let bytes = Anon::reserve(room).or_else(|_| Anon::reserve(fixed))?;
        bytes.make_usable(fixed)?;
        Ok(Self { bytes, size: Mutex::new(size) })
    }

    /// How many bytes the disk has now.
    pub fn size(&self) -> u64 {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the disk `size` bytes long; what is cut off reads as zeroes when grown again.
    ///
    /// From any thread, while others read and write. Requests are held to the size by whoever makes
    /// them, not here. Fails with `ENOMEM` when there is no room to grow.
    pub fn resize(&self, size: u64) -> io::Result<()> {
        let mut current = self.size.lock().unwrap_or_else(PoisonError::into_inner);
        let usable = usize::try_from(size).map_err(|_| io::ErrorKind::OutOfMemory)?;
        self.bytes.make_usable(usable)?;
        // Growing clears too: a write that began before the disk shrank may have come after the clearing then.
        let (low, high) = (size.min(*current), size.max(*current));
        let cleared = self.bytes.release(low, high - low);
        debug_assert!(cleared.is_ok(), "both sizes are usable");
        *current = size;
        Ok(())
    }

    #[inline]
    fn read(&self, mut offset: u64, runs: &[IoVec]) -> Result<(), BeyondEnd> {
        for run in runs {
            self.bytes.read(offset, run)?;
            offset += run.len() as u64;
        }
        Ok(())
    }

    #[inline]
    fn write(&self, mut offset: u64, runs: &[IoVec]) -> Result<(), BeyondEnd> {
        for run in runs {
            self.bytes.write(offset, run)?;
            offset += run.len() as u64;
        }
        Ok(())
    }

    fn run(&self, operation: &Operation) -> Result<(), BeyondEnd> {
        let Operation { kind, offset, len, .. } = *operation;
        match kind {
            Kind::Read => self.read(offset, &operation.runs)?,
            Kind::Write => self.write(offset, &operation.runs)?,
            Kind::Flush => {}
            Kind::Discard | Kind::WriteZeroes { unmap: true } => self.bytes.release(offset, len)?,
            Kind::WriteZeroes { unmap: false } => self.bytes.zero(offset, len)?,
        }
        Ok(())
    }
}

/// One worker's way to a memory disk: copies at once.
#[derive(Debug)]
pub struct MemoryEngine {
    disk: Arc<MemoryDisk>,
    polls: PollSet,
}

impl MemoryEngine {
    /// An engine for `disk`.
    pub fn new(disk: Arc<MemoryDisk>) -> Self {
        Self { disk, polls: PollSet::default() }
    }
}

impl Engine for MemoryEngine {
    fn inline(&self) -> bool {
        true
    }

    #[inline]
    fn move_now(&mut self, kind: Kind, offset: u64, _durable: bool, runs: &[IoVec]) -> bool {
        match kind {
            Kind::Read => self.disk.read(offset, runs).is_ok(),
            _ => self.disk.write(offset, runs).is_ok(),
        }
    }

    fn wants_hints(&self) -> bool {
        true
    }

    #[inline]
    fn hint(&mut self, offset: u64) {
        self.disk.bytes.prefetch(offset);
    }

    #[inline]
    fn submit(&mut self, operation: Operation) -> Option<Completion> {
        let result = self.disk.run(&operation).map_err(|BeyondEnd| libc::EIO);
        Some(Completion::of(operation, result))
    }

    fn kick(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self, _done: &mut Vec<Completion>) {}

    fn pending(&self) -> usize {
        0
    }

    fn watch(&mut self, fd: libc::c_int, token: u32) -> io::Result<()> {
        self.polls.watch(fd, Some(token))
    }

    fn unwatch(&mut self, token: u32) {
        self.polls.unwatch(token);
    }

    fn wait(&mut self, timeout: Option<Duration>, ready: &mut Vec<u32>) -> io::Result<()> {
        self.polls.wait(timeout, ready)
    }
}
