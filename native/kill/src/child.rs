//! The back-end: a process that serves rings it knows from its arguments and its inherited descriptors, until it is killed.

use std::fs::OpenOptions;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::parent_id;
use std::sync::Arc;
use std::time::Duration;

use vhostuser_core::blk::{BlkServe, BlkShared, Limits};
use vhostuser_core::disk::{AnyEngine, Engine, Faults, FileOptions, Kind, Method, Spec};
use vhostuser_core::memory::inflight::Format;
use vhostuser_core::memory::{GuestMemory, InflightRegion, RegionSpec};
use vhostuser_core::ring::RingSetup;
use vhostuser_core::sys::buffer::AlignedBuffer;
use vhostuser_core::sys::{eventfd, fd, process};
use vhostuser_core::worker::{Events, Notifiers, Queues};

use crate::shape::{Shape, Storage, Words, BASE, SECTORS};

/// What O_DIRECT demands, at most.
const DIRECT_ALIGN: usize = 512;
const LIMIT: Duration = Duration::from_secs(20);

/// Serves until something goes wrong, and says what; being killed is all that is meant to end it.
pub(crate) fn serve(words: &Words) -> Result<std::convert::Infallible, String> {
    process::die_with_parent().map_err(|error| format!("prctl: {error}"))?;
    if parent_id() != words.get::<u32>("parent")? {
        return Err("the driver has ended".into());
    }
    let shape = Shape::of(words)?;
    let image: String = words.get("image")?;
    let storage = open(&image, shape, words.get::<u8>("fence")? != 0)?;
    let spec = with_delay(storage, shape, words.get("seed")?).map_err(|error| format!("{image}: {error}"))?;

    let limits = Limits {
        num_sectors: SECTORS as u64,
        block_size: 512,
        read_only: false,
        max_discard_sectors: 1024,
        max_discard_seg: 1,
        max_write_zeroes_sectors: 1024,
        max_write_zeroes_seg: 1,
    };
    let shared = Arc::new(BlkShared::new(limits, true, b"killed"));
    let events = Arc::new(Events::new().map_err(|error| error.to_string())?);
    let make = {
        let events = Arc::clone(&events);
        move |_, waker| {
            let mut engine = spec.build()?;
            if shape.storage == Storage::Mapped {
                warm_up(&mut engine)?;
            }
            Ok(BlkServe::new(Arc::clone(&shared), engine, Arc::clone(&events), waker))
        }
    };
    let mut queues = Queues::new(shape.queues, shape.queues, Duration::ZERO, Arc::clone(&events), make)
        .map_err(|error| format!("the workers do not start: {error}"))?;

    let arena = inherited(words, "arena")?;
    let region = RegionSpec { guest_addr: BASE, size: shape.len() as u64, user_addr: BASE, mmap_offset: 0 };
    let memory = GuestMemory::new([(region, arena.as_fd())]).map_err(|error| error.to_string())?;
    queues.set_memory(Arc::new(memory), LIMIT).map_err(|error| error.to_string())?;

    let inflight = inherited(words, "inflight")?;
    let size = Format::Split.stride(shape.size) * u64::from(shape.queues);
    let inflight = InflightRegion::map(inflight.as_fd(), 0, size, Format::Split, shape.queues, shape.size)
        .map_err(|error| error.to_string())?;
    for index in 0..shape.queues {
        let (desc, avail, used) = shape.layout(index).areas();
        let setup = RingSetup {
            size: shape.size,
            desc: BASE + desc as u64,
            avail: BASE + avail as u64,
            used: BASE + used as u64,
            base: words.get(&format!("base{index}"))?,
            features: shape.features(),
        };
        let notifiers = Notifiers {
            kick: Some(inherited(words, &format!("kick{index}"))?),
            call: Some(inherited(words, &format!("call{index}"))?),
            err: None,
        };
        queues.start(index, setup, true, notifiers, Some(&inflight)).map_err(|error| error.to_string())?;
    }
    loop {
        eventfd::poll_readable(events.fd(), None).map_err(|error| error.to_string())?;
        if let Some(event) = events.take().first() {
            return Err(format!("{:?}, queue {:?}: {}", event.kind, event.index, event.reason));
        }
    }
}

fn inherited(words: &Words, name: &str) -> Result<OwnedFd, String> {
    let number: RawFd = words.get(name)?;
    fd::duplicate(number).map_err(|error| format!("{name}={number}: {error}"))
}

/// The image, once nobody else has it: a predecessor has it until its last operation has ended.
fn open(path: &str, shape: Shape, fence: bool) -> Result<Spec, String> {
    let direct = shape.storage == Storage::Direct;
    let flags = if direct { process::O_DIRECT } else { 0 };
    let say = |error: std::io::Error| format!("{path}: {error}");
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).map_err(say)?;
    if fence {
        process::lock_file(file.as_raw_fd()).map_err(say)?;
    }
    let method = if shape.storage == Storage::Syscalls { Method::Syscalls } else { Method::IoUring };
    let align = if direct { DIRECT_ALIGN } else { 0 };
    let options = FileOptions {
        method,
        direct,
        memory_align: align,
        offset_align: align,
        block_device: false,
        inline: matches!(shape.storage, Storage::Inline | Storage::Mapped),
    };
    Spec::file(file.into(), options).map_err(say)
}

/// Reads until the engine copies without system calls.
fn warm_up(engine: &mut AnyEngine) -> std::io::Result<()> {
    let room = AlignedBuffer::new(4096, 4096)?;
    for _ in 0..256 {
        engine.move_now(Kind::Read, 0, false, &[room.run(0, 4096)]);
    }
    Ok(())
}

fn with_delay(spec: Spec, shape: Shape, seed: u64) -> std::io::Result<Spec> {
    if shape.delay.is_zero() {
        return Ok(spec);
    }
    let faults = Faults {
        delay_read: shape.delay,
        delay_write: shape.delay,
        delay_flush: shape.delay,
        seed,
        ..Faults::default()
    };
    spec.with_faults(faults)
}
