//! The harness itself, as a part of the ordinary tests: the whole table, and a few random kills.

use std::process::Command;

fn run(words: &[&str]) -> String {
    let done = Command::new(env!("CARGO_BIN_EXE_vhostuser-kill")).args(words).output().unwrap();
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success(), "{said}\n{}", String::from_utf8_lossy(&done.stderr));
    said
}

#[test]
fn a_back_end_killed_at_any_step_in_any_state_loses_and_repeats_nothing() {
    let said = run(&["table"]);
    assert!(said.contains("every request exactly once"), "{said}");
}

#[test]
fn a_back_end_killed_at_any_moment_loses_and_repeats_nothing() {
    let said = run(&["random", "kills=150"]);
    assert!(said.starts_with("150 random kills"), "{said}");
}
