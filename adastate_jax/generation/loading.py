"""Models to generate with: loading them, and what lies between prompts, latents and frames."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adastate_jax.config.files import parse_config
from adastate_jax.config.run import WAN_NEGATIVE_PROMPT, Config, DataConfig
from adastate_jax.data.videos import ClipConfig
from adastate_jax.errors import UserError, one_line, shown
from adastate_jax.fields import to_dict
from adastate_jax.generation.embeddings import Embed, StoredTextEncoder, random_embed
from adastate_jax.generation.placement import Placement, find_device, in_eight_bits, spared, stream_mesh
from adastate_jax.generation.shipped import find_model
from adastate_jax.generation.trained import load_bundle, load_run, trained_config
from adastate_jax.models.attention import KeyValues
from adastate_jax.models.dit import DiT, DiTConfig
from adastate_jax.models.patch_codec import PatchCodec
from adastate_jax.models.text import ByteTokenizer, TextConfig
from adastate_jax.models.tiny_vae import TinyVAE, TinyVAEConfig
from adastate_jax.models.vae import VAE, VAEConfig
from adastate_jax.models.wan_codec import WanCodec
from adastate_jax.sharding import init_sharded, make_mesh, refuse_too_large, replicated
from adastate_jax.streaming.carry import RolloutCarry, initial_carry
from adastate_jax.streaming.continuation import max_given_frames
from adastate_jax.streaming.presets import named_stream
from adastate_jax.streaming.rollout import rollout
from adastate_jax.streaming.schedule import StreamConfig
from adastate_jax.training.frozen import embed_prompts
from adastate_jax.weights.parts import has_part, load_part, part_config

# What converted networks are taken to be where no configuration says it: see configs/wan_1_3b.py.
_WAN_SIZE = ClipConfig(height=480, width=832, num_frames=81)
_HALF = {"param_dtype": "bfloat16", "dtype": "bfloat16"}


@dataclasses.dataclass(frozen=True, repr=False)
class Model:
    """All that stands between a prompt and a video.

    Attributes:
        config: sizes and settings.
        student: the causal transformer.
        codec: between latents and video.
        embed: texts → embeddings [B, T, text_dim], zero past each text.
        fits: whether nothing of a text is cut off.
        mesh: devices that the transformer is split over.
        origin: where it is from, for people.
        codec_mesh: the codec's devices; None is `mesh`.
    """

    config: Config
    student: DiT
    codec: PatchCodec | WanCodec
    embed: Embed
    fits: Callable[[str], bool]
    mesh: jax.sharding.Mesh
    origin: str = "memory"
    codec_mesh: jax.sharding.Mesh | None = None

    def __post_init__(self):
        if self.codec_mesh is None:
            object.__setattr__(self, "codec_mesh", self.mesh)

    @property
    def name(self) -> str:
        """What people call it, which says nothing of the machine: of its file or folder, the name."""
        return Path(self.origin.split(",")[0]).stem

    def __repr__(self) -> str:
        """Where it is from, its networks, and how it streams: a line each."""
        config, network, stream = self.config, self.student.config, self.config.stream
        weights = sum(leaf.size for leaf in jax.tree.leaves(self.student))
        height, width = config.data.size
        anchor = to_dict(stream)["anchor"]
        settings = ", ".join(f"{name}={value}" for name, value in anchor.items() if name != "name")
        steps = ", ".join(f"{step:g}" for step in stream.denoising_steps)
        return (
            f"Model from {one_line(self.origin)}\n"
            f"  transformer of {weights / 1e6:.3g} M weights ({network.num_layers} layers of {network.dim}, "
            f"{network.quantization or network.param_dtype}); videos of {height}×{width} pixels by the "
            f"{config.decoder} decoder\n"
            f"  anchor {anchor['name']}{f' ({settings})' if settings else ''}; chunks of {stream.chunk_frames} latent "
            f"frames, a window of {stream.past_frames}, denoising steps {steps}"
        )


# --- loading ----------------------------------------------------------------------------------------------------------


def load(
    path: str | Path | None = None,
    config: Config | str | Path | None = None,
    *,
    decoder: str | None = None,
    random_weights: bool = False,
    text_cache: str | Path | None = None,
    mesh: jax.sharding.Mesh | None = None,
    text_mesh: jax.sharding.Mesh | None = None,
    weights: str | None = None,
    devices: int | None = None,
    decoder_device: str | None = None,
    low_memory: bool = False,
) -> Model:
    """Loads a model to generate with.

    Args:
        path: a folder that `train` wrote: its distilled student, or the initialised one before that. Or a file that
            `bundle` made of such a folder; `tiny`, where no folder has that name, is the one that ships with this
            package. Or a folder of networks that `convert` wrote: `transformer`, `text_encoder`, `vae` or `tiny_vae`,
            and a `tokenizer.json`.
        config: of converted networks: a configuration or a file of one, which the networks must match. None takes
            what the networks say, at 480×832 with AdaState's stream. What was trained here brings its own.
        decoder: `wan` or `tiny` instead of the configuration's.
        random_weights: makes a model of `config` alone, with random networks and, instead of a text encoder, random
            embeddings of each prompt: it runs as the real one does, and shows noise.
        text_cache: folder that keeps the embeddings of prompts; None is `text_cache` in `path`.
        mesh: devices that the weights are split over; None is what `config` says, or one device.
        text_mesh: devices that a converted text encoder is split over; None is the host's processor, which encodes
            while the accelerator generates.
        weights, devices, decoder_device, low_memory: see `Placement`; `devices` instead of `mesh`.

    Raises:
        UserError: a file or folder is missing or damaged, or does not match the others; or there is no such device, or
            not so many, or they do not divide the transformer.

    >>> load("tiny").config.data.kind
    'worlds'
    >>> model = load(config="configs/tiny.py", random_weights=True)
    >>> model.config.latent_shape  # a frame is one latent of 48 channels
    (1, 1, 48)
    >>> load("nowhere")
    Traceback (most recent call last):
    adastate_jax.errors.UserError: nowhere: no such folder; name one that train or convert wrote, or tiny
    """
    placement = Placement(weights, devices, decoder_device, low_memory)
    if mesh is not None and devices is not None:
        raise UserError("devices: the mesh says how many; leave one of them out")
    if isinstance(config, str | Path):
        config = parse_config([f"--config={config}"])
    if config is not None and decoder is not None:
        try:
            config = dataclasses.replace(config, decoder=decoder)
        except ValueError as error:
            raise UserError(f"decoder {decoder}: {error}") from None
    if random_weights:
        if path is not None or config is None:
            raise UserError("random_weights: needs a configuration, and no folder")
        return _quantized(_random_model(_Places(placement, mesh, text_mesh), config), placement)
    if path is None:
        raise UserError("name a folder that train or convert wrote, or tiny")
    path = find_model(path)
    places = _Places(placement, mesh, text_mesh)
    if has_part(path, "transformer"):
        text_cache = Path(text_cache) if text_cache else path / "text_cache"
        return _quantized(_load_parts(places, path, config, decoder, text_cache), placement)
    if config or decoder:
        raise UserError(f"{path}: what was trained here has its own configuration and decoder; name no others")
    return _quantized(_load_trained(places, path, text_cache), placement)


@dataclasses.dataclass(frozen=True)
class _Places:
    """Which devices each network comes to lie on.

    Attributes:
        given, text: meshes that the caller named for the transformer and for a converted text encoder.
    """

    placement: Placement
    given: jax.sharding.Mesh | None
    text: jax.sharding.Mesh | None

    def transformer(self, config: Config | None, trained_here: bool = False) -> jax.sharding.Mesh:
        if self.given is not None:
            return self.given
        if self.placement.devices is not None:
            return stream_mesh(config, self.placement.devices, trained_here)
        try:
            return make_mesh(**dataclasses.asdict(config.mesh)) if config else make_mesh()
        except ValueError as error:
            raise UserError(f"config.mesh: {error}") from None

    def codec(self, transformer: jax.sharding.Mesh) -> jax.sharding.Mesh:
        name = self.placement.decoder_device
        return transformer if name is None else make_mesh(devices=[find_device(name)])

    def settings(self, config: Config) -> Config:
        return spared(config) if self.placement.low_memory else config

    def text_encoder(self, folder: Path, config: Config, cache: Path) -> StoredTextEncoder:
        return StoredTextEncoder(folder, config.text, cache, self.text, keep=not self.placement.low_memory)


def _quantized(model: Model, placement: Placement) -> Model:
    if placement.quantization is None:
        return model
    return dataclasses.replace(model, student=in_eight_bits(model.student, placement.quantization, model.mesh))


def _load_parts(places: _Places, folder: Path, config: Config | None, decoder: str | None, text_cache: Path) -> Model:
    """The model of a folder of converted networks."""
    given = config
    if config is None:
        config = _wan_config(
            part_config(folder, "transformer", DiTConfig(**_HALF)),
            decoder or ("wan" if has_part(folder, "vae") else "tiny"),
        )
    elif config.decoder == "patch":
        raise UserError(f"{folder}: holds no codec of patches; set config.decoder to wan or tiny")
    config = places.settings(config)
    mesh = places.transformer(config)
    codec_mesh = places.codec(mesh)
    student = load_part(folder, "transformer", config.network("student"), mesh, sizes=given is not None)
    embed = places.text_encoder(folder, config, text_cache)
    codec = _load_codec(folder, config, codec_mesh)
    return Model(config, student, codec, embed, embed.fits, mesh, f"{folder}, converted networks", codec_mesh)


def _load_codec(folder: Path, config: Config, mesh: jax.sharding.Mesh) -> WanCodec:
    vae = config.decoder == "wan" or has_part(folder, "vae")  # the other decoder wants it for its encoder alone
    encoder = load_part(folder, "vae", config.vae, mesh) if vae else None
    decoder = encoder if config.decoder == "wan" else load_part(folder, "tiny_vae", config.tiny_vae, mesh)
    return WanCodec(decoder, encoder)


def _load_trained(places: _Places, path: Path, text_cache: str | Path | None) -> Model:
    """The model of a folder that `train` wrote, or of a bundle."""
    wanted = places.placement.devices and trained_config(path)
    mesh = places.transformer(wanted, trained_here=wanted is not None and not wanted.data.encoded)
    config, trained = load_bundle(path, mesh) if path.is_file() else load_run(path, mesh)
    codec_mesh = places.codec(mesh)
    if not config.data.encoded:
        codec = trained.frozen.codec
        codec = codec if codec_mesh is mesh else jax.device_put(codec, replicated(codec_mesh))
        embed, fits = functools.partial(embed_prompts, trained.frozen), ByteTokenizer(config.text.text_length).fits
        return Model(config, trained.student, codec, embed, fits, mesh, trained.origin, codec_mesh)
    # It was trained on embeddings and latents; the networks that made these stand elsewhere.
    if not config.data.encoders:
        raise UserError(
            f"{trained.origin}: was trained on embeddings alone, with no config.data.encoders to generate with; put "
            "its student beside a text_encoder and a vae with python -m adastate_jax.convert"
        )
    folder, config = Path(config.data.encoders), places.settings(config)
    embed = places.text_encoder(folder, config, Path(text_cache or folder / "text_cache"))
    codec = _load_codec(folder, config, codec_mesh)
    return Model(config, trained.student, codec, embed, embed.fits, mesh, trained.origin, codec_mesh)


def _wan_config(model: DiTConfig, decoder: str) -> Config:
    """What `configs/wan_1_3b.py` says, for another transformer."""
    try:
        return Config(
            stages=(),
            negative_prompt=WAN_NEGATIVE_PROMPT,
            text=TextConfig(**_HALF),
            decoder=decoder,
            vae=VAEConfig(**_HALF),
            tiny_vae=TinyVAEConfig(**_HALF),
            model=model,
            data=DataConfig(kind="none", clips=_WAN_SIZE),
        )
    except ValueError as error:
        raise UserError(f"these networks need a configuration: {error}") from None


def _random_model(places: _Places, config: Config) -> Model:
    config = places.settings(config)
    mesh = places.transformer(config)
    codec_mesh = places.codec(mesh)

    def network(build, part: int, mesh: jax.sharding.Mesh):
        key = jax.random.fold_in(jax.random.key(config.seed), part)
        return init_sharded(lambda key: build(nnx.Rngs(key)), mesh, key)

    student = network(lambda rngs: DiT(config.network("student"), rngs=rngs), 0, mesh)
    embed, fits = random_embed(config.text), ByteTokenizer(config.text.text_length).fits
    codec = _random_codec(config, network, codec_mesh)
    return Model(config, student, codec, embed, fits, mesh, "random weights", codec_mesh)


def _random_codec(config: Config, network, mesh: jax.sharding.Mesh) -> PatchCodec | WanCodec:
    if config.decoder == "patch":
        size, channels = 3 * config.codec.patch**2, config.codec.channels
        refuse_too_large(jax.ShapeDtypeStruct((size, channels), np.float64), mesh)
        basis, _ = np.linalg.qr(np.random.default_rng(config.seed).standard_normal((size, channels)))
        codec = PatchCodec(np.zeros(size, np.float32), np.float32(basis), np.ones(channels, np.float32))
        return jax.device_put(codec, replicated(mesh))
    encoder = network(lambda rngs: VAE(config.vae, rngs=rngs), 1, mesh)
    decoder = encoder
    if config.decoder == "tiny":
        decoder = network(lambda rngs: TinyVAE(config.tiny_vae, rngs=rngs, parts=("decoder",)), 2, mesh)
    return WanCodec(decoder, encoder)


# --- prompts, pictures and frames -------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="first", donate_argnames="cache")
def decode_checked(codec: PatchCodec | WanCodec, latents: jax.Array, cache, first: bool):
    """As `decode_frames`, and whether all were finite before they became bytes, which a NaN would be hidden in."""
    video, cache = codec.decode(latents, cache, first)
    finite = jnp.isfinite(latents).all() & jnp.isfinite(video).all()
    return jnp.round((jnp.clip(video, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8), cache, finite


def decode_frames(codec: PatchCodec | WanCodec, latents: jax.Array, cache, first: bool):
    """Latents [B, F, H, W, C] and the decoder's cache → frames [B, frames, height, width, 3] uint8, and the cache.

    The cache is donated: Wan2.1's takes 1.9 GB at 480×832 in bfloat16.
    """
    frames, cache, _ = decode_checked(codec, latents, cache, first)
    return frames, cache


@jax.jit
def encode_frames(codec: PatchCodec | WanCodec, frames: jax.Array) -> jax.Array:
    """Frames [B, 1 + t k, height, width, 3] uint8 → latents [B, 1 + k, H, W, C]."""
    return codec.encode(frames.astype(jnp.float32) / 127.5 - 1.0)


def num_given_frames(config: Config, available: int, anchor: str | None = None) -> int:
    """How many of a clip's last frames a stream can start from: whole latents, all within the chunks that fill it."""
    latents = min((available - 1) // config.time_factor + 1, max_given_frames(stream_config(config.stream, anchor)))
    return max(1 + config.time_factor * (latents - 1), 0)


# --- generating -------------------------------------------------------------------------------------------------------


def stream_config(config: StreamConfig, anchor: str | None) -> StreamConfig:
    """The stream of a preset, or with another anchor strategy, see `named_stream`; None keeps the configured one.

    Raises:
        UserError: the name is unknown, or does not go with the configured chunks and window.
    """
    try:
        return config if anchor is None else named_stream(anchor, config)
    except ValueError as error:
        raise UserError(str(error)) from None


def make_sampler(config: Config):
    """A jitted pure function (student, text, keys, num_chunks) → (latents, carry) for whole rollouts.

    `text` is `student.text_keys_values(embeddings)`, `keys` [B] random keys, `num_chunks` static; latents
    [B, num_chunks · F, H, W, C].

    >>> model = load(config="configs/tiny.py", random_weights=True)
    >>> text = model.student.text_keys_values(model.embed(["a camera pans left", "a red ball"]))
    >>> latents, carry = make_sampler(model.config)(model.student, text, jax.random.split(jax.random.key(0)), 4)
    >>> latents.shape, int(carry.chunk)
    ((2, 12, 1, 1, 48), 4)
    """
    if not isinstance(config, Config):
        raise UserError(f"config must be a configuration, a model's `config` for one, got {type(config).__name__}")
    latent_shape = config.latent_shape

    @functools.partial(jax.jit, static_argnames="num_chunks")
    def sample(student: DiT, text: KeyValues, keys: jax.Array, num_chunks: int) -> tuple[jax.Array, RolloutCarry]:
        if type(num_chunks) is not int or num_chunks < 1:
            raise UserError(f"num_chunks must be a whole number of at least 1, got {shown(num_chunks)}")
        carry = initial_carry(student.config, config.stream, keys, *latent_shape[:2])
        carry, latents = rollout(student, carry, text, config.stream, latent_shape, num_chunks)
        return latents, carry

    return sample
