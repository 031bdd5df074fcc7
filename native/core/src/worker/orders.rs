//! Posting to a worker and waking it, in every order that the memory model allows: no command is left lying.

use std::sync::Arc;

use super::mailbox::{Command, Mailbox};
use crate::sys::sync::modelled::every_order;

/// What the worker does: look, take, and sleep until it is woken; two threads post. With `late_drain` it forgets a signal
/// that came after its last look.
fn commands_arrive(late_drain: bool) {
    let mailbox = Arc::new(Mailbox::new().unwrap());
    let posters: Vec<_> = [1, 2]
        .map(|ring| {
            let mailbox = Arc::clone(&mailbox);
            loom::thread::spawn(move || mailbox.post(Command::Call(ring, None)))
        })
        .into_iter()
        .collect();
    let mut seen = Vec::new();
    while seen.len() < 2 {
        if mailbox.has_commands() {
            for command in mailbox.take() {
                let Command::Call(ring, _) = command else { panic!("nobody posted that") };
                seen.push(ring);
            }
            continue;
        }
        if late_drain {
            mailbox.wake.drain();
        }
        mailbox.wake.wait();
        mailbox.wake.drain();
    }
    seen.sort_unstable();
    assert_eq!(seen, [1, 2], "each once");
    for poster in posters {
        poster.join().unwrap();
    }
}

#[test]
fn loom_every_command_arrives_once_and_none_is_left_lying() {
    every_order(None, || commands_arrive(false));
}

#[test]
#[should_panic(expected = "deadlock")]
fn loom_finds_a_worker_that_forgets_a_signal_behind_its_back() {
    every_order(None, || commands_arrive(true));
}
