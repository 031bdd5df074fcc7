//! A load on a disk from the driver's side: many requests, timed and, if wanted, verified. It describes itself in numbers
//! and decides nothing about them.

mod histogram;
mod pattern;
mod run;

pub use histogram::Histogram;
pub use run::{run, LoadError, LoadResult, LoadSpec, Place};
