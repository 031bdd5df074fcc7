//! The table of regions: from guest and user addresses to bytes in this process.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::{GuestSlice, IoVec, Mapping};

/// Regions one table can have. Front-ends stay below: QEMU caps its own at 512.
pub const MAX_REGIONS: usize = 512;

/// Why a table cannot be made.
#[derive(Debug)]
pub enum MemoryError {
    /// The table itself breaks a rule.
    Table(String),
    /// A region's file cannot be mapped.
    Map(u64, io::Error),
}

impl fmt::Display for MemoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Table(why) => f.write_str(why),
            Self::Map(gpa, error) => write!(f, "the region at guest address {gpa:#x} cannot be mapped: {error}"),
        }
    }
}

/// An address range that is not, or not wholly, in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unmapped;

/// One region as the front-end describes it (vhost-user: Memory region description).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionSpec {
    /// Where the guest sees it.
    pub guest_addr: u64,
    /// Bytes.
    pub size: u64,
    /// Where the front-end has it mapped.
    pub user_addr: u64,
    /// Where in the file it starts.
    pub mmap_offset: u64,
}

#[derive(Clone, Debug)]
struct Region {
    spec: RegionSpec,
    /// All its bytes, for as long as `map` lives.
    bytes: IoVec,
    map: Arc<Mapping>,
}

impl Region {
    fn new(spec: RegionSpec, map: Arc<Mapping>) -> Self {
        // SAFETY: the mapping is as long as the region, and kept beside.
        let bytes = unsafe { IoVec::from_raw_parts(map.start().as_ptr(), map.len()) };
        Self { spec, bytes, map }
    }
}

/// An immutable table of mapped regions (vhost-user: Memory regions description).
#[derive(Clone, Debug, Default)]
pub struct GuestMemory {
    by_guest: Vec<Region>,
    by_user: Vec<u16>,
}

impl GuestMemory {
    /// A table of regions, each with the descriptor of its file.
    pub fn new<'a>(regions: impl IntoIterator<Item = (RegionSpec, BorrowedFd<'a>)>) -> Result<Self, MemoryError> {
        let mut table = Vec::new();
        for (spec, fd) in regions {
            check_region(&spec)?;
            if table.len() == MAX_REGIONS {
                return Err(MemoryError::Table(format!("more than {MAX_REGIONS} regions")));
            }
            let map = Mapping::of_file(fd, spec.mmap_offset, spec.size)
                .map_err(|error| MemoryError::Map(spec.guest_addr, error))?;
            table.push(Region::new(spec, map));
        }
        Self::of_regions(table)
    }

    /// A table over mappings that exist already.
    pub fn of_mappings(regions: impl IntoIterator<Item = (RegionSpec, Arc<Mapping>)>) -> Result<Self, MemoryError> {
        let mut table = Vec::new();
        for (spec, map) in regions {
            check_region(&spec)?;
            if spec.size != map.len() as u64 {
                return Err(MemoryError::Table("a region and its mapping differ in size".into()));
            }
            table.push(Region::new(spec, map));
        }
        Self::of_regions(table)
    }

    /// This table and one more region.
    pub fn add(&self, spec: RegionSpec, fd: BorrowedFd<'_>) -> Result<Self, MemoryError> {
        check_region(&spec)?;
        if self.by_guest.len() == MAX_REGIONS {
            return Err(MemoryError::Table(format!("more than {MAX_REGIONS} regions")));
        }
        let mut table = self.by_guest.clone();
        let map = Mapping::of_file(fd, spec.mmap_offset, spec.size)
            .map_err(|error| MemoryError::Map(spec.guest_addr, error))?;
        table.push(Region::new(spec, map));
        Self::of_regions(table)
    }

    /// This table without the region at these addresses; its file offset does not matter.
    pub fn remove(&self, guest_addr: u64, size: u64, user_addr: u64) -> Result<Self, MemoryError> {
        let mut table = self.by_guest.clone();
        let at = table
            .iter()
            .position(|r| (r.spec.guest_addr, r.spec.size, r.spec.user_addr) == (guest_addr, size, user_addr))
            .ok_or_else(|| {
                MemoryError::Table(format!(
                    "no region of {size:#x} bytes at guest address {guest_addr:#x}, user address {user_addr:#x}"
                ))
            })?;
        table.remove(at);
        Self::of_regions(table)
    }

    fn of_regions(mut table: Vec<Region>) -> Result<Self, MemoryError> {
        table.sort_by_key(|r| r.spec.guest_addr);
        for pair in table.windows(2) {
            let (low, high) = (&pair[0].spec, &pair[1].spec);
            if low.guest_addr + low.size > high.guest_addr {
                return Err(MemoryError::Table(format!("regions overlap at guest address {:#x}", high.guest_addr)));
            }
        }
        let mut by_user: Vec<u16> = (0..table.len() as u16).collect();
        by_user.sort_by_key(|&i| table[usize::from(i)].spec.user_addr);
        for pair in by_user.windows(2) {
            let (low, high) = (&table[usize::from(pair[0])].spec, &table[usize::from(pair[1])].spec);
            if low.user_addr + low.size > high.user_addr {
                return Err(MemoryError::Table(format!("regions overlap at user address {:#x}", high.user_addr)));
            }
        }
        Ok(Self { by_guest: table, by_user })
    }

    /// The regions by rising guest address.
    pub fn regions(&self) -> impl Iterator<Item = RegionSpec> + '_ {
        self.by_guest.iter().map(|r| r.spec)
    }

    /// Whether the peer took any of the memory away.
    pub fn poisoned(&self) -> bool {
        self.by_guest.iter().any(|r| r.map.poisoned())
    }

    /// Looks at the files' sizes, after a system call met `EFAULT`; true when memory was taken away.
    pub fn check(&self) -> bool {
        // Every mapping is looked at: `check` replaces a lost one.
        self.by_guest.iter().filter(|region| region.map.check()).count() > 0
    }

    #[inline]
    fn find(&self, guest_addr: u64) -> Option<&Region> {
        // Most of a guest's memory is its first region.
        let at = match &self.by_guest[..] {
            [_] => 1,
            [first, second, ..] if (first.spec.guest_addr..second.spec.guest_addr).contains(&guest_addr) => 1,
            regions => regions.partition_point(|r| r.spec.guest_addr <= guest_addr),
        };
        let region = self.by_guest.get(at.checked_sub(1)?)?;
        (guest_addr.wrapping_sub(region.spec.guest_addr) < region.spec.size).then_some(region)
    }

    /// The `len` bytes at `guest_addr`, when there are any and one region has all of them. Whoever holds the run holds the table.
    #[inline]
    pub fn run(&self, guest_addr: u64, len: u64) -> Option<IoVec> {
        let region = self.find(guest_addr)?;
        let into = guest_addr - region.spec.guest_addr;
        if len == 0 || len > region.spec.size - into {
            return None;
        }
        // SAFETY: within the region, whose bytes `region.map` keeps; whoever holds the run holds the table.
        Some(unsafe { IoVec::from_raw_parts(region.bytes.as_ptr().add(into as usize), len as usize) })
    }

    /// Appends the runs behind `len` bytes at `guest_addr` to `out`: one for each region touched.
    /// On failure `out` is as before.
    #[inline]
    pub fn runs(&self, guest_addr: u64, len: u64, out: &mut Vec<IoVec>) -> Result<(), Unmapped> {
        if let Some(run) = self.run(guest_addr, len) {
            out.push(run);
            return Ok(());
        }
        self.runs_across(guest_addr, len, out)
    }

    #[cold]
    fn runs_across(&self, guest_addr: u64, len: u64, out: &mut Vec<IoVec>) -> Result<(), Unmapped> {
        let before = out.len();
        let mut at = guest_addr;
        let mut left = len;
        while left > 0 {
            let Some(region) = self.find(at) else {
                out.truncate(before);
                return Err(Unmapped);
            };
            let into = at - region.spec.guest_addr;
            let here = left.min(region.spec.size - into);
            let mut run = region.bytes;
            run.advance(into as usize);
            run.truncate(here as usize);
            out.push(run);
            left -= here;
            // A region ends at most at 2^64 exactly (`check_region`): wrapping to 0 finds what is there.
            match at.checked_add(here) {
                Some(next) => at = next,
                None if left == 0 => break,
                None => {
                    out.truncate(before);
                    return Err(Unmapped);
                }
            }
        }
        Ok(())
    }

    /// Copies guest memory out, all or nothing.
    pub fn read(&self, guest_addr: u64, into: &mut [u8]) -> Result<(), Unmapped> {
        let mut runs = Vec::new();
        self.runs(guest_addr, into.len() as u64, &mut runs)?;
        let mut at = 0;
        for run in runs {
            at += run.copy_to(&mut into[at..]);
        }
        Ok(())
    }

    /// Copies into guest memory, all or nothing.
    pub fn write(&self, guest_addr: u64, from: &[u8]) -> Result<(), Unmapped> {
        let mut runs = Vec::new();
        self.runs(guest_addr, from.len() as u64, &mut runs)?;
        let mut at = 0;
        for run in runs {
            at += run.copy_from(&from[at..]);
        }
        Ok(())
    }

    /// A contiguous slice by user address, for a ring's structures: it lies within one region.
    pub fn user_slice(&self, user_addr: u64, len: usize) -> Result<GuestSlice, Unmapped> {
        let at = self.by_user.partition_point(|&i| self.by_guest[usize::from(i)].spec.user_addr <= user_addr);
        let index = self.by_user[at.checked_sub(1).ok_or(Unmapped)?];
        let region = &self.by_guest[usize::from(index)];
        let offset = usize::try_from(user_addr - region.spec.user_addr).map_err(|_| Unmapped)?;
        GuestSlice::new(Arc::clone(&region.map), offset, len).map_err(|_| Unmapped)
    }
}

fn check_region(spec: &RegionSpec) -> Result<(), MemoryError> {
    let wraps = |start: u64| start.checked_add(spec.size).is_none();
    if spec.size == 0 {
        return Err(MemoryError::Table(format!("the region at guest address {:#x} is empty", spec.guest_addr)));
    }
    if wraps(spec.guest_addr) || wraps(spec.user_addr) || wraps(spec.mmap_offset) {
        return Err(MemoryError::Table(format!("the region at guest address {:#x} wraps around", spec.guest_addr)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsFd, FromRawFd, OwnedFd};

    fn memfd(len: u64) -> OwnedFd {
        // SAFETY: a literal name; the returned descriptor is new.
        let fd = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC)) };
        std::fs::File::from(fd.try_clone().unwrap()).set_len(len).unwrap();
        fd
    }

    fn spec(guest_addr: u64, size: u64, user_addr: u64, mmap_offset: u64) -> RegionSpec {
        RegionSpec { guest_addr, size, user_addr, mmap_offset }
    }

    #[test]
    fn a_run_crosses_adjacent_regions_and_stops_at_holes() {
        let file = memfd(0x4000);
        let memory = GuestMemory::new([
            (spec(0x1000, 0x1000, 0x90_1000, 0x0), file.as_fd()),
            (spec(0x2000, 0x800, 0x80_0000, 0x2000), file.as_fd()),
        ])
        .unwrap();
        let data: Vec<u8> = (0..0x900).map(|i| (i % 251) as u8).collect();
        memory.write(0x1f00, &data).unwrap();
        let mut back = vec![0; data.len()];
        memory.read(0x1f00, &mut back).unwrap();
        assert_eq!(back, data);
        let mut runs = Vec::new();
        memory.runs(0x1f00, 0x900, &mut runs).unwrap();
        assert_eq!(runs.iter().map(IoVec::len).collect::<Vec<_>>(), [0x100, 0x800]);
        assert_eq!(memory.runs(0x1f00, 0x901, &mut runs), Err(Unmapped));
        assert_eq!(runs.len(), 2, "a failed look-up leaves the list as it was");
        assert_eq!(memory.runs(0xfff, 2, &mut runs), Err(Unmapped));
        assert_eq!(memory.runs(u64::MAX, 2, &mut runs), Err(Unmapped));
    }

    #[test]
    fn unaligned_offsets_and_sizes_reach_the_right_bytes() {
        let file = memfd(0x3000);
        let memory = GuestMemory::new([(spec(7, 0x1235, 77, 0x1001), file.as_fd())]).unwrap();
        memory.write(7 + 0x1234, b"!").unwrap();
        let mut byte = [0];
        use std::os::unix::fs::FileExt;
        std::fs::File::from(file).read_exact_at(&mut byte, 0x1001 + 0x1234).unwrap();
        assert_eq!(&byte, b"!");
    }

    #[test]
    fn tables_that_break_the_rules_are_refused() {
        let file = memfd(0x2000);
        let fd = file.as_fd();
        let bad = [
            vec![spec(0, 0, 0, 0)],
            vec![spec(0, 0x1000, 0, 0), spec(0xfff, 0x1000, 0x10000, 0)],
            vec![spec(0, 0x1000, 0x5000, 0), spec(0x1000, 0x1000, 0x5fff, 0)],
            vec![spec(u64::MAX, 0x1000, 0, 0)],
            vec![spec(0, 0x1000, u64::MAX, 0)],
            vec![spec(0, 0x1000, 0, u64::MAX)],
            vec![spec(0, 0x2001, 0, 0)],
        ];
        for table in bad {
            assert!(GuestMemory::new(table.iter().map(|s| (*s, fd))).is_err(), "{table:?}");
        }
    }

    #[test]
    fn regions_come_and_go_without_touching_the_table_they_came_from() {
        let file = memfd(0x4000);
        let one = GuestMemory::new([(spec(0, 0x1000, 0x1000, 0), file.as_fd())]).unwrap();
        let two = one.add(spec(0x1000, 0x1000, 0x9000, 0x1000), file.as_fd()).unwrap();
        assert_eq!((one.regions().count(), two.regions().count()), (1, 2));
        assert!(two.add(spec(0x1800, 0x1000, 0x20000, 0x1000), file.as_fd()).is_err());
        let back = two.remove(0, 0x1000, 0x1000).unwrap();
        assert_eq!(back.regions().map(|r| r.guest_addr).collect::<Vec<_>>(), [0x1000]);
        assert!(back.remove(0, 0x1000, 0x1000).is_err());
        assert!(back.user_slice(0x9ff0, 16).is_ok());
        assert_eq!(back.user_slice(0x9ff1, 16).err(), Some(Unmapped));
        assert_eq!(back.user_slice(0x1000, 16).err(), Some(Unmapped));
    }

    #[test]
    fn a_truncated_file_poisons_its_own_mapping_only() {
        let (mine, theirs) = (memfd(0x2000), memfd(0x2000));
        let memory = GuestMemory::new([
            (spec(0, 0x2000, 0x10000, 0), mine.as_fd()),
            (spec(0x10000, 0x2000, 0x20000, 0), theirs.as_fd()),
        ])
        .unwrap();
        memory.write(0x1000, b"kept?").unwrap();
        memory.write(0x10000, b"kept!").unwrap();
        std::fs::File::from(mine.try_clone().unwrap()).set_len(0).unwrap();
        let mut bytes = [1; 5];
        memory.read(0x1000, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 5]);
        assert!(memory.poisoned());
        memory.read(0x10000, &mut bytes).unwrap();
        assert_eq!(&bytes, b"kept!");
    }

    #[test]
    fn a_truncated_file_is_found_without_touching_it() {
        let file = memfd(0x2000);
        let memory = GuestMemory::new([(spec(0, 0x2000, 0x10000, 0), file.as_fd())]).unwrap();
        assert!(!memory.check());
        std::fs::File::from(file.try_clone().unwrap()).set_len(0x1000).unwrap();
        assert!(!memory.poisoned());
        assert!(memory.check());
        assert!(memory.poisoned());
    }
}
