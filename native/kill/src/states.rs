//! The states of a ring in which the back-end is killed. Pure.

use std::time::Duration;

use crate::shape::{Shape, Storage};

/// The points on the way of a request (core: `step!`), in order: from the driver's ring to storage and back.
pub(crate) const STEPS: [&str; 13] = [
    "taken",
    "marked",
    "begun",
    "submitted",
    "reaped",
    "status",
    "linked",
    "pushed",
    "used_idx",
    "cleared",
    "region_idx",
    "fenced",
    "notified",
];
/// Those of a ring whose region nobody has used.
pub(crate) const BEGIN_STEPS: [&str; 2] = ["begin_used_idx", "begin_version"];
/// Those of a ring that has had a predecessor, each with the step at which that one dies first: with a batch half given
/// back, or with requests under way.
pub(crate) const RECOVER_STEPS: [(&str, &str); 4] =
    [("recover_cleared", "used_idx"), ("recover_used_idx", "used_idx"), ("recovered", "begun"), ("replayed", "begun")];
/// That of a thread which makes system calls on storage, where there is one.
pub(crate) const SYSCALL_STEP: &str = "stored";

/// A state of the rings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct State {
    /// In a word or two.
    pub(crate) name: &'static str,
    /// The rings and the storage.
    pub(crate) shape: Shape,
    /// Requests under way on each ring, at most.
    pub(crate) depth: usize,
    /// New ones are only sent, all at once, when no one is under way any more.
    pub(crate) bursts: bool,
    /// At which pass of the step it dies; one kill each.
    pub(crate) passes: &'static [u64],
    /// The successor dies at the first pass of the same step, twice, and only the one after that goes on.
    pub(crate) again: bool,
}

/// All states of the table.
pub(crate) fn states() -> Vec<State> {
    let shape = Shape {
        queues: 1,
        size: 64,
        first: 0,
        indirect: false,
        event_idx: true,
        storage: Storage::IoUring,
        delay: Duration::ZERO,
    };
    let state = State { name: "", shape, depth: 8, bursts: false, passes: &[1, 4, 30], again: false };
    let held = Duration::from_micros(300);
    vec![
        State { name: "first", shape: Shape { size: 16, ..shape }, depth: 1, passes: &[1], ..state },
        State { name: "full", shape, depth: 64, passes: &[1, 12, 65], ..state },
        State { name: "wrap", shape: Shape { first: 65530, ..shape }, passes: &[5, 6, 1, 7], ..state },
        State { name: "indirect", shape: Shape { indirect: true, ..shape }, depth: 40, ..state },
        State { name: "batch", shape, depth: 16, bursts: true, passes: &[1, 9, 16, 17], ..state },
        State { name: "reorder", shape: Shape { delay: held, ..shape }, depth: 14, passes: &[1, 7, 15], ..state },
        State { name: "no event_idx", shape: Shape { event_idx: false, ..shape }, ..state },
        State { name: "2 queues", shape: Shape { queues: 2, indirect: true, ..shape }, depth: 20, ..state },
        State { name: "syscalls", shape: Shape { storage: Storage::Syscalls, ..shape }, depth: 14, ..state },
        State { name: "inline", shape: Shape { storage: Storage::Inline, ..shape }, depth: 14, ..state },
        State { name: "mapped", shape: Shape { storage: Storage::Mapped, ..shape }, depth: 14, ..state },
        State { name: "direct", shape: Shape { storage: Storage::Direct, ..shape }, depth: 14, ..state },
        State {
            name: "again",
            shape: Shape { first: 65500, delay: held, indirect: true, ..shape },
            depth: 30,
            passes: &[3, 20],
            again: true,
            ..state
        },
    ]
}

/// The state in which the order of a replay is looked at.
pub(crate) fn order_state() -> State {
    let wrap = State { depth: 20, ..states()[2] };
    State { shape: Shape { delay: Duration::from_micros(100), ..wrap.shape }, ..wrap }
}
