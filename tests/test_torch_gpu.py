"""What torch's side does on a GPU only, here on a CPU, where it has to give what the CPU's own way gives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from altgrad_torch.clip_groups import _zero_below_on_gpu
from altgrad_torch.norms import _sums_of_squares_on_gpu


def test_sums_of_squares_in_few_launches() -> None:
    tensors = [
        torch.randn(700_003),
        torch.randn(5, 7).T,
        torch.zeros(0, 3),
        torch.tensor(3.0),
        torch.randn(9).bfloat16(),
    ]
    (single, half) = _sums_of_squares_on_gpu(tensors)
    exact = [math.fsum((tensor.double() ** 2).reshape(-1).tolist()) for tensor in tensors]
    assert float(single) == pytest.approx(sum(exact[:4]), rel=1e-12)
    assert float(half) == pytest.approx(exact[4], rel=1e-12)
    assert _sums_of_squares_on_gpu([]) == []


@pytest.mark.parametrize("limit", [2.0**-126, 1e-30, 1.0, 3e38, math.inf])
def test_zero_below_a_limit(limit: float) -> None:
    limit = float(np.float32(limit))
    near = np.float32(min(limit, 3e38)).view(np.uint32) + np.arange(-3, 4)
    some = torch.from_numpy(near.astype(np.uint32).view(np.float32))
    wide = torch.randn(1000) * 10.0 ** torch.randint(-44, 38, (1000,)).float()
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-45])
    tensors = [torch.cat([some, -some]), wide, special]
    expected = [torch.where(each.abs() < limit, each * 0.0, each) for each in tensors]
    _zero_below_on_gpu(tensors, limit)
    for ours, theirs in zip(tensors, expected, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
        numbers = ~theirs.isnan()
        assert torch.equal(ours.signbit()[numbers], theirs.signbit()[numbers])
