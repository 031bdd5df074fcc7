//! The virtio disk on the device's side: what a request asks for, and its way to storage and back.

mod request;
mod serve;

pub use request::{parse, Limits, Parsed, Range, Request, RequestType, SECTOR};
pub use serve::{BlkServe, BlkShared};
