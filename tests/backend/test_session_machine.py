"""Any messages in any order, right and wrong ones with real descriptors, to a real session over native queues.

Beside it runs a short model: what is negotiated, which regions there are, and of each ring what was told. The table of
rules says what each message carries, answers and requires; the model says whether it makes sense now. Together they
predict for every message a reply, an acknowledgement, a refusal, silence, or the end of the connection.

``SESSION_MACHINE_EXAMPLES`` sets how many random lives are tried.
"""

from __future__ import annotations

import os
import select
from struct import pack
from typing import Final

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from tests.backend.frontend import WAIT_S
from tests.backend.machine import AVAIL, GOOD, NUM_RINGS, PLACES, REGIONS, USED, Connected, Region, Req, Ring

from vhostuser.protocol import F_LOG_ALL, F_PROTOCOL_FEATURES, ProtocolFeature, rule_of

SIZES: Final = (1, 64, 256, 0, 3, 65536)
BASES: Final = (0, 0, 0, 7, 40000, 0x8000_8000)
INDEX: Final = st.sampled_from((0, 1, 0, 1, 0, 1, 2, 255))
ACK: Final = st.booleans()


class SessionMachine(Connected):
    """The rules: each says one thing."""

    def begin(self) -> None:
        self.set_protocol_features(False, 0, 0)
        self.set_features(False, 1 << 32, True)

    # -- negotiation ---------------------------------------------------------------------------------------------------

    @rule(ack=ACK, chosen=st.sampled_from((0, 1 << 32, 1 << 26 | 1 << 29, 1 << 34)), bit_30=st.booleans())
    def set_features(self, ack: bool, chosen: int, bit_30: bool) -> None:
        bits = chosen | (F_PROTOCOL_FEATURES if bit_30 else 0)
        if self.check(Req.SET_FEATURES, pack("=Q", bits), ack=ack, sense=not chosen & 1 << 34):
            self.features = bits
            for ring in self.rings:
                ring.enabled |= not bit_30

    @rule(
        ack=ACK, without=st.sampled_from((0, 0, 0, 1 << 3, 1 << 12, 1 << 15, 0xFFFF)), more=st.sampled_from((0, 0, 16))
    )
    def set_protocol_features(self, ack: bool, without: int, more: int) -> None:
        bits = int(self.device.protocol_features) & ~without | more
        self.check(Req.SET_PROTOCOL_FEATURES, pack("=Q", bits), ack=ack, sense=more == 0)

    @rule(ack=ACK)
    def ask_for_what_there_is(self, ack: bool) -> None:
        offered = self.device.features | F_PROTOCOL_FEATURES | F_LOG_ALL
        self.check(Req.GET_FEATURES, ack=ack, sense=True, reply=pack("=Q", offered))
        self.check(Req.GET_PROTOCOL_FEATURES, ack=ack, sense=True, reply=pack("=Q", self.device.protocol_features))
        self.check(Req.GET_QUEUE_NUM, ack=ack, sense=True, reply=pack("=Q", NUM_RINGS))
        self.check(Req.GET_MAX_MEM_SLOTS, ack=ack, sense=True, reply=pack("=Q", 509))
        self.check(
            Req.GET_CONFIG, pack("=III", 0, 8, 0) + bytes(8), ack=ack, sense=True, reply=pack("=IIIQ", 0, 8, 0, 128)
        )

    @rule(ack=ACK, request=st.sampled_from((Req.SET_OWNER, Req.RESET_OWNER)))
    def own(self, ack: bool, request: Req) -> None:
        self.check(request, ack=ack, sense=True)

    @rule(ack=ACK)
    def what_is_not_done(self, ack: bool) -> None:
        self.check(Req.SET_CONFIG, pack("=III", 0, 8, 0) + bytes(8), ack=ack, sense=False)

    @rule(ack=ACK, request=st.sampled_from((Req.SET_LOG_BASE, Req.SEND_RARP, Req.SET_VRING_ENDIAN, Req.IOTLB_MSG)))
    def what_is_not_offered(self, ack: bool, request: Req) -> None:
        payload = rule_of(request).payload
        self.check(request, bytes(payload.LAYOUT.size), ack=ack, sense=False)  # type: ignore[attr-defined]

    @rule(ack=ACK, request=st.sampled_from((200, 0, 0xFFFF_FFFF)), size=st.sampled_from((0, 8, 100)))
    def a_request_that_nobody_knows(self, ack: bool, request: int, size: int) -> None:
        outcome, answer = self.say(request, bytes(size), (), ack)
        if ack and ProtocolFeature.REPLY_ACK in self.protocol:
            assert (outcome, len(answer)) == ("reply", 8)
            assert answer != bytes(8)
        else:
            assert outcome == "silence"

    @rule(
        ack=ACK, request=st.sampled_from((Req.SET_VRING_NUM, Req.SET_MEM_TABLE, Req.SET_VRING_ADDR, Req.SET_FEATURES))
    )
    def a_payload_cut_short(self, ack: bool, request: Req) -> None:
        self.check(request, bytes(7), ack=ack, sense=False)

    @rule(ack=ACK, request=st.sampled_from((Req.SET_VRING_NUM, Req.SET_FEATURES, Req.SET_OWNER)))
    def descriptors_where_none_belong(self, ack: bool, request: Req) -> None:
        size = 0 if request is Req.SET_OWNER else 8
        self.check(request, bytes(size), (self.null, self.file), ack=ack, sense=False)

    # -- memory --------------------------------------------------------------------------------------------------------

    @rule(ack=ACK, names=st.lists(st.sampled_from(tuple(REGIONS)), max_size=3), missing=st.sampled_from((0, 0, 0, 1)))
    def set_mem_table(self, ack: bool, names: list[str], missing: int) -> None:
        payload = pack("=II", len(names), 0) + b"".join(pack("=QQQQ", *REGIONS[name]) for name in names)
        sense = self.fit(names) and not (missing and names)
        count = max(0, len(names) - missing)
        if self.check(Req.SET_MEM_TABLE, payload, (self.file,) * count, ack=ack, sense=sense):
            self.remember(set(names))

    @rule(ack=ACK, name=st.sampled_from(tuple(REGIONS)), right=st.sampled_from((True, True, True, False)))
    def add_mem_reg(self, ack: bool, name: str, right: bool) -> None:
        free = name not in self.memory and self.fit([*self.memory, name])
        fd = self.file if right else self.kick
        payload = pack("=Q", 0) + pack("=QQQQ", *REGIONS[name])
        if self.check(Req.ADD_MEM_REG, payload, (fd,), ack=ack, sense=free and right):
            self.remember(self.memory | {name})

    @rule(ack=ACK, name=st.sampled_from(sorted(GOOD)))
    def rem_mem_reg(self, ack: bool, name: str) -> None:
        payload = pack("=Q", 0) + pack("=QQQQ", *REGIONS[name][:3], 0)
        if self.check(Req.REM_MEM_REG, payload, ack=ack, sense=name in self.memory):
            self.remember(self.memory - {name})

    # -- rings ---------------------------------------------------------------------------------------------------------

    def change(self, request: Req, payload: bytes, number: int, *, ack: bool, sense: bool, **change: object) -> None:
        """NUM, BASE, ADDR: refused while the ring runs, or when it would start now and cannot."""
        ring = self.rings[number] if number < NUM_RINGS else Ring(running=True)
        after = Ring(**{**vars(ring), **change})  # type: ignore[arg-type]
        begun = dict(self.inflight.begun) if self.inflight is not None else {}
        sense = sense and not ring.running and self.start(number, after)
        if self.check(request, payload, ack=ack, sense=sense):
            self.rings[number] = after
        elif self.inflight is not None:
            self.inflight.begun = begun

    @rule(ack=ACK, number=INDEX, num=st.sampled_from(SIZES))
    def set_vring_num(self, ack: bool, number: int, num: int) -> None:
        sense = num in (1, 64, 256)
        self.change(Req.SET_VRING_NUM, pack("=II", number, num), number, ack=ack, sense=sense, num=num)

    @rule(ack=ACK, number=INDEX, base=st.sampled_from(BASES))
    def set_vring_base(self, ack: bool, number: int, base: int) -> None:
        payload = pack("=II", number, base)
        self.change(Req.SET_VRING_BASE, payload, number, ack=ack, sense=base < 65536, base=base)

    @rule(ack=ACK, number=INDEX, place=st.sampled_from(tuple(PLACES)), flags=st.sampled_from((0, 0, 0, 2)))
    def set_vring_addr(self, ack: bool, number: int, place: str, flags: int) -> None:
        at = PLACES[place] + (number % NUM_RINGS) * 0x8000
        payload = pack("=IIQQQQ", number, flags, at, at + USED, at + AVAIL, 0)
        if number < NUM_RINGS and self.rings[number].running:
            self.check(Req.SET_VRING_ADDR, payload, ack=ack, sense=flags == 0 and self.rings[number].place == place)
        else:
            self.change(Req.SET_VRING_ADDR, payload, number, ack=ack, sense=flags == 0, place=place)

    @rule(ack=ACK, number=INDEX, kind=st.sampled_from(("kick", "kick", "kick", "none", "null", "missing")))
    def set_vring_kick(self, ack: bool, number: int, kind: str) -> None:
        fds = {"kick": (self.kick,), "null": (self.null,)}.get(kind, ())
        payload = pack("=Q", number | (0x100 if kind == "none" else 0))
        ring = self.rings[number] if number < NUM_RINGS else Ring()
        after = Ring(**{**vars(ring), "kicked": True})
        complete = ring.num is not None and ring.place is not None and bool(self.memory)
        sense = number < NUM_RINGS and kind != "missing" and not (kind == "null" and (ring.running or complete))
        begun = dict(self.inflight.begun) if self.inflight is not None else {}
        if sense and not ring.running:
            sense = self.start(number, after)
        region = self.inflight
        if self.check(Req.SET_VRING_KICK, payload, fds, ack=ack, sense=sense):
            self.rings[number] = after
            if kind == "null":
                # It is only looked at when the ring starts, which then fails: say something better at once.
                self.set_vring_kick_again(number)
        elif region is not None:
            region.begun = begun

    def set_vring_kick_again(self, number: int) -> None:
        assert self.check(Req.SET_VRING_KICK, pack("=Q", number), (self.kick,), ack=False, sense=True)

    @rule(ack=ACK, number=INDEX, request=st.sampled_from((Req.SET_VRING_CALL, Req.SET_VRING_ERR)), there=st.booleans())
    def set_call_or_err(self, ack: bool, number: int, request: Req, there: bool) -> None:
        payload = pack("=Q", number | (0 if there else 0x100))
        self.check(request, payload, (self.call,) if there else (), ack=ack, sense=number < NUM_RINGS)

    @rule(ack=ACK, number=INDEX, num=st.sampled_from((0, 1, 1, 2)))
    def set_vring_enable(self, ack: bool, number: int, num: int) -> None:
        sense = number < NUM_RINGS and num < 2
        if self.check(Req.SET_VRING_ENABLE, pack("=II", number, num), ack=ack, sense=sense):
            self.rings[number].enabled = num == 1
            self.enable_seen = True

    @rule(ack=ACK, number=INDEX)
    def get_vring_base(self, ack: bool, number: int) -> None:
        sense = number < NUM_RINGS
        reply = pack("=II", number, self.rings[number].base if sense else 0)
        if self.check(Req.GET_VRING_BASE, pack("=II", number, 0), ack=ack, sense=sense, reply=reply):
            ring = self.rings[number]
            ring.kicked = ring.running = ring.sound = False

    @rule(ack=ACK)
    def reset_device(self, ack: bool) -> None:
        if self.check(Req.RESET_DEVICE, ack=ack, sense=True):
            self.reset()

    @rule(ack=ACK, status=st.sampled_from((0, 1, 3, 15, 256)))
    def set_status(self, ack: bool, status: int) -> None:
        if self.check(Req.SET_STATUS, pack("=Q", status), ack=ack, sense=status < 256):
            if status == 0:
                self.reset()
                self.features &= F_PROTOCOL_FEATURES
            self.status = status

    @rule(ack=ACK)
    def get_status(self, ack: bool) -> None:
        self.check(Req.GET_STATUS, ack=ack, sense=True, reply=pack("=Q", self.status))

    @rule(
        number=st.sampled_from(range(NUM_RINGS)),
        place=st.sampled_from(("low", "high")),
        tracked=st.booleans(),
        enabled=st.sampled_from((None, 0, 1, 1)),
        chains=st.integers(0, 3),
    )
    def live_with_a_ring(self, number: int, place: str, tracked: bool, enabled: int | None, chains: int) -> None:
        """All that a ring needs, in the order of QEMU; each message may be refused for what was said before."""
        self.get_vring_base(False, number)
        self.set_mem_table(True, ["low", "high"], 0)
        if tracked:
            self.get_inflight_fd(True, NUM_RINGS, 256)
            if self.regions:
                self.hand_over(True, self.regions[-1], "right")
        self.set_vring_num(True, number, 64)
        self.set_vring_base(True, number, self.index[number, place])
        self.set_vring_addr(True, number, place, 0)
        self.set_vring_kick(True, number, "kick")
        if enabled is not None:
            self.set_vring_enable(True, number, enabled)
        for _ in range(chains):
            self.offer_a_chain(number)

    # -- in-flight regions ---------------------------------------------------------------------------------------------

    @rule(ack=ACK, num_queues=st.sampled_from((2, 2, 1, 3)), queue_size=st.sampled_from((256, 256, 64, 0)))
    def get_inflight_fd(self, ack: bool, num_queues: int, queue_size: int) -> None:
        sense = num_queues <= NUM_RINGS and queue_size > 0
        payload = pack("=QQHH4x", 0, 0, num_queues, queue_size)
        if self.check(Req.GET_INFLIGHT_FD, payload, ack=ack, sense=sense):
            self.regions.append(Region(self.received, num_queues, queue_size))

    @precondition(lambda self: self.regions)
    @rule(ack=ACK, data=st.data(), kind=st.sampled_from(("right", "right", "right", "no file", "odd", "short")))
    def set_inflight_fd(self, ack: bool, data: st.DataObject, kind: str) -> None:
        self.hand_over(ack, data.draw(st.sampled_from(self.regions)), kind)

    def hand_over(self, ack: bool, region: Region, kind: str) -> None:
        size = 1 if kind == "short" else os.fstat(region.fd).st_size
        payload = pack("=QQHH4x", size, 4 if kind == "odd" else 0, region.num_queues, region.queue_size)
        fd = self.call if kind == "no file" else region.fd
        if self.check(Req.SET_INFLIGHT_FD, payload, (fd,), ack=ack, sense=kind == "right"):
            self.inflight = region

    # -- requests ------------------------------------------------------------------------------------------------------

    @rule(number=st.sampled_from(range(NUM_RINGS)))
    def offer_a_chain(self, number: int) -> None:
        """A ring is served exactly when it runs and is enabled."""
        ring = self.rings[number]
        if not ring.sound or ring.place is None or ring.num is None:
            return
        at = REGIONS[ring.place][3] + number * 0x8000
        index = self.index[number, ring.place]
        os.pwrite(self.file, bytes(16), at)  # a descriptor of no bytes: nobody can answer that, so it comes back empty
        os.pwrite(self.file, pack("<H", 0), at + AVAIL + 4 + 2 * (index % ring.num))
        os.pwrite(self.file, pack("<H", index), at + AVAIL + 4 + 2 * ring.num)  # where a driver says when to call
        os.pwrite(self.file, pack("<H", (index + 1) % 65536), at + AVAIL + 2)
        self.check(Req.SET_VRING_KICK, pack("=Q", number), (self.kick,), ack=False, sense=True)
        assert self.check(Req.SET_VRING_CALL, pack("=Q", number), (self.call,), ack=False, sense=True)
        os.eventfd_write(self.kick, 1)
        if ring.enabled:
            while self.used(at) == index:
                assert select.select([self.call], [], [], WAIT_S)[0], "it is not served"
                os.eventfd_read(self.call)
            self.index[number, ring.place] = ring.base = (index + 1) % 65536
            if ring.region is not None:
                ring.region.begun[number] = ring.num, ring.base
        else:
            self.check(Req.GET_STATUS, ack=False, sense=True, reply=pack("=Q", self.status))
            assert self.used(at) == index, "a disabled ring was served"
            os.pwrite(self.file, pack("<H", index), at + AVAIL + 2)

    @rule()
    def hang_up(self) -> None:
        self.disconnect()
        self.connect()


SessionMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("SESSION_MACHINE_EXAMPLES", "25")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


class TestSession(SessionMachine.TestCase):  # type: ignore[misc,name-defined]
    """Run by pytest."""

    def test_every_message_is_answered_as_a_short_model_says(self) -> None:
        self.runTest()
