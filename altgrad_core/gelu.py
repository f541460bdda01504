"""GELU in its tanh form, as a gate: the numbers that both frameworks take it to be made of.

Hendrycks and Gimpel ("Gaussian Error Linear Units", 2016) give ``x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2``.
Since ``(1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z))`` that is ``x / (1 + exp(-v))`` of ``v = x (SLOPE + CUBIC x^2)``:
products, a sum, a quotient, and the exponential of what is at most zero. Nothing cancels where ``x`` is far below zero,
as it does in ``1 + tanh``.

Not the form with the error function: the exponential of every such float32 has been compared between the frameworks,
and of the error function there is neither a proof nor such a comparison.
"""

from __future__ import annotations

import math

import numpy as np

SLOPE = np.float32(math.sqrt(8 / math.pi))
"""Of ``v`` at zero, rounded to float32."""

CUBIC = np.float32(0.044715 * math.sqrt(8 / math.pi))
"""Of the cube of ``x`` in ``v``, rounded to float32."""

CUBIC_SLOPE = np.float32(3 * 0.044715 * math.sqrt(8 / math.pi))
"""Of the square of ``x`` in the derivative of ``v``, rounded to float32."""
