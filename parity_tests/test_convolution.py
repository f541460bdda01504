"""Exact convolutions and their gradients: what Python's fractions have, in both frameworks, and in their layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx

import altgrad_jax.nn
import altgrad_torch.nn
from altgrad_core.convolution import Sweep
from altgrad_core.errors import InputError
from altgrad_core.rules import Rule
from parity_tests.support import TORCH_DEVICE, as_numpy, assert_same_bits, to_torch
from tests.exact_convolutions import CASES, Case, convolutions_of, operands
from tests.exact_sums import same_bits

pytestmark = pytest.mark.usefixtures("keys_that_compile_soon")

NUMBERS = ("E4M3", "E5M2", "E7M0", "float32")
SLOW_IN_JAX = {"2d, dilated", "2d, cut off", "2d, of which a stride leaves some", "3d of each channel"}
_KEY = jax.random.key(0, impl="rbg")


def in_torch(case: Case, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    x, kernel = (to_torch(each).requires_grad_() for each in arrays[:2])
    result = altgrad_torch.nn.exact_convolution(x, kernel, case.sweeps, case.groups)
    return tuple(map(as_numpy, (result, *torch.autograd.grad(result, (x, kernel), to_torch(arrays[2])))))


def in_jax(case: Case, *arrays: np.ndarray) -> tuple[jax.Array, ...]:
    """With channels last, as Flax has them."""
    x, kernel, gradient = (jnp.asarray(each) for each in arrays)

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        spatial = "XYZ"[: len(case.sweeps)]
        last = altgrad_jax.nn.exact_convolution(
            jnp.moveaxis(x, 1, -1),
            jnp.moveaxis(kernel, (0, 1), (-1, -2)),
            [sweep.stride for sweep in case.sweeps],
            [(sweep.before, sweep.after) for sweep in case.sweeps],
            [sweep.dilation for sweep in case.sweeps],
            [sweep.spacing for sweep in case.sweeps],
            (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
            case.groups,
        )
        return jnp.moveaxis(last, -1, 1)

    def both(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> tuple[jax.Array, ...]:
        result, pull = jax.vjp(convolve, x, kernel)
        return result, *pull(gradient)

    return jax.jit(both)(x, kernel, gradient)


@pytest.mark.parametrize("name", CASES)
def test_convolutions_in_torch_are_exact_sums(name: str) -> None:
    case = CASES[name]
    for seed, numbers in enumerate(NUMBERS):
        given = operands(case, numbers, seed)
        for got, wanted in zip(in_torch(case, *given), convolutions_of(case, *given), strict=True):
            same_bits(got, wanted)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive if name in SLOW_IN_JAX else ()) for name in CASES]
)
def test_convolutions_in_jax_are_exact_sums(name: str) -> None:
    case = CASES[name]
    for seed, numbers in enumerate(NUMBERS):
        given = operands(case, numbers, seed)
        for got, wanted in zip(in_jax(case, *given), convolutions_of(case, *given), strict=True):
            same_bits(got, wanted)


def rules(package: Any) -> list[Rule]:
    return [Rule(".*", "E4M3", gradients="E5M2", scaling=package.Delayed(2), accumulate="exact")]


def test_layers_of_all_three_take_the_same_step() -> None:
    """Strides, padding, dilation and groups, by the rules of each: output and gradients of input and kernel."""
    draw = np.random.default_rng(0)
    x, gradient = draw.normal(size=(2, 4, 8, 7)).astype("f4"), draw.normal(size=(2, 6, 4, 7)).astype("f4")
    how = {"strides": (2, 1), "padding": 1, "kernel_dilation": (1, 1), "feature_group_count": 2, "use_bias": False}
    plain = nnx.Conv(4, 6, (3, 3), **how, rngs=nnx.Rngs(0))
    of_nnx = altgrad_jax.nn.quantize_model(plain, rules(altgrad_jax))
    of_linen = altgrad_jax.nn.quantize_model(linen.Conv(6, (3, 3), **how), rules(altgrad_jax))
    of_torch = torch.nn.Conv2d(4, 6, 3, (2, 1), 1, groups=2, bias=False, device=TORCH_DEVICE)
    with torch.no_grad():
        of_torch.weight.copy_(to_torch(np.moveaxis(np.array(plain.kernel[...]), (3, 2), (0, 1))))
    altgrad_torch.nn.quantize_model(of_torch, rules(altgrad_torch))

    @jax.jit
    def both(kernel: jax.Array, x: jax.Array, gradient: jax.Array) -> tuple[Any, ...]:
        variables = of_linen.with_casts({"params": {"kernel": kernel}}, x)
        graph, parameters, rest = nnx.split(of_nnx, nnx.Param, ...)

        def by_linen(kernel: jax.Array, x: jax.Array) -> jax.Array:
            return of_linen.apply({**variables, "params": {"kernel": kernel}}, x)

        def by_nnx(kernel: jax.Array, x: jax.Array) -> jax.Array:
            return nnx.merge(graph, jax.tree.map(lambda _: kernel, parameters), rest)(x)

        pulled = [jax.vjp(compute, kernel, x) for compute in (by_nnx, by_linen)]
        return tuple((result, *pull(gradient)) for result, pull in pulled)

    mine = both(plain.kernel[...], *(jnp.moveaxis(jnp.asarray(each), 1, -1) for each in (x, gradient)))
    given = to_torch(x).requires_grad_()
    result = of_torch(given)
    of_weight, of_x = torch.autograd.grad(result, (of_torch.weight, given), to_torch(gradient))
    yours = (as_numpy(result), as_numpy(of_weight), as_numpy(of_x))
    for name, got in zip(("NNX", "Linen"), mine, strict=True):
        result, of_kernel, of_x = (np.asarray(each) for each in got)
        last = np.moveaxis(result, -1, 1), np.moveaxis(of_kernel, (3, 2), (0, 1)), np.moveaxis(of_x, -1, 1)
        for what, one, other in zip(("result", "weights", "input"), last, yours, strict=True):
            assert_same_bits(one, other, what=f"{name}: {what}")


TRANSPOSED: dict[str, dict[str, Any]] = {
    "same": {"strides": (3, 2), "padding": "SAME", "kernel_dilation": (1, 2)},
    "valid": {"strides": (3, 1), "padding": "VALID", "transpose_kernel": True},
    "given": {"strides": 2, "padding": ((2, 1), (0, 3)), "use_bias": False},
}


@pytest.mark.parametrize(
    "name", ["same", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("valid", "given"))]
)
def test_transposed_convolutions_of_flax_are_where_flax_has_them(name: str) -> None:
    """Of small integers, which float32 adds up without rounding; in torch they are tested alone."""
    draw = np.random.default_rng(0)

    def integers(*shape: int) -> jax.Array:
        return jnp.asarray(draw.integers(-4, 5, shape), jnp.float32)

    plain = nnx.ConvTranspose(3, 2, (2, 3), **TRANSPOSED[name], rngs=nnx.Rngs(0))
    of_linen = linen.ConvTranspose(2, (2, 3), **TRANSPOSED[name])
    rule = [Rule(".*", "E4M3", scaling=altgrad_jax.Static(1.0), accumulate="exact")]
    by_rules = altgrad_jax.nn.quantize_model(plain, rule), altgrad_jax.nn.quantize_model(of_linen, rule)
    x = integers(2, 2, 4, 3, 3)  # of two axes of batches
    params = {"kernel": integers(*plain.kernel.shape)} | ({"bias": integers(2)} if plain.use_bias else {})
    gradient = integers(*jax.eval_shape(plain, x).shape)

    @jax.jit
    def all_three(params: dict[str, jax.Array], x: jax.Array, gradient: jax.Array) -> tuple[Any, ...]:
        variables = by_rules[1].with_casts({"params": params}, x)
        graph, parameters, rest = nnx.split(by_rules[0], nnx.Param, ...)
        parameters = nnx.to_pure_dict(parameters)

        def by_nnx(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
            return nnx.merge(graph, nnx.State({**parameters, **params}), rest)(x)

        computed = [
            lambda params, x: of_linen.apply({"params": params}, x),
            lambda params, x: by_rules[1].apply({**variables, "params": params}, x),
            by_nnx,
        ]
        pulled = [jax.vjp(compute, params, x) for compute in computed]
        return tuple((result, pull(gradient)) for result, pull in pulled)

    wanted, *found = all_three(params, x, gradient)
    for got in found:
        jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_gradients_of_gradients() -> None:
    """Of the sum of the gradient of the input, times the result: the second derivative is a convolution again."""
    case = Case((1, 1, 4), (1, 1, 2), (Sweep(),))
    x, kernel, gradient = operands(case, "E5M2", 0)

    given = to_torch(x).requires_grad_()
    result = altgrad_torch.nn.exact_convolution(given, to_torch(kernel), case.sweeps)
    (first,) = torch.autograd.grad(result, given, result, create_graph=True)
    (second,) = torch.autograd.grad(first, given, torch.ones_like(first))

    def of_jax(x: jax.Array) -> jax.Array:
        result, pull = jax.vjp(lambda x: altgrad_jax.nn.exact_convolution(x, jnp.asarray(kernel), (1,), "VALID"), x)
        return pull(result)[0]

    inner, *_ = convolutions_of(case, np.ones_like(x), kernel, gradient)
    _, wanted, _ = convolutions_of(case, x, kernel, inner)
    same_bits(as_numpy(second), wanted)
    same_bits(jax.jit(lambda x: jax.vjp(of_jax, x)[1](jnp.ones_like(x))[0])(jnp.asarray(x)), wanted)


def test_a_padding_that_repeats_the_input_is_refused() -> None:
    x = jnp.ones((1, 4, 1))
    for act, message in [
        (
            lambda: altgrad_jax.nn.quantize_model(
                nnx.Conv(1, 1, (3,), padding="CIRCULAR", rngs=nnx.Rngs(0)), rules(altgrad_jax)
            ),
            "a Conv, cannot accumulate exactly",
        ),
        (
            lambda: jax.eval_shape(
                altgrad_jax.nn.quantize_model(linen.Conv(1, (3,), padding="REFLECT"), rules(altgrad_jax)).init, _KEY, x
            ),
            "a Conv, cannot accumulate exactly",
        ),
        (
            lambda: altgrad_torch.nn.quantize_model(
                torch.nn.Conv1d(1, 1, 3, padding=1, padding_mode="reflect"), rules(altgrad_torch)
            ),
            "an input that padding_mode='reflect' repeats",
        ),
        (lambda: altgrad_jax.nn.exact_convolution(x, x, (1,), "SAME", batch_group_count=2), "batch_group_count is 2"),
        (lambda: altgrad_jax.nn.exact_convolution(x, jnp.ones((1, 4, 2)), (1,), "VALID"), "a kernel of length 2 goes"),
        (lambda: altgrad_jax.nn.exact_convolution(x, x, (1,), "VALID", feature_group_count=3), "do not fit a kernel"),
        (lambda: altgrad_jax.nn.exact_convolution(x, x, (1,), "SAME", (2,)), "padding is 'SAME' for a dilated input"),
        (
            lambda: altgrad_torch.nn.exact_convolution(torch.ones(1, 3, 4), torch.ones(1, 4, 1), [Sweep()]),
            r"shapes \(1, 3, 4\) and \(1, 4, 1\) in 1 groups",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            act()
