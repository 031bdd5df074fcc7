//! A block device: a loop device on a file, where we may make one.

use std::process::Command;

use super::*;

/// A loop device that is taken down in the end.
struct Loop {
    device: String,
    backing: File,
    _scratch: Scratch,
}

impl Loop {
    /// A device of `size` bytes; `None`, loudly, where that is not possible.
    fn new(size: u64) -> Option<Self> {
        let scratch = Scratch::new(&std::env::temp_dir());
        let backing = OpenOptions::new().read(true).write(true).create_new(true).open(&scratch.0).unwrap();
        backing.set_len(size).unwrap();
        let made = Command::new("losetup").args(["--find", "--show"]).arg(&scratch.0).output();
        match made {
            Ok(made) if made.status.success() => {
                let device = String::from_utf8(made.stdout).unwrap().trim().to_owned();
                Some(Self { device, backing, _scratch: scratch })
            }
            Ok(made) => {
                eprintln!("SKIPPED loop device: {}", String::from_utf8_lossy(&made.stderr).trim());
                None
            }
            Err(error) => {
                eprintln!("SKIPPED loop device: losetup: {error}");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.device]).status();
    }
}

#[test]
fn a_block_device_reads_writes_discards_and_zeroes() {
    for way in WAYS {
        let Some(device) = Loop::new(8 << 20) else { return };
        let flags = if way.direct { libc::O_DIRECT } else { 0 };
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&device.device).unwrap();
        let options = FileOptions {
            method: way.method,
            direct: way.direct,
            memory_align: BLOCK,
            offset_align: BLOCK,
            block_device: true,
            inline: false,
        };
        let spec = match Spec::file(file.into(), options) {
            Ok(spec) => spec,
            Err(error) => {
                eprintln!("SKIPPED {way:?}: {error}");
                continue;
            }
        };
        let mut engine = spec.build().unwrap();
        let memory = AlignedBuffer::new(8 << 20, BLOCK).unwrap();
        let mut model = pattern(8 << 20, 21);
        fill(&memory, 0, &model);
        let whole = memory.run(0, 8 << 20);
        let write = operation(1, Kind::Write, 0, 8 << 20, &[whole]);
        assert_eq!(run(&mut engine, Operation { durable: true, ..write }).result, Ok(()), "{way:?}");
        let allocated = || {
            device.backing.sync_all().unwrap();
            device.backing.metadata().unwrap().blocks() * 512
        };
        let full = allocated();
        for (kind, at, durable) in [
            (Kind::WriteZeroes { unmap: false }, 1 << 20, false),
            (Kind::WriteZeroes { unmap: true }, 3 << 20, true),
            (Kind::Discard, 5 << 20, false),
            (Kind::Discard, 6 << 20, true),
        ] {
            let asked = Operation { durable, ..operation(1, kind, at, 1 << 20, &[]) };
            assert_eq!(run(&mut engine, asked).result, Ok(()), "{kind:?} {way:?}");
            model[at as usize..][..1 << 20].fill(0);
        }
        let left = allocated();
        assert!(left <= full - (3 << 20) + SLACK, "{way:?}: {left} of {full}");
        assert_eq!(run(&mut engine, operation(1, Kind::Flush, 0, 0, &[])).result, Ok(()));
        whole.zero();
        assert_eq!(run(&mut engine, operation(1, Kind::Read, 0, 8 << 20, &[whole])).result, Ok(()), "{way:?}");
        // A loop device discards by a hole in its file, which reads as zero.
        assert!(gather(&[whole]) == model, "{way:?}");
        let beyond = operation(1, Kind::Discard, 8 << 20, 1 << 20, &[]);
        assert_eq!(run(&mut engine, beyond).result, Err(libc::EINVAL), "{way:?}");
    }
}
