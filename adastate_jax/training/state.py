"""Training state and its update: parameters, optimizer, EMA weights, all in one pytree."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adastate_jax.config.stages import OptimizerConfig


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The Optax transformation that the settings describe."""
    rate = optax.schedules.constant_schedule(config.learning_rate)
    if config.decay_steps:
        rate = optax.schedules.cosine_decay_schedule(
            config.learning_rate, max(config.decay_steps - config.warmup_steps, 1)
        )
    if config.warmup_steps:
        warmup = optax.schedules.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
        rate = optax.schedules.join_schedules([warmup, rate], [config.warmup_steps])
    adam = optax.scale_by_adam(*config.betas)
    if config.second_moment_dtype == "bfloat16":
        adam = _with_half_second_moment(adam)
    return optax.chain(
        optax.clip_by_global_norm(config.max_gradient_norm),
        adam if config.betas[0] else _without_momentum(adam),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(rate),
    )


def _without_momentum(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adam with β1 = 0, whose momentum is the gradient itself: the state has None in its place."""

    def init(params):
        return adam.init(params)._replace(mu=None)

    def update(gradients, state, params=None):
        updates, state = adam.update(gradients, state._replace(mu=optax.tree.zeros_like(gradients)), params)
        return updates, state._replace(mu=None)

    return optax.GradientTransformation(init, update)


def _with_half_second_moment(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adam whose second moment is kept in bfloat16, rounded up or down at random, so that it is right on average.

    An update moves it by a part in a thousand at β2 = 0.999, and neighbours in bfloat16 lie up to a part in 128 apart:
    rounded to the nearest, it stalls at a quarter to half of its value. At random it scatters by some 3 %, a step by
    half of that. What is drawn depends on the number of the update alone.
    """

    def to(dtype):
        return lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)

    def init(params):
        state = adam.init(params)
        return state._replace(nu=to(jnp.bfloat16)(state.nu))

    def update(gradients, state, params=None):
        updates, state = adam.update(gradients, state._replace(nu=to(jnp.float32)(state.nu)), params)
        key = jax.random.fold_in(jax.random.key(0), state.count)
        leaves, tree = jax.tree.flatten(state.nu)
        rounded = [_rounded_at_random(x, jax.random.fold_in(key, number)) for number, x in enumerate(leaves)]
        return updates, state._replace(nu=jax.tree.unflatten(tree, rounded))

    return optax.GradientTransformation(init, update)


def _rounded_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 → bfloat16: up with the probability of the part that is cut off, so that the mean of it stays."""
    below = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) + below) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """One network in training; all of it is float32 but for counts, and a second moment that is asked for in bfloat16.

    Attributes:
        step: updates applied so far, int32 [].
        params: the network, a pytree of weights.
        optimizer: the Optax state.
        ema: exponential moving average of `params`, or None.
    """

    # What every update replaces.
    step: jax.Array
    params: Any
    optimizer: optax.OptState

    # For the outside: what later stages and samples use.
    ema: Any


def create_state(params: Any, optimizer: OptimizerConfig, ema: bool) -> TrainState:
    """The state before the first update; EMA weights are a copy, so that the state can be donated.

    Weights, moments and average are float32 whatever the dtype of `params`: in bfloat16 an update of 2e-6 would change
    few weights of a hundred, and the second moment would stall at half of its value.
    """
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    copy = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.int32(0), params, make_optimizer(optimizer).init(params), copy)


def apply_gradients(
    state: TrainState, gradients: Any, optimizer: OptimizerConfig, ema_decay: jax.Array | float = 0.0
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One AdamW update, and the EMA towards the new parameters.

    Returns:
        The new state, and `gradient_norm` before clipping.
    """
    norm = optax.tree.norm(gradients)
    updates, optimizer_state = make_optimizer(optimizer).update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = None if state.ema is None else optax.incremental_update(params, state.ema, 1.0 - ema_decay)
    return TrainState(state.step + 1, params, optimizer_state, ema), {"gradient_norm": norm}
