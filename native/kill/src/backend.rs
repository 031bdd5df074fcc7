//! The back-end's process, seen from the driver: started, waited for, killed.

use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// SIGKILL.
const KILLED: i32 = 9;

/// How a back-end ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// By SIGKILL, ours or its own.
    Killed,
    /// In another way, with what it said.
    Otherwise(String),
}

/// A running back-end; killed when dropped.
#[derive(Debug)]
pub(crate) struct Backend(Child);

impl Backend {
    /// Starts one with `words`; `step` is the point at which it kills itself.
    pub(crate) fn start(words: &[String], step: Option<&str>) -> io::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("serve").args(words).arg(format!("parent={}", std::process::id()));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        match step {
            Some(step) => command.env("VHOSTUSER_STEP", step),
            None => command.env_remove("VHOSTUSER_STEP"),
        };
        command.spawn().map(Self)
    }

    /// Becomes readable when the process ends: it never writes there.
    pub(crate) fn end_fd(&self) -> i32 {
        self.0.stdout.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }

    /// Kills it.
    pub(crate) fn signal(&mut self) -> io::Result<()> {
        self.0.kill()
    }

    /// Waits for its end. Requests that the kernel carries out for it may last longer.
    pub(crate) fn wait(&mut self) -> io::Result<End> {
        let status = self.0.wait()?;
        if status.signal() == Some(KILLED) {
            return Ok(End::Killed);
        }
        let mut said = String::new();
        if let Some(stderr) = &mut self.0.stderr {
            stderr.read_to_string(&mut said)?;
        }
        Ok(End::Otherwise(format!("{status}: {}", said.trim())))
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An image of `len` zero bytes.
pub(crate) fn make_image(path: &Path, len: usize) -> io::Result<()> {
    std::fs::write(path, vec![0; len])
}
