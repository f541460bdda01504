"""Whole trainings in both frameworks: every tensor of every step the same, bit for bit, if sums are exact."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import product

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import altgrad_jax.nn.functions as jax_functions
import altgrad_jax.twins
import altgrad_jax.twins.models as jax_models
import altgrad_torch.nn.functions as torch_functions
import altgrad_torch.twins
import altgrad_torch.twins.models as torch_models
from altgrad.parity import Lockstep, assert_in_lockstep, lockstep
from altgrad.parity.twins import sides_of
from altgrad_core.errors import InputError
from altgrad_core.formats import EIGHT, parse
from altgrad_core.twins import Activation, GPTShape, MLPShape, Recipe, Shape
from altgrad_jax.params import FormatParams
from altgrad_jax.twins.products import Products as JaxProducts
from altgrad_torch.twins.products import Products as TorchProducts
from parity_tests.support import TORCH_DEVICE

SMALL: dict[str, Shape] = {
    "mlp": MLPShape((24, 16, 10), batch=8),
    "gpt": GPTShape(context=8, layers=1, width=16, heads=2, batch=2),
}
LARGER: dict[str, Shape] = {
    "mlp": MLPShape((196, 64, 64, 10), batch=32),
    "gpt": GPTShape(context=16, layers=2, width=32, heads=4, batch=4),
}
NATIVE = MLPShape((196, 48, 10), batch=16)
CASES = [
    (model, Recipe(name, optimizer, storage))
    for model, optimizer, storage, name in product(SMALL, ("sgd", "adamw"), ("master", "committed"), EIGHT)
]


def case_id(value: object) -> str:
    if isinstance(value, Recipe):
        return "-".join(filter(None, (value.format, value.optimizer, value.storage, value.rounding)))
    return str(value)


@pytest.mark.parametrize(("model", "recipe"), CASES, ids=case_id)
def test_twenty_steps(model: str, recipe: Recipe) -> None:
    """Operands, products, activations, logits, loss, gradients, moments and weights."""
    assert_in_lockstep(*sides_of(SMALL[model], recipe, device=TORCH_DEVICE), steps=20, repeat_steps=0)


@pytest.mark.parametrize("format", EIGHT)
def test_weights_committed_to_nearest(format: str) -> None:
    recipe = Recipe(format, "sgd", "committed", rounding="nearest_even", momentum=0.0)
    assert_in_lockstep(*sides_of(SMALL["mlp"], recipe, device=TORCH_DEVICE), steps=5, repeat_steps=0)


@pytest.mark.exhaustive  # the GPT is compiled again for it
@pytest.mark.parametrize("recipe", [Recipe("E5M2"), Recipe("E4M3", "adamw", "committed")], ids=case_id)
def test_the_gpt_with_gelu(recipe: Recipe) -> None:
    shape = GPTShape(context=8, layers=1, width=16, heads=2, batch=2, activation="gelu")
    assert_in_lockstep(*sides_of(shape, recipe, device=TORCH_DEVICE), steps=50, repeat_steps=0)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_activation_of_the_gpt(activation: Activation, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is asked for, in both frameworks; forward alone, without exact sums, which take long to compile."""
    for models in (jax_models, torch_models):
        monkeypatch.setattr(models, "cross_entropy", lambda logits, targets: logits)
    shape = GPTShape(context=4, layers=1, width=4, heads=1, batch=1, activation=activation)
    weights, tokens = shape.initial_weights(0), np.arange(4, dtype=np.int32).reshape(1, 4)
    in_jax = JaxProducts(FormatParams.from_format("E4M3"), "native")
    in_torch = TorchProducts(parse("E4M3"), "native")
    jax_models.loss(shape, in_jax, {name: jnp.asarray(w) for name, w in weights.items()}, tokens, tokens)
    on_device = {name: torch.tensor(w, device=TORCH_DEVICE) for name, w in weights.items()}
    torch_models.loss(shape, in_torch, on_device, *(torch.tensor(tokens, device=TORCH_DEVICE).long(),) * 2)
    for seen, functions in ((in_jax.seen, jax_functions), (in_torch.seen, torch_functions)):
        activated, down = getattr(functions, activation)(seen["block0.up.product"]), in_float64(seen["block0.down.lhs"])
        np.testing.assert_allclose(down, in_float64(activated), rtol=2.0**-4, atol=2.0**-9)  # an ulp of E4M3
        assert np.any(down < 0) == (activation == "gelu")


@pytest.mark.exhaustive
@pytest.mark.parametrize(("model", "recipe"), CASES, ids=case_id)
def test_many_steps(model: str, recipe: Recipe) -> None:
    steps = 200 if model == "mlp" else 50
    assert_in_lockstep(*sides_of(LARGER[model], recipe, device=TORCH_DEVICE), steps=steps, repeat_steps=0)


@pytest.mark.exhaustive
@pytest.mark.parametrize("format", EIGHT)
def test_many_steps_of_the_large_mlp(format: str) -> None:
    assert_in_lockstep(*sides_of(MLPShape(), Recipe(format), device=TORCH_DEVICE), steps=200, repeat_steps=0)


def losses(shape: Shape, recipe: Recipe, steps: int) -> list[float]:
    _, make = sides_of(shape, recipe)
    state, step = make()
    found = []
    for number in range(steps):
        state, seen = step(state, number)
        found.append(float(in_float64(seen["loss"])))
    return found


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_twins_learn(optimizer: str) -> None:
    """What stands still is identical, too."""
    found = losses(SMALL["mlp"], Recipe("E4M3", optimizer, learning_rate=0.1 if optimizer == "sgd" else 0.02), 40)
    assert np.mean(found[-5:]) < 0.7 * np.mean(found[:3])


def test_committed_weights_are_on_the_grid() -> None:
    make, _ = sides_of(SMALL["mlp"], Recipe("E3M4", storage="committed"))
    state, step = make()
    for number in range(3):
        state, _ = step(state, number)
    weight = np.asarray(state.weights["layer0.weight"])
    significands = np.frexp(weight[weight != 0])[0] * 2.0**5
    assert np.all(significands == np.round(significands))


def test_a_bit_that_differs_is_found() -> None:
    shape, recipe = SMALL["mlp"], Recipe("E0M7")
    weights = shape.initial_weights(0)
    other = {name: weight.copy() for name, weight in weights.items()}
    other["layer0.weight"][3, 5] *= -1
    batches = shape.batches(0)
    found = lockstep(
        lambda: altgrad_jax.twins.make(shape, recipe, weights, batches),
        lambda: altgrad_torch.twins.make(shape, recipe, other, batches, device=TORCH_DEVICE),
        steps=3,
        repeat_steps=0,
    )
    first = found.first_difference
    assert first is not None
    assert (first.step, first.tensor.name, first.tensor.differing) == (0, "layer0.rhs", 1)


@cache
def native(format: str) -> Lockstep:
    recipe = Recipe(format, accumulate="native")
    return lockstep(*sides_of(NATIVE, recipe, device=TORCH_DEVICE), steps=5, repeat_steps=0)


@pytest.mark.parametrize("format", EIGHT)
def test_native_sums_part_at_a_product(format: str) -> None:
    """If they do: whether two orders of summation give the same bits depends on the machine."""
    first = native(format).first_difference
    assert first is None or first.cause.name == "reduction order"
    assert first is None or first.tensor.name.endswith(".product")


@pytest.mark.parametrize("format", EIGHT)
def test_native_sums_are_within_their_bound(format: str) -> None:
    """Each side's products, held against the exact ones of its own operands.

    The bound is that of float32 summation in any order, products rounded as well: ``k u sum |x y|``, u = 2^-24
    (Jeannerod and Rump, "Improved error bounds for inner products in floating-point arithmetic", 2013). Of the same
    operands the sides are then at most twice that apart.
    """
    for make in sides_of(NATIVE, Recipe(format, accumulate="native"), device=TORCH_DEVICE):
        state, step = make()
        for number in range(3):
            state, seen = step(state, number)
            for layer in range(NATIVE.layers):
                lhs, rhs, result = (in_float64(seen[f"layer{layer}.{part}"]) for part in ("lhs", "rhs", "product"))
                bound = lhs.shape[-1] * 2.0**-24 * (np.abs(lhs) @ np.abs(rhs))
                assert np.all(np.abs(result - lhs @ rhs) <= bound)


def in_float64(tensor: object) -> np.ndarray:
    array = getattr(tensor, "value", tensor)
    array = array.cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
    return array.astype(np.float64)


def test_a_batch_is_a_function_of_its_step() -> None:
    batches = MLPShape((24, 10)).batches(3)
    for one, other in zip(batches(7), batches(7), strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.any(batches(7)[0] != batches(8)[0])


def test_a_vocabulary_that_is_too_small() -> None:
    make, _ = sides_of(GPTShape(vocabulary=65), Recipe())
    state, step = make()
    with pytest.raises(InputError, match="the vocabulary is 65; expected 68, as the text has"):
        step(state, 0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"format": "E5M3"}, None),
        ({"format": "float8_e8m0fnu"}, "has no sign"),
        ({"format": "float32", "storage": "committed"}, "would have no effect"),
        ({"rounding": "stochastic"}, "only committed weights are rounded"),
        ({"optimizer": "adamw", "momentum": 0.9}, "adamw has none"),
        ({"optimizer": "adam"}, "did you mean 'adamw'"),
        ({"momentum": 1.0}, "momentum is 1.0; expected 0 or more"),
        ({"learning_rate": 0.0}, "the learning rate is 0.0"),
    ],
)
def test_recipes(options: Mapping[str, object], expected: str | None) -> None:
    if expected is None:
        assert Recipe(**options).grid.bits == 9
        return
    with pytest.raises(InputError, match=expected):
        Recipe(**options)
