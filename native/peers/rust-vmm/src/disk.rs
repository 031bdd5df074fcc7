//! Requests of a virtio disk, carried out on a file with plain system calls.

use std::fs::File;
use std::io::{Read, Result, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::{DescriptorChain, Reader};
use vm_memory::{GuestMemoryLoadGuard, GuestMemoryMmap};

const SECTOR: u64 = 512;
/// The most that one request may zero.
pub(crate) const MAX_WRITE_ZEROES_SECTORS: u32 = 32768;

type Memory = GuestMemoryLoadGuard<GuestMemoryMmap>;

/// An image file and the mode of its write cache.
pub(crate) struct Disk {
    file: File,
    num_sectors: u64,
    writeback: AtomicBool,
}

impl Disk {
    pub(crate) fn new(file: File) -> Result<Disk> {
        let num_sectors = file.metadata()?.len() / SECTOR;
        Ok(Disk { file, num_sectors, writeback: AtomicBool::new(true) })
    }

    pub(crate) fn num_sectors(&self) -> u64 {
        self.num_sectors
    }

    pub(crate) fn writeback(&self) -> bool {
        self.writeback.load(Ordering::Relaxed)
    }

    pub(crate) fn set_writeback(&self, on: bool) -> Result<()> {
        self.writeback.store(on, Ordering::Relaxed);
        if on {
            return Ok(());
        }
        self.file.sync_data()
    }

    /// Carries out the request in `chain`; returns the used length.
    pub(crate) fn answer(&self, memory: &Memory, chain: &DescriptorChain<Memory>) -> u32 {
        let (Ok(mut reader), Ok(mut writer)) = (chain.clone().reader(memory), chain.clone().writer(memory)) else {
            return 0;
        };
        let Some(room) = writer.available_bytes().checked_sub(1) else { return 0 };
        let Ok(mut status) = writer.split_at(room) else { return 0 };
        let mut answer = vec![];
        let code = self.carry_out(&mut reader, room, &mut answer).unwrap_or(VIRTIO_BLK_S_IOERR);
        let length = answer.len() as u32;
        if writer.write_all(&answer).and_then(|()| status.write_all(&[code as u8])).is_err() {
            return 0;
        }
        length + 1
    }

    fn carry_out(&self, reader: &mut Reader, room: usize, answer: &mut Vec<u8>) -> Result<u32> {
        let kind: u32 = reader.read_obj()?;
        let _priority: u32 = reader.read_obj()?;
        let sector: u64 = reader.read_obj()?;
        match kind {
            VIRTIO_BLK_T_IN => {
                let Some(offset) = self.place(sector, room as u64) else { return Ok(VIRTIO_BLK_S_IOERR) };
                answer.resize(room, 0);
                let read = self.file.read_exact_at(answer, offset);
                if read.is_err() {
                    answer.clear();
                }
                read?;
            }
            VIRTIO_BLK_T_OUT => {
                let mut data = vec![];
                reader.read_to_end(&mut data)?;
                let Some(offset) = self.place(sector, data.len() as u64) else { return Ok(VIRTIO_BLK_S_IOERR) };
                self.file.write_all_at(&data, offset)?;
                self.settle()?;
            }
            VIRTIO_BLK_T_FLUSH => self.file.sync_data()?,
            VIRTIO_BLK_T_GET_ID => {
                answer.extend_from_slice(b"rust-vmm");
                answer.resize(room.min(VIRTIO_BLK_ID_BYTES as usize), 0);
            }
            VIRTIO_BLK_T_WRITE_ZEROES => return self.write_zeroes(reader),
            _ => return Ok(VIRTIO_BLK_S_UNSUPP),
        }
        Ok(VIRTIO_BLK_S_OK)
    }

    fn write_zeroes(&self, reader: &mut Reader) -> Result<u32> {
        if reader.available_bytes() != 16 {
            return Ok(VIRTIO_BLK_S_UNSUPP);
        }
        let sector: u64 = reader.read_obj()?;
        let num_sectors: u32 = reader.read_obj()?;
        let flags: u32 = reader.read_obj()?;
        if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
            return Ok(VIRTIO_BLK_S_UNSUPP);
        }
        let length = u64::from(num_sectors) * SECTOR;
        let Some(offset) = self.place(sector, length).filter(|_| num_sectors <= MAX_WRITE_ZEROES_SECTORS) else {
            return Ok(VIRTIO_BLK_S_IOERR);
        };
        if length == 0 {
            return Ok(VIRTIO_BLK_S_OK);
        }
        let mode = libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE;
        // SAFETY: no memory is handed over; the descriptor is open for as long as `self.file` lives.
        let done = unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset as i64, length as i64) };
        if done != 0 {
            self.file.write_all_at(&vec![0; length as usize], offset)?;
        }
        self.settle()?;
        Ok(VIRTIO_BLK_S_OK)
    }

    /// The byte at which `length` bytes from `sector` on begin, when they are whole sectors inside of the disk.
    fn place(&self, sector: u64, length: u64) -> Option<u64> {
        let end = sector.checked_add(length / SECTOR)?;
        (length % SECTOR == 0 && end <= self.num_sectors).then_some(sector * SECTOR)
    }

    /// What a write owes before it completes when the cache is writethrough.
    fn settle(&self) -> Result<()> {
        if self.writeback() {
            return Ok(());
        }
        self.file.sync_data()
    }
}
