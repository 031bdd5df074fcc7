//! The virtio disk: on the device's side what a request asks for, and its way to storage and back; on the
//! driver's side requests made in shared memory.

mod client;
mod flush;
mod request;
mod serve;

pub use client::{Answer, ClientLayout, ClientQueue, ClientRequest, Piece};
pub use request::{parse, Limits, Parsed, Range, Request, RequestType, SECTOR};
pub use serve::{BlkServe, BlkShared};
