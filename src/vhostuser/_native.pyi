"""The seam between Python and the native core: setups go in, facts come back.

Every descriptor handed over is duplicated; the caller keeps and closes its own. Calls that may wait say so
and let other Python threads run. Rust errors arrive as the classes of `vhostuser.errors` or as `OSError`.
"""

from collections.abc import Sequence
from typing import Self, final

RegionTuple = tuple[int, int, int, int, int]
"""(guest_addr, size, user_addr, mmap_offset, fd), as in the payload of SET_MEM_TABLE."""

@final
class GuestMemory:
    """An immutable table of mapped guest memory regions.

    Regions may have any alignment and offset. Raises `GuestMemoryError` for a table that overlaps in guest
    or user addresses, wraps around, is empty in size, has more than 512 regions, or whose file is shorter than
    the region or cannot be mapped shared. Unmapped when the last user (ring, operation, view) has let go.
    """

    def __new__(cls, regions: Sequence[RegionTuple] = ()) -> Self: ...
    def add(self, region: RegionTuple) -> GuestMemory:
        """The table with one more region; this one stays as it is."""

    def remove(self, guest_addr: int, size: int, user_addr: int) -> GuestMemory:
        """The table without that region. Raises `GuestMemoryError` when there is none."""

    @property
    def regions(self) -> tuple[tuple[int, int, int, int], ...]:
        """(guest_addr, size, user_addr, mmap_offset) by rising guest address."""

    @property
    def poisoned(self) -> bool:
        """True once the peer truncated a file behind this table: its pages were replaced by zeroes."""

    def read(self, guest_addr: int, length: int) -> bytes:
        """A copy of guest memory. Raises `GuestMemoryError` when any byte is outside of the table."""

    def write(self, guest_addr: int, data: bytes) -> None:
        """Stores into guest memory, all or nothing."""

@final
class DirtyLog:
    """A bitmap of written pages (vhost-user: Migration), mapped: bit `n % 8` of byte `n // 8` is the page at guest
    address `4096 * n`.

    `size` bytes of `fd` from `offset` on. Raises `GuestMemoryError` when the file is too short or cannot be mapped.
    """

    def __new__(cls, fd: int, *, offset: int, size: int) -> Self: ...
    @staticmethod
    def create(size: int) -> DirtyLog:
        """A log of `size` zero bytes in a sealed memfd of its own."""

    @property
    def fd(self) -> int:
        """Owned by this object."""

    @property
    def offset(self) -> int: ...
    @property
    def size(self) -> int: ...
    def take(self) -> bytes:
        """All bits, each cleared in the moment it is read, so that none that is set meanwhile is lost."""

@final
class InflightRegion:
    """The shared memory of in-flight tracking for split rings (vhost-user: Inflight I/O tracking), mapped.

    `size` bytes of `fd` from `offset` on; parts for `num_queues` queues of up to `queue_size` entries, each of
    16 * (queue_size + 1) bytes rounded up to 64. Raises `SetupError` for numbers that make no sense or do not fit,
    `GuestMemoryError` when the file is too short or cannot be mapped.
    """

    def __new__(cls, fd: int, *, offset: int, size: int, num_queues: int, queue_size: int) -> Self: ...
    @staticmethod
    def create(num_queues: int, queue_size: int, *, spare: int = 0) -> InflightRegion:
        """A region of zeroes in a sealed memfd of its own: version 0, which says that nobody has used it. The file has
        `spare` bytes more, right behind the region."""

    @property
    def fd(self) -> int:
        """Owned by this object."""

    @property
    def offset(self) -> int: ...
    @property
    def size(self) -> int:
        """Bytes that are used, from `offset` on."""

    @property
    def num_queues(self) -> int: ...
    @property
    def queue_size(self) -> int: ...

@final
class EngineSpec:
    """How a disk reaches its storage natively. One engine is made from it per worker."""

    @staticmethod
    def file(
        fd: int,
        *,
        engine: str = "auto",
        direct: bool = False,
        memory_align: int = 1,
        offset_align: int = 1,
        block_device: bool = False,
    ) -> EngineSpec:
        """A file or block device. `engine` is "io_uring", "syscalls" or "auto" (io_uring unless the kernel refuses it).

        `direct`: the descriptor was opened with O_DIRECT; `memory_align` and `offset_align` are what it demands,
        in bytes. `block_device`: discard and zero by BLKDISCARD and BLKZEROOUT. Raises `OSError` when
        "io_uring" was demanded and the kernel refuses it.
        """

    @staticmethod
    def memory(size: int) -> EngineSpec:
        """`size` bytes of zeroes in this process; pages are taken when written."""

    @staticmethod
    def null() -> EngineSpec:
        """Reads leave the buffers as they are, everything else succeeds at once."""

    def with_faults(
        self,
        *,
        delay_read_s: float = 0.0,
        delay_write_s: float = 0.0,
        delay_flush_s: float = 0.0,
        error_read: float = 0.0,
        error_write: float = 0.0,
        error_flush: float = 0.0,
        errno: int = 5,
        error_limit: int | None = None,
        seed: int = 0,
    ) -> EngineSpec:
        """The same storage made slow and unreliable on purpose.

        Each request is held for 0.5 to 1.5 times its delay, so that requests end out of order; `error_*` is the share
        of requests, 0..1, that fail with `errno` (a failed write stores nothing), until `error_limit` of them have.
        Discards and zeroes count as writes. Raises `OSError` for numbers that make no sense.
        """

    def resize(self, size: int) -> None:
        """Memory only: makes room for `size` bytes (what is cut off reads as zeroes when grown again)."""

    @property
    def name(self) -> str:
        """The engine that will run: "io_uring", "syscalls", "memory" or "null"."""

@final
class Event:
    """Something a worker wants its session to know."""

    kind: str
    """One of "ring_broken", "memory_lost", "flush_failed", "request_held", "request_retried", "requests_settled",
    "worker_failed"."""
    index: int | None
    """The ring concerned."""
    reason: str

@final
class InFlight:
    """A request that was taken and not answered."""

    queue: int
    head: int
    kind: str
    """One of "read", "write", "flush", "discard", "write_zeroes", "get_id", "other"."""
    sector: int
    """Where on the disk, in units of 512 bytes; of several ranges the first."""
    bytes: int
    age_us: int
    """Microseconds since it was taken."""
    state: str
    """One of "storage", "held", "retrying"."""
    errno: int
    """What storage said when it failed last; 0 for a request that has not failed."""

class Queues:
    """The rings of one device and the workers that serve them. Used from one thread (the session's), unless noted.

    Not made directly: `BlockQueues` and `ChainQueues` are."""

    @property
    def num_queues(self) -> int: ...
    def set_memory(self, memory: GuestMemory, timeout_s: float = 30.0) -> None:
        """Changes the memory under all rings. Waits until no operation uses the old one; started rings are
        looked up again and one that lies outside is broken. Requests that storage failed and that are kept are answered
        with an error after `timeout_s`. Raises `DrainTimeout`."""

    def start(
        self,
        index: int,
        *,
        size: int,
        desc: int,
        used: int,
        avail: int,
        base: int,
        features: int,
        enabled: bool,
        kick: int | None = None,
        call: int | None = None,
        err: int | None = None,
        inflight: InflightRegion | None = None,
    ) -> None:
        """Starts ring `index`; `desc`, `used` and `avail` are user addresses (VringAddr), `features` the negotiated
        bits.

        With `inflight` its part `index` keeps what is in flight. One that was used before says where to go on, whatever
        `base` is, and what a predecessor took and did not answer is served first; when it belongs to another ring, this
        one starts broken and an event says why.

        The ring is looked at once at once. No `kick` means that it is polled. Raises `SetupError` (which says what is
        wrong: size, alignment, outside of memory, already started, unfit descriptor) and leaves the ring stopped.
        """

    def stop(
        self, index: int, timeout_s: float = 30.0, *, leave: bool = False, kept_timeout_s: float | None = None
    ) -> int:
        """Stops ring `index` and returns its next available index. Waits until every taken chain is used; with `leave`
        what storage has not been given yet, or has failed and is kept, stays in the in-flight region instead, for
        whoever serves the ring next. Requests that are kept are answered with an error after `kept_timeout_s`
        (`timeout_s` when None). A broken ring answers its base. Raises `DrainTimeout`, `SetupError` when it was not
        started."""

    def set_log(self, log: DirtyLog | None, *, data: bool, notify: int | None = None, timeout_s: float = 30.0) -> None:
        """Notes what is written to guest memory in `log` from now on: used rings as `set_log_used` says, with `data`
        (VHOST_F_LOG_ALL) all that chains let the device write, too. Nothing goes into the log before once this has
        returned. The descriptor `notify` is signalled after something was noted. Waits for operations when `log` has no
        bits for pages they may write. Raises `DrainTimeout`, and `SetupError` for a log that ends before a used ring.
        """

    def set_log_used(self, index: int, guest_addr: int | None) -> None:
        """Where the used ring of queue `index` is for the dirty log (VHOST_VRING_F_LOG); None: it is not noted. Before
        the ring starts, or while it runs. Raises `SetupError` when the log ends before it."""

    def enable(self, index: int, enabled: bool) -> None:
        """Lets a started ring run or rest. After disabling nothing more is taken; what was taken still completes.
        The ring is looked at once after enabling."""

    def set_kick(self, index: int, fd: int | None) -> None:
        """Replaces the kick descriptor of a started ring and looks at it once."""

    def set_call(self, index: int, fd: int | None) -> None:
        """Replaces the call descriptor of a started ring, without waiting, and signals the new one once."""

    def set_err(self, index: int, fd: int | None) -> None: ...
    @property
    def events_fd(self) -> int:
        """Readable while `take_events` has something; owned by this object."""

    def take_events(self) -> list[Event]: ...
    def stats(self) -> list[dict[str, int]]:
        """One dictionary per queue, from any thread, stopping nothing: see `docs/operate/statistics.md` for the
        keys."""

    def in_flight(self) -> list[InFlight]:
        """The requests in flight, queue by queue, each queue's oldest first. From any thread, stopping nothing: one
        that ends meanwhile may be missing."""

    def close(self, timeout_s: float = 30.0) -> None:
        """Stops all rings and ends the workers once storage has answered. Raises `DrainTimeout` (the workers then end
        by themselves later). Idempotent."""

@final
class BlockQueues(Queues):
    """The rings of a virtio disk, served from `engine`.

    Ring `i` runs on worker `i % num_workers`. Limits: see `virtio_blk_config`; sectors are 512 bytes.
    """

    def __new__(
        cls,
        engine: EngineSpec,
        *,
        num_queues: int,
        num_workers: int,
        num_sectors: int,
        block_size: int = 512,
        read_only: bool = False,
        writeback: bool = True,
        device_id: bytes = b"",
        poll_us: int = 0,
        max_discard_sectors: int = 0,
        max_discard_seg: int = 0,
        max_write_zeroes_sectors: int = 0,
        max_write_zeroes_seg: int = 0,
        on_error: str = "report",
        on_enospc: str = "report",
        retry_for_s: float | None = None,
    ) -> Self:
        """`on_error`, and `on_enospc` for ENOSPC and EDQUOT, say what becomes of a request that storage fails: "report"
        answers it with an error, "retry" submits it again (pauses of 0.1 s, doubled up to 10 s; answered when the next
        attempt would come later than `retry_for_s` after its first failure), "hold" keeps it until `retry` or `fail` is
        called. A FLUSH, and a write that failed while the page cache was synced, are answered in any case."""

    def set_num_sectors(self, num_sectors: int) -> None:
        """The bound for every request taken from now on. From any thread."""

    def set_writeback(self, writeback: bool) -> None:
        """False: a write completes only once it is on stable storage. From any thread."""

    def set_rate_limit(self, iops: int, bps: int) -> None:
        """From now on takes at most so many requests, and so many bytes of reads and writes, a second over all rings,
        after a rest a tenth of that at once; 0 for no limit. What is not taken stays in its ring. From any thread."""

    @property
    def rate_limit(self) -> tuple[int, int]:
        """Requests and bytes a second; 0 for no limit."""

    def retry(self, queue: int | None = None, head: int | None = None, *, timeout_s: float = 10.0) -> int:
        """Submits requests that storage failed and that are kept ("held", or "retrying" in a pause) again now: the one
        named, or all. Returns how many. From any thread; waits for the workers, not for storage."""

    def fail(self, queue: int | None = None, head: int | None = None, *, timeout_s: float = 10.0) -> int:
        """Answers such requests with an error. Otherwise like `retry`."""

    @property
    def flush_failed(self) -> bool:
        """True once an fdatasync failed: every later FLUSH fails until the disk is reopened."""

@final
class ChainQueues(Queues):
    """Rings whose chains are handed to Python: for device types served by Python threads."""

    def __new__(cls, *, num_queues: int, num_workers: int = 1) -> Self: ...
    def take(self, index: int, timeout_s: float | None = None) -> Chain | None:
        """The next chain of ring `index`; None when `timeout_s` passed or the queues were closed. Waits. From any
        thread."""

    @property
    def closed(self) -> bool: ...

@final
class Chain:
    """One chain of a ring: a readable byte stream, then a writable one. From any thread.

    Answered once, with `complete`; dropped unanswered it completes with length 0. Buffers stay mapped for as long as
    the chain is referenced; after `complete` or after the ring was stopped by force reads and writes raise
    `SetupError`.
    """

    index: int
    head: int
    readable: int
    """Bytes the driver gave to read."""
    writable: int
    """Bytes the driver has room for."""

    def read(self, length: int = -1) -> bytes:
        """Copies the next bytes of the readable stream."""

    def write(self, data: bytes) -> int:
        """Copies into the next bytes of the writable stream; returns how many fitted."""

    def complete(self, written: int | None = None) -> None:
        """Gives the chain back to the driver. `written` defaults to what `write` stored."""

@final
class Arena:
    """Shared memory of a front-end: a sealed memfd mapped into this process. Supports the buffer protocol
    (writable)."""

    def __new__(cls, size: int, *, huge_pages: bool = False) -> Self: ...
    @property
    def fd(self) -> int:
        """Owned by the arena."""

    @property
    def address(self) -> int:
        """Where byte 0 is mapped here: what the front-end calls its user address."""

    @property
    def size(self) -> int: ...

@final
class DriverRing:
    """The driver half of a split ring that lies in an `Arena`. One thread at a time.

    `desc`, `avail` and `used` are offsets into the arena. Addresses in descriptors are guest addresses, whatever the
    caller's memory table says they are. The constructor zeroes the ring; both indices start at `base`.
    """

    def __new__(
        cls, arena: Arena, *, size: int, desc: int, avail: int, used: int, features: int, base: int = 0
    ) -> Self: ...
    def add(
        self,
        readable: Sequence[tuple[int, int]],
        writable: Sequence[tuple[int, int]],
        *,
        table: tuple[int, int] | None = None,
    ) -> int:
        """Makes a chain of (guest_addr, length) pairs and returns its head. `table`: (arena offset, guest_addr) of
        room for an indirect table. Raises `BlockingIOError` when the ring has no room for it. Not visible yet."""

    def publish(self) -> bool:
        """Makes what was added visible; True when the device wants to be kicked."""

    def reap(self) -> list[tuple[int, int]]:
        """(head, written) of every chain the device gave back. Raises `RemoteRingError` for an id that is not
        outstanding or an index that jumped."""

    def enable_calls(self, after: int = 1) -> bool:
        """Asks for a call once `after` more chains are used. True when there is something to reap already."""

    def disable_calls(self) -> None: ...
    @property
    def free(self) -> int:
        """Descriptors not in use."""

    @property
    def outstanding(self) -> int: ...
    @property
    def avail_index(self) -> int: ...
    @property
    def used_index(self) -> int: ...

@final
class DeviceRing:
    """The device half of a split ring, without a worker: for who plays the device step by step. One thread at a time.

    `desc`, `avail` and `used` are user addresses in `memory`. The next chain is taken at `base`; the used index is what
    the ring says. With `inflight` its part `index` keeps what is in flight, and says where to go on when it was used
    before. The constructor raises `SetupError`; the other methods, and the constructor for a region of another ring,
    raise `RemoteRingError` when the driver broke the ring, which must not be used any more then, and `SetupError` for a
    head that is not in flight.
    """

    def __new__(
        cls,
        memory: GuestMemory,
        *,
        size: int,
        desc: int,
        avail: int,
        used: int,
        features: int,
        base: int = 0,
        inflight: InflightRegion | None = None,
        index: int = 0,
    ) -> Self: ...
    def take(self) -> tuple[int, int, int, str | None] | None:
        """The next chain: its head, the bytes of its readable and of its writable stream, and what is wrong with it
        ("unmapped", "order" or "length"; its streams may then have holes). None when there is none."""

    def read(self, head: int) -> bytes:
        """A copy of the readable stream of a chain in flight."""

    def write(self, head: int, data: bytes) -> int:
        """Copies to the start of the writable stream of a chain in flight; returns how many bytes fitted."""

    def push(self, head: int, written: int) -> None:
        """Gives a chain back; the driver does not see it yet."""

    def publish(self) -> bool:
        """Makes what was pushed visible; True when the driver wants to be notified of it."""

    def suppress_kicks(self) -> None: ...
    def enable_kicks(self) -> bool:
        """Asks for a kick with the next chain. True when there is one to take already."""

    @property
    def base(self) -> int:
        """The next available index."""

    @property
    def in_flight(self) -> int:
        """Chains taken and not given back."""

    @property
    def used_index(self) -> int:
        """The used index as the driver sees it."""

@final
class RequestQueue:
    """The driver half of one queue of a virtio disk. One thread at a time.

    Ring, request headers, status bytes and indirect tables lie in `arena` from byte `offset` on, a multiple of 4096;
    the data is the caller's. `base` is the guest address of the arena's first byte. `features`: the negotiated bits
    (INDIRECT_DESC and EVENT_IDX matter).
    """

    @staticmethod
    def bytes_needed(size: int, seg_max: int) -> int:
        """What a queue of `size` descriptors takes of the arena, when a request has up to `seg_max` data segments."""

    def __new__(cls, arena: Arena, *, base: int, offset: int, size: int, seg_max: int, features: int) -> Self: ...
    @property
    def areas(self) -> tuple[int, int, int]:
        """Where descriptor table, available ring and used ring are in the arena."""

    @property
    def outstanding(self) -> int:
        """Requests made and not answered."""

    def has_room(self, pieces: int) -> bool:
        """Whether a request of so many data segments can be made now."""

    def submit(self, kind: int, sector: int, data: Sequence[tuple[int, int]], writable: bool, token: int) -> int:
        """Makes a request over (guest_addr, length) pieces; not visible yet. `token` (64 bits) comes back with the
        answer. Returns the guest address of its status byte. Raises `BlockingIOError` when the queue is full,
        `SetupError` for too many pieces."""

    def publish(self) -> bool:
        """Makes what was submitted visible; True when the device wants to be kicked."""

    def reap(self) -> list[tuple[int, int, int]]:
        """(token, status, used length) of every request answered since; status 255: the device wrote none.
        Raises `RemoteRingError` when the device breaks the ring's rules."""

    def enable_calls(self, after: int = 1) -> bool:
        """Asks for a call once `after` more requests are answered. True when there are so many already."""

    def disable_calls(self) -> None: ...

@final
class StopFlag:
    """Ends loads early: they make no more requests and wait for the answers. From any thread."""

    def __new__(cls) -> Self: ...
    def set(self) -> None: ...

@final
class LoadResult:
    """What came of a load. Latencies are buckets (greatest value in ns, count), never wider than 1/64 of their
    value."""

    reads: list[tuple[int, int]]
    writes: list[tuple[int, int]]
    flushes: list[tuple[int, int]]
    errors: int
    """Answers with another status than OK."""
    mismatches: int
    """With `verify`: reads that brought something else than what was written last."""
    first_mismatch: int | None
    """The first such block."""
    elapsed_s: float
    kicks: int
    sleeps: int

def run_load(
    queue: RequestQueue,
    *,
    data: int,
    address: int,
    kick: int,
    call: int,
    stop: StopFlag,
    block_size: int,
    depth: int,
    first_block: int,
    num_blocks: int,
    read_share: float = 1.0,
    sequential: bool = False,
    flush_every: int = 0,
    verify: bool = False,
    sleeping: bool = False,
    duration_s: float = 1.0,
    max_requests: int = ...,
    answer_limit_s: float = 30.0,
    seed: int = 0,
) -> LoadResult:
    """Keeps `depth` requests of `block_size` bytes outstanding on `queue`, on this thread; other Python threads run.

    `data`, `address`: arena offset and guest address of `depth * block_size` bytes of buffers. Blocks are counted in
    `block_size`; `read_share` is 0..1; a FLUSH follows every `flush_every` writes. `sleeping`: waits for calls
    instead of polling. Raises `PeerGone` when the device leaves requests without an answer for `answer_limit_s`,
    `RemoteRingError` when it breaks the ring, `SetupError` when the load fits neither buffers, queue nor (with
    `verify`) blocks.
    """

@final
class Confined:
    """What Landlock refuses to the threads it confines, beside files."""

    @property
    def abi(self) -> int:
        """The version of Landlock that the kernel speaks, at least 1."""

    @property
    def tcp(self) -> bool:
        """No TCP connection is made and no TCP port taken (Linux 6.7)."""

    @property
    def scopes(self) -> bool:
        """No process outside is signalled, no abstract Unix socket outside connected to (Linux 6.12)."""

def restrict_files(removable: Sequence[str]) -> Confined:
    """Let the calling thread, and the threads it makes from now on, open, make, change and run no file, for good.

    What is open stays usable. Files may be removed from the directories `removable`. Other threads that exist already
    are not reached: call it before there are any. Needs no privilege. Raises `OSError` where the kernel has no
    Landlock (ENOSYS, EOPNOTSUPP) or a directory is none; nothing is restricted then.
    """

def restrict_calls() -> None:
    """Hold every thread of this process, for good, to the system calls that serving a disk needs; others fail: EPERM.

    Nothing can be opened, connected, mounted or executed, no process made, no memory made executable, no io_uring set
    up or registered with: rings that the workers need are made before. Needs no privilege. Raises `OSError` where the
    kernel has no seccomp (ENOSYS, EINVAL, or EPERM of another filter) or a thread follows a filter of its own (ESRCH).
    """
