"""Models of Flax Linen, quantized by rules: each layer against its product by hand, and what is done with models."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from altgrad_core.errors import InputError
from altgrad_core.rules import UnusedRuleWarning
from altgrad_jax import Current, Delayed, Static, quantize
from altgrad_jax.nn import (
    Each,
    Rule,
    dequantize_model,
    quantize_model,
    record_casts,
    recording,
    set_formats,
    summary,
)
from tests.exact_sums import mixed, product_of, same_bits

pytestmark = pytest.mark.usefixtures("keys_that_compile_soon")

_KEY = jax.random.key(0, impl="rbg")  # which compiles in a fraction of the time of the default
_SCALES = (0.5, 0.25, 2.0)
_RULES = [Rule(".*", "E3M4", gradients="E5M2", scaling=Each(*map(Static, _SCALES)))]
_DELAYED = [Rule(".*", "E4M3", gradients="E5M2", scaling=Delayed(4))]


def _normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _cast(x: jax.Array, format: str, scale: float) -> jax.Array:
    return quantize(x, format, scale=scale, overflow="saturate_finite")


def _by_hand(product, of_right=_SCALES[1]):
    """A product of operands that are cast, whose gradients are those at the cast operands of the cast gradient."""

    @jax.custom_vjp
    def computed(lhs, rhs):
        return forward(lhs, rhs)[0]

    def forward(lhs, rhs):
        operands = _cast(lhs, "E3M4", _SCALES[0]), _cast(rhs, "E3M4", of_right)
        return product(*operands), operands

    def backward(operands, gradient):
        return jax.vjp(product, *operands)[1](_cast(gradient, "E5M2", _SCALES[2]))

    computed.defvjp(forward, backward)
    return computed


def _assert_same(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.asarray(one).dtype == np.asarray(other).dtype


def _conv(lhs, rhs):
    return jax.lax.conv_general_dilated(lhs, rhs, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _dense(lhs, rhs):
    return jnp.matmul(lhs, rhs, preferred_element_type=jnp.float32).astype(lhs.dtype)


def _attention(params, x):
    query, key, value = (jnp.einsum("btd,dhk->bthk", x, params[name]["kernel"]) for name in ("query", "key", "value"))
    # Neither product has weights: keys and values are cast as activations are.
    score = _by_hand(partial(jnp.einsum, "...qhd,...khd->...hqk"), of_right=_SCALES[0])
    mix = _by_hand(partial(jnp.einsum, "...hqk,...khd->...qhd"), of_right=_SCALES[0])
    mixed = mix(jax.nn.softmax(score(query / jnp.sqrt(4).astype(jnp.float32), key)), value)
    return jnp.einsum("bthk,hkd->btd", mixed, params["out"]["kernel"])


_LAYERS = {
    "Dense": (nn.Dense(3), (5, 7), lambda p, x: _by_hand(_dense)(x, p["kernel"]) + p["bias"]),
    "Dense in bfloat16": (
        nn.Dense(3, dtype=jnp.bfloat16, param_dtype=jnp.float32),
        (5, 7),
        lambda p, x: (
            _by_hand(_dense)(*(each.astype(jnp.bfloat16) for each in (x, p["kernel"]))) + p["bias"].astype(jnp.bfloat16)
        ),
    ),
    "DenseGeneral": (
        nn.DenseGeneral((2, 3), axis=(1, -1), batch_dims=(0,)),
        (2, 4, 6, 3),
        lambda p, x: _by_hand(partial(jnp.einsum, "bchd,bcdkl->bhkl"))(x, p["kernel"]) + p["bias"][:, None],
    ),
    "Conv": (nn.Conv(3, (3, 2), (2, 1)), (2, 5, 4, 2), lambda p, x: _by_hand(_conv)(x, p["kernel"]) + p["bias"]),
    "ConvTranspose": (
        nn.ConvTranspose(3, (3, 2), (2, 1), use_bias=False),
        (2, 5, 4, 2),
        lambda p, x: _by_hand(partial(jax.lax.conv_transpose, strides=(2, 1), padding="SAME"))(x, p["kernel"]),
    ),
    "Einsum": (
        nn.Einsum((6, 2, 3), "btd,dhk->bthk"),
        (2, 4, 6),
        lambda p, x: _by_hand(partial(jnp.einsum, "btd,dhk->bthk"))(x, p["kernel"]) + p["bias"],
    ),
    "attention": (nn.MultiHeadDotProductAttention(2, use_bias=False), (2, 5, 8), _attention),
}


@pytest.mark.parametrize("name", _LAYERS)
def test_each_layer_is_its_product_of_cast_operands_bit_for_bit(name):
    layer, shape, by_hand = _LAYERS[name]
    x, model = _normal(1, *shape), quantize_model(layer, [replace(_RULES[0], layers="")])  # not attention's projections

    @jax.jit
    def both(key, x):
        plain, variables = layer.init(key, x), model.init(key, x)
        params = variables["params"]

        def differentiated(compute):
            result, pullback = jax.vjp(compute, params, x)
            return result, pullback(30 * jnp.sin(jnp.arange(result.size, dtype=result.dtype)).reshape(result.shape))

        quantized = differentiated(lambda params, x: model.apply({**variables, "params": params}, x))
        return plain["params"], params, quantized, differentiated(by_hand)

    plain, params, quantized, reference = both(_KEY, x)
    _assert_same(params, plain)
    _assert_same(quantized, reference)


def test_embed_casts_its_table_and_what_attends_to_it():
    class Tied(nn.Module):
        def setup(self):
            self.embed = nn.Embed(5, 3)

        def __call__(self, tokens, x):
            return self.embed(tokens), self.embed.attend(x)

    tokens, x, model = jnp.array([[0, 3], [4, 3]]), _normal(1, 2, 3), quantize_model(Tied(), _RULES)

    @jax.jit
    def both(key):
        variables = model.init(key, tokens, x)
        table = variables["params"]["embed"]["embedding"]

        def quantized(table, x):
            return model.apply({**variables, "params": {"embed": {"embedding": table}}}, tokens, x)

        def by_hand(table, x):
            looked_up = _by_hand(lambda _, table: jnp.take(table, tokens, axis=0))(jnp.zeros(()), table)
            return looked_up, _by_hand(lambda x, table: jnp.dot(x, table.T))(x, table)

        gradient = 3 * _normal(2, 2, 2, 3), 3 * _normal(3, 2, 5)
        return [(*jax.vjp(each, table, x)[:1], jax.vjp(each, table, x)[1](gradient)) for each in (quantized, by_hand)]

    _assert_same(*both(_KEY))


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(6)(x))
        return nn.Dense(3)(x)


class Twin(nnx.Module):
    def __init__(self, params):
        self.Dense_0, self.Dense_1 = nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 3, rngs=nnx.Rngs(0))
        for name in ("Dense_0", "Dense_1"):
            getattr(self, name).kernel[...] = params[name]["kernel"]
            getattr(self, name).bias[...] = params[name]["bias"]

    def __call__(self, x):
        return self.Dense_1(nnx.relu(self.Dense_0(x)))


def _loss(y: jax.Array) -> jax.Array:
    return jnp.mean((y - 1) ** 2)


def _trained(model, scale: float = 0.1):
    """A step of SGD with a recording; it counts how often it was traced."""

    def step(variables, x):
        step.traces += 1
        with record_casts(variables["casts"]) as seen:
            gradients = jax.grad(lambda params: _loss(model.apply({**variables, "params": params}, x)))(
                variables["params"]
            )
        params = jax.tree.map(lambda p, g: p - scale * g, variables["params"], gradients)
        return {"params": params, "casts": seen.updated(variables["casts"])}, seen.counts

    step.traces = 0
    return step


def test_linen_and_nnx_train_alike_bit_for_bit():
    rules = [
        Rule("Dense_0", None, None, "E5M2", scaling=Delayed(2), rounding="stochastic"),
        Rule("Dense_1", "E3M4", None, granularity="channel"),
    ]
    x = _normal(5, 8, 4)
    with pytest.raises(InputError, match="seed=7 would have no effect"):
        quantize_model(MLP(), rules[1:], seed=7)
    model = quantize_model(MLP(), rules, seed=7)
    variables = jax.jit(model.init)(_KEY, x)
    twin = quantize_model(Twin(variables["params"]), rules, seed=7)

    @nnx.jit
    def twin_step(twin, x):
        with recording(twin):
            gradients = nnx.grad(lambda twin: _loss(twin(x)), argnums=nnx.DiffState(0, nnx.Param))(twin)
        nnx.update(twin, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(twin, nnx.Param), gradients))

    step = jax.jit(_trained(model))
    for _ in range(3):
        variables, _ = step(variables, x)
        twin_step(twin, x)
    for name in ("Dense_0", "Dense_1"):
        layer, casts = getattr(twin, name), variables["casts"][name]
        _assert_same(variables["params"][name], {"kernel": layer.kernel[...], "bias": layer.bias[...]})
        for operand, state in casts.items():
            _assert_same(jax.tree.leaves(state), jax.tree.leaves(getattr(layer.dot_general, operand).get_value()))


@pytest.fixture(scope="module")
def mlp():
    """A quantized MLP with its variables, a batch, and a jitted step of training."""
    x, model = _normal(5, 8, 4), quantize_model(MLP(), [Rule("Dense_1", None), *_DELAYED])
    step = _trained(model)
    return model, jax.jit(model.init)(_KEY, x), x, step, jax.jit(step)


def test_a_recording_brings_histories_up_to_date_and_a_poisoned_batch_leaves_them(mlp):
    _, variables, x, _, step = mlp
    assert set(variables["casts"]) == {"Dense_0"}
    largest = jnp.max(jnp.abs(variables["params"]["Dense_0"]["kernel"]))
    np.testing.assert_array_equal(variables["casts"]["Dense_0"]["weights"].history, [0, 0, 0, largest])
    after, counts = step(variables, x)
    np.testing.assert_array_equal(
        after["casts"]["Dense_0"]["activations"].history, [0, 0, 0, np.max(np.abs(np.asarray(x)))]
    )
    assert {name: count.as_integers()["elements"] for name, count in counts.items()} == {
        "Dense_0/activations": 32,
        "Dense_0/weights": 24,
        "Dense_0/gradients": 48,
    }
    poisoned, _ = step(after, x.at[0, 0].set(jnp.nan))
    newest = after["casts"]["Dense_0"]["activations"].history[-1]
    np.testing.assert_array_equal(poisoned["casts"]["Dense_0"]["activations"].history, [0, 0, newest, newest])


def test_formats_are_data(mlp):
    model, variables, x, step, jitted = mlp
    jitted(variables, x)
    traces = step.traces
    changed = set_formats(variables, {"Dense_0": Each("E5M2", "E2M5", "E4M3")})
    (after, _), (before, _) = jitted(changed, x), jitted(variables, x)
    assert step.traces == traces
    assert jnp.any(after["params"]["Dense_0"]["kernel"] != before["params"]["Dense_0"]["kernel"])
    rows = summary(model, changed, x).rows
    assert [row.formats for row in rows] == [("E5M2", "E2M5", "E4M3"), (None, None, None)]
    assert [(row.path, row.kind, row.parameters, row.rule) for row in rows] == [
        ("Dense_0", "Dense", 24, ".*"),
        ("Dense_1", "Dense", 18, None),
    ]
    assert summary(model, variables, x).rows[0].formats == ("E4M3", "E4M3", "E5M2")  # it was left as it was
    with pytest.raises(InputError, match="'Dense_1' matches no layer that is cast"):
        set_formats(variables, {"Dense_1": "E5M2"})


def test_variables_in_numpy_arrays_as_checkpoints_give_them_are_as_good(mlp):
    model, variables, x, *_ = mlp

    def calibrated(variables):
        variables = set_formats(variables, {"Dense_0": "E5M2"})
        for _ in range(2):  # the first gives JAX arrays
            with record_casts(variables["casts"]) as seen:
                model.apply(variables, x)
            variables = {**variables, "casts": seen.updated(variables["casts"])}
        return variables["casts"]

    restored = flax.serialization.from_bytes(variables, flax.serialization.to_bytes(variables))
    assert isinstance(restored["casts"]["Dense_0"]["weights"].words, np.ndarray)
    with record_casts(restored["casts"]) as seen:
        model.apply(restored, x)
    assert seen.activations.as_integers()["elements"] == 32
    _assert_same(*map(jax.tree.leaves, (calibrated(restored), calibrated(variables))))


def test_a_plain_checkpoint_gets_casts_and_comes_back(mlp):
    model, variables, x, *_ = mlp
    assert isinstance(dequantize_model(model), MLP)
    assert dequantize_model(model) is model.module
    plain = jax.jit(dequantize_model(model).init)(_KEY, x)
    _assert_same(plain["params"], variables["params"])
    _assert_same(jax.jit(model.with_casts)(plain, x), variables)
    _assert_same(flax.serialization.from_bytes(variables, flax.serialization.to_bytes(variables)), variables)
    other = {"params": jax.tree.map(lambda p: 2 * p, plain["params"]), "casts": variables["casts"]}
    history = jax.jit(model.with_casts)(other, x)["casts"]["Dense_0"]["weights"].history
    np.testing.assert_array_equal(history, 2 * variables["casts"]["Dense_0"]["weights"].history)


def test_gradients_are_accumulated_in_one_recording(mlp):
    model, variables, x, *_ = mlp

    @jax.jit
    def accumulated(variables, batches):
        def gradient(total, batch):
            new = jax.grad(lambda params: _loss(model.apply({**variables, "params": params}, batch)))(
                variables["params"]
            )
            return jax.tree.map(jnp.add, total, new), None

        with record_casts(variables["casts"]) as seen:
            nothing = jax.tree.map(jnp.zeros_like, variables["params"])
            jax.lax.scan(gradient, nothing, batches)
        return seen.updated(variables["casts"]), seen.activations

    casts, counts = accumulated(variables, jnp.stack([x, 5 * x]))
    assert counts.as_integers()["elements"] == 64
    assert casts["Dense_0"]["activations"].history[-1] == 5 * jnp.max(jnp.abs(x))
    assert casts["Dense_0"]["activations"].step == 1


@pytest.mark.exhaustive
def test_models_and_their_steps_are_mapped(mlp):
    model, one, x, _, jitted = mlp
    variables = {**one, "params": jax.tree.map(lambda leaf: 3 * leaf, one["params"])}
    variables = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, variables)
    made = jax.eval_shape(jax.vmap(model.init, in_axes=(0, None)), jax.random.split(_KEY, 2), x)
    assert jax.tree.map(lambda leaf: leaf.shape, made) == jax.tree.map(jnp.shape, variables)
    after, _ = jax.jit(jax.vmap(_trained(model), in_axes=(0, None)))(variables, x)
    for place in range(2):
        alone, _ = jitted(jax.tree.map(lambda leaf, at=place: leaf[at], variables), x)
        found = jax.tree.map(lambda leaf, at=place: leaf[at], after)
        _assert_same(found["casts"], alone["casts"])


class Block(nn.Module):
    """Written with ``setup``; one of its layers is called twice, with other shapes."""

    width: int = 4

    def setup(self):
        self.up, self.norm, self.down = nn.Dense(8), nn.BatchNorm(momentum=0.9), nn.Dense(self.width)
        self.dropout = nn.Dropout(0.25)

    def __call__(self, x, train: bool):
        first = self.up(x[:1])
        x = x + self.down(nn.relu(self.dropout(self.up(x) + first, deterministic=not train)))
        return self.norm(x, use_running_average=not train)


class Stack(nn.Module):
    lifted: tuple[str, ...] = ("params", "batch_stats", "casts")

    @nn.compact
    def __call__(self, x, train: bool):
        scanned = nn.scan(
            lambda block, x: (block(x, train), None),
            variable_axes=dict.fromkeys(self.lifted, 0),
            split_rngs={"params": True, "dropout": True},
            length=3,
        )
        return scanned(nn.remat(Block, static_argnums=(2,))(name="blocks"), x)[0]


def test_stacked_layers_are_scanned_over_and_computed_anew():
    x, rngs = _normal(1, 5, 4), {"params": _KEY, "dropout": jax.random.key(1, impl="rbg")}
    rules = [Rule("blocks/up", "E4M3", gradients="E5M2", scaling=Delayed(2))]
    model = quantize_model(Stack(), rules)
    variables = jax.jit(lambda rngs, x: model.init(rngs, x, True))(rngs, x)

    @jax.jit
    def step(variables):
        def loss(params):
            y, changed = model.apply({**variables, "params": params}, x, True, rngs=rngs, mutable=["batch_stats"])
            return _loss(y), changed

        with record_casts(variables["casts"]) as seen:
            gradients, changed = jax.grad(loss, has_aux=True)(variables["params"])
        return gradients, changed, seen.updated(variables["casts"]), seen.counts

    _, changed, after, counted = step(variables)
    assert jnp.all(changed["batch_stats"]["blocks"]["norm"]["mean"] != 0)
    assert jnp.all(after["blocks"]["up"]["gradients"].history[:, -1] > 0)
    casts, params = variables["casts"]["blocks"]["up"], variables["params"]["blocks"]["up"]
    assert sorted(state.number for state in casts.values()) == [0, 1, 2]
    for state in casts.values():
        np.testing.assert_array_equal(state.place, np.arange(3))
    largest = jnp.max(jnp.abs(params["kernel"]), axis=(1, 2))
    np.testing.assert_array_equal(casts["weights"].history, jnp.stack([0 * largest, largest], axis=1))
    counts = {name: count.as_integers()["elements"] for name, count in counted.items()}
    assert counts["blocks/up/activations"] == [24] * 3  # 5 x 4 and 1 x 4, once each, though computed anew
    assert counts["blocks/up/gradients"] == [48] * 3
    shifted = set_formats(variables, {"blocks/up": "E3M4"})
    row, other = summary(model, shifted, x, False).rows
    assert (row.path, row.parameters, row.formats) == ("blocks/up", 96, ("E3M4", "E3M4", "E3M4"))
    assert (other.path, other.parameters, other.formats) == ("blocks/down", 96, (None, None, None))


@pytest.mark.exhaustive
def test_a_scan_of_remat_computes_what_its_layers_compute_one_after_the_other():
    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.scan(
                lambda layer, x: (jnp.sin(layer(x)), None),
                variable_axes={"params": 0, "casts": 0},
                split_rngs={"params": True},
                length=3,
            )(nn.remat(nn.Dense)(4, name="deep"), x)[0]

    x, deep, dense = _normal(1, 5, 4), quantize_model(Deep(), _RULES), quantize_model(nn.Dense(4), _RULES)

    @jax.jit
    def both(key):
        variables = deep.init(key, x)

        def one_after_the_other(params):
            y = x
            for place in range(3):
                casts = jax.tree.map(lambda leaf, at=place: leaf[at], variables["casts"]["deep"])
                layer = jax.tree.map(lambda leaf, at=place: leaf[at], params["deep"])
                y = jnp.sin(dense.apply({"params": layer, "casts": casts}, y))
            return y

        scanned = jax.vjp(lambda params: deep.apply({**variables, "params": params}, x), variables["params"])
        unrolled = jax.vjp(one_after_the_other, variables["params"])
        return [(result, pullback(jnp.cos(result))) for result, pullback in (scanned, unrolled)]

    _assert_same(*both(_KEY))


def test_products_are_summed_exactly_where_a_rule_says_so():
    x, model = _normal(1, 5, 7), quantize_model(nn.Dense(3, use_bias=False), [replace(_RULES[0], accumulate="exact")])

    variables = jax.jit(model.init)(_KEY, x)
    operands = _cast(x, "E3M4", _SCALES[0]), _cast(variables["params"]["kernel"], "E3M4", _SCALES[1])
    lhs, rhs = (np.asarray(each, np.float64) for each in operands)
    sums = (lhs[:, :, None] * rhs).sum(axis=1)  # of so few bits that float64 has them all
    np.testing.assert_array_equal(jax.jit(model.apply)(variables, x), sums.astype(np.float32))
    assert "f64" in str(jax.make_jaxpr(model.apply)(variables, x))


def test_an_einsum_and_its_gradients_are_exact_sums():
    """Of operands that no float64 dot holds, with a bias behind them."""
    a, b = mixed("E7M0", (6, 8, 4), 3)
    gradient = mixed("E7M0", (6, 4, 2), 4)[0]
    x, kernel, bias = a.reshape(2, 3, 8), b.reshape(8, 2, 2), np.float32([[1, 0], [0, 0]])
    rules = [Rule(".*", "E7M0", gradients="E7M0", scaling=Static(1.0), accumulate="exact")]
    model = quantize_model(nn.Einsum((8, 2, 2), "btd,dhk->bthk"), rules)

    @jax.jit
    def computed(params, x):
        variables = model.with_casts({"params": params}, x)
        y, pull = jax.vjp(lambda params, x: model.apply({**variables, "params": params}, x), params, x)
        return y, pull(jnp.reshape(gradient, y.shape))

    y, (of_params, of_x) = computed({"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}, jnp.asarray(x))
    same_bits(y, product_of(a, b).reshape(2, 3, 2, 2) + bias)
    same_bits(of_x, product_of(gradient, b.T).reshape(2, 3, 8))
    same_bits(of_params["kernel"], product_of(a.T, gradient).reshape(8, 2, 2))


def test_an_equation_that_sums_one_operand_alone_is_not_summed_exactly():
    layer = nn.Einsum((2, 3), "btd,hk->hk", use_bias=False)
    model = quantize_model(layer, [Rule(".*", "E4M3", accumulate="exact")])
    x = jnp.ones((2, 3, 4))
    variables = jax.jit(model.init)(_KEY, x)
    with pytest.raises(InputError, match="'btd,hk->hk' sums over axes of one operand alone"):
        model.apply(variables, x)


def test_methods_of_the_plain_model_are_called_by_name():
    class Coder(nn.Module):
        def setup(self):
            self.code = nn.Dense(2)

        def __call__(self, x):
            return self.encode(x)

        def encode(self, x):
            return self.code(x)

    x, model = _normal(1, 3, 4), quantize_model(Coder(), _RULES)
    variables = jax.jit(model.init)(_KEY, x)
    expected = model.apply(variables, x)
    _assert_same(model.apply(variables, x, method="encode"), expected)
    _assert_same(model.apply(variables, x, method=Coder.encode), expected)


class Doubled(nn.Dense):
    """A subclass that uses the product of its base."""

    @nn.compact
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class Own(nn.Dense):
    """A subclass with a product of its own."""

    @nn.compact
    def __call__(self, inputs):
        return inputs @ self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features))


class Table(nn.Embed):
    pass


def test_a_subclass_is_cast_where_its_base_computes():
    x, model = _normal(1, 3, 4), quantize_model(Doubled(2), _RULES)
    variables = jax.jit(model.init)(_KEY, x)
    base = quantize_model(nn.Dense(2), _RULES)
    _assert_same(model.apply(variables, x), 2 * base.apply(variables, x))


@pytest.mark.parametrize(
    ("layer", "rule", "message"),
    [
        (nn.Dense(2, dot_general=jax.lax.dot_general), _RULES[0], "a Dense, has a dot_general of its own"),
        (nn.Dense(2, dot_general_cls=lambda: jax.lax.dot_general), _RULES[0], "has a dot_general_cls of its own"),
        (Own(2), _RULES[0], "an? Own, did not use its dot_general"),
        (nn.ConvLocal(2, (2,)), _RULES[0], "a ConvLocal, has no hook for its product"),
        (
            nn.ConvTranspose(2, (2,), padding="CIRCULAR"),
            Rule(".*", "E4M3", accumulate="exact"),
            "a ConvTranspose, cannot accumulate",
        ),
        (nn.Dense(2), Rule(".*", "E4M3", scaling="delayed"), "scaling is 'delayed'"),
        (
            nn.RNN(nn.OptimizedLSTMCell(2), variable_broadcast=["params", "casts"]),
            _RULES[0],
            r"a DenseParams, has no hook for its product, so it cannot be cast; expected Rule\('cell/ii', None\)",
        ),
        (
            nn.RNN(nn.SimpleCell(2)),
            _RULES[0],
            "no collection 'casts' reaches cell/i, a Dense; expected it to be lifted",
        ),
        (
            nn.MultiHeadDotProductAttention(2),
            Rule("", "E4M3", activations=None),
            r"the rule '' says weights='E4M3', .* about the model \(MultiHeadDotProductAttention\)",
        ),
        (Stack(("params", "batch_stats")), _RULES[0], "no collection 'casts' reaches blocks/up"),
    ],
)
def test_what_cannot_be_cast_is_refused_when_the_model_is_initialized(layer, rule, message):
    args = (True,) if isinstance(layer, Stack) else ()
    with pytest.raises(InputError, match=message):
        jax.eval_shape(
            lambda key: quantize_model(layer, [rule]).init({"params": key, "dropout": key}, jnp.ones((2, 3, 4)), *args),
            _KEY,
        )


def test_a_subclass_of_a_layer_without_a_hook_is_refused():
    with pytest.raises(InputError, match="a Table, has no hook"):
        jax.eval_shape(lambda key: quantize_model(Table(3, 2), _RULES).init(key, jnp.zeros(2, int)), _KEY)


def test_two_layers_of_one_path_are_refused():
    class Shared(nn.Module):
        def setup(self):
            self.dense, self.table = nn.Dense(4), nn.Embed(3, 4)
            nn.share_scope(self, self.dense)
            nn.share_scope(self, self.table)

        def __call__(self, tokens):
            return self.dense(self.table(tokens))

    with pytest.raises(InputError, match="is the path of two layers"):
        jax.eval_shape(lambda key: quantize_model(Shared(), _RULES).init(key, jnp.zeros(2, int)), _KEY)


def test_misuse_is_refused(mlp):
    model, variables, x, *_ = mlp
    for act, message in [
        (lambda: model.apply({"params": variables["params"]}, x), "hold casts of nothing for Dense_0, a Dense"),
        (lambda: quantize_model(MLP(), _RULES).apply(variables, x), "hold casts of nothing for Dense_1"),
        (
            lambda: quantize_model(MLP(), [Rule("Dense_0", "E4M3", None), Rule(".*", None)]).apply(variables, x),
            "expected weights, as the rules say",
        ),
        (lambda: quantize_model(model, _RULES), "quantized already"),
        (lambda: model.bind(variables), "is not bound"),
        (lambda: nn.Sequential([model]).init(_KEY, x), "no part of another"),
        (lambda: recording(model), "expected record_casts"),
        (lambda: set_formats(model, {".*": "E4M3"}), "expected its variables"),
        (lambda: set_formats({"params": variables["params"]}, {".*": "E4M3"}), "the layers are none"),
        (lambda: summary(model), "expected its variables and an example"),
        (lambda: summary(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), x), "expected no inputs"),
        (lambda: quantize_model(MLP(), [("Dense_0", "E4M3")]), "is no rule"),
        (lambda: quantize_model(MLP, _RULES), "expected an nnx.Module or a linen.Module"),
        (lambda: dequantize_model(MLP), "expected an nnx.Module or a linen.Module"),
    ]:
        with pytest.raises(InputError, match=message):
            act()


def test_an_unused_rule_warns():
    model = quantize_model(MLP(), [Rule("Dense_2", "E4M3"), Rule("Dense_0", "E4M3")])
    with pytest.warns(UnusedRuleWarning, match="'Dense_2' matches no layer; the layers are Dense_0, Dense_1"):
        jax.eval_shape(model.init, _KEY, jnp.ones((2, 4)))


def test_nothing_cast_is_the_plain_model():
    x, model = _normal(1, 3, 4), quantize_model(MLP(), [Rule(".*", None)])
    variables = jax.jit(model.init)(_KEY, x)
    assert set(variables) == {"params"}
    _assert_same(model.apply(variables, x), MLP().apply(variables, x))


def test_channels_have_histories_of_their_own():
    rules = [Rule(".*", "E4M3", granularity="channel", scaling=Each(Current(), Delayed(2), Delayed(2)))]
    x, model = _normal(1, 2, 6, 6, 2), quantize_model(nn.Conv(3, (2, 2)), rules)
    variables = jax.jit(model.init)(_KEY, x)
    kernel = np.abs(np.asarray(variables["params"]["kernel"])).max(axis=(0, 1, 2), keepdims=True)
    _assert_same(np.asarray(variables["casts"]["weights"].history), np.stack([0 * kernel, kernel]))
    after, _ = jax.jit(_trained(model))(variables, x)
    assert after["casts"]["gradients"].history.shape == (2, 3)
    assert (after["casts"]["gradients"].history[-1] > 0).all()


def test_casts_that_are_shared_by_all_steps_of_a_recurrence():
    """Broadcast as the parameters are, which Flax finds out by tracing ``init`` in part."""
    cell = nn.RNN(nn.GRUCell(8), variable_broadcast=["params", "casts"])
    x, model = _normal(1, 2, 3, 4), quantize_model(cell, [Rule(".*", "E2M5")])
    variables = model.init(_KEY, x)
    assert not np.array_equal(model.apply(variables, x), cell.apply({"params": variables["params"]}, x))


def test_variables_that_are_made_without_an_input():
    model = quantize_model(nn.Dense(3), [Rule(".*", "E4M3")])
    lazy = model.lazy_init(_KEY, jax.ShapeDtypeStruct((2, 4), jnp.float32))
    _assert_same(lazy, model.init(_KEY, jnp.ones((2, 4))))
