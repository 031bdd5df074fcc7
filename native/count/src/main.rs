//! Sends requests through one ring in one thread, so that the instructions of each can be counted.
//!
//! ```text
//! vhostuser-count null|memory|tmpfs read|write DEPTH REQUESTS
//! ```
//!
//! Requests of 4096 bytes, DEPTH at a time: the driver's half makes them (`submit`), the worker takes one step (`step`), the
//! driver's half takes the answers (`reap`). Nothing sleeps, polls or notifies. `tmpfs` is a file in memory, which the worker
//! reads and writes by itself. `counted` calls the three after a warm-up; `benchmarks/instructions.py` knows these four by
//! their names. Exits with 1 when a request is not answered with success.

use std::error::Error;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::sync::Arc;

use vhostuser_core::blk::{BlkServe, BlkShared, ClientLayout, ClientQueue, ClientRequest, Limits, Piece};
use vhostuser_core::disk::{FileOptions, Method, Spec};
use vhostuser_core::memory::{GuestMemory, Mapping, RegionSpec};
use vhostuser_core::ring::{feature, RingSetup};
use vhostuser_core::sys::memfd;
use vhostuser_core::worker::{Events, Notifiers, Stepper};

type Outcome<T> = Result<T, Box<dyn Error>>;

const FEATURES: u64 = feature::VERSION_1 | feature::INDIRECT_DESC | feature::EVENT_IDX;
const GUEST: u64 = 0x4000_0000;
const USER: u64 = 0x7f00_0000_0000;
const LAYOUT: ClientLayout = ClientLayout { size: 128, seg_max: 16, offset: 0 };
const BLOCK: u64 = 4096;
/// Blocks of the disk: few, so that they are in memory, and the processor's caches, after the warm-up.
const BLOCKS: u64 = 256;
const SECTORS_PER_BLOCK: u64 = BLOCK / 512;
const WARM_UP: u64 = 2 * BLOCKS;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match run(&words.iter().map(String::as_str).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("vhostuser: count: {why}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> Outcome<()> {
    let &[disk, operation, depth, requests] = words else {
        return Err("say which disk, `read` or `write`, how many at a time, and how many".into());
    };
    let kind = match operation {
        "read" => 0,
        "write" => 1,
        _ => return Err(format!("{operation:?} is neither `read` nor `write`").into()),
    };
    let depth: u64 = depth.parse()?;
    if !(1..=u64::from(LAYOUT.size)).contains(&depth) {
        return Err(format!("{depth} requests do not fit into a ring of {}", LAYOUT.size).into());
    }
    let mut bench = Bench::new(&storage(disk)?, kind, depth)?;
    bench.step()?;
    warm_up(&mut bench)?;
    counted(&mut bench, requests.parse()?)
}

fn storage(disk: &str) -> Outcome<Spec> {
    Ok(match disk {
        "null" => Spec::null(),
        "memory" => Spec::memory(BLOCK * BLOCKS)?,
        "tmpfs" => {
            let file = memfd::sealed(c"disk", BLOCK * BLOCKS, false)?;
            Spec::file(file, FileOptions { method: Method::Syscalls, inline: true, ..FileOptions::default() })?
        }
        _ => return Err(format!("{disk:?} is neither `null` nor `memory` nor `tmpfs`").into()),
    })
}

/// Both ends of one ring.
struct Bench {
    queue: ClientQueue,
    worker: Stepper<BlkServe>,
    /// Guest address of the first request's data.
    data: u64,
    /// virtio_blk_req.type.
    kind: u32,
    depth: u64,
    next_block: u64,
}

impl Bench {
    fn new(spec: &Spec, kind: u32, depth: u64) -> Outcome<Self> {
        let len = LAYOUT.len() as u64 + BLOCK * depth;
        let arena = memfd::sealed(c"count", len, false)?;
        let map = Mapping::of_file(arena.as_fd(), 0, len)?;
        let region = RegionSpec { guest_addr: GUEST, size: len, user_addr: USER, mmap_offset: 0 };
        let memory = Arc::new(GuestMemory::new([(region, arena.as_fd())]).map_err(|error| error.to_string())?);
        let mut queue = ClientQueue::new(map, GUEST, LAYOUT, FEATURES).map_err(|error| error.to_string())?;
        queue.disable_calls().map_err(|error| error.to_string())?;
        let limits = Limits {
            num_sectors: SECTORS_PER_BLOCK * BLOCKS,
            block_size: 512,
            read_only: false,
            max_discard_sectors: 0,
            max_discard_seg: 0,
            max_write_zeroes_sectors: 0,
            max_write_zeroes_seg: 0,
        };
        let shared = Arc::new(BlkShared::new(limits, true, b"count"));
        let events = Arc::new(Events::new()?);
        let mut worker =
            Stepper::new(memory, Arc::clone(&events), |waker| Ok(BlkServe::new(shared, spec.build()?, events, waker)))?;
        let (desc, avail, used) = LAYOUT.areas();
        let place = |offset: usize| USER + offset as u64;
        let (desc, avail, used) = (place(desc), place(avail), place(used));
        let setup = RingSetup { size: LAYOUT.size, desc, avail, used, base: 0, features: FEATURES };
        worker.start(setup, Notifiers::default()).map_err(|error| error.to_string())?;
        Ok(Self { queue, worker, data: GUEST + LAYOUT.len() as u64, kind, depth, next_block: 0 })
    }

    #[inline(always)]
    fn round(&mut self) -> Outcome<()> {
        self.submit()?;
        self.step()?;
        self.reap()
    }

    /// The driver's half, up to the ring.
    #[inline(never)]
    fn submit(&mut self) -> Outcome<()> {
        for token in 0..self.depth {
            let piece = Piece { addr: self.data + BLOCK * token, len: BLOCK as u32 };
            let sector = SECTORS_PER_BLOCK * (self.next_block % BLOCKS);
            self.next_block += 1;
            let (kind, writable) = (self.kind, self.kind == 0);
            let request = ClientRequest { kind, sector, data: &[piece], writable, token };
            self.queue.submit(&request).map_err(|error| error.to_string())?;
        }
        self.queue.publish().map_err(|error| error.to_string())?;
        Ok(())
    }

    /// The worker's half.
    #[inline(never)]
    fn step(&mut self) -> Outcome<()> {
        self.worker.step()?;
        Ok(())
    }

    /// The driver's half, from the ring.
    #[inline(never)]
    fn reap(&mut self) -> Outcome<()> {
        for _ in 0..self.depth {
            let answer = self.queue.reap().map_err(|error| error.to_string())?;
            match answer {
                Some(answer) if answer.status == 0 => {}
                Some(answer) => return Err(format!("a request was answered with status {}", answer.status).into()),
                None => return Err("a request was not answered in the worker's step".into()),
            }
        }
        Ok(())
    }
}

#[inline(never)]
fn warm_up(bench: &mut Bench) -> Outcome<()> {
    (0..WARM_UP.div_ceil(bench.depth)).try_for_each(|_| bench.round())
}

#[inline(never)]
fn counted(bench: &mut Bench, requests: u64) -> Outcome<()> {
    (0..requests.div_ceil(bench.depth)).try_for_each(|_| bench.round())
}
