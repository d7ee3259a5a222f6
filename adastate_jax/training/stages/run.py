"""What all stages of a run share: its settings, its work directory, and what earlier stages left there."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from adastate_jax.checkpoint import Checkpoints, latest_step
from adastate_jax.config.networks import trained_sizes
from adastate_jax.config.run import Config
from adastate_jax.data.batches import example_indices, prefetch
from adastate_jax.errors import UserError
from adastate_jax.models.dit import DiT
from adastate_jax.models.text import ByteTokenizer
from adastate_jax.sharding import local_rows, replicated, shard_batch, tree_shardings
from adastate_jax.training.frozen import Frozen, with_shardings
from adastate_jax.training.loop import run_stage
from adastate_jax.training.metrics import Metrics
from adastate_jax.training.networks import load_weights
from adastate_jax.training.state import create_state


@dataclasses.dataclass(frozen=True)
class Run:
    """What all stages of a run share.

    Attributes:
        clips: random-access source of clips with captions, or `LatentClips`; None for none.
        captions: texts that trajectories are drawn for.
        prompts, critic_prompts: texts that distillation's updates draw from; None for the critic is the student's.
        frozen: codec and text encoder.
        empty_text, negative_text: embeddings of the empty and the negative prompt [1, T, text_dim].
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

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.config.latent_shape

    def key(self, stage: str) -> jax.Array:
        """The random key of a stage; step s uses fold_in(key, s)."""
        return key_of(self.config, stage)

    def network(self, name: str) -> DiT:
        """The frozen teacher, as its configuration says; or critic or student as they enter distillation, float32."""
        return load_weights(self.config, self.workdir, name, self.mesh, trained=name != "teacher")

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
    ) -> Any:
        """`loop.run_stage` with this run's settings."""
        logging = self.config.logging
        with Checkpoints(self.workdir / name, logging.keep) as checkpoints:
            return run_stage(
                name,
                with_shardings(abstract_states(self.config)[name], self.mesh),
                create,
                step_function,
                self.batches(read),
                steps,
                checkpoints,
                self.metrics,
                logging.log_every,
                logging.save_every,
                compiling,
            )


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
        network = trained_sizes(config.network(name))
        return jax.eval_shape(lambda: create_state(DiT(network, rngs=nnx.Rngs(0)), optimizer, ema))

    return {
        "pretrain": state("teacher", config.pretrain.optimizer, True),
        "initialize": state("student", config.initialize.optimizer, True),
        "distill": {
            "student": state("student", config.distill.student, True),
            "critic": state("critic", config.distill.critic, False),
        },
    }
