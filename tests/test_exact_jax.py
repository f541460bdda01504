"""Exact products in JAX: in transforms, of any axes, on eight devices, and what they refuse.

Run as a module it is the process with eight devices; the tests look at what it wrote.
"""

from __future__ import annotations

import re
import sys
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from altgrad_core.errors import InputError
from altgrad_jax import exact, exact_dot_general, exact_matmul
from tests.exact_sums import Single, mixed, product_of, same_bits
from tests.processes import results_of, write_result

FORMATS = {"one dot": "E4M3", "two": "E5M2", "many": "E7M0"}
SHAPE = (4, 40, 3)


def operands(way: str) -> tuple[Single, Single]:
    """Of one dot, of two, or of many: one operand is always in E4M3."""
    a, b = mixed(FORMATS[way], SHAPE, 0)
    return (a, b) if way == "many" else (a, mixed("E4M3", SHAPE, 1)[1])


@pytest.fixture(scope="module")
def wanted() -> dict[str, Single]:
    return {way: product_of(*operands(way)) for way in FORMATS}


def test_one_program_for_all_formats(wanted: dict[str, Single]) -> None:
    """Under strict promotion as well."""
    chex.clear_trace_counter()
    product = jax.jit(chex.assert_max_traces(exact_matmul, n=1))
    with jax.numpy_dtype_promotion("strict"):
        for way in FORMATS:
            same_bits(product(*operands(way)), wanted[way])
    assert not jax.config.jax_enable_x64


def test_under_vmap_each_goes_its_own_way(wanted: dict[str, Single]) -> None:
    a, b = (np.stack(each) for each in zip(*map(operands, FORMATS), strict=True))
    same_bits(jax.vmap(exact_matmul)(a, b), np.stack([wanted[way] for way in FORMATS]))


def test_any_axes(wanted: dict[str, Single]) -> None:
    """One batch axis, which the operands have in different places, and two contracted ones, in different orders."""
    a, b = (np.stack(each) for each in zip(*map(operands, FORMATS), strict=True))
    left = np.moveaxis(a.reshape(3, 4, 5, 8), 0, 2)
    right = np.swapaxes(b.reshape(3, 5, 8, 3), 1, 2)
    got = exact_dot_general(left, right, (((1, 3), (2, 1)), ((2,), (0,))))
    same_bits(got, np.stack([wanted[way] for way in FORMATS]))


@pytest.mark.parametrize(
    "shapes",
    [
        ((3,), (3,)),
        ((2, 3), (3,)),
        ((3,), (3, 4)),
        ((5, 2, 3), (3,)),
        ((5, 2, 3), (3, 4)),
        ((2, 3), (5, 3, 4)),
        ((6, 1, 2, 3), (5, 3, 4)),
        ((0, 3), (3, 0)),
    ],
    ids=str,
)
def test_batches_broadcast_as_in_matmul(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an ordinary product in the place of the exact one, which would be compiled for each of them."""
    monkeypatch.setattr(exact, "_in_one_program", lambda axes, length, axis_name, a, b: lax.dot_general(a, b, axes))
    a, b = (np.random.default_rng(0).integers(-8, 8, shape).astype(np.float32) for shape in shapes)
    same_bits(exact_matmul(a, b), np.matmul(a, b) + 0)


def test_in_a_custom_vjp_under_scan() -> None:
    """The caller says what the gradient is; here an exact product, too. All is known while it is compiled."""

    @jax.custom_vjp
    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return exact_matmul(a, b)

    product.defvjp(
        lambda a, b: (exact_matmul(a, b), (a, b)),
        lambda saved, g: (exact_matmul(g, saved[1].T), jnp.zeros_like(saved[1])),
    )
    a, b = operands("two")

    def total(a: jax.Array) -> jax.Array:
        return lax.scan(lambda carry, b: (carry + product(a, b).sum(), None), jnp.float32(0), b[None])[0]

    same_bits(jax.jit(jax.grad(total))(a), product_of(np.ones((4, 3), np.float32), b.T))


def test_there_is_no_gradient_rule() -> None:
    with pytest.raises(TypeError, match="have no gradient rule"):
        jax.grad(lambda a: exact_matmul(a, a).sum())(jnp.ones((2, 2)))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float8_e4m3fn, jnp.complex64, bool])
def test_refuses_other_dtypes(dtype: type) -> None:
    with pytest.raises(TypeError, match=f"takes float32, bfloat16 and float16, .* got {jnp.dtype(dtype).name}"):
        exact_matmul(jnp.ones((2, 2)), jnp.ones((2, 2), dtype))


def test_refuses_float64() -> None:
    with jax.enable_x64(True), pytest.raises(TypeError, match=r"exact_dot_general takes .* got float64"):
        exact_dot_general(jnp.ones((2, 2), jnp.float64), jnp.ones((2, 2)), (((1,), (0,)), ((), ())))


@pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((), (2,)), ((3,), (2, 3))], ids=str)
def test_refuses_shapes_that_do_not_match(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(InputError, match=re.escape(f"shapes {shapes[0]} and {shapes[1]}; expected")):
        exact_matmul(*map(jnp.ones, shapes))


def test_refuses_axes_that_do_not_match() -> None:
    with pytest.raises(InputError, match=r"expected axes \(1,\) of one to be as long as axes \(0,\) of the other"):
        exact_dot_general(jnp.ones((2, 3)), jnp.ones((2, 3)), (((1,), (0,)), ((), ())))


@pytest.mark.parametrize("specs", [(P("data"), P()), (P(), P(None, "data")), (P(), P())], ids=str)
def test_rows_and_columns_may_be_split_in_shard_map(specs: tuple[P, P]) -> None:
    """Types say over which axes a value varies, and have to say the same before a loop and after it."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    out = P(*specs[0], *specs[1][1:])
    split = jax.shard_map(exact_matmul, mesh=mesh, in_specs=specs, out_specs=out)
    assert jax.eval_shape(split, *operands("many")).shape == (4, 3)


def with_specials() -> tuple[Single, Single]:
    """Infinities and NaN in some of the parts."""
    a, b = operands("many")
    a[2, 7], a[3, -1] = np.inf, np.nan
    return a, b


def main(path: str) -> None:
    """What eight devices compute of operands that are split along the axis of the sum."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    specs = P(None, "data"), P("data")
    whole = jax.jit(exact_matmul, out_shardings=NamedSharding(mesh, P()))
    parts = jax.shard_map(partial(exact_matmul, axis_name="data"), mesh=mesh, in_specs=specs, out_specs=P())
    found = {}
    for name, pair in {**{way: operands(way) for way in FORMATS}, "specials": with_specials()}.items():
        split = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(pair, specs, strict=True)]
        found[name], found[f"{name} in parts"] = whole(*split), jax.jit(parts)(*split)
    bits = {name: np.asarray(x).view(np.uint32).tolist() for name, x in found.items()}
    write_result(path, {"devices": jax.device_count(), "bits": bits})


def test_eight_devices_have_the_bits_of_one(wanted: dict[str, Single]) -> None:
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    (result,) = results_of("tests.test_exact_jax", environment=environment)
    assert result["devices"] == 8
    found = {name: np.array(bits, np.uint32).view(np.float32) for name, bits in result["bits"].items()}
    for name, expected in {**wanted, "specials": np.asarray(exact_matmul(*with_specials()))}.items():
        same_bits(found[name], expected)
        same_bits(found[f"{name} in parts"], expected)


if __name__ == "__main__":
    main(sys.argv[-1])
