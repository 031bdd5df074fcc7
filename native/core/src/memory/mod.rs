//! Guest memory: mapping it, finding bytes in it, reading and writing them while the guest does so too.
#![allow(unsafe_code)]

mod iovec;

pub use iovec::IoVec;

/// An immutable table of mapped regions.
#[derive(Debug)]
pub struct GuestMemory {}
