"""AltGrad in PyTorch: casts to any format, counts, scales, clipping and the stall detector, on tensors and modules."""

from altgrad_core.formats import FORMAT_REGISTRY as FORMAT_REGISTRY
from altgrad_core.formats import Format as Format
from altgrad_core.formats import UnknownFormatError as UnknownFormatError
from altgrad_core.formats import parse as parse
from altgrad_core.stability import FORMAT_FALLBACK as FORMAT_FALLBACK
from altgrad_core.stability import EmergencyMantissaShift as EmergencyMantissaShift
from altgrad_core.stability import clip_threshold as clip_threshold
from altgrad_torch.casting import decode as decode
from altgrad_torch.casting import encode as encode
from altgrad_torch.casting import quantize as quantize
from altgrad_torch.clipping import PartitionRelativeClipper as PartitionRelativeClipper
from altgrad_torch.clipping import clip_grad_norm_ as clip_grad_norm_
from altgrad_torch.clipping import global_norm as global_norm
from altgrad_torch.scaling import delayed_scale as delayed_scale
from altgrad_torch.scaling import empty_history as empty_history
from altgrad_torch.scaling import power_of_two_scale as power_of_two_scale
from altgrad_torch.scaling import push_amax as push_amax
from altgrad_torch.statistics import BitStallDetector as BitStallDetector
from altgrad_torch.statistics import CastCounts as CastCounts
from altgrad_torch.statistics import StallCounts as StallCounts
from altgrad_torch.statistics import cast_counts as cast_counts
from altgrad_torch.statistics import observe as observe
from altgrad_torch.statistics import stall_counts as stall_counts
