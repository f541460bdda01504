"""The ``altgrad`` command."""

from __future__ import annotations

import difflib
import io
import os
import sys
import traceback
from dataclasses import dataclass
from importlib import import_module
from typing import NoReturn

from altgrad_core.errors import InputError

_INTERRUPTED = 130
_UNREAD = 141
_COULD_NOT_RUN = 2
_DIFFERS = 1
_MOST_DEVICES = 16
_TRAIN, _REPORT, _CLI, _TORCH, _STORAGE = "train", "report", "cli", "torch", "storage"
_EXTRAS = (
    dict.fromkeys(("flax", "orbax", "jax", "optax"), _TRAIN)
    | dict.fromkeys(("plotly", "jinja2", "scipy"), _REPORT)
    | dict.fromkeys(("tyro", "rich", "ml_dtypes"), _CLI)
    | {"torch": _TORCH, "safetensors": _STORAGE}
)
_TRAINING = ("train", "replay", "study", "report")
_DESCRIPTION = "Train in any 8-bit floating-point format, and see why a format fails."


@dataclass(frozen=True)
class _Command:
    """A command, by names: what one command needs is imported when it runs, and not for another's sake."""

    module: str
    config: str
    function: str
    line: str


_COMMANDS = {
    "train": _Command("altgrad.train", "TrainConfig", "train", "train a character GPT in a format"),
    "replay": _Command("altgrad.replay", "ReplayConfig", "replay", "decide again from a run's log, and compare"),
    "study": _Command("altgrad.study.cli", "StudyConfig", "study", "train in many formats and write a report"),
    "report": _Command("altgrad.study.cli", "ReportConfig", "report", "write a study's report again"),
    "parity": _Command("altgrad.parity.cli", "ParityConfig", "parity", "run two trainings side by side, bit for bit"),
    "formats": _Command("altgrad.show.cli", "FormatsConfig", "formats", "list the formats, or tell all about one"),
    "explain": _Command("altgrad.show.cli", "ExplainConfig", "explain", "show what a cast makes of a value, and why"),
    "packed": _Command("altgrad.show.cli", "PackedConfig", "packed", "tell what a file of packed tensors holds"),
    "vectors": _Command("altgrad.show.cli", "VectorsConfig", "vectors", "write golden vectors to test any cast with"),
}


def main() -> None:
    """Parse the command line and run what it asks for; user errors are one line, without a traceback.

    Exits with 0 if all went well, 1 if two sides differ, 2 if it could not run, 130 if it was interrupted and 141 if
    nobody reads on.
    """
    _share_out_the_cores()
    _write_in_any_encoding()
    try:
        _run_and_tell(sys.argv[1:])
    except Exception:
        # Not with 1, as Python would: that is the word for a difference.
        traceback.print_exc()
        sys.exit(_COULD_NOT_RUN)


def _run_and_tell(arguments: list[str]) -> None:
    try:
        _run(arguments)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in _EXTRAS:
            raise
        extra = _EXTRAS[package]
        # Who trains needs more than a command line: name it all at once.
        extra = _TRAIN if extra == _CLI and arguments[:1] and arguments[0] in _TRAINING else extra
        _refuse(f"{package} is not installed; this command needs the extra altgrad[{extra}]")
    except BrokenPipeError:
        # Whoever read has seen enough, as ``head`` has; nothing is left to be written when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_UNREAD)
    except (InputError, OSError) as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


def _refuse(message: str) -> NoReturn:
    print(f"altgrad: {message}", file=sys.stderr)
    sys.exit(_COULD_NOT_RUN)


def _run(arguments: list[str]) -> None:
    name, *rest = arguments or [""]
    if name in ("", "-h", "--help"):
        print(_overview())
        sys.exit(_COULD_NOT_RUN if name == "" else 0)
    if name not in _COMMANDS:
        near = difflib.get_close_matches(name, _COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"unknown command {name!r}; {hint}Known: {', '.join(_COMMANDS)}")
    import tyro

    command = _COMMANDS[name]
    module = import_module(command.module)
    config = tyro.cli(
        getattr(module, command.config), prog=f"altgrad {name}", args=rest, config=(tyro.conf.OmitArgPrefixes,)
    )
    result = getattr(module, command.function)(config)
    if result is None and name == "train":
        sys.exit(_INTERRUPTED)
    if result is False:
        sys.exit(_DIFFERS)


def _overview() -> str:
    lines = [f"  {name:8} {command.line}" for name, command in _COMMANDS.items()]
    more = "altgrad COMMAND --help says more."
    return "\n".join(["usage: altgrad COMMAND ...", "", _DESCRIPTION, "", *lines, "", more])


def _write_in_any_encoding() -> None:
    """Have a question mark stand for what the encoding of an output lacks: a dot, a bar, the name of a file."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _share_out_the_cores() -> None:
    """Make a CPU look like one device per core, so that a fleet's runs go side by side. Before jax is imported."""
    if sys.argv[1:2] == ["parity"]:
        return  # the user's own runs, on the devices that they have elsewhere
    flag = "--xla_force_host_platform_device_count"
    flags = os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ["XLA_FLAGS"] = f"{flags} {flag}={min(usable, _MOST_DEVICES)}".strip()
