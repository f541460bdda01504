"""What a user may do with a quantized NNX model that would give wrong numbers if nothing watched."""

import gc
import threading
import weakref
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from altgrad_core.errors import InputError
from altgrad_jax import Delayed, Static, delayed_scale, get_format, set_format
from altgrad_jax.addition import Addition
from altgrad_jax.nn import (
    CastState,
    CastVariable,
    Each,
    Rule,
    not_recording,
    quantize_model,
    recording,
    set_formats,
    summary,
)
from altgrad_jax.nn.casts import cast_operand
from altgrad_jax.nn.record import WORDS, Record, Shape, Sight, amaxes_of, limbs_of, took_place
from altgrad_jax.nn.seen import named_states
from altgrad_jax.params import edges
from altgrad_jax.statistics import CastCounts, TallyParts

pytestmark = pytest.mark.usefixtures("keys_that_compile_soon")


def quantized(seed=0, width=4):
    return quantize_model(nnx.Linear(width, width, rngs=nnx.Rngs(seed)), [Rule(".*", "E4M3")])


def loss_of(model, x):
    return jnp.sum(model(x))


class TestWhereARecordingBelongs:
    @pytest.mark.parametrize("transform", [lambda function: function, jax.checkpoint, jax.jit])
    def test_inside_the_function_that_is_differentiated_it_is_refused(self, transform):
        graph, params, rest = nnx.split(quantized(), nnx.Param, ...)

        @transform
        def loss(params):
            with recording(model := nnx.merge(graph, params, rest, copy=True)) as seen:
                value = loss_of(model, jnp.ones((2, 4)))
            return value + seen.activations.overflow_rate

        with pytest.raises(InputError, match="around grad or value_and_grad, not inside"):
            jax.make_jaxpr(jax.grad(loss))(params)

    def test_a_backward_pass_after_it_is_refused(self):
        model = quantized()
        with recording(model):
            _, pullback = jax.vjp(model, jnp.ones((2, 4)))
        with pytest.raises(InputError, match="after its recording is over"):
            pullback(jnp.ones((2, 4)))

    def test_models_that_were_quantized_apart_cannot_share_one(self):
        models = nnx.List([quantized(0), quantized(1)])
        with (
            pytest.raises(InputError, match="two of the 6 casts have the number 0, of models with 3"),
            recording(models),
        ):
            pass

    @pytest.mark.parametrize("jitted", [False, True])
    def test_a_teacher_computes_apart(self, jitted):
        teacher, graph_and_state = quantized(1), nnx.split(quantized(0))

        def step(state, x):
            model = nnx.merge(graph_and_state[0], state)

            def loss(model):
                with not_recording():
                    target = teacher(10 * x)
                return jnp.sum((model(x) - target) ** 2)

            with recording(model) as seen:
                gradients = nnx.grad(loss)(model)
            return gradients, seen.activations, seen.all, nnx.state(model, CastVariable)

        x = jnp.ones((2, 4))
        gradients, activations, everything, after = (jax.jit(step) if jitted else step)(graph_and_state[1], x)
        assert activations.as_integers()["elements"] == 8
        assert everything.as_integers()["elements"] == [8, 16, 8]
        assert after.dot_general.activations.get_value().history[-1] == 1.0
        alone = nnx.grad(lambda model: jnp.sum((model(x) - teacher(10 * x)) ** 2))(nnx.merge(*graph_and_state))
        jax.tree.map(np.testing.assert_array_equal, gradients, alone)

    def test_a_summary_needs_formats_that_are_known(self):
        graph, state = nnx.split(quantized())
        with pytest.raises(InputError, match="not known while a function is traced; expected a model outside of jit"):
            jax.make_jaxpr(lambda state: summary(nnx.merge(graph, state)) and None)(state)


class TestWhatARecordingKeeps:
    @pytest.mark.parametrize("jitted", [False, True])
    def test_a_part_of_a_model_is_recorded_alone(self, jitted):
        layers = nnx.List([nnx.Linear(4, 4, rngs=nnx.Rngs(k)) for k in range(2)])
        graph, state = nnx.split(quantize_model(layers, [Rule(".*", "E4M3")]))

        def step(state, x):
            model = nnx.merge(graph, state)
            with recording(model[1]) as seen:
                nnx.grad(lambda model: jnp.sum(model[1](model[0](x))))(model)
            return seen.all, nnx.state(model, CastVariable)

        everything, after = (jax.jit(step) if jitted else step)(state, jnp.ones((2, 4)))
        assert everything.as_integers()["elements"] == [8, 16, 8]
        steps = [int(after[k]["dot_general"]["gradients"].get_value().step) for k in range(2)]
        assert steps == [0, 1]

    def test_each_thread_has_a_record_of_its_own(self):
        both, models = threading.Barrier(2), [quantized(seed) for seed in range(2)]
        counted = {}

        def run(which):
            with recording(models[which]) as seen:
                both.wait(60)
                models[which](jnp.ones((which + 1, 4)))
                both.wait(60)
            counted[which] = seen.activations.as_integers()["elements"]

        threads = [threading.Thread(target=run, args=(which,)) for which in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert counted == {0: 4, 1: 8}

    def test_an_exception_leaves_nothing_for_the_next_one(self):
        model = quantized()
        with pytest.raises(ZeroDivisionError), recording(model):
            model(jnp.ones((2, 4))) / (1 // 0)
        with recording(model) as seen:
            pass
        assert seen.activations.as_integers()["elements"] == 0

    @pytest.mark.parametrize("first", ["direct", "scan", "jit", "checkpoint", "forward", "cond", "none"])
    @pytest.mark.parametrize("second", ["direct", "scan", "jit", "checkpoint", "forward"])
    def test_whatever_writes_first_nothing_is_lost(self, first, second):
        """In one trace the first to write finds nothing written: so it must be, whatever was traced before."""
        graph, state = nnx.split(quantized())
        x = jnp.array([[1e6, 1.0, 1e-9, 0.0]])

        def loss(state, x):
            return loss_of(nnx.merge(graph, state), x)

        gradient = jax.grad(loss, argnums=1)
        again = jax.jit(gradient)
        passes = {
            "direct": lambda state, x: gradient(state, x),
            "scan": lambda state, x: lax.scan(lambda carried, x: (carried, gradient(state, x)), 0, jnp.stack([x] * 3)),
            "jit": lambda state, x: (again(state, x), again(state, x)),
            "checkpoint": lambda state, x: jax.grad(jax.checkpoint(loss), argnums=1)(state, x),
            "forward": loss,
            "cond": lambda state, x: lax.cond(x[0, 0] > 0, gradient, lambda _, x: x, state, x),
            "none": lambda state, x: lax.cond(x[0, 0] < 0, gradient, lambda _, x: x, state, x),
        }
        times = {"scan": 3, "jit": 2, "none": 0}

        @jax.jit
        def step(state, x):
            with recording(nnx.merge(graph, state)) as seen:
                passes[first](state, x)
                passes[second](state, 2 * x)
            return seen.activations, seen.gradients

        total = times.get(first, 1) + times.get(second, 1)
        backward = sum(times.get(name, 1) for name in (first, second) if name != "forward")
        activations, gradients = (each.as_integers() for each in step(state, x))
        assert activations == {
            "elements": 4 * total,
            "overflow": total,
            "nonzero": 3 * total,
            "underflow": total,
            "nan": 0,
        }
        assert gradients["elements"] == 4 * backward

    def test_counts_beyond_int32_are_right(self):
        record = Record.new(0, Shape(stack=2, amaxes=None), (), jnp.int32(0))
        tally = jnp.array(TallyParts(0, 2**30 - 1, 0, 1, 7), jnp.int32)
        for _ in range(5):
            record.write(jnp.int32(1), 2**30, Sight(tally, None))
        words = record.read().reshape(2, WORDS)
        nothing, counts = (CastCounts(each).as_integers() for each in limbs_of(words))
        assert nothing["elements"] == 0
        assert list(counts.values()) == [5 * each for each in (2**30, 2**30 - 1, 2**30, 1, 0)]
        assert took_place(words).tolist() == [False, True]
        assert lax.bitcast_convert_type(amaxes_of(words), jnp.int32).tolist() == [0, 7]

    @pytest.mark.parametrize("count", [2**30, 2**30 - 1, 2**15 - 1])
    def test_as_many_passes_as_are_promised_have_room(self, count):
        sight = Sight(jnp.array(TallyParts(1, count, 0, 0, 0), jnp.int32), None)

        @jax.jit
        def passes():
            record = Record.new(0, Shape(stack=None, amaxes=None), (), jnp.int32(0))

            def one(_, carried):
                record.write(None, count, sight)
                return carried

            lax.fori_loop(0, 65_535, one, 0)
            return record.read()

        words = passes()
        found = CastCounts(limbs_of(words[None])[0]).as_integers()
        each = {"elements": count, "overflow": count - 1, "nonzero": count - 1, "underflow": 0, "nan": 1}
        assert found == {name: 65_535 * number for name, number in each.items()}
        assert words.min() >= 0, "no room was left"

    def test_of_a_trace_nothing_is_kept(self):
        traced = []

        def step(model, x):
            with recording(model) as seen:
                model(x)
            traced.append(weakref.ref(seen))
            return seen.activations.overflow_rate

        model = quantized()
        with jax.check_tracer_leaks():
            nnx.jit(step)(model, jnp.ones((2, 4)))
        gc.collect()
        assert traced[0]() is None


def test_names_of_casts_tell_layers_apart_that_are_called_like_hooks():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.product = nnx.Linear(4, 4, rngs=rngs)
            self.dot_general = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            return self.dot_general(self.product(x))

    model = quantize_model(Model(nnx.Rngs(0)), [Rule(".*", "E4M3", gradients=None, scaling=Static(1.0))])
    with recording(model) as seen:
        model(jnp.ones((2, 4)))
    names = ["dot_general/activations", "dot_general/weights", "product/activations", "product/weights"]
    assert sorted(seen.counts) == names
    assert [seen.counts[name].as_integers()["elements"] for name in names] == [8, 16, 8, 16]


@pytest.mark.parametrize("rules", [Rule(".*", "E4M3"), None, iter([Rule(".*", "E4M3")])])
def test_rules_are_a_list(rules):
    with pytest.raises(InputError, match="expected a list"):
        quantize_model(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), rules)


@pytest.mark.parametrize("format", [None, 3])
def test_what_is_no_format_is_not_set(format):
    with pytest.raises(InputError, match="a format is named by a string or is a Format; got"):
        set_formats(quantized(), {".*": format})


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("float32", "the layer '': float32 casts nothing, .* dequantize_model, and quantize_model by rules with None"),
        ("float8_e8m0fnu", "the layer '': float8_e8m0fnu has no sign and no zero; expected a signed format"),
    ],
)
def test_what_is_no_format_of_a_layer_is_not_set(format, message):
    for wanted in (format, Each(None, format, None)):
        with pytest.raises(InputError, match=message):
            set_formats(quantized(), {".*": wanted})


@nnx.jit
def observed(model, x):
    with recording(model):
        nnx.grad(loss_of)(model, x)


@partial(jax.jit, static_argnums=2)
def grid_of(params, history, reduce):
    scaled = params.scaled(delayed_scale(history, params.max_value, reduce=reduce))
    limits = edges(scaled)
    return Addition.of(scaled, limits) if params.path in ("fast", "wide") else scaled, limits


def check_grid(state, reduce):
    expected = jax.tree.leaves(grid_of(state.params, state.history, reduce))
    for found, wanted in zip(jax.tree.leaves(state.grid), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


class TestWhatAStateHolds:
    @pytest.mark.parametrize("reduce", ["max", "most_recent"])
    def test_its_grid_is_that_of_its_params_and_history(self, reduce):
        rule = Rule(".*", "E4M3", gradients="E5M2", scaling=Delayed(4, reduce))
        model = quantize_model(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), [rule])
        for scale, name in ((1.0, None), (2.0**-9, "E2M5"), (2.0**12, None)):
            observed(model, scale * jnp.ones((2, 4)))
            if name is not None:
                set_formats(model, {".*": name})
            for variable in model.dot_general.variables:
                check_grid(variable.get_value(), reduce)

    def test_its_grid_is_that_of_its_own_scaling_and_path_whatever_the_others_have(self):
        rules = [
            Rule("layers/0", "E4M3", scaling=Delayed(4, power_of_two=False)),
            Rule("layers/1", "E4M3", gradients="bf16", scaling=Delayed(4, "most_recent")),
            Rule(".*", "E4M3", scaling=Delayed(4)),
        ]
        layers = [nnx.Linear(4, 4, rngs=nnx.Rngs(seed)) for seed in range(3)]
        model = quantize_model(nnx.Sequential(*layers), rules)
        for scale in (2.0**20, 2.0**10):
            observed(model, scale * jnp.ones((2, 4)))
        for layer, reduce in zip(model.layers[1:], ("most_recent", "max"), strict=True):
            for variable in layer.dot_general.variables:
                check_grid(variable.get_value(), reduce)
        assert model.layers[1].dot_general.gradients.get_value().path == "wide"

    @pytest.mark.parametrize("other", [Rule(".*", "bf16"), Rule(".*", "E4M3", rounding="stochastic")])
    def test_that_of_a_cast_by_another_path_is_refused(self, other):
        """As a checkpoint brings it, by Orbax or flax: an array that says nothing of its path but by its shape."""
        model = quantized()
        others = quantize_model(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), [other]).dot_general.variables
        for variable, another in zip(model.dot_general.variables, others, strict=True):
            variable.set_value(replace(variable.get_value(), words=another.get_value().words))
        found = {"wide": 37, "integer": 35}[others[0].get_value().path]
        with pytest.raises(InputError, match=f"by the fast path has 36 words, and this has {found}; expected the"):
            model(jnp.ones((2, 4)))

    def test_set_format_writes_into_it_wherever_it_is(self):
        states = nnx.state(quantized(), CastVariable)
        after = set_format(states, "E5M2")
        for state in jax.tree.leaves(after, is_leaf=lambda node: isinstance(node, CastState)):
            assert float(state.params.max_value) == float(get_format(state).max_value) == 57344.0
            check_grid(state, "max")
        assert jax.tree.structure(after) == jax.tree.structure(states)

    def test_what_all_casts_saw_is_what_each_saw(self):
        model = quantized()
        with recording(model) as seen:
            nnx.grad(loss_of)(model, jnp.array([[1e6, 1.0, 1e-9, 0.0]]))
        assert sorted(seen.names) == sorted(seen.counts)
        for place, name in enumerate(seen.names):
            counts = seen.counts[name]
            np.testing.assert_array_equal(seen.all.limbs[place], counts.limbs)
            assert seen.overflow_rates[name] == counts.overflow_rate
            assert seen.underflow_rates[name] == counts.underflow_rate
        assert sorted(float(each) for each in seen.overflow_rates.values()) == [0.0, 0.0, 0.25]

    def test_a_change_of_format_leaves_it_where_it_lies_and_compiles_nothing(self, caplog):
        everywhere = NamedSharding(jax.make_mesh((1,), ("devices",)), PartitionSpec())
        graph, state = nnx.split(quantized())
        compute = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
        state, x = jax.device_put((state, jnp.full((2, 4), 1.1)), everywhere)
        first = compute(state, x)
        model = nnx.merge(graph, state)
        set_formats(model, {".*": "E5M2"})
        assert not np.array_equal(compute(nnx.state(model), x), first)
        assert compute._cache_size() == 1
        with jax.log_compiles():
            set_formats(model, {".*": "E4M3"})
        assert not [each for each in caplog.messages if "ompil" in each]


def test_counts_are_told_without_promoting_ranks():
    counted = {}
    for mode in ("allow", "raise"):
        with jax.numpy_rank_promotion(mode):
            model = quantized()
            with recording(model) as seen:
                nnx.grad(loss_of)(model, jnp.ones((2, 4)))
            counted[mode] = {name: counts.as_integers() for name, counts in seen.counts.items()}
    assert counted["raise"] == counted["allow"]
    assert {counts["elements"] for counts in counted["raise"].values()} == {8, 16}


@pytest.mark.parametrize("spec", [PartitionSpec(None, "b"), PartitionSpec("a", "b")], ids=str)
def test_a_small_operand_keeps_its_place_on_explicit_axes(spec):
    """Elsewhere it is cast flat, which would lose the axes, or fail, though it is of one device."""
    mesh = jax.make_mesh((1, 1), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    state = next(iter(named_states(nnx.state(quantized())).values()))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.linspace(0.1, 2.0, 24).reshape(4, 6), NamedSharding(mesh, spec))
        cast = jax.jit(cast_operand)(x, state)
    assert cast.sharding.spec == spec
    np.testing.assert_array_equal(cast, cast_operand(jnp.linspace(0.1, 2.0, 24).reshape(4, 6), state))
