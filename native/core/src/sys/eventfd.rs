//! Eventfds: our own, and the kick and call descriptors that a peer hands over.
//!
//! A peer's descriptor may be an eventfd, a pipe or a socket, blocking or not, and the peer may read
//! and write it too. Its file status flags are shared with the peer and left alone; the functions
//! here do not block whatever they are.
#![allow(unsafe_code)]

use std::io;
use std::mem::{size_of_val, MaybeUninit};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use super::fd::{check, stat};
use super::poll::{ppoll, remaining};

/// A descriptor of our own that one thread signals and another waits for. Never blocks.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// A fresh one, not signalled, closed on exec.
    pub fn new() -> io::Result<Self> {
        // SAFETY: makes a descriptor, or fails.
        let fd = check(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
        // SAFETY: just made, and nobody else's.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Makes it readable. From any thread.
    pub fn signal(&self) {
        // It can only fail when the counter is full, and then it is readable already.
        let _ = write_one(self.0.as_raw_fd());
    }

    /// Makes it unreadable; true when it was readable.
    pub fn drain(&self) -> bool {
        let mut counter = 0_u64;
        // SAFETY: eight bytes, into a local.
        let count = unsafe { libc::read(self.0.as_raw_fd(), (&raw mut counter).cast(), 8) };
        count == 8
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// What a notification descriptor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FdKind {
    /// An eventfd: counts.
    EventFd,
    /// A pipe or FIFO, either end.
    Pipe,
    /// A socket of any family.
    Socket,
    /// Anything else: a file, a device, a timer.
    Other,
}

/// Finds out what `fd` is. Fails with `EBADF` when it is not open.
pub fn classify(fd: BorrowedFd<'_>) -> io::Result<FdKind> {
    let raw = fd.as_raw_fd();
    match stat(raw)?.st_mode & libc::S_IFMT {
        libc::S_IFIFO => return Ok(FdKind::Pipe),
        libc::S_IFSOCK => return Ok(FdKind::Socket),
        0 => {}
        _ => return Ok(FdKind::Other),
    }
    // An anonymous inode has no file type of its own; only its name tells.
    let name = std::fs::read_link(format!("/proc/self/fd/{raw}"))?;
    Ok(if name.as_os_str() == "anon_inode:[eventfd]" { FdKind::EventFd } else { FdKind::Other })
}

/// Waits until `fd` is readable, has an error or is hung up; false when `timeout` passed first. `None` waits for ever.
pub fn poll_readable(fd: BorrowedFd<'_>, timeout: Option<Duration>) -> io::Result<bool> {
    poll_one(fd, libc::POLLIN, timeout)
}

/// Signals a peer's descriptor: adds 1 to an eventfd, puts 8 bytes into anything else. Returns whether it took it.
///
/// Never blocks: a full one is left as it is, since its reader has been told already. Errors that are not about
/// room (a pipe without reader: `EPIPE`) are reported. SIGPIPE is the caller's: our threads block it, Python ignores it.
pub fn signal(fd: BorrowedFd<'_>) -> io::Result<bool> {
    if !poll_one(fd, libc::POLLOUT, Some(Duration::ZERO))? {
        return Ok(false);
    }
    told(write_one(fd.as_raw_fd()))
}

fn told(written: io::Result<()>) -> io::Result<bool> {
    match written {
        Ok(()) => Ok(true),
        Err(error) if would_block(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// A peer's descriptor that is signalled often.
#[derive(Debug)]
pub struct PeerEvent {
    fd: OwnedFd,
    /// It was made so that writing never waits. Its peer can still change that: a write may then wait for as long as it
    /// likes, or until `thread::interrupt`.
    nonblocking: bool,
}

impl PeerEvent {
    /// Takes a descriptor that `signal` would do for.
    pub fn new(fd: OwnedFd) -> Self {
        // SAFETY: asks for flags.
        let flags = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) });
        Self { nonblocking: flags.is_ok_and(|flags| flags & libc::O_NONBLOCK != 0), fd }
    }

    /// `signal`, in one system call where one will do. Every microsecond counts: a driver that is told before it has fallen
    /// asleep need not be woken.
    pub fn signal(&self) -> io::Result<bool> {
        if self.nonblocking {
            return told(write_one(self.fd.as_raw_fd()));
        }
        signal(self.fd.as_fd())
    }
}

/// Empties a peer's descriptor of what has come; false when nothing had. Never blocks.
///
/// An eventfd is reset, of a pipe or socket up to 4096 bytes are thrown away: one with more stays readable.
pub fn drain(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut bytes = MaybeUninit::<[u8; 4096]>::uninit();
    let run = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: size_of_val(&bytes) };
    // An offset of -1 means no offset; RWF_NOWAIT makes even a blocking eventfd answer at once.
    // SAFETY: the run is a local array, as long as it says.
    let count = unsafe { libc::preadv2(fd.as_raw_fd(), &run, 1, -1, libc::RWF_NOWAIT) };
    if count >= 0 {
        return Ok(count > 0);
    }
    let error = io::Error::last_os_error();
    if would_block(&error) {
        return Ok(false);
    }
    if !matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL)) {
        return Err(error);
    }
    // Pipes before Linux 6.4 and sockets of some families do not know RWF_NOWAIT.
    if !poll_one(fd, libc::POLLIN, Some(Duration::ZERO))? {
        return Ok(false);
    }
    // SAFETY: as above.
    let count = unsafe { libc::read(fd.as_raw_fd(), bytes.as_mut_ptr().cast(), size_of_val(&bytes)) };
    if count >= 0 {
        return Ok(count > 0);
    }
    let error = io::Error::last_os_error();
    if would_block(&error) {
        return Ok(false);
    }
    Err(error)
}

fn would_block(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

fn write_one(fd: RawFd) -> io::Result<()> {
    let one = 1_u64;
    // SAFETY: eight bytes, of a local.
    let count = unsafe { libc::write(fd, (&raw const one).cast(), 8) };
    if count < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn poll_one(fd: BorrowedFd<'_>, events: libc::c_short, timeout: Option<Duration>) -> io::Result<bool> {
    let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    let mut entries = [libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 }];
    loop {
        match ppoll(&mut entries, remaining(deadline)) {
            Ok(_) if entries[0].revents & libc::POLLNVAL != 0 => return Err(io::Error::from_raw_os_error(libc::EBADF)),
            Ok(count) => return Ok(count > 0),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn blocking_eventfd(initial: u32) -> OwnedFd {
        // SAFETY: makes a descriptor, or fails.
        let fd = check(unsafe { libc::eventfd(initial, libc::EFD_CLOEXEC) }).unwrap();
        // SAFETY: just made, and nobody else's.
        unsafe { OwnedFd::from_raw_fd(fd) }
    }

    #[test]
    fn a_signal_is_seen_once() {
        let event = EventFd::new().unwrap();
        assert!(!event.drain());
        event.signal();
        event.signal();
        assert!(poll_readable(event.as_fd(), None).unwrap());
        assert!(event.drain());
        assert!(!event.drain());
        assert!(!poll_readable(event.as_fd(), Some(Duration::from_millis(1))).unwrap());
    }

    #[test]
    fn descriptors_are_told_apart() {
        let (reader, writer) = std::io::pipe().unwrap();
        let (socket, _other) = UnixStream::pair().unwrap();
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(classify(EventFd::new().unwrap().as_fd()).unwrap(), FdKind::EventFd);
        assert_eq!(classify(reader.as_fd()).unwrap(), FdKind::Pipe);
        assert_eq!(classify(writer.as_fd()).unwrap(), FdKind::Pipe);
        assert_eq!(classify(socket.as_fd()).unwrap(), FdKind::Socket);
        assert_eq!(classify(file.as_fd()).unwrap(), FdKind::Other);
        assert_eq!(classify(null.as_fd()).unwrap(), FdKind::Other);
    }

    #[test]
    fn a_blocking_eventfd_blocks_neither_signal_nor_drain() {
        let event = blocking_eventfd(0);
        assert!(!drain(event.as_fd()).unwrap());
        assert!(signal(event.as_fd()).unwrap());
        assert!(drain(event.as_fd()).unwrap());
        assert!(!drain(event.as_fd()).unwrap());
        let full = u64::MAX - 1;
        // SAFETY: eight bytes, of a local.
        assert_eq!(unsafe { libc::write(event.as_raw_fd(), (&raw const full).cast(), 8) }, 8);
        assert!(!signal(event.as_fd()).unwrap(), "a full eventfd takes nothing");
        assert!(drain(event.as_fd()).unwrap());
    }

    #[test]
    fn a_peer_event_is_signalled_whatever_it_is_and_full_is_told() {
        let one = EventFd::new().unwrap().0;
        for fd in [one, blocking_eventfd(0)] {
            let event = PeerEvent::new(fd.try_clone().unwrap());
            assert!(event.signal().unwrap());
            assert!(drain(fd.as_fd()).unwrap());
            let full = u64::MAX - 1;
            // SAFETY: eight bytes, of a local.
            assert_eq!(unsafe { libc::write(fd.as_raw_fd(), (&raw const full).cast(), 8) }, 8);
            assert!(!event.signal().unwrap());
        }
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        assert!(PeerEvent::new(writer.into()).signal().is_err());
    }

    #[test]
    fn a_full_pipe_does_not_block_a_signal() {
        let (reader, writer) = std::io::pipe().unwrap();
        let mut sent = 0;
        while signal(writer.as_fd()).unwrap() {
            sent += 1;
        }
        assert!(sent > 1);
        while poll_readable(reader.as_fd(), Some(Duration::ZERO)).unwrap() {
            assert!(drain(reader.as_fd()).unwrap());
        }
        assert!(!drain(reader.as_fd()).unwrap());
        assert!(signal(writer.as_fd()).unwrap());
    }

    #[test]
    fn a_blocking_socket_is_drained_without_blocking() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        assert!(!drain(ours.as_fd()).unwrap());
        theirs.write_all(&[1; 100]).unwrap();
        assert!(drain(ours.as_fd()).unwrap());
        assert!(!drain(ours.as_fd()).unwrap());
        assert!(signal(ours.as_fd()).unwrap());
        assert!(drain(theirs.as_fd()).unwrap());
    }
}
