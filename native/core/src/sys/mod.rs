//! The kernel's interfaces, made safe: descriptors, eventfds, io_uring, SIGBUS.
pub mod anon;
pub mod buffer;
pub mod eventfd;
pub mod fd;
pub mod file_map;
pub mod memfd;
pub mod poll;
#[cfg(feature = "steps")]
pub mod process;
pub mod sandbox;
pub mod sigbus;
pub mod storage;
pub mod sync;
pub mod thread;
pub mod uring;
