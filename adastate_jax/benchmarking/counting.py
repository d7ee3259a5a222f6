"""What training holds and computes on chips that are not here, counted, and the meshes that this can be split over.

Counting says what lies on a device by name, which is what a refusal needs; it knows nothing of what a compiler keeps
besides.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from adastate_jax.benchmarking.flops import Flops
from adastate_jax.benchmarking.shapes import base_of, device_bytes, transformer
from adastate_jax.benchmarking.targets import Chip
from adastate_jax.benchmarking.workloads import make_workload, scored_part
from adastate_jax.config.run import Config
from adastate_jax.config.stages import num_chunks
from adastate_jax.console import progress
from adastate_jax.errors import UserError
from adastate_jax.models.dit import REMAT_POLICIES, DiTConfig
from adastate_jax.sharding import MESH_AXES, RULES
from adastate_jax.streaming.schedule import layout_of, phase_of

# Of a device's memory, what counting may fill: what was compiled held 10 to 40 % more than was counted of it.
COUNTED_SHARE = 0.8


@dataclasses.dataclass(frozen=True)
class Count:
    """What a program takes, counted.

    Attributes:
        program: see `programs_of`.
        parts: bytes per device by name, of the moment at which they are most.
        flops: of all devices together.
    """

    program: str
    parts: Mapping[str, int]
    flops: Flops

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


def programs_of(config: Config) -> dict[str, int]:
    """The programs of a run's stages by how often they run; where no stage trains, those of distillation.

    They are `pretrain`; `trajectories`, each run of which draws as many as a step of `initialize` reads; `initialize`;
    and distillation's `critic` and `student`.
    """
    found, (first, causal, last) = {}, (config.pretrain, config.initialize, config.distill)
    if "pretrain" in config.stages:
        found["pretrain"] = first.steps
    if "initialize" in config.stages:
        if causal.targets == "trajectories":
            found["trajectories"] = -(-causal.trajectories // causal.batch_size)
        found["initialize"] = causal.steps
    if "distill" in config.stages or not found:
        found |= {"critic": last.steps, "student": -(-last.steps // last.critic_ratio)}
    return found


def stage_of(program: str) -> str:
    """The stage that a program is of."""
    return {"pretrain": "pretrain", "trajectories": "initialize", "initialize": "initialize"}.get(program, "distill")


def count(program: str, config: Config, teacher: DiTConfig) -> Count:
    """Counts a program of training on the configured mesh. No compiler is asked, and no device need be described.

    Exact are weights, moments and averages. Of what a step makes, the large things are counted: the rollout's record,
    what the backward pass keeps of every block, the gradients, and what one layer holds at once.

    Args:
        program: see `programs_of`.

    Raises:
        UserError: the mesh does not divide the batch.
    """
    extents = dataclasses.asdict(config.mesh)
    mesh = AbstractMesh(tuple(extents.values()), tuple(extents), axis_types=(AxisType.Auto,) * len(extents))
    workload = make_workload(program, config, teacher, mesh)
    if program == "trajectories":
        parts = {"teacher: weights": device_bytes(workload.arguments[0])}
        return Count(program, parts | _made_of_trajectories(config, teacher, extents), workload.flops)
    own, _, _, *others = workload.arguments
    goes_on = stage_of(program) == "distill" and config.distill.continue_rollout
    own, carried = own if goes_on else (own, None)
    trained = {"pretrain": "teacher", "initialize": "student"}.get(program, program)
    adapters = getattr(config, trained).lora.rank
    moments = device_bytes(own) - device_bytes(own.params)
    parts = {
        f"{trained}: {'weights of adapters' if adapters else 'weights'}": device_bytes(own.params),
        f"{trained}: moments and average": moments,
        "gradients": device_bytes(own.params),
    }
    rest = device_bytes([x for x in others if not isinstance(x, jax.ShapeDtypeStruct)]) + workload.resident
    if adapters:  # their frozen weights count among the others
        parts[f"{trained}: frozen weights"] = device_bytes(base_of(trained, config, mesh))
        rest -= parts[f"{trained}: frozen weights"]
    if stage_of(program) == "distill":
        other = "student" if program == "critic" else "critic"
        parts["teacher: weights"] = device_bytes(transformer(teacher, mesh))
        parts[f"{other}: weights, moments and average"] = rest - parts["teacher: weights"]
    elif rest:
        parts["teacher: weights"] = rest
    if carried is not None:
        parts["rollout that goes on"] = device_bytes(carried)
    made = {"pretrain": _made_of_pretrain, "initialize": _made_of_initialize}.get(program)
    found = made(config, teacher, extents) if made else _made(program, config, teacher, extents)
    return Count(program, parts | found, workload.flops)


def _frame_tokens(stage: str, config: Config, extents: Mapping[str, int]) -> float:
    """Tokens of a latent frame of all samples that a device computes at once."""
    settings = getattr(config, stage)
    samples = settings.batch_size / settings.accumulate / math.prod(extents[axis] for axis in RULES["batch"])
    return samples * config.model.frame_tokens(*config.latent_shape[:2]) / extents["context"]


def _layer(sizes: DiTConfig, tokens: float, extents: Mapping[str, int]) -> float:
    """Queries, keys, values, output; a float32 norm; the feed-forward network's inner width."""
    width = jnp.dtype(sizes.dtype).itemsize
    return tokens * (width * (5 * sizes.dim + 2 * sizes.ffn_dim / extents["model"]) + 8 * sizes.dim)


def _backward(sizes: DiTConfig, kept: float, at_once: float, extents: Mapping[str, int]) -> dict[str, float]:
    """Bytes of a backward pass that keeps something of so many tokens in every block, and computes so many at once."""
    ffn = sizes.ffn_dim / extents["model"]
    of_a_token = {
        "none": 10 * sizes.dim + 2 * ffn,
        "dots": 7 * sizes.dim + ffn,
        "attention": 3 * sizes.dim,
        "block": sizes.dim,
    }[sizes.remat]
    width = jnp.dtype(sizes.dtype).itemsize
    return {
        f"kept for the backward pass (remat {sizes.remat})": width * sizes.num_layers * kept * of_a_token,
        "one layer at once": _layer(sizes, at_once, extents),
    }


def _whole_bytes(parts: Mapping[str, float]) -> dict[str, int]:
    return {name: int(size) for name, size in parts.items()}


def _made_of_pretrain(config: Config, teacher: DiTConfig, extents: Mapping[str, int]) -> dict[str, int]:
    tokens = config.clip_frames * _frame_tokens("pretrain", config, extents)
    return _whole_bytes(_backward(teacher, tokens, tokens, extents))


def _made_of_trajectories(config: Config, teacher: DiTConfig, extents: Mapping[str, int]) -> dict[str, int]:
    """A pass of the teacher, and the states that are kept in float32, of whole clips: `context` does not split them."""
    frames, settings = config.trajectory_frames, config.initialize
    samples = settings.batch_size / math.prod(extents[axis] for axis in RULES["batch"])
    latents = samples * frames * math.prod(config.latent_shape) * 4
    # All samples of a file at once: there are no micro-batches.
    tokens = frames * _frame_tokens("initialize", config, extents) * settings.accumulate
    return _whole_bytes(
        {
            "one layer of the teacher at once": _layer(teacher, tokens, extents),
            "trajectories": (len(config.stream.sigmas) + 1) * latents,
        }
    )


def _made_of_initialize(config: Config, teacher: DiTConfig, extents: Mapping[str, int]) -> dict[str, int]:
    """`stream` and `state` go chunk by chunk, but keep something of every pass of every chunk."""
    settings, stream, sizes = config.initialize, config.stream, config.network("student")
    of_trajectories = settings.targets == "trajectories"
    frame = _frame_tokens("initialize", config, extents)
    clip = frame * (config.trajectory_frames if of_trajectories else config.clip_frames)
    passes = {"noisy": 1, "state": len(stream.sigmas) + 1}.get(settings.context, 2)
    by_chunks = settings.context in ("stream", "state")
    chunk = frame * (stream.chunk_frames + (stream.anchor.state_frames if settings.context == "state" else 0))
    at_once = {"stream": 2 * chunk, "state": chunk}.get(settings.context, passes * clip)
    parts = _backward(sizes, passes * clip, at_once, extents)
    if by_chunks:
        width = jnp.dtype(sizes.dtype).itemsize
        parts["keys and values of the clean clip"] = 2 * width * sizes.num_layers * clip * sizes.dim / extents["model"]
    if settings.targets == "consistency":
        parts["one layer of the teacher at once"] = _layer(teacher, at_once, extents)
    return _whole_bytes(parts)


def _made(program: str, config: Config, teacher: DiTConfig, extents: Mapping[str, int]) -> dict[str, int]:
    """Bytes per device of what an update of distillation makes, where they are most."""
    model, stream = config.network(program), config.stream
    frame = _frame_tokens("distill", config, extents)
    clip, part = config.distill.clip_frames * frame, scored_part(config)
    first, size = (part.first_chunk, part.chunks) if part else (0, num_chunks(config.distill.rollout_frames, stream))
    chunks = range(first, first + size)
    live = frame * sum(len(layout_of(phase_of(chunk, stream), stream).live) for chunk in chunks)
    # That one gradient passes through: the student's is taken chunk by chunk.
    tokens = live / len(chunks) if program == "student" else clip
    passes = config.distill.passes_with_gradient if program == "student" else 1
    backward = _backward(model, passes * tokens, tokens, extents)
    if program == "critic":
        return _whole_bytes(backward)
    keys_values = 2 * jnp.dtype(model.dtype).itemsize * model.num_layers * model.dim / extents["model"]
    record = {"rollout's keys and values": live * keys_values}
    if part and part.first_chunk and not part.goes_on:
        record["the cache before the window"] = frame * (stream.anchor.frames + stream.past_frames) * keys_values
    # The scores come before the backward pass; what they hold is gone then.
    scores = record | {"one layer of the teacher at once": _layer(teacher, 2 * clip, extents)}
    return _whole_bytes(max(scores, record | backward, key=lambda parts: sum(parts.values())))


# --- the search -------------------------------------------------------------------------------------------------------


def variants(config: Config, devices: int) -> Iterator[Config]:
    """The configuration on every mesh of so many devices, with every way to recompute, and fewer samples at once.

    What does not divide is left out.
    """
    stages = sorted({stage_of(program) for program in programs_of(config)})
    batches = [getattr(config, stage).batch_size for stage in stages]
    accumulations = [
        dataclasses.replace(
            config,
            **{stage: dataclasses.replace(getattr(config, stage), accumulate=parts) for stage in stages},
        )
        for parts in range(1, max(batches) + 1)
        if not any(batch % parts for batch in batches)
    ]
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    for extents in itertools.product(sizes, repeat=len(MESH_AXES)):
        if math.prod(extents) != devices:
            continue
        for base, remat in itertools.product(accumulations, REMAT_POLICIES):
            mesh = dataclasses.replace(base.mesh, **dict(zip(MESH_AXES, extents, strict=True)))
            try:
                model = dataclasses.replace(base.model, remat=remat)
                yield dataclasses.replace(base, mesh=mesh, model=model)
            except ValueError:  # a mesh that divides no heads, for one
                continue


def changes(asked: Config, other: Config) -> dict[str, Any]:
    """The fields in which a variant differs, as they are set on a command line."""
    found = {
        f"config.mesh.{axis}": getattr(other.mesh, axis)
        for axis in MESH_AXES
        if getattr(asked.mesh, axis) != getattr(other.mesh, axis)
    }
    if asked.model.remat != other.model.remat:
        found["config.model.remat"] = other.model.remat
    for stage in ("pretrain", "initialize", "distill"):
        if getattr(asked, stage) != getattr(other, stage):
            found[f"config.{stage}.accumulate"] = getattr(other, stage).accumulate
    return found


def fitting(config: Config, teacher: DiTConfig, chip: Chip, devices: int) -> list[tuple[Config, int]]:
    """The variants that fit by counting, and the bytes counted; see `_counted_variants` for their order."""
    room = chip.memory * COUNTED_SHARE
    counted = _counted_variants(config, teacher, list(variants(config, devices)))
    return [(variant, most) for variant, most in counted if most <= room]


def spread(config: Config, teacher: DiTConfig, chip: Chip, devices: int) -> Config:
    """A configuration of one device on the mesh of so many that suits it best; where none fits, that which holds least.

    Raises:
        UserError: no mesh of so many devices divides it.
    """
    counted: list[tuple[Config, int]] = []
    every = list(variants(config, devices))
    for further in (False, True):
        chosen = [variant for variant in every if bool(_besides_mesh(config, variant)) == further]
        counted += _counted_variants(config, teacher, chosen)
        fits = [variant for variant, most in counted if most <= chip.memory * COUNTED_SHARE]
        if fits:  # further changes are not wanted
            return fits[0]
    if not counted:
        raise UserError(f"config.mesh: no mesh of {devices} devices divides the networks and the batch; take fewer")
    return min(counted, key=lambda item: item[1])[0]


def _besides_mesh(asked: Config, other: Config) -> list[str]:
    """The fields in which a variant differs beside its mesh."""
    return [field for field in changes(asked, other) if not field.startswith("config.mesh.")]


def _counted_variants(config: Config, teacher: DiTConfig, chosen: list[Config]) -> list[tuple[Config, int]]:
    """Variants and the bytes that are counted of each; those first that change least, then the fastest.

    A mesh is no change where the configuration has one device. Among equally fast ones come first those that split
    fewer activations: less is exchanged.
    """
    found = []
    free = math.prod(dataclasses.asdict(config.mesh).values()) == 1
    programs = programs_of(config)
    for variant in _watched(chosen):
        if variant.model.num_heads % variant.mesh.model or teacher.num_heads % variant.mesh.model:
            continue
        try:
            counts = [count(program, variant, teacher) for program in programs]
        except UserError:  # the batch is not divided
            continue
        most = max(each.bytes for each in counts)
        work = sum(each.flops.total for each in counts)
        changed = _besides_mesh(config, variant) if free else changes(config, variant)
        found.append((len(changed), work, variant.mesh.model * variant.mesh.context, variant, most))
    return [(variant, most) for *_, variant, most in sorted(found, key=lambda item: item[:3])]


def _watched(all_variants: list[Config]) -> Iterator[Config]:
    """Each of them, with a progress bar."""
    with progress("plan: count meshes", len(all_variants), unit="variant") as bar:
        for variant in all_variants:
            yield variant
            bar.update(1)
