"""What a cast by addition needs of its grid: what of it a scale changes, and that it rounds as it should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_core.formats import OVERFLOWS, parse
from altgrad_core.reference import quantize_reference
from altgrad_jax.addition import FIXED, Addition
from altgrad_jax.params import FormatParams, edges

FORMATS = ["E4M3", "float8_e4m3fn", "E5M2", "E6M1", "E7M0", "E3M4", "E2M5", "float8_e4m3fnuz"]


def addition_of(params: FormatParams) -> Addition:
    return Addition.of(params, edges(params))


@pytest.mark.parametrize("path", ["fast", "wide"])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_fixed_is_the_same_under_every_scale(name: str, path: str) -> None:
    params = FormatParams.from_format(name, path=path)
    plain = addition_of(params)
    for exponent in (-100, -9, 5, 100):
        scaled = addition_of(params.scaled(jnp.float32(2.0**exponent)))
        assert [int(each) for each in scaled.fixed] == [int(each) for each in plain.fixed]
        assert [int(each) for each in scaled.moving] != [int(each) for each in plain.moving]
    assert plain._fields[: len(FIXED)] == FIXED


@pytest.mark.parametrize("path", ["fast", "wide"])
def test_its_parts_make_it_again(path: str) -> None:
    params = FormatParams.from_format("E4M3", path=path)
    limits = edges(params)
    made = Addition.of(params, limits)
    again = Addition.put_together(made.fixed, made.moving, limits)
    assert jax.tree.map(int, again) == jax.tree.map(int, made)


@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("path", ["fast", "wide"])
@pytest.mark.parametrize("name", FORMATS)
def test_it_rounds_to_the_reference_values_of_a_scaled_grid(name: str, path: str, overflow: str) -> None:
    """On every value of half precision, infinities included, under scales that move the grid across its range."""
    x = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    x = x[~np.isnan(x)]
    kept = FormatParams.from_format(name, overflow=overflow, path=path)
    for exponent in (-6, 0, 4):
        found = np.asarray(addition_of(kept.scaled(jnp.float32(2.0**exponent))).cast(jnp.asarray(x)), np.float64)
        scaled = x.astype(np.float64) * 2.0**-exponent
        expected = quantize_reference(scaled, parse(name), overflow=overflow).astype(np.float64) * 2.0**exponent
        np.testing.assert_array_equal(found, expected)
        signed = ~np.isnan(expected)
        assert np.array_equal(np.signbit(found[signed]), np.signbit(expected[signed]))
