//! The kernel's interfaces, made safe: descriptors, eventfds, io_uring, SIGBUS.
pub mod anon;
pub mod eventfd;
pub mod fd;
pub mod poll;
pub mod sigbus;
pub mod thread;
