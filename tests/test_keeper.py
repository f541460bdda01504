"""The keeper of snapshots in a loop of one's own: on the device and on the host, and nothing compiles again."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from altgrad_core.errors import InputError
from altgrad_jax import SnapshotKeeper, reset_moments

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("device", "host")

Tree = dict[str, jax.Array]


def state_of(value: float) -> Tree:
    return {"w": jnp.full(2, value, jnp.float32), "count": jnp.int32(value)}


def count(state: Tree) -> int:
    return int(state["count"])


@pytest.mark.parametrize("where", PLACES)
def test_snapshots_are_taken_at_multiples_and_kept_if_good(where: Any) -> None:
    keeper = SnapshotKeeper(state_of(0), every=5, keep=3, where=where)
    goods = {10: False, 20: jnp.asarray(False), 25: jnp.asarray(True)}
    for step in range(1, 33):
        keeper.offer(step, state_of(step), goods.get(step, True))
    assert count(keeper.roll_back(state_of(-1), back=2)) == 25  # of 15, 25 and 30; it stands for 30 as well
    assert [count(keeper.roll_back(state_of(-1), back)) for back in (1, 2, 3)] == [25, 25, 15]
    assert [count(keeper.roll_back(state_of(-1), back)) for back in (1, None)] == [15, 15]
    keeper.offer(35, state_of(35))
    assert count(keeper.roll_back(state_of(-1), back=1)) == 35


@pytest.mark.parametrize("where", PLACES)
def test_the_start_stands_for_all_until_there_are_better_ones(where: Any) -> None:
    keeper = SnapshotKeeper(state_of(7), every=1, where=where)
    keeper.offer(1, state_of(8), good=jnp.asarray(False))
    assert count(keeper.roll_back(state_of(-1))) == 7


@pytest.mark.parametrize("where", PLACES)
def test_what_comes_back_is_a_copy_and_may_be_donated(where: Any) -> None:
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = state_of(0)
    keeper = SnapshotKeeper(state, every=1, where=where)
    for number in range(1, 4):
        state = step(state)
        keeper.offer(number, state)
    for _ in range(3):
        state = keeper.roll_back(step(state))
        assert (count(state), state["w"].tolist()) == (2, [2.0, 2.0])


@pytest.mark.parametrize("where", PLACES)
def test_new_moments_after_a_rollback(where: Any) -> None:
    tx = optax.adam(lambda count: 0.1 / (1 + count))
    params = {"w": jnp.ones(2)}
    state = {"params": params, "optimizer": tx.init(params)}
    keeper = SnapshotKeeper(state, where=where)
    updates, optimizer = tx.update(params, state["optimizer"], params)
    now = {"params": optax.apply_updates(params, updates), "optimizer": optimizer}
    back = keeper.roll_back(now)
    moments, schedule = reset_moments(tx, now["optimizer"], back["params"])
    assert back["params"]["w"].tolist() == [1.0, 1.0]
    assert (moments.mu["w"].tolist(), int(moments.count), int(schedule.count)) == ([0.0, 0.0], 0, 1)


def test_what_cannot_be_kept() -> None:
    for settings, told in (
        ({"every": 0}, "every is 0; expected an integer of at least 1"),
        ({"keep": 0}, "keep is 0; expected an integer of at least 1"),
        ({"where": "disk"}, "where is 'disk'; expected 'device' or 'host'"),
    ):
        with pytest.raises(InputError, match=told):
            SnapshotKeeper(state_of(0), **settings)
    for where in PLACES:
        keeper = SnapshotKeeper(state_of(0), where=where)
        with pytest.raises(InputError, match="back is 3; expected 1, the newest snapshot, to 2"):
            keeper.roll_back(state_of(1), back=3)


OTHERS: list[tuple[Any, str]] = [
    ({"w": jnp.ones(2)}, r"the state has nothing at count; expected int32\[\], as the snapshots have"),
    ({**state_of(1), "moments": jnp.ones(3)}, r"the state has float32\[3\] at moments; expected nothing, as the"),
    ({**state_of(1), "w": jnp.ones(3)}, r"the state has float32\[3\] at w; expected float32\[2\], as the snapshots"),
    ({**state_of(1), "w": jnp.float32(1)}, r"the state has float32\[\] at w; expected float32\[2\]"),  # it broadcasts
    ({**state_of(1), "w": jnp.ones(2, jnp.bfloat16)}, r"the state has bfloat16\[2\] at w; expected float32\[2\]"),
    (jnp.ones(2), r"the state has nothing at count; expected int32\[\]"),
    (optax.EmptyState(), "the state has nothing at count"),
]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize(("other", "told"), OTHERS)
def test_a_state_that_is_not_alike_is_neither_kept_nor_brought_back(where: Any, other: Any, told: str) -> None:
    keeper = SnapshotKeeper(state_of(7), every=1, where=where)
    for call in (lambda: keeper.offer(1, other), lambda: keeper.roll_back(other)):
        with pytest.raises(InputError, match=told):
            call()
    keeper.offer(1, {"w": np.full(2, 8, np.float32), "count": 8})  # of the same types
    assert [count(keeper.roll_back(state_of(-1), back)) for back in (1, 2)] == [8, 7]


@pytest.mark.parametrize("where", PLACES)
def test_nodes_of_another_kind_are_told_by_the_structure(where: Any) -> None:
    keeper = SnapshotKeeper((jnp.ones(2), jnp.ones(2)), every=1, where=where)
    with pytest.raises(InputError, match=r"the state has the structure .*; expected that of the snapshots: "):
        keeper.offer(1, [jnp.ones(2), jnp.ones(2)])  # pyrefly: ignore[bad-argument-type]


ON_TWO_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from altgrad_jax import SnapshotKeeper, Snapshots, rollback, snapshot

mesh = Mesh(np.array(jax.devices()), ("data",))
split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

def fresh(mixed):
    draw = jax.random.normal(jax.random.key(1), (8, 4))
    state = {
        "float8": draw.astype(jnp.float8_e5m2), "bfloat16": draw.astype(jnp.bfloat16), "flag": jnp.asarray(True),
        "weak": jnp.asarray(0.5), "key": jax.random.key(3), "old key": jax.random.PRNGKey(4),
        "empty": jnp.zeros((0, 2)),
    }
    # A jitted step commits its results to the devices of its arguments, but a state need not come from one.
    return state | ({"split": jax.device_put(draw, split), "whole": jax.device_put(draw, whole)} if mixed else {})

def looks(state):
    return [(x.shape, x.dtype, getattr(x, "weak_type", None), x.committed, x.sharding) for x in jax.tree.leaves(state)]

def bits(state):
    raw = jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, state)
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(raw)]

@jax.jit
def seen(state):
    return jax.tree.map(lambda x: x, state)

for where in ("device", "host"):
    for mixed in (False, True):
        state = fresh(mixed)
        keeper = SnapshotKeeper(state, every=1, where=where)
        keeper.offer(1, state, jnp.asarray(True))
        keeper.offer(2, state, jnp.asarray(False))
        for back in (None, 1):
            again = keeper.roll_back(state, back)
            assert looks(again) == looks(state), (where, mixed, looks(again), looks(state))
            assert bits(again) == bits(state)
        seen(state)
        compiled = seen._cache_size()
        seen(again)
        assert seen._cache_size() == compiled

kept = jax.jit(Snapshots.of, static_argnums=1)({"w": jax.device_put(jnp.ones((8, 4)), split)}, 3)
kept = jax.jit(snapshot, donate_argnums=0)(kept, {"w": jax.device_put(jnp.zeros((8, 4)), split)}, True)
assert kept.slots["w"].sharding.spec == P(None, "data"), kept.slots["w"].sharding
state, _ = jax.jit(rollback)(kept, {"w": jax.device_put(jnp.ones((8, 4)), split)}, True)
assert state["w"].sharding == split
print("the same")
"""


def test_dtypes_keys_and_shardings_come_back_on_two_devices() -> None:
    settings = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ON_TWO_DEVICES],
        cwd=ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the same\n"
