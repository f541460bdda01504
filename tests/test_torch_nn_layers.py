"""Quantised layers of torch against the same products of operands that are cast by hand."""

import copy
import itertools
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from altgrad_core.errors import InputError  # noqa: E402
from altgrad_core.formats import FORMAT_REGISTRY, OVERFLOWS, ROUNDINGS  # noqa: E402
from altgrad_torch import (  # noqa: E402
    Current,
    Delayed,
    PerBlock,
    PerChannel,
    Static,
    amax,
    amaxes,
    cast_counts,
    exact_matmul,
    hash_bits,
    power_of_two_scale,
    quantize,
    spread,
)
from altgrad_torch.nn import Each, Rule, dequantize_model, quantize_model, recording  # noqa: E402
from altgrad_torch.nn.sites import Placement, Site  # noqa: E402
from altgrad_torch.statistics import observe  # noqa: E402

FORMATS = ("E4M3", "E3M4", "E5M2")


def by_hand(format, scale):
    return lambda x: quantize(x, format, scale=scale, overflow="saturate_finite")


def through(multiply, operands, casts, gradient):
    """Forward and gradients of a product of cast operands, the incoming gradient cast as well."""
    cast = [c(x.detach()).requires_grad_(x.is_floating_point()) for x, c in zip(operands, casts[:-1], strict=True)]
    product = multiply(*cast)
    return product.detach(), torch.autograd.grad(product, cast, casts[-1](gradient))


def leaf(*shape):
    return (torch.randn(shape) * torch.randn(shape).exp()).requires_grad_()


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), [(4, 3, 6)], F.linear),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), [(6,)], F.linear),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), [(2, 4, 7)], lambda x, w: F.conv1d(x, w, groups=2)),
    "conv2d": (
        lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="circular"),
        [(2, 2, 5, 6)],
        lambda x, w: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), w, stride=2),
    ),
    "conv2d of one image": (lambda: nn.Conv2d(2, 3, 3), [(2, 5, 6)], F.conv2d),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), [(2, 1, 3, 4, 3)], F.conv3d),
    "transposed 1d": (lambda: nn.ConvTranspose1d(2, 3, 3), [(2, 2, 5)], F.conv_transpose1d),
    "transposed 2d": (
        lambda: nn.ConvTranspose2d(4, 2, 3, stride=2, output_padding=1, groups=2),
        [(1, 4, 3, 3)],
        lambda x, w: F.conv_transpose2d(x, w, stride=2, output_padding=1, groups=2),
    ),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 1, 2), [(1, 2, 2, 3, 2)], F.conv_transpose3d),
    "bilinear": (lambda: nn.Bilinear(4, 5, 3), [(7, 4), (7, 5)], F.bilinear),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_its_product_of_cast_operands(name):
    make, shapes, multiply = LAYERS[name]
    torch.manual_seed(0)
    layer, inputs = make(), [leaf(*shape) for shape in shapes]
    plain = layer(*inputs).detach()
    quantize_model(layer, [Rule(".*", FORMATS[0], FORMATS[1], FORMATS[2])])
    out = layer(*inputs)
    gradient = torch.randn(out.shape)
    out.backward(gradient)
    # Activations and gradients start at scale 1, weights at the scale that they need.
    unit = power_of_two_scale(amax(layer.weight), FORMAT_REGISTRY[FORMATS[0]].max_representable_value)
    activations, weights, gradients = by_hand(FORMATS[1], 1.0), by_hand(FORMATS[0], unit), by_hand(FORMATS[2], 1.0)
    casts = [activations] * len(inputs) + [weights, gradients]
    expected, cotangents = through(multiply, [*inputs, layer.weight], casts, gradient)
    if layer.bias is not None:
        axis = out.ndim - (2 if name == "conv2d of one image" else len(getattr(layer, "kernel_size", ()))) - 1
        shape = [-1 if k == axis else 1 for k in range(out.ndim)]
        expected = expected + layer.bias.detach().reshape(shape)
        others = [k for k in range(out.ndim) if k != axis]
        torch.testing.assert_close(layer.bias.grad, gradient.sum(others) if others else gradient, rtol=1e-6, atol=1e-6)
    assert torch.equal(out, expected)
    assert all(map(torch.equal, [*(x.grad for x in inputs), layer.weight.grad], cotangents))
    assert not torch.equal(expected, plain)
    assert torch.equal(dequantize_model(layer)(*inputs), plain)


CONVOLUTIONS = {
    "strides, padding and groups": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), groups=2), (2, 4, 6, 5)),
    "a padding that is named": (lambda: nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2)), (1, 2, 5, 6)),
    "one input of three axes": (lambda: nn.Conv3d(1, 2, (1, 2, 2), (2, 1, 1), 1), (1, 3, 4, 3)),
    "transposed": (lambda: nn.ConvTranspose1d(2, 3, 3, 2, 1, 1), (2, 2, 5)),
    "transposed, in groups": (
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), (2, 1), (0, 1), (1, 0), groups=2, dilation=(1, 2)),
        (1, 4, 3, 4),
    ),
    "transposed, one input": (lambda: nn.ConvTranspose3d(1, 2, (2, 1, 2), (1, 2, 2)), (1, 2, 2, 3)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_exact_convolutions_are_where_torch_has_them(name):
    """Of small integers, which float64 adds up without rounding; with a bias behind them."""
    torch.manual_seed(5)
    make, shape = CONVOLUTIONS[name]
    layer, x = make(), torch.randint(-4, 5, shape).float().requires_grad_()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randint(-4, 5, parameter.shape))
    wide, x_wide = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    quantize_model(layer, [Rule(".*", "E4M3", scaling=Static(1.0), accumulate="exact")])
    out, expected = layer(x), wide(x_wide)
    gradient = torch.randint(-4, 5, expected.shape)
    wanted = torch.autograd.grad(expected, (x_wide, wide.weight, wide.bias), gradient.double())
    found = torch.autograd.grad(out, (x, layer.weight, layer.bias), gradient.float())
    for one, other in zip((out, *found), (expected, *wanted), strict=True):
        assert torch.equal(one, other.float())


def test_an_embedding_casts_its_rows_and_their_gradients():
    torch.manual_seed(0)
    layer = nn.Embedding(9, 5, padding_idx=3)
    indices, weight = torch.tensor([[1, 3, 1], [8, 0, 2]]), layer.weight
    quantize_model(layer, [Rule(".*", "E3M4", gradients="E5M2")])
    assert set(layer.casts) == {"weights", "gradients"}
    out, gradient = layer(indices), torch.randn(2, 3, 5)
    out.backward(gradient)
    unit = power_of_two_scale(amax(weight), 124.0)
    assert torch.equal(out, quantize(weight.detach(), "E3M4", scale=unit)[indices])
    plain = nn.Embedding.from_pretrained(weight.detach().clone(), freeze=False, padding_idx=3)
    plain(indices).backward(quantize(gradient, "E5M2"))
    assert torch.equal(weight.grad, plain.weight.grad)


@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", ["E0M7", "E1M6", "E3M4", "E4M3", "E7M0", "E5M2", "bf16"])
def test_a_grid_that_is_moved_gives_the_bits_and_counts_of_a_scale(name, rounding, overflow):
    torch.manual_seed(1)
    anything = torch.randint(-(2**31), 2**31, (3000,)).to(torch.int32).view(torch.float32)
    for exponent in (-100, -40, -1, 0, 7, 60, 100):
        scale = 2.0**exponent
        x = torch.cat([anything, torch.randn(2000) * scale, torch.tensor([0.0, -0.0, torch.inf, torch.nan])])
        spec = Rule("", name, scaling=Static(scale), rounding=rounding, overflow=overflow).spec.gradients
        site = Site(spec, Placement("gradients", seed=5))
        bits = hash_bits(tuple(x.shape), 5, 0) if rounding == "stochastic" else None
        expected = quantize(x, name, scale=scale, rounding=rounding, overflow=overflow, random_bits=bits)
        assert torch.equal(site.cast(x).view(torch.int32), expected.view(torch.int32))


GRANULARITIES = ["tensor", "channel", "block4", PerBlock(3, -2), PerChannel(-2)]


@pytest.mark.parametrize("operand", ["activations", "weights", "gradients"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_current_scales_are_those_of_the_tensor_itself(operand, granularity):
    torch.manual_seed(2)
    layer, x = nn.Linear(10, 6), leaf(3, 4, 10)
    rule = dict.fromkeys(["weights", "activations", "gradients"]) | {operand: "E4M3"}
    quantize_model(layer, [Rule(".*", **rule, scaling=Current(), granularity=granularity)])
    out, gradient = layer(x), torch.randn(3, 4, 6)
    out.backward(gradient)

    def cast(values, axis):
        meant = PerChannel(axis) if granularity == "channel" else granularity
        scale = power_of_two_scale(amaxes(values, meant), 448.0)
        return quantize(values, "E4M3", scale=spread(scale, tuple(values.shape), meant), overflow="saturate_finite")

    axis = {"activations": -1, "weights": -2, "gradients": -1}[operand]
    casts = [(lambda v: cast(v, axis)) if each == operand else (lambda v: v) for each in rule]
    weights, activations, gradients = casts
    expected, (of_x, of_weight) = through(F.linear, [x, layer.weight], [activations, weights, gradients], gradient)
    assert torch.equal(out, expected + layer.bias)
    assert torch.equal(x.grad, of_x)
    assert torch.equal(layer.weight.grad, of_weight)


@pytest.mark.parametrize(
    ("make", "shape", "channel_axes"),
    [
        (lambda: nn.Linear(4, 5), (3, 2, 4), (-1, 0, -1)),
        (lambda: nn.Conv2d(4, 6, 3, groups=2), (3, 4, 5, 5), (1, 0, 1)),
        (lambda: nn.ConvTranspose1d(4, 6, 3), (3, 4, 5), (1, 1, 1)),
    ],
)
def test_delayed_scales_of_channels_follow_each_channel(make, shape, channel_axes):
    torch.manual_seed(3)
    layer, x = make(), leaf(*shape)
    quantize_model(layer, [Rule(".*", "E4M3", granularity="channel", scaling=Delayed(2))])
    with recording(layer):
        out = layer(x)
        gradient = torch.randn(out.shape)
        out.backward(gradient)
    seen = {"activations": x, "weights": layer.weight, "gradients": gradient}
    for (name, values), axis in zip(seen.items(), channel_axes, strict=True):
        site = layer.casts[name]
        expected = power_of_two_scale(amaxes(values, PerChannel(axis)), 448.0)
        assert torch.equal(site.scale.reshape(-1), expected.reshape(-1)), name
        assert site.scale.numel() == values.shape[axis]
    layer(x)


def test_a_ratio_as_scale():
    layer, x = nn.Linear(4, 3), leaf(2, 4)
    quantize_model(layer, [Rule(".*", "E4M3", gradients=None, scaling=Current(power_of_two=False))])
    cast = [quantize(v.detach(), "E4M3", scale=amax(v) / torch.tensor(448.0)) for v in (x, layer.weight)]
    assert torch.equal(layer(x), F.linear(*cast) + layer.bias)


def test_stochastic_rounding_takes_other_bits_at_each_site_and_each_recorded_step():
    torch.manual_seed(4)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(5, 8)
    quantize_model(model, [Rule(".*", "E4M3", rounding=Each("stochastic", "nearest_even", "stochastic"))], seed=7)
    site = model[0].casts["activations"]
    expected = quantize(
        x, "E4M3", rounding="stochastic", random_bits=hash_bits((5, 8), site.placement.seed, 0), overflow="saturate"
    )
    assert torch.equal(site.cast(x), expected)
    assert torch.equal(model(x), model(x))
    seeds = [each.placement.seed for each in (site, model[1].casts["activations"], model[0].casts["gradients"])]
    assert len(set(seeds)) == 3
    with recording(model):
        pass
    assert [int(each.step) for each in (site, model[1].casts["gradients"])] == [1, 1]
    assert not torch.equal(site.cast(x), expected)
    assert model[0].casts["weights"].step is None


def test_exact_products_are_exact_forward_and_backward():
    torch.manual_seed(5)
    layer, x = nn.Linear(64, 32), leaf(2, 8, 64)
    quantize_model(layer, [Rule(".*", "E5M2", accumulate="exact")])
    out, gradient = layer(x), torch.randn(2, 8, 32)
    out.backward(gradient)
    unit = power_of_two_scale(amax(layer.weight), 57344.0)
    qx, qw, qg = (quantize(v.detach(), "E5M2", scale=s) for v, s in ((x, 1.0), (layer.weight, unit), (gradient, 1.0)))
    assert torch.equal(out, exact_matmul(qx, qw.mT) + layer.bias)
    assert torch.equal(x.grad, exact_matmul(qg, qw))
    assert torch.equal(layer.weight.grad, exact_matmul(qg.reshape(-1, 32).mT, qx.reshape(-1, 64)))
    flipped = torch.arange(63, -1, -1)
    assert torch.equal(exact_matmul(qx[..., flipped], qw[:, flipped].mT), exact_matmul(qx, qw.mT))


OF_EACH_KIND = {
    "linear": (lambda: nn.Linear(8, 4), (2, 3, 8)),
    "convolution": (lambda: nn.Conv1d(8, 4, 3), (2, 8, 5)),
    "transposed convolution": (lambda: nn.ConvTranspose1d(8, 4, 3), (2, 8, 5)),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), (2, 3, 8)),
}


@pytest.mark.parametrize("name", OF_EACH_KIND)
@pytest.mark.parametrize("how", [torch.bfloat16, torch.float16, "autocast"])
def test_exact_products_have_the_dtypes_of_native_ones(name, how):
    make, shape = OF_EACH_KIND[name]
    dtype = torch.float32 if how == "autocast" else how
    torch.manual_seed(6)
    exact, given = make().to(dtype), torch.randn(shape, dtype=dtype)
    native, found = copy.deepcopy(exact), []
    for model, accumulate in ((exact, "exact"), (native, "native")):
        quantize_model(model, [Rule(".*", "E4M3", scaling=Static(0.25), accumulate=accumulate)])
        x = given.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            out = model(x)
        out.sum().backward()
        found.append((out, x.grad, *(parameter.grad for parameter in model.parameters())))
    assert [each.dtype for each in found[0]] == [each.dtype for each in found[1]]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0.1, atol=0.1)


def test_exact_products_round_to_the_dtype_of_their_operands_last():
    layer = nn.Linear(3, 1, bias=False).bfloat16()
    with torch.no_grad():
        layer.weight.fill_(1.0)
    quantize_model(layer, [Rule(".*", "E5M2", scaling=Static(1.0), accumulate="exact")])
    assert layer(torch.tensor([[2.0**15, 1.0, -(2.0**15)]], dtype=torch.bfloat16)).tolist() == [[1.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    torch.manual_seed(6)
    layer, x = nn.Linear(8, 4).to(dtype), torch.randn(3, 8, dtype=dtype)
    quantize_model(layer, [Rule(".*", "E4M3")])
    unit = power_of_two_scale(amax(layer.weight), 448.0)
    expected = F.linear(quantize(x, "E4M3"), quantize(layer.weight, "E4M3", scale=unit)) + layer.bias
    assert layer(x).dtype == dtype
    assert torch.equal(layer(x), expected)

    layer = quantize_model(nn.Linear(8, 4), [Rule(".*", "E4M3")])
    with torch.autocast("cpu", dtype), recording(layer) as seen:
        out = layer(x.float())
        out.sum().backward()
    assert out.dtype == dtype
    assert layer.weight.grad.dtype == torch.float32
    assert seen.gradients.as_integers()["elements"] == 12


def test_what_becomes_half_precision_keeps_scales_and_histories_in_float32():
    layer = quantize_model(nn.Linear(8, 4), [Rule(".*", "E4M3")])
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer.to(torch.float16)
    assert layer.weight.dtype == torch.float16
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
    assert {buffer.dtype for buffer in layer.buffers()} == {torch.float32, torch.int32}


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_counts_are_those_of_the_cast_at_the_scale_in_use(granularity):
    torch.manual_seed(7)
    layer, x = nn.Linear(6, 5), (leaf(20, 6) * 1e3).detach().requires_grad_()
    quantize_model(layer, [Rule(".*", "E4M3", granularity=granularity)])
    for _ in range(2):
        scales = {name: site.scale.clone() for name, site in layer.casts.items()}
        with recording(layer) as seen:
            out = layer(x)
            gradient = torch.randn(out.shape) * 1e-3
            out.backward(gradient)
        for operand, values in (("activations", x), ("weights", layer.weight), ("gradients", gradient)):
            expected = cast_counts(values.detach(), "E4M3", scale=scales[operand])
            assert torch.equal(seen.counts("", operand).totals, expected.totals)
            assert torch.equal(getattr(seen, operand).totals, expected.totals)
    assert int(seen.activations.totals[1]) == 0
    if granularity == "tensor":
        assert float(layer.casts["gradients"].history[-1]) == float(observe(gradient, "E4M3")[1])


# --- attention -------------------------------------------------------------------------------------------------------


def attention(**options):
    torch.manual_seed(8)
    layer = nn.MultiheadAttention(12, 2, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


INPUTS = {
    "self": lambda x, y: (x, x, x),
    "cross": lambda x, y: (x, y, y),
    "all apart": lambda x, y: (x, y, y + 1.0),
}


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": True}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True}],
    ids=str,
)
@pytest.mark.parametrize("cast", ["out_proj", ".*"])
def test_attention_that_casts_gradients_alone_is_the_plain_one_forward(options, inputs, cast):
    layer = attention(**options)
    x, y = torch.randn(4, 4, 12), torch.randn(4, 4, 12)
    forbidden = torch.ones(4, 4, dtype=torch.bool).triu(1)
    padding = torch.zeros(4, 4, dtype=torch.bool)
    padding[:, 3] = True
    variants = [
        {},
        {"need_weights": False},
        {"attn_mask": forbidden},
        {"attn_mask": forbidden, "is_causal": True, "need_weights": False},
        {"attn_mask": torch.randn(8, 4, 4), "average_attn_weights": False},
        {"key_padding_mask": padding},
        {"attn_mask": torch.randn(4, 4), "key_padding_mask": torch.randn(4, 4), "need_weights": False},
    ]
    if options.get("add_bias_kv"):
        del variants[3]  # there torch's hint forbids the keys that are added, which without the hint it allows
    plain = [layer(*INPUTS[inputs](x, y), **each) for each in variants]
    unbatched = layer(x[0], x[0], x[0], key_padding_mask=padding[0])
    quantize_model(layer, [Rule(cast, None, None, "E5M2")])
    for given, (expected, weights) in zip(variants, plain, strict=True):
        found, found_weights = layer(*INPUTS[inputs](x, y), **given)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert (weights is None) == (found_weights is None)
        if weights is not None:
            torch.testing.assert_close(found_weights, weights, rtol=1e-5, atol=1e-6)
    found, found_weights = layer(x[0], x[0], x[0], key_padding_mask=padding[0])
    torch.testing.assert_close(found, unbatched[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_weights, unbatched[1], rtol=1e-5, atol=1e-6)


def test_attention_casts_every_operand_of_every_product():
    layer, x = attention(batch_first=True), torch.randn(3, 5, 12, requires_grad=True)
    quantize_model(layer, [Rule(".*", "E4M3", gradients="E5M2", scaling=Static(1 / 16))])
    out, _ = layer(x, x, x, need_weights=False)
    gradient = torch.randn(out.shape)
    out.backward(gradient)
    mine = [p.grad for p in (x, layer.in_proj_weight, layer.in_proj_bias, layer.out_proj.weight, layer.out_proj.bias)]

    def cast(v):
        return quantize(v, "E4M3", scale=1 / 16, overflow="saturate_finite")

    def back(v):
        v.register_hook(lambda g: quantize(g, "E5M2", scale=1 / 16, overflow="saturate_finite"))
        return v

    leaves = [p.detach().clone().requires_grad_() for p in (x, *layer.parameters())]
    at, w, b, w_out, b_out = leaves
    projected = back(F.linear(cast(at), cast(w))) + b
    q, k, v = (each.unflatten(-1, (2, 6)).transpose(1, 2) for each in projected.chunk(3, -1))
    scores = back(cast(q * 6**-0.5) @ cast(k).mT)
    mixed = back(cast(scores.softmax(-1)) @ cast(v))
    expected = back(F.linear(cast(mixed.transpose(1, 2).flatten(2)), cast(w_out))) + b_out
    expected.backward(gradient)
    assert torch.equal(out, expected)
    assert all(map(torch.equal, mine, [each.grad for each in leaves]))


def test_attention_of_other_widths_casts_each_weight():
    layer = attention(kdim=5, vdim=7)
    weights = [layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight]
    inputs = torch.randn(4, 2, 12), torch.randn(3, 2, 5), torch.randn(3, 2, 7)
    plain = layer(*inputs)[0]
    quantize_model(layer, [Rule(".*", "E4M3")])
    largest = max(float(amax(weight)) for weight in weights)
    assert float(layer.casts["weights"].history.amax()) == largest
    with recording(layer) as seen:
        out = layer(*inputs)[0]
    assert seen.counts("", "weights").as_integers()["elements"] == sum(weight.numel() for weight in weights)
    assert not torch.equal(out, plain)
    torch.testing.assert_close(out, plain, rtol=0.3, atol=0.3)
    assert torch.equal(dequantize_model(layer)(*inputs)[0], plain)


def test_exact_attention_does_not_depend_on_the_order_of_features():
    layer, x = attention(batch_first=True), torch.randn(2, 5, 12)
    quantize_model(layer, [Rule(".*", "E5M2", accumulate="exact")])
    order = torch.randperm(12)
    out = layer(x, x, x)[0]
    with torch.no_grad():
        layer.in_proj_weight.copy_(layer.in_proj_weight[:, order])
    assert torch.equal(layer(x[..., order], x[..., order], x[..., order])[0], out)


def test_queries_that_may_attend_to_nothing_give_what_they_give_in_torch():
    layer, x = attention(batch_first=True), torch.randn(1, 3, 12)
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[1] = True
    plain = [layer(x, x, x, attn_mask=mask, need_weights=need)[0] for need in (True, False)]
    quantize_model(layer, [Rule(".*", "E4M3")])
    mine = [layer(x, x, x, attn_mask=mask, need_weights=need)[0] for need in (True, False)]
    assert [bool(each[0, 1].isnan().all()) for each in plain] == [True, False]
    assert [each.isnan().tolist() for each in mine] == [each.isnan().tolist() for each in plain]


def test_dropout_in_attention_happens_in_training_alone():
    layer, x = attention(batch_first=True, dropout=0.5), torch.randn(2, 3, 12)
    quantize_model(layer, [Rule(".*", "E4M3")])
    assert not torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])
    layer.eval()
    assert torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])


def test_what_attention_cannot_take_is_refused():
    layer, x = quantize_model(attention(batch_first=True), [Rule(".*", "E4M3")]), torch.randn(1, 3, 12)
    with pytest.raises(InputError, match="is_causal is a hint about attn_mask"):
        layer(x, x, x, is_causal=True)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_an_encoder_layer_is_cast_in_eval_mode_too():
    torch.manual_seed(9)
    x, padding = torch.randn(2, 4, 8), torch.tensor([[False] * 4, [False, False, True, True]])
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    with torch.no_grad():
        plain = [encoder(x), encoder(x, src_key_padding_mask=padding)]
    quantize_model(encoder, [Rule(".*", "E4M3")])
    with torch.no_grad(), recording(encoder) as seen:
        in_eval = [encoder(x), encoder(x, src_key_padding_mask=padding)]
    calls = {name: seen.counts(name, "weights").as_integers()["elements"] for name in seen.layers}
    assert calls["layers.1.self_attn"] == 2 * 3 * 8 * 8
    assert calls["layers.0.self_attn.out_proj"] == 2 * 8 * 8
    assert calls["layers.1.linear2"] == 2 * 8 * 16
    fresh = quantize_model(dequantize_model(encoder), [Rule(".*", "E4M3")])
    assert torch.equal(fresh.train()(x), in_eval[0])
    with torch.no_grad():
        back = dequantize_model(encoder).eval()
        assert all(map(torch.equal, [back(x), back(x, src_key_padding_mask=padding)], plain))


def test_an_output_projection_is_cast_though_its_attention_is_not():
    layer, x = attention(batch_first=True), torch.randn(2, 3, 12)
    quantize_model(layer, [Rule("out_proj", "E4M3")])
    with recording(layer) as seen:
        layer(x, x, x)
    assert seen.layers == ["out_proj"]
    assert seen.activations.as_integers()["elements"] == 2 * 3 * 12
    assert type(dequantize_model(layer)) is nn.MultiheadAttention


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: nn.Bilinear(2, 2, 2), {"accumulate": "exact"}, "a Bilinear: accumulate='exact' cannot be honoured"),
        (lambda: nn.Embedding(2, 2), {"accumulate": "exact"}, "a Embedding: accumulate='exact'"),
        (lambda: nn.Embedding(2, 2), {"granularity": "block4"}, "sums over no axis of its weights"),
        (lambda: nn.Embedding(2, 2, max_norm=1.0), {}, "max_norm=1.0 changes the weights"),
        (lambda: nn.MultiheadAttention(4, 2), {"granularity": "channel"}, "cannot scale its activations by channel"),
        (lambda: nn.ConvTranspose1d(2, 2, 1, groups=2), {"granularity": "channel"}, "cannot scale its weights by"),
        (lambda: nn.Linear(2, 2), {"granularity": "block4", "scaling": Delayed(4)}, "cannot serve blocks of 4"),
        (lambda: nn.Linear(2, 2), {"granularity": PerChannel(0)}, "how many channels there are"),
        (lambda: nn.Linear(2, 2), {"scaling": Static(torch.ones(3))}, r"the static scale has shape \(3,\)"),
        (lambda: nn.Linear(2, 2), {"scaling": Static(1.0), "granularity": "channel"}, "'channel' would have no effect"),
        (lambda: nn.Linear(2, 2), {"scaling": Static(1.0), "granularity": "block2"}, "cannot serve blocks of 2"),
        (lambda: nn.Linear(2, 2), {"scaling": "delayed"}, "scaling='delayed' is none"),
        (lambda: nn.Linear(2, 2).double(), {}, "holds torch.float64"),
        (lambda: nn.LSTM(2, 2), {}, "a LSTM, cannot be cast"),
        (lambda: nn.LazyLinear(2), {}, "a LazyLinear, cannot be cast"),
        (lambda: nn.EmbeddingBag(2, 2), {}, r"expected Rule\('0', None\) before the rule '\.\*'"),
    ],
)
def test_an_option_that_a_layer_cannot_honour_names_both(make, options, message):
    model = nn.Sequential(make(), nn.Linear(2, 2))
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(InputError, match=message):
        quantize_model(model, [Rule(".*", "E4M3", **options)])
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("rule", [Rule("0", "E4M3", activations="E5M2"), Rule("0", None, activations="E4M3")])
def test_a_format_for_what_a_layer_does_not_have_names_rule_and_layer(rule):
    model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 2))
    message = r"the rule '0' says activations='E.M.', .* about 0 \(Embedding\), with weights and gradients to cast"
    with pytest.raises(InputError, match=message):
        quantize_model(model, [rule, Rule(".*", "E4M3")])
    assert type(model[0]) is nn.Embedding
    quantize_model(model, [replace(rule, layers=".*")])  # of which the other layer has activations


def test_second_derivatives_pass_through_the_casts():
    layer, x = quantize_model(nn.Linear(3, 2), [Rule(".*", "E4M3")]), leaf(4, 3)
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    first.sum().backward()
    assert bool((layer.weight.grad != 0).any())


def test_layers_and_formats_leave_no_case_out():
    kinds = {type(make()) for make, _, _ in LAYERS.values()}
    dims = itertools.product(("Conv", "ConvTranspose"), (1, 2, 3))
    assert kinds >= {getattr(nn, f"{kind}{n}d") for kind, n in dims}


def test_a_layer_whose_class_changed_since_is_not_made_plain():
    model = quantize_model(nn.Sequential(nn.Linear(4, 4)), [Rule(".*", "E4M3")])
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(InputError, match="0 became a ParametrizedQuantizedLinear after it was quantised; expected"):
        dequantize_model(model)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert type(dequantize_model(model)[0]) is nn.Linear


@pytest.mark.filterwarnings("ignore")  # torch.compile warns of what it imports
def test_layers_are_traced_in_one_graph():
    model, x = quantize_model(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), [Rule(".*", "E4M3")]), leaf(3, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    assert torch.equal(out, model(x))
    out.sum().backward()
    assert x.grad is not None
    torch.compiler.reset()
