//! Threads of our own: named, and deaf to every signal but SIGBUS, and SIGURG, which only interrupts.
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::os::unix::thread::JoinHandleExt;
use std::sync::Once;
use std::thread::{Builder, JoinHandle};

/// Starts a thread that blocks every signal but SIGBUS and SIGURG, so that no handler of the host program runs on it
/// but one for those.
///
/// The kernel shows the first 15 bytes of `name`. Fails when the system has no room for another thread.
pub fn spawn<F, T>(name: &str, body: F) -> io::Result<JoinHandle<T>>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    make_interrupting();
    // The mask is inherited: set around the start, there is no moment in which the new thread hears a signal.
    let before = block_signals()?;
    let thread = Builder::new().name(name.to_owned()).spawn(body);
    // SAFETY: a mask that this thread had.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut()) };
    thread
}

/// Makes a system call fail with `EINTR` in which `thread` sleeps; a thread that does not sleep goes on. For one that may
/// sleep on a descriptor which another process has too: nothing else ends such a sleep.
pub fn interrupt<T>(thread: &JoinHandle<T>) {
    // SAFETY: a thread that was not joined; SIGURG has a handler since `spawn`, and is ignored without one.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGURG) };
}

/// How often this thread has slept of its own will: waited for anything, and was not merely kept from running.
pub fn times_slept() -> u64 {
    // SAFETY: all-zero is a valid `rusage`; the kernel fills it.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: a place to write to.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &mut usage) };
    usage.ru_nvcsw as u64
}

extern "C" fn do_nothing(_: libc::c_int) {}

/// Gives SIGURG a handler, unless the host program has one: a signal without does not interrupt.
fn make_interrupting() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: all-zero is a valid `sigaction`: no flag, so calls are not restarted, and no signal is masked.
        let (mut new, mut old): (libc::sigaction, libc::sigaction) = unsafe { std::mem::zeroed() };
        new.sa_sigaction = do_nothing as *const () as usize;
        // SAFETY: valid pointers; a null action only asks.
        let asked = unsafe { libc::sigaction(libc::SIGURG, std::ptr::null(), &mut old) };
        if asked == 0 && matches!(old.sa_sigaction, libc::SIG_DFL | libc::SIG_IGN) {
            // SAFETY: valid pointers, and a handler that does nothing.
            unsafe { libc::sigaction(libc::SIGURG, &new, std::ptr::null_mut()) };
        }
    });
}

/// Blocks every signal but SIGBUS and SIGURG in this thread and returns the mask before.
fn block_signals() -> io::Result<libc::sigset_t> {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `sigfillset` initialises the set before it is changed and used; `before` is filled by the kernel.
    let result = unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::sigdelset(all.as_mut_ptr(), libc::SIGBUS);
        libc::sigdelset(all.as_mut_ptr(), libc::SIGURG);
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
    use std::os::fd::AsRawFd;
    use std::time::{Duration, Instant};

    fn blocked() -> u64 {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
        u64::from_str_radix(mask.trim(), 16).unwrap()
    }

    #[test]
    fn a_thread_that_sleeps_on_a_descriptor_is_interrupted() {
        let (reader, writer) = std::io::pipe().unwrap();
        let thread = super::spawn("vhu-test", move || {
            let mut byte = 0_u8;
            // SAFETY: one byte, of a local.
            let result = unsafe { libc::read(reader.as_raw_fd(), (&raw mut byte).cast(), 1) };
            (result, std::io::Error::last_os_error().raw_os_error())
        })
        .unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        // The signal may come before the call: then it is sent again.
        while !thread.is_finished() && Instant::now() < deadline {
            super::interrupt(&thread);
            std::thread::yield_now();
        }
        drop(writer);
        assert_eq!(thread.join().unwrap(), (-1, Some(libc::EINTR)));
    }

    #[test]
    fn a_thread_hears_sigbus_and_sigurg_only_and_the_caller_is_left_alone() {
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
        assert_eq!(mask & (bit(libc::SIGBUS) | bit(libc::SIGURG)), 0);
    }
}
