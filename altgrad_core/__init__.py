"""What both frameworks agree on: formats, exact references, thresholds and the shifter's rule. Needs only NumPy."""

from altgrad_core.formats import FORMAT_REGISTRY as FORMAT_REGISTRY
from altgrad_core.formats import Format as Format
from altgrad_core.formats import UnknownFormatError as UnknownFormatError
from altgrad_core.formats import parse as parse
from altgrad_core.stability import FORMAT_FALLBACK as FORMAT_FALLBACK
from altgrad_core.stability import EmergencyMantissaShift as EmergencyMantissaShift
from altgrad_core.stability import clip_threshold as clip_threshold
