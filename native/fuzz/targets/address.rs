//! Address translation: tables made, extended and cut by hostile descriptions, then read and written through.
//!
//! The model is a list of regions looked through byte by byte, over plain copies of the files.
#![no_main]

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use libfuzzer_sys::fuzz_target;
use vhostuser_core::memory::{GuestMemory, RegionSpec};
use vhostuser_fuzz::Input;

/// Bytes of each file: none, less than a page, pages, and an odd number.
const SIZES: [u64; 5] = [0x3000, 0x2000, 0x1001, 0x800, 0];
const MAX_TABLES: usize = 6;
const MAX_STEPS: usize = 80;
const MOST: u64 = 0x4000;

/// A file and what it must hold; `None` once the peer took it away: then anything may be read.
struct Backing {
    file: File,
    bytes: Option<Vec<u8>>,
    /// What the file is long now.
    size: u64,
}

#[derive(Clone, Copy, Debug)]
struct Region {
    spec: RegionSpec,
    file: usize,
    /// Its end in the file when it was mapped.
    end: u64,
}

/// A table and the model of it.
struct Table {
    real: GuestMemory,
    model: Vec<Region>,
}

impl Table {
    fn at(&self, gpa: u64) -> Option<(&Region, u64)> {
        let here = |region: &&Region| region.spec.guest_addr <= gpa && gpa - region.spec.guest_addr < region.spec.size;
        self.model.iter().find(here).map(|region| (region, gpa - region.spec.guest_addr))
    }

    /// The pieces of an address range: region, offset into it, bytes. `None` when a byte of it is nowhere.
    fn pieces(&self, gpa: u64, len: u64) -> Option<Vec<(Region, u64, u64)>> {
        let (mut at, mut left, mut pieces) = (u128::from(gpa), len, Vec::new());
        while left > 0 {
            let (region, into) = self.at(u64::try_from(at).ok()?)?;
            let here = left.min(region.spec.size - into);
            pieces.push((*region, into, here));
            at += u128::from(here);
            left -= here;
        }
        Some(pieces)
    }
}

fn overlap(a: u64, b: u64, a_size: u64, b_size: u64) -> bool {
    let (a, b, a_size, b_size) = (u128::from(a), u128::from(b), u128::from(a_size), u128::from(b_size));
    a < b + b_size && b < a + a_size
}

/// Whether the rules allow a table of these regions, and the files hold them.
fn legal(regions: &[Region], files: &[Backing]) -> bool {
    let whole = |region: &Region| {
        let spec = &region.spec;
        let fits = |start: u64| start.checked_add(spec.size).is_some();
        spec.size > 0
            && fits(spec.guest_addr)
            && fits(spec.user_addr)
            && spec.mmap_offset.checked_add(spec.size).is_some_and(|end| end <= files[region.file].size)
    };
    let apart = |(at, one): (usize, &Region)| {
        regions[..at].iter().all(|other| {
            !overlap(one.spec.guest_addr, other.spec.guest_addr, one.spec.size, other.spec.size)
                && !overlap(one.spec.user_addr, other.spec.user_addr, one.spec.size, other.spec.size)
        })
    };
    regions.iter().all(whole) && regions.iter().enumerate().all(apart)
}

struct Play<'a> {
    input: Input<'a>,
    files: Vec<Backing>,
    tables: Vec<Table>,
    stamp: u8,
}

impl Play<'_> {
    /// An address near something that is there, or anywhere.
    fn address(&mut self, model: &[Region], user: bool) -> u64 {
        let near = u64::from(self.input.u8());
        let start = |region: &Region| if user { region.spec.user_addr } else { region.spec.guest_addr };
        let chosen = usize::from(self.input.u8());
        match (self.input.u8() % 8, model.get(chosen % model.len().max(1))) {
            (0 | 1, Some(region)) => start(region).wrapping_add(near),
            (2 | 3, Some(region)) => start(region).wrapping_add(region.spec.size).wrapping_sub(near % 16),
            (4, Some(region)) => start(region).wrapping_add(region.spec.size).wrapping_add(near),
            (5, _) => u64::MAX - near * 16,
            (6, _) => self.input.u64(),
            _ => near * 0x400,
        }
    }

    fn region(&mut self, model: &[Region]) -> Region {
        let file = usize::from(self.input.u8()) % self.files.len();
        let size = match self.input.u8() % 8 {
            0 => u64::from(self.input.u8()),
            1 => self.files[file].size,
            2 => self.input.u64(),
            3 => u64::from(self.input.u16()),
            step => 0x400 * u64::from(step),
        };
        let mmap_offset = match self.input.u8() % 8 {
            0..=3 => 0,
            4 => u64::from(self.input.u16()),
            5 => self.files[file].size.wrapping_sub(size),
            6 => self.input.u64(),
            _ => 0x1000,
        };
        let (guest_addr, user_addr) = (self.address(model, false), self.address(model, true));
        let spec = RegionSpec { guest_addr, size, user_addr, mmap_offset };
        Region { spec, file, end: mmap_offset.saturating_add(size) }
    }

    fn keep(&mut self, table: Table) {
        let mut specs: Vec<_> = table.model.iter().map(|region| region.spec).collect();
        specs.sort_by_key(|spec| spec.guest_addr);
        assert_eq!(table.real.regions().collect::<Vec<_>>(), specs);
        if self.tables.len() == MAX_TABLES {
            self.tables.remove(1);
        }
        self.tables.push(table);
    }

    fn step(&mut self) {
        let chosen = usize::from(self.input.u8()) % self.tables.len();
        match self.input.u8() % 16 {
            0 => {
                let mut model = Vec::new();
                for _ in 0..self.input.u8() % 9 {
                    let region = self.region(&model);
                    model.push(region);
                }
                let fds: Vec<(RegionSpec, BorrowedFd<'_>)> =
                    model.iter().map(|region| (region.spec, self.files[region.file].file.as_fd())).collect();
                let real = GuestMemory::new(fds);
                assert_eq!(real.is_ok(), legal(&model, &self.files), "{model:?}: {:?}", real.err());
                if let Ok(real) = real {
                    self.keep(Table { real, model });
                }
            }
            1..=4 => {
                let mut model = self.tables[chosen].model.clone();
                let more = self.region(&model);
                model.push(more);
                let real = self.tables[chosen].real.add(more.spec, self.files[more.file].file.as_fd());
                // What was mapped before stays legal although its file may have shrunk.
                let fits = legal(&[more], &self.files) && legal_together(&model);
                assert_eq!(real.is_ok(), fits, "{model:?}: {:?}", real.err());
                if let Ok(real) = real {
                    self.keep(Table { real, model });
                }
            }
            5 => self.remove(chosen),
            6 => {
                let file = usize::from(self.input.u8()) % self.files.len();
                let size = u64::from(self.input.u16() % 0x3001);
                if self.input.u8() % 4 == 0 && size < self.files[file].size {
                    self.files[file].file.set_len(size).expect("it shrinks");
                    self.files[file].size = size;
                    self.files[file].bytes = None;
                    for table in &self.tables {
                        let lost = table.model.iter().any(|region| region.end > self.files[region.file].size);
                        assert_eq!(table.real.check(), lost, "{:?}", table.model);
                        assert_eq!(table.real.poisoned(), lost);
                    }
                }
            }
            7 => self.slice(chosen),
            8..=11 => self.read(chosen),
            _ => self.write(chosen),
        }
    }

    fn remove(&mut self, chosen: usize) {
        let mut model = self.tables[chosen].model.clone();
        let at = usize::from(self.input.u8());
        let (mut guest_addr, mut size, mut user_addr) = (self.input.address(), 0x1000, 0x1000);
        if let Some(region) = model.get(at % model.len().max(1)) {
            (guest_addr, size, user_addr) = (region.spec.guest_addr, region.spec.size, region.spec.user_addr);
            match self.input.u8() {
                0 => guest_addr ^= 1,
                1 => size += 1,
                2 => user_addr ^= 0x1000,
                _ => {}
            }
        }
        let same = |region: &Region| {
            (region.spec.guest_addr, region.spec.size, region.spec.user_addr) == (guest_addr, size, user_addr)
        };
        let found = model.iter().position(same);
        let real = self.tables[chosen].real.remove(guest_addr, size, user_addr);
        assert_eq!(real.is_ok(), found.is_some());
        if let (Ok(real), Some(found)) = (real, found) {
            model.remove(found);
            self.keep(Table { real, model });
        }
    }

    fn range(&mut self, chosen: usize) -> (u64, u64) {
        let model = self.tables[chosen].model.clone();
        let gpa = self.address(&model, false);
        let len = match self.input.u8() {
            255 => self.input.u64(),
            254 => MOST,
            len => u64::from(len) * if len % 2 == 0 { 1 } else { 0x20 },
        };
        (gpa, len)
    }

    fn read(&mut self, chosen: usize) {
        let (gpa, len) = self.range(chosen);
        let table = &self.tables[chosen];
        let pieces = table.pieces(gpa, len);
        let mut runs = Vec::new();
        let found = table.real.runs(gpa, len, &mut runs);
        assert_eq!(found.is_ok(), pieces.is_some(), "{gpa:#x}+{len:#x} in {:?}", table.model);
        let lens: Vec<_> = runs.iter().map(|run| run.len() as u64).collect();
        let model: Vec<_> = pieces.iter().flatten().map(|(_, _, here)| *here).collect();
        assert_eq!(lens, model, "one run for each region, and none when the range is refused");
        if len > MOST {
            return;
        }
        let mut bytes = vec![0xa5; len as usize];
        assert_eq!(table.real.read(gpa, &mut bytes).is_ok(), pieces.is_some());
        let Some(pieces) = pieces else {
            assert!(bytes.iter().all(|byte| *byte == 0xa5), "all or nothing");
            return;
        };
        let mut at = 0;
        for (region, into, here) in pieces {
            if let Some(file) = &self.files[region.file].bytes {
                let start = (region.spec.mmap_offset + into) as usize;
                assert!(bytes[at..at + here as usize] == file[start..start + here as usize]);
            }
            at += here as usize;
        }
    }

    fn write(&mut self, chosen: usize) {
        let (gpa, len) = self.range(chosen);
        let len = len.min(MOST);
        self.stamp = self.stamp.wrapping_add(1);
        let bytes: Vec<u8> = (0..len).map(|at| self.stamp.wrapping_add(at as u8)).collect();
        let table = &self.tables[chosen];
        let pieces = table.pieces(gpa, len);
        assert_eq!(table.real.write(gpa, &bytes).is_ok(), pieces.is_some());
        let mut at = 0;
        // Regions may show the same bytes of a file: what is written later is what counts, as for real.
        for (region, into, here) in pieces.into_iter().flatten() {
            let start = (region.spec.mmap_offset + into) as usize;
            if let Some(file) = &mut self.files[region.file].bytes {
                file[start..start + here as usize].copy_from_slice(&bytes[at..at + here as usize]);
            }
            at += here as usize;
        }
    }

    /// A ring's memory by user address: within one region, or not at all.
    fn slice(&mut self, chosen: usize) {
        let model = self.tables[chosen].model.clone();
        let (user, len) = (self.address(&model, true), usize::from(self.input.u16()));
        let holds = |region: &&Region| {
            let Some(into) = user.checked_sub(region.spec.user_addr) else { return false };
            into <= region.spec.size && len as u64 <= region.spec.size - into
        };
        // An empty slice may also stand at the very end of a region.
        let starts =
            |region: &&Region| user >= region.spec.user_addr && user - region.spec.user_addr < region.spec.size;
        let slice = self.tables[chosen].real.user_slice(user, len);
        if len > 0 {
            assert_eq!(slice.is_ok(), model.iter().any(|region| holds(&region)), "{user:#x}+{len:#x} in {model:?}");
        }
        let Ok(slice) = slice else { return };
        assert_eq!(slice.len(), len);
        let at = usize::from(self.input.u16());
        let word = slice.load_u16(at);
        let Some(region) = model.iter().find(starts) else { return };
        let (file, offset) = (&self.files[region.file], user - region.spec.user_addr + region.spec.mmap_offset);
        // A mapping starts at a page, so that its file's offset says how an address is aligned.
        let fits = at + 2 <= len && (offset + at as u64) % 2 == 0;
        assert_eq!(word.is_ok(), fits);
        if let (Ok(word), Some(bytes)) = (word, &file.bytes) {
            let place = offset as usize + at;
            assert_eq!(word.to_le_bytes(), bytes[place..place + 2]);
        }
    }

    /// The files hold what the model holds.
    fn compare(&self) {
        for backing in &self.files {
            let Some(bytes) = &backing.bytes else { continue };
            let mut found = vec![0; bytes.len()];
            backing.file.read_exact_at(&mut found, 0).expect("the file is as long as ever");
            assert!(found == *bytes, "a file differs");
        }
    }
}

/// `legal`, but for what the files hold now.
fn legal_together(regions: &[Region]) -> bool {
    regions.iter().enumerate().all(|(at, one)| {
        regions[..at].iter().all(|other| {
            !overlap(one.spec.guest_addr, other.spec.guest_addr, one.spec.size, other.spec.size)
                && !overlap(one.spec.user_addr, other.spec.user_addr, one.spec.size, other.spec.size)
        })
    })
}

fn backing(number: usize, size: u64) -> Backing {
    // SAFETY: a literal name; the returned descriptor is new.
    let fd = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC)) };
    let file = File::from(fd);
    let bytes: Vec<u8> = (0..size).map(|at| (at % 251) as u8 ^ (number as u8) << 5).collect();
    file.write_all_at(&bytes, 0).expect("room");
    Backing { file, bytes: Some(bytes), size }
}

fuzz_target!(|bytes: &[u8]| {
    let files = SIZES.iter().enumerate().map(|(number, size)| backing(number, *size)).collect();
    let tables = vec![Table { real: GuestMemory::default(), model: Vec::new() }];
    let mut play = Play { input: Input::new(bytes), files, tables, stamp: 0 };
    for _ in 0..MAX_STEPS {
        if play.input.is_empty() {
            break;
        }
        play.step();
    }
    play.compare();
});
