"""``altgrad parity``: a pair of trainings, the built-in one or the user's, side by side, bit for bit."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from altgrad.parity.lockstep import Make, lockstep
from altgrad.parity.records import Kind
from altgrad.parity.runs import Lockstep
from altgrad.parity.show import print_lockstep
from altgrad.parity.tolerances import Tolerance
from altgrad.parity.weights import keeping_weights, load_weights, save_weights
from altgrad_core.errors import InputError
from altgrad_core.twins import (
    Accumulation,
    Activation,
    CommitRounding,
    GPTShape,
    MLPShape,
    OptimizerName,
    Recipe,
    Storage,
)

ModelName = Literal["mlp", "gpt"]

_OF_THE_RECIPE = ("format", "optimizer", "storage", "rounding", "accumulate", "seed")
_OF_THE_PAIR = ("model", "activation", *_OF_THE_RECIPE, "weights", "save_weights")
_MODELS: Mapping[ModelName, str] = {"mlp": "MLP 784-512-512-10", "gpt": "GPT of 2 layers"}
_OPTIMIZERS: Mapping[OptimizerName, str] = {"sgd": "SGD", "adamw": "AdamW"}
_ROUNDED: Mapping[CommitRounding, str] = {"nearest_even": "to nearest", "stochastic": "stochastically"}


@dataclass(frozen=True)
class ParityConfig:
    """Run two trainings side by side, each against itself first, and name the first tensor that differs, and why.

    Without --jax and --torch it is a built-in pair: the same network, weights, batches and random bits in both.
    """

    format: str | None = None
    """What the built-in pair casts every operand and gradient of a product to; E5M2 unless said."""
    model: ModelName | None = None
    """Of the built-in pair: an MLP of 784-512-512-10 or a GPT of 2 layers; mlp unless said."""
    activation: Activation | None = None
    """Of the built-in GPT: ReLU, or GELU in its tanh form; relu unless said."""
    optimizer: OptimizerName | None = None
    """Of the built-in pair: SGD with momentum or AdamW; sgd unless said."""
    storage: Storage | None = None
    """Of the built-in pair: float32 master weights, or weights committed to the grid after every step."""
    rounding: CommitRounding | None = None
    """How the built-in pair rounds committed weights; stochastic unless said."""
    accumulate: Accumulation | None = None
    """How the built-in pair adds up products: exact, rounded once, or native, each framework in its own way."""
    seed: int | None = None
    """Of the built-in pair's weights, batches and random bits; 0 unless said."""
    weights: Path | None = None
    """A safetensors file with the weights that the built-in pair begins with, in place of the seed's."""
    save_weights: Path | None = None
    """Where to write the weights that the built-in pair ends with, as such a file, unless the two part; those of JAX
    where a tolerance lets them differ."""
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
    html: Path | None = None
    """Where to write it as a page, which opens offline."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run before anything is imported."""
        given = [f"--{name.replace('_', '-')}" for name in _OF_THE_PAIR if getattr(self, name) is not None]
        if self.jax is None and self.torch is None:
            self.recipe()
            if self.activation is not None and self.model != "gpt":
                raise InputError(f"--activation {self.activation} would have no effect: it is for --model gpt")
        elif given:
            raise InputError(f"{given[0]} would have no effect with --jax and --torch: it is for the built-in pair")
        else:
            _check_named("--jax", self.jax)
            _check_named("--torch", self.torch)
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise InputError(f"--seed is {self.seed}; expected 0 to {2**32 - 1}")
        _check_outputs({"--json": self.json, "--html": self.html, "--save-weights": self.save_weights})

    def recipe(self) -> Recipe:
        """How the built-in pair trains."""
        given = {name: getattr(self, name) for name in _OF_THE_RECIPE}
        return Recipe(**{name: value for name, value in given.items() if value is not None})

    def allowed(self) -> Tolerance:
        """How far apart floats may be: by name first, ``--tolerance-ulps`` for what no pattern given matches."""
        if not self.tolerances:
            return self.tolerance_ulps
        return {**self.tolerances, ".*": self.tolerances.get(".*", self.tolerance_ulps)}

    def about(self) -> str:
        """What is run, in a line."""
        if self.jax is not None:
            return f"{self.jax} and {self.torch}"
        recipe = self.recipe()
        rounding = f", rounded {_ROUNDED[recipe.commit_rounding]}" if recipe.storage == "committed" else ""
        model = _MODELS[self.model or "mlp"] + (" with GELU" if self.activation == "gelu" else "")
        start = "" if self.weights is None else f", from {self.weights}"
        return (
            f"{model} in {recipe.format}, {_OPTIMIZERS[recipe.optimizer]}, {recipe.storage} weights{rounding}, "
            f"{recipe.accumulate} sums, seed {recipe.seed}{start}"
        )


def parity(config: ParityConfig, console: Console | None = None) -> bool:
    """Run ``altgrad parity``.

    Returns:
        Whether both sides repeat themselves and stay together.

    Raises:
        InputError: for a side that cannot be found, or is no pair of state and step, and a file of other weights.
        OSError: for a file that cannot be read or written.
    """
    console, kept = console or Console(), {}
    jax_side, torch_side = _sides(config)
    if config.save_weights is not None:
        jax_side = keeping_weights(jax_side, kept)
    found = lockstep(
        jax_side,
        torch_side,
        steps=config.steps,
        tolerance_ulps=config.allowed(),
        ignore=config.ignore,
        labels=("jax", "torch"),
        repeat_steps=config.repeat_steps,
    )
    try:  # a reader who leaves early costs no file, and a full disk not the verdict
        _write(config, found, kept)
    finally:
        print_lockstep(found, console, config.about())
    if config.save_weights is not None and not found.passed:
        console.print(Text(f"{config.save_weights} is not written: the two do not end with the same weights"))
    return found.passed


def _write(config: ParityConfig, found: Lockstep, weights: Mapping[str, object]) -> None:
    """Write the files that are asked for; of the weights, only where the two end with the same."""
    if config.json is not None:
        about = {"about": config.about(), **found.as_dict()}
        config.json.write_text(json.dumps(about, indent=1, allow_nan=False) + "\n")
    if config.html is not None:
        from altgrad.parity.page import page_of

        config.html.write_text(page_of(found, config.about()), encoding="utf-8")
    if config.save_weights is not None and found.passed:
        save_weights(config.save_weights, weights)


def _sides(config: ParityConfig) -> tuple[Make[Any], Make[Any]]:
    if config.jax is not None and config.torch is not None:
        return _make(config.jax, "--jax"), _make(config.torch, "--torch")
    from altgrad.parity.twins import sides_of

    shape = GPTShape(activation=config.activation or "relu") if config.model == "gpt" else MLPShape()
    weights = None if config.weights is None else load_weights(config.weights, shape)
    return sides_of(shape, config.recipe(), weights=weights)


def _check_outputs(paths: Mapping[str, Path | None]) -> None:
    """Refuse files that could not be written, or that one another would replace, before hours are spent on them."""
    written: dict[Path, str] = {}
    for option, path in paths.items():
        if path is None:
            continue
        if not path.absolute().parent.is_dir():
            raise InputError(f"{option} is {path}; expected a file in a folder that exists")
        if path.is_dir():
            raise InputError(f"{option} is {path}, which is a folder; expected a file")
        other = written.setdefault(path.resolve(), option)
        if other != option:
            raise InputError(f"{option} is {path}, as {other} is; expected another file")


def _check_named(option: str, named: str | None) -> None:
    if named is None:
        raise InputError(
            f"{option} is missing; expected both sides, --jax package.module:make --torch package.module:make"
        )
    module, _, function = named.partition(":")
    if not module or not function:
        raise InputError(f"{option} is {named!r}; expected a module and a function of it, package.module:make")


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
