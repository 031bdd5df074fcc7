//! What a ring has the processor fetch before it is needed.
//!
//! The driver's processor has the descriptors, tables and headers, and each takes as long to come as a whole request takes
//! otherwise; several come side by side. What is read here is only a hint: it is read again, and checked, when its chain
//! is taken.

use super::{index, layout, Areas};
use crate::memory::{GuestMemory, IoVec};

/// How far the tables of chains are fetched ahead, their headers, which only the tables tell of, and how far ahead it is told
/// what the headers say.
pub(super) const TABLES: u16 = 8;
const HEADERS: u16 = 4;
const TOLD: u16 = 2;

/// The chains that are taken soon.
#[derive(Debug)]
pub(super) struct Ahead {
    /// Up to these indices it was done; never behind the next one to take once `fetch` has run.
    tables_fetched: u16,
    headers_fetched: u16,
    told: u16,
    /// What chains begin with, by index: their tables, or where there are none, their headers.
    tables: [Option<IoVec>; TABLES as usize],
    indirect: bool,
}

impl Ahead {
    /// Begins with the chain at an index; what was fetched before is of no use.
    pub(super) fn of(at: u16, indirect: bool) -> Self {
        Self { tables_fetched: at, headers_fetched: at, told: at, tables: [None; TABLES as usize], indirect }
    }

    /// Fetches for some of the `count` chains that are available from index `next` on.
    #[inline]
    pub(super) fn fetch(&mut self, next: u16, count: u16, areas: &Areas, memory: &GuestMemory) {
        while index::ahead(self.tables_fetched, next) < count.min(TABLES) {
            let table = self.first_buffer(self.tables_fetched, areas, memory);
            table.iter().for_each(IoVec::prefetch);
            self.tables[usize::from(self.tables_fetched % TABLES)] = table;
            self.tables_fetched = self.tables_fetched.wrapping_add(1);
        }
        while index::ahead(self.headers_fetched, next) < count.min(HEADERS) {
            if self.indirect {
                self.header(self.headers_fetched, memory).iter().for_each(IoVec::prefetch);
            }
            self.headers_fetched = self.headers_fetched.wrapping_add(1);
        }
    }

    /// The first bytes of the next chain that is taken soon and was not told of, if they are known.
    #[inline]
    pub(super) fn tell(&mut self, next: u16, memory: &GuestMemory) -> Option<[u64; 2]> {
        if index::ahead(self.told, next) > TOLD {
            self.told = next;
        }
        let until = index::ahead(self.headers_fetched, next);
        while index::ahead(self.told, next) < TOLD.min(until) {
            let header = self.header(self.told, memory);
            self.told = self.told.wrapping_add(1);
            if let Some(words) = header.and_then(|header| header.words()) {
                return Some(words);
            }
        }
        None
    }

    /// What the first descriptor of the chain at an available index points to. Where tables may be, other chains are not
    /// fetched ahead.
    #[inline]
    fn first_buffer(&self, at: u16, areas: &Areas, memory: &GuestMemory) -> Option<IoVec> {
        let head = areas.avail.load_u16(layout::avail_entry(areas.slot(at))).ok()?;
        let descriptor = areas.descriptor(head).ok()?;
        let is_table = descriptor.flags & layout::F_INDIRECT != 0;
        (is_table == self.indirect).then(|| memory.run(descriptor.addr, u64::from(descriptor.len)))?
    }

    /// Where the header of the chain at an available index is.
    #[inline]
    fn header(&self, at: u16, memory: &GuestMemory) -> Option<IoVec> {
        let first = self.tables[usize::from(at % TABLES)]?;
        if !self.indirect {
            return Some(first);
        }
        let [addr, rest] = first.words()?;
        memory.run(addr, u64::from(layout::Descriptor::from_words(addr, rest).len))
    }
}
