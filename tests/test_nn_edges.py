"""What a user may do with a quantized NNX model that would give wrong numbers if nothing watched."""

import gc
import threading
import weakref

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from altgrad_core.errors import InputError
from altgrad_jax import Static
from altgrad_jax.nn import Rule, quantize_model, recording, set_formats
from altgrad_jax.nn.record import Record, Sight
from altgrad_jax.statistics import CastCounts


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
        with pytest.raises(InputError, match="6 casts would write into 3 rows"), recording(models):
            pass


class TestWhatARecordingKeeps:
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

    def test_counts_beyond_int32_are_right(self):
        largest = [2**30, 2**30 - 1, 2**30, 1, 0]
        record = Record(jax.new_ref(jnp.zeros((2, 11), jnp.int32)), {}, ())
        for _ in range(5):
            record.write(jnp.int32(1), Sight(jnp.array([*largest, 7], jnp.int32), None))
        seen = record.seen[...]
        assert not seen[0].any()
        counts = CastCounts(jnp.stack([seen[1, :5], seen[1, 5:10]], axis=-1)).as_integers()
        assert list(counts.values()) == [5 * each for each in largest]
        assert int(seen[1, -1]) == 7

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
