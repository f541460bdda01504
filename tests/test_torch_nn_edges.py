"""What a user may do with a quantised torch model that would give wrong numbers if nothing watched."""

import copy
import gc
import pickle
import threading
import weakref
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402 (after the skip)
from torch.utils.checkpoint import checkpoint  # noqa: E402

from altgrad_core.errors import InputError  # noqa: E402
from altgrad_core.formats import UnknownFormatError  # noqa: E402
from altgrad_torch import Static, set_format  # noqa: E402
from altgrad_torch.nn import (  # noqa: E402
    Each,
    Rule,
    calibrate,
    dequantize_model,
    quantize_model,
    recording,
    set_formats,
    summary,
)

TOO_LATE = "after its recording is over"


def quantized(seed=0, gradients="E5M2", **options):
    torch.manual_seed(seed)
    return quantize_model(nn.Linear(4, 4), [Rule(".*", "E4M3", gradients=gradients, **options)])


def elements(counts):
    return counts.as_integers()["elements"]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


class TestWhereARecordingBelongs:
    def test_a_backward_pass_after_it_is_refused(self):
        model = quantized()
        with recording(model):
            loss = model(torch.ones(2, 4)).sum()
        with pytest.raises(InputError, match=TOO_LATE):
            loss.backward()
        assert model.weight.grad is None

    def test_a_backward_pass_in_a_recording_of_another_model_is_refused(self):
        model, other = quantized(0), quantized(1)
        with recording(model):
            loss = model(torch.ones(2, 4)).sum()
        with recording(other), pytest.raises(InputError, match=TOO_LATE):
            loss.backward()

    def test_what_needs_no_record_of_its_gradients_may_come_after_it(self):
        model, twin = quantized(gradients=None), quantized(gradients=None)
        with recording(model):
            loss = model(torch.ones(2, 4)).sum()
        loss.backward()
        twin(torch.ones(2, 4)).sum().backward()
        assert torch.equal(model.weight.grad, twin.weight.grad)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize("gradients", ["E5M2", None])
    def test_a_checkpoint_does_not_repeat_a_pass_under_other_scales(self, use_reentrant, gradients):
        model = quantized(gradients=gradients, rounding="stochastic")
        with recording(model):
            loss = checkpoint(model, torch.ones(2, 4, requires_grad=True), use_reentrant=use_reentrant).sum()
        with pytest.raises(InputError, match=TOO_LATE):
            loss.backward()
        assert model.weight.grad is None

    def test_a_checkpoint_without_any_recording_is_as_before(self):
        model = quantized(rounding="stochastic")
        twin = copy.deepcopy(model)
        with recording(model):
            model(torch.ones(2, 4)).sum().backward()
        model.zero_grad()
        twin.load_state_dict(model.state_dict())
        x = torch.ones(2, 4, requires_grad=True)
        checkpoint(model, x, use_reentrant=False).sum().backward()
        twin(x).sum().backward()
        assert torch.equal(model.weight.grad, twin.weight.grad)

    @pytest.mark.parametrize("where", ["around", "inside"])
    def test_transforms_are_refused(self, where):
        model = quantized()
        parameters = {name: each.detach() for name, each in model.named_parameters()}

        def loss(parameters):
            return torch.func.functional_call(model, parameters, (torch.ones(2, 4),)).sum()

        def recorded(function, parameters):
            with recording(model):
                return function(parameters)

        gradient_of = {
            "around": partial(recorded, torch.func.grad(loss)),
            "inside": torch.func.grad(partial(recorded, loss)),
        }
        before = state(model)
        with pytest.raises(InputError, match=r"under a transform of torch\.func"):
            gradient_of[where](parameters)
        with pytest.raises(InputError, match=r"under a transform of torch\.func"), recording(model):
            torch.vmap(model)(torch.ones(3, 2, 4))
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        torch.func.grad(loss)(parameters)

    def test_autograd_grad_and_gradients_of_gradients_count(self):
        model, x = quantized(), torch.randn(2, 4, requires_grad=True)
        with recording(model) as seen:
            (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
            gradient.square().sum().backward()
        assert elements(seen.gradients) > 8
        assert model.weight.grad is not None

    def test_a_model_that_is_recorded_stays_quantised(self):
        model = quantized()
        with recording(model) as seen:
            with pytest.raises(InputError, match="being recorded; expected dequantize_model after"):
                dequantize_model(model)
            model(torch.ones(2, 4)).sum().backward()
        assert (elements(seen.activations), elements(seen.gradients)) == (8, 8)
        assert type(dequantize_model(model)) is nn.Linear

    def test_a_model_with_quantized_parts_is_not_quantised_as_a_whole(self):
        with pytest.raises(InputError, match="quantised already"):
            quantize_model(nn.Sequential(quantized(), nn.Linear(4, 4)), [Rule(".*", "E4M3")])


class TestWhatARecordingKeeps:
    def test_models_that_were_quantized_apart_share_one(self):
        models = nn.ModuleList([quantized(0), quantized(1)])
        with recording(models) as seen:
            for batch, model in enumerate(models, 1):
                model(torch.ones(batch, 4)).sum().backward()
        assert [elements(seen.counts(layer, "activations")) for layer in ("0", "1")] == [4, 8]
        assert elements(seen.gradients) == 12

    def test_other_models_have_records_of_their_own(self):
        model, teacher = quantized(0), quantized(1)
        before = state(teacher)
        with recording(model) as seen:
            teacher(torch.ones(5, 4))
            assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
            with recording(teacher) as of_teacher:
                teacher(torch.ones(3, 4))
            model(torch.ones(2, 4))
        assert (elements(seen.activations), elements(of_teacher.activations)) == (8, 12)

    def test_a_refused_recording_within_leaves_the_outer_one(self):
        model = quantized()
        with recording(model) as seen:
            with pytest.raises(InputError, match="recorded already"), recording(model):
                pass
            with pytest.raises(InputError, match="recorded already"):
                calibrate(model, lambda: None)
            model(torch.ones(2, 4)).sum().backward()
        assert elements(seen.gradients) == 8
        assert float(model.casts["gradients"].history[-1]) == 1.0

    def test_each_thread_has_a_record_of_its_own(self):
        both, models = threading.Barrier(2), [quantized(seed) for seed in range(2)]
        counted = {}

        def run(which):
            with recording(models[which]) as seen:
                both.wait(60)
                models[which](torch.ones(which + 1, 4)).sum().backward()
                both.wait(60)
            counted[which] = elements(seen.activations), elements(seen.gradients)

        threads = [threading.Thread(target=run, args=(which,)) for which in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert counted == {0: (4, 4), 1: (8, 8)}

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies_made_meanwhile_are_not_recorded(self, copied):
        model = quantized()
        with recording(model) as seen:
            model(torch.ones(2, 4))
            twin = copied(model)
            twin(torch.ones(3, 4)).sum().backward()
        assert elements(seen.activations) == 8
        with recording(twin) as of_twin:
            twin(torch.ones(1, 4)).sum().backward()
        assert elements(of_twin.activations) == 4

    def test_an_exception_leaves_nothing_for_the_next_one(self):
        model = quantized()
        with pytest.raises(ZeroDivisionError), recording(model):
            model(torch.ones(2, 4)) / (1 // 0)
        with recording(model) as seen:
            pass
        assert elements(seen.activations) == 0

    def test_counts_beyond_int32_are_right(self):
        model = quantized(scaling=Static(1.0))
        with recording(model) as seen:
            seen.sites["", "activations"].tally.totals.add_(2**31 - 1)
            model(torch.ones(2, 4))
        assert elements(seen.activations) == 2**31 + 7

    def test_the_model_and_its_graphs_do_not_keep_it(self):
        model = quantized()
        with recording(model) as seen:
            loss = model(torch.ones(2, 4)).sum()
            loss.backward(retain_graph=True)
        kept = weakref.ref(seen)
        del seen
        gc.collect()
        assert kept() is None


def test_a_step_in_inference_mode_leaves_states_that_train():
    model = quantized()
    with torch.inference_mode(), recording(model) as seen:
        model(torch.ones(2, 4))
    assert elements(seen.activations) == 8
    with recording(model) as seen:
        model(torch.ones(2, 4)).sum().backward()
    assert elements(seen.gradients) == 8


def test_layers_that_are_called_like_operands_are_told_apart():
    layers = {name: nn.Linear(4, width) for name, width in (("activations", 2), ("weights", 3), ("product", 5))}
    rule = Rule(".*", "E4M3", gradients=None, scaling=Static(1.0))
    model = quantize_model(nn.ModuleDict(layers), [rule])
    with recording(model) as seen:
        for layer in model.values():
            layer(torch.ones(2, 4))
    assert [elements(seen.counts(name, "weights")) for name in layers] == [8, 12, 20]


@pytest.mark.parametrize("rules", [Rule(".*", "E4M3"), None, iter([Rule(".*", "E4M3")])])
def test_rules_are_a_list(rules):
    with pytest.raises(InputError, match="expected a list"):
        quantize_model(nn.Linear(2, 2), rules)


@pytest.mark.parametrize("format", [None, 3])
def test_what_is_no_format_is_not_set(format):
    with pytest.raises(UnknownFormatError, match="a format is named by a string or is a Format; got"):
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
    with pytest.raises(InputError, match=message.removeprefix("the layer '': ")):
        set_format([quantized()], format)


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        (3, "seed=3 would have no effect: no rule says rounding='stochastic'"),
        (0, "seed=0 would have no effect"),
        (-1, "seed is -1; expected an integer from 0 to"),
        (2**40, "seed is 1099511627776; expected an integer from 0 to"),
        ("a", "seed is 'a'; expected an integer from 0 to"),
    ],
)
def test_seeds_that_are_none_or_have_no_effect_are_refused(seed, message):
    layer = nn.Linear(2, 2)
    with pytest.raises(InputError, match=message):
        quantize_model(layer, [Rule(".*", "E4M3")], seed=seed)
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("seed", [0, np.uint32(0)])
def test_no_seed_is_seed_zero(seed):
    rules = [Rule(".*", "E4M3", rounding="stochastic")]
    models = [quantize_model(nn.Linear(4, 4), rules, seed=each) for each in (None, seed)]
    seeds = [[site.placement.seed for site in model.casts.values()] for model in models]
    assert seeds[0] == seeds[1]


def test_a_format_that_takes_other_code_is_refused_with_the_layer_and_the_remedy():
    model = nn.Sequential(quantized())
    with pytest.raises(InputError, match=r"the activations of '0': a cast to E4M3 .* to bf16, .* quantize_model by"):
        set_formats(model, {".*": "bf16"})


@pytest.mark.parametrize(
    "act",
    [lambda f: quantize_model(f, [Rule(".*", "E4M3")]), dequantize_model, lambda f: set_formats(f, {}), summary],
)
def test_what_is_no_module_is_refused(act):
    with pytest.raises(InputError, match=r"the model is a function; expected an nn\.Module"):
        act(lambda x: x)
