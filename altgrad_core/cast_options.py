"""What a checkpoint says of a cast beside its format: where its scales come from, so that another rule is refused.

Text, because its arrays would fit: a delayed scale of powers of two and one of ratios have the same shapes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from altgrad_core.errors import InputError
from altgrad_core.scaling import Granularity, PerBlock, PerTensor

CAST_OPTIONS_VERSION = 1
"""Of what is written. A reader takes its own version only."""

_LENGTH = 256
"""Bytes of what is written; the longest of all has some 180."""

Options = Mapping[str, object]
"""By name; all of it JSON."""


def scaling_options(scaling: Any) -> dict[str, object]:
    """Where scales come from, but for the number of a static one, which is data.

    Args:
        scaling: a dataclass, a framework's ``Static``, ``Current`` or ``Delayed``.
    """
    named = {each.name: getattr(scaling, each.name) for each in dataclasses.fields(scaling) if each.name != "value"}
    plain = {name: each.item() if isinstance(each, np.generic) else each for name, each in named.items()}
    return {"scaling": type(scaling).__name__.lower(), **plain}


def granularity_options(granularity: Granularity) -> dict[str, object]:
    """Which elements share a scale.

    >>> granularity_options(PerBlock(32))
    {'granularity': 'block', 'size': 32, 'axis': -1}
    """
    if isinstance(granularity, PerTensor):
        return {"granularity": "tensor"}
    if isinstance(granularity, PerBlock):
        return {"granularity": "block", "size": granularity.size, "axis": granularity.axis}
    axes = granularity.axes
    return {"granularity": "channel", "axes": axes if isinstance(axes, int) else list(axes)}


def write_options(options: Options) -> bytes:
    """The options as a checkpoint holds them: of one length, so that no reader stops at another before it names them.

    >>> write_options({"scaling": "current", "power_of_two": True}).rstrip()
    b'{"power_of_two": true, "scaling": "current", "version": 1}'
    """
    return json.dumps({"version": CAST_OPTIONS_VERSION, **options}, sort_keys=True).encode().ljust(_LENGTH)


def check_options(written: bytes, expected: Options) -> None:
    """Refuse what was written of another cast.

    Args:
        written: by :func:`write_options`.
        expected: the options of the cast that is to go on.

    Raises:
        InputError: naming what differs, and for what is no such text.

    >>> check_options(write_options({"scaling": "delayed", "window": 8}), {"scaling": "delayed", "window": 16})
    Traceback (most recent call last):
    altgrad_core.errors.InputError: the checkpoint is of window=8; expected window=16, as the model's rule says
    """
    try:
        found = json.loads(written)
    except ValueError:  # of JSON, and of UTF-8
        found = None
    if not isinstance(found, dict) or found.get("version") != CAST_OPTIONS_VERSION:
        raise InputError(
            f"the checkpoint says {written[:80]!r} of how a cast scales; expected JSON of version "
            f"{CAST_OPTIONS_VERSION}"
        )
    wanted = {"version": CAST_OPTIONS_VERSION, **json.loads(json.dumps(expected))}
    names = [name for name in dict.fromkeys([*wanted, *found]) if found.get(name) != wanted.get(name)]
    if names:
        raise InputError(
            f"the checkpoint is of {_listed(found, names)}; expected {_listed(wanted, names)}, as the model's rule says"
        )


def _listed(options: Options, names: list[str]) -> str:
    return ", ".join(f"{name}={options[name]!r}" for name in names if name in options) or "none of them"
