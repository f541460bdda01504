"""Whole torch models quantised by rules: in place and back, recorded, saved, copied, compiled, checkpointed."""

import copy
import gc
import io
import pickle
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import altgrad_torch.nn.sites  # noqa: E402
from altgrad_core.errors import InputError  # noqa: E402
from altgrad_core.formats import UnknownFormatError  # noqa: E402
from altgrad_core.scaling import PerBlock  # noqa: E402
from altgrad_torch import Current, Delayed, FormatController, Static, power_of_two_scale, set_format  # noqa: E402
from altgrad_torch.nn import (  # noqa: E402
    Each,
    Rule,
    UnusedRuleWarning,
    calibrate,
    dequantize_model,
    quantize_model,
    recording,
    set_formats,
    summary,
)

ALL = [Rule(".*", "E4M3", gradients="E5M2")]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.mlp = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))

    def forward(self, x):
        return x + self.mlp(self.norm(x + self.attn(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


TOKENS = torch.arange(20).reshape(4, 5) % 10


def backward(model, tokens=TOKENS):
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), (tokens.flatten() * 3) % 10).backward()


def formats(model):
    return {row.path: row.formats for row in summary(model).rows}


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_first_matching_rules_decide_and_the_model_goes_back(model):
    plain, out = state(model), model(TOKENS)
    before, children = list(model.named_parameters()), [id(each) for each in model.modules()]
    kinds = [type(each) for each in model.modules()]
    hooked = []
    model.head.register_forward_hook(lambda module, inputs, out: hooked.append(type(module).__name__))
    rules = [
        Rule("head|embed", None),
        Rule("blocks/0/mlp/.*", "E3M4", scaling=Static(0.5)),
        Rule(r"blocks\.0\..*", "E5M2", activations=None),
        Rule(".*", "E4M3", gradients="E5M2", scaling=Delayed(4)),
    ]
    assert quantize_model(model, rules) is model
    assert formats(model) == {
        "embed": (None, None, None),
        "blocks.0.attn": (None, "E5M2", None),
        "blocks.0.mlp.0": ("E3M4", "E3M4", "E3M4"),
        "blocks.0.mlp.2": ("E3M4", "E3M4", "E3M4"),
        "blocks.1.attn": ("E4M3", "E4M3", "E5M2"),
        "blocks.1.mlp.0": ("E4M3", "E4M3", "E5M2"),
        "blocks.1.mlp.2": ("E4M3", "E4M3", "E5M2"),
        "head": (None, None, None),
    }
    rows = {row.path: row for row in summary(model).rows}
    assert (rows["blocks.1.attn"].scaling, rows["blocks.0.mlp.0"].scaling) == ("delayed 4", "static")
    assert (rows["blocks.1.attn"].parameters, rows["blocks.1.attn"].rule) == (42, ".*")
    assert "blocks.1.mlp.0" in str(summary(model))
    assert [(name, id(p)) for name, p in model.named_parameters()] == [(name, id(p)) for name, p in before]
    assert isinstance(model.blocks[0].attn, nn.Linear)
    assert not torch.equal(model(TOKENS), out)
    assert hooked == ["Linear"]
    assert dequantize_model(model) is model
    assert torch.equal(model(TOKENS), out)
    assert same(state(model), plain)
    assert [id(each) for each in model.modules()] == children
    assert [type(each) for each in model.modules()] == kinds
    assert all(set(vars(a)) == set(vars(b)) for a, b in zip(model.modules(), Model().modules(), strict=True))


def test_rules_that_decide_about_nothing_are_reported(model):
    rules = [Rule("blocks.*norm", "E4M3"), Rule("atn", "E4M3"), *ALL, Rule("head", None)]
    with pytest.warns(UnusedRuleWarning) as seen:
        quantize_model(model, rules)
    assert [str(each.message).split(",")[0] for each in seen] == [
        "the rule 'blocks.*norm' matches blocks.0.norm",
        "the rule 'atn' matches no layer; the layers are embed",
        "the rule 'head' matches only layers that earlier rules decide about: head",
    ]
    assert {each.filename for each in seen} == {__file__}


def test_what_is_quantised_is_not_quantised_again(model):
    quantize_model(model, ALL)
    with pytest.raises(InputError, match="quantised already; expected a plain one"):
        quantize_model(model, ALL)


def test_a_layer_in_several_places_is_one_layer():
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    with pytest.raises(InputError, match="0 and 2 are one layer, but by the rules they would compute differently"):
        quantize_model(model, [Rule("0", "E4M3"), Rule("2", None)])
    assert type(shared) is nn.Linear
    quantize_model(model, ALL)
    with recording(model) as seen:
        model(torch.ones(2, 3)).sum().backward()
    assert seen.layers == ["0"]
    assert seen.activations.as_integers()["elements"] == 12
    assert torch.equal(dequantize_model(model)(torch.ones(2, 3)), shared(shared(torch.ones(2, 3)).relu()))


def test_a_subclass_with_products_of_its_own_is_refused_unless_left_alone():
    class Masked(nn.Linear):
        def forward(self, x):
            return x @ self.weight.tril().T

    model = nn.Sequential(Masked(3, 3), nn.Linear(3, 3))
    with pytest.raises(InputError, match=r"'0', a Masked, cannot be cast.*Rule\('0', None\)"):
        quantize_model(model, ALL)
    quantize_model(model, [Rule("0", None), *ALL])
    assert type(model[0]) is Masked


# --- recording -------------------------------------------------------------------------------------------------------


def test_weights_start_at_their_scales_and_the_others_at_one(model):
    quantize_model(model, ALL)
    casts = model.blocks[0].attn.casts
    expected = power_of_two_scale(model.blocks[0].attn.weight.detach().abs().amax(), 448.0)
    assert [float(casts[name].scale) for name in ("activations", "weights", "gradients")] == [1.0, float(expected), 1.0]


def test_without_recording_nothing_changes(model):
    quantize_model(model, ALL)
    before = state(model)
    backward(model)
    model.eval()
    with torch.no_grad():
        model(TOKENS)
    assert same(state(model), before)


def test_scales_follow_at_the_end_of_a_recording_and_counts_can_be_read(model):
    quantize_model(model, ALL)
    with recording(model) as seen:
        backward(model)
        assert float(model.head.casts["activations"].scale) == 1.0
    assert seen.layers == list(formats(model))
    assert seen.counts("head", "activations").as_integers()["elements"] == 20 * 6
    assert seen.counts("embed", "activations").as_integers()["elements"] == 0
    pooled = [seen.counts(layer, "gradients").totals for layer in seen.layers]
    assert torch.equal(seen.gradients.totals, torch.stack(pooled).sum(0))
    assert float(seen.gradients.underflow_rate) > 0.0
    site = model.head.casts["gradients"]
    assert torch.equal(site.scale, power_of_two_scale(site.history[-1], 57344.0))
    assert float(site.scale) < 1e-5
    with pytest.raises(InputError, match="unknown layer 'haed'; did you mean 'head'"):
        seen.counts("haed", "weights")


def test_micro_batches_of_a_recording_add_up(model):
    quantize_model(model, ALL)
    twin = copy.deepcopy(model)
    with recording(model) as whole:
        backward(model)
    with recording(twin) as parts:
        for tokens in TOKENS.split(2):
            (nn.functional.cross_entropy(twin(tokens).flatten(0, 1), (tokens.flatten() * 3) % 10) / 2).backward()
    assert torch.equal(parts.activations.totals, whole.activations.totals)
    assert torch.equal(parts.gradients.totals[0], whole.gradients.totals[0])
    assert torch.equal(parts.weights.totals, 2 * whole.weights.totals)
    assert torch.equal(twin.head.casts["activations"].history, model.head.casts["activations"].history)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_counts_once(model, use_reentrant):
    quantize_model(model, [Rule(".*", "E4M3", gradients="E5M2", rounding="stochastic")])
    twin = copy.deepcopy(model)
    for parameter in twin.blocks[1].parameters():
        parameter.requires_grad_(False)
    model.blocks[1].requires_grad_(False)

    def checkpointed(tokens):
        x = twin.embed(tokens)
        for block in twin.blocks:
            x = checkpoint(block, x, use_reentrant=use_reentrant)
        return twin.head(x)

    with recording(model) as expected:
        backward(model)
    with recording(twin) as seen:
        backward(checkpointed)
    for layer in seen.layers:
        for operand in ("activations", "weights", "gradients"):
            assert torch.equal(seen.counts(layer, operand).totals, expected.counts(layer, operand).totals)
    assert same(state(twin), state(model))
    assert torch.equal(twin.embed.weight.grad, model.embed.weight.grad)


def test_layers_that_are_not_called_keep_their_histories(model):
    quantize_model(model, ALL)
    before = state(model.blocks[1])
    with recording(model):
        model.blocks[0](torch.randn(2, 6)).sum().backward()
    assert same(state(model.blocks[1]), before)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_poisoned_batch_leaves_histories(poison):
    layer = quantize_model(nn.Linear(3, 2), [Rule(".*", "E4M3", scaling=Delayed(1))])
    with recording(layer):
        layer(torch.full((2, 3), 3.0)).sum().backward()
    before = state(layer)
    with recording(layer) as seen:
        layer(torch.tensor([[1.0, poison, 2.0]])).sum().backward()
    assert float(seen.activations.nan_rate + seen.activations.overflow_rate) > 0
    assert same(state(layer), before)


def test_a_step_that_fails_or_is_discarded_leaves_histories(model):
    quantize_model(model, ALL)
    before = state(model)

    def failing():
        with recording(model):
            backward(model)
            raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        failing()
    with recording(model) as seen:
        backward(model)
        seen.discard()
    assert same(state(model), before)
    assert int(seen.activations.totals[0]) > 0
    with recording(model):  # the failed one is over
        pass


def test_recordings_of_nothing_and_within_each_other_are_refused(model):
    with pytest.raises(InputError, match="casts nothing; expected one that quantize_model changed"), recording(model):
        pass
    quantize_model(model, ALL)
    with recording(model), pytest.raises(InputError, match="recorded already"), recording(model.blocks[0]):
        pass
    with pytest.raises(InputError, match="passes=0; expected at least 1"):
        calibrate(model, lambda: None, passes=0)


def test_calibration_finds_scales_and_leaves_gradients(model):
    quantize_model(model, ALL)
    model.head.weight.grad = torch.ones(10, 6)
    calibrate(model, lambda: backward(model))
    assert torch.equal(model.head.weight.grad, torch.ones(10, 6))
    assert model.blocks[0].attn.weight.grad is None
    casts = model.blocks[1].mlp[2].casts
    assert [int((site.history > 0).sum()) for site in casts.values()] == [1, 1, 1]
    with recording(model) as seen:
        backward(model)
    assert int(seen.activations.totals[1] + seen.gradients.totals[1] + seen.weights.totals[1]) == 0


def test_processes_of_a_group_add_up(model, tmp_path):
    quantize_model(model, ALL)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        twin = copy.deepcopy(model)
        with recording(model, group=dist.group.WORLD) as seen:
            backward(model)
        with recording(twin) as alone:
            backward(twin)
        assert torch.equal(seen.gradients.totals, alone.gradients.totals)
        assert same(state(model), state(twin))
        assert layers_in_parallel(model)[0] == "module.embed"
    finally:
        gc.collect()
        dist.destroy_process_group()


def test_what_is_sharded_before_is_refused_and_what_is_sharded_after_computes(model, tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(InputError, match=r"the layer 'head', a FSDPLinear, .* expected quantize_model .* first"):
            quantize_model(sharded(copy.deepcopy(model)), ALL)
        quantize_model(model, ALL)
        after = sharded(copy.deepcopy(model))
        assert torch.equal(after(TOKENS), model(TOKENS))
        with pytest.raises(InputError, match=r"became a FSDP.*, since fully_shard is not undone"):
            dequantize_model(after)
    finally:
        gc.collect()
        dist.destroy_process_group()


def sharded(model):
    """By FSDP2, its head apart."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    fully_shard(model.head, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def layers_in_parallel(model):
    """In a frame of its own: a DDP that outlives its group takes that down with Python's lock held, and may hang."""
    parallel = nn.parallel.DistributedDataParallel(model)
    with recording(parallel) as seen:
        backward(parallel)
    return seen.layers


# --- formats as data -------------------------------------------------------------------------------------------------


def test_formats_of_layers_are_set_and_take_effect(model):
    quantize_model(model, ALL)
    calibrate(model, lambda: backward(model))
    twin = quantize_model(Model(), [Rule("blocks.0.*", "E5M2"), *ALL])
    set_formats(model, {"blocks/0/attn": Each(None, None, "E3M4"), "blocks.0.*": "E5M2"})
    assert formats(model)["blocks.0.mlp.0"] == ("E5M2", "E5M2", "E5M2")
    assert formats(model)["blocks.0.attn"] == ("E4M3", "E4M3", "E3M4")
    set_formats(model, {"blocks.0.attn": "E5M2"})
    site = model.blocks[0].attn.casts["activations"]
    assert torch.equal(site.scale, power_of_two_scale(site.history.amax(), 57344.0))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(TOKENS), model(TOKENS))
    assert formats(twin) == formats(model)


def test_formats_that_cannot_be_set_say_why_and_set_none(model):
    quantize_model(model, [Rule("head", "E4M3", gradients=None), *ALL])
    before = formats(model)
    for wanted, error, message in [
        ({"blocks.0": "E5M2"}, InputError, r"'blocks\.0' matches no layer that is cast .* the layers are embed, "),
        ({"head": Each(None, None, "E5M2")}, InputError, "'head' does not cast its gradients"),
        ({"embed": "E5M2", "head": "bf16"}, InputError, "bf16"),
        ({"embed": "E5M2", ".*": "E4M33"}, UnknownFormatError, "E4M33"),
    ]:
        with pytest.raises(error, match=message):
            set_formats(model, wanted)
    assert formats(model) == before


def test_a_controller_moves_one_layer(model):
    quantize_model(model, ALL)
    set_format([model.blocks[0]], "E3M4")
    assert formats(model)["blocks.0.attn"] == ("E3M4", "E3M4", "E3M4")
    assert formats(model)["blocks.1.attn"] == ("E4M3", "E4M3", "E5M2")
    assert FormatController is not None


# --- what else is done to modules ------------------------------------------------------------------------------------


def test_copies_pickles_and_saved_models_compute_the_same(model):
    quantize_model(model, ALL)
    calibrate(model, lambda: backward(model))
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
    ):
        assert torch.equal(twin(TOKENS), model(TOKENS))
        assert formats(twin) == formats(model)
        with recording(twin):
            backward(twin)
        assert not same(state(twin), state(model))
        assert type(dequantize_model(twin).head) is nn.Linear


def test_a_checkpoint_of_weights_and_casts_resumes(model):
    quantize_model(model, ALL)
    calibrate(model, lambda: backward(model))
    saved = state(model)
    twin = quantize_model(Model(), ALL)
    twin.load_state_dict(saved)
    assert torch.equal(twin(TOKENS), model(TOKENS))
    for each in (model, twin):
        with recording(each):
            backward(each)
    assert same(state(twin), state(model))


def test_a_plain_checkpoint_loads_and_the_scales_of_weights_follow(model):
    plain = {name: value * 1000 for name, value in state(model).items()}
    quantize_model(model, ALL)
    calibrate(model, lambda: backward(model))
    activations = model.head.casts["activations"].scale.clone()
    model.load_state_dict(plain)
    casts = model.head.casts
    assert torch.equal(casts["weights"].scale, power_of_two_scale(model.head.weight.detach().abs().amax(), 448.0))
    assert torch.equal(casts["activations"].scale, activations)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*casts\.activations\.grid"):
        Model().load_state_dict(model.state_dict())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"scaling": Static(0.5)}, {"rounding": "stochastic"}, {"scaling": Delayed(2), "granularity": "channel"}],
)
def test_what_was_quantised_on_meta_begins_where_it_becomes_real(model, options, assign):
    plain, rules = state(model), [Rule(".*", "E4M3", gradients="E5M2", **options)]
    quantize_model(model, rules)
    with torch.device("meta"):
        deferred = Model()
    quantize_model(deferred, rules)
    assert formats(deferred) == formats(model)
    assert "E4M3" in repr(deferred)
    set_formats(deferred, {"blocks.0.attn": "E3M4"})
    set_formats(model, {"blocks.0.attn": "E3M4"})
    if not assign:
        deferred.to_empty(device="cpu")
        assert formats(deferred) == formats(model)
    deferred.load_state_dict(plain, assign=assign)
    assert same(state(deferred), state(model))
    assert torch.equal(deferred(TOKENS), model(TOKENS))
    assert formats(model.to("meta")) == formats(deferred)


def test_a_checkpoint_of_other_casts_is_refused(model):
    quantize_model(model, ALL)
    some = quantize_model(Model(), [Rule(".*", "E4M3", gradients=None)])
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*casts\.gradients\.grid"):
        model.load_state_dict(some.state_dict())
    wide = quantize_model(Model(), [Rule(".*", "bf16")])
    with pytest.raises(RuntimeError, match=r"casts\.activations\.grid: .*cannot cast to bf16"):
        model.load_state_dict(wide.state_dict())


OTHER_WAYS = [
    ({"scaling": Delayed(16, power_of_two=False)}, "power_of_two=True; expected power_of_two=False"),
    ({"scaling": Delayed(16, "most_recent")}, "reduce='max'; expected reduce='most_recent'"),
    ({"scaling": Current()}, "scaling='delayed', reduce='max', window=16; expected scaling='current'"),
    ({"scaling": Static(2.0)}, "scaling='delayed', reduce='max', window=16; expected scaling='static'"),
    ({"granularity": "block2"}, "granularity='tensor'; expected scaling='current', granularity='block', size=2"),
    ({"rounding": "toward_zero"}, "rounding='nearest_even'; expected rounding='toward_zero'"),
    ({"overflow": "native"}, "overflow='saturate_finite'; expected overflow='native'"),
]


@pytest.mark.parametrize(("change", "message"), OTHER_WAYS)
def test_a_checkpoint_of_casts_that_scale_in_another_way_is_refused(change, message):
    rule = Rule(".*", "E4M3", activations=None)
    stored = quantize_model(nn.Linear(4, 4), [rule]).state_dict()
    other = quantize_model(nn.Linear(4, 4), [replace(rule, **change)])
    casts = {name: each.clone() for name, each in other.state_dict().items() if "casts" in name}
    with pytest.raises(RuntimeError, match=r"casts\.weights\._extra_state: the checkpoint is of ") as raised:
        other.load_state_dict(stored, strict=False)
    assert all(part in str(raised.value) for part in message.split("; "))
    assert all(torch.equal(each, casts[name]) for name, each in other.state_dict().items() if "casts" in name)


def test_checkpoints_name_what_numpy_gave_and_axes_from_either_end():
    weights, others = np.int64(8), np.bool_(True)
    rules = [
        [Rule(".*", "E4M3", None, scaling=Delayed(weights, power_of_two=others))],
        [Rule(".*", "E4M3", None, scaling=Delayed(8))],
        [Rule(".*", "E4M3", None, granularity=PerBlock(2, 1))],
        [Rule(".*", "E4M3", None, granularity="block2")],
    ]
    states = [quantize_model(nn.Linear(4, 4), each).state_dict() for each in rules]
    quantize_model(nn.Linear(4, 4), rules[1]).load_state_dict(states[0])
    quantize_model(nn.Linear(4, 4), rules[2]).load_state_dict(states[3])
    model = quantize_model(nn.Linear(4, 4), rules[1])
    with torch.device("meta"):
        states.append(model.state_dict())
    model.load_state_dict(states[-1])
    lengths = {len(each) for state in states for name, each in state.items() if name.endswith("_extra_state")}
    assert len(lengths) == 1  # distributed.checkpoint reads into what is there, and stops at another length


def test_static_scales_are_data_of_a_checkpoint():
    stored = quantize_model(nn.Linear(4, 4), [Rule(".*", "E4M3", scaling=Static(0.25))]).state_dict()
    model = quantize_model(nn.Linear(4, 4), [Rule(".*", "E4M3", scaling=Static(0.5))])
    model.load_state_dict(stored)
    set_formats(model, {".*": "E5M2"})
    assert float(model.casts["weights"].scale) == 0.25


def test_functional_calls_and_averages(model):
    quantize_model(model, ALL)
    calibrate(model, lambda: backward(model))
    doubled = {name: 2 * value for name, value in model.named_parameters()}
    out = torch.func.functional_call(model, doubled, (TOKENS,))
    average = torch.optim.swa_utils.AveragedModel(model)
    set_formats(model, {"head": "E5M2"})
    average.update_parameters(model)
    assert torch.equal(average(TOKENS), model(TOKENS))
    assert formats(average.module) == formats(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(doubled[name])
    set_formats(model, {"head": Each("E4M3", "E4M3", "E5M2")})
    assert torch.equal(model(TOKENS), out)


def averaged_with_buffers(model, **how):
    """An average that was updated in several steps, its buffers averaged as well, in which scales moved."""
    quantize_model(model, ALL)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True, **how)
    for step in range(3):
        with recording(model):
            (model.embed(TOKENS).sum() + model.blocks[0](torch.full((2, 6), 10.0**step)).sum()).backward()
        average.update_parameters(model)
    return average


EMA = {
    "lists": {"multi_avg_fn": torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)},
    "one by one": {"avg_fn": torch.optim.swa_utils.get_ema_avg_fn(0.9)},
}


@pytest.mark.parametrize("how", EMA)
def test_averages_of_the_numbers_of_formats_are_refused(model, how):
    average = averaged_with_buffers(model, **EMA[how])
    with pytest.raises(InputError, match=r"are those of none, .* expected use_buffers=False"):
        average(TOKENS)
    with pytest.raises(InputError, match="use_buffers"):
        summary(average.module)
    with pytest.raises(RuntimeError, match=r"casts\.activations\.grid: .*use_buffers"):
        quantize_model(Model(), ALL).load_state_dict(average.module.state_dict())
    assert formats(model)["head"] == ("E4M3", "E4M3", "E5M2")
    set_formats(average.module, {"embed": Each(None, "E4M3", "E5M2"), ".*": Each("E4M3", "E4M3", "E5M2")})
    assert torch.isfinite(average(TOKENS)).all()


@pytest.mark.parametrize("scaling", [None, Current()])
def test_averages_of_different_formats_are_refused_wherever_scales_come_from(scaling):
    layer = quantize_model(nn.Linear(4, 2), [Rule(".*", "E4M3", scaling=scaling)])
    average = torch.optim.swa_utils.AveragedModel(layer, use_buffers=True)
    average.update_parameters(layer)
    x = torch.randn(3, 4)
    assert torch.equal(average(x), layer(x))  # known to be right, until it is averaged again
    set_formats(layer, {".*": "E5M2"})
    average.update_parameters(layer)
    with pytest.raises(InputError, match="use_buffers"):
        average(x)
    with pytest.raises(InputError, match="use_buffers"):
        copy.deepcopy(average)(x)


def test_averages_of_scales_are_refused_where_they_are_powers_of_two(model):
    average = averaged_with_buffers(model)
    assert formats(average.module) == formats(model)
    with pytest.raises(InputError, match=r"scale that is no power of two, .* expected use_buffers=False"):
        average.module.blocks[0](torch.ones(2, 6))
    ratios = Delayed(2, power_of_two=False)
    layer = quantize_model(nn.Linear(4, 2), [Rule(".*", "E4M3", scaling=ratios)])
    average = torch.optim.swa_utils.AveragedModel(layer, use_buffers=True)
    for step in range(3):
        with recording(layer):
            layer(torch.full((3, 4), 10.0**step)).sum().backward()
        average.update_parameters(layer)
    average(torch.ones(3, 4))


def test_a_state_is_looked_at_once_for_each_time_that_it_is_written_to(monkeypatch):
    layer = quantize_model(nn.Linear(4, 2), [Rule(".*", "E4M3", scaling=Delayed(2, power_of_two=False))])
    looked, format_of = [], altgrad_torch.nn.sites.format_of
    monkeypatch.setattr(altgrad_torch.nn.sites, "format_of", lambda grid: looked.append(grid) or format_of(grid))
    counts = []
    for write in (
        None,
        None,
        lambda: layer.load_state_dict(state(layer)),
        None,
        lambda: set_formats(layer, {".*": "E5M2"}),
    ):
        if write is not None:
            write()
        looked.clear()
        layer(torch.ones(3, 4))
        counts.append(len(looked))
    assert counts == [2, 0, 2, 0, 2]  # activations and weights


def test_gradients_for_each_example_under_vmap(model):
    layer = quantize_model(nn.Linear(3, 2), ALL)
    parameters = {name: each.detach() for name, each in layer.named_parameters()}
    xs = torch.randn(4, 3)

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, xs)
    for k, x in enumerate(xs):
        layer.zero_grad()
        layer(x).square().sum().backward()
        torch.testing.assert_close(found["weight"][k], layer.weight.grad)


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU takes a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch.compile warns of what it imports
def test_compiled_layers_count_and_change_formats_without_compiling_again():
    torch.manual_seed(1)
    rule = Rule(".*", "E4M3", gradients="E5M2", granularity=Each("channel", "tensor", "tensor"))
    model = quantize_model(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), [rule])
    twin, programs = copy.deepcopy(model), []

    def backend(graph, inputs):
        programs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    x = torch.randn(5, 8)
    for run in ("first", "second", "in another format"):
        if run == "in another format":
            compiled_before = len(programs)
            set_formats(model, {".*": "E3M4"})
            set_formats(twin, {".*": "E3M4"})
        records = []
        for each, module in ((compiled, model), (twin, twin)):
            module.zero_grad()
            with recording(module) as seen:
                each(x).square().sum().backward()
            records.append(seen)
        for name in ("activations", "weights", "gradients"):
            assert torch.equal(getattr(records[0], name).totals, getattr(records[1], name).totals)
        assert same(state(model), state(twin))
        assert all(map(torch.equal, [p.grad for p in model.parameters()], [p.grad for p in twin.parameters()]))
    assert len(programs) == compiled_before
    torch._dynamo.reset()


def test_training_goes_on_with_the_optimizer_that_was_there(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    quantize_model(model, [Rule(".*", "E4M3", gradients="E5M2", scaling=Each(Delayed(4), Current(), Delayed(4)))])
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with recording(model):
            loss = nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), (TOKENS.flatten() * 3) % 10)
            loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 4


def test_no_warning_where_every_rule_decides(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_model(model, [Rule("head", None), *ALL])
