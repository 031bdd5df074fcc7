"""A disk in a file or on a block device. Touches that file, and what the kernel says about it."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import ExitStack
from dataclasses import replace
from typing import Final

from vhostuser._native import EngineSpec
from vhostuser.disks import storage
from vhostuser.disks.custody import Custody, Holding, Takeover
from vhostuser.disks.disk import MAX_SEGMENT, SECTOR, Capability, Limits, NativeDisk
from vhostuser.disks.locks import QUIET_S, Patience, lock_image
from vhostuser.errors import OperatorError, UsageError
from vhostuser.fds import Fd

CACHES: Final = ("writeback", "writethrough", "none")
ENGINES: Final = ("auto", "io_uring", "syscalls")
MAX_WRITTEN_ZEROES: Final = 16 << 20
"""The longest zero segment, in bytes, where the kernel has to write the zeroes."""

ELSEWHERE: Final = 1 << 40
"""So far behind the end of an image that another server may be resizing just now, nothing of it can be hit."""


class FileDisk(NativeDisk):
    """The bytes of a regular file or of a block device, moved by io_uring or by plain system calls."""

    def __init__(
        self, path: str | os.PathLike[str], *, read_only: bool = False, cache: str = "writeback",
        engine: str = "auto", lock: bool = True, lock_timeout_s: float = QUIET_S, place: str = "",
        incoming: bool = False,
    ) -> None:  # fmt: skip
        """Open and lock the storage, and ask the kernel what it can do.

        ``cache``: "writeback" lets the guest find its write cache on, "writethrough" off; "none" goes around the page
        cache of the host (O_DIRECT) with the write cache on. ``engine``: "io_uring", "syscalls", or "auto" for the
        first that the kernel allows. ``lock=False`` neither locks a file nor opens a block device exclusively.
        ``lock_timeout_s``: how long to wait for another program to let go of it, blocking. ``place``: what it is served
        on, if anything; among readers, who share an image, those of one place follow each other. ``incoming``: another
        server may have the storage until `activate`; who only reads has nothing to wait for.
        Raises `UsageError` for an unknown mode and `OperatorError` when the storage cannot be served so.
        """
        if cache not in CACHES or engine not in ENGINES:
            raise UsageError(
                f"disk {os.fspath(path)}", f"cache {cache!r} or engine {engine!r} is unknown", "Name another"
            )
        self._path = os.fspath(path)
        self._direct = cache == "none"
        self.writeback = cache != "writethrough"
        self._is_device = self._kind()
        self.fenced = lock
        patience = Patience(self._path, lock_timeout_s)
        self._incoming = incoming and lock and not read_only
        self._custody: Custody | None = None
        with ExitStack() as undo:
            self._fd = undo.enter_context(self._open(read_only, lock, patience))
            self._flushed = Fd(os.open(f"/proc/self/fd/{self._fd.fileno()}", os.O_RDONLY | os.O_CLOEXEC))
            undo.callback(self._flushed.close)
            if lock and read_only:
                lock_image(self._fd.fileno(), self._path, writable=False, patience=patience, place=place)
            elif lock:
                self._custody = Custody(
                    self._fd.fileno(), self._path, incoming=self._incoming, patience=patience,
                    timeout_s=lock_timeout_s, place=place, flush=self.flush,
                )  # fmt: skip
            self._limits = self._find_limits()
            self.capabilities = self._find_capabilities(read_only)
            self._engine: EngineSpec | None = self._make_engine(engine)
            undo.pop_all()

    @property
    def name(self) -> str:
        """The path it was opened by."""
        return self._path

    @property
    def limits(self) -> Limits:
        """What the kernel said when the disk was opened, with the size it had when it was last looked at."""
        return self._limits

    @property
    def is_block_device(self) -> bool:
        """Whether the storage is a block device."""
        return self._is_device

    def engine(self) -> EngineSpec:
        """The engine that was asked for. Raises `ValueError` when the disk is closed."""
        if self._engine is None:
            raise ValueError(f"{self._path} is closed")
        return self._engine

    def flush(self) -> None:
        """Put everything written so far on stable storage.

        Uses an open file description of its own: an error is told once to each, and one told here must not be missing
        where the guest's next FLUSH looks for it. It is open from the beginning, for nothing can be opened later in a
        sandbox.
        """
        os.fdatasync(self._flushed.fileno())

    def refresh(self) -> int:
        """Ask for the size again, in bytes; a file or volume may have been resized by someone else."""
        return self._sized(self._size())

    def resize(self, size: int) -> None:
        """Truncate or extend the file to ``size`` bytes; new bytes read as zeroes and take no space yet.

        Raises `UsageError` for a block device and for a disk opened read-only, `OSError` when the file system refuses.
        """
        if Capability.WRITE not in self.capabilities:
            raise UsageError(
                self._path, "it is served read-only and keeps its size", "Resize the file yourself, then refresh"
            )
        if self.holding is not Holding.HELD:
            raise UsageError(
                self._path, "another server has it while it is handed over", "Resize it there, or wait for it"
            )
        if self._is_device:
            raise UsageError(
                self._path, "a block device is not resized by us", "Resize the volume with its own tools, then refresh"
            )
        if size < SECTOR:
            raise UsageError(self._path, f"{size} bytes are less than one sector", "Give a larger size")
        os.ftruncate(self._fd.fileno(), size)
        self._sized(size)

    @property
    def holding(self) -> Holding:
        """Whose the image is; ours where nothing is locked."""
        return self._custody.holding if self._custody is not None else Holding.HELD

    def activate(self) -> Takeover | None:
        """Take the locks of the image unless we have them. Raises `OperatorError` when they are not to be had in the
        time that was given when it was opened."""
        return self._custody.take() if self._custody is not None else None

    def deactivate(self, *, unused: bool = False) -> None:
        """Flush and drop the locks if another server waits for the image; keep it when it cannot be flushed."""
        if self._custody is not None:
            self._custody.give(unused=unused)

    def look_for_heir(self) -> bool:
        """`deactivate` again, if it is not used."""
        return self._custody is not None and self._custody.look()

    def note_write_cache(self, *, on: bool) -> None:
        """Lock the byte that says that the cache is off, or unlock it."""
        if self._custody is not None:
            self._custody.note_cache(off=not on)

    def close(self) -> None:
        """Close our descriptor. Queues made from the engine have duplicates: the lock lasts until they are closed and
        their last request has ended."""
        self._engine = None
        self._flushed.close()
        self._fd.close()

    def _kind(self) -> bool:
        try:
            mode = os.stat(self._path).st_mode
        except OSError as error:
            raise self._unopened(error, read_only=True) from error
        if stat.S_ISBLK(mode) or stat.S_ISREG(mode):
            return stat.S_ISBLK(mode)
        what = "a directory" if stat.S_ISDIR(mode) else "neither a file nor a block device"
        raise OperatorError(self._path, f"it is {what}", "Name an image file or a block device")

    def _open(self, read_only: bool, lock: bool, patience: Patience) -> Fd:
        # Nobody wants to know when a disk was read last, and each read would look whether to note it.
        flags = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOATIME | (os.O_RDONLY if read_only else os.O_RDWR)
        flags |= os.O_DIRECT if self._direct else 0
        flags |= os.O_EXCL if self._is_device and lock else 0
        while True:
            try:
                fd = Fd(os.open(self._path, flags))
                break
            except OSError as error:
                if error.errno == errno.EPERM and flags & os.O_NOATIME:  # only for the owner of the file
                    flags &= ~os.O_NOATIME
                    continue
                # A block device stays busy until the last request of a killed predecessor has ended.
                if (
                    error.errno == errno.EBUSY
                    and not self._incoming
                    and patience.lasts("another program or the host itself uses the device")
                ):
                    continue
                raise self._unopened(error, read_only=read_only) from error
        if self._is_device and not read_only and storage.block_device_number(fd.fileno(), storage.BLKROGET):
            fd.close()
            raise self._unopened(OSError(errno.EROFS, os.strerror(errno.EROFS)), read_only=False)
        os.set_blocking(fd.fileno(), True)
        return fd

    def _unopened(self, error: OSError, *, read_only: bool) -> OperatorError:
        cause = f"cannot be opened: {os.strerror(error.errno or 0)}"
        if error.errno == errno.EBUSY and self._incoming:
            cause = "it is in use on this host, and a block device is handed over to another host only"
            advice = "Serve a file instead, or both servers without locking (--no-lock) if you know what you do"
        elif error.errno == errno.EBUSY:
            advice = "Something uses this device: unmount it, or stop the other program"
        elif error.errno == errno.EINVAL and self._direct:
            cause, advice = "its file system has no direct I/O", "Use another mode than --cache none"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ETXTBSY) and not read_only:
            advice = "Serve it read-only (--read-only), or make it writable for this user"
        elif error.errno == errno.ENOENT:
            advice = "Check the name, or create the image first"
        else:
            advice = "Check the name and its permissions"
        return OperatorError(self._path, cause, advice)

    def _size(self) -> int:
        if self._is_device:
            return storage.block_device_size(self._fd.fileno())
        return os.fstat(self._fd.fileno()).st_size

    def _sized(self, size: int) -> int:
        self._limits = replace(self._limits, size=size)
        return size

    def _find_limits(self) -> Limits:
        fd, size = self._fd.fileno(), self._size()
        self._alignment = storage.direct_alignment(fd) if self._direct else (1, 1)
        block = max(SECTOR, self._alignment[1])
        if self._is_device:
            logical = max(block, storage.block_device_number(fd, storage.BLKSSZGET))
            zeroes = storage.queue_number(fd, "write_zeroes_max_bytes") or 0
            return Limits(
                size=size,
                block_size=logical,
                physical_block_size=max(logical, storage.block_device_number(fd, storage.BLKPBSZGET)),
                min_io_size=storage.block_device_number(fd, storage.BLKIOMIN),
                opt_io_size=storage.block_device_number(fd, storage.BLKIOOPT),
                discard_alignment=max(logical, storage.queue_number(fd, "discard_granularity") or 0),
                max_write_zeroes=MAX_SEGMENT if zeroes else MAX_WRITTEN_ZEROES,
                write_zeroes_may_unmap=zeroes > 0,
            )
        unit = os.fstat(fd).st_blksize
        unit = max(block, unit if unit <= 65536 and unit & (unit - 1) == 0 else 4096)
        return Limits(size=size, block_size=block, physical_block_size=unit, discard_alignment=unit)

    def _find_capabilities(self, read_only: bool) -> Capability:
        able = Capability.FLUSH
        fd = self._fd.fileno()
        if read_only:
            return able
        able |= Capability.WRITE | Capability.WRITE_ZEROES  # zeroes are written where nothing else is possible
        if self._is_device:
            return able | Capability.DISCARD if storage.queue_number(fd, "discard_max_bytes") else able
        able |= Capability.RESIZE
        zeroes = MAX_SEGMENT if storage.can_zero_ranges(self._path) else MAX_WRITTEN_ZEROES
        punches = storage.can_punch_holes(fd, beyond=ELSEWHERE if self._incoming else 0)
        self._limits = replace(self._limits, max_write_zeroes=zeroes, write_zeroes_may_unmap=punches)
        return able | Capability.DISCARD if punches else able

    def _make_engine(self, engine: str) -> EngineSpec:
        memory, offset = self._alignment
        try:
            return EngineSpec.file(
                self._fd.fileno(), engine=engine, direct=self._direct, memory_align=memory, offset_align=offset,
                block_device=self._is_device,
            )  # fmt: skip
        except OSError as error:
            raise OperatorError(
                self._path, f"the {engine} engine does not start: {error.strerror}", "Use --engine syscalls or auto"
            ) from error
