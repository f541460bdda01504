"""Formats as data in torch: params stacked, mapped over and replaced in place, and codes by params."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import altgrad_torch as ag  # noqa: E402 (after the skip)
from altgrad_core.errors import InputError  # noqa: E402
from altgrad_core.formats import FORMAT_REGISTRY, OVERFLOWS, ROUNDINGS, CastPath, Format, Overflow, parse  # noqa: E402
from altgrad_core.scaling import BlockRule  # noqa: E402
from altgrad_torch import CodeParams, FormatParams  # noqa: E402
from tests.test_torch_casting import casts, every_code, inputs, same  # noqa: E402

DISTINCT = tuple(dict.fromkeys(FORMAT_REGISTRY.values()))
CODED = [known for known in DISTINCT if known.bits <= 16]
NARROW = [known for known in CODED if known.bits <= 8]
every_overflow = pytest.mark.parametrize("overflow", OVERFLOWS)


def served_by(path: CastPath) -> list[Format]:
    return [known for known in DISTINCT if known.cast_path == path or (path, known.cast_path) == ("wide", "fast")]


def equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equality of every bit, of values or of codes."""
    return same(left, right) if left.is_floating_point() else left.dtype == right.dtype and torch.equal(left, right)


# Stacks


@pytest.mark.parametrize("path", ["fast", "wide", "unsigned"])
@pytest.mark.parametrize(("overflow", "scale"), [("native", None), ("saturate", 0.5), ("saturate_finite", 0.5)])
def test_casts_mapped_over_formats(path: CastPath, overflow: Overflow, scale: float | None) -> None:
    """``torch.vmap`` gives the bits of each format alone, by every rounding."""
    x, formats = inputs()[:6000], served_by(path)
    stack = FormatParams.stack([FormatParams.from_format(known, path=path) for known in formats])
    for rounding in ROUNDINGS:
        modes = {"overflow": overflow, "scale": scale, **casts(rounding, x)}
        mapped = torch.vmap(lambda params, modes=modes: ag.quantize(x, params, **modes))(stack)
        for known, alone in zip(formats, mapped, strict=True):
            assert same(alone, ag.quantize(x, known, **modes)), f"{known}, {rounding}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_inputs_mapped_along(dtype: torch.dtype) -> None:
    formats = served_by("wide")
    stack = FormatParams.stack([FormatParams.from_format(known, path="wide") for known in formats])
    rows = inputs()[: 200 * len(formats)].reshape(len(formats), -1).to(dtype)
    mapped = torch.vmap(lambda x, params: ag.quantize(x, params, scale=4.0))(rows, stack)
    for known, row, alone in zip(formats, rows, mapped, strict=True):
        assert same(alone, ag.quantize(row, known, scale=4.0)), str(known)


def test_gradients_mapped_over_formats() -> None:
    x = torch.tensor([1.1, 500.0, 60000.0])
    stack = FormatParams.stack([FormatParams.from_format(name) for name in ("E4M3", "E5M2")])

    def loss(x: torch.Tensor, params: FormatParams) -> torch.Tensor:
        return ag.quantize(x, params, overflow="saturate", saturation_mask=True).sum()

    assert torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(x, stack).tolist() == [[1, 0, 0], [1, 1, 1]]


@every_overflow
def test_codes_mapped_over_formats(overflow: Overflow) -> None:
    formats = [known for known in NARROW if known.is_signed]
    stack = CodeParams.stack([CodeParams.from_format(known, overflow=overflow, path="wide") for known in formats])
    x, codes = inputs(), every_code(parse("E4M3"))
    encoded, decoded = torch.vmap(lambda code: (ag.encode(x, code), ag.decode(codes, code)))(stack)
    for known, alone, values in zip(formats, encoded, decoded, strict=True):
        assert equal(alone, ag.encode(x, known, overflow=overflow)), str(known)
        assert equal(values, ag.decode(codes, known)), str(known)


def test_params_of_several_formats_are_mapped_over() -> None:
    params = FormatParams.stack([FormatParams.from_format(name) for name in ("E5M2", "E4M3", "E3M4")])
    for x in (torch.tensor(1.0), torch.ones(4), torch.ones(3, 2)):
        with pytest.raises(ValueError, match=r"params of shape \(3,\) for x of shape .*; expected .* torch.vmap"):
            ag.quantize(x, params)


def test_what_cannot_be_stacked() -> None:
    with pytest.raises(ValueError, match=r"paths \['fast', 'wide'\]; expected one path"):
        FormatParams.stack([FormatParams.from_format("E4M3"), FormatParams.from_format("bf16")])
    with pytest.raises(ValueError, match="cannot stack: there are no params"):
        FormatParams.stack([])
    with pytest.raises(ValueError, match=r"dtypes \['torch\.uint16', 'torch\.uint8'\]; expected one dtype"):
        CodeParams.stack([CodeParams.from_format("E4M3"), CodeParams.from_format("fp16")])


# Codes


@pytest.mark.parametrize("format", CODED, ids=str)
def test_codes_by_params_are_those_by_format(format: Format) -> None:
    codes, x = every_code(format), inputs()[3000:7000]
    for path in ("fast", "wide") if format.cast_path == "fast" else (format.cast_path,):
        for overflow in OVERFLOWS:
            params = CodeParams.from_format(format, overflow=overflow, path=path)
            for rounding in ("nearest_even", "nearest_away", "toward_zero"):
                by_format = ag.encode(x, format, rounding=rounding, overflow=overflow)
                assert equal(ag.encode(x, params, rounding=rounding), by_format), f"{path}, {overflow}, {rounding}"
        assert same(ag.decode(codes, params), ag.decode(codes, format))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_codes_by_params_of_other_dtypes(dtype: torch.dtype) -> None:
    x = torch.cat([inputs().to(dtype), torch.tensor([1e39, -1e39], dtype=torch.float64).to(dtype)])
    for name in ("E4M3", "bf16", "float8_e8m0fnu", "float8_e4m3fnuz"):
        for overflow in OVERFLOWS:
            by_params = ag.encode(x, CodeParams.from_format(name, overflow=overflow))
            assert equal(by_params, ag.encode(x, name, overflow=overflow)), f"{name}, {overflow}"


def test_modes_beside_code_params() -> None:
    params, x = CodeParams.from_format("E4M3"), torch.ones(2)
    with pytest.raises(InputError, match="overflow='saturate' would have no effect: CodeParams carry their own"):
        ag.encode(x, params, overflow="saturate")
    with pytest.raises(InputError, match="quantize with them, then encode"):
        ag.encode(x, params, rounding="stochastic")
    with pytest.raises(ValueError, match="unknown rounding 'up'"):
        ag.encode(x, params, rounding="up")
    with pytest.raises(ValueError, match="unknown overflow policy 'wrap'"):
        CodeParams.from_format("E4M3", overflow="wrap")
    with pytest.raises(InputError, match="float32 has 32 bits; codes are made for formats of at most 16"):
        CodeParams.from_format("float32")
    with pytest.raises(InputError, match="path 'fast' cannot cast to bf16"):
        CodeParams.from_format("bf16", path="fast")


# Blocks


def blocks_of_all_kinds() -> torch.Tensor:
    """Rows whose blocks lie anywhere in float32, and hold zeros, subnormals, NaN and infinities here and there."""
    shift = 2.0 ** torch.arange(-60, 60).reshape(-1, 1)
    return torch.cat([inputs()[5000:].reshape(-1, 50) * shift[:100], inputs()[:5000].reshape(-1, 50)])


@pytest.mark.parametrize("path", ["fast", "wide"])
@pytest.mark.parametrize("rule", ["mx", "fit"])
def test_blocks_by_params_and_mapped_over_formats(path: CastPath, rule: BlockRule) -> None:
    x, formats = blocks_of_all_kinds(), [known for known in served_by(path) if known.bits <= 16]
    for known in formats:
        params, how = FormatParams.from_format(known, path=path), {"block": 16, "rule": rule}
        assert same(ag.block_scales(x, params, **how), ag.block_scales(x, known, **how)), str(known)
        for rounding in ("nearest_even", "toward_zero"):
            by_format = ag.quantize_blocks(x, known, rounding=rounding, **how)
            assert same(ag.quantize_blocks(x, params, rounding=rounding, **how), by_format), f"{known}, {rounding}"
    stack = FormatParams.stack([FormatParams.from_format(known, path=path) for known in formats])
    mapped = torch.vmap(lambda params: ag.quantize_blocks(x, params, rule=rule))(stack)
    for known, alone in zip(formats, mapped, strict=True):
        assert same(alone, ag.quantize_blocks(x, known, rule=rule)), str(known)


def test_codes_of_blocks_by_params() -> None:
    x = blocks_of_all_kinds()
    for known in CODED:
        if known.is_signed:
            codes, scales = ag.encode_blocks(x, known, block=16)
            params = CodeParams.from_format(known)
            for left, right in zip(ag.encode_blocks(x, params, block=16), (codes, scales), strict=True):
                assert equal(left, right), str(known)
            values = ag.decode_blocks(codes, scales, params, block=16)
            assert same(values, ag.decode_blocks(codes, scales, known, block=16)), str(known)


def test_params_that_are_of_no_use_to_blocks() -> None:
    x = torch.ones(4)
    for function in (ag.quantize_blocks, ag.block_scales):
        with pytest.raises(InputError, match="params are of a format without a sign"):
            function(x, FormatParams.from_format("float8_e8m0fnu"))
    with pytest.raises(InputError, match="params are of a format without a sign"):
        ag.encode_blocks(x, CodeParams.from_format("float8_e8m0fnu"))
    with pytest.raises(TypeError, match="give a name, a Format or CodeParams"):
        ag.encode_blocks(x, FormatParams.from_format("E4M3"))


# In place


@every_overflow
def test_code_params_change_in_place(overflow: Overflow) -> None:
    params, x = CodeParams.from_format("E4M3", overflow=overflow), inputs()
    held = [id(tensor) for tensor in (*params.params, *params[1:])]
    for known in NARROW:
        if known.cast_path == "fast":
            ag.set_format(params, known)
            assert equal(ag.encode(x, params), ag.encode(x, known, overflow=overflow)), str(known)
    assert [id(tensor) for tensor in (*params.params, *params[1:])] == held


def test_code_params_that_cannot_change() -> None:
    params = CodeParams.from_format("E4M3", path="wide")
    with pytest.raises(InputError, match=r"fp16 has 16 bits, but these codes are torch\.uint8; expected at most 8"):
        params.set_("fp16")
    with pytest.raises(InputError, match="path 'wide' cannot cast to float8_e8m0fnu"):
        params.set_("float8_e8m0fnu")
    assert equal(ag.decode(torch.tensor([60], dtype=torch.uint8), params), torch.tensor([1.5])), "as they were"


def test_copies_keep_path_and_dtype() -> None:
    params = CodeParams.from_format("E4M3", path="wide")
    for other in (copy.deepcopy(params), pickle.loads(pickle.dumps(params)), params._replace()):
        assert (other.params.path, other.dtype) == ("wide", torch.uint8)
    other = copy.deepcopy(params)
    other.set_("E5M2")
    assert int(params.max_code) == parse("E4M3").max_code


# Traced. That machine code does the same is tested in test_torch_casting.py.


class Programs:
    """A backend that counts what it is given to compile."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Any:
        self.count += 1
        return graph


def there_and_back(x: torch.Tensor, code: CodeParams) -> tuple[torch.Tensor, torch.Tensor]:
    codes = ag.encode(x, code)
    return codes, ag.decode(codes, code)


@pytest.mark.filterwarnings("ignore")  # torch.compile warns of what it imports
class TestTraced:
    @pytest.fixture(autouse=True)
    def _forget(self) -> Iterator[None]:
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    def test_codes_of_all_formats_by_few_programs(self) -> None:
        """One for each path and dtype."""
        x, programs = inputs(), Programs()
        compiled = torch.compile(there_and_back, fullgraph=True, backend=programs)
        for known in CODED:
            codes, values = compiled(x, CodeParams.from_format(known))
            assert equal(codes, ag.encode(x, known)), str(known)
            assert same(values, ag.decode(codes, known)), str(known)
        assert programs.count == len({(known.cast_path, known.bits <= 8) for known in CODED})

    def test_blocks_of_all_formats_by_few_programs(self) -> None:
        x, programs = blocks_of_all_kinds(), Programs()

        def both(x: torch.Tensor, code: CodeParams) -> tuple[torch.Tensor, ...]:
            codes, scales = ag.encode_blocks(x, code)
            return ag.quantize_blocks(x, code.params), ag.decode_blocks(codes, scales, code)

        compiled = torch.compile(both, fullgraph=True, backend=programs)
        for known in NARROW:
            if known.cast_path == "fast":
                quantized, decoded = compiled(x, CodeParams.from_format(known))
                assert same(quantized, ag.quantize_blocks(x, known)), str(known)
                codes, scales = ag.encode_blocks(x, known)
                assert same(decoded, ag.decode_blocks(codes, scales, known)), str(known)
        assert programs.count == 1

    def test_mapped_over_formats(self) -> None:
        x, formats, programs = inputs(), served_by("fast"), Programs()
        stack = FormatParams.stack([FormatParams.from_format(known) for known in formats])

        def all_of(x: torch.Tensor, stack: FormatParams) -> torch.Tensor:
            return torch.vmap(lambda params: ag.quantize(x, params))(stack)

        compiled = torch.compile(all_of, fullgraph=True, backend=programs)
        for known, alone in zip(formats, compiled(x, stack), strict=True):
            assert same(alone, ag.quantize(x, known)), str(known)
        stack.set_("E5M2")
        assert same(compiled(x, stack)[0], ag.quantize(x, "E5M2"))
        assert programs.count == 1
