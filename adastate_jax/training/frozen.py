"""What no stage trains, and the shapes of what a run leaves behind."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from adastate_jax.config.run import Config
from adastate_jax.models.adapters import Adapters, LoRAConfig, create_adapters
from adastate_jax.models.dit import DiT, DiTConfig
from adastate_jax.models.patch_codec import PatchCodec
from adastate_jax.models.text import ByteTokenizer, TextEncoder, encode_tokens
from adastate_jax.sharding import tree_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What no stage trains: the codec between video and latents, and the text encoder.

    None of a run whose texts and clips were encoded beforehand: nothing of them takes memory in a training step.
    """

    codec: PatchCodec | None
    text_encoder: TextEncoder | None


def abstract_network(network: DiTConfig) -> DiT:
    """A transformer's shapes, without weights."""
    return jax.eval_shape(lambda: DiT(network, rngs=nnx.Rngs(0)))


def abstract_adapters(network: DiTConfig, lora: LoRAConfig) -> Adapters:
    """The shapes of a transformer's adapters."""
    return jax.eval_shape(lambda: create_adapters(network, lora, jax.random.key(0)))


def student_sizes(config: Config) -> DiTConfig:
    """The student as it generates: whole, also where adapters were trained of one in eight bits."""
    network = config.network("student")
    return dataclasses.replace(network, quantization="") if config.student.lora.rank else network


def abstract_dit(config: Config) -> DiT:
    """The shapes of the student that generates, without weights."""
    return abstract_network(student_sizes(config))


def abstract_frozen(config: Config) -> Frozen:
    """The frozen parts' shapes, without weights."""
    if config.data.encoded:
        return Frozen(None, None)
    size, channels = 3 * config.codec.patch**2, config.codec.channels
    codec = PatchCodec(
        *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((size,), (size, channels), (channels,)))
    )
    return Frozen(codec, jax.eval_shape(lambda: TextEncoder(config.text, rngs=nnx.Rngs(0))))


def with_shardings(abstract, mesh):
    """Shapes with the sharding that each leaf has on a mesh, ready to be loaded into."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        tree_shardings(abstract, mesh),
    )


def batch_latents(frozen: Frozen, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Latents [B, N, H, W, C] of a batch: those that it carries, or of its video."""
    if "latents" in batch:
        return batch["latents"]
    return frozen.codec.encode(batch["video"].astype(jnp.float32) / 127.5 - 1)


def batch_text(frozen: Frozen, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Embeddings [B, T, text_dim] of a batch, zero past each text: those that it carries, or of its token ids."""
    if "text" in batch:
        return batch["text"]
    return frozen.text_encoder.encode(batch["token_ids"], batch["mask"])


def embed_prompts(frozen: Frozen, prompts: Sequence[str]) -> jax.Array:
    """Text embeddings of prompts [B, T, text_dim], zero past each prompt."""
    tokenizer = ByteTokenizer(frozen.text_encoder.config.text_length)
    return encode_tokens(frozen.text_encoder, *map(jnp.asarray, tokenizer.tokenize(list(prompts))))
