"""The stages of a training run: what each reads, compiles and leaves behind in the work directory."""

import contextlib
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adastate_jax.checkpoint import Checkpoints, is_finished, latest_step, load_tree, save_tree
from adastate_jax.config import Config, load_config
from adastate_jax.data.batches import example_indices, open_source, prefetch, read_batch
from adastate_jax.data.prompts import prompts as prompts_dataset
from adastate_jax.data.videos import videos as videos_dataset
from adastate_jax.data.worlds import worlds as worlds_dataset
from adastate_jax.diffusion import draw_normal
from adastate_jax.errors import UserError
from adastate_jax.generate import Frozen, abstract_frozen, load, with_shardings
from adastate_jax.media import VideoWriter, contact_sheet, loss_curves, read_metrics, side_by_side, write_image
from adastate_jax.models.dit import DiT
from adastate_jax.models.patch_codec import fit_patch_codec
from adastate_jax.models.text import ByteTokenizer, TextEncoder
from adastate_jax.sharding import batch_sharding, init_sharded, replicated, shard_batch, tree_shardings
from adastate_jax.training.dmd import critic_step, student_step
from adastate_jax.training.initialize import initialize_step, ode_sigmas, sample_trajectory
from adastate_jax.training.loop import Metrics, StopRequest, progress, run_stage
from adastate_jax.training.pretrain import pretrain_step
from adastate_jax.training.state import TrainState, create_state
from adastate_jax.video_stream import stream_batch

_CODEC_CLIPS = 256


@dataclasses.dataclass(frozen=True)
class Run:
    """What all stages of a run share.

    Attributes:
        clips: random-access source of clips with captions.
        prompts: random-access texts that distillation draws from.
        frozen: codec and text encoder.
        empty_text, negative_text: embeddings of the empty and the negative prompt [1, T, text_dim].
    """

    config: Config
    workdir: Path
    mesh: jax.sharding.Mesh
    clips: Any
    prompts: Sequence[str]
    frozen: Frozen
    empty_text: jax.Array
    negative_text: jax.Array
    metrics: Metrics
    stop: StopRequest

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.frozen.codec.latent_shape(*self.config.data.size)

    def key(self, stage: str) -> jax.Array:
        """The random key of a stage; step s uses fold_in(key, s)."""
        return _key(self.config, stage)

    def is_finished(self, stage: str) -> bool:
        """Whether a stage has made its last checkpoint."""
        steps = getattr(getattr(self.config, stage), "steps", None)
        return steps is not None and (latest_step(self.workdir / stage) or 0) >= steps

    def indices(self, stage: str, step: int, batch_size: int, num_examples: int) -> np.ndarray:
        """The examples of this process at a step of a stage."""
        salt = ("pretrain", "initialize", "distill").index(stage)
        seed = self.config.seed * 3 + salt
        return example_indices(step, batch_size, num_examples, seed, jax.process_index(), jax.process_count())

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
                self.stop,
                logging.log_every,
                logging.save_every,
                compiling,
            )


_KEYS = ("frozen", "pretrain", "trajectories", "initialize", "distill", "weights")


def _key(config: Config, name: str) -> jax.Array:
    return jax.random.fold_in(jax.random.key(config.seed), _KEYS.index(name))


def _first_call() -> Callable[[int], bool]:
    """A `compiling` of a stage whose one program is compiled at its first step, whichever that is."""
    calls = itertools.count()
    return lambda step: next(calls) == 0


# --- data and frozen parts --------------------------------------------------------------------------------------------


def open_clips(config: Config, workdir: Path):
    """The source of clips, built in the work directory where it is not there yet; or else of the run started from."""
    if config.start_from:
        return open_clips(*_start(config))
    data = config.data
    if data.kind == "worlds":
        builder = worlds_dataset(data.worlds, data.num_worlds, 1, config.seed)
    else:
        builder = videos_dataset(data.folder, data.clips)
    return open_source(builder, workdir / "data", "train")


def _start(config: Config) -> tuple[Config, Path]:
    """The run that this one starts from."""
    folder = Path(config.start_from)
    return load_config(folder / "config.json"), folder


def open_prompts(config: Config, workdir: Path, clips) -> "Texts":
    """The prompts that distillation draws from: of a file, or else the captions of the clips."""
    if config.data.prompts:
        source = open_source(prompts_dataset(config.data.prompts), workdir / "data", "train")
        return Texts(source, "prompt")
    return Texts(clips, "caption")


@dataclasses.dataclass(frozen=True)
class Texts(Sequence):
    """One text feature of a source."""

    source: Any
    feature: str

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return read_batch(self.source, [index])[self.feature][0]


def make_frozen(config: Config, workdir: Path, clips, mesh) -> Frozen:
    """The codec, fitted to some clips, and the text encoder; both are made or taken over once per work directory."""
    folder = workdir / "frozen"
    if not is_finished(folder) and config.start_from:
        save_tree(folder, make_frozen(*_start(config), clips, mesh))
    elif not is_finished(folder):
        chosen = np.linspace(0, len(clips) - 1, min(_CODEC_CLIPS, len(clips))).astype(int)
        try:
            codec = fit_patch_codec(config.codec, read_batch(clips, chosen)["video"])
        except ValueError as error:
            raise UserError(f"config.codec: {error}") from None
        encoder = init_sharded(lambda key: TextEncoder(config.text, rngs=nnx.Rngs(key)), mesh, _key(config, "frozen"))
        save_tree(folder, Frozen(codec, encoder))
    return load_tree(folder, with_shardings(abstract_frozen(config), mesh))


def _read_clips(run: Run, stage: str, batch_size: int, step: int) -> dict[str, np.ndarray]:
    batch = read_batch(run.clips, run.indices(stage, step, batch_size, len(run.clips)))
    token_ids, mask = run.tokens(batch["caption"])
    return {"video": batch["video"], "token_ids": token_ids, "mask": mask}


def _read_prompts(run: Run, stage: str, batch_size: int, step: int) -> dict[str, np.ndarray]:
    texts = [run.prompts[int(i)] for i in run.indices(stage, step, batch_size, len(run.prompts))]
    token_ids, mask = run.tokens(texts)
    return {"token_ids": token_ids, "mask": mask}


# --- stages -----------------------------------------------------------------------------------------------------------


def _compile_step(run: Run, function, state: Any):
    """Jits a training step (state, …) → (state, scalars): the state keeps its shardings and is donated.

    state: its shapes.
    """
    shardings = tree_shardings(state, run.mesh)
    return jax.jit(function, donate_argnums=0, out_shardings=(shardings, replicated(run.mesh)))


def abstract_states(config: Config) -> dict[str, Any]:
    """Shapes of what each stage trains, under the names of the stages."""

    def model():
        return DiT(config.model, rngs=nnx.Rngs(0))

    def state(optimizer, ema):
        return jax.eval_shape(lambda: create_state(model(), optimizer, ema))

    return {
        "pretrain": state(config.pretrain.optimizer, True),
        "initialize": state(config.initialize.optimizer, True),
        "distill": {"student": state(config.distill.student, True), "critic": state(config.distill.critic, False)},
    }


def _trained(run: Run, stage: str, part: str) -> Any:
    """Weights that an earlier stage left behind."""
    config, workdir = run.config, run.workdir
    while latest_step(workdir / stage) is None:
        if not config.start_from:
            raise UserError(f"{workdir}: stage {stage} has not run; put it into config.stages before the later ones")
        config, workdir = _start(config)
    like = abstract_states(config)[stage]
    for name in part.split("/"):
        like = like[name] if isinstance(like, dict) else getattr(like, name)
    return load_tree(workdir / stage / str(latest_step(workdir / stage)), with_shardings(like, run.mesh), part)


def pretrain(run: Run) -> None:
    """Trains the bidirectional teacher on clips."""
    config, key = run.config.pretrain, run.key("pretrain")

    def create() -> TrainState:
        return init_sharded(
            lambda key: create_state(DiT(run.config.model, rngs=nnx.Rngs(key)), config.optimizer, True),
            run.mesh,
            run.key("weights"),
        )

    def step_function(state: TrainState, frozen: Frozen, empty_text, batch, step):
        latents = frozen.codec.encode(batch["video"].astype(jnp.float32) / 127.5 - 1)
        text = frozen.text_encoder.encode(batch["token_ids"], batch["mask"])
        return pretrain_step(state, latents, text, empty_text, jax.random.fold_in(key, step), config)

    compiled = _compile_step(run, step_function, abstract_states(run.config)["pretrain"])
    read = functools.partial(_read_clips, run, "pretrain", config.batch_size)
    run.run_stage(
        "pretrain",
        create,
        lambda state, batch, step: compiled(state, run.frozen, run.empty_text, batch, jnp.int32(step)),
        read,
        config.steps,
        _first_call(),
    )


def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def initialize(run: Run) -> None:
    """Trains the causal student to land on the teacher's ODE trajectories."""
    config, stream, key = run.config.initialize, run.config.stream, run.key("initialize")
    captions = Texts(run.clips, "caption")
    abstract = abstract_states(run.config)["initialize"]
    trajectories = _make_trajectories(run, captions)

    def create() -> TrainState:
        return jax.jit(
            lambda params: create_state(_copy(params), config.optimizer, True),
            out_shardings=tree_shardings(abstract, run.mesh),
        )(_trained(run, "pretrain", "ema"))

    def step_function(state: TrainState, frozen: Frozen, batch, step):
        text = frozen.text_encoder.encode(batch["token_ids"], batch["mask"])
        return initialize_step(state, batch["trajectory"], text, jax.random.fold_in(key, step), config, stream)

    def read(step: int) -> dict[str, np.ndarray]:
        chosen = run.indices("initialize", step, config.batch_size, config.trajectories)
        token_ids, mask = run.tokens([captions[int(i) % len(captions)] for i in chosen])
        return {"trajectory": trajectories(chosen), "token_ids": token_ids, "mask": mask}

    compiled = _compile_step(run, step_function, abstract)
    run.run_stage(
        "initialize",
        create,
        lambda state, batch, step: compiled(state, run.frozen, batch, jnp.int32(step)),
        read,
        config.steps,
        _first_call(),
    )


def _make_trajectories(run: Run, captions: Sequence[str]) -> Callable[[np.ndarray], np.ndarray]:
    """Draws the teacher's trajectories into files, each whole or absent, and returns how to read them.

    Trajectory i is for caption i (modulo their number), from noise of key i: a missing file is made again, the same.

    Returns:
        Trajectory numbers [B] → kept states [B, T + 1, N, H, W, C] float32.
    """
    config, stream = run.config.initialize, run.config.stream
    try:
        sigmas = ode_sigmas(stream, config.ode_steps)
    except ValueError as error:
        raise UserError(f"config.initialize: {error}") from None
    keep_every = config.ode_steps // len(stream.sigmas)
    shape = (run.config.data.num_frames, *run.latent_shape)
    key = run.key("trajectories")
    folder = run.workdir / "trajectories"
    folder.mkdir(exist_ok=True)
    per_file = config.batch_size
    num_files = -(-config.trajectories // per_file)

    @functools.partial(jax.jit, out_shardings=batch_sharding(run.mesh))
    def draw(teacher, frozen, null_text, numbers, token_ids, mask):
        noise = jax.vmap(lambda i: draw_normal(jax.random.fold_in(key, i), shape))(numbers)
        text = frozen.text_encoder.encode(token_ids, mask)
        return sample_trajectory(teacher, noise, text, null_text, sigmas, config.guidance_scale, keep_every)

    def file(index: int) -> Path:
        return folder / f"{index:06d}.npy"

    missing = [i for i in range(num_files) if not file(i).is_file()]
    if missing:
        teacher = _trained(run, "pretrain", "ema")
        with progress("trajectories (compiling)", num_files * per_file, (num_files - len(missing)) * per_file) as bar:
            for index in missing:
                run.stop.check()
                numbers = np.arange(index * per_file, (index + 1) * per_file)
                token_ids, mask = run.tokens([captions[int(i) % len(captions)] for i in numbers])
                batch = shard_batch((numbers.astype(np.int32), token_ids, mask), run.mesh)
                drawn = np.asarray(draw(teacher, run.frozen, run.negative_text, *batch))
                if not np.isfinite(drawn).all():
                    raise UserError(
                        f"{folder}: the teacher's trajectories are not finite; pretrain longer or lower "
                        "config.initialize.guidance_scale"
                    )
                partial = folder / ".partial.npy"
                np.save(partial, drawn)
                partial.replace(file(index))
                bar.set_description("trajectories")
                bar.update(per_file)

    def read(numbers: np.ndarray) -> np.ndarray:
        rows = []
        for number in numbers:
            index, row = divmod(int(number), per_file)
            try:
                rows.append(np.load(file(index), mmap_mode="r")[row])
            except (OSError, ValueError) as error:
                raise UserError(f"{file(index)}: damaged ({error}); remove it and run again") from None
        return np.stack(rows)

    return read


def distill(run: Run) -> None:
    """Distils the teacher into the student on the student's own rollouts."""
    config, stream, key = run.config.distill, run.config.stream, run.key("distill")
    teacher = _trained(run, "pretrain", "ema")
    abstract = abstract_states(run.config)["distill"]

    def create() -> dict[str, TrainState]:
        def states(student, teacher):
            return {
                "student": create_state(_copy(student), config.student, True),
                "critic": create_state(_copy(teacher), config.critic, False),
            }

        shardings = tree_shardings(abstract, run.mesh)
        return jax.jit(states, out_shardings=shardings)(_trained(run, "initialize", "ema"), teacher)

    def update_student(student, critic, teacher, frozen, null_text, batch, step):
        text = frozen.text_encoder.encode(batch["token_ids"], batch["mask"])
        update_key = jax.random.fold_in(jax.random.fold_in(key, step), 0)
        return student_step(
            student, critic, teacher, text, null_text, step, update_key, config, stream, run.latent_shape
        )

    def update_critic(critic, student, frozen, batch, step):
        text = frozen.text_encoder.encode(batch["token_ids"], batch["mask"])
        update_key = jax.random.fold_in(jax.random.fold_in(key, step), 1)
        return critic_step(critic, student, text, update_key, config, stream, run.latent_shape)

    compiled_student = _compile_step(run, update_student, abstract["student"])
    compiled_critic = _compile_step(run, update_critic, abstract["critic"])
    uncompiled = {False, True}  # a step of the critic alone, a step of both

    def compiling(step: int) -> bool:
        kind = config.updates_student(step)
        compiles = kind in uncompiled
        uncompiled.discard(kind)
        return compiles

    def step_function(state, batch, step):
        student, critic, number = state["student"], state["critic"], jnp.int32(step)
        scalars = {}
        if config.updates_student(step):
            student, scalars = compiled_student(
                student, critic.params, teacher, run.frozen, run.negative_text, batch, number
            )
        critic, critic_scalars = compiled_critic(critic, student.params, run.frozen, batch, number)
        scalars = {**scalars, **{f"critic_{name}": value for name, value in critic_scalars.items()}}
        return {"student": student, "critic": critic}, scalars

    read = functools.partial(_read_prompts, run, "distill", config.batch_size)
    run.run_stage("distill", create, step_function, read, config.steps, compiling)


def sample(run: Run) -> None:
    """Writes videos of several anchors, side by side and each by itself, a contact sheet and the loss curves."""
    settings = run.config.sample
    folder = run.workdir / "samples"
    model = load(run.workdir, mesh=run.mesh)
    prompts = list(settings.prompts) or _distinct(run.prompts, settings.count)
    num_frames = settings.horizon * run.config.distill.rollout_frames
    streams = [stream_batch(model, prompts, settings.seed, num_frames, anchor) for anchor in settings.anchors]
    rows: dict[tuple[int, str], list[np.ndarray]] = {}
    paths = [folder / f"{index:02d}.mp4" for index in range(len(prompts))]
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(VideoWriter(path)) for path in paths]
        alone = {
            (index, name): stack.enter_context(VideoWriter(folder / name / path.name))
            for index, path in enumerate(paths)
            for name in settings.anchors
        }
        bar = stack.enter_context(progress("sample (compiling)", num_frames, unit="frame"))
        for panels in zip(*streams, strict=True):  # each [B, frames of a chunk, height, width, 3]
            for index, writer in enumerate(writers):
                named = {name: panel[index] for name, panel in zip(settings.anchors, panels, strict=True)}
                writer.write(side_by_side(named, settings.scale))
                for name, frames in named.items():
                    alone[index, name].write(frames)
                    rows.setdefault((index, name), []).append(frames)
            bar.update(panels[0].shape[1])
            bar.set_description("sample")
            run.stop.check()
    sheet = [(f"{name}: {prompts[index]}", np.concatenate(parts)) for (index, name), parts in rows.items()]
    write_image(folder / "contact_sheet.png", contact_sheet(sheet, max(settings.scale // 2, 1)))
    (folder / "prompts.txt").write_text(
        "".join(f"{path.name}\t{text}\n" for path, text in zip(paths, prompts, strict=True))
    )
    metrics = run.workdir / "metrics.jsonl"
    if metrics.is_file():
        loss_curves(read_metrics(metrics), run.workdir / "loss_curves.png")
    print(f"videos: {folder}/*.mp4, {folder}/*/*.mp4, {folder}/contact_sheet.png", file=sys.stderr)


def _distinct(texts: Sequence[str], count: int) -> list[str]:
    """The first `count` different texts."""
    found: dict[str, None] = {}
    for text in texts:
        found.setdefault(text)
        if len(found) == count:
            break
    return list(found)


STAGES = {"pretrain": pretrain, "initialize": initialize, "distill": distill, "sample": sample}
