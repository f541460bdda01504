"""The clipper, the stall monitor and the controller in somebody's own optax loop."""

import jax
import jax.numpy as jnp
import optax

from altgrad_jax import (
    EmergencyMantissaShift,
    FormatController,
    get_format,
    global_norm,
    partition_relative_clip,
    quantize,
    skip_nonfinite,
    stall_monitor,
)

FORMAT = "E7M0"  # its clip threshold is 3e14: the clipper starts to matter after the shift to E5M2
STEPS = 60

tx = skip_nonfinite(
    optax.chain(
        partition_relative_clip(FORMAT, base_clip=1.0, overflow_threshold=0.01),
        optax.adamw(1e-2),
        stall_monitor(FORMAT),
    )
)


def loss_of(params, batch, grid):
    hidden = jax.nn.relu(quantize(batch, grid) @ quantize(params["in"], grid))
    return jnp.mean((hidden @ quantize(params["out"], grid) - batch.sum(-1, keepdims=True)) ** 2)


@jax.jit
def train_step(params, opt_state, batch):
    loss, grads = jax.value_and_grad(loss_of)(params, batch, get_format(opt_state))
    updates, opt_state = tx.update(grads, opt_state, params)
    finite = jnp.isfinite(loss) & jnp.isfinite(global_norm(grads))
    metrics = {"loss": loss, "finite": finite, "stall_rate": optax.tree.get(opt_state, "stall_rate")}
    return optax.apply_updates(params, updates), opt_state, metrics


def main() -> None:
    key_in, key_out = jax.random.split(jax.random.key(0))
    params = {"in": jax.random.normal(key_in, (8, 32)) * 0.3, "out": jax.random.normal(key_out, (32, 1)) * 0.2}
    opt_state = tx.init(params)
    # These weights are float32 masters, so the stall rate is only watched; NaN batches are what shifts the format.
    controller = FormatController(FORMAT, shifter=EmergencyMantissaShift(nan_patience=3))
    for step in range(STEPS):
        batch = jax.random.normal(jax.random.fold_in(key_in, step), (64, 8))
        if 20 <= step < 23:
            batch = batch.at[0, 0].set(jnp.nan)
        params, opt_state, metrics = train_step(params, opt_state, batch)
        opt_state = controller.step(step, metrics, opt_state)
    opt_state = controller.drain(opt_state)
    print(f"final loss {float(metrics['loss']):.4f} in {controller.format}")
    for event in controller.events:
        print(event.to_json())


if __name__ == "__main__":
    main()
