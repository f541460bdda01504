"""Models of Flax NNX, quantized by rules: against products made by hand, and under JAX's transformations."""

import warnings
from dataclasses import replace
from functools import partial, partialmethod

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from altgrad_core.errors import InputError
from altgrad_core.rules import UnusedRuleWarning
from altgrad_core.scaling import PerBlock, PerChannel
from altgrad_jax import Current, Delayed, Static, cast_counts, quantize
from altgrad_jax.granularity import amaxes, spread
from altgrad_jax.nn import (
    CastVariable,
    Each,
    Rule,
    dequantize_model,
    pack,
    quantize_model,
    quantized_dot_general,
    recording,
    set_formats,
    summary,
    unpack,
)
from altgrad_jax.nn.cast_state import begun_anew
from altgrad_jax.nn.casts import cast_operand
from altgrad_jax.packed_files import load_packed, save_packed
from altgrad_jax.packing import PackedTensor, unpack_tensor
from altgrad_jax.scaling import power_of_two_scale

pytestmark = pytest.mark.usefixtures("keys_that_compile_soon")

ONE = Static(1.0)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@partial(jax.jit, static_argnums=0)
def _value_and_pullback(graph, params, rest, x, gradient):
    out, pullback = jax.vjp(lambda params, x: nnx.merge(graph, params, rest)(x), params, x)
    return out, *pullback(gradient)


def value_and_pullback(model, x, gradient):
    """Result, gradients of the parameters, gradient of the input; models that differ in numbers share a program."""
    return _value_and_pullback(*nnx.split(model, nnx.Param, ...), x, gradient)


class Own(nnx.Linear):
    """Computes by itself."""

    def __call__(self, x):
        return x @ self.kernel[...]


class Doubled(nnx.Linear):
    """Computes by what it is a kind of, in a call within."""

    def __call__(self, x):
        return jax.jit(lambda x: 2 * super(Doubled, self).__call__(x))(x)


def bare(call):
    """A decorator that does not say what it wraps."""
    return lambda self, *args: call(self, *args)


class Decorated(nnx.Linear):
    @bare
    def __call__(self, x):
        return super().__call__(x)


class Forward(nnx.Linear):
    def __call__(self, x):
        return self.forward(x)

    def forward(self, x, scale=1.0):
        return scale * super().__call__(x)


class Partial(Forward):
    __call__ = partialmethod(Forward.forward, scale=2.0)


class OwnTable(nnx.Embed):
    pass


class Mlp(nnx.Module):
    def __init__(self, rngs, width=8):
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(self.norm(x))))


def loss_of(model, x):
    return jnp.mean(model(x) ** 2)


@nnx.jit
def recorded_step(model, x):
    with recording(model) as seen:
        loss, gradients = nnx.value_and_grad(loss_of)(model, x)
    return loss, gradients, seen.counts


class TestProducts:
    """Each kind of layer is its plain self on operands cast by hand, forward and backward."""

    def check(self, layer, x):
        cast = quantize_model(layer, [Rule(".*", "E4M3", "E3M4", "E5M2", scaling=ONE, overflow="native")])
        gradient = normal(9, *jax.eval_shape(layer, x).shape)
        out, of_params, of_x = value_and_pullback(cast, x, gradient)
        twin = nnx.clone(layer)
        twin.kernel.set_value(quantize(layer.kernel[...], "E4M3"))
        expected = value_and_pullback(twin, quantize(x, "E3M4"), quantize(gradient, "E5M2"))
        np.testing.assert_array_equal(out, expected[0])
        np.testing.assert_array_equal(of_params["kernel"][...], expected[1]["kernel"][...])
        np.testing.assert_array_equal(of_x, expected[2])
        # The bias is added behind the cast of the gradient: it sees the gradient as it came.
        if layer.bias is not None:
            plain = value_and_pullback(layer, x, gradient)[1]["bias"][...]
            np.testing.assert_array_equal(of_params["bias"][...], plain)

    @pytest.mark.parametrize(
        ("make", "shape"),
        [
            (partial(nnx.Linear, 6, 5), (3, 4, 6)),
            (partial(nnx.LinearGeneral, (3, 2), (2, 4), axis=(-2, -1)), (5, 3, 2)),
            (partial(nnx.LinearGeneral, 6, 5, batch_axis={0: 3}), (3, 4, 6)),
            (partial(nnx.Einsum, "btd,dhk->bthk", (6, 2, 3), (2, 3)), (2, 4, 6)),
            (partial(nnx.Conv, 3, 4, (3, 3), strides=2), (2, 6, 6, 3)),
            (partial(nnx.Conv, 4, 4, (3,), feature_group_count=2, use_bias=False), (2, 6, 4)),
        ],
        ids=lambda value: value.func.__name__ if isinstance(value, partial) else None,
    )
    def test_layers_with_a_hook(self, make, shape):
        self.check(make(rngs=nnx.Rngs(0)), 2 * normal(1, *shape))

    def test_a_transposed_convolution(self):
        layer = nnx.ConvTranspose(3, 4, (3, 3), strides=(2, 2), use_bias=False, rngs=nnx.Rngs(0))
        self.check(layer, normal(1, 2, 5, 5, 3))

    def test_an_embedding(self):
        layer = nnx.Embed(7, 4, rngs=nnx.Rngs(0))
        cast = quantize_model(layer, [Rule(".*", "E3M4", gradients="E5M2", scaling=ONE)])
        tokens, gradient = jnp.array([[1, 2], [2, 6]]), normal(2, 2, 2, 4)
        table = quantize(layer.embedding[...], "E3M4")
        graph, params, rest = nnx.split(cast, nnx.Param, ...)
        out, pullback = jax.vjp(lambda params: nnx.merge(graph, params, rest)(tokens), params)
        np.testing.assert_array_equal(out, table[tokens])
        expected = jnp.zeros_like(table).at[tokens].add(quantize(gradient, "E5M2"))
        np.testing.assert_array_equal(pullback(gradient)[0]["embedding"][...], expected)
        query = normal(3, 5, 4)
        np.testing.assert_array_equal(cast.attend(query), jnp.dot(quantize(query, "E3M4"), table.T))

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_attention(self, is_causal):
        layer = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
        cast = quantize_model(layer, [Rule("", "E4M3", gradients="E5M2", scaling=ONE)])
        query, key, value = (normal(seed, 3, 5, 2, 4) for seed in range(3))

        @jax.jit
        def by_hand(query, key, value):
            scores = jnp.einsum("bqhd,bkhd->bhqk", quantize(query / jnp.sqrt(4.0), "E4M3"), quantize(key, "E4M3"))
            if is_causal:
                scores = jnp.where(jnp.tril(jnp.ones((5, 5), bool)), scores, jnp.finfo(jnp.float32).min)
            weights = quantize(jax.nn.softmax(scores), "E4M3")
            return jnp.einsum("bhqk,bkhd->bqhd", weights, quantize(value, "E4M3"))

        ours = jax.jit(lambda *args: cast.attention_fn(*args, is_causal=is_causal, deterministic=True))
        np.testing.assert_array_equal(ours(query, key, value), by_hand(query, key, value))

    def test_both_operands_of_attention_are_activations(self):
        layer = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
        cast = quantize_model(layer, [Rule("", None, "E4M3", None, scaling=ONE)])
        assert summary(cast).rows[-1].formats == ("E4M3", None, None)
        assert {each.get_value().operand for each in cast.attention_fn.scores.variables} == {"activations"}
        both = quantize_model(layer, [Rule("", "E7M0", "E4M3", None, scaling=ONE)])
        args = [normal(seed, 3, 5, 2, 4) for seed in range(3)]
        attend = [jax.jit(partial(each.attention_fn, deterministic=True)) for each in (cast, both)]
        np.testing.assert_array_equal(attend[0](*args), attend[1](*args))

    def test_attention_on_a_fine_grid_is_nearly_plain_attention(self):
        layer = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
        cast = quantize_model(layer, [Rule(".*", "E5M10", scaling=ONE)])
        x, gradient = normal(1, 3, 5, 8), normal(2, 3, 5, 8)
        plain, ours = (value_and_pullback(model, x, gradient) for model in (layer, cast))
        chex.assert_trees_all_close(jax.tree.leaves(plain), jax.tree.leaves(ours), rtol=2.0**-8, atol=2.0**-7)

    def test_dtypes_are_kept(self):
        dtype = jnp.bfloat16
        layer = nnx.Linear(6, 5, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
        cast = quantize_model(layer, [Rule(".*", "E4M3", gradients="E5M2")])
        x = normal(0, 3, 6).astype(dtype)
        out, of_params, of_x = value_and_pullback(cast, x, jnp.ones((3, 5), dtype))
        assert {out.dtype, of_x.dtype, *(leaf.dtype for leaf in jax.tree.leaves(of_params))} == {jnp.dtype(dtype)}

    def test_exact_products_are_exact_forward_and_backward(self):
        layer = nnx.Linear(3, 1, use_bias=False, rngs=nnx.Rngs(0))
        layer.kernel.set_value(jnp.array([[2.0**40], [1.0], [-(2.0**40)]]))
        cast = quantize_model(layer, [Rule(".*", "E7M0", scaling=ONE, accumulate="exact")])
        x = jnp.full((2, 3), 2.0**20)
        out, _, of_x = value_and_pullback(cast, x, jnp.ones((2, 1)))
        np.testing.assert_array_equal(out, jnp.full((2, 1), 2.0**20))
        np.testing.assert_array_equal(of_x, jnp.broadcast_to(layer.kernel[...].T, (2, 3)))


class TestScales:
    @pytest.mark.parametrize(
        ("granularity", "of_weights"),
        [
            pytest.param("tensor", "tensor", marks=pytest.mark.exhaustive),
            ("channel", PerChannel(-1)),
            ("block4", PerBlock(4, 0)),
        ],
    )
    def test_current_scales(self, granularity, of_weights):
        layer = nnx.Linear(8, 4, use_bias=False, rngs=nnx.Rngs(0))
        x, gradient = 100 * normal(0, 6, 8), 1e-6 * normal(1, 6, 4)

        @partial(jax.jit, static_argnums=(1, 2))
        def by_hand(array, format, granularity):
            maximum = {"E4M3": 448.0, "E5M2": 57344.0}[format]
            scale = power_of_two_scale(amaxes(array, granularity), maximum)
            return quantize(array, format, scale=spread(scale, array.shape, granularity))

        rule = Rule(".*", "E4M3", gradients="E5M2", scaling=Current(), granularity=granularity)
        out, of_params, of_x = value_and_pullback(quantize_model(layer, [rule]), x, gradient)
        q_x, q_kernel = by_hand(x, "E4M3", granularity), by_hand(layer.kernel[...], "E4M3", of_weights)
        q_gradient = by_hand(gradient, "E5M2", granularity)
        np.testing.assert_array_equal(out, q_x @ q_kernel)
        np.testing.assert_array_equal(of_params["kernel"][...], q_x.T @ q_gradient)
        np.testing.assert_array_equal(of_x, q_gradient @ q_kernel.T)

    @pytest.mark.parametrize("granularity", [pytest.param("tensor", marks=pytest.mark.exhaustive), "channel"])
    def test_delayed_scales_follow_what_was_recorded(self, granularity):
        model = quantize_model(Mlp(nnx.Rngs(0)), [Rule("up", "E3M4", scaling=Delayed(2), granularity=granularity)])
        states = {each.get_value().operand: each for each in (model.up.dot_general.variables)}
        kernel = model.up.kernel[...]
        of_kernel = amaxes(kernel, "tensor" if granularity == "tensor" else PerChannel(-1))
        np.testing.assert_array_equal(states["weights"].get_value().history[-1].reshape(-1), of_kernel.reshape(-1))
        for step in range(3):
            x = (step + 1) * normal(step, 3, 8)
            recorded_step(model, x)
            inside = model.norm(x)
            expected = amaxes(inside, granularity).reshape(states["activations"].get_value().history.shape[1:])
            np.testing.assert_allclose(states["activations"].get_value().history[-1], expected, rtol=1e-6)
        assert int(states["activations"].get_value().step) == 3

    def test_an_empty_history_scales_by_one_and_a_pass_without_gradients_calibrates(self):
        model = quantize_model(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), [Rule(".*", "E4M3")])
        x = 1000 * normal(0, 3, 4)

        @nnx.jit
        def forward(model, x):
            with recording(model) as seen:
                model(x)
            return seen.activations.overflow_rate, seen.gradients

        assert float(forward(model, x)[0]) > 0
        rate, gradients = forward(model, x)
        assert float(rate) == 0
        assert gradients.as_integers()["elements"] == 0

    def test_what_is_not_finite_stays_out_of_the_histories(self):
        model = quantize_model(Mlp(nnx.Rngs(0)), [Rule("up|down", "E4M3")])
        # The largest gradient is one of another row: relu lets none through where it is given NaN.
        x = normal(0, 3, 8) * jnp.array([[1.0], [9.0], [1.0]])
        recorded_step(model, x)
        before = [variable.get_value().history for variable in model.up.dot_general.variables]
        _, _, counts = recorded_step(model, x.at[0, 0].set(jnp.nan))
        assert counts["up/activations"].as_integers()["nan"] == 8
        for old, variable in zip(before, model.up.dot_general.variables, strict=True):
            np.testing.assert_array_equal(variable.get_value().history, jnp.append(old[1:], old[-1]))

    def test_an_exception_leaves_the_model_as_it_was(self):
        model = quantize_model(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), [Rule(".*", "E4M3")])
        before = jax.tree.leaves(nnx.state(model, CastVariable))
        with pytest.raises(ZeroDivisionError), recording(model):
            model(jnp.ones((2, 4))) / (1 // 0)
        chex.assert_trees_all_equal(before, jax.tree.leaves(nnx.state(model, CastVariable)))

    def test_stochastic_rounding_differs_from_step_to_step_and_between_layers(self):
        rounding = Each("nearest_even", "stochastic", "nearest_even")
        model = quantize_model(Mlp(nnx.Rngs(0)), [Rule("up|down", "E2M5", rounding=rounding, scaling=ONE)], seed=3)
        weights = {name: getattr(model, name).dot_general.weights for name in ("up", "down")}
        assert len({int(each.get_value().seed) for each in weights.values()}) == 2
        x = normal(0, 3, 8)
        first = model(x)
        np.testing.assert_array_equal(first, model(x))
        recorded_step(model, x)
        assert (model(x) != first).any()


class TestRecording:
    def test_counts_are_those_of_the_operands(self):
        layer = nnx.Linear(8, 4, use_bias=False, rngs=nnx.Rngs(0))
        model = quantize_model(layer, [Rule(".*", "E2M5", "E0M7", "E3M4", scaling=ONE)])
        x, kernel = normal(0, 6, 8), layer.kernel[...]
        gradient = 2 * (quantize(x, "E0M7") @ quantize(kernel, "E2M5")) / 24
        _, _, counts = recorded_step(model, x)
        expected = {"activations": (x, "E0M7"), "weights": (kernel, "E2M5"), "gradients": (gradient, "E3M4")}
        for operand, (array, name) in expected.items():
            assert counts[operand].as_integers() == cast_counts(array, name).as_integers()
        assert counts["activations"].as_integers()["overflow"] > 0

    def test_passes_add_up(self):
        model = quantize_model(Mlp(nnx.Rngs(0)), [Rule("up|down", "E4M3")])
        parts = normal(0, 3, 4, 8)

        @nnx.jit
        def step(model, parts):
            with recording(model) as seen:
                for part in parts:
                    nnx.grad(loss_of)(model, part)
            return seen.counts

        assert {name: each.as_integers()["elements"] for name, each in step(model, parts).items()} == {
            "up/activations": 3 * 4 * 8,
            "up/weights": 3 * 128,
            "up/gradients": 3 * 4 * 16,
            "down/activations": 3 * 4 * 16,
            "down/weights": 3 * 128,
            "down/gradients": 3 * 4 * 8,
        }
        largest = max(float(jnp.max(jnp.abs(model.norm(part)))) for part in parts)
        np.testing.assert_allclose(model.up.dot_general.activations.get_value().history[-1], largest, rtol=1e-6)

    def test_each_cast_counts_once_under_checkpoint_and_jit(self):
        model = quantize_model(Mlp(nnx.Rngs(0)), [Rule("up|down", "E4M3")])
        graph, state = nnx.split(model)
        block = jax.checkpoint(jax.jit(lambda state, x: nnx.merge(graph, state)(x)))
        x = normal(0, 3, 8)

        @jax.jit
        def step(state, x):
            with recording(model_of := nnx.merge(graph, state)) as seen:
                _, params, rest = nnx.split(model_of, nnx.Param, ...)
                gradients = jax.grad(lambda params: jnp.mean(block(nnx.merge_state(params, rest), x) ** 2))(params)
            return gradients, seen.counts

        for _ in range(2):  # the second time with what JAX kept of the first
            gradients, counts = step(state, x)
            step = jax.jit(step.__wrapped__)
        _, expected_gradients, expected = recorded_step(model, x)
        chex.assert_trees_all_close(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), rtol=1e-6)
        assert {k: v.as_integers() for k, v in counts.items()} == {k: v.as_integers() for k, v in expected.items()}

    def test_a_stack_of_layers_that_is_scanned_over_is_the_layers_one_by_one(self):
        rules = [Rule(".*(up|down)", "E4M3", gradients="E5M2")]

        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(rngs):
            return Mlp(rngs)

        stack = stacked(nnx.Rngs(0))
        graph, state = nnx.split(stack)
        blocks = [nnx.merge(graph, jax.tree.map(lambda leaf, k=k: leaf[k], state)) for k in range(2)]
        apart, stack = quantize_model(nnx.List(blocks), rules), quantize_model(stack, rules)

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def scanned(block, x):
            return nnx.remat(lambda block, x: block(x))(block, x)

        def one_by_one(blocks, x):
            for block in blocks:
                x = block(x)
            return x

        @partial(nnx.jit, static_argnums=0)
        def step(forward, model, x):
            with recording(model) as seen:
                nnx.grad(lambda model: jnp.mean(forward(model, x) ** 2))(model)
            return seen.activations, seen.weights, seen.gradients

        x = normal(1, 4, 8)
        for _ in range(3):
            seen, expected = step(scanned, stack, x), step(one_by_one, apart, x)
        assert [each.as_integers() for each in seen] == [each.as_integers() for each in expected]
        for operand in ("activations", "weights", "gradients"):
            for k in range(2):
                np.testing.assert_allclose(
                    getattr(stack.up.dot_general, operand).get_value().history[k],
                    getattr(apart[k].up.dot_general, operand).get_value().history,
                    rtol=1e-5,
                )
        set_formats(stack, {"down": "E3M4"})
        assert summary(stack).rows[0].formats == ("E3M4", "E3M4", "E3M4")

    def test_models_mapped_apart_have_scales_of_their_own(self):
        model = quantize_model(Mlp(nnx.Rngs(0)), [Rule("up|down", "E4M3")])
        graph, state = nnx.split(model)
        states = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
        x = jnp.stack([normal(0, 3, 8), 100 * normal(1, 3, 8)])

        def step(state, x):
            model = nnx.merge(graph, state, copy=True)
            _, _, counts = recorded_step.__wrapped__(model, x)
            return nnx.state(model), counts

        after, _ = jax.jit(jax.vmap(step))(states, x)
        step = jax.jit(step)
        for k in range(2):
            expected, _ = step(state, x[k])
            chex.assert_trees_all_close(jax.tree.map(lambda leaf, k=k: leaf[k], after), expected, rtol=1e-5)

    def test_a_stack_that_cannot_be_recorded_says_how_it_can(self):
        rules, keys = [Rule(".*", "E4M3", gradients=None)], nnx.Rngs(0).split(3)
        before = nnx.vmap(lambda rngs: quantize_model(nnx.Linear(4, 4, rngs=rngs), rules))(keys)
        after = quantize_model(dequantize_model(before), rules)
        x = normal(1, 2, 4)

        def record(model):
            with recording(model) as seen:
                model(x)
            return seen.weights.limbs

        mapped = nnx.vmap(record, in_axes=0)
        with pytest.raises(InputError, match=r"axes \(3,\), and was quantized with \(\), before .* of the stack"):
            record(before)
        assert mapped(before).shape[0] == 3
        message = r"quantized in a stack of \(3,\) and has leading axes \(\), .* each before they are stacked"
        with pytest.raises(InputError, match=message):
            mapped(after)
        with recording(after) as seen:
            nnx.scan(lambda x, model: model(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, after)
        assert seen.weights.as_integers()["elements"] == 3 * 4 * 4

    def test_only_one_recording_at_a_time_of_the_model_that_computes(self):
        model = quantize_model(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), [Rule(".*", "E4M3")])
        other = quantize_model(Mlp(nnx.Rngs(0), 4), [Rule(".*", "E4M3")])
        with recording(model) as seen:
            with pytest.raises(InputError, match="goes on already"), recording(other):
                pass
            with pytest.raises(InputError, match="a model with 6 casts computes while a model with 3 is recorded"):
                other(jnp.ones((2, 4)))
            with pytest.raises(InputError, match="still going on"):
                _ = seen.counts
        with pytest.raises(InputError, match="nothing to record"), recording(nnx.Linear(2, 2, rngs=nnx.Rngs(0))):
            pass


class TestModels:
    @pytest.mark.parametrize("kind", [Doubled, Decorated, Forward, Partial])
    def test_a_subclass_that_comes_to_what_it_is_a_kind_of_is_cast(self, kind):
        model, x = kind(4, 4, use_bias=False, rngs=nnx.Rngs(0)), normal(1, 2, 4)
        cast = quantize_model(model, [Rule(".*", "E2M5")])
        assert not np.array_equal(cast(x), model(x))
        with recording(cast) as seen:
            nnx.grad(lambda model: model(x).sum())(cast)
        assert seen.weights.as_integers()["elements"] == 16

    def test_the_plain_model_comes_back_with_the_parameters_of_now(self):
        plain = Mlp(nnx.Rngs(0))
        cast = quantize_model(plain, [Rule(".*", "E4M3")])
        assert nnx.graphdef(dequantize_model(cast)) == nnx.graphdef(plain)
        cast.up.kernel.set_value(2 * cast.up.kernel[...])
        again = dequantize_model(cast)
        np.testing.assert_array_equal(again.up.kernel[...], 2 * plain.up.kernel[...])
        np.testing.assert_array_equal(again(normal(0, 2, 8)), dequantize_model(again)(normal(0, 2, 8)))

    def test_every_kind_of_layer_comes_back(self):
        class All(nnx.Module):
            def __init__(self, rngs):
                self.embed = nnx.Embed(5, 4, rngs=rngs)
                self.conv = nnx.Conv(4, 4, (3,), rngs=rngs)
                self.back = nnx.ConvTranspose(4, 4, (3,), rngs=rngs)
                self.attend = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
                self.mix = nnx.Einsum("abc,cd->abd", (4, 4), (4,), rngs=rngs)
                self.tied = self.mix

            def __call__(self, tokens):
                return self.tied(self.mix(self.attend(self.back(self.conv(self.embed(tokens))))))

        plain, tokens = All(nnx.Rngs(0)), jnp.arange(10).reshape(2, 5) % 5
        cast = quantize_model(plain, [Rule(".*", "E4M3")])
        assert [row.formats[0] for row in summary(cast).rows] == ["E4M3"] * 9
        assert cast.tied is cast.mix
        forward = nnx.jit(lambda model, tokens: model(tokens))
        assert (forward(cast, tokens) != forward(plain, tokens)).any()
        assert nnx.graphdef(dequantize_model(cast)) == nnx.graphdef(plain)
        np.testing.assert_array_equal(forward(dequantize_model(cast), tokens), forward(plain, tokens))

    def test_formats_are_data(self):
        model = quantize_model(Mlp(nnx.Rngs(0)), [Rule("up|down", "E4M3")])
        step = nnx.jit(chex.assert_max_traces(n=1)(lambda model, x: recorded_step.__wrapped__(model, x)[0]))
        x = normal(0, 3, 8)
        step(model, x)
        for name in ("E0M7", "E7M0", "E5M2"):
            set_formats(model, {"up": name, ".*": Each("E4M3", "E4M3", name)})
            twin = quantize_model(dequantize_model(model), [Rule("up", name), Rule("down", "E4M3", gradients=name)])
            for ours, theirs in ((model.up, twin.up), (model.down, twin.down)):
                for our, their in zip(ours.dot_general.variables, theirs.dot_general.variables, strict=True):
                    chex.assert_trees_all_equal(our.get_value().params, their.get_value().params)
            step(model, x)

    def test_a_training_loop_with_the_clipper(self):
        from altgrad_jax import partition_relative_clip

        model = quantize_model(Mlp(nnx.Rngs(0)), [Rule("up|down", "E3M4")])
        tx = optax.chain(partition_relative_clip("E3M4", overflow_threshold=0.01), optax.adam(1e-2))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, x):
            with recording(model) as seen:
                loss, gradients = nnx.value_and_grad(loss_of)(model, x)
            optimizer.update(model, gradients, overflow_rate=seen.gradients.overflow_rate)
            return loss

        losses = [float(step(model, optimizer, normal(0, 3, 8))) for _ in range(20)]
        assert losses[-1] < 0.8 * losses[0]

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: quantize_model(lambda x: x, []), "the model is a function; expected an nnx.Module"),
            (
                lambda: quantize_model(quantize_model(Mlp(nnx.Rngs(0)), [Rule("up", "E4M3")]), [Rule("down", "E4M3")]),
                "up, a Linear, is cast already",
            ),
            (
                lambda: quantize_model(Own(4, 4, rngs=nnx.Rngs(0)), [Rule(".*", "E4M3")]),
                r"of the class Own, a subclass of Linear whose __call__ uses neither super\(\) nor dot_general",
            ),
            (
                lambda: quantize_model(OwnTable(4, 4, rngs=nnx.Rngs(0)), [Rule(".*", "E4M3")]),
                "of the class OwnTable, a subclass of Embed, which casts would make a class of their own of",
            ),
            (
                lambda: quantize_model(
                    nnx.Linear(2, 2, dot_general=lambda *a, **k: None, rngs=nnx.Rngs(0)), [Rule(".*", "E4M3")]
                ),
                "has a dot_general of its own",
            ),
            (
                lambda: quantize_model(nnx.Embed(2, 2, rngs=nnx.Rngs(0)), [Rule(".*", "E4M3", accumulate="exact")]),
                "a Embed, cannot accumulate exactly",
            ),
            (
                lambda: quantize_model(
                    nnx.Linear(2, 2, rngs=nnx.Rngs(0)), [Rule(".*", "E4M3", scaling=Delayed(4), granularity="block2")]
                ),
                "cannot serve blocks of 2",
            ),
            (
                lambda: quantize_model(
                    nnx.Linear(2, 2, rngs=nnx.Rngs(0)), [Rule(".*", "E4M3", scaling=ONE, granularity="channel")]
                ),
                "granularity='channel' would have no effect",
            ),
            (
                lambda: quantize_model(
                    nnx.Linear(2, 2, rngs=nnx.Rngs(0)), [Rule(".*", "E4M3", scaling=Static(jnp.ones(2)))]
                ),
                r"the static scale has shape \(2,\); expected a number",
            ),
            (
                lambda: quantize_model(
                    nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0)), [Rule("", "E4M3", activations=None)]
                ),
                r"the rule '' says weights='E4M3', .* about the model \(MultiHeadAttention\), with activations",
            ),
            (lambda: quantized_dot_general("E4M3", scaling=ONE, granularity="block2"), "cannot serve blocks of 2"),
            (lambda: quantized_dot_general("E4M3", scaling=ONE, granularity="channel"), "would have no effect"),
            (lambda: quantized_dot_general("float8_e8m0fnu"), "has no sign and no zero"),
            (lambda: quantized_dot_general("E4M3", "float32"), "is float32, which casts nothing"),
            (lambda: quantized_dot_general("E4M3", scaling=2.0), "scaling is 2.0; expected Static or Current"),
            (lambda: quantized_dot_general("E4M3", scaling=Delayed(4)), "needs a state"),
            (lambda: quantized_dot_general("E4M3", rounding="stochastic"), "expected another, or quantize_model"),
            (
                lambda: set_formats(quantize_model(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), [Rule(".*", "E4M3")]), "E5M2"),
                "the formats are 'E5M2'; expected a mapping",
            ),
            (
                lambda: quantize_model(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), [Rule(".*", "E4M3", scaling="delayed")]),
                "scaling is 'delayed'; expected a Static, Current or Delayed",
            ),
            (
                lambda: quantize_model(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), [Rule(".*", "float8_e8m0fnu")]),
                "has no sign",
            ),
            (
                lambda: quantize_model(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), [Rule(".*", "E4M3")], seed=1),
                "seed=1 would have no effect",
            ),
            (
                lambda: quantize_model(
                    nnx.Einsum("ab,ab->ab", (2, 2), rngs=nnx.Rngs(0)), [Rule(".*", "E4M3", granularity="block2")]
                ),
                "does not say which axis",
            ),
            (
                lambda: quantize_model(
                    nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0)),
                    [Rule("", "E4M3", granularity="channel")],
                ),
                "has no fixed number of amaxes",
            ),
            (
                lambda: set_formats(
                    quantize_model(Mlp(nnx.Rngs(0)), [Rule("up", "E4M3", None)]), {"up": Each("E5M2", None, None)}
                ),
                "the layer 'up' does not cast its activations; expected None for them",
            ),
            (
                lambda: set_formats(quantize_model(Mlp(nnx.Rngs(0)), [Rule("up", "E4M3")]), {"down": "E5M2"}),
                "'down' matches no layer that is cast",
            ),
        ],
    )
    def test_bad_input_says_what_was_expected(self, make, message):
        with pytest.raises(InputError, match=message):
            make()

    def test_rules_that_decide_nothing_are_reported(self):
        with pytest.warns(UnusedRuleWarning, match="'norm' matches norm, a LayerNorm, which has nothing to cast"):
            quantize_model(Mlp(nnx.Rngs(0)), [Rule("norm", "E4M3"), Rule(".*", "E4M3")])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            quantize_model(Mlp(nnx.Rngs(0)), [Rule(".*", "E4M3")])


class Normed(Mlp):
    """With running means, and a layer that computes in another dtype than it holds."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.down = nnx.Linear(16, 8, dtype=jnp.bfloat16, rngs=rngs)
        self.statistics = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        return self.statistics(super().__call__(x))


def trained(model, rules):
    """Scales, running means and weights are no longer those that it began with."""
    model = quantize_model(model, rules)
    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Param | nnx.BatchStat):
            node.set_value(0.7 * node.get_value())
    for layer in (model.up, model.down):
        activations = layer.dot_general.activations
        activations.set_value(begun_anew(activations.get_value(), 30 * normal(5, 3, layer.in_features)))
    return model


def without_casts(tensors):
    return {name: tensor for name, tensor in tensors.items() if "casts/" not in name}


RULES = (Rule("up", "E5M6", granularity="channel", scaling=Delayed(2, power_of_two=False)), Rule(".*", "E3M4"))


@pytest.fixture(scope="module")
def model():
    return trained(Normed(nnx.Rngs(0)), RULES)


@pytest.fixture(scope="module")
def tensors(model):
    return pack(model)


class TestPacked:
    def test_a_model_computes_the_same_from_a_file(self, model, tensors, tmp_path):
        save_packed(tmp_path / "model.safetensors", tensors)
        loaded = unpack(quantize_model(Normed(nnx.Rngs(1)), RULES), load_packed(tmp_path / "model.safetensors").tensors)
        forward, x = nnx.jit(lambda model, x: model(x)), normal(0, 3, 8)
        np.testing.assert_array_equal(forward(loaded, x), forward(model, x))
        chex.assert_trees_all_equal(nnx.state(loaded, CastVariable), nnx.state(model, CastVariable))

    def test_weights_are_what_their_layers_compute_with(self, model, tensors):
        for name, layer in (("up", model.up), ("down", model.down)):
            kernel = layer.kernel[...].astype(layer.dtype or jnp.float32)
            cast = cast_operand(kernel, layer.dot_general.weights.get_value()).astype(jnp.float32)
            np.testing.assert_array_equal(unpack_tensor(tensors[f"{name}/kernel"]), cast)
        assert str(tensors["up/kernel"].layout.format) == "E5M6"
        assert tensors["up/kernel"].scales.shape == (1, 16)

    def test_weights_alone_bring_their_scales(self):
        for top in (1.0, 1.01, 1.99):
            layer = nnx.Linear(8, 8, use_bias=False, rngs=nnx.Rngs(0))
            layer.kernel.set_value(layer.kernel[...].at[0, 0].set(top))
            rules = [Rule(".*", "E3M4", activations=None)]
            model = quantize_model(layer, rules)
            model.kernel.set_value(0.3 * model.kernel[...])
            loaded = unpack(
                quantize_model(nnx.Linear(8, 8, use_bias=False, rngs=nnx.Rngs(1)), rules), without_casts(pack(model))
            )
            np.testing.assert_array_equal(loaded(jnp.eye(8)), model(jnp.eye(8)))

    def test_a_plain_model_takes_the_values(self, model, tensors):
        plain = unpack(Normed(nnx.Rngs(1)), tensors)
        np.testing.assert_array_equal(plain.up.kernel[...], unpack_tensor(tensors["up/kernel"]))
        np.testing.assert_array_equal(plain.statistics.var[...], model.statistics.var[...])

    def test_cast_weights_are_four_times_smaller(self, tensors):
        packed = tensors["down/kernel"]
        assert packed.codes.nbytes + packed.scales.nbytes == 16 * 8 + 4

    def test_a_stack_of_layers_keeps_a_scale_for_each(self):
        stacked = nnx.vmap(lambda rngs: nnx.Linear(8, 4, rngs=rngs))(nnx.Rngs(0).split(3))
        stacked.kernel.set_value(stacked.kernel[...] * jnp.array([1.0, 64.0, 4096.0])[:, None, None])
        model = quantize_model(stacked, [Rule(".*", "E2M5")])
        tensors = pack(model)
        packed = tensors["kernel"]
        assert packed.scales.shape == (3, 1, 1)
        for loaded in (unpack(model, tensors), unpack(model, without_casts(tensors))):
            np.testing.assert_array_equal(
                loaded.kernel[...],
                jnp.stack([quantize(stacked.kernel[k], "E2M5", scale=packed.scales[k].item()) for k in range(3)]),
            )

    @pytest.mark.parametrize("granularity", ["tensor", "channel", "block4"])
    def test_models_that_were_stacked_once_quantized_are_packed_as_the_stack_is(self, granularity):
        rules = [Rule(".*", "E2M5", granularity=granularity)]
        stacked = nnx.vmap(lambda rngs: quantize_model(nnx.Linear(8, 4, rngs=rngs), rules))(nnx.Rngs(0).split(3))
        stack = quantize_model(dequantize_model(stacked), rules)
        tensors = pack(stacked)
        chex.assert_trees_all_equal(tensors, pack(stack))
        for loaded in (unpack(stacked, tensors), unpack(stacked, without_casts(tensors))):
            assert jax.tree.structure(nnx.state(loaded)) == jax.tree.structure(nnx.state(stacked))
            chex.assert_trees_all_equal(pack(loaded)["kernel"], tensors["kernel"])
        graph, state = nnx.split(stack)
        one = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[1], state))
        np.testing.assert_array_equal(pack(one)["kernel"].codes, tensors["kernel"].codes[1])

    def test_a_shared_parameter_is_packed_only_where_all_cast_it_alike(self):
        def tied(rules):
            layers = [nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(2)]
            layers[1].kernel = layers[0].kernel
            return quantize_model(nnx.Sequential(*layers), rules)

        alike = tied([Rule(".*", "E4M3")])
        tensors = pack(alike)
        assert isinstance(tensors["layers/0/kernel"], PackedTensor)
        assert "layers/1/kernel" not in tensors
        unpack(alike, tensors)
        apart = pack(tied([Rule("layers/0", "E4M3"), Rule("layers/1", None)]))
        assert not isinstance(apart["layers/0/kernel"], PackedTensor)

    def test_a_masked_parameter_is_not_what_is_cast(self):
        layer = nnx.Conv(2, 2, (2,), mask=jnp.tril(jnp.ones((2, 2, 2))), rngs=nnx.Rngs(0))
        layer.kernel.set_value(layer.kernel[...].at[0, 0, 1].set(1e6))  # of which the mask leaves nothing
        model, x = quantize_model(layer, [Rule(".*", "E4M3", scaling=Current())]), normal(0, 1, 4, 2)
        np.testing.assert_array_equal(unpack(model, pack(model))(x), model(x))

    def test_what_has_no_code_is_refused_by_name(self):
        model = quantize_model(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), [Rule(".*", "E3M4")])
        model.kernel.set_value(model.kernel[...].at[0, 0].set(jnp.inf))
        with pytest.raises(InputError, match="kernel: 1 of 16 elements are infinite, for which E3M4 has no code"):
            pack(model)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"scaling": Delayed(16, power_of_two=False)}, "is of power_of_two=True; expected power_of_two=False"),
            ({"scaling": Delayed(16, "most_recent")}, "is of reduce='max'; expected reduce='most_recent'"),
            ({"scaling": Delayed(8)}, "is of window=16; expected window=8"),
            ({"scaling": Current()}, "is of scaling='delayed', reduce='max', window=16; expected scaling='current'"),
            ({"granularity": "channel"}, "is of granularity='tensor'; expected granularity='channel'"),
            ({"granularity": "block2"}, "expected scaling='current', granularity='block', size=2"),
        ],
    )
    def test_another_scale_rule_is_refused(self, change, message):
        rule = Rule(".*", "E4M3", activations=None)
        tensors = pack(quantize_model(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), [rule]))
        other = quantize_model(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), [replace(rule, **change)])
        with pytest.raises(InputError, match=f"casts/weights/options: the checkpoint {message}|{message}"):
            unpack(other, tensors)

    @pytest.mark.parametrize("options", [b"", b"{}", b"[1]", b"\xff", b'{"version": 2}'])
    def test_what_says_nothing_of_its_scales_is_refused(self, options, tensors):
        model = quantize_model(Normed(nnx.Rngs(0)), RULES)
        with pytest.raises(InputError, match=r"options: the checkpoint says b.*; expected JSON of version 1"):
            unpack(model, {**tensors, "down/casts/weights/options": jnp.array(list(options), jnp.uint8)})

    def test_arrays_of_numpy_are_looked_at_too(self):
        rule = Rule(".*", "E4M3", None, scaling=Delayed(np.int64(8), power_of_two=np.bool_(True)))
        tensors = pack(quantize_model(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), [rule]))
        plain = {name: np.asarray(each) if "casts/" in name else each for name, each in tensors.items()}
        ratios = replace(rule, scaling=Delayed(8, power_of_two=False))
        with pytest.raises(InputError, match="is of power_of_two=True; expected power_of_two=False"):
            unpack(quantize_model(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), [ratios]), plain)

    def test_weights_of_scales_that_would_round_them_once_more_are_refused(self):
        def linear(**options):
            return quantize_model(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), [Rule(".*", "E4M3", None, **options)])

        by_channel = without_casts(pack(linear(granularity="channel")))
        with pytest.raises(InputError, match=r"kernel: its scales are of PerChannel.*; expected PerTensor"):
            unpack(linear(), by_channel)
        ratios = without_casts(pack(linear(scaling=Current(power_of_two=False))))
        with pytest.raises(InputError, match="kernel: its scales are ratios; expected powers of two"):
            unpack(linear(), ratios)

    def test_what_does_not_fit_is_refused(self, tensors):
        model = quantize_model(Normed(nnx.Rngs(0)), RULES)

        def refused(tensors, message, model=model):
            with pytest.raises(InputError, match=message):
                unpack(model, tensors)

        refused({name: each for name, each in tensors.items() if name != "up/kernel"}, "tensors lack up/kernel")
        refused({**tensors, "more": jnp.ones(1)}, "the model has no more; expected the same names")
        refused({**tensors, "up/bias": jnp.ones(4)}, r"up/bias has shape \(4,\) in float32; expected \(16,\)")
        set_formats(model, {"down": Each("E3M4", "E4M3", "E3M4")})
        refused(tensors, "down/kernel: it is packed as E3M4; expected E4M3")
        set_formats(model, {"down": Each("E4M3", "E3M4", "E3M4")})
        refused(tensors, "down/casts/activations/grid is packed in another format, .* expected E4M3")


class _Half(nnx.Module):
    def __init__(self, embed: nnx.Embed, rngs: nnx.Rngs) -> None:
        self.embed, self.layers = embed, nnx.List([nnx.Linear(4, 4, rngs=rngs)])


class _Halves(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        embed = nnx.Embed(10, 4, rngs=rngs)
        self.decoder, self.encoder = _Half(embed, rngs), _Half(embed, rngs)


def test_a_layer_in_two_places_is_under_one_rule() -> None:
    with pytest.raises(InputError, match="decoder/embed and encoder/embed are one layer, but by the rules"):
        quantize_model(_Halves(nnx.Rngs(0)), [Rule("encoder/.*", None), Rule(".*", "E4M3")])
    cast = quantize_model(_Halves(nnx.Rngs(0)), [Rule("encoder/layers/.*", None), Rule(".*", "E4M3")])
    assert [row.path for row in summary(cast).rows if row.formats[1]] == ["decoder/embed", "decoder/layers/0"]


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block4"])
def test_models_are_exported_for_batches_of_any_size(granularity):
    rules = [Rule(".*", "E4M3", scaling=Current(), granularity=granularity)]
    graph, state = nnx.split(quantize_model(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), rules))

    def apply(x):
        return nnx.merge(graph, state)(x)

    batch = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 8"), jnp.float32)
    exported = jax.export.export(jax.jit(apply))(batch)
    x = normal(0, 3, 8)
    np.testing.assert_array_equal(exported.call(x), jax.jit(apply)(x))
