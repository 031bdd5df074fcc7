//! The virtio disk: on the device's side what a request asks for, and its way to storage and back; on the
//! driver's side requests made in shared memory.

mod client;
mod flush;
mod kept;
mod operator;
mod policy;
mod rate;
mod request;
mod serve;
mod shared;

pub use client::{Answer, ClientLayout, ClientQueue, ClientRequest, Piece};
pub use operator::Decision;
pub use policy::{Action, ErrorPolicy};
pub use request::{parse, Limits, Parsed, Range, Request, RequestType, SECTOR};
pub use serve::BlkServe;
pub use shared::BlkShared;
