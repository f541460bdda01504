"""``altgrad formats``, ``altgrad explain``, ``altgrad vectors`` and ``altgrad packed``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.text import Text

from altgrad_core.errors import InputError
from altgrad_core.formats import Overflow, Rounding, parse

_PLOT_HEIGHT = 4
_STANDARD_OUTPUT = Path("-")


@dataclass(frozen=True)
class FormatsConfig:
    """List the formats, or tell all about one of them."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """One format for its whole story, several for a table of them: E3M4, float8_e5m2, E4M3b11fnuz, ..."""
    plot: bool = False
    """Draw where the positive values lie, on a log2 axis."""

    def __post_init__(self) -> None:
        """Refuse names that mean nothing before anything is printed."""
        for name in self.names:
            parse(name)


@dataclass(frozen=True)
class ExplainConfig:
    """Show what becomes of a value when it is cast, and why: here and in other libraries."""

    value: tyro.conf.Positional[str]
    """1.5, -3e-5, 0x1.8p0 (with p: a hex float), 0x3fc00000 (8 digits: float32 bits), 2^-9, nan, -inf, -0."""
    format: str
    """The format to cast to."""
    rounding: Rounding = "nearest_even"
    """How to round; nearest_even sends ties to the even code."""
    overflow: Overflow = "native"
    """What becomes of a value that rounds beyond max."""
    random_bits: int | None = None
    """The random bits that were drawn; only with --rounding stochastic."""
    stochastic_bits: int | None = None
    """How many random bits count, 1 to 24 (24 by default); only with --rounding stochastic."""

    def __post_init__(self) -> None:
        """Refuse options without effect."""
        _refuse_without_stochastic(self.rounding, random_bits=self.random_bits, stochastic_bits=self.stochastic_bits)


@dataclass(frozen=True)
class VectorsConfig:
    """Write golden vectors of a cast, to test any implementation with: see docs/vectors.md."""

    format: str
    """The format to cast to, of at most 16 bits."""
    out: Path
    """The file to write, JSON lines; - for standard output."""
    rounding: Rounding = "nearest_even"
    """How to round; nearest_even sends ties to the even code."""
    overflow: Overflow = "native"
    """What becomes of a value that rounds beyond max."""
    stochastic_bits: int | None = None
    """How many random bits count, 1 to 24 (24 by default); only with --rounding stochastic."""
    random_inputs: int = 1000
    """Random bit patterns out of all float32, and as many again in the format's range."""
    seed: int = 0
    """Seed of all that is random."""
    overwrite: bool = False
    """Replace the file if it exists."""

    def __post_init__(self) -> None:
        """Refuse options without effect, and a file that exists before time is spent on it."""
        _refuse_without_stochastic(self.rounding, stochastic_bits=self.stochastic_bits)
        if self.out == _STANDARD_OUTPUT:
            if self.overwrite:
                raise InputError("--overwrite has no effect with --out -")
        elif self.out.exists() and not self.overwrite:
            raise InputError(f"{self.out} exists; expected a new file, or --overwrite")


@dataclass(frozen=True)
class PackedConfig:
    """Tell what a file of packed tensors holds: every tensor with its format, scales and bytes."""

    file: tyro.conf.Positional[Path]
    """A file that save_packed wrote, in either framework. What it says of itself is checked; values are not read."""


def _refuse_without_stochastic(rounding: Rounding, **options: int | None) -> None:
    for name, given in options.items():
        if given is not None and rounding != "stochastic":
            raise InputError(f"--{name.replace('_', '-')} has no effect without --rounding stochastic")


def formats(config: FormatsConfig, console: Console | None = None) -> None:
    """Run ``altgrad formats``."""
    from altgrad.show.plot import plot
    from altgrad.show.registry import registry_table
    from altgrad.show.story import print_story
    from altgrad.story import distinct_formats

    console = console or Console()
    chosen = [parse(name) for name in config.names] or distinct_formats()
    if len(config.names) == 1:
        print_story(chosen[0], console)
    else:
        console.print(registry_table(chosen, console.width), highlight=False, crop=False)
    if config.plot:
        height = _PLOT_HEIGHT if len(chosen) == 1 else 1
        console.print(Text("\nWhere the positive values lie", style="bold"))
        console.print(plot(chosen, console.width, height), highlight=False, crop=False)


def explain(config: ExplainConfig, console: Console | None = None) -> None:
    """Run ``altgrad explain``."""
    from altgrad.explain import explain as explained
    from altgrad.show.explanation import print_explanation

    told = explained(
        config.value,
        config.format,
        rounding=config.rounding,
        overflow=config.overflow,
        random_bits=config.random_bits,
        stochastic_bits=config.stochastic_bits,
    )
    print_explanation(told, console or Console())


def vectors(config: VectorsConfig, console: Console | None = None) -> Path:
    """Run ``altgrad vectors``.

    Returns:
        The file's path, which is also the last line printed, to standard error; - for standard output.
    """
    from altgrad_core.vectors import golden_vectors, vector_lines, write_vectors

    made = golden_vectors(
        config.format,
        rounding=config.rounding,
        overflow=config.overflow,
        stochastic_bits=config.stochastic_bits,
        random_inputs=config.random_inputs,
        seed=config.seed,
    )
    told = f"{len(made):,} vectors"
    if config.out == _STANDARD_OUTPUT:
        sys.stdout.writelines(vector_lines(made))
    else:
        told += f": {write_vectors(config.out, made, overwrite=config.overwrite).resolve()}"
    (console or Console(stderr=True)).print(told, soft_wrap=True, highlight=False)
    return config.out


def packed(config: PackedConfig, console: Console | None = None) -> None:
    """Run ``altgrad packed``."""
    from altgrad.show.packed import header_of, print_header

    print_header(header_of(config.file), console or Console())
