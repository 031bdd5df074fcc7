//! A file that is taken away while it is mapped must cost only who uses it.
//!
//! Touching a page beyond the end of a mapped file raises SIGBUS, and so does one that cannot be read, or for which there
//! is no room. The handler looks the address up in a table of our mappings; a hit marks the mapping poisoned, puts zero
//! pages in the place of all of it or of a piece, and lets the access go on. Anything else goes to the handler that was
//! there before. The handler reads atomics and makes one system call: it takes no lock and allocates nothing.
#![allow(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, Once, OnceLock};

/// Mappings that one process can have: sixteen devices with 509 regions of a peer's memory each, and their images.
const SLOTS: usize = 8192;

#[derive(Debug)]
struct Slot {
    base: AtomicUsize,
    len: AtomicUsize,
    /// Bytes that are replaced at once, a part of `len`.
    piece: AtomicUsize,
    poisoned: AtomicBool,
}

impl Slot {
    const fn new() -> Self {
        Self {
            base: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            piece: AtomicUsize::new(0),
            poisoned: AtomicBool::new(false),
        }
    }
}

static TABLE: [Slot; SLOTS] = [const { Slot::new() }; SLOTS];
/// Slots from here on were never used.
static TOP: AtomicUsize = AtomicUsize::new(0);
static FREE: Mutex<Vec<usize>> = Mutex::new(Vec::new());
/// Counts poisonings, so that a worker can look with one load whether anything happened.
static POISONINGS: AtomicU64 = AtomicU64::new(0);
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

/// How many mappings were poisoned so far in this process.
#[inline]
pub fn poisonings() -> u64 {
    POISONINGS.load(Ordering::Acquire)
}

/// A mapping's place in the table.
#[derive(Debug)]
pub struct Registration(usize);

impl Registration {
    /// Enters `len` bytes at `base`, both whole pages; installs the handler the first time.
    ///
    /// `piece`: how many bytes around the missing one are replaced, `len` or a number of pages that it is a multiple of. All
    /// of a mapping that is of no use any more; a small part of one that is so long that its replacement could fail.
    pub fn new(base: usize, len: usize, piece: usize) -> io::Result<Self> {
        install()?;
        let mut free = FREE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let slot = match free.pop() {
            Some(slot) => slot,
            None if TOP.load(Ordering::Relaxed) < SLOTS => TOP.fetch_add(1, Ordering::AcqRel),
            None => return Err(io::Error::other("too many memory regions in one process")),
        };
        TABLE[slot].poisoned.store(false, Ordering::Relaxed);
        TABLE[slot].len.store(len, Ordering::Relaxed);
        TABLE[slot].piece.store(piece, Ordering::Relaxed);
        TABLE[slot].base.store(base, Ordering::Release);
        Ok(Self(slot))
    }

    /// Whether the pages were replaced.
    pub fn poisoned(&self) -> &AtomicBool {
        &TABLE[self.0].poisoned
    }

    /// Replaces the first piece, as the handler would: all pages of a mapping in one piece.
    pub fn poison(&self) {
        let slot = &TABLE[self.0];
        poison(slot, slot.base.load(Ordering::Acquire));
    }

    /// Takes the mapping out of the table, before it is unmapped. Done once, by its owner.
    pub fn release(&self) {
        TABLE[self.0].base.store(0, Ordering::Release);
        FREE.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(self.0);
    }
}

/// Puts zero pages where `address` is. False when the system has none.
fn poison(slot: &Slot, address: usize) -> bool {
    let (base, len) = (slot.base.load(Ordering::Acquire), slot.len.load(Ordering::Relaxed));
    let piece = slot.piece.load(Ordering::Relaxed);
    let first = !slot.poisoned.swap(true, Ordering::AcqRel);
    // Of a mapping in one piece only the first one replaces the pages: a second replacement would wipe what was written
    // since. A thread that faults meanwhile faults again until the pages are there. Otherwise nobody cares for what is
    // written once the mapping is poisoned.
    if !first && piece == len {
        return true;
    }
    let at = address - (address - base) % piece;
    // SAFETY: replaces pages of a registered mapping only, which its owner keeps until `release`.
    let replaced = unsafe {
        libc::mmap(
            at as *mut libc::c_void,
            piece,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if first {
        POISONINGS.fetch_add(1, Ordering::AcqRel);
    }
    replaced != libc::MAP_FAILED
}

fn install() -> io::Result<()> {
    static ONCE: Once = Once::new();
    static FAILED: AtomicBool = AtomicBool::new(false);
    ONCE.call_once(|| {
        // SAFETY: all-zero is a valid `sigaction`.
        let (mut new, mut old): (libc::sigaction, libc::sigaction) = unsafe { std::mem::zeroed() };
        new.sa_sigaction = on_sigbus as *const () as usize;
        new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        // The previous handler is read first, so that it is known before ours can run.
        // SAFETY: valid pointers; a null action only asks.
        let asked = unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut old) };
        let _ = PREVIOUS.set(old);
        // SAFETY: the handler keeps to what a signal handler may do.
        let done = unsafe { libc::sigaction(libc::SIGBUS, &new, std::ptr::null_mut()) };
        FAILED.store(asked != 0 || done != 0, Ordering::Release);
    });
    if FAILED.load(Ordering::Acquire) {
        return Err(io::Error::other("the SIGBUS handler cannot be installed"));
    }
    Ok(())
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler; errno is this thread's.
    let (address, errno) = unsafe { ((*info).si_addr() as usize, *libc::__errno_location()) };
    let mut hit = false;
    for slot in &TABLE[..TOP.load(Ordering::Acquire).min(SLOTS)] {
        let base = slot.base.load(Ordering::Acquire);
        if base != 0 && address.wrapping_sub(base) < slot.len.load(Ordering::Relaxed) {
            hit = poison(slot, address);
            break;
        }
    }
    if !hit {
        hand_on(signal, info, context);
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// A fault that is not ours: the handler before us decides, or the process dies as it would have.
fn hand_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let Some(previous) = PREVIOUS.get() else { return };
    match previous.sa_sigaction {
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: back to the default; returning repeats the access, which then ends the process.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        handler if previous.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: installed by somebody as a three-argument handler.
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                unsafe { std::mem::transmute(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: installed by somebody as a one-argument handler.
            let handler: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(handler) };
            handler(signal);
        }
    }
}
