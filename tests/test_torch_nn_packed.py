"""Quantised torch models in packed storage: what is loaded computes the same, every bit."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from altgrad_core.errors import InputError  # noqa: E402
from altgrad_core.formats import EIGHT  # noqa: E402
from altgrad_core.scaling import PerChannel  # noqa: E402
from altgrad_torch import (  # noqa: E402
    Current,
    Delayed,
    PackedTensor,
    Static,
    load_packed,
    quantize,
    save_packed,
    unpack_tensor,
)
from altgrad_torch.nn import (  # noqa: E402
    Each,
    Rule,
    calibrate,
    dequantize_model,
    pack,
    quantize_model,
    recording,
    set_formats,
    unpack,
)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.attn = nn.Embedding(10, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv, self.norm = nn.ConvTranspose1d(8, 4, 3, padding=1), nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = self.attn(x, x, x)[0].mT
        return self.head(self.norm(self.conv(x)).mT)


TOKENS = torch.arange(12).reshape(2, 6) % 10


def trained(rules, seed=0):
    """A model whose scales, running means and weights are no longer those that it began with."""
    torch.manual_seed(seed)
    model = quantize_model(Model(), rules)
    for _ in range(2):
        with recording(model):
            model(TOKENS).square().sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.7)
    return model.eval()


def without_casts(tensors):
    return {name: tensor for name, tensor in tensors.items() if "casts." not in name}


class TestPack:
    @pytest.mark.parametrize("granularity", ["tensor", "channel", "block4"])
    def test_weights_are_what_their_layers_compute_with(self, granularity):
        granularity = granularity if granularity != "channel" else Each("tensor", "channel", "tensor")
        model = trained([Rule("embed", "E5M6"), Rule("attn", "E3M4"), Rule(".*", "E2M5", granularity=granularity)])
        packed = pack(model)
        assert packed.keys() == model.state_dict().keys()
        weights = {"embed.weight", "attn.in_proj_weight", "attn.out_proj.weight", "conv.weight", "head.weight"}
        assert {name for name, tensor in packed.items() if isinstance(tensor, PackedTensor)} == weights
        for name in weights:
            layer = model.get_submodule(name.rpartition(".")[0])
            weight = model.get_parameter(name)
            assert torch.equal(unpack_tensor(packed[name]), layer.casts["weights"].cast(weight).detach())
        assert str(packed["embed.weight"].layout.format) == "E5M6"
        assert packed["norm.running_mean"] is not None
        assert packed["head.bias"].untyped_storage().data_ptr() == model.head.bias.untyped_storage().data_ptr()

    def test_three_projections_share_the_scale_of_their_site(self):
        attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
        with torch.no_grad():
            attention.v_proj_weight.mul_(64.0)
        packed = pack(quantize_model(attention, [Rule(".*", "E4M3")]))
        scales = {float(packed[f"{name}_proj_weight"].scales) for name in "qkv"}
        assert scales == {float(attention.casts["weights"].scale)}
        own = pack(quantize_model(dequantize_model(attention), [Rule(".*", "E4M3", scaling=Current())]))
        assert float(own["q_proj_weight"].scales) < float(own["v_proj_weight"].scales)

    def test_nothing_is_recorded(self):
        model = quantize_model(nn.Linear(8, 4), [Rule(".*", "E4M3")])
        with recording(model) as seen:
            pack(model)
        assert seen.weights.as_integers()["elements"] == 0

    def test_a_shared_parameter_is_packed_only_where_all_cast_it_alike(self):
        def tied(rules):
            model = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 10))
            model[1].weight = model[0].weight
            return pack(quantize_model(model, rules))

        alike = tied([Rule(".*", "E4M3")])
        assert alike["0.weight"] is alike["1.weight"]
        assert isinstance(alike["0.weight"], PackedTensor)
        for rules in ([Rule("0", "E4M3"), Rule("1", "E5M2")], [Rule("0", "E4M3"), Rule("1", None)]):
            assert not isinstance(tied(rules)["0.weight"], PackedTensor)

    def test_what_has_no_code_is_refused_by_name(self):
        model = quantize_model(nn.Sequential(nn.Linear(8, 4)), [Rule(".*", "E4M3")])
        with torch.no_grad():
            model[0].weight[0, 0] = torch.inf
        with pytest.raises(InputError, match=r"0\.weight: 1 of 32 elements are infinite, for which E4M3 has no code"):
            pack(model)


class TestUnpack:
    @pytest.mark.parametrize("power_of_two", [True, False])
    def test_a_model_computes_the_same_from_a_file(self, power_of_two, tmp_path):
        rules = [Rule(".*", "E4M3", gradients="E5M2", scaling=Delayed(3, power_of_two=power_of_two))]
        model = trained(rules)
        save_packed(tmp_path / "model", pack(model))
        fresh = quantize_model(Model(), rules)
        parameters = list(fresh.parameters())
        loaded = unpack(fresh, load_packed(tmp_path / "model").tensors)
        assert loaded is fresh
        assert all(one is other for one, other in zip(loaded.parameters(), parameters, strict=True))
        assert torch.equal(loaded.eval()(TOKENS), model(TOKENS))

    @pytest.mark.parametrize("rounding", ["nearest_even", "toward_zero", "stochastic"])
    def test_however_weights_are_rounded(self, rounding):
        model = trained([Rule(".*", "E3M4", rounding=rounding)])
        fresh = quantize_model(Model(), [Rule(".*", "E3M4", rounding=rounding)])
        assert torch.equal(unpack(fresh, pack(model)).eval()(TOKENS), model(TOKENS))

    @pytest.mark.parametrize("name", EIGHT)
    def test_weights_alone_bring_their_scales(self, name):
        """Though the largest is rounded, down to a power of two as well, and was another when scales were found."""
        for factor in (0.3, 1.0, 2.7):
            for top in (1.0, 1.01, 1.99):
                model = quantize_model(nn.Linear(16, 8, bias=False), [Rule(".*", name, activations=None)])
                with torch.no_grad():
                    model.weight[0, 0] = top
                    model.refill_weight_history()
                    model.weight.mul_(factor)
                fresh = quantize_model(nn.Linear(16, 8, bias=False), [Rule(".*", name, activations=None)])
                unpack(fresh, without_casts(pack(model)))
                assert torch.equal(fresh(torch.eye(16)), model(torch.eye(16)))

    @pytest.mark.parametrize("scaling", [Static(0.25), Current(), Current(power_of_two=False)])
    def test_without_histories_the_state_of_casts_is_not_needed(self, scaling):
        rules = [Rule(".*", "E2M5", scaling=scaling)]
        model = trained(rules)
        loaded = unpack(quantize_model(Model(), rules), without_casts(pack(model)))
        assert torch.equal(loaded.eval()(TOKENS), model(TOKENS))

    def test_activations_have_to_be_calibrated_without_it(self):
        rules = [Rule(".*", "E4M3")]
        loaded = unpack(quantize_model(Model(), rules), without_casts(pack(trained(rules))))
        assert float(loaded.head.casts["activations"].history.amax()) == 0.0
        calibrate(loaded, lambda: loaded(TOKENS))
        assert float(loaded.head.casts["activations"].history.amax()) > 0.0

    def test_a_plain_model_takes_the_values(self):
        model = trained([Rule(".*", "E4M3")])
        scale = model.head.casts["weights"].scale
        plain = unpack(Model(), pack(model))
        assert torch.equal(plain.head.weight, quantize(model.head.weight, "E4M3", scale=scale, overflow="saturate"))
        assert torch.equal(plain.norm.running_mean, model.norm.running_mean)

    def test_what_does_not_fit_is_refused_and_nothing_is_written(self):
        def fresh(**options):
            return quantize_model(nn.Sequential(nn.Linear(8, 4)), [Rule(".*", "E3M4", **options)])

        tensors, model = pack(fresh()), fresh()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

        def refused(tensors, message, model=model):
            with pytest.raises(InputError, match=message):
                unpack(model, tensors)

        refused({**tensors, "more": torch.ones(1)}, "the model has no more; expected the same names")
        refused({name: x for name, x in tensors.items() if name != "0.bias"}, r"the tensors lack 0\.bias")
        refused({**tensors, "0.bias": torch.ones(5)}, r"0\.bias has shape \(5,\) in float32; expected \(4,\)")
        refused({**tensors, "0.bias": torch.ones(4, dtype=torch.float64)}, r"in float64; expected \(4,\) in float32")
        refused(tensors, r"_extra_state: the checkpoint is of window=16; expected window=4", fresh(scaling=Delayed(4)))
        refused({**tensors, "0.casts.weights.history": torch.ones(4)}, r"weights\.history has shape \(4,\) in float32")
        refused(tensors, "expected rounding='stochastic', as the model", fresh(rounding="stochastic"))
        set_formats(model, {".*": Each(None, "E4M3", None)})
        refused(tensors, r"0\.weight: it is packed as E3M4; expected E4M3, as its layer casts")
        refused(without_casts(tensors), r"0\.weight: it is packed as E3M4; expected E4M3")
        set_formats(model, {".*": Each("E4M3", "E3M4", None)})
        refused(tensors, r"0\.casts\.activations\.grid is packed as E3M4; expected E4M3")
        set_formats(model, {".*": "E3M4"})
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    @pytest.mark.parametrize("options", [torch.ones(3), torch.ones((), dtype=torch.uint8), torch.tensor([255]).byte()])
    def test_what_says_nothing_of_its_scales_is_refused(self, options):
        model = quantize_model(nn.Linear(4, 4), [Rule(".*", "E4M3")])
        with pytest.raises(InputError, match=r"casts\.weights\._extra_state: .*; expected JSON of version 1"):
            unpack(model, {**pack(model), "casts.weights._extra_state": options})

    def test_weights_of_scales_that_would_round_them_once_more_are_refused(self):
        def linear(**options):
            return quantize_model(nn.Linear(4, 4), [Rule(".*", "E4M3", None, **options)])

        by_channel = without_casts(pack(linear(granularity="channel")))
        unpack(linear(granularity=PerChannel(0)), by_channel)
        with pytest.raises(InputError, match=r"weight: its scales are of PerChannel.*; expected PerTensor"):
            unpack(linear(), by_channel)
        ratios = without_casts(pack(linear(scaling=Current(power_of_two=False))))
        with pytest.raises(InputError, match="weight: its scales are ratios; expected powers of two"):
            unpack(linear(), ratios)

    def test_one_parameter_has_one_value(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        tensors = pack(model)
        unpack(model, {name: tensor.clone() for name, tensor in tensors.items()})
        with pytest.raises(InputError, match=r"0\.weight and 1\.weight differ, and are one in the model"):
            unpack(model, {**tensors, "1.weight": torch.ones(4, 4)})
