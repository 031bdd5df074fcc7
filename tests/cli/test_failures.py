"""Every failure is one line that says what to do, with the right exit code; tracebacks come only with -v."""

from __future__ import annotations

import errno
import re
import subprocess

import click
import pytest

from vhostuser.cli import failures
from vhostuser.errors import OperatorError, PeerGone, RemoteProtocolError, UsageError

from .conftest import Run

ONE_LINE = re.compile(r"vhostuser: [^\n]+: [^\n]+\. [A-Z][^\n]*\.\n")


def assert_one_line(done: subprocess.CompletedProcess[str], exit_code: int) -> None:
    assert ONE_LINE.fullmatch(done.stderr), done.stderr
    assert done.stdout == ""
    assert done.returncode == exit_code


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "missing command"),
        (("melt",), "no such command 'melt'"),
        (("serve",), "DISK: missing"),
        (("print-config", "x.sock"), "--for: missing"),
        (("print-config", "x.sock", "--for", "abacus"), "--for: 'abacus' is not one of"),
        (("print-config", "x.sock", "--fro", "qemu"), "--fro: no such option. Did you mean --for."),
        (("print-config", "x.sock", "--for"), "--for: option '--for' requires an argument"),
        (("print-config", "x.sock", "--for", "qemu", "--queues", "0"), "--queues: 0 is not in the range"),
        (("print-config", "x.sock", "--for", "qemu", "--memory", "much"), "--memory much: this is not a size"),
        (("print-config", "@x", "--for", "crosvm"), "@x: crosvm does not connect to abstract sockets"),
    ],
)
def test_a_senseless_command_line_is_one_line_and_exit_code_2(run: Run, arguments: tuple[str, ...], said: str) -> None:
    done = run("vhostuser", *arguments)
    assert_one_line(done, 2)
    assert said in done.stderr


@pytest.mark.parametrize(
    ("error", "exit_code", "said"),
    [
        (OperatorError("disk.img", "it burns", "Run"), 1, "vhostuser: disk.img: it burns. Run.\n"),
        (
            UsageError("size 'x'", "this is not a size", "Write 1G"),
            2,
            "vhostuser: size 'x': this is not a size. Write 1G.\n",
        ),
        (
            PeerGone("a.sock: closed"),
            1,
            "vhostuser: a.sock: closed. Check that the program behind the socket is running.\n",
        ),
        (RemoteProtocolError("message 3:\nodd"), 1, "vhostuser: message 3: odd. Run it again with -v for details.\n"),
        (
            OSError(errno.ENOENT, "No such file or directory", "a.img"),
            1,
            "vhostuser: a.img: no such file or directory. Check the path.\n",
        ),
        (
            OSError(errno.EIO, "Input/output error"),
            1,
            "vhostuser: system: input/output error. Run it again with -v for details.\n",
        ),
        (
            ZeroDivisionError("x"),
            1,
            "vhostuser: internal error: ZeroDivisionError: x. This is a bug: report it with what -v says.\n",
        ),
    ],
)
def test_every_kind_of_error_becomes_one_line(
    error: Exception, exit_code: int, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    @failures.verbose_option
    def fail() -> None:
        raise error

    command = click.command()(fail)
    assert failures.run(command, "vhostuser", []) == exit_code
    assert capfd.readouterr().err == said
    assert failures.run(command, "vhostuser", ["-v"]) == exit_code
    verbose = capfd.readouterr().err
    assert verbose.startswith("Traceback")
    assert verbose.endswith(said)


def test_an_interrupted_command_says_nothing_and_ends_with_130(capfd: pytest.CaptureFixture[str]) -> None:
    @click.command()
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert failures.run(interrupted, "vhostuser", []) == 130
    assert capfd.readouterr().err == ""
