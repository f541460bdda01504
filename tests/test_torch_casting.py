"""Casts in torch: strides, chunks, memory, flushed subnormals, gradients, batches, torch.compile."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402 (after the skip)

import altgrad_torch as ag  # noqa: E402
from altgrad_core.formats import FORMAT_REGISTRY, OVERFLOWS, ROUNDINGS, Format, Overflow, Rounding, parse  # noqa: E402
from altgrad_core.reference import round_to_format  # noqa: E402
from altgrad_torch import CodeParams, FormatParams, casting  # noqa: E402
from altgrad_torch.params import edges  # noqa: E402
from altgrad_torch.statistics import _thresholds  # noqa: E402

DISTINCT = tuple(dict.fromkeys(FORMAT_REGISTRY.values()))
every_format = pytest.mark.parametrize("format", DISTINCT, ids=str)
one_of_each_path = pytest.mark.parametrize("format", ["E3M4", "E7M0", "bf16", "float8_e5m2fnuz", "float8_e8m0fnu"])
without_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch makes some of its own


def inputs() -> torch.Tensor:
    """float32 of all magnitudes, both signs, subnormals, infinities and NaN, in no order."""
    bits = np.random.default_rng(0).integers(0, 2**32, 5000, dtype=np.uint32)
    bits[:12] = [0, 1, 2**31, 2**31 + 1, 0x3FFFFF, 0x400000, 0x7FFFFF, 0x800000, 0x7F800000, 0xFF800000, 0x7FC00000, 9]
    near_one = np.random.default_rng(1).standard_normal(5000).astype(np.float32)
    return torch.from_numpy(np.concatenate([bits.view(np.float32), near_one]))


def draws(shape: torch.Size) -> torch.Tensor:
    return ag.hash_bits(tuple(shape), 1)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equality of every bit."""
    whole = {torch.float32: torch.int32, torch.float64: torch.int64}.get(left.dtype, torch.int16)
    return left.dtype == right.dtype and torch.equal(left.contiguous().view(whole), right.contiguous().view(whole))


def casts(rounding: Rounding, x: torch.Tensor) -> dict[str, Any]:
    return {"rounding": rounding, **({"random_bits": draws(x.shape)} if rounding == "stochastic" else {})}


# Shapes, strides, chunks


@one_of_each_path
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_strides(format: str, rounding: Rounding) -> None:
    x = inputs().reshape(20, 10, 50)
    modes = casts(rounding, x)
    expected = ag.quantize(x, format, **modes)
    views: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "transposed": lambda t: t.transpose(0, 2),
        "every second": lambda t: t[::2, :, 1::3],
        "reversed": lambda t: t.flip(0).permute(2, 0, 1),
        "expanded": lambda t: t[:1].expand(7, 10, 50),
    }
    for view in views.values():
        moved = {name: view(mode) if isinstance(mode, torch.Tensor) else mode for name, mode in modes.items()}
        assert same(ag.quantize(view(x), format, **moved), view(expected))


@one_of_each_path
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("chunk", "shape"), [(1, (3, 2, 5)), (7, (3, 4, 5)), (64, (8, 9, 10)), (999, (8, 9, 10))])
def test_chunks_join(
    format: str, rounding: Rounding, chunk: int, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a tensor of any size: each chunk takes its own random bits and scales, whatever the strides."""
    x = inputs()[4900:5620][:: 720 // math.prod(shape)][: math.prod(shape)].reshape(shape)
    modes = casts(rounding, x)
    scales = {
        "one": torch.tensor(0.5),
        "row": 2.0 ** torch.arange(shape[0]).reshape(-1, 1, 1),
        "last": 2.0 ** torch.arange(shape[2]),
    }
    for scale in (None, *scales.values()):
        for mask in (False, True):
            whole = ag.quantize(x, format, scale=scale, saturation_mask=mask, **modes)
            with monkeypatch.context() as smaller:
                smaller.setattr(casting, "_CHUNK", chunk)
                assert same(ag.quantize(x, format, scale=scale, saturation_mask=mask, **modes), whole)
    turned = {name: mode.mT if isinstance(mode, torch.Tensor) else mode for name, mode in modes.items()}
    expected = ag.quantize(x, format, **modes).mT
    monkeypatch.setattr(casting, "_CHUNK", chunk)
    assert same(ag.quantize(x.mT, format, **turned), expected)


@one_of_each_path
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_small_shapes(format: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.full(shape, 1.1, dtype=dtype)
    result = ag.quantize(x, format, scale=2.0, saturation_mask=True)
    assert result.shape == x.shape
    assert result.dtype == dtype
    assert ag.encode(x, format).shape == x.shape
    assert ag.cast_counts(x.float(), format).as_integers()["elements"] == x.numel()


class Allocations(TorchDispatchMode):
    """Bytes of every tensor that is made, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            self.seen[storage.data_ptr()] = max(storage.nbytes(), self.seen.get(storage.data_ptr(), 0))
        return result


@pytest.mark.parametrize("format", ["E4M3", "E7M0", "bf16", "binary8p3se", "float8_e8m0fnu"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("transposed", [False, True])
def test_no_allocation_but_the_result_and_a_scratch(format: str, rounding: Rounding, transposed: bool) -> None:
    x = torch.ones(3 * casting._CHUNK + 5, 2)
    x = x.mT if transposed else x
    modes = casts(rounding, x)
    with Allocations() as allocations:
        result = ag.quantize(x, format, scale=torch.full((x.shape[0], 1), 2.0), **modes)
    del allocations.seen[result.untyped_storage().data_ptr()]
    allocations.seen.pop(x.untyped_storage().data_ptr(), None)
    for mode in modes.values():
        if isinstance(mode, torch.Tensor):
            allocations.seen.pop(mode.untyped_storage().data_ptr(), None)
    biggest = max(size for size in allocations.seen.values() if size != 4 * x.shape[0])  # but for the scales, as given
    assert biggest <= 8 * casting._CHUNK


@pytest.mark.parametrize("format", ["E3M4", "bf16"])
@pytest.mark.parametrize(("axis", "block"), [(0, 3), (1, 32), (2, 4), (2, 900)])
def test_chunks_of_blocks_join(format: str, axis: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the strides, and whether the block divides the axis or is larger than a chunk."""
    x, how = inputs()[4000:6400].reshape(4, 40, 15), {"axis": axis, "block": block}

    def results(x: torch.Tensor) -> list[torch.Tensor]:
        drawn = {"rounding": "stochastic", "random_bits": draws(x.shape)}
        quantized = [ag.quantize_blocks(x, format, **how), ag.quantize_blocks(x, format, **how, **drawn)]
        codes, scales = ag.encode_blocks(x, format, **how)
        return [*quantized, ag.block_scales(x, format, **how), codes.float(), scales.float()]

    for view in (x.mT.contiguous().mT, x[:, ::2]):
        whole = results(view)
        with monkeypatch.context() as smaller:
            smaller.setattr(casting, "_CHUNK", 200)
            for left, right in zip(results(view), whole, strict=True):
                assert same(left, right)


@pytest.mark.parametrize("format", ["E4M3", "E7M0", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_allocate_the_result_and_a_scratch(format: str, dtype: torch.dtype, axis: int) -> None:
    x = torch.ones(3 * casting._CHUNK // 100 + 5, 101, dtype=dtype)
    for function in (ag.quantize_blocks, ag.encode_blocks):
        with Allocations() as allocations:
            results = function(x, format, axis=axis)
        for known in (x, *(results if isinstance(results, tuple) else (results,))):
            allocations.seen.pop(known.untyped_storage().data_ptr(), None)
        assert max(allocations.seen.values()) <= 8 * casting._CHUNK


# Processors that flush


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_flushing_changes_nothing(format: Format, dtype: torch.dtype) -> None:
    """The result of each call is that of a processor that keeps subnormals, scaled ones included."""
    small = torch.from_numpy(np.arange(0, 2**25, 4099, dtype=np.uint32).view(np.float32))
    x = torch.cat([inputs(), small, -small]).to(dtype)
    if dtype == torch.float64:
        x = torch.cat([x, torch.tensor([5e-324, 2.0**-127 * 1.5, 2.0**-126 * (1 - 2.0**-40)], dtype=dtype)])

    def all_casts() -> list[torch.Tensor]:
        rounded = [] if format.is_float32 else [ag.quantize(x, format, **casts(mode, x)) for mode in ROUNDINGS]
        scaled = [ag.quantize(x, format, scale=scale) for scale in (2.0**-20, 1.0, 2.0**30)]
        codes = [] if format.bits > 16 else [ag.encode(x, format)]
        decoded = [ag.decode(code, format) for code in codes]
        return [*rounded, *scaled, *(code.to(torch.int16).view(torch.float16) for code in codes), *decoded]

    expected = all_casts()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        actual = all_casts()
    finally:
        torch.set_flush_denormal(False)
    for left, right in zip(actual, expected, strict=True):
        assert same(left, right)


# Gradients


def test_the_saturation_mask() -> None:
    values = [1.0, 460.0, 465.0, -1e9, math.inf, -math.inf, math.nan, 0.0]
    x = torch.tensor(values, requires_grad=True)
    for overflow in ("native", "saturate", "saturate_finite"):
        result = ag.quantize(x, "E4M3", overflow=overflow, saturation_mask=True)
        assert same(result.detach(), ag.quantize(x, "E4M3", overflow=overflow).detach())
        (gradient,) = torch.autograd.grad(result, x, torch.full((8,), 3.0))
        assert gradient.tolist() == [3.0, 3.0, 0.0, 0.0, 0.0, 0.0, 3.0, 3.0]


@every_format
def test_the_mask_is_what_is_counted_as_overflow(format: Format) -> None:
    if format.is_float32:
        with pytest.raises(ValueError, match="no effect"):
            ag.quantize(torch.ones(2), format, saturation_mask=True)
        return
    x = inputs().abs().requires_grad_()
    (gradient,) = torch.autograd.grad(ag.quantize(x, format, scale=0.25, saturation_mask=True).nan_to_num().sum(), x)
    # nan_to_num lets no gradient through to NaN, nor to infinities.
    infinite = ~ag.quantize(x.detach(), format, scale=0.25).isfinite()
    counts = ag.cast_counts(x.detach(), format, scale=0.25).as_integers()
    masked = torch.count_nonzero(((gradient == 0) & ~infinite) | (infinite & ~x.isnan() & (x != 0)))
    assert int(masked) == counts["overflow"]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_mask_follows_the_rounding(rounding: Rounding) -> None:
    """Between max and the next value up, truncation never overflows and stochastic rounding by its random bits."""
    x = torch.tensor([449.0, 463.9, 464.0, 464.1, 479.9, 480.0], requires_grad=True)
    modes = {"random_bits": torch.full((6,), 2**22, dtype=torch.int32)} if rounding == "stochastic" else {}
    marked = ag.quantize(x, "E4M3", rounding=rounding, saturation_mask=True, **modes)
    (gradient,) = torch.autograd.grad(marked, x, torch.ones(6))
    assert torch.equal(gradient == 0, marked.isnan())
    overflowing = {"nearest_even": 3, "nearest_away": 4, "toward_zero": 1, "stochastic": 2}
    assert int(marked.isnan().sum()) == overflowing[rounding]


def test_transforms_of_a_masked_cast() -> None:
    x = torch.tensor([[1.1, 500.0], [-700.0, 2.2]])

    def cast(row: torch.Tensor) -> torch.Tensor:
        return ag.quantize(row, "E4M3", overflow="saturate", saturation_mask=True)

    assert torch.func.vmap(torch.func.grad(lambda row: cast(row).sum()))(x).tolist() == [[1, 0], [0, 1]]
    _, tangent = torch.func.jvp(cast, (x,), (torch.ones_like(x),))
    assert tangent.tolist() == [[1, 0], [0, 1]]


@one_of_each_path
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("axis", [0, 1])
def test_vmap(format: str, rounding: Rounding, axis: int) -> None:
    x = inputs().reshape(20, 500)
    scale = 2.0 ** torch.arange(x.shape[axis])
    modes = casts(rounding, x)

    def one(row: torch.Tensor, scale: torch.Tensor, bits: torch.Tensor | None) -> torch.Tensor:
        drawn = {} if bits is None else {"random_bits": bits}
        return ag.quantize(row, format, scale=scale, rounding=rounding, **drawn)

    batched = torch.func.vmap(one, in_dims=(axis, 0, None if rounding != "stochastic" else axis), out_dims=axis)
    expected = ag.quantize(x, format, scale=scale.unsqueeze(1 - axis), **modes)
    assert same(batched(x, scale, modes.get("random_bits")), expected)


@one_of_each_path
def test_vmap_over_random_bits_alone(format: str) -> None:
    """More of what is beside x than x has room for, in fewer elements than a chunk and in more."""
    for size in (33, 2**17 + 5):
        x, bits = torch.randn(size), torch.randint(0, 2**24, (2, size), dtype=torch.int32)
        one = partial(ag.quantize, x, format, rounding="stochastic")
        batched = torch.func.vmap(lambda bits, one=one: one(random_bits=bits))(bits)
        assert same(batched, torch.stack([one(random_bits=each) for each in bits]))


# Formats as data


@every_format
@pytest.mark.parametrize("overflow", ["native", "saturate", "saturate_finite"])
def test_params_cast_as_their_format(format: Format, overflow: str) -> None:
    x = inputs()
    paths = ("fast", "wide") if format.cast_path == "fast" else (format.cast_path,)
    for params in (FormatParams.from_format(format, path=path) for path in paths):
        for rounding in ROUNDINGS[:1] if format.is_float32 else ROUNDINGS:
            modes = {"overflow": overflow, **casts(rounding, x)}
            assert same(ag.quantize(x, params, **modes), ag.quantize(x, format, **modes))


@every_format
def test_params_count_as_their_format(format: Format) -> None:
    params = FormatParams.from_format(format)
    assert tuple(map(int, edges(params))) == tuple(_thresholds(format))
    x, update = inputs(), inputs().flip(0)
    for scale in (None, 2.0**-9):
        assert (
            ag.cast_counts(x, params, scale=scale).as_integers() == ag.cast_counts(x, format, scale=scale).as_integers()
        )
    stalls = [ag.stall_counts(x, update, each).as_integers() for each in (params, format)]
    assert stalls[0] == stalls[1]


def test_params_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="path 'fast' cannot cast to bf16; expected wide"):
        FormatParams.from_format("bf16", path="fast")
    for function, dtype in ((ag.encode, torch.float32), (ag.decode, torch.uint8)):
        with pytest.raises(TypeError, match="give a name, a Format or CodeParams"):
            function(torch.zeros(2, dtype=dtype), FormatParams.from_format("E4M3"))


@pytest.mark.parametrize("format", ["E4M3", "E5M2"])
def test_a_view_that_is_negated_when_it_is_read(format: str) -> None:
    written = torch.linspace(-300.0, 300.0, 64)
    view = torch.complex(written, -written).conj().imag
    assert view.is_neg()
    assert same(ag.quantize(view, format), ag.quantize(written, format))
    assert torch.equal(ag.encode(view, format), ag.encode(written, format))
    quantized, counts = ag.quantize_with_counts(view, format)
    assert same(quantized, ag.quantize(written, format))
    assert counts.as_integers() == ag.cast_counts(written, format).as_integers()
    for block in (8, 24):
        assert same(ag.quantize_blocks(view, format, block=block), ag.quantize_blocks(written, format, block=block))
        for got, right in zip(
            ag.encode_blocks(view, format, block=block), ag.encode_blocks(written, format, block=block), strict=True
        ):
            assert torch.equal(got, right)
        assert same(ag.block_scales(view, format, block=block), ag.block_scales(written, format, block=block))
    doubled = torch.complex(written, -written).to(torch.complex128).conj().imag
    assert ag.cast_counts(doubled, format).as_integers() == counts.as_integers()


@pytest.mark.filterwarnings("ignore")  # torch.compile warns of what it imports
def test_a_view_that_is_negated_within_what_is_compiled() -> None:
    def through(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        view = z.conj().imag
        return ag.quantize(view, "E4M3", rounding="nearest_away"), ag.encode(view, "E5M2")

    z = torch.complex(*torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0)))
    compiled = torch.compile(through, fullgraph=True, backend="aot_eager")
    for got, right in zip(compiled(z), through(z), strict=True):
        assert torch.equal(got, right)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")  # torch.compile warns of what it imports
@without_a_compiler
class TestCompiled:
    @pytest.fixture(autouse=True)
    def _forget(self) -> Iterator[None]:
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    @pytest.mark.parametrize("format", ["E4M3", "bf16", "float32"])
    def test_counts_by_a_name_are_one_program(self, format: str) -> None:
        compiled = torch.compile(lambda x: ag.observe(x, format, scale=0.5), fullgraph=True)
        for x in (inputs(), inputs()[::2]):
            (counts, amax), (expected, largest) = compiled(x), ag.observe(x, format, scale=0.5)
            assert counts.as_integers() == expected.as_integers()
            assert same(amax, largest)

    def test_a_change_of_format_compiles_nothing(self) -> None:
        x, compiled = inputs(), []

        def backend(graph: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Any:
            compiled.append(graph)
            return torch._inductor.compile(graph, examples)

        cast = torch.compile(lambda x, params: ag.quantize(x, params), fullgraph=True, backend=backend)
        paths = {known.cast_path for known in DISTINCT}
        for known in DISTINCT:
            assert same(cast(x, FormatParams.from_format(known)), ag.quantize(x, known)), str(known)
        assert len(compiled) == len(paths)
        for known in DISTINCT:
            if known.cast_path == "fast":
                assert same(cast(x, FormatParams.from_format(known, path="wide")), ag.quantize(x, known)), str(known)
        assert len(compiled) == len(paths)

    @pytest.mark.parametrize(
        "format",
        ["E7M0", "bf16", "float8_e5m2fnuz", "float8_e8m0fnu", pytest.param("E3M4", marks=pytest.mark.exhaustive)],
    )
    def test_static_formats_and_every_rounding(self, format: str) -> None:
        x = inputs()
        for rounding in ROUNDINGS:
            modes = casts(rounding, x)
            cast = torch.compile(lambda x, modes: ag.quantize(x, format, scale=0.5, **modes), fullgraph=True)
            assert same(cast(x, modes), ag.quantize(x, format, scale=0.5, **modes)), rounding

    @pytest.mark.parametrize("format", ["E4M3", "E5M2", "float8_e4m3fnuz", "float8_e8m0fnu", "fp16"])
    def test_decoding(self, format: str) -> None:
        codes = every_code(parse(format))
        decoded = torch.compile(lambda codes: ag.decode(codes, format), fullgraph=True)(codes)
        assert same(decoded, ag.decode(codes, format))

    def test_codes_by_params(self) -> None:
        def there_and_back(x: torch.Tensor, code: CodeParams) -> tuple[torch.Tensor, torch.Tensor]:
            codes = ag.encode(x, code)
            return codes, ag.decode(codes, code)

        x, compiled = inputs(), torch.compile(there_and_back, fullgraph=True)
        for known in DISTINCT:
            if known.is_signed and known.bits <= 8:
                codes, values = compiled(x, CodeParams.from_format(known, path="wide"))
                assert torch.equal(codes, ag.encode(x, known)), str(known)
                assert same(values, ag.decode(codes, known)), str(known)

    def test_decoding_of_blocks(self) -> None:
        codes, scales = ag.encode_blocks(inputs().nan_to_num(), "E4M3")
        decode = torch.compile(lambda codes, scales: ag.decode_blocks(codes, scales, "E4M3"), fullgraph=True)
        assert same(decode(codes, scales), ag.decode_blocks(codes, scales, "E4M3"))

    @pytest.mark.parametrize("format", ["bf16", "float8_e8m0fnu", "float32"])
    def test_float64(self, format: str) -> None:
        x = torch.tensor(FLOAT64, dtype=torch.float64)
        cast = torch.compile(lambda x: ag.quantize(x, format, scale=2.0**100), fullgraph=True)
        assert same(cast(x), ag.quantize(x, format, scale=2.0**100))

    def test_gradients(self) -> None:
        x = torch.tensor([1.1, 500.0, math.nan], requires_grad=True)
        cast = torch.compile(lambda x, p: ag.quantize(x, p, scale=1.0, saturation_mask=True), fullgraph=True)
        for name, expected in (("E4M3", [1, 0, 1]), ("E3M4", [1, 0, 1]), ("E5M2", [1, 1, 1])):
            (gradient,) = torch.autograd.grad(cast(x, FormatParams.from_format(name)), x, torch.ones(3))
            assert gradient.tolist() == expected

    def test_counts_and_hashed_bits(self) -> None:
        x = inputs()

        def step(x: torch.Tensor, params: FormatParams, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            bits = ag.hash_bits(tuple(x.shape), 3, step)
            quantized, counts = ag.quantize_with_counts(x, params, rounding="stochastic", random_bits=bits)
            return quantized, counts.totals

        compiled = torch.compile(step, fullgraph=True)
        for k, name in enumerate(("E4M3", "E7M0", "float8_e4m3fnuz")):
            params, at = FormatParams.from_format(name), torch.tensor(k)
            for left, right in zip(compiled(x, params, at), step(x, name, at), strict=True):
                assert torch.equal(left.nan_to_num(), right.nan_to_num())


# Codes


def every_code(format: Format) -> torch.Tensor:
    return torch.from_numpy(np.arange(2**format.bits).astype(np.uint8 if format.bits <= 8 else np.uint16))


@pytest.mark.parametrize("format", [*(f for f in DISTINCT if f.bits <= 16), parse("E1M6b127fnuz")], ids=str)
def test_values_of_codes(format: Format) -> None:
    """One by one for few codes, looked up for many; where there is no -0, what is flushed is +0."""
    codes, book = every_code(format), format.code_book()
    below = (np.abs(book) < 2.0**-126) & format.is_signed
    zeros = np.copysign(0.0, book) if format.has_negative_zero else np.zeros_like(book)
    expected = np.where(below, zeros, book).astype(np.float32)
    for decoded in (ag.decode(codes, format), ag.decode(codes.repeat(2), format)[codes.numel() :]):
        np.testing.assert_array_equal(decoded.numpy(), expected)
        assert np.array_equal(np.signbit(decoded.numpy()[expected == 0]), np.signbit(expected[expected == 0]))


def test_a_flushed_code_without_negative_zero() -> None:
    codes = torch.tensor([188], dtype=torch.uint8)
    assert math.copysign(1.0, ag.decode(codes, "E1M6b127fnuz").item()) == 1.0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
@pytest.mark.parametrize("times", [1, 200])
def test_bits_above_the_width_are_ignored(dtype: torch.dtype, times: int) -> None:
    """Whatever the strides."""
    codes = (
        torch.tensor([[60, 2**8 * 7 + 188], [2**31 + 60, 2**63 + 188]], dtype=torch.uint64).to(dtype).repeat(times, 1)
    )
    expected = torch.tensor([[1.0, -1.0]]).expand(2 * times, 2)
    assert torch.equal(ag.decode(codes, "E5M2"), expected)
    assert torch.equal(ag.decode(codes.mT, "E5M2"), expected.mT)


def test_decoding_in_chunks() -> None:
    """No integers as wide as the result, nor wider, of all codes at once."""
    codes = torch.zeros(3 * casting._CHUNK + 5, dtype=torch.uint8)
    with Allocations() as allocations:
        result = ag.decode(codes, "E4M3")
    del allocations.seen[result.untyped_storage().data_ptr()]
    allocations.seen.pop(codes.untyped_storage().data_ptr(), None)
    assert max(allocations.seen.values()) <= 8 * casting._CHUNK


# float64


FLOAT64 = [
    *(1e39, -1e39, 1e300, -1e300, 2.0**128, 2.0**128 * (1 - 2.0**-53), 3.4028235677973366e38, math.inf, -math.inf),
    *(math.nan, 0.0, -0.0, 1.0 + 2.0**-22 + 2.0**-24, 1.1, 464.0 * (1 + 2.0**-40), 5e-324, -1e-300),
    *(2.0**-126 * (1 - 2.0**-40), 2.0**-127 * 1.5, -(2.0**-149) * 1.5, 2.0**-150),
]


def divided(value: float, scale: float) -> float | Fraction:
    """Exactly, though float64 may not reach so far."""
    return Fraction(value) / Fraction(scale) if value and math.isfinite(value) else value


@pytest.mark.parametrize("format", [*DISTINCT, Format("E8M22", 8, 22, 127, has_inf=True, has_nan=True)], ids=str)
@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("scale", [None, 2.0**100, 2.0**-90])
def test_float64_is_rounded_once(format: Format, overflow: Overflow, scale: float | None) -> None:
    """From its own value, beyond float32 and within, by every rounding, and scaled in float64."""
    moves = scale is not None and format.is_signed and not format.is_float32
    unit = scale if moves else 1.0
    x = torch.tensor(FLOAT64, dtype=torch.float64)
    for rounding in ("nearest_even",) if format.is_float32 else ROUNDINGS:
        modes = casts(rounding, x)
        drawn = modes["random_bits"].tolist() if "random_bits" in modes else [None] * len(FLOAT64)
        exact = [
            round_to_format(divided(value, unit), format, rounding=rounding, overflow=overflow, random_bits=bits)
            for value, bits in zip(FLOAT64, drawn, strict=True)
        ]
        flushed = [
            each
            if math.isnan(each) or abs(each) >= 2.0**-126 or not format.is_signed or format.is_float32
            else math.copysign(0.0, value if format.has_negative_zero else 1.0)
            for each, value in zip(exact, FLOAT64, strict=True)
        ]
        actual = ag.quantize(x, format, scale=scale if moves else None, overflow=overflow, **modes)
        assert [repr(each) for each in actual.tolist()] == [repr(each * unit) for each in flushed], rounding


def test_float64_beyond_float32() -> None:
    x = torch.tensor([1e39, -1e39, math.inf], dtype=torch.float64, requires_grad=True)
    assert ag.quantize(x, "bf16", rounding="toward_zero").tolist() == [math.inf, -math.inf, math.inf]
    assert ag.quantize(x, "float8_e8m0fnu").isnan().all()
    maximum = parse("bf16").max_representable_value
    assert ag.quantize(x, "bf16", overflow="saturate").tolist() == [maximum, -maximum, maximum]
    assert ag.quantize(x, "bf16", overflow="saturate_finite").tolist() == [maximum, -maximum, math.inf]
    assert ag.quantize(x, "bf16", scale=2.0**100).tolist()[0] == round_to_format(1e39 / 2**100, parse("bf16")) * 2**100
    for rounding, scale in (("toward_zero", None), ("nearest_even", 0.5)):
        marked = ag.quantize(x, "bf16", rounding=rounding, scale=scale, saturation_mask=True)
        (gradient,) = torch.autograd.grad(marked, x, torch.ones_like(x))
        assert gradient.tolist() == [0, 0, 0]
    (gradient,) = torch.autograd.grad(ag.quantize(x, "bf16", scale=4.0, saturation_mask=True), x, torch.ones_like(x))
    assert gradient.tolist() == [1, 1, 0]
    far = torch.tensor([1e308], dtype=torch.float64)
    assert ag.quantize(far, "bf16", scale=2.0**-100, overflow="saturate_finite").item() == maximum * 2.0**-100
    assert ag.encode(x.detach(), "E4M3", overflow="saturate_finite").tolist() == [126, 254, 126]
    assert ag.encode(x.detach(), "E4M3").tolist() == [127, 127, 127]


def test_float64_to_float32() -> None:
    x = torch.tensor([0.1, 1e39, -1e39, math.inf, 1e-40, -1e-40, 2.0**-149 * 0.6, -1e-300], dtype=torch.float64)
    with np.errstate(over="ignore"):
        expected = x.numpy().astype(np.float32).astype(np.float64)
    result = ag.quantize(x, "float32", scale=4.0)
    assert result.dtype == torch.float64
    assert same(result, torch.from_numpy(expected))
    assert same(ag.quantize(x, FormatParams.from_format("float32")), result)
    maximum = float(np.finfo(np.float32).max)
    assert ag.quantize(x, "float32", overflow="saturate").tolist()[1:4] == [maximum, -maximum, maximum]
    assert ag.quantize(x, "float32", overflow="saturate_finite").tolist()[1:4] == [maximum, -maximum, math.inf]


# Casts and counts in one


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_with_counts(format: Format, dtype: torch.dtype) -> None:
    x = inputs().to(dtype)
    quantized, counts = ag.quantize_with_counts(x, format, scale=4.0, overflow="saturate")
    assert same(quantized, ag.quantize(x, format, scale=4.0, overflow="saturate"))
    assert counts.as_integers() == ag.cast_counts(x, format, scale=4.0).as_integers()


@every_format
def test_counts_are_of_what_the_cast_does(format: Format) -> None:
    x = inputs().abs() if not format.is_signed else inputs()
    marked = ag.quantize(x, format, overflow="saturate")
    nonzero = (x != 0) & ~x.isnan()
    counts = ag.cast_counts(x, format).as_integers()
    assert counts["underflow"] == int((nonzero & (marked == 0)).sum())
    assert counts["nan"] == int(x.isnan().sum())
    assert counts["nonzero"] == int(nonzero.sum())


def test_random_bits_that_have_no_effect() -> None:
    x = torch.ones(3)
    with pytest.raises(ValueError, match="stochastic_bits=8 would have no effect"):
        ag.quantize(x, "E5M2", stochastic_bits=8)
    for bad in (0, 25, 1.5, True):
        with pytest.raises(ValueError, match="stochastic_bits is"):
            ag.quantize(x, "E5M2", rounding="stochastic", random_bits=draws(x.shape), stochastic_bits=bad)
    assert parse("E5M2").cast_path == "fast"


@one_of_each_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_default_dtype_changes_nothing(format: str, dtype: torch.dtype) -> None:
    x = inputs().to(dtype)

    def results() -> list[torch.Tensor]:
        quantized = [ag.quantize(x, format, **casts(rounding, x)) for rounding in ROUNDINGS]
        quantized += [ag.quantize(x, format, scale=2.0), ag.quantize(x, FormatParams.from_format(format), scale=2.0)]
        return [*quantized, ag.decode(ag.encode(x, format), format), ag.cast_counts(x.float(), format).overflow_rate]

    expected = results()
    torch.set_default_dtype(torch.float64)
    try:
        actual = results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(same(left, right) for left, right in zip(actual, expected, strict=True))
