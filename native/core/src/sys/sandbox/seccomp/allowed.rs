//! The list: what Python and our threads call while a disk is served.

use libc::c_long;

/// What an argument has to be. Arguments count from 0.
#[derive(Clone, Copy, Debug)]
pub(super) enum Condition {
    /// Its low 32 bits are one of these: all the kernel looks at of a command.
    OneOf(u32, &'static [u32]),
    /// Its low 32 bits have none of these bits.
    Without(u32, u32),
    /// Its low 32 bits have one of these bits at least.
    With(u32, u32),
    /// All its 64 bits are 0: a null pointer.
    Null(u32),
    /// It names this process.
    OurProcess(u32),
}

use Condition::{Null, OneOf, OurProcess, With, Without};

/// Allowed whatever the arguments. The busiest come first, for kernels that go through the list.
pub(super) const ALWAYS: &[c_long] = &[
    libc::SYS_io_uring_enter,
    libc::SYS_write,
    libc::SYS_read,
    libc::SYS_futex,
    libc::SYS_preadv2,
    libc::SYS_ppoll,
    // Storage and peers' descriptors.
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_fallocate,
    libc::SYS_fadvise64,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    libc::SYS_readlinkat,
    libc::SYS_unlinkat,
    libc::SYS_eventfd2,
    libc::SYS_memfd_create,
    // Sockets that are there already: no `socket`, `socketpair`, `connect`, `bind`, `setsockopt`.
    libc::SYS_recvmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_accept4,
    libc::SYS_accept,
    libc::SYS_getsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_shutdown,
    // Waiting.
    libc::SYS_pselect6,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_setitimer,
    libc::SYS_getitimer,
    libc::SYS_restart_syscall,
    // Memory; `mmap` and `mprotect` have conditions.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_mincore,
    libc::SYS_brk,
    // Threads and signals of our own; `clone`, `kill` and `tgkill` have conditions.
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_membarrier,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // What tells about ourselves.
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getppid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getcwd,
    libc::SYS_getrusage,
    libc::SYS_times,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_getrandom,
];

/// Older calls for the same, which this architecture still has and its C library still makes.
#[cfg(target_arch = "x86_64")]
pub(super) const OLDER: &[c_long] = &[
    libc::SYS_poll,
    libc::SYS_select,
    libc::SYS_epoll_wait,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_readlink,
    libc::SYS_unlink,
    libc::SYS_dup2,
    libc::SYS_time,
    libc::SYS_alarm,
    libc::SYS_pause,
];
/// Older calls for the same: this architecture never had them.
#[cfg(not(target_arch = "x86_64"))]
pub(super) const OLDER: &[c_long] = &[];

/// Allowed when every condition holds.
pub(super) const SOMETIMES: &[(c_long, &[Condition])] = &[
    (libc::SYS_mmap, &[Without(2, libc::PROT_EXEC as u32)]),
    (libc::SYS_mprotect, &[Without(2, libc::PROT_EXEC as u32)]),
    (libc::SYS_clone, &[With(0, libc::CLONE_THREAD as u32), Without(0, NAMESPACES)]),
    (libc::SYS_kill, &[OurProcess(0)]),
    (libc::SYS_tgkill, &[OurProcess(0)]),
    (libc::SYS_fcntl, &[OneOf(1, FILE_COMMANDS)]),
    (libc::SYS_ioctl, &[OneOf(1, DEVICE_COMMANDS)]),
    (libc::SYS_prctl, &[OneOf(0, &[libc::PR_SET_NAME as u32, libc::PR_GET_NAME as u32, libc::PR_SET_VMA as u32])]),
    // Sending nowhere else than to the peer.
    (libc::SYS_sendto, &[Null(4)]),
    // The times of an open file, and of no other.
    (libc::SYS_utimensat, &[Null(1)]),
    // Asking for our own limits.
    (libc::SYS_prlimit64, &[OneOf(0, &[0]), Null(2)]),
];

/// `CLONE_NEW*`.
const NAMESPACES: u32 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u32;

/// None that has the kernel send signals for us.
const FILE_COMMANDS: &[u32] = &[
    libc::F_DUPFD as u32,
    libc::F_DUPFD_CLOEXEC as u32,
    libc::F_GETFD as u32,
    libc::F_SETFD as u32,
    libc::F_GETFL as u32,
    libc::F_SETFL as u32,
    libc::F_ADD_SEALS as u32,
    libc::F_GET_SEALS as u32,
    libc::F_OFD_GETLK as u32,
    libc::F_OFD_SETLK as u32,
    libc::F_OFD_SETLKW as u32,
];

/// What block devices are asked for, and what Python does to any descriptor.
const DEVICE_COMMANDS: &[u32] = &[
    BLKROGET,
    BLKGETSIZE64,
    BLKSSZGET,
    BLKIOMIN,
    BLKIOOPT,
    BLKPBSZGET,
    BLKDISCARD,
    BLKZEROOUT,
    libc::FIONBIO as u32,
    libc::FIOCLEX as u32,
    libc::FIONCLEX as u32,
    libc::TCGETS as u32,
];
const BLKROGET: u32 = 0x125e;
const BLKSSZGET: u32 = 0x1268;
const BLKDISCARD: u32 = 0x1277;
const BLKIOMIN: u32 = 0x1278;
const BLKIOOPT: u32 = 0x1279;
const BLKPBSZGET: u32 = 0x127b;
const BLKZEROOUT: u32 = 0x127f;
const BLKGETSIZE64: u32 = 0x8008_1272;
