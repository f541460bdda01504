"""Layers of modules whose operands, and the gradients that flow back, are on the grids of formats; said by rules.

::

    quantize_model(model, [Rule(".*head", None), Rule(".*", "E4M3", gradients="E5M2", scaling=Delayed(16))])
    with recording(model) as seen:
        loss(model(x), y).backward()
    clipper.clip_if_needed(model, overflow_rate=seen.gradients.overflow_rate)
"""

from altgrad_core.rules import SAME as SAME
from altgrad_core.rules import Each as Each
from altgrad_core.rules import Rule as Rule
from altgrad_core.rules import UnusedRuleWarning as UnusedRuleWarning
from altgrad_core.summary import LayerRow as LayerRow
from altgrad_core.summary import Summary as Summary
from altgrad_torch.nn.accumulate import exact_product as exact_product
from altgrad_torch.nn.convolution import exact_convolution as exact_convolution
from altgrad_torch.nn.convolution import exact_transposed_convolution as exact_transposed_convolution
from altgrad_torch.nn.model import dequantize_model as dequantize_model
from altgrad_torch.nn.model import quantize_model as quantize_model
from altgrad_torch.nn.model import set_formats as set_formats
from altgrad_torch.nn.model import summary as summary
from altgrad_torch.nn.packed import pack as pack
from altgrad_torch.nn.packed import unpack as unpack
from altgrad_torch.nn.products import quantized_product as quantized_product
from altgrad_torch.nn.record import Seen as Seen
from altgrad_torch.nn.record import calibrate as calibrate
from altgrad_torch.nn.record import recording as recording
