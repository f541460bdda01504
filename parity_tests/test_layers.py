"""Layers quantised by the same rules: the same steps in both frameworks, and the same packed storage, every bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import altgrad_jax.nn
import altgrad_torch.nn
from altgrad_core.rules import OPERANDS, Rule
from parity_tests.support import TORCH_DEVICE, as_numpy, assert_same_bits, to_torch

pytestmark = pytest.mark.usefixtures("keys_that_compile_soon")

STEPS, BATCH, INPUTS, OUTPUTS = 3, 6, 12, 5
FORMATS = [("E4M3", "E5M2"), ("E3M4", "E3M4"), ("E0M7", "E7M0"), ("E2M5", "E6M1"), ("E1M6", "E4M3")]
SCALINGS: dict[str, tuple[Any, Any]] = {
    "static": (altgrad_jax.Static(0.25), altgrad_torch.Static(0.25)),
    "delayed": (altgrad_jax.Delayed(2), altgrad_torch.Delayed(2)),
    "current": (altgrad_jax.Current(), altgrad_torch.Current()),
}


@nnx.jit
def step_of_jax(layer: nnx.Linear, x: jax.Array, gradient: jax.Array) -> tuple[Any, ...]:
    """A recorded step: output, and gradients of weights (as torch has them), bias and input."""
    with altgrad_jax.nn.recording(layer):
        graph, parameters, rest = nnx.split(layer, nnx.Param, ...)
        out, pull = jax.vjp(lambda parameters, x: nnx.merge(graph, parameters, rest)(x), parameters, x)
        of_parameters, of_x = pull(gradient)
    return out, of_parameters["kernel"][...].T, of_parameters["bias"][...], of_x


def step_of_torch(layer: torch.nn.Linear, x: np.ndarray, gradient: np.ndarray) -> tuple[torch.Tensor, ...]:
    given = to_torch(x).requires_grad_()
    with altgrad_torch.nn.recording(layer):
        out = layer(given)
        gradients = torch.autograd.grad(out, (layer.weight, layer.bias, given), to_torch(gradient))
    return out, *gradients


def the_same_linear(of_jax: nnx.Linear) -> torch.nn.Linear:
    """A layer of torch with the weights of one of Flax."""
    layer = torch.nn.Linear(of_jax.in_features, of_jax.out_features, device=TORCH_DEVICE)
    with torch.no_grad():
        layer.weight.copy_(to_torch(np.array(of_jax.kernel[...]).T))
        layer.bias.copy_(to_torch(np.array(of_jax.bias[...])))
    return layer


def assert_same_state(of_jax: nnx.Linear, of_torch: torch.nn.Linear, what: str) -> None:
    for operand in OPERANDS:
        history = getattr(of_jax.dot_general, operand).get_value().history
        site = of_torch.casts[operand]
        if history is not None:
            assert_same_bits(
                as_numpy(site.history).reshape(history.shape), np.asarray(history), what=f"{what}: {operand}"
            )


@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
@pytest.mark.parametrize(
    ("granularity", "scaling"),
    [
        ("channel", "delayed"),
        *(
            pytest.param(granularity, scaling, marks=pytest.mark.exhaustive)
            for granularity in ("tensor", "channel")
            for scaling in ("static", "delayed", "current")
            if (granularity, scaling) not in [("channel", "delayed"), ("channel", "static")]
        ),
    ],
)
def test_linear_layers_take_the_same_steps(formats: tuple[str, str], granularity: str, scaling: str) -> None:
    """Output, gradients and histories, over steps whose inputs grow and shrink, where weights move too."""
    of_jax, of_torch = (
        Rule(".*", formats[0], gradients=formats[1], scaling=each, granularity=granularity, accumulate="exact")
        for each in SCALINGS[scaling]
    )
    plain = nnx.Linear(INPUTS, OUTPUTS, rngs=nnx.Rngs(0), bias_init=nnx.initializers.normal())
    mine, yours = altgrad_jax.nn.quantize_model(plain, [of_jax]), the_same_linear(plain)
    altgrad_torch.nn.quantize_model(yours, [of_torch])
    assert_same_state(mine, yours, "at the start")
    draw = np.random.default_rng(0)
    for step, size in enumerate((3.0, 700.0, 0.02)):
        x = (size * draw.standard_normal((BATCH, INPUTS)) * np.exp(draw.standard_normal((BATCH, INPUTS)))).astype("f4")
        # Of few bits, so that the gradient of the bias, which is summed as each framework does it, is exact.
        gradient = np.ldexp(draw.integers(-(2**12), 2**12, (BATCH, OUTPUTS)), -10 - 9 * step).astype(np.float32)
        left, right = step_of_jax(mine, jnp.asarray(x), jnp.asarray(gradient)), step_of_torch(yours, x, gradient)
        for name, one, other in zip(("output", "weights", "bias", "input"), left, right, strict=True):
            assert_same_bits(other, np.asarray(one), what=f"step {step}, {name}")
        assert_same_state(mine, yours, f"after step {step}")
        factor = np.float32(1.5 - step)
        mine.kernel.set_value(mine.kernel[...] * factor)
        with torch.no_grad():
            yours.weight.mul_(factor.item())


def four_rules(package: Any) -> list[Rule]:
    ratio = package.Delayed(4, power_of_two=False)
    return [
        Rule("(layers/)?0", "E4M3"),
        Rule("(layers/)?1", "E5M6", granularity="channel"),
        Rule("(layers/)?2", "E2M1", granularity="block4"),
        Rule("(layers/)?3", "E2M5", scaling=ratio),
    ]


def test_a_network_is_packed_alike(tmp_path: Path) -> None:
    """Codes and scales of an MLP, and files of both packages read by both, tensor by tensor."""
    layers = [nnx.Linear(INPUTS, OUTPUTS, rngs=nnx.Rngs(seed)) for seed in range(2)]
    layers[1:1] = [nnx.Linear(OUTPUTS, INPUTS, rngs=nnx.Rngs(seed)) for seed in (2, 3)]
    mine = altgrad_jax.nn.quantize_model(nnx.Sequential(*layers), four_rules(altgrad_jax))
    plain = torch.nn.Sequential(*map(the_same_linear, layers))
    yours = altgrad_torch.nn.quantize_model(plain, four_rules(altgrad_torch))
    files = tmp_path / "mine", tmp_path / "yours"
    altgrad_jax.save_packed(files[0], altgrad_jax.nn.pack(mine))
    altgrad_torch.save_packed(files[1], altgrad_torch.nn.pack(yours))
    for read in (altgrad_jax.load_packed, altgrad_torch.load_packed):
        of_mine, of_yours = (read(path).tensors for path in files)
        for k in range(4):
            kernel, weight = of_mine[f"layers/{k}/kernel"], of_yours[f"{k}.weight"]
            assert (kernel.layout.format, kernel.layout.scale_kind) == (weight.layout.format, weight.layout.scale_kind)
            assert_same_bits(as_numpy(weight.codes), as_numpy(kernel.codes).T, what=f"codes {k}")
            assert_same_bits(as_numpy(weight.scales), as_numpy(kernel.scales).T, what=f"scales {k}")
            assert_same_bits(as_numpy(of_yours[f"{k}.bias"]), as_numpy(of_mine[f"layers/{k}/bias"]), what="bias")
    loaded = altgrad_torch.unpack_tensors(altgrad_torch.load_packed(files[0], TORCH_DEVICE).tensors)
    renamed = {f"{k}.weight": loaded[f"layers/{k}/kernel"].T for k in range(4)}
    altgrad_torch.nn.unpack(yours, renamed | {f"{k}.bias": loaded[f"layers/{k}/bias"] for k in range(4)})
    for k, layer in enumerate(yours):
        assert_same_bits(layer.weight, as_numpy(loaded[f"layers/{k}/kernel"]).T, what=f"weights {k}")
        if k < 3:  # those of the last have scales that are no powers of two, and need the state of its casts
            assert_same_bits(layer.casts["weights"].cast(layer.weight), layer.weight, what=f"cast weights {k}")
