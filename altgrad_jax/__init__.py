"""AltGrad for JAX: casts to any format, optax elements, recovery, control, and a training job in Flax NNX.

The training job (``models``, ``training``, ``fleet``, ``job``, ``checkpoint``) needs Flax and Orbax and is imported by
its modules' names.
"""

from altgrad_core import FORMAT_FALLBACK as FORMAT_FALLBACK
from altgrad_core import FORMAT_REGISTRY as FORMAT_REGISTRY
from altgrad_core import EmergencyMantissaShift as EmergencyMantissaShift
from altgrad_core import Format as Format
from altgrad_core import clip_threshold as clip_threshold
from altgrad_core import parse as parse
from altgrad_core.scaling import PerBlock as PerBlock
from altgrad_core.scaling import PerChannel as PerChannel
from altgrad_core.scaling import PerTensor as PerTensor
from altgrad_jax.blocks import block_scales as block_scales
from altgrad_jax.blocks import decode_blocks as decode_blocks
from altgrad_jax.blocks import encode_blocks as encode_blocks
from altgrad_jax.blocks import quantize_blocks as quantize_blocks
from altgrad_jax.casting import quantize as quantize
from altgrad_jax.clipping import clip_by_global_norm as clip_by_global_norm
from altgrad_jax.clipping import partition_relative_clip as partition_relative_clip
from altgrad_jax.codes import CodeParams as CodeParams
from altgrad_jax.codes import decode as decode
from altgrad_jax.codes import encode as encode
from altgrad_jax.control import Decision as Decision
from altgrad_jax.control import FormatController as FormatController
from altgrad_jax.control import Observation as Observation
from altgrad_jax.control import Policy as Policy
from altgrad_jax.control import get_format as get_format
from altgrad_jax.control import set_format as set_format
from altgrad_jax.exact import exact_dot_general as exact_dot_general
from altgrad_jax.exact import exact_matmul as exact_matmul
from altgrad_jax.granularity import amaxes as amaxes
from altgrad_jax.granularity import spread as spread
from altgrad_jax.hashing import hash_bits as hash_bits
from altgrad_jax.keeper import SnapshotKeeper as SnapshotKeeper
from altgrad_jax.norms import global_norm as global_norm
from altgrad_jax.params import FormatParams as FormatParams
from altgrad_jax.recovery import Snapshots as Snapshots
from altgrad_jax.recovery import all_finite as all_finite
from altgrad_jax.recovery import commit as commit
from altgrad_jax.recovery import reset_moments as reset_moments
from altgrad_jax.recovery import rollback as rollback
from altgrad_jax.recovery import select_if_finite as select_if_finite
from altgrad_jax.recovery import skip_nonfinite as skip_nonfinite
from altgrad_jax.recovery import snapshot as snapshot
from altgrad_jax.scaling import Current as Current
from altgrad_jax.scaling import Delayed as Delayed
from altgrad_jax.scaling import Static as Static
from altgrad_jax.scaling import amax as amax
from altgrad_jax.scaling import delayed_scale as delayed_scale
from altgrad_jax.scaling import empty_history as empty_history
from altgrad_jax.scaling import power_of_two_scale as power_of_two_scale
from altgrad_jax.scaling import push_amax as push_amax
from altgrad_jax.scaling import ratio_scale as ratio_scale
from altgrad_jax.statistics import CastCounts as CastCounts
from altgrad_jax.statistics import StallCounts as StallCounts
from altgrad_jax.statistics import cast_counts as cast_counts
from altgrad_jax.statistics import observe as observe
from altgrad_jax.statistics import quantize_with_counts as quantize_with_counts
from altgrad_jax.statistics import stall_counts as stall_counts
from altgrad_jax.statistics import stall_monitor as stall_monitor
