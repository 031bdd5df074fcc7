//! Kills back-ends and proves that nothing is lost, repeated or put in the wrong order.
//!
//! ```text
//! vhostuser-kill table [steps=NAME,...] [states=NAME,...]   a back-end killed at every step, in every state of its rings
//! vhostuser-kill random kills=N                     back-ends killed at any moment
//! ```
//!
//! Both take `image=PATH` for the image, which is overwritten, `seed=N`, and `fence=0` for back-ends that do not wait
//! for their predecessor's last request. Exits with 1 after a violation. `serve` is the back-end and starts by itself.

mod backend;
mod chance;
mod child;
mod host;
mod model;
mod run;
mod shape;
mod states;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use host::Trouble;
use run::Tally;
use shape::{Storage, Words};
use states::{states, State, BEGIN_STEPS, RECOVER_STEPS, STEPS, SYSCALL_STEP};

/// Back-ends that one host loses before everything is checked and fresh rings are made.
const ROUND: u64 = 40;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let command = arguments.next().unwrap_or_default();
    let done = Words::of(arguments).and_then(|words| match command.as_str() {
        "serve" => child::serve(&words).map(|never| match never {}),
        "table" => table(&words),
        "random" => random(&words),
        _ => Err("say `table` or `random kills=N`".into()),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("vhostuser: kill: {why}");
            ExitCode::FAILURE
        }
    }
}

/// What both commands know from the command line.
struct Setting {
    /// Where images are: the one that was named, or one in memory and one on a disk, for O_DIRECT.
    images: Vec<PathBuf>,
    seed: u64,
    fence: bool,
    steps: Vec<String>,
    states: Vec<String>,
    made: bool,
}

impl Setting {
    fn of(words: &Words) -> Result<Self, String> {
        if let Some(name) = words.unknown(&["kills", "image", "seed", "fence", "steps", "states"]) {
            return Err(format!("{name}=... is unknown"));
        }
        let own = format!("vhostuser-kill-{}.img", std::process::id());
        // A flush costs nothing in memory, and the disk of a busy machine makes this ten times slower.
        let places = [PathBuf::from("/dev/shm"), std::env::temp_dir()];
        let made = !words.has("image");
        let images = if made {
            places.iter().filter(|place| place.is_dir()).map(|place| place.join(&own)).collect()
        } else {
            vec![words.get("image")?]
        };
        let named = |list: &str| list.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect();
        Ok(Self {
            made,
            images,
            seed: words.or("seed", 1)?,
            fence: words.or::<u8>("fence", 1)? != 0,
            steps: named(&words.or("steps", String::new())?),
            states: named(&words.or("states", String::new())?),
        })
    }
}

impl Setting {
    fn image(&self, state: &State) -> &Path {
        let on_disk = state.shape.storage == Storage::Direct;
        &self.images[if on_disk { self.images.len() - 1 } else { 0 }]
    }

    fn states(&self) -> Vec<State> {
        states().into_iter().filter(|state| among(&self.states, state.name)).collect()
    }
}

fn among(names: &[String], name: &str) -> bool {
    names.is_empty() || names.iter().any(|one| one == name)
}

impl Drop for Setting {
    fn drop(&mut self) {
        if self.made {
            // It may never have come to be.
            self.images.iter().for_each(|image| drop(std::fs::remove_file(image)));
        }
    }
}

fn told(trouble: Trouble) -> String {
    match trouble {
        Trouble::Violation(violation) => format!("VIOLATION: {violation}"),
        Trouble::Io(error) => format!("the harness cannot go on: {error}"),
    }
}

/// Prints the kills of each step in each state; every one of them has been proved to be harmless.
fn table(words: &Words) -> Result<(), String> {
    let setting = Setting::of(words)?;
    let states = setting.states();
    let recover = RECOVER_STEPS.map(|(step, _)| step);
    let steps = STEPS.into_iter().chain([SYSCALL_STEP]).chain(BEGIN_STEPS).chain(recover);
    let (started, mut kills) = (Instant::now(), 0);
    print!("| step |");
    states.iter().for_each(|state| print!(" {} |", state.name));
    print!("\n| --- |");
    states.iter().for_each(|_| print!(" --- |"));
    println!();
    for step in steps.filter(|step| among(&setting.steps, step)) {
        print!("| {step} |");
        for state in &states {
            if step == SYSCALL_STEP && state.shape.storage != Storage::Syscalls {
                print!(" - |");
                continue;
            }
            let killed = run::kill_at(step, state, setting.image(state), setting.seed, setting.fence)
                .map_err(|trouble| format!("step {step}, state {}: {}", state.name, told(trouble)))?;
            if killed == 0 {
                return Err(format!("step {step} was never reached in state {}", state.name));
            }
            kills += killed;
            print!(" {killed} |");
        }
        println!();
    }
    if setting.steps.is_empty() && setting.states.is_empty() {
        for seed in 0..10 {
            kills += run::kill_in_order(&setting.images[0], setting.seed + seed, setting.fence)
                .map_err(|trouble| format!("order of the replay, seed {}: {}", setting.seed + seed, told(trouble)))?;
        }
        println!("\nRequests are replayed in the order in which they were made.");
    }
    println!("\n{kills} kills, every request exactly once, in {:.1} s", started.elapsed().as_secs_f64());
    Ok(())
}

fn random(words: &Words) -> Result<(), String> {
    let setting = Setting::of(words)?;
    let wanted: u64 = words.get("kills")?;
    let states = setting.states();
    let (started, mut sum, mut round) = (Instant::now(), Tally::default(), 0);
    while sum.kills < wanted {
        let state = &states[round as usize % states.len()];
        let (kills, seed) = (ROUND.min(wanted - sum.kills), setting.seed + round);
        let tally = run::kill_at_random(kills, state, setting.image(state), seed, setting.fence)
            .map_err(|trouble| format!("state {}, seed {seed}: {}", state.name, told(trouble)))?;
        sum.kills += tally.kills;
        sum.busy += tally.busy;
        sum.answered += tally.answered;
        round += 1;
    }
    let Tally { kills, busy, answered } = sum;
    let seconds = started.elapsed().as_secs_f64();
    println!("{kills} random kills, {busy} of them with requests under way, {answered} requests answered");
    println!("every request exactly once, in {seconds:.1} s");
    Ok(())
}
