"""Models of Flax Linen in packed storage: the file of the equal NNX model, and variables that compute the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from altgrad_core.errors import InputError
from altgrad_jax import Current, Delayed, PackedTensor, Static, load_packed, quantize, save_packed, unpack_tensor
from altgrad_jax.nn import Each, Rule, pack, quantize_model, record_casts, set_formats, unpack

pytestmark = pytest.mark.usefixtures("keys_that_compile_soon")

_KEY = jax.random.key(0, impl="rbg")  # which compiles in a fraction of the time of the default
RULES = (
    Rule("up", "E5M6", granularity="channel", scaling=Delayed(2, power_of_two=False)),
    Rule("down", "E3M4", None, "E5M2", scaling=Delayed(3), rounding=Each("nearest_even", "nearest_even", "stochastic")),
    Rule("table", "E4M3", scaling=Static(0.125), rounding="stochastic"),
)
KINDS = (
    Rule("conv", "E2M1", None, None, scaling=Current(), granularity="block2"),
    Rule("back|mix", "E4M3", None, granularity="channel"),
    Rule(".*", "E4M3", granularity=Each("tensor", "channel", "tensor")),
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 5, (2, 4)))


def _normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


class Model(nn.Module):
    """With a layer that computes in bfloat16, and running statistics."""

    def setup(self):
        self.table, self.norm = nn.Embed(5, 8), nn.BatchNorm(momentum=0.9)
        self.up, self.down = nn.Dense(16), nn.Dense(8, dtype=jnp.bfloat16)

    def __call__(self, tokens, train: bool = False):
        x = self.down(nn.relu(self.up(self.table(tokens)))).astype(jnp.float32)
        return self.norm(x, use_running_average=not train)


class Twin(nnx.Module):
    """The same in NNX, under the same names."""

    def __init__(self, rngs: nnx.Rngs):
        self.table, self.norm = nnx.Embed(5, 8, rngs=rngs), nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, dtype=jnp.bfloat16, rngs=rngs)


class Kinds(nn.Module):
    """The other layers."""

    attends: bool

    def setup(self):
        self.conv, self.back = nn.Conv(8, (2,)), nn.ConvTranspose(3, (2,))
        self.mix = nn.Einsum((8, 2, 3), "btd,dhk->bthk")
        if self.attends:
            self.attention = nn.MultiHeadDotProductAttention(2, qkv_features=8)

    def __call__(self, x):
        x = self.conv(x)
        return self.back(self.mix(self.attention(x) if self.attends else x).reshape(*x.shape[:-1], 6))


class KindsTwin(nnx.Module):
    """The same in NNX, under the same names."""

    def __init__(self, attends: bool, rngs: nnx.Rngs):
        self.conv, self.back = nnx.Conv(8, 8, (2,), rngs=rngs), nnx.ConvTranspose(6, 3, (2,), rngs=rngs)
        if attends:
            self.attention = nnx.MultiHeadAttention(2, 8, 8, decode=False, rngs=rngs)
        self.mix = nnx.Einsum("btd,dhk->bthk", (8, 2, 3), (2, 3), rngs=rngs)


@pytest.fixture(scope="module")
def trained() -> tuple[Any, dict[str, Any]]:
    """A model and its variables after a recorded step."""
    model = quantize_model(Model(), RULES, seed=3)

    @jax.jit
    def step(key):
        variables = model.init(key, TOKENS)

        def loss(params):
            y, changed = model.apply({**variables, "params": params}, TOKENS, True, mutable=["batch_stats"])
            return jnp.mean(y**2), changed

        with record_casts(variables["casts"]) as seen:
            gradients, changed = jax.grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: 0.7 * p - g, variables["params"], gradients)
        return {"params": params, "casts": seen.updated(variables["casts"]), **changed}

    return model, step(_KEY)


@pytest.fixture(scope="module")
def tensors(trained):
    return pack(*trained, TOKENS)


def _without_casts(tensors):
    return {name: tensor for name, tensor in tensors.items() if "casts/" not in name}


def _same_files(folder, model, variables, inputs, twin) -> set[str]:
    """Whether an NNX model with the same arrays is packed into the same bytes; gives the names of what is packed."""
    tensors = pack(model, variables, inputs)
    plain = pack(model.module, {name: each for name, each in variables.items() if name != "casts"})
    save_packed(folder / "linen", tensors)
    save_packed(folder / "nnx", pack(unpack(twin, {**tensors, **plain})))
    assert (folder / "linen").read_bytes() == (folder / "nnx").read_bytes()
    return {name for name, tensor in tensors.items() if isinstance(tensor, PackedTensor)}


def test_the_file_is_that_of_the_equal_nnx_model(trained, tmp_path):
    packed = _same_files(tmp_path, *trained, TOKENS, quantize_model(Twin(nnx.Rngs(0)), RULES, seed=3))
    assert packed == {"table/embedding", "up/kernel", "down/kernel"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("attends", [False, True])
def test_each_kind_of_layer_is_packed_as_in_nnx(attends, tmp_path):
    rules = KINDS if attends else KINDS[:-1]
    x, model = _normal(0, 2, 4, 8), quantize_model(Kinds(attends), rules)
    variables = jax.jit(model.init)(_KEY, x)
    packed = _same_files(tmp_path, model, variables, x, quantize_model(KindsTwin(attends, nnx.Rngs(0)), rules))
    layers = ["conv", "mix", "back"]
    layers += [f"attention/{name}" for name in ("query", "key", "value", "out") if attends]
    assert packed == {f"{layer}/kernel" for layer in layers}


@pytest.mark.parametrize("change", [{"scaling": Delayed(16, power_of_two=False)}, {"granularity": "channel"}])
def test_another_scale_rule_is_refused(change, tmp_path):
    rules = [Rule(".*", "E4M3", activations=None)]
    layer, other = (quantize_model(nn.Dense(4), made) for made in (rules, [replace(rules[0], **change)]))
    variables, others = (model.init(jax.random.key(0), jnp.ones((1, 4))) for model in (layer, other))
    with pytest.raises(InputError, match=r"casts/weights/options: the checkpoint is of .*; expected .* rule says"):
        unpack(others, pack(layer, variables, jnp.ones((1, 4))))


def test_variables_from_a_file_compute_the_same(trained, tensors, tmp_path):
    model, variables = trained
    save_packed(tmp_path / "model", tensors)
    fresh = jax.jit(model.init)(jax.random.key(1, impl="rbg"), TOKENS)
    loaded = unpack(fresh, load_packed(tmp_path / "model").tensors)
    chex.assert_trees_all_equal(loaded["casts"], variables["casts"])
    chex.assert_trees_all_equal(loaded["batch_stats"], variables["batch_stats"])
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    apply = jax.jit(lambda variables: model.apply(variables, TOKENS))
    np.testing.assert_array_equal(apply(loaded), apply(variables))


def test_a_layer_in_bfloat16_is_packed_as_it_computes(trained, tensors):
    _, variables = trained
    kernel = variables["params"]["down"]["kernel"]
    wide = np.asarray(kernel)
    in_bfloat16 = kernel.astype(jnp.bfloat16)
    scale = float(tensors["down/kernel"].scales)
    computed, direct = (quantize(x, "E3M4", scale=scale).astype(jnp.float32) for x in (in_bfloat16, kernel))
    np.testing.assert_array_equal(unpack_tensor(tensors["down/kernel"]), computed)
    assert not np.array_equal(computed, direct), "no weight on which the roundings differ"
    assert wide.dtype == np.float32


def test_weights_alone_bring_their_scales():
    for top in (1.0, 1.01, 1.99):
        model = quantize_model(nn.Dense(8, use_bias=False), [Rule(".*", "E3M4", activations=None)])
        variables = jax.jit(model.init)(_KEY, jnp.eye(8))
        params = {"kernel": 0.3 * variables["params"]["kernel"].at[0, 0].set(top)}
        variables = model.with_casts({"params": {"kernel": params["kernel"] / 0.3}}, jnp.eye(8)) | {"params": params}
        fresh = jax.jit(model.init)(jax.random.key(1, impl="rbg"), jnp.eye(8))
        loaded = unpack(fresh, _without_casts(pack(model, variables, jnp.eye(8))))
        np.testing.assert_array_equal(model.apply(loaded, jnp.eye(8)), model.apply(variables, jnp.eye(8)))


def test_a_plain_model_takes_the_values_and_is_packed_as_it_is(trained, tensors):
    plain = {name: each for name, each in trained[1].items() if name != "casts"}
    loaded = unpack(plain, tensors)
    np.testing.assert_array_equal(loaded["params"]["up"]["kernel"], unpack_tensor(tensors["up/kernel"]))
    assert set(loaded) == {"params", "batch_stats"}
    packed = pack(Model(), loaded)
    assert packed.keys() == _without_casts(tensors).keys()
    np.testing.assert_array_equal(packed["up/kernel"], loaded["params"]["up"]["kernel"])


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(4, use_bias=False)(x), None


class Stack(nn.Module):
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        lifted = {"params": self.axis, "casts": 0}
        scanned = nn.scan(nn.remat(Block), variable_axes=lifted, split_rngs={"params": True}, length=3)
        return scanned(name="blocks")(x, None)[0]


def test_a_stack_of_layers_keeps_a_scale_for_each():
    x, model = _normal(0, 2, 4), quantize_model(Stack(), [Rule(".*", "E4M3")])
    plain = jax.jit(model.init)(_KEY, x)["params"]
    kernel = plain["blocks"]["Dense_0"]["kernel"] * jnp.array([1.0, 64.0, 4096.0])[:, None, None]
    variables = jax.jit(model.with_casts)({"params": {"blocks": {"Dense_0": {"kernel": kernel}}}}, x)
    apply = jax.jit(model.apply)
    tensors = pack(model, variables, x)
    packed = tensors["blocks/Dense_0/kernel"]
    assert packed.scales.shape == (3, 1, 1)
    expected = jnp.stack([quantize(kernel[k], "E4M3", scale=packed.scales[k].item()) for k in range(3)])
    for loaded in (unpack(variables, tensors), unpack(variables, _without_casts(tensors))):
        np.testing.assert_array_equal(loaded["params"]["blocks"]["Dense_0"]["kernel"], expected)
        np.testing.assert_array_equal(apply(loaded, x), apply(variables, x))
    others = set_formats(variables, {".*": "E3M4"})["casts"]
    apart = jax.tree.map(lambda one, other: one.at[0].set(other[0]), variables["casts"], others)
    with pytest.raises(InputError, match="blocks/Dense_0/kernel is cast to E3M4, E4M3; expected one format"):
        pack(model, variables | {"casts": apart}, x)


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(2, (2,), mask=jnp.tril(jnp.ones((2, 4, 2))))(x)


class Doubled(nn.Dense):
    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return 2 * value if name == "kernel" else value


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(4)
        return layer(layer(x).astype(jnp.bfloat16))


class Narrow(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, param_dtype=jnp.bfloat16)(x.astype(jnp.bfloat16)) + nn.Dense(4)(x)


@pytest.mark.parametrize(
    "module",
    [Masked(), Doubled(4), nn.WeightNorm(nn.Dense(4)), Stack(axis=1)],
    ids=["a mask", "a subclass", "another parametrisation", "stacked along another axis"],
)
def test_a_parameter_that_is_not_what_is_cast_stays_as_it_is(module):
    x = _normal(1, 2, 3, 4)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return module.clone(parent=self, name="layer")(x)

    model = quantize_model(Outer(), [Rule(".*", "E4M3")])
    variables = model.init(_KEY, x)
    tensors = pack(model, variables, x)
    assert not any(isinstance(tensor, PackedTensor) for tensor in tensors.values())
    np.testing.assert_array_equal(model.apply(unpack(variables, tensors), x), model.apply(variables, x))


def test_a_layer_that_computes_in_the_dtype_of_its_input_is_packed_so():
    x, model = _normal(1, 2, 4), quantize_model(Narrow(), [Rule(".*", "E4M3")])
    variables = model.init(_KEY, x)
    tensors = pack(model, variables, x)
    assert [tensors[f"Dense_{k}/kernel"].layout.dtype for k in range(2)] == ["bfloat16", "float32"]
    np.testing.assert_array_equal(model.apply(unpack(variables, tensors), x), model.apply(variables, x))


def test_boxes_of_sharded_parameters_are_kept():
    x = _normal(1, 2, 4)
    boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    model = quantize_model(nn.Dense(4, kernel_init=boxed), [Rule(".*", "E4M3")])
    variables = model.init(_KEY, x)
    tensors = pack(model, variables, x)
    assert isinstance(tensors["kernel"], PackedTensor)
    loaded = unpack(variables, tensors)
    assert loaded["params"]["kernel"].names == (None, "model")
    np.testing.assert_array_equal(loaded["params"]["kernel"].value, unpack_tensor(tensors["kernel"]))


def test_what_does_not_fit_is_refused(trained, tensors):
    model, variables = trained
    downs = set_formats(variables, {"down": Each(None, "E4M3", None)})
    ups = set_formats(variables, {"up": Each("E4M3", None, None)})
    infinite = jax.tree.map(lambda x: x, variables)
    infinite["params"]["down"]["kernel"] = variables["params"]["down"]["kernel"].at[0, 0].set(jnp.inf)
    lacking = {name: each for name, each in tensors.items() if name != "up/kernel"}
    clash = {"params": {"a": jnp.ones(1)}, "batch_stats": {"a": jnp.ones(1)}}
    plain = {name: each for name, each in variables.items() if name != "casts"}
    for act, message in [
        (lambda: unpack(variables, lacking), "tensors lack up/kernel"),
        (lambda: unpack(variables, {**tensors, "more": jnp.ones(1)}), "the model has no more; expected the same names"),
        (lambda: unpack(variables, {**tensors, "up/bias": jnp.ones(4)}), r"up/bias has shape \(4,\) in float32"),
        (lambda: unpack(downs, tensors), "down/kernel: it is packed as E3M4; expected E4M3"),
        (lambda: unpack(ups, tensors), "up/casts/activations/grid is packed in another format, .* expected E4M3"),
        (lambda: unpack(model, tensors), "expected its variables"),
        (lambda: unpack(Twin, tensors), "expected an nnx.Module or a linen.Module"),
        (lambda: pack(model), "expected its variables and an input"),
        (lambda: pack(Model(), variables), "expected that model, not the plain one"),
        (lambda: pack(model, plain, TOKENS), "the variables hold casts of nothing for table"),
        (lambda: pack(model, infinite, TOKENS), "down/kernel: 1 of 128 elements are infinite, for which E3M4 has no"),
        (
            lambda: pack(model, variables, TOKENS, method=lambda model, tokens: model.table(tokens)),
            "the call does not reach down/casts/weights; expected inputs",
        ),
        (lambda: pack(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), variables), "expected no inputs"),
        (lambda: pack(Model(), clash), "a is both a parameter and a running statistic"),
    ]:
        with pytest.raises(InputError, match=message):
            act()
