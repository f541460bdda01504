"""The layers of torch whose products are cast: the same modules, parameters and hooks, under a class that casts.

A class for each of torch's own, so that what is quantised is still an instance of it, is copied and pickled as it is,
and goes back by the class alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from altgrad_core.convolution import Sweep, spread
from altgrad_core.errors import InputError
from altgrad_core.rules import Rule
from altgrad_torch.granularity import amaxes
from altgrad_torch.nn.accumulate import exact_product
from altgrad_torch.nn.convolution import exact_convolution, exact_transposed_convolution
from altgrad_torch.nn.geometry import Geometry
from altgrad_torch.nn.products import Sites, cast_gradient, cast_operand, quantized_product
from altgrad_torch.nn.sites import Site
from altgrad_torch.scaling import Delayed


class QuantizedLayer(nn.Module):
    """What quantised layers have in common.

    Attributes:
        casts: the sites by name: ``activations``, ``weights``, ``gradients``, and in some layers more.
        rule: the rule that decided; None if none did.
    """

    plain: ClassVar[type[nn.Module]]
    """The class of torch that it stands for."""

    weight_names: ClassVar[tuple[str, ...]] = ("weight",)
    """The parameters that its weights' site casts."""

    casts: nn.ModuleDict
    rule: Rule | None

    def geometries(self) -> dict[str, Geometry]:
        """The axes of what is cast, by the names of the sites."""
        raise NotImplementedError

    def site(self, name: str) -> Site | None:
        """Where something is cast; None if it is not."""
        site = self.casts._modules.get(name)
        return site if isinstance(site, Site) else None

    def sites(self, a: str, b: str, gradient: str) -> Sites:
        """The three sites of a product."""
        return self.site(a), self.site(b), self.site(gradient)

    @property
    def is_exact(self) -> bool:
        """Whether products are summed exactly."""
        spec = None if self.rule is None else self.rule.spec
        return spec is not None and spec.accumulate == "exact"

    @property
    def refuses_exact(self) -> str:
        """Why products cannot be summed exactly; empty if they can."""
        return ""

    def weights(self) -> list[Tensor]:
        """The parameters that its weights' site casts."""
        named = (getattr(self, name) for name in self.weight_names)
        return [weight for weight in named if weight is not None]

    @torch.no_grad()
    def refill_weight_history(self) -> None:
        """Begin the history of the weights anew with their amaxes."""
        site = self.site("weights")
        if site is not None and isinstance(site.scaling, Delayed):
            found = [amaxes(each, site.placement.granularity).reshape(site.placement.scales) for each in self.weights()]
            site.begin_anew(torch.stack(found).amax(0))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load the parameters, and let the scales of the weights follow them if the checkpoint has no casts."""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        sites = [f"{prefix}casts.{name}." for name in self.casts]
        missing = [site for site in sites if not any(key.startswith(site) for key in state_dict)]
        if len(missing) == len(sites):
            self._take_casts_from_meta()
            self.refill_weight_history()
        else:
            missing_keys += [f"{site}grid" for site in missing]

    def _take_casts_from_meta(self) -> None:
        """Let casts begin where the weights are now, which ``load_state_dict(..., assign=True)`` took from meta."""
        device = self.weights()[0].device
        for site in self.casts.values():
            if isinstance(site, Site) and site.grid.is_meta and device.type != "meta":
                site.to_empty(device=device)


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """:class:`torch.nn.Linear` with cast operands and gradients; the bias is added, and its gradient summed, uncast."""

    plain = nn.Linear

    def geometries(self) -> dict[str, Geometry]:
        """The axes of what is cast, by the names of the sites."""
        return linear_geometries(self.in_features, self.out_features)

    def forward(self, input: Tensor) -> Tensor:
        """As the plain layer's."""
        multiply = exact_linear if self.is_exact else F.linear
        product = quantized_product(multiply, input, self.weight, self.sites("activations", "weights", "gradients"))
        return plus_bias(product, self.bias)


class QuantizedOutProjection(QuantizedLinear):
    """The projection at the end of a :class:`torch.nn.MultiheadAttention`, which has a class of its own."""

    plain = NonDynamicallyQuantizableLinear


class QuantizedBilinear(QuantizedLayer, nn.Bilinear):
    """:class:`torch.nn.Bilinear` with cast operands and gradients."""

    plain = nn.Bilinear

    @property
    def refuses_exact(self) -> str:
        """Why products cannot be summed exactly."""
        return "its product has three operands"

    def geometries(self) -> dict[str, Geometry]:
        """The axes of what is cast, by the names of the sites."""
        return {
            "activations": Geometry("activations", -1, self.in1_features, -1),
            "second_activations": Geometry("activations", -1, self.in2_features, -1),
            "weights": Geometry("weights", -3, self.out_features, -1, 3),
            "gradients": Geometry("gradients", -1, self.out_features, -1),
        }

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """As the plain layer's."""
        second = cast_operand(input2, self.site("second_activations"))
        sites = self.sites("activations", "weights", "gradients")
        return plus_bias(
            quantized_product(lambda x, w: F.bilinear(x, second, w), input1, self.weight, sites), self.bias
        )


class QuantizedEmbedding(QuantizedLayer, nn.Embedding):
    """:class:`torch.nn.Embedding` with cast weights and gradients; indices are not cast."""

    plain = nn.Embedding

    @property
    def refuses_exact(self) -> str:
        """Why products cannot be summed exactly."""
        return "what sums the gradients of its rows is no product"

    def geometries(self) -> dict[str, Geometry]:
        """The axes of what is cast, by the names of the sites."""
        if self.max_norm is not None:
            raise InputError(f"max_norm={self.max_norm} changes the weights in every forward pass; expected None")
        return {
            "weights": Geometry("weights", -1, self.embedding_dim, None, 2),
            "gradients": Geometry("gradients", -1, self.embedding_dim, None),
        }

    def forward(self, input: Tensor) -> Tensor:
        """As the plain layer's."""
        weight = cast_operand(self.weight, self.site("weights"))
        rows = F.embedding(input, weight, self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse)
        return cast_gradient(rows, self.site("gradients"))


class _QuantizedConvolution(QuantizedLayer, _ConvNd):
    @property
    def refuses_exact(self) -> str:
        if self.padding_mode == "zeros":
            return ""
        return f"the gradient of an input that padding_mode={self.padding_mode!r} repeats is a sum of rounded ones"

    def geometries(self) -> dict[str, Geometry]:
        axes = len(self.kernel_size)
        features = -axes - 1
        return {
            "activations": Geometry("activations", features, self.in_channels, features),
            "weights": Geometry("weights", features - 1, self.out_channels, features, axes + 2),
            "gradients": Geometry("gradients", features, self.out_channels, features),
        }

    def forward(self, input: Tensor) -> Tensor:
        def convolve(x: Tensor, weight: Tensor) -> Tensor:
            return self._exactly(x, weight) if self.is_exact else self._conv_forward(x, weight, None)

        product = quantized_product(convolve, input, self.weight, self.sites("activations", "weights", "gradients"))
        return plus_bias(product, self.bias, len(self.kernel_size))

    def _exactly(self, x: Tensor, weight: Tensor) -> Tensor:
        edges = self._reversed_padding_repeated_twice[::-1]  # after and before, from the first axis on
        how = zip(self.stride, edges[1::2], edges[::2], self.dilation, strict=True)
        sweeps = [Sweep(stride, before, after, 1, spacing) for stride, before, after, spacing in how]
        return of_batches(lambda x: exact_convolution(x, weight, sweeps, self.groups), x, len(sweeps))


class QuantizedConv1d(_QuantizedConvolution, nn.Conv1d):
    """:class:`torch.nn.Conv1d` with cast operands and gradients."""

    plain = nn.Conv1d


class QuantizedConv2d(_QuantizedConvolution, nn.Conv2d):
    """:class:`torch.nn.Conv2d` with cast operands and gradients."""

    plain = nn.Conv2d


class QuantizedConv3d(_QuantizedConvolution, nn.Conv3d):
    """:class:`torch.nn.Conv3d` with cast operands and gradients."""

    plain = nn.Conv3d


class _QuantizedTransposedConvolution(QuantizedLayer, _ConvTransposeNd):
    def geometries(self) -> dict[str, Geometry]:
        axes = len(self.kernel_size)
        features = -axes - 1
        # The outputs of several groups share an axis of the weights.
        channel = features if self.groups == 1 else None
        return {
            "activations": Geometry("activations", features, self.in_channels, features),
            "weights": Geometry("weights", channel, self.out_channels, features - 1, axes + 2),
            "gradients": Geometry("gradients", features, self.out_channels, features),
        }

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        axes = len(self.kernel_size)
        transposed: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes - 1]
        if self.padding_mode != "zeros":
            raise InputError(f"padding_mode={self.padding_mode!r} of a transposed convolution; expected 'zeros'")
        how: tuple[Any, ...] = (self.stride, self.padding, self.kernel_size, axes, self.dilation)
        output_padding = self._output_padding(input, output_size, *how)

        def convolve(x: Tensor, weight: Tensor) -> Tensor:
            if self.is_exact:
                return self._exactly(x, weight, output_padding)
            padding = (self.padding, output_padding)
            return transposed(x, weight, None, self.stride, *padding, self.groups, self.dilation)

        product = quantized_product(convolve, input, self.weight, self.sites("activations", "weights", "gradients"))
        return plus_bias(product, self.bias, axes)

    def _exactly(self, x: Tensor, weight: Tensor, output_padding: list[int]) -> Tensor:
        how: Any = zip(self.kernel_size, self.stride, self.padding, self.dilation, output_padding, strict=True)
        sweeps = []
        for size, stride, padding, spacing, more in how:
            edge = spread(size, spacing) - 1 - padding
            sweeps.append(Sweep(1, edge, edge + more, stride, spacing))
        return of_batches(lambda x: exact_transposed_convolution(x, weight, sweeps, self.groups), x, len(sweeps))


class QuantizedConvTranspose1d(_QuantizedTransposedConvolution, nn.ConvTranspose1d):
    """:class:`torch.nn.ConvTranspose1d` with cast operands and gradients."""

    plain = nn.ConvTranspose1d


class QuantizedConvTranspose2d(_QuantizedTransposedConvolution, nn.ConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d` with cast operands and gradients."""

    plain = nn.ConvTranspose2d


class QuantizedConvTranspose3d(_QuantizedTransposedConvolution, nn.ConvTranspose3d):
    """:class:`torch.nn.ConvTranspose3d` with cast operands and gradients."""

    plain = nn.ConvTranspose3d


def linear_geometries(inputs: int, outputs: int) -> dict[str, Geometry]:
    """Of ``x @ weight.T``."""
    return {
        "activations": Geometry("activations", -1, inputs, -1),
        "weights": Geometry("weights", -2, outputs, -1, 2),
        "gradients": Geometry("gradients", -1, outputs, -1),
    }


def exact_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``, each element and those of the gradients exact sums rounded once to float32."""
    rows = exact_product(x.reshape(-1, x.shape[-1]), weight.mT)
    return rows.reshape(*x.shape[:-1], weight.shape[0])


def of_batches(convolve: Callable[[Tensor], Tensor], x: Tensor, axes: int) -> Tensor:
    """A convolution of a batch, or of one input without an axis for it."""
    return convolve(x) if x.ndim == axes + 2 else convolve(x[None])[0]


def plus_bias(product: Tensor, bias: Tensor | None, axes: int = 0) -> Tensor:
    """A product and a bias for each channel, which so many axes follow. Under autocast the product's dtype stays."""
    if bias is None:
        return product
    return product + bias.to(product.dtype).reshape(-1, *(1 for _ in range(axes)))


def make_sites(layer: QuantizedLayer, path: str, seed: int) -> Iterable[tuple[str, Site]]:
    """The sites that a layer's rule asks for.

    Raises:
        InputError: for an option that the layer cannot honour; the message names both.
    """
    spec = None if layer.rule is None else layer.rule.spec
    if spec is None:
        return
    if spec.accumulate == "exact" and layer.refuses_exact:
        raise InputError(f"accumulate='exact' cannot be honoured: {layer.refuses_exact}; expected 'native'")
    device = layer.weights()[0].device
    for name, geometry in layer.geometries().items():
        of_operand = getattr(spec, geometry.operand)
        if of_operand is not None:
            site_seed = (zlib.crc32(f"{path}/{name}".encode()) + seed) % 2**32
            yield name, Site(of_operand, geometry.placement(of_operand, site_seed, f"a {layer.plain.__name__}"), device)
