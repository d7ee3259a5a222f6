"""What distillation holds and computes on chips that are not here, counted, and the meshes that this can be split over.

Counting says what lies on a device by name, which is what a refusal needs; it knows nothing of what a compiler keeps
besides.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from adastate_jax.benchmarking.flops import Flops
from adastate_jax.benchmarking.sections import TRAINING
from adastate_jax.benchmarking.targets import Chip
from adastate_jax.benchmarking.workloads import device_bytes, make_workload, scored_part
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
    """What an update takes, counted.

    Attributes:
        program: `critic` or `student`.
        parts: bytes per device by name, of the moment at which they are most.
        flops: of all devices together.
    """

    program: str
    parts: Mapping[str, int]
    flops: Flops

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


def count(program: str, config: Config, teacher: DiTConfig) -> Count:
    """Counts an update of distillation on the configured mesh. No compiler is asked, and no device need be described.

    Exact are weights, moments and averages. Of what a step makes, the large things are counted: the rollout's record,
    what the backward pass keeps of every block, the gradients, and what one layer holds at once.

    Raises:
        UserError: the mesh does not divide the batch.
    """
    extents = dataclasses.asdict(config.mesh)
    mesh = AbstractMesh(tuple(extents.values()), tuple(extents), axis_types=(AxisType.Auto,) * len(extents))
    workload = make_workload(program, config, teacher, mesh)
    own, _, _, *others = workload.arguments
    own, carried = own if config.distill.continue_rollout else (own, None)
    moments = device_bytes(own) - device_bytes(own.params)
    parts = {
        f"{program}: weights": device_bytes(own.params),
        f"{program}: moments and average": moments,
        "other networks": device_bytes(others) + workload.resident,
        "gradients": device_bytes(own.params),
    }
    if carried is not None:
        parts["rollout that goes on"] = device_bytes(carried)
    return Count(program, parts | _made(program, config, teacher, extents), workload.flops)


def _made(program: str, config: Config, teacher: DiTConfig, extents: Mapping[str, int]) -> dict[str, int]:
    """Bytes per device of what a step makes, where they are most."""
    model, stream = config.model, config.stream
    width, heads = jnp.dtype(model.dtype).itemsize, extents["model"]
    samples = (
        config.distill.batch_size / config.distill.accumulate / math.prod(extents[axis] for axis in RULES["batch"])
    )
    frame = samples * model.frame_tokens(*config.latent_shape[:2]) / extents.get("context", 1)
    clip, part = config.distill.clip_frames * frame, scored_part(config)
    first, size = (part.first_chunk, part.chunks) if part else (0, num_chunks(config.distill.rollout_frames, stream))
    chunks = range(first, first + size)
    live = frame * sum(len(layout_of(phase_of(chunk, stream), stream).live) for chunk in chunks)
    # That one gradient passes through: the student's is taken chunk by chunk.
    tokens = live / len(chunks) if program == "student" else clip
    passes = config.distill.passes_with_gradient if program == "student" else 1

    def layer(sizes: DiTConfig, tokens: float) -> float:  # queries, keys, values, output; a float32 norm; feed-forward
        return tokens * (width * (5 * sizes.dim + 2 * sizes.ffn_dim / heads) + 8 * sizes.dim)

    kept = {
        "none": 10 * model.dim + 2 * model.ffn_dim / heads,
        "dots": 7 * model.dim + model.ffn_dim / heads,
        "attention": 3 * model.dim,
        "block": model.dim,
    }
    of_blocks = passes * width * model.num_layers * tokens * kept[model.remat]
    backward = {
        f"kept for the backward pass (remat {model.remat})": of_blocks,
        "one layer at once": layer(model, tokens),
    }
    if program == "critic":
        return {name: int(size) for name, size in backward.items()}
    keys_values = 2 * width * model.num_layers * model.dim / heads
    record = {"rollout's keys and values": live * keys_values}
    if part and part.first_chunk and not part.goes_on:
        record["the cache before the window"] = frame * (stream.anchor.frames + stream.past_frames) * keys_values
    # The scores come before the backward pass; what they hold is gone then.
    scores = record | {"one layer of the teacher at once": layer(teacher, 2 * clip)}
    largest = max(scores, record | backward, key=lambda parts: sum(parts.values()))
    return {name: int(size) for name, size in largest.items()}


# --- the search -------------------------------------------------------------------------------------------------------


def variants(config: Config, devices: int) -> Iterator[Config]:
    """The configuration on every mesh of so many devices, with every way to recompute, and fewer samples at once.

    What does not divide is left out.
    """
    batch = config.distill.batch_size
    accumulations = [
        dataclasses.replace(config, distill=dataclasses.replace(config.distill, accumulate=parts))
        for parts in range(1, batch + 1)
        if batch % parts == 0
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
    if asked.distill != other.distill:
        found["config.distill.accumulate"] = other.distill.accumulate
    return found


def fitting(config: Config, teacher: DiTConfig, chip: Chip, devices: int) -> list[tuple[Config, int]]:
    """The variants that fit by counting, and the bytes counted; see `_counted_variants` for their order."""
    room = chip.memory * COUNTED_SHARE
    return [(variant, most) for variant, most in _counted_variants(config, teacher, devices) if most <= room]


def spread(config: Config, teacher: DiTConfig, chip: Chip, devices: int) -> Config:
    """A configuration of one device on the mesh of so many that suits it best; where none fits, that which holds least.

    Raises:
        UserError: no mesh of so many devices divides it.
    """
    counted = _counted_variants(config, teacher, devices)
    if not counted:
        raise UserError(f"config.mesh: no mesh of {devices} devices divides the networks and the batch; take fewer")
    fits = (variant for variant, most in counted if most <= chip.memory * COUNTED_SHARE)
    return next(fits, min(counted, key=lambda item: item[1])[0])


def _counted_variants(config: Config, teacher: DiTConfig, devices: int) -> list[tuple[Config, int]]:
    """Variants and the bytes that are counted of each; those first that change least, then the fastest.

    A mesh is no change where the configuration has one device. Among equally fast ones come first those that split
    fewer activations: less is exchanged.
    """
    found = []
    free = math.prod(dataclasses.asdict(config.mesh).values()) == 1
    all_variants = list(variants(config, devices))
    for variant in _watched(all_variants):
        if variant.model.num_heads % variant.mesh.model or teacher.num_heads % variant.mesh.model:
            continue
        try:
            counts = [count(program, variant, teacher) for program in TRAINING]
        except UserError:  # the batch is not divided
            continue
        most = max(each.bytes for each in counts)
        work = sum(each.flops.total for each in counts)
        changed = [field for field in changes(config, variant) if not (free and field.startswith("config.mesh."))]
        found.append((len(changed), work, variant.mesh.model * variant.mesh.context, variant, most))
    return [(variant, most) for *_, variant, most in sorted(found, key=lambda item: item[:3])]


def _watched(all_variants: list[Config]) -> Iterator[Config]:
    """Each of them, with a progress bar."""
    with progress("plan: count meshes", len(all_variants), unit="variant") as bar:
        for variant in all_variants:
            yield variant
            bar.update(1)
