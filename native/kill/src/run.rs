//! What is done with a host and its back-ends: kills at a step, kills at any moment, and a check at the end.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::backend::Backend;
use crate::host::{Host, Trouble};
use crate::model::Violation;
use crate::states::{order_state, State, BEGIN_STEPS, RECOVER_STEPS};

/// Answers after which a step that has not come will not come.
const BUDGET: u64 = 5000;
/// Requests that are answered in order.
const IDS: usize = 10;
/// Those of them that are under way when the back-end dies: of more the driver would see the first already.
const UNDER_WAY: usize = 3;
/// Answers that the last back-end of a run gives before it is over.
const AFTERWARDS: u64 = 60;

/// Keeps `backend` busy until it dies (true) or `budget` more requests were answered.
fn drive(host: &mut Host, backend: &mut Backend, state: &State, budget: u64) -> Result<bool, Trouble> {
    let enough = host.answered() + budget;
    loop {
        if !host.asleep() {
            host.reap()?;
            if host.answered() >= enough {
                return Ok(false);
            }
            if !state.bursts || host.outstanding() == 0 {
                host.fill(state.depth)?;
            }
        }
        if host.wait(backend, None)? {
            host.killed(backend.wait()?)?;
            return Ok(true);
        }
    }
}

/// Starts a back-end that dies at `step`; whether it did.
fn die_at(host: &mut Host, state: &State, step: &str, pass: u64) -> Result<bool, Trouble> {
    let mut backend = host.start(Some(&format!("{step}:{pass}")))?;
    let died = drive(host, &mut backend, state, BUDGET)?;
    if !died {
        host.kill(backend, false)?;
    }
    Ok(died)
}

/// Kills back-ends at `step` in `state`, lets the last one go on, and checks everything. Returns the kills.
pub(crate) fn kill_at(step: &str, state: &State, image: &Path, seed: u64, fence: bool) -> Result<u64, Trouble> {
    let mut host = Host::new(state.shape, image, seed, fence)?;
    let mut kills = 0;
    // A ring begins once.
    let passes = if BEGIN_STEPS.contains(&step) { &[1] } else { state.passes };
    for &pass in passes {
        if let Some((_, before)) = RECOVER_STEPS.iter().find(|(name, _)| *name == step) {
            die_at(&mut host, state, before, pass)?;
            kills += u64::from(die_at(&mut host, state, step, 1)?);
        } else {
            kills += u64::from(die_at(&mut host, state, step, pass)?);
        }
        if state.again {
            for _ in 0..2 {
                kills += u64::from(die_at(&mut host, state, step, 1)?);
            }
        }
    }
    let mut backend = host.start(None)?;
    drive(&mut host, &mut backend, state, AFTERWARDS)?;
    host.finish(&mut backend)?;
    host.check(backend)?;
    Ok(kills)
}

/// Kills two back-ends in a row with requests under way that the third answers in the order in which they were made: they are
/// answered without storage, so that nothing but the replay decides the order. Returns the kills.
pub(crate) fn kill_in_order(image: &Path, seed: u64, fence: bool) -> Result<u64, Trouble> {
    let state = order_state();
    let mut host = Host::new(state.shape, image, seed, fence)?;
    // Storage that answers in any order leaves the free descriptors in any order too.
    let mut backend = host.start(None)?;
    drive(&mut host, &mut backend, &state, BUDGET / 10)?;
    host.finish(&mut backend)?;
    host.kill(backend, false)?;
    for _ in 0..2 {
        host.ask_ids(IDS)?;
        let mut backend = host.start(Some(&format!("begun:{UNDER_WAY}")))?;
        while !host.wait(&backend, None)? {
            if host.reap()? > 0 {
                return Err(Violation("an answer came before it was published".into()).into());
            }
        }
        host.killed(backend.wait()?)?;
    }
    let mut backend = host.start(None)?;
    host.finish(&mut backend)?;
    host.check(backend)?;
    Ok(2)
}

/// What a number of random kills came to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    /// Back-ends killed.
    pub(crate) kills: u64,
    /// Those that were killed while requests were under way.
    pub(crate) busy: u64,
    /// Requests answered.
    pub(crate) answered: u64,
}

/// Kills `kills` back-ends of one host, each at any moment, and checks everything at the end.
pub(crate) fn kill_at_random(
    kills: u64,
    state: &State,
    image: &Path,
    seed: u64,
    fence: bool,
) -> Result<Tally, Trouble> {
    let mut host = Host::new(state.shape, image, seed, fence)?;
    let mut tally = Tally { kills, ..Tally::default() };
    for _ in 0..kills {
        let mut backend = host.start(None)?;
        if host.chance().below(4) == 0 {
            // At the start: while it recovers, or before.
            let until = Instant::now() + Duration::from_micros(host.chance().below(4000));
            spend(&mut host, &mut backend, state, until)?;
        } else {
            let answers = host.chance().below(120);
            if drive(&mut host, &mut backend, state, answers)? {
                return Err(std::io::Error::other("the back-end was killed by somebody else").into());
            }
            host.fill(state.depth)?;
            let until = Instant::now() + Duration::from_micros(host.chance().below(200));
            spend(&mut host, &mut backend, state, until)?;
        }
        let hurry = host.chance().below(2) == 0;
        host.kill(backend, hurry)?;
        tally.busy += u64::from(host.outstanding() > 0);
        if host.chance().below(3) == 0 {
            // The driver goes on while nobody serves it.
            host.reap()?;
            host.fill(state.depth)?;
        }
    }
    let mut backend = host.start(None)?;
    host.finish(&mut backend)?;
    tally.answered = host.answered();
    host.check(backend)?;
    Ok(tally)
}

/// Keeps `backend` busy until a moment.
fn spend(host: &mut Host, backend: &mut Backend, state: &State, until: Instant) -> Result<(), Trouble> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        if !host.asleep() {
            host.reap()?;
            host.fill(state.depth)?;
        }
        if host.wait(backend, Some(left))? {
            return host.killed(backend.wait()?);
        }
    }
}
