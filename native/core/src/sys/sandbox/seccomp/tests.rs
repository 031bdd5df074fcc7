//! The program, run by a machine of our own: what each call gets as an answer.

use std::collections::HashSet;

use libc::{c_long, sock_filter};

use super::allowed::{ALWAYS, OLDER, SOMETIMES};
use super::program::{program, ALLOW, OURS, REFUSE, UNKNOWN};

const PID: u32 = 4711;

/// What the kernel shows a filter (`struct seccomp_data`).
fn data(architecture: u32, number: u32, arguments: [u64; 6]) -> Vec<u8> {
    let mut bytes = [number.to_ne_bytes(), architecture.to_ne_bytes(), [0; 4], [0; 4]].concat();
    bytes.extend(arguments.iter().flat_map(|argument| argument.to_ne_bytes()));
    bytes
}

/// A slow and obvious machine for the instructions that filters of seccomp may have.
fn run(program: &[sock_filter], data: &[u8]) -> u32 {
    let (mut at, mut accumulator) = (0_usize, 0_u32);
    loop {
        let sock_filter { code, jt, jf, k } = program[at];
        at += 1;
        let jumps = |yes: bool| usize::from(if yes { jt } else { jf });
        match u32::from(code) {
            0x20 => {
                let offset = k as usize;
                assert!(offset % 4 == 0, "an unaligned load");
                accumulator = u32::from_ne_bytes(data[offset..offset + 4].try_into().unwrap());
            }
            0x15 => at += jumps(accumulator == k),
            0x35 => at += jumps(accumulator >= k),
            0x45 => at += jumps(accumulator & k != 0),
            0x06 => return k,
            other => panic!("instruction {other:#x} is not allowed in a filter, or not known here"),
        }
    }
}

fn answer(number: c_long, arguments: [u64; 6]) -> u32 {
    run(&program(PID), &data(OURS, number as u32, arguments))
}

#[test]
fn what_serving_needs_is_allowed() {
    for &number in ALWAYS.iter().chain(OLDER) {
        assert_eq!(answer(number, [u64::MAX; 6]), ALLOW, "call {number}");
    }
}

#[test]
fn what_opens_connects_or_executes_is_refused() {
    let refused = [
        libc::SYS_openat,
        libc::SYS_openat2,
        libc::SYS_open_by_handle_at,
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_socket,
        libc::SYS_socketpair,
        libc::SYS_connect,
        libc::SYS_bind,
        libc::SYS_listen,
        libc::SYS_setsockopt,
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_register,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_pidfd_open,
        libc::SYS_pidfd_getfd,
        libc::SYS_bpf,
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_move_mount,
        libc::SYS_fsopen,
        libc::SYS_chroot,
        libc::SYS_pivot_root,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_keyctl,
        libc::SYS_add_key,
        libc::SYS_request_key,
        libc::SYS_perf_event_open,
        libc::SYS_userfaultfd,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_kexec_load,
        libc::SYS_reboot,
        libc::SYS_setuid,
        libc::SYS_setresuid,
        libc::SYS_setgroups,
        libc::SYS_capset,
        libc::SYS_personality,
        libc::SYS_seccomp,
        libc::SYS_renameat2,
        libc::SYS_linkat,
        libc::SYS_symlinkat,
        libc::SYS_mkdirat,
        libc::SYS_mknodat,
        libc::SYS_fchmodat,
        libc::SYS_fchownat,
        libc::SYS_truncate,
        libc::SYS_getdents64,
        libc::SYS_pkey_mprotect,
        libc::SYS_remap_file_pages,
        libc::SYS_tkill,
        libc::SYS_rt_sigqueueinfo,
        libc::SYS_io_setup,
        libc::SYS_io_submit,
        libc::SYS_quotactl,
        libc::SYS_swapon,
        libc::SYS_syslog,
    ];
    for number in refused {
        assert_eq!(answer(number, [0; 6]), REFUSE, "call {number}");
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn older_names_of_what_is_refused_are_refused() {
    for number in [libc::SYS_open, libc::SYS_creat, libc::SYS_fork, libc::SYS_vfork, libc::SYS_rename, libc::SYS_link] {
        assert_eq!(answer(number, [0; 6]), REFUSE, "call {number}");
    }
}

#[test]
fn every_call_that_is_neither_listed_nor_new_is_refused() {
    let listed: HashSet<u32> =
        ALWAYS.iter().chain(OLDER).chain(SOMETIMES.iter().map(|(number, _)| number)).map(|&n| n as u32).collect();
    for number in (0..468).filter(|number| !listed.contains(number) && *number != libc::SYS_clone3 as u32) {
        assert_eq!(answer(c_long::from(number), [0; 6]), REFUSE, "call {number}");
    }
}

#[test]
fn no_memory_becomes_executable() {
    for number in [libc::SYS_mmap, libc::SYS_mprotect] {
        let with = |protection: i32| answer(number, [0, 4096, protection as u64, 0, 0, 0]);
        assert_eq!(with(libc::PROT_READ | libc::PROT_WRITE), ALLOW);
        assert_eq!(with(libc::PROT_NONE), ALLOW);
        assert_eq!(with(libc::PROT_EXEC), REFUSE);
        assert_eq!(with(libc::PROT_READ | libc::PROT_EXEC), REFUSE);
    }
}

#[test]
fn threads_are_made_and_no_process_and_no_namespace() {
    let clone = |flags: i32| answer(libc::SYS_clone, [flags as u32 as u64, 0, 0, 0, 0, 0]);
    let thread = libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_SIGHAND | libc::CLONE_THREAD;
    assert_eq!(clone(thread), ALLOW);
    assert_eq!(clone(libc::SIGCHLD), REFUSE);
    assert_eq!(clone(libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD), REFUSE);
    assert_eq!(clone(thread | libc::CLONE_NEWUSER), REFUSE);
    assert_eq!(clone(thread | libc::CLONE_NEWNET), REFUSE);
    assert_eq!(answer(libc::SYS_clone3, [0; 6]), UNKNOWN, "its flags are where no filter looks");
}

#[test]
fn only_this_process_is_signalled() {
    for number in [libc::SYS_kill, libc::SYS_tgkill] {
        assert_eq!(answer(number, [u64::from(PID), 1, 15, 0, 0, 0]), ALLOW);
        for other in [u64::from(PID) + 1, 1, 0, u64::MAX, -i64::from(PID) as u64] {
            assert_eq!(answer(number, [other, 1, 15, 0, 0, 0]), REFUSE, "process {other}");
        }
    }
}

#[test]
fn descriptors_are_commanded_in_the_listed_ways_only() {
    let fcntl = |command: i32| answer(libc::SYS_fcntl, [3, command as u64, 0, 0, 0, 0]);
    let ioctl = |command: u64| answer(libc::SYS_ioctl, [3, command, 0, 0, 0, 0]);
    for command in [libc::F_DUPFD_CLOEXEC, libc::F_GETFL, libc::F_SETFL, libc::F_ADD_SEALS, libc::F_OFD_SETLK] {
        assert_eq!(fcntl(command), ALLOW, "fcntl {command}");
    }
    for command in [libc::F_SETOWN, libc::F_SETLEASE, libc::F_NOTIFY, libc::F_SETPIPE_SZ] {
        assert_eq!(fcntl(command), REFUSE, "fcntl {command}");
    }
    for command in [0x1277, 0x127f, 0x8008_1272, libc::FIONBIO] {
        assert_eq!(ioctl(command), ALLOW, "ioctl {command:#x}");
    }
    // The kernel looks at 32 bits of it, so others make no other command of it.
    assert_eq!(ioctl(0x1277 | 1 << 40), ALLOW);
    for command in [libc::TIOCSTI, libc::TIOCLINUX, libc::SIOCGIFADDR, 0x2285] {
        assert_eq!(ioctl(command), REFUSE, "ioctl {command:#x}");
    }
}

#[test]
fn bytes_go_to_the_peer_of_a_socket_and_nowhere_else() {
    assert_eq!(answer(libc::SYS_sendto, [3, 4096, 1, 0, 0, 0]), ALLOW);
    assert_eq!(answer(libc::SYS_sendto, [3, 4096, 1, 0, 4096, 16]), REFUSE);
    assert_eq!(answer(libc::SYS_sendto, [3, 4096, 1, 0, 1 << 32, 16]), REFUSE, "the high half of the pointer counts");
}

#[test]
fn limits_are_asked_for_and_not_changed() {
    assert_eq!(answer(libc::SYS_prlimit64, [0, 7, 0, 4096, 0, 0]), ALLOW);
    assert_eq!(answer(libc::SYS_prlimit64, [0, 7, 4096, 0, 0, 0]), REFUSE);
    assert_eq!(answer(libc::SYS_prlimit64, [1, 7, 0, 4096, 0, 0]), REFUSE);
    assert_eq!(answer(libc::SYS_utimensat, [3, 0, 4096, 0, 0, 0]), ALLOW);
    assert_eq!(answer(libc::SYS_utimensat, [libc::AT_FDCWD as u64, 4096, 4096, 0, 0, 0]), REFUSE, "a file by its name");
}

#[test]
fn calls_of_another_architecture_are_refused_and_new_ones_unknown() {
    let i386 = 0x4000_0003;
    let code = program(PID);
    assert_eq!(run(&code, &data(i386, libc::SYS_write as u32, [0; 6])), REFUSE);
    assert_eq!(run(&code, &data(OURS, 0x4000_0000 | libc::SYS_write as u32, [0; 6])), REFUSE, "x32");
    assert_eq!(answer(468, [0; 6]), UNKNOWN);
    assert_eq!(answer(10_000, [0; 6]), UNKNOWN);
    assert_eq!(run(&code, &data(OURS, u32::MAX, [0; 6])), REFUSE);
}

#[test]
fn the_filter_fits_the_kernel() {
    assert!(program(PID).len() <= 4096, "BPF_MAXINSNS");
}
