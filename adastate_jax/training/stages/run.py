"""What all stages of a run share: its settings, its work directory, and what earlier stages left there."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from adastate_jax.checkpoint import Checkpoints, latest_step
from adastate_jax.config.networks import NETWORKS, trained_sizes
from adastate_jax.config.run import Config
from adastate_jax.config.stages import RANDOM, OptimizerConfig
from adastate_jax.data.batches import example_indices, prefetch
from adastate_jax.errors import UserError
from adastate_jax.models.adapters import create_adapters
from adastate_jax.models.dit import DiT
from adastate_jax.models.text import ByteTokenizer
from adastate_jax.sharding import init_sharded, local_rows, replicated, shard_batch, tree_shardings
from adastate_jax.training.frozen import Frozen, abstract_adapters, abstract_network, with_shardings
from adastate_jax.training.loop import run_stage
from adastate_jax.training.metrics import Metrics
from adastate_jax.training.networks import load_weights
from adastate_jax.training.profile import Profile
from adastate_jax.training.state import TrainState, create_state


@dataclasses.dataclass(frozen=True)
class Run:
    """What all stages of a run share.

    Attributes:
        clips: random-access source of clips with captions, or `LatentClips`; None for none.
        captions: texts that trajectories are drawn for.
        prompts, critic_prompts: texts that distillation's updates draw from; None for the critic is the student's.
        frozen: codec and text encoder.
        empty_text, negative_text: embeddings of the empty and the negative prompt [1, T, text_dim].
        profile: which steps are traced.
    """

    config: Config
    workdir: Path
    mesh: jax.sharding.Mesh
    clips: Any
    captions: Sequence[str]
    prompts: Sequence[str]
    critic_prompts: Sequence[str] | None
    frozen: Frozen
    empty_text: jax.Array
    negative_text: jax.Array
    metrics: Metrics
    profile: Profile | None = None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.config.latent_shape

    def key(self, stage: str) -> jax.Array:
        """The random key of a stage; step s uses fold_in(key, s)."""
        return key_of(self.config, stage)

    def network(self, name: str) -> DiT:
        """The frozen teacher, as its configuration says; or critic or student as they enter distillation, float32."""
        return load_weights(self.config, self.workdir, name, self.mesh, trained=name != "teacher")

    def base(self, name: str, stage: str) -> DiT | None:
        """The frozen weights that a stage trains adapters of critic or student of; None where it trains all weights."""
        if not getattr(self.config, name).lora.rank:
            return None
        start = stage == "initialize"
        return load_weights(self.config, self.workdir, name, self.mesh, trained=False, start=start)

    def new_state(self, name: str, optimizer: OptimizerConfig, ema: bool, stage: str) -> TrainState:
        """Critic or student before a stage's first update: its weights, or adapters that change nothing yet."""
        if (lora := getattr(self.config, name).lora).rank:
            network = self.config.network(name)
            key = jax.random.fold_in(self.key(stage), _ADAPTERS + NETWORKS.index(name))

            def adapters(key: jax.Array) -> TrainState:
                return create_state(create_adapters(network, lora, key), optimizer, ema)

            return init_sharded(adapters, self.mesh, key)
        function = functools.partial(create_state, optimizer=optimizer, ema=ema)
        start = stage == "initialize"
        if start and self.config.initialize.weights == RANDOM:
            network = trained_sizes(self.config.network(name))
            return init_sharded(lambda key: function(DiT(network, rngs=nnx.Rngs(key))), self.mesh, self.key("weights"))
        weights = load_weights(self.config, self.workdir, name, self.mesh, trained=True, start=start)
        abstract = jax.eval_shape(function, weights)
        return jax.jit(function, out_shardings=tree_shardings(abstract, self.mesh))(weights)

    def refuse_removed(self) -> None:
        """Raises UserError if the work directory is gone: what is written on would be a folder of half a run."""
        if not (self.workdir / "config.json").is_file():
            raise UserError(f"{self.workdir}: was removed during the run; run again to begin anew")

    def is_finished(self, stage: str) -> bool:
        """Whether a stage has made its last checkpoint."""
        steps = getattr(getattr(self.config, stage), "steps", None)
        return steps is not None and (latest_step(self.workdir / stage) or 0) >= steps

    def indices(self, stage: str, step: int, batch_size: int, num_examples: int) -> np.ndarray:
        """The examples of the rows that this process's devices hold at a step of a stage."""
        salt = ("pretrain", "initialize", "distill").index(stage)
        seed = self.config.seed * 3 + salt
        return example_indices(step, batch_size, num_examples, seed, local_rows(batch_size, self.mesh))

    def tokens(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and mask [B, T]."""
        return ByteTokenizer(self.config.text.text_length).tokenize(list(texts))

    def batches(self, read: Callable[[int], Any]) -> Callable[[int], Iterator[tuple[int, Any]]]:
        """First step → prefetched (step, sharded global batch)."""
        return lambda first: prefetch(lambda step: shard_batch(read(step), self.mesh), first)

    def run_stage(
        self,
        name: str,
        create: Callable[[], Any],
        step_function,
        read: Callable[[int], Any],
        steps: int,
        compiling: Callable[[int], bool],
        like: Any = None,
    ) -> Any:
        """`loop.run_stage` with this run's settings.

        like: shapes of the state with shardings, where they are more than `abstract_states` has of the stage.
        """
        logging = self.config.logging
        with Checkpoints(self.workdir / name, logging.keep) as checkpoints:
            return run_stage(
                name,
                with_shardings(abstract_states(self.config)[name], self.mesh) if like is None else like,
                create,
                step_function,
                self.batches(read),
                steps,
                checkpoints,
                self.metrics,
                logging.log_every,
                logging.save_every,
                compiling,
                self.profile,
            )


_ADAPTERS = 2**31  # added to a network's number, of the keys that adapters are drawn with: no step is as large

KEYS = ("frozen", "pretrain", "trajectories", "initialize", "distill", "weights")


def key_of(config: Config, name: str) -> jax.Array:
    """The random key of a part of a run, one of `KEYS`."""
    return jax.random.fold_in(jax.random.key(config.seed), KEYS.index(name))


def first_call() -> Callable[[int], bool]:
    """A `compiling` of a stage whose one program is compiled at its first step, whichever that is."""
    calls = itertools.count()
    return lambda step: next(calls) == 0


def compile_step(run: Run, function, state: Any):
    """Jits a training step (state, …) → (state, scalars): the state keeps its shardings and is donated.

    state: its shapes.
    """
    shardings = tree_shardings(state, run.mesh)
    return jax.jit(function, donate_argnums=0, out_shardings=(shardings, replicated(run.mesh)))


def abstract_states(config: Config) -> dict[str, Any]:
    """Shapes of what each stage trains, under the names of the stages."""

    def state(name, optimizer, ema):
        network, lora = trained_sizes(config.network(name)), getattr(config, name).lora
        weights = abstract_adapters(network, lora) if lora.rank else abstract_network(network)
        return jax.eval_shape(lambda weights: create_state(weights, optimizer, ema), weights)

    return {
        "pretrain": state("teacher", config.pretrain.optimizer, True),
        "initialize": state("student", config.initialize.optimizer, True),
        "distill": {
            "student": state("student", config.distill.student, True),
            "critic": state("critic", config.distill.critic, False),
        },
    }
