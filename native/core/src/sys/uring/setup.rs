//! Making a ring, as well as this kernel can.

use std::io;

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

/// A ring of the first kind in `postings` that the kernel makes.
pub(super) fn build(entries: u32, completions: u32, postings: &[Posting]) -> io::Result<IoUring> {
    let mut refusal = io::Error::from_raw_os_error(libc::EINVAL);
    for posting in postings {
        let mut builder = IoUring::builder();
        builder.setup_clamp().setup_cqsize(completions);
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

/// Whether io_uring works here, with all it takes. Otherwise the reason: `ENOSYS`, `EPERM`, `EACCES` where it is
/// switched off or filtered, `EOPNOTSUPP` for a kernel that lacks an operation.
pub fn probe() -> io::Result<()> {
    let mut ring = build(8, 16, &POSTINGS)?;
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let needed = [
        opcode::Read::CODE,
        opcode::Readv::CODE,
        opcode::Write::CODE,
        opcode::Writev::CODE,
        opcode::Fsync::CODE,
        opcode::Fallocate::CODE,
        opcode::PollAdd::CODE,
        opcode::PollRemove::CODE,
    ];
    if !needed.iter().all(|&code| probe.is_supported(code)) {
        return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
    }
    // A filter may allow the set-up and refuse the use.
    // SAFETY: the entry names no memory.
    if unsafe { ring.submission().push(&opcode::Nop::new().build()) }.is_err() {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    loop {
        match ring.submit_and_wait(1) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result.map(drop),
        }
    }
}
