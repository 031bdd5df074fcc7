//! Making a ring, as well as this kernel can, that does nothing but what storage and waiting need.

use std::io;

use io_uring::register::Restriction;
use io_uring::squeue::Flags;
use io_uring::{opcode, IoUring, Probe};

/// How completions get from the kernel to us, best first.
#[derive(Clone, Copy, Debug)]
pub(super) enum Posting {
    /// Linux 6.1: when this thread asks, and a flag says when there are any.
    Deferred,
    /// Linux 5.19: without interrupts, and likewise.
    Cooperative,
    /// At any time.
    Interrupting,
}

pub(super) const POSTINGS: [Posting; 3] = [Posting::Deferred, Posting::Cooperative, Posting::Interrupting];

/// All that a ring is ever asked for. The kernel refuses everything else with `EACCES`, for good: a filter of system
/// calls does not see what goes through a ring.
pub(super) const OPERATIONS: [u8; 8] = [
    opcode::Read::CODE,
    opcode::Readv::CODE,
    opcode::Write::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::PollAdd::CODE,
    opcode::PollRemove::CODE,
];

/// A ring of the first kind in `postings` that the kernel makes, restricted to `OPERATIONS` and used by this thread.
pub(super) fn build(entries: u32, completions: u32, postings: &[Posting]) -> io::Result<IoUring> {
    let ring = make(entries, completions, postings)?;
    restrict(&ring)?;
    Ok(ring)
}

/// A ring that takes nothing yet.
fn make(entries: u32, completions: u32, postings: &[Posting]) -> io::Result<IoUring> {
    let mut refusal = io::Error::from_raw_os_error(libc::EINVAL);
    for posting in postings {
        let mut builder = IoUring::builder();
        builder.setup_clamp().setup_cqsize(completions).setup_r_disabled();
        match posting {
            Posting::Deferred => {
                builder.setup_submit_all().setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag()
            }
            Posting::Cooperative => builder.setup_submit_all().setup_coop_taskrun().setup_taskrun_flag(),
            Posting::Interrupting => &mut builder,
        };
        match builder.build(entries) {
            Ok(ring) if ring.params().is_feature_ext_arg() && ring.params().is_feature_nodrop() => return Ok(ring),
            Ok(_) => return Err(io::Error::from_raw_os_error(libc::ENOSYS)),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => refusal = error,
            Err(error) => return Err(error),
        }
    }
    Err(refusal)
}

/// Restricts a ring for good, and switches it on for the calling thread. Registering is over with that, too.
fn restrict(ring: &IoUring) -> io::Result<()> {
    let flags = Restriction::sqe_flags_allowed(Flags::ASYNC.bits());
    let mut allowed: Vec<_> = OPERATIONS.into_iter().map(Restriction::sqe_op).chain([flags]).collect();
    ring.submitter().register_restrictions(&mut allowed)?;
    ring.submitter().register_enable_rings()
}

/// Whether io_uring works here, with all it takes. Otherwise the reason: `ENOSYS`, `EPERM`, `EACCES` where it is
/// switched off or filtered, `EOPNOTSUPP` for a kernel that lacks an operation or does not restrict.
pub fn probe() -> io::Result<()> {
    let mut ring = make(8, 16, &POSTINGS)?;
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    if !OPERATIONS.iter().all(|&code| probe.is_supported(code)) {
        return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
    }
    restrict(&ring)?;
    // A filter may allow the set-up and refuse the use. What is asked for here is not in the list.
    // SAFETY: the entry names no memory.
    if unsafe { ring.submission().push(&opcode::Nop::new().build()) }.is_err() {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    loop {
        match ring.submit_and_wait(1) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
            Ok(_) => break,
        }
    }
    let refused = ring.completion().next().is_some_and(|entry| entry.result() == -libc::EACCES);
    if !refused {
        return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
    }
    Ok(())
}
