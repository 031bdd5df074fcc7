//! Threads of our own: named, and deaf to every signal but SIGBUS.
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::thread::{Builder, JoinHandle};

/// Starts a thread that blocks every signal but SIGBUS, so that no handler of the host program runs on it.
///
/// The kernel shows the first 15 bytes of `name`. Fails when the system has no room for another thread.
pub fn spawn<F, T>(name: &str, body: F) -> io::Result<JoinHandle<T>>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    // The mask is inherited: set around the start, there is no moment in which the new thread hears a signal.
    let before = block_signals()?;
    let thread = Builder::new().name(name.to_owned()).spawn(body);
    // SAFETY: a mask that this thread had.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut()) };
    thread
}

/// Blocks every signal but SIGBUS in this thread and returns the mask before.
fn block_signals() -> io::Result<libc::sigset_t> {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `sigfillset` initialises the set before it is changed and used; `before` is filled by the kernel.
    let result = unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::sigdelset(all.as_mut_ptr(), libc::SIGBUS);
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr())
    };
    if result != 0 {
        return Err(io::Error::from_raw_os_error(result));
    }
    // SAFETY: filled, since the call succeeded.
    Ok(unsafe { before.assume_init() })
}

#[cfg(test)]
mod tests {
    fn blocked() -> u64 {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
        u64::from_str_radix(mask.trim(), 16).unwrap()
    }

    #[test]
    fn a_thread_hears_sigbus_only_and_the_caller_is_left_alone() {
        let before = blocked();
        let (mask, name) =
            super::spawn("vhu-test", || (blocked(), std::fs::read_to_string("/proc/thread-self/comm").unwrap()))
                .unwrap()
                .join()
                .unwrap();
        assert_eq!(blocked(), before);
        assert_eq!(name.trim(), "vhu-test");
        let bit = |signal: i32| 1_u64 << (signal - 1);
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGPIPE, libc::SIGUSR1, libc::SIGALRM] {
            assert_ne!(mask & bit(signal), 0, "signal {signal}");
        }
        assert_eq!(mask & bit(libc::SIGBUS), 0);
    }
}
