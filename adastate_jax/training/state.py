"""Training state and its update: parameters, optimizer, EMA weights, all in one pytree."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax


def require_positive(config, *fields: str) -> None:
    """Raises ValueError naming the first of these fields that is not above zero."""
    for field in fields:
        if getattr(config, field) <= 0:
            raise ValueError(f"{field} must be positive, got {getattr(config, field)}")


def require_decay(config) -> None:
    """Raises ValueError if the field `ema_decay` is none."""
    if not 0 <= config.ema_decay < 1:
        raise ValueError(f"ema_decay must lie in [0, 1), got {config.ema_decay}")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with clipping; the defaults are Self-Forcing's for the student.

    Attributes:
        learning_rate: peak learning rate.
        betas: of AdamW.
        weight_decay: decoupled.
        max_gradient_norm: global norm that gradients are clipped to.
        warmup_steps: of linear warm-up from zero.
        decay_steps: total steps of a cosine decay to zero, warm-up included; 0 keeps the rate constant.
    """

    learning_rate: float = 2e-6
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.01
    max_gradient_norm: float = 10.0
    warmup_steps: int = 0
    decay_steps: int = 0

    def __post_init__(self):
        require_positive(self, "learning_rate", "max_gradient_norm")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        if min(self.weight_decay, self.warmup_steps, self.decay_steps) < 0:
            raise ValueError("weight_decay, warmup_steps and decay_steps must not be negative")

    def make(self) -> optax.GradientTransformation:
        """The Optax transformation."""
        rate = optax.schedules.constant_schedule(self.learning_rate)
        if self.decay_steps:
            rate = optax.schedules.cosine_decay_schedule(
                self.learning_rate, max(self.decay_steps - self.warmup_steps, 1)
            )
        if self.warmup_steps:
            warmup = optax.schedules.linear_schedule(0.0, self.learning_rate, self.warmup_steps)
            rate = optax.schedules.join_schedules([warmup, rate], [self.warmup_steps])
        adam = optax.scale_by_adam(*self.betas)
        return optax.chain(
            optax.clip_by_global_norm(self.max_gradient_norm),
            adam if self.betas[0] else _without_momentum(adam),
            optax.add_decayed_weights(self.weight_decay),
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """One network in training.

    Attributes:
        step: updates applied so far, int32 [].
        params: the network, a pytree of weights.
        optimizer: the Optax state.
        ema: exponential moving average of `params`, or None.
    """

    step: jax.Array
    params: Any
    optimizer: optax.OptState
    ema: Any


def create_state(params: Any, optimizer: OptimizerConfig, ema: bool) -> TrainState:
    """The state before the first update; EMA weights are a copy, so that the state can be donated."""
    copy = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.int32(0), params, optimizer.make().init(params), copy)


def apply_gradients(
    state: TrainState, gradients: Any, optimizer: OptimizerConfig, ema_decay: jax.Array | float = 0.0
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One AdamW update, and the EMA towards the new parameters.

    Returns:
        The new state, and `gradient_norm` before clipping.
    """
    norm = optax.tree.norm(gradients)
    updates, optimizer_state = optimizer.make().update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = None if state.ema is None else optax.incremental_update(params, state.ema, 1.0 - ema_decay)
    return TrainState(state.step + 1, params, optimizer_state, ema), {"gradient_norm": norm}
