"""How a tensor came to be: what a step may attach to it, so that a difference can be traced to its cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, SupportsFloat, get_args

from altgrad_core.errors import InputError, check_choice
from altgrad_core.formats import Format, parse

OperationName = Literal[
    "multiply_add", "add", "multiply", "divide", "sum", "dot", "sqrt", "exp", "log", "tanh", "cast", "clip_coefficient",
    "clip",
]  # fmt: skip
"""What can be recomputed.

``multiply_add``: ``x * y + z``. ``add``, ``multiply``, ``divide``: of ``x`` and ``y``. ``sum``: of ``x``, over
``axis``, everything by default. ``dot``: ``x @ y``. ``sqrt``, ``exp``, ``log``, ``tanh``: of ``x``. ``cast``: of ``x``
to ``format``. ``clip_coefficient``: ``min(1, max_norm / norm)`` with or without eps. ``clip``: that times ``x``.
"""

_INPUTS: Mapping[OperationName, tuple[str, ...]] = {
    "multiply_add": ("x", "y", "z"),
    "add": ("x", "y"),
    "multiply": ("x", "y"),
    "divide": ("x", "y"),
    "sum": ("x",),
    "dot": ("x", "y"),
    "sqrt": ("x",),
    "exp": ("x",),
    "log": ("x",),
    "tanh": ("x",),
    "cast": ("x",),
    "clip_coefficient": ("norm",),
    "clip": ("x", "norm"),
}
_OPTIONS: Mapping[OperationName, str] = {
    "sum": "axis",
    "cast": "format",
    "clip_coefficient": "max_norm",
    "clip": "max_norm",
}


@dataclass(frozen=True)
class Operation:
    """An operation with what went into it.

    Attributes:
        name: which one.
        inputs: tensors of either framework, by the names in :data:`OperationName`.
        axis: of ``sum``: over which axes, all by default.
        format: of ``cast``: to which format.
        max_norm: of ``clip`` and ``clip_coefficient``: the norm that is let through.
    """

    name: OperationName
    inputs: Mapping[str, object] = field(repr=False)
    axis: int | Sequence[int] | None = None
    format: Format | None = None
    max_norm: float | None = None

    def __post_init__(self) -> None:
        """Refuse unknown operations, and inputs and options that are missing or of another operation."""
        check_choice("operation", self.name, get_args(OperationName))
        wanted, option = _INPUTS[self.name], _OPTIONS.get(self.name)
        options = {"axis": self.axis, "format": self.format, "max_norm": self.max_norm}
        given = (*self.inputs, *(name for name, value in options.items() if value is not None))
        for name in given:
            check_choice(f"input of {self.name}", name, (*wanted, option) if option else wanted)
        lacking = [name for name in wanted if name not in self.inputs]
        lacking += [option] if option and option != "axis" and options[option] is None else []
        if lacking:
            raise InputError(f"{self.name} was given {', '.join(given) or 'nothing'}; expected {lacking[0]} as well")

    def __str__(self) -> str:
        """The name, with what it was told."""
        told = {"axis": self.axis, "format": self.format, "max_norm": self.max_norm}
        return f"{self.name}({', '.join(f'{name}={value}' for name, value in told.items() if value is not None)})"


@dataclass(frozen=True)
class Made:
    """A tensor together with the operation that made it; stands wherever a tensor may stand in a tree."""

    value: object
    operation: Operation


def made_by(
    value: object,
    name: OperationName,
    *,
    axis: int | Sequence[int] | None = None,
    format: str | Format | None = None,
    max_norm: SupportsFloat | None = None,
    **inputs: object,
) -> Made:
    """Say how a tensor was made.

    Args:
        value: the tensor, of either framework.
        name: the operation, one of :data:`OperationName`.
        axis: of ``sum``: over which axes, all by default.
        format: of ``cast``: a name or a :class:`~altgrad_core.formats.Format`.
        max_norm: of ``clip`` and ``clip_coefficient``: a number, or a tensor of one.
        **inputs: the tensors that went into it, by the names listed there.

    Raises:
        InputError: for an unknown operation or format, and for inputs that are missing or unknown.

    >>> str(made_by([4.0], "cast", x=[4.1], format="E4M3").operation)
    'cast(format=E4M3)'
    >>> made_by(1.0, "sqrrt", x=1.0)
    Traceback (most recent call last):
    altgrad_core.errors.InputError: unknown operation 'sqrrt'; did you mean 'sqrt'? Expected one of multiply_add, ...
    """
    known = None if format is None else parse(format)
    return Made(value, Operation(name, inputs, axis, known, None if max_norm is None else float(max_norm)))
