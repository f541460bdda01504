"""Every other library that casts to 8-bit floats, on its own ground: its speed, the formats it lacks, its wrong inputs.

``python -m benchmarks.peers --help``; benchmarks/README.md says how to install the libraries. One that is missing is
reported as such. ``--write`` merges the results of several environments into one table.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import torch

import altgrad_jax
import altgrad_torch
from altgrad_core.formats import FORMAT_REGISTRY, Format, Overflow
from altgrad_core.reference import quantize_reference
from benchmarks.peers_page import Row, show, write
from benchmarks.timing import side_by_side

FORMATS = ("E0M7", "E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0")
_FP8 = {"E4M3": "float8_e4m3fn", "E5M2": "float8_e5m2"}
_OUTPUT = Path(__file__).parents[1] / "docs" / "benchmarks"

Array = Any
Cast = Callable[[Array], Array]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Documented = Callable[[Format, Float32], Float64]
Framework = Literal["NumPy", "JAX", "PyTorch"]

_ARRAY_OF: dict[Framework, Callable[[Float32], Array]] = {
    "NumPy": np.copy,
    "JAX": jnp.asarray,
    "PyTorch": lambda x: torch.from_numpy(x.copy()),
}


@dataclass(frozen=True)
class Peer:
    """One way of casting float32 to a format and back.

    Attributes:
        name: the library.
        distribution: what it is called where its version is looked up.
        call: the function that casts, for the reader.
        frameworks: whose arrays it takes. In JAX it is jitted.
        formats: those of which it can return every finite value, with the parameters it has.
        make: the cast to a format. Imports the library, so that a missing one is missed here.
        documented: what its documentation promises for each input.
        excludes_nan: whether it says that NaN must not be given to it.
    """

    name: str
    distribution: str
    call: str
    frameworks: tuple[Framework, ...]
    formats: tuple[str, ...]
    make: Callable[[Format], Cast]
    documented: Documented
    excludes_nan: bool = False

    def cast_to(self, target: Format, framework: Framework) -> Cast:
        function = self.make(target)
        # Once with a concrete array: pychop finds out its backend that way, and cannot under jit.
        function(_ARRAY_OF[framework](np.zeros(1, np.float32)))
        return jax.jit(lambda x: function(x)) if framework == "JAX" else function


# --- what the libraries document: to nearest, ties to the even code, and then ---------------------------------------


def _rounds(overflow: Overflow) -> Documented:
    return lambda target, x: quantize_reference(x, target, overflow=overflow)


def _rounds_without_specials(target: Format, x: Float32) -> Float64:
    """Where we have inf and NaN there are numbers, so it saturates at a larger maximum."""
    return quantize_reference(x, replace(target, has_inf=False, has_nan=False), overflow="saturate")


def _rounds_twos_complement(target: Format, x: Float32) -> Float64:
    """Fixed point with one more value at the negative end; an infinity becomes our maximum of its sign."""
    quantum = 2.0 ** (target.min_exponent - target.mantissa_bits)
    lowest = -target.max_representable_value - quantum
    saturated = quantize_reference(x, target, overflow="saturate")
    return np.where((x <= -_upper_end(target)) & np.isfinite(x), lowest, saturated)


def _rounds_as_torch(target: Format, x: Float32) -> Float64:
    return quantize_reference(x, target, overflow="native" if target.has_inf else "saturate")


# --- the libraries --------------------------------------------------------------------------------------------------


def _altgrad_jax(target: Format) -> Cast:
    return lambda x: altgrad_jax.quantize(x, target)


def _altgrad_torch(target: Format) -> Cast:
    return lambda x: altgrad_torch.quantize(x, target)


def _astype(target: Format) -> Cast:
    dtype = getattr(jnp, _FP8[target.name])
    return lambda x: x.astype(dtype).astype(jnp.float32)


def _reduce_precision(target: Format) -> Cast:
    return lambda x: jax.lax.reduce_precision(x, target.exponent_bits, target.mantissa_bits)


def _flax(target: Format) -> Cast:
    from flax.linen import fp8_ops

    dtype, one = getattr(jnp, _FP8[target.name]), jnp.float32(1)
    return lambda x: fp8_ops.qdq(x, dtype, one, jnp.float32)


def _qwix(target: Format) -> Cast:
    from qwix._src.core import numerics

    dtype = getattr(jnp, _FP8[target.name])
    return lambda x: numerics.convert_to(x, dtype).astype(jnp.float32)


def _ml_dtypes(target: Format) -> Cast:
    import ml_dtypes

    dtype = getattr(ml_dtypes, _FP8[target.name])
    return lambda x: x.astype(dtype).astype(np.float32)


def _gfloat(target: Format) -> Cast:
    from gfloat import Domain, FormatInfo, round_ndarray

    info = FormatInfo(
        target.name,
        target.bits,
        target.mantissa_bits + 1,
        bias=1 - target.min_exponent,
        is_signed=True,
        domain=Domain.Extended if target.has_inf else Domain.Finite,
        has_nz=True,
        num_high_nans=(1 << target.mantissa_bits) - 1 if target.has_inf else int(target.has_nan),
        has_subnormals=True,
        is_twos_complement=False,
    )
    # Without saturation it raises where a format without specials overflows.
    return lambda x: round_ndarray(info, x, sat=not target.has_nan)


def _chop(target: Format) -> Cast:
    import pychop

    return pychop.Chop(target.exponent_bits, target.mantissa_bits)


def _chopf(target: Format) -> Cast:
    import pychop

    fraction_bits = target.mantissa_bits - target.min_exponent
    return pychop.Chopf(target.bits - fraction_bits, fraction_bits)


def _torch_to(target: Format) -> Cast:
    dtype = getattr(torch, _FP8[target.name])
    return lambda x: x.to(dtype).to(torch.float32)


def _torchao(target: Format) -> Cast:
    from torchao.float8.float8_utils import to_fp8_saturated

    dtype = getattr(torch, _FP8[target.name])
    return lambda x: to_fp8_saturated(x, dtype).to(torch.float32)


def _torchao_floatx(target: Format) -> Cast:
    from torchao.prototype.custom_fp_utils import _f32_to_floatx_unpacked, _floatx_unpacked_to_f32

    bits = target.exponent_bits, target.mantissa_bits
    return lambda x: _floatx_unpacked_to_f32(_f32_to_floatx_unpacked(x, *bits), *bits)


def _qtorch_float(target: Format) -> Cast:
    from qtorch.quant import float_quantize

    return lambda x: float_quantize(x, target.exponent_bits, target.mantissa_bits, rounding="nearest")


def _qtorch_fixed(target: Format) -> Cast:
    from qtorch.quant import fixed_point_quantize

    fraction_bits = target.mantissa_bits - target.min_exponent
    return lambda x: fixed_point_quantize(x, target.bits, fraction_bits, symmetric=True, rounding="nearest")


def _microxcaling(target: Format) -> Cast:
    from mx.elemwise_ops import _quantize_elemwise_core

    sizes = target.mantissa_bits + 2, target.exponent_bits, target.max_representable_value
    return lambda x: _quantize_elemwise_core(x, *sizes, round="even", saturate_normals=True)


_JAX: tuple[Framework, ...] = ("JAX",)
_TORCH: tuple[Framework, ...] = ("PyTorch",)
_NUMPY: tuple[Framework, ...] = ("NumPy",)
_ALL = _NUMPY + _JAX + _TORCH
_TWO, _FIXED = tuple(_FP8), ("E0M7", "E1M6")
_IEEE_BIAS = tuple(name for name in FORMATS if name not in ("E0M7", "E3M4"))
_native, _saturating, _saturating_finite = _rounds("native"), _rounds("saturate"), _rounds("saturate_finite")

PEERS = (
    Peer("AltGrad", "altgrad", "quantize", _JAX, FORMATS, _altgrad_jax, _native),
    Peer("AltGrad", "altgrad", "quantize", _TORCH, FORMATS, _altgrad_torch, _native),
    Peer("XLA", "jaxlib", "astype", _JAX, _TWO, _astype, _native),
    Peer("XLA", "jaxlib", "lax.reduce_precision", _JAX, ("E5M2",), _reduce_precision, _native),
    Peer("Flax", "flax", "fp8_ops.qdq", _JAX, _TWO, _flax, _saturating),
    Peer("Qwix", "qwix", "numerics.convert_to", _JAX, _TWO, _qwix, _saturating),
    Peer("gfloat", "gfloat", "round_ndarray", _ALL, FORMATS, _gfloat, _native),
    Peer("ml_dtypes", "ml_dtypes", "astype", _NUMPY, _TWO, _ml_dtypes, _native),
    Peer("pychop", "pychop", "Chop", _ALL, ("E5M2",), _chop, _native),
    Peer("pychop", "pychop", "Chopf", _ALL, _FIXED, _chopf, _rounds_twos_complement),
    Peer("PyTorch", "torch", "Tensor.to", _TORCH, _TWO, _torch_to, _rounds_as_torch),
    Peer("torchao", "torchao", "to_fp8_saturated", _TORCH, _TWO, _torchao, _saturating),
    Peer(
        "torchao",
        "torchao",
        "_f32_to_floatx_unpacked",
        _TORCH,
        _IEEE_BIAS,
        _torchao_floatx,
        _rounds_without_specials,
        excludes_nan=True,
    ),
    Peer("QPyTorch", "qtorch", "float_quantize", _TORCH, _IEEE_BIAS[1:], _qtorch_float, _rounds_without_specials),
    Peer("QPyTorch", "qtorch", "fixed_point_quantize", _TORCH, _FIXED, _qtorch_fixed, _saturating),
    Peer(
        "microxcaling",
        "mx",
        "_quantize_elemwise_core",
        _TORCH,
        ("E0M7", *_IEEE_BIAS),
        _microxcaling,
        _saturating_finite,
    ),
)
# --- right or wrong -------------------------------------------------------------------------------------------------


def boundary_inputs(target: Format) -> Float32:
    """Where a cast can go wrong, every float32 once.

    The grid, the midpoints (that beyond max included), what lies far beyond, float32 subnormals, each with its two
    float32 neighbours, all of it with both signs, zeros and infinities among it, and NaN.
    """
    largest = target.max_representable_value
    beyond = [2 * largest, 2.5 * largest, 1e3 * largest, np.finfo(np.float32).max, np.inf]
    subnormals = 2.0 ** np.array([-149, -148, -140, -127, -126])
    middle = np.concatenate([_grid(target), _midpoints(target), beyond, subnormals]).astype(np.float32)
    with np.errstate(over="ignore"):
        near = [np.nextafter(middle, np.float32(end)) for end in (np.inf, -np.inf)]
    positive = np.abs(np.concatenate([middle, *near]))
    signed = np.concatenate([positive, -positive, [np.float32(np.nan)]])
    return np.unique(signed.view(np.uint32)).view(np.float32)


def judge(peer: Peer, framework: Framework, target: Format, cast: Cast) -> Row:
    """Count the boundary inputs that a peer rounds wrongly, by kind, and those beyond max that it treats otherwise."""
    x = boundary_inputs(target)
    with np.errstate(all="ignore"):
        got = np.asarray(cast(_ARRAY_OF[framework](x))).astype(np.float64)
    right, documented = quantize_reference(x, target), peer.documented(target, x)
    if peer.excludes_nan:
        documented = np.where(np.isnan(x), got, documented)
    inside = _within_range(x, target)
    wrong = {kind: mask & inside & ~_same(got, right) for kind, mask in _kinds(x, got, right, target).items()}
    strange = {kind: mask & ~inside & ~_same(got, documented) for kind, mask in _kinds_beyond(x).items()}
    return {
        "inputs": len(x),
        "within_range": int(inside.sum()),
        "wrong": {kind: int(mask.sum()) for kind, mask in wrong.items()},
        "beyond_differs": int((~inside & ~_same(got, right)).sum()),
        "beyond_not_as_documented": int(sum(mask.sum() for mask in strange.values())),
        "examples": [_example(kind, mask, x, got, right) for kind, mask in wrong.items() if mask.any()]
        + [_example(kind, mask, x, got, documented) for kind, mask in strange.items() if mask.any()],
    }


def _kinds(x: Float32, got: Float64, right: Float64, target: Format) -> dict[str, Mask]:
    """Kinds of wrong results; each input is of one kind."""
    zero = (right == 0) & (got == 0)
    tie = np.isin(np.abs(x), _midpoints(target)) & ~zero
    small = (np.abs(x) < (target.min_normal or 0)) & ~zero & ~tie
    return {"sign of zero": zero, "on ties": tie, "among subnormals": small, "elsewhere": ~zero & ~tie & ~small}


def _kinds_beyond(x: Float32) -> dict[str, Mask]:
    return {"beyond max": np.isfinite(x), "inf": np.isinf(x), "NaN": np.isnan(x)}


def _example(kind: str, mask: Mask, x: Float32, got: Float64, right: Float64) -> dict[str, str]:
    first = int(np.flatnonzero(mask)[0])
    return {"kind": kind} | {
        name: repr(float(values[first])) for name, values in (("input", x), ("got", got), ("right", right))
    }


def _same(a: Float64, b: Float64) -> Mask:
    """Equal in value and sign of zero; any NaN is like any other."""
    return ((a == b) & (np.signbit(a) == np.signbit(b))) | (np.isnan(a) & np.isnan(b))


def _within_range(x: Float32, target: Format) -> Mask:
    """What rounds to a value of the format: up to half a quantum beyond max, that itself only if max is even."""
    magnitude, end = np.abs(x.astype(np.float64)), _upper_end(target)
    return (magnitude < end) | ((magnitude == end) & (target.max_code % 2 == 0))


def _grid(target: Format) -> Float64:
    return target.code_book()[: target.max_code + 1]


def _midpoints(target: Format) -> Float64:
    grid = _grid(target)
    return np.append((grid[1:] + grid[:-1]) / 2, _upper_end(target))


def _upper_end(target: Format) -> float:
    top_exponent = max(target.max_exponent, target.min_exponent)
    return target.max_representable_value + 2.0 ** (top_exponent - target.mantissa_bits - 1)


# --- speed ----------------------------------------------------------------------------------------------------------


def race(framework: Framework, target: Format, cast: Cast, elements: int, rounds: int) -> Row:
    """Throughput of a peer, and how much longer it takes than AltGrad beside it, both with the peer's arrays."""
    x = _ARRAY_OF[framework](np.random.default_rng(0).standard_normal(elements, dtype=np.float32))
    ours = _altgrad(framework, target)
    with np.errstate(all="ignore"):
        timings = side_by_side({"ours": lambda: ours(x), "theirs": lambda: cast(x)}, rounds)
    return {
        "elements_per_second": elements / timings["theirs"].median,
        "altgrad_elements_per_second": elements / timings["ours"].median,
        "altgrad_times_as_fast": timings["ours"].speed_against(timings["theirs"]),
    }


def _altgrad(framework: Framework, target: Format) -> Cast:
    """AltGrad's cast of a framework's arrays; of NumPy's, for which it has none, by way of JAX and back."""
    if framework == "PyTorch":
        return _altgrad_torch(target)
    jitted = jax.jit(_altgrad_jax(target))
    return jitted if framework == "JAX" else lambda x: np.asarray(jitted(x))


# --- results --------------------------------------------------------------------------------------------------------


def run(peer: Peer, framework: Framework, options: argparse.Namespace) -> Row:
    row: Row = {
        "library": peer.name,
        "version": _version(peer.distribution),
        "call": peer.call,
        "framework": framework,
        "lacks": [name for name in FORMATS if name not in peer.formats],
        "environment": _environment(),
        "elements": None if options.inputs_only else options.elements,
    }
    formats: dict[str, Row] = {}
    try:
        for name in peer.formats:
            target = FORMAT_REGISTRY[name]
            cast = peer.cast_to(target, framework)
            formats[name] = judge(peer, framework, target, cast)
            if not options.inputs_only:
                formats[name] |= race(framework, target, cast, options.elements, options.rounds)
    except ModuleNotFoundError as error:
        return row | {"version": "", "formats": {}, "status": f"not run: no module {error.name}"}
    except Exception as error:  # whatever a library does that cannot be built or run costs its row, not the others'
        print(f"{peer.name}, {peer.call}: {error!r}", file=sys.stderr)
        return row | {"formats": {}, "status": f"not run: {type(error).__name__}"}
    return row | {"formats": formats, "status": "run"}


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "from source"


def _environment() -> str:
    versions = ", ".join(f"{name} {_version(name)}" for name in ("numpy", "jax", "torch"))
    return (
        f"{_cpu()}, {os.cpu_count()} cores (JAX on {jax.default_backend()}, PyTorch and NumPy on cpu); "
        f"Python {platform.python_version()}, {versions}"
    )


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """One row for each peer and framework: the new one, unless that is worth less than the old one."""
    rows = {_key(row): row for row in old}
    for row in new:
        if _worth(row) >= _worth(rows.get(_key(row), row)):
            rows[_key(row)] = row
    order = [(peer.name, peer.call, framework) for peer in PEERS for framework in peer.frameworks]
    return [rows[key] for key in order if key in rows]


def _worth(row: Row) -> tuple[bool, bool]:
    """A row that did not run must not replace one that did, nor one without timings one with them."""
    return row["status"] == "run", row["elements"] is not None


def _key(row: Row) -> tuple[str, str, str]:
    return row["library"], row["call"], row["framework"]


def merge_into(folder: Path, rows: Iterable[Row]) -> list[Row]:
    """The rows that a folder has, with new ones in the place of theirs."""
    data = folder / "peers.json"
    return merge(json.loads(data.read_text()) if data.exists() else [], rows)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="merge the results into peers.json and peers.md")
    parser.add_argument("--output", type=Path, default=_OUTPUT, help="their folder (default: docs/benchmarks)")
    parser.add_argument("--only", nargs="+", metavar="LIBRARY", help="these alone")
    parser.add_argument("--inputs-only", action="store_true", help="count wrong inputs, time nothing")
    parser.add_argument("--elements", type=int, default=2**20)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    known = {peer.name for peer in PEERS}
    if unknown := set(options.only or ()) - known:
        parser.error(f"no library {min(unknown)!r}; expected some of {', '.join(sorted(known))}")
    return options


def main(arguments: Sequence[str] = ()) -> None:
    options = _options(arguments)
    wanted = [peer for peer in PEERS if options.only is None or peer.name in options.only]
    rows = [run(peer, framework, options) for peer in wanted for framework in peer.frameworks]
    if options.write:
        rows = merge_into(options.output, rows)
        write(rows, options.output)
    show(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
