//! The list as a program of classic BPF, which the kernel runs before each system call.
//!
//! A load, then comparisons that jump over what they skip: nothing jumps far, so no offset outgrows its byte.

use libc::{c_long, sock_filter, BPF_ABS, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_RET, BPF_W};

use super::allowed::{Condition, ALWAYS, OLDER, SOMETIMES};

/// `struct seccomp_data`: where the number of the call, the architecture and the arguments lie.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const fn argument(index: u32) -> u32 {
    16 + 8 * index
}

/// `AUDIT_ARCH_*` of the one architecture whose numbers the list has.
#[cfg(target_arch = "x86_64")]
pub(super) const OURS: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
pub(super) const OURS: u32 = 0xc000_00b7;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("say which AUDIT_ARCH_ this architecture has");

/// Bit 30: the calls of 32-bit programs on x86-64, which are others. No call of another architecture has such a number.
const OTHER_ABI: u32 = 0x4000_0000;

/// The last call that was there when the list was made (mseal of Linux 6.10 and its neighbours).
/// A C library that tries a newer one has to hear that the kernel does not know it, and does it the older way.
const LAST_KNOWN: u32 = 467;

pub(super) const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
pub(super) const REFUSE: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
/// `clone3` keeps its flags where a filter cannot look; the C library turns to `clone` then.
pub(super) const UNKNOWN: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

const fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt, jf, k }
}

const fn load(offset: u32) -> sock_filter {
    instruction(BPF_LD | BPF_W | BPF_ABS, 0, 0, offset)
}

const fn end(action: u32) -> sock_filter {
    instruction(BPF_RET | BPF_K, 0, 0, action)
}

/// Goes on behind as many instructions as `yes` and `no` say.
const fn jump(test: u32, k: u32, yes: u8, no: u8) -> sock_filter {
    instruction(BPF_JMP | BPF_K | test, yes, no, k)
}

/// The whole filter, for the process `pid`.
pub(super) fn program(pid: u32) -> Vec<sock_filter> {
    let mut code = vec![
        load(ARCHITECTURE),
        jump(BPF_JEQ, OURS, 1, 0),
        end(REFUSE),
        load(NUMBER),
        jump(BPF_JGE, OTHER_ABI, 0, 1),
        end(REFUSE),
    ];
    for &number in ALWAYS.iter().chain(OLDER) {
        code.extend([jump(BPF_JEQ, number as u32, 0, 1), end(ALLOW)]);
    }
    for &(number, conditions) in SOMETIMES {
        code.extend(block(number, conditions, pid));
    }
    code.extend([jump(BPF_JEQ, libc::SYS_clone3 as u32, 0, 1), end(UNKNOWN)]);
    code.extend([jump(BPF_JGE, LAST_KNOWN + 1, 0, 1), end(UNKNOWN), end(REFUSE)]);
    code
}

/// Skipped for other calls, else it ends here.
fn block(number: c_long, conditions: &[Condition], pid: u32) -> Vec<sock_filter> {
    let mut inside = Vec::new();
    for condition in conditions {
        inside.extend(check(*condition, pid));
    }
    inside.push(end(ALLOW));
    let mut code = vec![jump(BPF_JEQ, number as u32, 0, inside.len() as u8)];
    code.append(&mut inside);
    code
}

/// Goes on when the condition holds, else refuses the call.
fn check(condition: Condition, pid: u32) -> Vec<sock_filter> {
    let one_of = |index, values: &[u32]| {
        let mut code = vec![load(argument(index))];
        for (at, &value) in values.iter().enumerate() {
            // Over the rest of them and over the refusal.
            code.push(jump(BPF_JEQ, value, (values.len() - at) as u8, 0));
        }
        code.push(end(REFUSE));
        code
    };
    match condition {
        Condition::OneOf(index, values) => one_of(index, values),
        Condition::OurProcess(index) => one_of(index, &[pid]),
        Condition::Without(index, bits) => vec![load(argument(index)), jump(BPF_JSET, bits, 0, 1), end(REFUSE)],
        Condition::With(index, bits) => vec![load(argument(index)), jump(BPF_JSET, bits, 1, 0), end(REFUSE)],
        Condition::Null(index) => {
            let (low, high) = (argument(index), argument(index) + 4);
            let zero = |at| [load(at), jump(BPF_JEQ, 0, 1, 0), end(REFUSE)];
            [zero(low), zero(high)].concat()
        }
    }
}
