"""torch on so many threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch


def fixture_of_threads(*counts: int) -> Callable[[pytest.FixtureRequest], Iterator[int]]:
    """A fixture named ``threads``: the test runs once with each number of torch's threads, which it is given."""

    @pytest.fixture(params=counts, name="threads")
    def threads(request: pytest.FixtureRequest) -> Iterator[int]:
        before = torch.get_num_threads()
        torch.set_num_threads(request.param)
        yield request.param
        torch.set_num_threads(before)

    return threads
