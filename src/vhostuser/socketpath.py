"""What a socket's path names, and the file behind it. Touches that file, and probes whether somebody listens there."""

from __future__ import annotations

import errno
import grp
import os
import socket
import stat
from typing import Final

from vhostuser.errors import OperatorError, UsageError
from vhostuser.fds import Fd

MAX_PATH: Final = 107
"""The longest socket path, in bytes: sun_path less its terminating zero."""


def address(path: str) -> str:
    """Return the address that ``path`` names. Raises `UsageError` when there can be none."""
    length = len(os.fsencode(path))
    if length > MAX_PATH:
        raise UsageError(path, f"socket paths have at most {MAX_PATH} bytes, not {length}", "Choose a shorter path")
    if not path or path == "@" or "\0" in path:
        raise UsageError(repr(path), "this cannot be a socket path", "Give a path, or @name for an abstract socket")
    return f"\0{path[1:]}" if path.startswith("@") else path


def written(name: str | bytes) -> str:
    """Return ``name``, a path or what a socket says its name is, as a person writes it: absolute, or with an ``@``.

    Empty when a socket has no name.
    """
    if isinstance(name, bytes):
        return "@" + os.fsdecode(name[1:]) if name else ""
    return name if not name or name.startswith("@") else os.path.abspath(name)


def refuse_occupied(path: str) -> None:
    """Raise `OperatorError` unless ``path`` is free or a socket on which nobody listens any more."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OperatorError(path, os.strerror(error.errno or 0), "Choose another path") from error
    if not stat.S_ISSOCK(found.st_mode):
        raise OperatorError(path, "there is a file that is no socket", "Remove it, or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(path)
    if code in (errno.EACCES, errno.EPERM):
        cause = "it is another user's socket and may be in use"
        raise OperatorError(path, cause, "Remove it if nothing uses it, or choose another path")
    if code not in (errno.ECONNREFUSED, errno.ENOENT):  # a full queue is a sign of life, too
        raise OperatorError(path, "another program listens on it", "Stop that program, or choose another path")


def connect_advice(error: OSError) -> tuple[str, str]:
    """Return why a connection failed, and what to do."""
    match error.errno:
        case errno.ENOENT:
            return "there is no such socket", "Start the back-end first, or correct the path"
        case errno.ECONNREFUSED:
            return "nobody listens on it", "Start the back-end first"
        case errno.EACCES | errno.EPERM:
            return "permission denied", "Run as a user who may write to the socket, or widen its mode"
        case errno.EPROTOTYPE | errno.ENOTSOCK:
            return "it is not a stream socket", "Correct the path"
    return os.strerror(error.errno or 0), "Check the path"


def bind(sock: socket.socket, path: str) -> None:
    """Bind to ``path``, which may be longer than an address: the directory is then named by a descriptor."""
    if len(os.fsencode(path)) <= MAX_PATH:
        sock.bind(path)
        return
    directory, name = os.path.split(path)
    with Fd(os.open(directory or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as at:
        sock.bind(f"/proc/self/fd/{at.fileno()}/{name}")


def gid(group: str | int | None) -> int | None:
    """Return the number of a group. Raises `UsageError` when there is none of that name."""
    if group is None or isinstance(group, int):
        return group
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError as error:
        if group.isdecimal():
            return int(group)
        raise UsageError(f"group {group}", "there is no such group", "Give the name or number of a group") from error


def identity(path: str) -> tuple[int, int] | None:
    """Return device and inode of the file at ``path`` itself, or None."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
