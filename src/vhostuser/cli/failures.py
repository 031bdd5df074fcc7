"""How a program ends: every failure is one line on stderr, `vhostuser: <object>: <cause>. <what to do>.`

Exit codes: 0 done, 1 it failed, 2 it was asked for nonsense, 130 interrupted. Tracebacks only with ``-v``.
Touches: stderr.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence

import click

from vhostuser.errors import OperatorError, PeerGone, UsageError, VhostUserError

VERBOSE = "vhostuser.verbose"
"""Key into the meta data of a click context: whether ``-v`` was given."""

verbose_option = click.option(
    "-v",
    "--verbose",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=lambda context, _option, wanted: context.meta.update({VERBOSE: wanted}),
    help="Say more on stderr: every step, and tracebacks of failures.",
)
"""For every command."""


def verbose() -> bool:
    """Whether ``-v`` was given to the command that runs."""
    return bool(click.get_current_context().meta.get(VERBOSE))


ADVICE = {
    errno.ENOENT: "Check the path",
    errno.ENOTDIR: "Check the path",
    errno.EISDIR: "Name a file, a block device, memory:size=N or null:size=N",
    errno.EACCES: "Check the permissions and the user it runs as",
    errno.EPERM: "Check the permissions and the user it runs as",
    errno.EADDRINUSE: "Stop the other program, or choose another path",
    errno.ECONNREFUSED: "Check that the program behind the socket is running",
    errno.EMFILE: "Raise the limit of open files (ulimit -n)",
    errno.ENOSPC: "Make room on the file system",
    errno.EROFS: "Choose another place, or use --read-only",
    errno.ETXTBSY: "Stop the program that uses it",
    errno.EBUSY: "Stop the program that uses it",
}


def run(command: click.Command, program: str, arguments: Sequence[str] | None = None) -> int:
    """Runs ``command`` and returns the exit code; ``arguments`` default to the process's own."""
    meta: dict[str, bool] = {}
    try:
        words = list(sys.argv[1:] if arguments is None else arguments)
        with command.make_context(program, words) as context:
            meta = context.meta
            command.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as wanted:
        return wanted.exit_code
    except (KeyboardInterrupt, click.Abort):
        return 130
    except BrokenPipeError:
        # Whoever read our results has enough; the interpreter's own flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except click.ClickException as error:
        say(usage_line(error, program))
        return 2
    except Exception as error:
        if meta.get(VERBOSE):
            traceback.print_exc()
        say(line(error))
        return 2 if isinstance(error, UsageError) else 1
    return 0


def say(message: str) -> None:
    """Prints one line about a failure."""
    print("vhostuser: " + " ".join(message.split()), file=sys.stderr)


def line(error: BaseException) -> str:
    """The one line about ``error``, without the program's name."""
    match error:
        case OperatorError():
            return str(error)
        case PeerGone():
            return f"{_stopped(str(error))} Check that the program behind the socket is running."
        case VhostUserError():
            return f"{_stopped(str(error))} Run it again with -v for details."
        case OSError(errno=number, filename=place, strerror=cause) if number is not None:
            subject = os.fsdecode(place) if isinstance(place, str | bytes) else "system"
            advice = ADVICE.get(number, "Run it again with -v for details")
            return f"{subject}: {_lowered(cause or os.strerror(number))}. {advice}."
        case _:
            advice = "This is a bug: report it with what -v says."
            return f"internal error: {type(error).__name__}: {_stopped(str(error))} {advice}"


def usage_line(error: click.ClickException, program: str) -> str:
    """The one line about a command line that makes no sense."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else program
    advice = f"See {path} --help"
    match error:
        case click.NoSuchOption():
            close = f"Did you mean {', '.join(sorted(error.possibilities))}" if error.possibilities else advice
            return f"{error.option_name}: no such option. {close}."
        case click.MissingParameter():
            return f"{_parameter(error)}: missing. {advice}."
        case click.BadParameter():
            return f"{_parameter(error)}: {_lowered(_unstopped(error.message))}. {advice}."
        case click.BadOptionUsage():
            return f"{error.option_name}: {_lowered(_unstopped(error.message))}. {advice}."
        case _:
            return f"command line: {_lowered(_unstopped(error.format_message()))}. {advice}."


def _parameter(error: click.BadParameter) -> str:
    if error.param is None:
        return "command line"
    options = [name for name in error.param.opts if name.startswith("--")]
    return options[0] if options else error.param.make_metavar(error.ctx) if error.ctx else str(error.param.name)


def _unstopped(text: str) -> str:
    return text.strip().rstrip(".")


def _stopped(text: str) -> str:
    return _unstopped(text) + "."


def _lowered(text: str) -> str:
    """Starts like the middle of a sentence: `No such file` becomes `no such file`, `EIO` stays."""
    return text[:1].lower() + text[1:] if text[1:2].islower() else text
