"""The parity microscope: two frameworks side by side, bit for bit; where they part, the first place and why."""

from altgrad.parity.cause import Cause as Cause
from altgrad.parity.causes import recognise as recognise
from altgrad.parity.compare import compare as compare
from altgrad.parity.environment import Environment as Environment
from altgrad.parity.leaves import Leaf as Leaf
from altgrad.parity.leaves import named_tensors as named_tensors
from altgrad.parity.lockstep import Make as Make
from altgrad.parity.lockstep import Step as Step
from altgrad.parity.lockstep import lockstep as lockstep
from altgrad.parity.operation import Operation as Operation
from altgrad.parity.operation import made_by as made_by
from altgrad.parity.records import Comparison as Comparison
from altgrad.parity.records import Element as Element
from altgrad.parity.records import TensorRecord as TensorRecord
from altgrad.parity.runs import Difference as Difference
from altgrad.parity.runs import Lockstep as Lockstep
from altgrad.parity.runs import Run as Run
from altgrad.parity.testing import assert_identical as assert_identical
from altgrad.parity.testing import assert_in_lockstep as assert_in_lockstep
