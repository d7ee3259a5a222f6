"""The real programs by their shapes alone: a steady chunk of the stream, its decoders, the updates of distillation.

Nothing is allocated; every shape says where its parts lie on the mesh of the chips that the program is compiled for.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from adastate_jax.benchmarking import flops
from adastate_jax.benchmarking.earlier_workloads import EARLIER, earlier_workload
from adastate_jax.benchmarking.flops import Flops
from adastate_jax.benchmarking.sections import TRAINING
from adastate_jax.benchmarking.shapes import (
    Mesh,
    Workload,
    base_of,
    device_bytes,
    key_shape,
    require_divided,
    state_of,
    text_shape,
    transformer,
    whole,
)
from adastate_jax.benchmarking.targets import Target, make_target_mesh
from adastate_jax.config.networks import trained_sizes
from adastate_jax.config.run import Config
from adastate_jax.config.stages import DistillConfig
from adastate_jax.errors import UserError
from adastate_jax.generation.loading import decode_checked
from adastate_jax.models.adapters import join
from adastate_jax.models.attention import KeyValues
from adastate_jax.models.dit import DiT, DiTConfig
from adastate_jax.models.tiny_vae import TinyVAE
from adastate_jax.models.vae import VAE
from adastate_jax.models.wan_codec import WanCodec
from adastate_jax.sharding import RULES, replicated
from adastate_jax.streaming.carry import RolloutCarry, initial_carry, seed_keys
from adastate_jax.streaming.rollout import stream_step
from adastate_jax.streaming.schedule import StreamConfig, phase_of
from adastate_jax.training.dmd import (
    Draws,
    critic_segment_step,
    critic_step,
    draw_update,
    student_segment_step,
    student_step,
)
from adastate_jax.training.long_rollout import (
    CarriedRollout,
    Part,
    empty_carried,
    place_of,
    with_carried_shardings,
)
from adastate_jax.training.state import TrainState


def make_workload(name: str, config: Config, teacher: DiTConfig, mesh: Mesh) -> Workload:
    """A program of a configuration, split over a mesh.

    Args:
        name: one of `sections.PROGRAMS`, or of `EARLIER`.
        teacher: its sizes, where they are not those of the configuration.
        mesh: of a target's chips, see `mesh_over`; an abstract one is enough to count what lies where.

    Raises:
        UserError: it is none of the configuration's, or cannot be split so.
    """
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        if name == "stream":
            return _stream(config, mesh)
        if name in EARLIER:
            return earlier_workload(name, config, teacher, mesh)
        return _update(name, config, teacher, mesh) if name in TRAINING else _decoder(name, config, mesh)


def mesh_over(config: Config, target: Target, program: str) -> jax.sharding.Mesh:
    """The configured mesh; where that is a single device and the target is more, all of them along one axis.

    That axis is `fsdp` in training, and `model`, which splits heads, in a stream.

    Raises:
        UserError: the configured mesh has another number of devices, or heads cannot be split over them.
    """
    extents, devices, training = dataclasses.asdict(config.mesh), len(target.devices), program in TRAINING
    if math.prod(extents.values()) == 1:
        extents["fsdp" if training else "model"] = devices
        if not training and config.model.num_heads % devices:
            raise UserError(f"{target.name}: {config.model.num_heads} heads are not split over {devices} devices")
    return make_target_mesh(target, **extents)


def wan_14b(smaller: DiTConfig) -> DiTConfig:
    """The sizes of Wan2.1-T2V-14B; all else as in the smaller network.  Source: wan/configs/wan_t2v_14B.py."""
    return dataclasses.replace(smaller, dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)


# --- streaming --------------------------------------------------------------------------------------------------------


def _carried(config: Config, mesh: Mesh) -> tuple[RolloutCarry, KeyValues]:
    """Carry and text keys and values of a running stream, split as the programs before this one left them."""

    def fit(axis: str, size: int) -> tuple[str, ...] | None:
        return RULES[axis] if size % math.prod(mesh.shape[name] for name in RULES[axis]) == 0 else None

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = jax.P(None, fit("batch", x.shape[1]), None, fit("heads", x.shape[3])) if x.ndim == 5 else jax.P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    model = config.model
    height, width, _ = config.latent_shape
    carry = jax.eval_shape(lambda: initial_carry(model, config.stream, seed_keys(0, 1), height, width))
    text = jax.ShapeDtypeStruct(
        (model.num_layers, 1, model.text_length, model.num_heads, model.head_dim), jnp.dtype(model.dtype)
    )
    return jax.tree.map(place, carry), KeyValues(place(text), place(text))


def _codec(name: str, config: Config, mesh: Mesh) -> tuple[WanCodec, Any]:
    """A decoder, and its cache of a running stream."""
    network, settings = {"wan": (VAE, config.vae), "tiny": (TinyVAE, config.tiny_vae)}[name]
    decoder = jax.eval_shape(lambda: network(settings, rngs=nnx.Rngs(0), parts=("decoder",)))
    height, width, _ = config.latent_shape
    cache = jax.eval_shape(lambda codec: codec.decode_start(1, height, width), WanCodec(decoder, None))
    return whole(WanCodec(decoder, None), mesh), whole(cache, mesh)


def _stream(config: Config, mesh: Mesh) -> Workload:
    """A steady chunk: all denoising steps and the clean pass. The configured decoder lies beside it."""
    steady = config.stream.num_fill_chunks
    carry, text = _carried(config, mesh)
    phase = phase_of(steady, config.stream)
    frame_tokens = config.model.frame_tokens(*config.latent_shape[:2])
    work = flops.chunk_pass_flops(config.model, config.stream, steady, frame_tokens)
    return Workload(
        "stream",
        mesh,
        stream_step,
        (transformer(config.model, mesh), carry, text, config.stream, config.latent_shape, phase),
        donated=device_bytes(carry),
        resident=0 if config.decoder == "patch" else device_bytes(_codec(config.decoder, config, mesh)),
        flops=work.times(len(config.stream.sigmas) + 1),
    )


def _decoder(name: str, config: Config, mesh: Mesh) -> Workload:
    """The latents of a steady chunk into 8-bit frames. The transformer and its stream lie beside it."""
    if config.decoder == "patch":
        raise UserError(f"--programs {name}: config.decoder is patch, which is one product; set it to wan or tiny")
    codec, cache = _codec(name, config, mesh)
    frames = config.stream.chunk_frames
    shape = (1, frames, *config.latent_shape)
    latents = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=replicated(mesh))
    settings = {"wan": config.vae, "tiny": config.tiny_vae}[name]
    work = flops.decoder_flops(settings, *config.latent_shape[:2], frames)
    return Workload(
        name,
        mesh,
        decode_checked,
        (codec, latents, cache, False),
        donated=device_bytes(cache),
        resident=device_bytes((transformer(config.model, mesh), _carried(config, mesh))),
        flops=Flops(work * mesh.size, 0),  # each device decodes the same
    )


# --- training ---------------------------------------------------------------------------------------------------------


Bases = dict[str, DiT | None]  # by network, what its adapters are of
NO_BASES: Bases = {"student": None, "critic": None}


def scored_part(config: Config) -> Part | None:
    """The part of a rollout that most updates score: a steady one; None is the whole of it."""
    return _steady_part(config.distill, config.stream)


@functools.cache
def _steady_part(settings: DistillConfig, stream: StreamConfig) -> Part | None:
    parts = [place.part for number in range(200) if (place := place_of(number, settings, stream, 0))]
    return max(parts, key=lambda part: (part.change is None, part.first_chunk), default=None)


def with_rollout(state: TrainState, config: Config, mesh: Mesh) -> Any:
    """A network's state, and beside it an empty rollout where updates go on with one."""
    if not config.distill.continue_rollout:
        return state
    empty, like = _carried_rollout(config, mesh)
    return state, jax.jit(empty, out_shardings=jax.tree.map(lambda x: x.sharding, like))()


def _carried_rollout(config: Config, mesh: Mesh) -> tuple[Callable[[], CarriedRollout], CarriedRollout]:
    """What makes the rollout that updates go on with, and its shapes."""
    sizes = config.network("student")
    empty = functools.partial(empty_carried, sizes, config.distill, config.stream, config.latent_shape)
    return empty, with_carried_shardings(jax.eval_shape(empty), mesh)


def _draws(config: Config, key: jax.Array, text: jax.Array, step: jax.Array) -> Draws:
    """All that an update draws; where it scores a part of a rollout, of a place that the compiler does not know."""
    settings = text.shape[0], config.distill, config.stream, config.latent_shape
    part = scored_part(config)
    return draw_update(key, *settings) if part is None else draw_update(key, *settings, part, part.first_chunk + step)


def critic_update(config: Config) -> Callable:
    """(state, key, text embeddings [B, T, text_dim], student, bases) → (state, scalars), with all that it draws.

    The state is that of `with_rollout`. bases: by network the frozen weights that its adapters are of, or None.
    """
    goes_on, settings = config.distill.continue_rollout, (config.distill, config.stream)

    def update(state: Any, key: jax.Array, text: jax.Array, student: Any, bases: Bases = NO_BASES):
        draws = _draws(config, key, text, (state[0] if goes_on else state).step)
        given = join(student, bases["student"]), text, draws, *settings, bases["critic"]
        return (critic_segment_step if goes_on else critic_step)(state, *given)

    return update


def student_update(config: Config) -> Callable:
    """(state, key, text embeddings [B, T, text_dim], critic, teacher, bases) → (state, scalars), as `critic_update`.

    The first prompt serves as the negative one.
    """
    goes_on, settings = config.distill.continue_rollout, (config.distill, config.stream)

    def update(state: Any, key: jax.Array, text: jax.Array, critic: Any, teacher: DiT, bases: Bases = NO_BASES):
        step, critic = (state[0] if goes_on else state).step, join(critic, bases["critic"])
        given = critic, teacher, text, text[:1], step, _draws(config, key, text, step), *settings, bases["student"]
        return (student_segment_step if goes_on else student_step)(state, *given)

    return update


def _update(name: str, config: Config, teacher_sizes: DiTConfig, mesh: Mesh) -> Workload:
    """An update of distillation. All three networks and both optimizers lie on the devices throughout."""
    require_divided("distill", config, mesh)
    settings = config.distill
    critic_sizes, sizes = (trained_sizes(config.network(network)) for network in ("critic", "student"))
    student = state_of("student", config, settings.student, True, mesh)
    critic = state_of("critic", config, settings.critic, False, mesh)
    teacher = transformer(teacher_sizes, mesh)
    bases = {network: base_of(network, config, mesh) for network in ("student", "critic")}
    loras = {f"{network}_lora": getattr(config, network).lora for network in bases}
    text, key = text_shape(settings.batch_size, config, mesh), key_shape(mesh)
    rollout = (config.stream, settings, sizes.frame_tokens(*config.latent_shape[:2]))
    if name == "student":
        own, update, others = student, student_update(config), (critic.params, teacher)
        work = flops.student_flops(sizes, critic_sizes, teacher_sizes, *rollout, **loras)
    else:
        own, update, others = critic, critic_update(config), (student.params,)
        work = flops.critic_flops(sizes, critic_sizes, *rollout, **loras)
    held = device_bytes((student, critic, teacher)) - device_bytes((own, others))
    if any(base is not None for base in bases.values()):
        others = *others, bases
    if settings.continue_rollout:
        own = own, _carried_rollout(config, mesh)[1]
    shardings = jax.tree.map(lambda x: x.sharding, own), replicated(mesh)
    function = jax.jit(update, donate_argnums=0, out_shardings=shardings)
    turns = (len(config.stream.sigmas) + 3) / 2  # 1 … all denoising steps, and the clean pass
    arguments, work = (own, key, text, *others), work.times(settings.batch_size)
    return Workload(name, mesh, function, arguments, device_bytes(own), held, work, unknown_turns=turns)
