//! Waiting for descriptors with `ppoll`: the wait point of every engine that has no io_uring.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use super::fd::require_pollable;

/// The descriptors one thread waits for, each under a token.
#[derive(Debug, Default)]
pub struct PollSet {
    entries: Vec<libc::pollfd>,
    /// Beside `entries`; `None` only ends a wait and is not reported.
    tokens: Vec<Option<u32>>,
}

impl PollSet {
    /// Reports `token` from `wait` whenever `fd` is readable, has an error or is hung up. Fails with `EEXIST`
    /// for a token in use, `EBADF` or `EPERM` for a descriptor that cannot be waited for. `None` is
    /// the owner's own descriptor: it ends a wait without a report.
    pub fn watch(&mut self, fd: RawFd, token: Option<u32>) -> io::Result<()> {
        if self.tokens.contains(&token) {
            return Err(io::Error::from_raw_os_error(libc::EEXIST));
        }
        require_pollable(fd)?;
        self.entries.push(libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
        self.tokens.push(token);
        Ok(())
    }

    /// Forgets `token`; one that is not watched is no error.
    pub fn unwatch(&mut self, token: u32) {
        if let Some(at) = self.tokens.iter().position(|&other| other == Some(token)) {
            self.entries.swap_remove(at);
            self.tokens.swap_remove(at);
        }
    }

    /// Blocks until a watched descriptor is readable or `timeout` has passed; appends the tokens to `ready`.
    pub fn wait(&mut self, timeout: Option<Duration>, ready: &mut Vec<u32>) -> io::Result<()> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            match ppoll(&mut self.entries, remaining(deadline)) {
                Ok(0) => return Ok(()),
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        for (entry, token) in self.entries.iter().zip(&self.tokens) {
            if entry.revents != 0 {
                ready.extend(token);
            }
        }
        Ok(())
    }
}

/// The time left until `deadline`; `None` means for ever.
pub(crate) fn remaining(deadline: Option<Instant>) -> Option<Duration> {
    deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()))
}

/// `ppoll` with the signal mask as it is: how many entries have something to tell.
pub(crate) fn ppoll(entries: &mut [libc::pollfd], timeout: Option<Duration>) -> io::Result<usize> {
    let spec = timeout.map(|timeout| libc::timespec {
        tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    });
    let spec = spec.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the entries and the time are valid for the call.
    let count = unsafe { libc::ppoll(entries.as_mut_ptr(), entries.len() as libc::nfds_t, spec, std::ptr::null()) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;
    use crate::sys::eventfd::EventFd;

    #[test]
    fn a_readable_descriptor_is_reported_until_drained_or_forgotten() {
        let (a, b) = (EventFd::new().unwrap(), EventFd::new().unwrap());
        let mut set = PollSet::default();
        set.watch(a.as_raw_fd(), Some(7)).unwrap();
        set.watch(b.as_raw_fd(), Some(8)).unwrap();
        assert_eq!(set.watch(b.as_raw_fd(), Some(8)).unwrap_err().raw_os_error(), Some(libc::EEXIST));
        let mut ready = Vec::new();
        set.wait(Some(Duration::ZERO), &mut ready).unwrap();
        assert!(ready.is_empty());
        a.signal();
        b.signal();
        for _ in 0..2 {
            ready.clear();
            set.wait(None, &mut ready).unwrap();
            assert_eq!(ready, [7, 8]);
        }
        a.drain();
        ready.clear();
        set.wait(None, &mut ready).unwrap();
        assert_eq!(ready, [8]);
        set.unwatch(8);
        ready.clear();
        set.wait(Some(Duration::from_millis(1)), &mut ready).unwrap();
        assert!(ready.is_empty());
    }

    #[test]
    fn what_cannot_be_waited_for_is_refused() {
        let mut set = PollSet::default();
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        assert_eq!(set.watch(file.as_raw_fd(), Some(1)).unwrap_err().raw_os_error(), Some(libc::EPERM));
        assert_eq!(set.watch(-1, Some(1)).unwrap_err().raw_os_error(), Some(libc::EBADF));
    }
}
