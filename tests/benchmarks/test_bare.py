"""The bare loop does what it is compared for: bytes go where they belong, with every engine."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.guest.packages import PROJECT

import vhostuser

SIZE = 4 << 20


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, without a warning of the compiler."""
    if shutil.which("cc") is None:
        pytest.skip("the bare loop needs a C compiler, which is not here")
    program = tmp_path_factory.mktemp("bare") / "bare"
    source = PROJECT / "benchmarks" / "bare.c"
    subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True)
    return program


@pytest.fixture(params=["pread", "mapped", "uring", "uring --direct"])
def served(request: pytest.FixtureRequest, bare: Path, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """An image and the socket that it is served on."""
    image, place = tmp_path / "disk.img", tmp_path / "disk.sock"
    image.write_bytes(bytes(SIZE))
    words = [str(bare), "--socket", str(place), "--engine", *request.param.split(), str(image)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if not process.stdout.readline():
            said = process.stderr.read()
            process.wait()
            pytest.skip(f"it cannot be had here: {said.strip()}")
        yield image, place
        process.terminate()
        assert process.wait(10) == 0
        assert not place.exists()


def test_what_one_front_end_writes_the_next_one_reads(served: tuple[Path, Path]) -> None:
    image, place = served
    pieces = {0: b"a" * 4096, 12288: b"b" * 131072, SIZE - 1048576: b"c" * 1048576}
    with vhostuser.connect(place) as disk:
        for offset, data in pieces.items():
            disk.write(offset, data)
        disk.flush()
    with vhostuser.connect(place) as disk:
        for offset, data in pieces.items():
            assert disk.read(offset, len(data)) == data
        assert disk.read(4096, 4096) == bytes(4096)
    content = image.read_bytes()
    assert all(content[offset : offset + len(data)] == data for offset, data in pieces.items())
