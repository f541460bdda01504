"""``altgrad parity``: a pair of trainings side by side, bit for bit."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from rich.console import Console

from altgrad.parity.lockstep import Make, lockstep
from altgrad.parity.records import Kind
from altgrad.parity.show import print_lockstep
from altgrad_core.errors import InputError


@dataclass(frozen=True)
class ParityConfig:
    """Run two trainings side by side, each against itself first, and name the first tensor that differs, and why."""

    jax: str | None = None
    """JAX's side, as package.module:make: a function that returns (state, step), and step(state, k) in turn the next
    state and the step's tensors by name."""
    torch: str | None = None
    """torch's side, likewise, with the same names."""
    steps: int = 50
    """How many steps to run."""
    repeat_steps: int | None = None
    """How many steps each side runs against itself; as many as --steps unless given, 0 for none."""
    tolerance_ulps: int = 0
    """How many representable steps floats may be apart."""
    tolerances: dict[str, int] = field(default_factory=dict)
    """The same for tensors by name, pairs of a regular expression and a number: 'mu\\..*' 2 loss 1."""
    ignore: tuple[Kind, ...] = ()
    """Kinds of differences that do not count: nan payload, signed zero, ..."""
    json: Path | None = None
    """Where to write what was found, as JSON."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run before anything is imported."""
        for option, named in (("--jax", self.jax), ("--torch", self.torch)):
            if named is None:
                raise InputError(
                    f"{option} is missing; expected both sides, --jax package.module:make --torch package.module:make"
                )
            module, _, function = named.partition(":")
            if not module or not function:
                raise InputError(f"{option} is {named!r}; expected a module and a function of it, package.module:make")
        if self.json is not None and not self.json.absolute().parent.is_dir():
            raise InputError(f"--json is {self.json}; expected a file in a folder that exists")


def parity(config: ParityConfig, console: Console | None = None) -> bool:
    """Run ``altgrad parity``.

    Returns:
        Whether both sides repeat themselves and stay together.

    Raises:
        InputError: for a side that cannot be found, or is no pair of state and step.
    """
    found = lockstep(
        _make(str(config.jax), "--jax"),
        _make(str(config.torch), "--torch"),
        steps=config.steps,
        tolerance_ulps={**config.tolerances, ".*": config.tolerance_ulps}
        if config.tolerances
        else config.tolerance_ulps,
        ignore=config.ignore,
        labels=("jax", "torch"),
        repeat_steps=config.repeat_steps,
    )
    print_lockstep(found, console or Console())
    if config.json is not None:
        config.json.write_text(json.dumps(found.as_dict(), indent=1, allow_nan=False) + "\n")
    return found.passed


def _make(named: str, option: str) -> Make[object]:
    """The function that an option names, its module looked for in the folder that the command runs in, too."""
    module_name, _, function = named.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and what it imports is not
        raise InputError(f"{option} is {named!r}, but there is no module {error.name!r}; looked in {folder}") from None
    make = getattr(module, function, None)
    if not callable(make):
        raise InputError(
            f"{option} is {named!r}, but {module_name} has no function {function!r}{_near(function, module)}"
        )
    return make


def _near(function: str, module: object) -> str:
    known: Sequence[str] = [name for name in vars(module) if callable(getattr(module, name))]
    near = get_close_matches(function, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
