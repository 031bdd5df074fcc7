//! The core of `vhostuser`: guest memory, rings, queue workers, storage engines. No Python here.
#![deny(unsafe_code)]

#[macro_use]
mod step;

pub mod blk;
pub mod chains;
pub mod disk;
pub mod load;
pub mod memory;
pub mod ring;
pub mod sys;
pub mod worker;
