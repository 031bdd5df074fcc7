"""Copying between disks behind back-ends, files and streams. Public names, nothing else."""

from vhostuser.copying.disk import DiskSide
from vhostuser.copying.engine import Copy, Failure, Outcome
from vhostuser.copying.file import FileSide
from vhostuser.copying.sides import CHUNK, Sink, Source
from vhostuser.copying.stream import StreamSink, StreamSource
from vhostuser.copying.verify import Fingerprints, verify

__all__ = [
    "CHUNK",
    "Copy",
    "DiskSide",
    "Failure",
    "FileSide",
    "Fingerprints",
    "Outcome",
    "Sink",
    "Source",
    "StreamSink",
    "StreamSource",
    "verify",
]
