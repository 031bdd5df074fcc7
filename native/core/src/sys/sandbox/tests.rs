//! What a restricted process can no longer do, and still can: tried by a process of its own, for there is no way back.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::memory::IoVec;
use crate::sys::buffer::AlignedBuffer;
use crate::sys::eventfd::EventFd;
use crate::sys::{memfd, thread, uring};

const PLACE: &str = "VHOSTUSER_TEST_PLACE";

/// A directory of this test, empty.
fn place(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("vhostuser-{name}-{}", std::process::id()));
    fs::create_dir_all(&path).unwrap();
    path
}

/// Runs an ignored test of this file in a process of its own; it must pass.
fn pass_elsewhere(name: &str) {
    let place = place(name);
    let done = Command::new(std::env::current_exe().unwrap())
        .args([&format!("sys::sandbox::tests::{name}"), "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .env(PLACE, &place)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&done.stdout) + String::from_utf8_lossy(&done.stderr);
    fs::remove_dir_all(&place).unwrap();
    assert!(done.status.success() && said.contains("1 passed"), "{said}");
}

#[track_caller]
fn refused<T>(result: io::Result<T>, errno: i32) {
    let error = result.err().and_then(|error| error.raw_os_error());
    assert_eq!(error, Some(errno));
}

fn system(number: libc::c_long) -> io::Result<()> {
    // SAFETY: called for its refusal only; with these arguments none of them does anything.
    let result = unsafe { libc::syscall(number, -1_i64, 0_i64, 0_i64, 0_i64, 0_i64, 0_i64) };
    crate::sys::fd::check(result as libc::c_int).map(drop)
}

#[test]
fn no_file_is_opened_made_or_run_once_files_are_given_up() {
    pass_elsewhere("without_files");
}

#[test]
#[ignore = "started by the test above, in a process of its own"]
fn without_files() {
    let place = PathBuf::from(std::env::var_os(PLACE).unwrap());
    let (own, other) = (place.join("own"), place.join("other"));
    fs::create_dir(&own).unwrap();
    fs::create_dir(&other).unwrap();
    for name in ["own/a", "own/b", "other/a"] {
        fs::write(place.join(name), "x").unwrap();
    }
    let mut open = fs::OpenOptions::new().read(true).write(true).open(place.join("own/b")).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();

    refused(super::files(&[Path::new("/nowhere")]), libc::ENOENT);
    let confined = match super::files(&[&own]) {
        Err(error) => return eprintln!("SKIPPED: no Landlock: {error}"),
        Ok(confined) => confined,
    };
    // A thread made from now on is bound as well.
    std::thread::spawn(move || {
        refused(fs::read(own.join("a")), libc::EACCES);
        refused(fs::write(own.join("new"), ""), libc::EACCES);
        refused(fs::read_dir(&own), libc::EACCES);
        refused(fs::File::open("/dev/null"), libc::EACCES);
        refused(fs::create_dir(own.join("new")), libc::EACCES);
        refused(UnixListener::bind(own.join("socket")), libc::EACCES);
        refused(fs::rename(own.join("a"), other.join("b")), libc::EACCES);
        refused(Command::new("/bin/true").status(), libc::EACCES);
        refused(fs::remove_file(other.join("a")), libc::EACCES);
        fs::remove_file(own.join("a")).unwrap();
        if confined.tcp {
            refused(TcpStream::connect(address), libc::EACCES);
            refused(TcpListener::bind("127.0.0.1:0"), libc::EACCES);
        }
    })
    .join()
    .unwrap();
    open.write_all(b"still").unwrap();
    open.set_len(100).unwrap();
}

#[test]
fn no_call_but_those_of_serving_is_made_once_calls_are_given_up() {
    pass_elsewhere("without_calls");
}

#[test]
#[ignore = "started by the test above, in a process of its own"]
fn without_calls() {
    let (ready, is_ready) = std::sync::mpsc::channel();
    let (go, went) = std::sync::mpsc::channel::<()>();
    let mut zero = fs::File::open("/dev/zero").unwrap();
    let source = zero.try_clone().unwrap();
    // A worker as there is one per queue: made before, ring and all.
    let worker = thread::spawn("worker", move || {
        let mut ring = uring::Ring::new().map_err(|error| eprintln!("without io_uring: {error}")).ok();
        ready.send(()).unwrap();
        went.recv().unwrap();
        attempt();
        if let Some(ring) = &mut ring {
            let memory = AlignedBuffer::new(64, 64).unwrap();
            let runs: [IoVec; 1] = [memory.run(0, 64)];
            let request = uring::Request::Read { runs: &runs, offset: 0 };
            let prepared = ring.prepare(source.as_fd(), request, true);
            ring.start(prepared, 7_u32);
            while ring.take_finished().is_none_or(|found| {
                assert_eq!(found, (7, Ok(64)));
                false
            }) {
                ring.wait(None, &mut Vec::new()).unwrap();
            }
        }
    })
    .unwrap();
    is_ready.recv().unwrap();
    if let Err(error) = super::calls() {
        return eprintln!("SKIPPED: no seccomp: {error}");
    }
    go.send(()).unwrap();
    worker.join().unwrap();
    attempt();
    std::thread::spawn(attempt).join().unwrap();

    let mut bytes = [1; 8];
    zero.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, [0; 8]);
    let event = EventFd::new().unwrap();
    event.signal();
    assert!(event.drain());
    assert!(memfd::sealed(c"after", 4096, false).is_ok());
}

/// Everything that this thread must not do.
fn attempt() {
    refused(fs::File::open("/dev/null"), libc::EPERM);
    refused(fs::read_dir("/"), libc::EPERM);
    refused(UnixStream::pair(), libc::EPERM);
    refused(UnixStream::connect("/nowhere"), libc::EPERM);
    refused(TcpListener::bind("127.0.0.1:0"), libc::EPERM);
    refused(Command::new("/bin/true").status(), libc::EPERM);
    refused(uring::probe(), libc::EPERM);
    // SAFETY: it fails in this process, which is what is tested; a child would end at once.
    refused(crate::sys::fd::check(unsafe { libc::fork() }), libc::EPERM);
    let calls = [
        libc::SYS_execve,
        libc::SYS_connect,
        libc::SYS_bind,
        libc::SYS_ptrace,
        libc::SYS_bpf,
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_register,
        libc::SYS_keyctl,
        libc::SYS_mount,
        libc::SYS_seccomp,
    ];
    for number in calls {
        refused(system(number), libc::EPERM);
    }
    // SAFETY: makes a mapping that nobody uses, or fails.
    let page = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ | libc::PROT_EXEC, flags, -1, 0)
    };
    assert_eq!(page, libc::MAP_FAILED, "memory to execute");
}

#[test]
fn a_thread_hears_of_the_restrictions_by_its_status() {
    pass_elsewhere("status");
}

#[test]
#[ignore = "started by the test above, in a process of its own"]
fn status() {
    let (go, went) = std::sync::mpsc::channel::<()>();
    let mut status = fs::File::open("/proc/self/status").unwrap();
    let (told, tells) = std::sync::mpsc::channel();
    let other = std::thread::spawn(move || {
        told.send(fs::File::open("/proc/thread-self/status").unwrap()).unwrap();
        let _ = went.recv();
    });
    let mut other_status = tells.recv_timeout(Duration::from_secs(30)).unwrap();
    if let Err(error) = super::calls() {
        return eprintln!("SKIPPED: no seccomp: {error}");
    }
    for file in [&mut status, &mut other_status] {
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert!(text.contains("NoNewPrivs:\t1") && text.contains("Seccomp:\t2"), "{}: {text}", file.as_raw_fd());
    }
    drop(go);
    other.join().unwrap();
}
