"""A cause: why two tensors differ, and what each side did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CauseName = Literal[
    "eps of the clip",
    "fused multiply-add",
    "reduction order",
    "sqrt",
    "tie rule",
    "rounding mode",
    "saturation",
    "flushed subnormals",
    "dtype promotion",
    "reciprocal",
    "order of operations",
    "library function",
    "NaN payload",
    "signed zero",
    "inputs differ",
    "operations differ",
    "shape",
    "missing",
    "unknown",
]
"""Why two tensors differ.

``eps of the clip``: ``max_norm / norm`` against ``max_norm / (norm + 1e-6)``. ``fused multiply-add``: ``x * y + z``
rounded once or twice. ``reduction order``: a sum taken in another order, each within its bound of the exact one.
``sqrt``: a square root that is not correctly rounded. ``tie rule``: where a value half way between two others goes.
``rounding mode``: not to nearest. ``saturation``: ±max against inf or NaN. ``flushed subnormals``: zero against
subnormals. ``dtype promotion``: computed in another dtype. ``reciprocal``: ``x * (1 / y)`` against ``x / y``.
``order of operations``: as ``(x / norm) * max_norm`` against ``x * (max_norm / norm)``. ``library function``: two
float32 approximations of exp, log or tanh. ``NaN payload``: NaN on both sides, with other bits. ``signed zero``: 0
against -0. ``inputs differ``: what went into the operation differs already. ``operations differ``: the sides say that
they did different things. ``shape``, ``missing``: there is nothing to compare with. ``unknown``: none of these.
"""


@dataclass(frozen=True)
class Cause:
    """Why two tensors differ.

    Attributes:
        names: the cause; more than one where it takes several to explain all that differs.
        sides: what side a did, and what b.
        elements: how many differing elements were looked at; the cause explains each of them.
        alternatives: causes that would explain the same elements as well: with few elements, chance can tell no better.
    """

    names: tuple[CauseName, ...]
    sides: tuple[str, str] = ("", "")
    elements: int = 0
    alternatives: tuple[CauseName, ...] = ()

    @property
    def name(self) -> str:
        """The names in one.

        >>> Cause(("tie rule", "saturation")).name
        'tie rule and saturation'
        """
        return " and ".join(self.names)

    def told(self, labels: tuple[str, str] = ("a", "b")) -> str:
        """The cause in a sentence.

        >>> Cause(("fused multiply-add",), ("rounded once", "rounded twice"), 7).told(("jax", "torch"))
        'fused multiply-add: jax rounded once; torch rounded twice; explains all 7 elements looked at'
        """
        parts = [f"{label} {did}" for label, did in zip(labels, self.sides, strict=True) if did]
        if self.elements == 1:
            parts.append("explains the one element that differs, which may be chance")
        elif self.elements:
            parts.append(f"explains all {self.elements:,} elements looked at")
        if self.alternatives:
            parts.append(f"so would {' or '.join(self.alternatives)}")
        return f"{self.name}: {'; '.join(parts)}" if parts else self.name

    def as_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {
            "cause": self.name,
            "sides": list(self.sides),
            "elements": self.elements,
            "alternatives": list(self.alternatives),
        }


UNKNOWN = Cause(("unknown",))
