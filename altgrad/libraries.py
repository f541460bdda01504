"""What other libraries make of a value: each is imported only when asked, and runs for real."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from altgrad_core.formats import FORMAT_REGISTRY, Format, Overflow, Rounding


@dataclass(frozen=True)
class Answer:
    """What a library returned.

    Attributes:
        library: its name.
        value: what it made of the value; None if it did not.
        how: the call, or why there was none.
    """

    library: str
    value: float | None
    how: str

    def __post_init__(self) -> None:
        """Python floats only, so that answers compare and print alike."""
        if self.value is not None:
            object.__setattr__(self, "value", float(self.value))


Caster = Callable[[np.float32, Format, Rounding, Overflow], Answer]


def ml_dtypes_answer(x: np.float32, format: Format, rounding: Rounding, overflow: Overflow) -> Answer:
    """``astype`` to the dtype of ml_dtypes, or of NumPy."""
    del overflow  # its dtypes know one
    return _answer("ml_dtypes", ("ml_dtypes",), lambda: _by_numpy(x, format, rounding))


def jax_answer(x: np.float32, format: Format, rounding: Rounding, overflow: Overflow) -> Answer:
    """``astype`` under ``jit``, which is XLA's conversion, on the CPU."""
    del overflow
    return _answer("JAX", ("jax", "ml_dtypes"), lambda: _by_jax(x, format, rounding))


def torch_answer(x: np.float32, format: Format, rounding: Rounding, overflow: Overflow) -> Answer:
    """``Tensor.to`` on the CPU."""
    del overflow
    return _answer("torch", ("torch",), lambda: _by_torch(x, format, rounding))


def gfloat_answer(x: np.float32, format: Format, rounding: Rounding, overflow: Overflow) -> Answer:
    """``gfloat.round_float`` to the same format in gfloat's terms."""
    return _answer("gfloat", ("gfloat",), lambda: _by_gfloat(x, format, rounding, overflow))


def installed_version(package: str) -> str | None:
    """The version of an installed package, None without it; imports nothing.

    >>> installed_version("no-such-package-as-this")
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _answer(library: str, needs: tuple[str, ...], run: Callable[[], tuple[float | None, str]]) -> Answer:
    for package in needs:
        try:
            import_module(package)
        except ModuleNotFoundError:
            return Answer(library, None, "not installed")
    return Answer(library, *run())


def dtype_names(format: Format) -> list[str]:
    """The names of dtypes with the same codes and values.

    >>> dtype_names(FORMAT_REGISTRY["E4M3"]), dtype_names(FORMAT_REGISTRY["E3M4"])
    (['float8_e4m3fn'], [])
    """
    return [name for name, known in FORMAT_REGISTRY.items() if known == format and name.startswith(("float", "bfloat"))]


def _how(call: str, rounding: Rounding) -> str:
    return call if rounding == "nearest_even" else f"{call}: nearest even only"


def _by_numpy(x: np.float32, format: Format, rounding: Rounding) -> tuple[float | None, str]:
    dtype = format.dtype
    if dtype is None:
        return None, "has no such dtype"
    with np.errstate(all="ignore"):
        return float(x.astype(dtype).astype(np.float64)), _how(f"astype({dtype.name})", rounding)


def _by_jax(x: np.float32, format: Format, rounding: Rounding) -> tuple[float | None, str]:
    import jax
    import jax.numpy as jnp

    names = [name for name in dtype_names(format) if hasattr(jnp, name)]
    if not names:
        return None, "has no such dtype"
    with jax.default_device(jax.devices("cpu")[0]):
        cast = jax.jit(lambda v: v.astype(names[0]).astype(jnp.float32))
        try:
            return float(cast(jnp.float32(x))), _how(f"astype({names[0]}) under jit", rounding)
        except jax.errors.JaxRuntimeError:
            return None, f"astype({names[0]}) fails on the CPU"


def _by_torch(x: np.float32, format: Format, rounding: Rounding) -> tuple[float | None, str]:
    import torch

    names = [name for name in dtype_names(format) if isinstance(getattr(torch, name, None), torch.dtype)]
    if not names:
        return None, "has no such dtype"
    # By way of the bits: a Python float would lose the payload of NaN.
    tensor = torch.from_numpy(np.array([x]).view(np.int32)).view(torch.float32)
    return float(tensor.to(getattr(torch, names[0])).to(torch.float32)[0]), _how(f"to(torch.{names[0]})", rounding)


def _by_gfloat(x: np.float32, format: Format, rounding: Rounding, overflow: Overflow) -> tuple[float | None, str]:
    import gfloat

    modes = {
        "nearest_even": gfloat.RoundMode.TiesToEven,
        "nearest_away": gfloat.RoundMode.TiesToAway,
        "toward_zero": gfloat.RoundMode.TowardZero,
    }
    if rounding not in modes:
        return None, "draws its random bits in a way of its own"
    # Without a code for what overflows gfloat refuses, unless it is told to saturate.
    saturates = overflow != "native" or not format.has_nan
    call = f"round_float({modes[rounding].name}{', sat=True' if saturates else ''})"
    try:
        return gfloat.round_float(gfloat_info(format), float(x), modes[rounding], sat=saturates), call
    except ValueError:
        return None, f"refuses {'NaN' if math.isnan(x) else 'this'} in a format without it"


def gfloat_info(format: Format) -> Any:
    """A format in gfloat's terms, which count the exponents of fixed point from 1."""
    import gfloat

    nan_by_the_topmost = format.has_nan and (format.has_negative_zero or not format.is_signed)
    ieee = format.has_inf and format.has_negative_zero
    return gfloat.FormatInfo(
        str(format),
        format.bits,
        format.mantissa_bits + 1,
        bias=format.bias if format.exponent_bits else 1,
        is_signed=format.is_signed,
        domain=gfloat.Domain.Extended if format.has_inf else gfloat.Domain.Finite,
        has_nz=format.has_negative_zero,
        num_high_nans=2**format.mantissa_bits - 1 if ieee else int(nan_by_the_topmost),
        has_subnormals=format.is_signed,
        is_twos_complement=False,
    )
