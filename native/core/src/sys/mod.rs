//! The kernel's interfaces, made safe: descriptors, eventfds, io_uring, SIGBUS.
pub mod anon;
pub mod buffer;
pub mod eventfd;
pub mod fd;
pub mod memfd;
pub mod poll;
pub mod sigbus;
pub mod storage;
pub mod thread;
pub mod uring;
