"""Somebody's own optax loop that heals itself: it clips, skips, shifts its format and goes back to a snapshot."""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from altgrad_jax import (
    EmergencyMantissaShift,
    FormatController,
    SnapshotKeeper,
    all_finite,
    get_format,
    global_norm,
    partition_relative_clip,
    quantize,
    skip_nonfinite,
)

FORMAT, STEPS = "E4M3", 160
NAN_BATCHES, POISONED_AT = range(60, 63), 110

tx = skip_nonfinite(optax.chain(partition_relative_clip(FORMAT), optax.adamw(1e-2)))


def loss_of(params, batch, target, grid):
    hidden = jax.nn.relu(quantize(batch, grid) @ quantize(params["in"], grid) + params["bias"])
    return jnp.mean((quantize(hidden, grid) @ quantize(params["out"], grid) - target) ** 2)


@partial(jax.jit, donate_argnums=0)
def train_step(state, batch, target):
    params, opt_state = state["params"], state["opt_state"]
    loss, grads = jax.value_and_grad(loss_of)(params, batch, target, get_format(opt_state))
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    finite = jnp.isfinite(loss) & opt_state.finite
    metrics = {"loss": loss, "finite": finite, "params_finite": all_finite(params), "norm": global_norm(grads)}
    return {"params": params, "opt_state": opt_state}, metrics


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "in": jax.random.normal(keys[0], (8, 32)) * 0.3,
        "bias": jnp.zeros(32),
        "out": jax.random.normal(keys[1], (32, 1)) * 0.2,
    }
    state = {"params": params, "opt_state": tx.init(params)}
    keeper = SnapshotKeeper(state, every=10, keep=2)
    controller = FormatController(FORMAT, shifter=EmergencyMantissaShift(nan_patience=3), can_roll_back=True)
    for step in range(STEPS):
        batch = jax.random.normal(jax.random.fold_in(keys[2], step), (64, 8))
        target = batch.sum(-1, keepdims=True)
        if step in NAN_BATCHES:
            batch = batch.at[0, 0].set(jnp.nan)
        if step == POISONED_AT:
            state["params"]["in"] = state["params"]["in"].at[0, 0].set(jnp.inf)
        state, metrics = train_step(state, batch, target)
        state = controller.step(step, metrics, state, keeper.roll_back)
        keeper.offer(step, state, metrics["finite"] & metrics["params_finite"] & controller.calm)
    state = controller.drain(state, keeper.roll_back)
    print(f"final loss {float(metrics['loss']):.4f} in {controller.format}")
    for event in controller.events:
        print(event.to_json())


if __name__ == "__main__":
    main()
