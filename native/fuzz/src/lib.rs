//! What the targets share: numbers out of the fuzzer's bytes, and guest memory with everything that is awkward in it.

use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use vhostuser_core::memory::{GuestMemory, GuestSlice, IoVec, Mapping, RegionSpec};

/// The fuzzer's bytes, read from front to back. Behind their end everything is 0.
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// All of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether everything was read.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next `count` bytes, or what is left of them.
    pub fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn number<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let taken = self.take(N);
        bytes[..taken.len()].copy_from_slice(taken);
        bytes
    }

    /// One byte.
    pub fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.number())
    }

    /// Two bytes.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.number())
    }

    /// Four bytes.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.number())
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.number())
    }

    /// One byte that picks out of `choices`.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[usize::from(self.u8()) % choices.len()]
    }

    /// A guest address: near the start or the end of a region, in a hole, or anything.
    pub fn address(&mut self) -> u64 {
        let region = usize::from(self.u8());
        let offset = u64::from(self.u16());
        match REGIONS.get(region % (REGIONS.len() + 2)) {
            Some(spec) if region < 128 => spec.guest_addr.wrapping_add(offset),
            Some(spec) => spec.guest_addr.wrapping_add(spec.size).wrapping_sub(offset & 0xff),
            None if region % 2 == 0 => 0x8000 + offset,
            None => self.u64(),
        }
    }

    /// The length of a buffer.
    pub fn length(&mut self) -> u32 {
        match self.u8() {
            255 => self.u32(),
            254 => u32::MAX,
            253 => 1 << 31,
            252 => 4096,
            251 => 512,
            250 => 16,
            length => u32::from(length),
        }
    }
}

/// Adjacent regions of odd sizes at odd places, a hole, one by itself, and one that ends where addresses end.
/// The rings are in the first one.
pub const REGIONS: [RegionSpec; 5] = [
    RegionSpec { guest_addr: 0x1000, size: 0x2000, user_addr: 0x7000_0000, mmap_offset: 0 },
    RegionSpec { guest_addr: 0x3000, size: 0x835, user_addr: 0x6000_0007, mmap_offset: 0x2003 },
    RegionSpec { guest_addr: 0x3835, size: 0x10cb, user_addr: 0x5000_0000, mmap_offset: 0x4001 },
    RegionSpec { guest_addr: 0x10_0001, size: 0x1000, user_addr: 0x4000_0000, mmap_offset: 0x6000 },
    RegionSpec { guest_addr: u64::MAX - 0x800, size: 0x800, user_addr: u64::MAX - 0x1800, mmap_offset: 0x8000 },
];

/// The regions, mapped.
pub struct Guest {
    /// The table.
    pub memory: Arc<GuestMemory>,
    maps: Vec<Arc<Mapping>>,
}

impl Default for Guest {
    fn default() -> Self {
        // SAFETY: a literal name; the returned descriptor is new.
        let file = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC)) };
        std::fs::File::from(file.try_clone().expect("a descriptor")).set_len(0xa000).expect("room");
        let map = |spec: &RegionSpec| Mapping::of_file(file.as_fd(), spec.mmap_offset, spec.size).expect("a mapping");
        let maps: Vec<_> = REGIONS.iter().map(map).collect();
        let memory = GuestMemory::of_mappings(REGIONS.into_iter().zip(maps.iter().cloned())).expect("a table");
        Self { memory: Arc::new(memory), maps }
    }
}

impl Guest {
    /// Every byte becomes 0.
    pub fn clear(&self) {
        self.whole().for_each(|run| run.zero());
    }

    /// The runs of all regions.
    fn whole(&self) -> impl Iterator<Item = IoVec> + '_ {
        let slice = |map: &Arc<Mapping>| GuestSlice::new(Arc::clone(map), 0, map.len()).expect("all of it").as_iovec();
        self.maps.iter().map(slice)
    }

    /// A copy of all regions, one after the other.
    pub fn snapshot(&self) -> Vec<u8> {
        let mut bytes = vec![0; REGIONS.iter().map(|spec| spec.size as usize).sum()];
        let mut at = 0;
        for run in self.whole() {
            at += run.copy_to(&mut bytes[at..]);
        }
        bytes
    }

    /// Where in a snapshot a run is; a run that is not within one region is a bug.
    pub fn place(&self, run: &IoVec) -> usize {
        let (first, mut at) = (run.as_ptr() as usize, 0);
        for map in &self.maps {
            let start = map.start().as_ptr() as usize;
            if start <= first && first - start + run.len() <= map.len() {
                return at + first - start;
            }
            at += map.len();
        }
        panic!("{run:?} is not within a region");
    }

    /// The bytes behind a list of runs.
    pub fn gather(&self, runs: &[IoVec]) -> Vec<u8> {
        let mut bytes = vec![0; runs.iter().map(IoVec::len).sum()];
        let mut at = 0;
        for run in runs {
            at += run.copy_to(&mut bytes[at..]);
        }
        bytes
    }
}
