//! What a disk may hold, as far as its driver can know: pure.
//!
//! The disk is a row of units of 512 bytes. Every write has a number of its own and fills a unit with one word, eight
//! bytes that say which unit and which write it is. A unit may hold what an acknowledged write left, or what a write
//! under way brings; never what was overwritten by a write that began later and was acknowledged. Where a write is under
//! way a read may find bytes of both: nobody copies words in one piece, a copy of zeroes least of all.

use std::fmt;

/// Bytes of a unit.
pub(crate) const UNIT: usize = 512;
/// Bits of a word that hold the number of the write.
const NUMBER_BITS: u32 = 40;

/// A write, as one unit sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Value {
    number: u64,
    zero: bool,
}

/// What a unit holds after write `number`; a write of zeroes leaves 0.
fn word(unit: usize, value: Value) -> u64 {
    if value.zero {
        0
    } else {
        ((unit as u64) << NUMBER_BITS) | value.number
    }
}

#[derive(Debug)]
struct Unit {
    possible: Vec<Value>,
    /// Numbers of the writes under way.
    outstanding: Vec<u64>,
}

/// A write under way. Goes back to [`Disk::written`].
#[derive(Debug)]
pub(crate) struct Write {
    first: usize,
    /// For each unit the numbers that cannot be there any more once this write is acknowledged.
    buries: Vec<Vec<u64>>,
    value: Value,
}

/// A read under way: its number. Goes back to [`Disk::check`].
#[derive(Debug)]
pub(crate) struct Read(usize);

#[derive(Debug)]
struct Reading {
    first: usize,
    /// For each unit what may be read, and whether nothing was being written while it was.
    units: Vec<(Vec<Value>, bool)>,
}

/// Something that cannot be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Violation(pub(crate) String);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// All that is known of the disk.
#[derive(Debug)]
pub(crate) struct Disk {
    units: Vec<Unit>,
    readings: Vec<Option<Reading>>,
    next: u64,
}

impl Disk {
    /// A disk of zeroes.
    pub(crate) fn new(units: usize) -> Self {
        let fresh = || Unit { possible: vec![Value { number: 0, zero: true }], outstanding: Vec::new() };
        Self { units: (0..units).map(|_| fresh()).collect(), readings: Vec::new(), next: 1 }
    }

    /// How many units.
    pub(crate) fn len(&self) -> usize {
        self.units.len()
    }

    /// A write of `count` units is sent now; `data` is filled with what it writes, and left alone for a write of zeroes.
    pub(crate) fn write(&mut self, first: usize, count: usize, data: Option<&mut [u8]>) -> Write {
        let value = Value { number: self.next, zero: data.is_none() };
        self.next += 1;
        if let Some(data) = data {
            for (unit, bytes) in (first..).zip(data.chunks_exact_mut(UNIT)) {
                let word = word(unit, value).to_le_bytes();
                bytes.chunks_exact_mut(8).for_each(|place| place.copy_from_slice(&word));
            }
        }
        let mut buries = Vec::with_capacity(count);
        for unit in &mut self.units[first..first + count] {
            let settled = unit.possible.iter().map(|value| value.number);
            buries.push(settled.filter(|number| !unit.outstanding.contains(number)).collect());
            unit.possible.push(value);
            unit.outstanding.push(value.number);
        }
        for reading in self.readings.iter_mut().flatten() {
            for (at, (allowed, quiet)) in (reading.first..).zip(&mut reading.units) {
                if (first..first + count).contains(&at) {
                    allowed.push(value);
                    *quiet = false;
                }
            }
        }
        Write { first, buries, value }
    }

    /// A write was acknowledged.
    pub(crate) fn written(&mut self, write: Write) {
        for (unit, buried) in self.units[write.first..].iter_mut().zip(&write.buries) {
            unit.possible.retain(|value| !buried.contains(&value.number));
            unit.outstanding.retain(|number| *number != write.value.number);
        }
    }

    /// A read of `count` units is sent now.
    pub(crate) fn read(&mut self, first: usize, count: usize) -> Read {
        let units = self.units[first..first + count].iter();
        let units = units.map(|unit| (unit.possible.clone(), unit.outstanding.is_empty())).collect();
        let reading = Some(Reading { first, units });
        match self.readings.iter().position(Option::is_none) {
            Some(at) => {
                self.readings[at] = reading;
                Read(at)
            }
            None => {
                self.readings.push(reading);
                Read(self.readings.len() - 1)
            }
        }
    }

    /// A read brought `data`.
    pub(crate) fn check(&mut self, read: Read, data: &[u8]) -> Result<(), Violation> {
        let Some(reading) = self.readings.get_mut(read.0).and_then(Option::take) else { return Ok(()) };
        for ((at, (allowed, quiet)), bytes) in (reading.first..).zip(reading.units).zip(data.chunks_exact(UNIT)) {
            let seen = judge(at, bytes, &allowed, quiet)?;
            if let (true, Some(seen)) = (quiet, seen) {
                // Nothing moved meanwhile: what was read is there until something else is written.
                self.units[at].possible.retain(|&value| word(at, value) == seen);
            }
        }
        Ok(())
    }

    /// The bytes of the disk itself, while no request is under way.
    pub(crate) fn check_image(&self, bytes: &[u8]) -> Result<(), Violation> {
        if bytes.len() != self.units.len() * UNIT {
            return Err(Violation(format!("the disk has {} bytes now", bytes.len())));
        }
        for (at, (unit, bytes)) in self.units.iter().zip(bytes.chunks_exact(UNIT)).enumerate() {
            judge(at, bytes, &unit.possible, unit.outstanding.is_empty())?;
        }
        Ok(())
    }
}

/// Whether `bytes` can be in unit `at`; the one word all over it. While a write is under way bytes may be mixed.
fn judge(at: usize, bytes: &[u8], allowed: &[Value], quiet: bool) -> Result<Option<u64>, Violation> {
    let mut first = None;
    for place in bytes.chunks_exact(8) {
        let seen = u64::from_le_bytes(place.try_into().unwrap_or_default());
        let whole = allowed.iter().any(|&value| word(at, value) == seen);
        if !whole && (quiet || !mixed(at, seen, allowed)) {
            return Err(Violation(format!("unit {at} holds {}, which may hold {}", said(seen), list(allowed))));
        }
        if quiet && *first.get_or_insert(seen) != seen {
            return Err(Violation(format!("unit {at} is torn: {} and {}", said(first.unwrap_or(0)), said(seen))));
        }
    }
    Ok(first)
}

/// Whether each byte of `seen` is in its place in one of the values.
fn mixed(at: usize, seen: u64, allowed: &[Value]) -> bool {
    let from = |place: usize, byte: u8| allowed.iter().any(|&value| word(at, value).to_le_bytes()[place] == byte);
    seen.to_le_bytes().into_iter().enumerate().all(|(place, byte)| from(place, byte))
}

fn said(word: u64) -> String {
    if word == 0 {
        return "zeroes".into();
    }
    format!("write {} of unit {}", word & ((1 << NUMBER_BITS) - 1), word >> NUMBER_BITS)
}

fn list(allowed: &[Value]) -> String {
    let said = |value: &Value| format!("{}{}", if value.zero { "zeroes " } else { "" }, value.number);
    allowed.iter().map(said).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(disk: &mut Disk, unit: usize) -> (Write, Vec<u8>) {
        let mut data = vec![0; UNIT];
        let write = disk.write(unit, 1, Some(&mut data));
        (write, data)
    }

    fn reads(disk: &mut Disk, unit: usize, data: &[u8]) -> Result<(), Violation> {
        let read = disk.read(unit, 1);
        disk.check(read, data)
    }

    #[test]
    fn before_it_is_acknowledged_a_write_may_be_there_or_not() {
        let mut disk = Disk::new(4);
        let (write, data) = filled(&mut disk, 1);
        assert!(reads(&mut disk, 1, &data).is_ok());
        assert!(reads(&mut disk, 1, &[0; UNIT]).is_ok());
        disk.written(write);
        assert!(reads(&mut disk, 1, &[0; UNIT]).is_err());
        assert!(reads(&mut disk, 1, &data).is_ok());
    }

    #[test]
    fn a_write_of_another_unit_or_one_that_was_never_sent_is_seen() {
        let mut disk = Disk::new(4);
        let (write, data) = filled(&mut disk, 1);
        disk.written(write);
        assert!(reads(&mut disk, 2, &data).is_err());
        assert!(reads(&mut disk, 1, &[7; UNIT]).is_err());
    }

    #[test]
    fn a_write_that_comes_back_after_a_later_one_was_acknowledged_is_seen() {
        let mut disk = Disk::new(1);
        let (first, old) = filled(&mut disk, 0);
        disk.written(first);
        let (second, new) = filled(&mut disk, 0);
        disk.written(second);
        assert!(reads(&mut disk, 0, &new).is_ok());
        assert!(reads(&mut disk, 0, &old).is_err());
        assert!(disk.check_image(&old).is_err());
    }

    #[test]
    fn of_two_writes_at_once_either_stays_and_once_read_it_stays() {
        let mut disk = Disk::new(1);
        let (first, one) = filled(&mut disk, 0);
        let (second, other) = filled(&mut disk, 0);
        disk.written(first);
        disk.written(second);
        assert!(disk.check_image(&one).is_ok());
        assert!(reads(&mut disk, 0, &other).is_ok());
        assert!(disk.check_image(&one).is_err());
    }

    #[test]
    fn a_read_under_way_may_bring_what_was_there_before_or_comes_meanwhile() {
        let mut disk = Disk::new(1);
        let (early, late) = (disk.read(0, 1), disk.read(0, 1));
        let (write, data) = filled(&mut disk, 0);
        disk.written(write);
        assert!(disk.check(early, &[0; UNIT]).is_ok());
        let mut torn = data.clone();
        torn[..8].fill(0);
        assert!(disk.check(late, &torn).is_ok());
        assert!(reads(&mut disk, 0, &torn).is_err());
    }

    #[test]
    fn bytes_of_two_writes_may_be_mixed_while_one_is_under_way_and_no_others() {
        let mut disk = Disk::new(8);
        let (first, mut data) = filled(&mut disk, 5);
        disk.written(first);
        let zeroes = disk.write(5, 1, None);
        data[0] = 0; // of the number; the unit's own number is elsewhere in the word
        assert!(reads(&mut disk, 5, &data).is_ok());
        let foreign = [7; UNIT];
        assert!(reads(&mut disk, 5, &foreign).is_err());
        disk.written(zeroes);
        assert!(reads(&mut disk, 5, &data).is_err());
    }

    #[test]
    fn zeroes_are_written_too() {
        let mut disk = Disk::new(1);
        let (write, data) = filled(&mut disk, 0);
        disk.written(write);
        let zeroes = disk.write(0, 1, None);
        assert!(reads(&mut disk, 0, &[0; UNIT]).is_ok());
        disk.written(zeroes);
        assert!(reads(&mut disk, 0, &data).is_err());
    }
}
