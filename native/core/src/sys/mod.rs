//! The kernel's interfaces, made safe: descriptors, eventfds, io_uring, SIGBUS.
pub mod sigbus;
