//! What both processes agree on: the rings, their memory, the storage. Travels as arguments of the command line. Pure.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::str::FromStr;
use std::time::Duration;

use vhostuser_core::blk::ClientLayout;
use vhostuser_core::ring::feature;

/// Where the driver's memory begins, as guest and as user address.
pub(crate) const BASE: u64 = 0x4000_0000;
/// Data segments a request may have.
pub(crate) const SEG_MAX: u16 = 4;
/// Bytes of data one request may have.
pub(crate) const DATA: usize = 4096;
/// Sectors of the disk, and units of the model.
pub(crate) const SECTORS: usize = 256;
/// VIRTIO_BLK_F_WRITE_ZEROES.
const WRITE_ZEROES: u64 = 1 << 14;

/// The storage of the back-end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Storage {
    /// A file by io_uring.
    IoUring,
    /// A file by io_uring, around the page cache.
    Direct,
    /// A file by plain system calls.
    Syscalls,
    /// A file by io_uring, but by the worker itself where that does not wait.
    Inline,
    /// Likewise, and by copies without system calls from the first request on, if the file is in memory.
    Mapped,
}

impl Display for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::IoUring => "io_uring",
            Self::Direct => "direct",
            Self::Syscalls => "syscalls",
            Self::Inline => "inline",
            Self::Mapped => "mapped",
        })
    }
}

impl FromStr for Storage {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::IoUring, Self::Direct, Self::Syscalls, Self::Inline, Self::Mapped]
            .into_iter()
            .find(|storage| storage.to_string() == text)
            .ok_or_else(|| format!("there is no storage {text}"))
    }
}

/// The rings and the storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// How many rings; each has a worker of its own.
    pub(crate) queues: u16,
    /// Descriptors of each.
    pub(crate) size: u16,
    /// Their first index.
    pub(crate) first: u16,
    /// Indirect tables.
    pub(crate) indirect: bool,
    /// Event indices.
    pub(crate) event_idx: bool,
    /// The storage.
    pub(crate) storage: Storage,
    /// How long each operation is held, about: what is held longer than another one ends after it.
    pub(crate) delay: Duration,
}

impl Shape {
    /// The features of the rings.
    pub(crate) fn features(&self) -> u64 {
        let mut features = feature::VERSION_1 | WRITE_ZEROES;
        if self.indirect {
            features |= feature::INDIRECT_DESC;
        }
        if self.event_idx {
            features |= feature::EVENT_IDX;
        }
        features
    }

    /// Where ring `index` lies in the driver's memory.
    pub(crate) fn layout(&self, index: u16) -> ClientLayout {
        let one = ClientLayout { size: self.size, seg_max: SEG_MAX, offset: 0 };
        ClientLayout { offset: one.len() * usize::from(index), ..one }
    }

    /// Where the data of request `slot` of ring `index` lies.
    pub(crate) fn data(&self, index: u16, slot: u16) -> usize {
        let rings = self.layout(self.queues).offset;
        rings + DATA * (usize::from(index) * usize::from(self.size) + usize::from(slot))
    }

    /// Bytes of the driver's memory.
    pub(crate) fn len(&self) -> usize {
        self.data(self.queues, 0)
    }

    /// As words of a command line.
    pub(crate) fn words(&self) -> Vec<String> {
        vec![
            format!("queues={}", self.queues),
            format!("size={}", self.size),
            format!("first={}", self.first),
            format!("indirect={}", u8::from(self.indirect)),
            format!("event_idx={}", u8::from(self.event_idx)),
            format!("storage={}", self.storage),
            format!("delay_us={}", self.delay.as_micros()),
        ]
    }

    /// Back from words.
    pub(crate) fn of(words: &Words) -> Result<Self, String> {
        Ok(Self {
            queues: words.get("queues")?,
            size: words.get("size")?,
            first: words.get("first")?,
            indirect: words.get::<u8>("indirect")? != 0,
            event_idx: words.get::<u8>("event_idx")? != 0,
            storage: words.get("storage")?,
            delay: Duration::from_micros(words.get("delay_us")?),
        })
    }
}

/// The `name=value` words of a command line.
#[derive(Clone, Debug, Default)]
pub(crate) struct Words(BTreeMap<String, String>);

impl Words {
    /// Splits `words`. Fails with a sentence about one that is none.
    pub(crate) fn of(words: impl Iterator<Item = String>) -> Result<Self, String> {
        let split = |word: String| match word.split_once('=') {
            Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
            None => Err(format!("{word:?} is not name=value")),
        };
        Ok(Self(words.map(split).collect::<Result<_, _>>()?))
    }

    /// The value of `name`.
    pub(crate) fn get<T: FromStr>(&self, name: &str) -> Result<T, String> {
        let text = self.0.get(name).ok_or_else(|| format!("{name}=... is missing"))?;
        text.parse().map_err(|_| format!("{name}={text} makes no sense"))
    }

    /// Whether there is a value of `name`.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// The value of `name`, or `default`.
    pub(crate) fn or<T: FromStr>(&self, name: &str, default: T) -> Result<T, String> {
        if self.has(name) {
            self.get(name)
        } else {
            Ok(default)
        }
    }

    /// A name that is not in `known`.
    pub(crate) fn unknown(&self, known: &[&str]) -> Option<&str> {
        self.0.keys().map(String::as_str).find(|name| !known.contains(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_comes_back_from_its_words() {
        let shape = Shape {
            queues: 2,
            size: 64,
            first: 65530,
            indirect: true,
            event_idx: false,
            storage: Storage::Direct,
            delay: Duration::from_micros(500),
        };
        let words = Words::of(shape.words().into_iter()).unwrap();
        assert_eq!(Shape::of(&words), Ok(shape));
    }
}
