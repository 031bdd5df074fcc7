//! `rust-vmm-blk --socket PATH --image PATH [--queues N] [--ready PATH] [--without FEATURE]...`
//!
//! A plain virtio disk over a file, with whatever the rust-vmm crates make of the vhost-user protocol. It serves one
//! connection after the other, and says on its standard output how each one ended. Once it listens it writes a line to
//! what `--ready` names. `FEATURE` is a protocol feature not to offer: `mem-slots` or `mq` (the crates always
//! offer `reply-ack`).

mod device;
mod disk;

use std::fs::OpenOptions;
use std::io::{stdout, Write};
use std::process::ExitCode;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use device::Device;
use disk::Disk;

struct Options {
    socket: String,
    image: String,
    ready: Option<String>,
    num_queues: usize,
    features: VhostUserProtocolFeatures,
}

impl Options {
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Options, String> {
        let (mut socket, mut image, mut ready, mut num_queues) = (None, None, None, 1);
        let mut features = VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        while let Some(name) = words.next() {
            let value = words.next().ok_or_else(|| format!("{name}: it needs a value"))?;
            match name.as_str() {
                "--socket" => socket = Some(value),
                "--image" => image = Some(value),
                "--ready" => ready = Some(value),
                "--queues" => {
                    num_queues = value.parse().map_err(|_| format!("--queues: {value} is no number"))?;
                }
                "--without" => {
                    features.remove(match value.as_str() {
                        "mem-slots" => VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS,
                        "mq" => VhostUserProtocolFeatures::MQ,
                        _ => return Err(format!("--without: {value} is no feature to leave out")),
                    });
                }
                _ => return Err(format!("{name}: there is no such option")),
            }
        }
        let socket = socket.ok_or("--socket is missing")?;
        let image = image.ok_or("--image is missing")?;
        if !(1..=64).contains(&num_queues) {
            return Err("--queues: 1 to 64".to_string());
        }
        Ok(Options { socket, image, ready, num_queues, features })
    }
}

fn say(line: &str) {
    let mut output = stdout().lock();
    let _ = writeln!(output, "{line}").and_then(|()| output.flush());
}

fn serve(options: &Options) -> Result<(), String> {
    let file = OpenOptions::new().read(true).write(true).open(&options.image);
    let disk = file.and_then(Disk::new).map_err(|error| format!("{}: {error}", options.image))?;
    let disk = Arc::new(disk);
    let mut listener = Listener::new(&options.socket, true).map_err(|error| error.to_string())?;
    if let Some(path) = &options.ready {
        std::fs::write(path, "listening\n").map_err(|error| format!("{path}: {error}"))?;
    }
    loop {
        // The crate's handler refuses a second SET_OWNER: each connection gets a device of its own.
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let device = Arc::new(Device::new(disk.clone(), options.num_queues, options.features));
        let mut daemon = VhostUserDaemon::new("vhost-user".to_string(), device.clone(), memory)
            .map_err(|error| error.to_string())?;
        daemon.start(&mut listener).map_err(|error| error.to_string())?;
        match daemon.wait() {
            Ok(()) => say("connection ended: closed"),
            Err(error) => say(&format!("connection ended: {error}")),
        }
        device.end_workers();
    }
}

fn main() -> ExitCode {
    match Options::parse(std::env::args().skip(1)).and_then(|options| serve(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rust-vmm-blk: {error}");
            ExitCode::FAILURE
        }
    }
}
