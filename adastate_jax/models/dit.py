"""The Wan2.1 diffusion transformer: one class for teacher, critic and student.

Bidirectional, streaming and teacher-forced use differ only in the attention that is handed in (`models/attention.py`),
in the positions, and in whether there is a cached context. The network writes nothing: it returns the live frames'
fresh keys and values. Source: Wan-Video/Wan2.1 wan/modules/model.py.
"""

import dataclasses
import functools
import math

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from adastate_jax.checks import require_at_least_one, require_dtypes, require_positive
from adastate_jax.diffusion import MAX_TIMESTEP, clean_to_flow, draw_normal
from adastate_jax.models import attention as attention_lib
from adastate_jax.models.attention import Attend, Context, KeyValues
from adastate_jax.models.context_parallel import constrain_kept, cross_attention, self_attention, splits_tokens
from adastate_jax.models.linear import Linear
from adastate_jax.models.quantized import QUANTIZATIONS, QuantizedLinear
from adastate_jax.models.rope import rotation
from adastate_jax.sharding import constrain

REMAT_POLICIES = ("none", "block", "attention", "dots")
_SIZES = (
    "dim", "ffn_dim", "num_heads", "num_layers", "in_channels", "out_channels", "text_dim", "text_length", "freq_dim",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Sizes and numerics of the transformer; the defaults are Wan2.1-T2V-1.3B.

    Attributes:
        prediction: what the head's output is: `flow` (Wan2.1), or `clean` latents, turned into a flow by
            (x_σ − x̂_0) / max(σ, 0.05), which learns faster at toy sizes.
        param_dtype, dtype: of the weights (while they are trained always float32), and of matrix products and the
            residual stream. Modulation, norms, rotations, timestep embedding and head run in float32 whatever `dtype`
            is.
        attention: a backend of `models/attention.py`.
        remat: what the backward pass keeps of a block: `none` recomputes nothing, `block` keeps only block inputs,
            `attention` also keeps attention outputs, `dots` all products with weights, but not attention scores.
        quantization: of the blocks' weights, where they are frozen: `int8`, `float8`, or empty; see
            `models/quantized.py`.
    """

    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    text_length: int = 512
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    qk_norm: bool = True
    cross_attn_norm: bool = True
    prediction: str = "flow"
    param_dtype: str = "float32"
    dtype: str = "float32"
    attention: str = "auto"
    remat: str = "block"
    quantization: str = ""

    def __post_init__(self):
        require_at_least_one(self, *_SIZES)
        require_positive(self, "eps")
        require_dtypes(self)
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(f"dim {self.dim} must be an even multiple of num_heads {self.num_heads}")
        if self.patch_size[0] != 1 or min(self.patch_size) < 1:
            raise ValueError(f"patch_size must keep frames apart (1, height, width), got {self.patch_size}")
        if self.prediction not in ("flow", "clean"):
            raise ValueError(f"prediction must be flow or clean, got {self.prediction!r}")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat must be one of {', '.join(REMAT_POLICIES)}, got {self.remat!r}")
        if self.quantization not in QUANTIZATIONS:
            known = ", ".join(filter(None, QUANTIZATIONS))
            raise ValueError(f"quantization must be one of {known}, or empty, got {self.quantization!r}")
        if self.attention not in attention_lib.BACKENDS:
            raise ValueError(f"attention must be one of {', '.join(attention_lib.BACKENDS)}, got {self.attention!r}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def frame_tokens(self, height: int, width: int) -> int:
        """Tokens per latent frame of height × width latents; raises ValueError if patches do not tile it."""
        _, patch_height, patch_width = self.patch_size
        if height % patch_height or width % patch_width:
            raise ValueError(f"latent frames of {height}x{width} are not tiled by patches {self.patch_size[1:]}")
        return (height // patch_height) * (width // patch_width)


def _layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """LayerNorm without gain and bias over the last axis, in float32."""
    x = x.astype(jnp.float32)
    mean = x.mean(axis=-1, keepdims=True)
    variance = jnp.square(x - mean).mean(axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + eps)


def _rms_norm(x: jax.Array, norm: nnx.RMSNorm) -> jax.Array:
    """RMS norm over all heads together, in float32.  [B, T, heads, head_dim].

    Heads are split before it, not after: a TPU then writes the projection in the layout that attention reads.
    """
    y = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.square(y).mean(axis=(-2, -1), keepdims=True) + norm.epsilon)
    return (y * (inverse * norm.scale[...].astype(jnp.float32).reshape(x.shape[-2:]))).astype(x.dtype)


def _apart(x: jax.Array) -> jax.Array:
    """x, which a TPU is to compute in a kernel of its own.

    TPU v6e's compiler would make one kernel of both products of the feed-forward, which is slower than the two. A GPU
    computes what stands between them with the first.
    """
    return jax.lax.optimization_barrier(x) if attention_lib.target_device().platform == "tpu" else x


def _xavier(key: jax.Array, shape: tuple[int, int], dtype) -> jax.Array:
    return (draw_normal(key, shape) * math.sqrt(2 / sum(shape))).astype(dtype)


def _small(key: jax.Array, shape: tuple[int, int], dtype) -> jax.Array:
    """Of the timestep embedding: with it the modulation starts near its table, and gates near closed."""
    return (0.02 * draw_normal(key, shape)).astype(dtype)


def _modulation(rngs: nnx.Rngs, rows: int, config: "DiTConfig") -> nnx.Param:
    table = draw_normal(rngs.params(), (rows, config.dim)) / math.sqrt(config.dim)
    return nnx.Param(table.astype(config.param_dtype))


def _linear(config: "DiTConfig", rngs: nnx.Rngs, dtype: str | None = None):
    dtype = config.dtype if dtype is None else dtype
    return functools.partial(Linear, dtype=dtype, param_dtype=config.param_dtype, kernel_init=_xavier, rngs=rngs)


def _block_linear(config: "DiTConfig", rngs: nnx.Rngs):
    if not config.quantization:
        return _linear(config, rngs)
    settings = {"dtype": config.dtype, "param_dtype": config.param_dtype, "quantization": config.quantization}
    return functools.partial(QuantizedLinear, **settings)


class Attention(nnx.Module):
    """Projections of one attention layer; the RMS norm of queries and keys is over all heads together."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        linear = functools.partial(_block_linear(config, rngs), config.dim, config.dim)
        self.query, self.key, self.value, self.output = linear(), linear(), linear(), linear()
        self.normalize = config.qk_norm
        if config.qk_norm:
            norm = functools.partial(
                nnx.RMSNorm,
                config.dim,
                epsilon=config.eps,
                dtype=jnp.float32,
                param_dtype=config.param_dtype,
                rngs=rngs,
            )
            self.norm_query, self.norm_key = norm(), norm()
        self.num_heads = config.num_heads

    def _heads(self, project, x: jax.Array) -> jax.Array:
        """[B, …, D] → [B, …, heads, head_dim], projected."""
        # Attention takes the frames' tokens in one row. Where it can, so does the projection: a TPU otherwise lays its
        # result out frame by frame, and then again.
        shape = x.shape[:-1]
        if x.ndim == 4 and not splits_tokens():
            x = einops.rearrange(x, "b f s d -> b (f s) d")
        x = einops.rearrange(project(x), "... (heads d) -> ... heads d", heads=self.num_heads)
        return constrain(x, "batch", None, *(("tokens",) if x.ndim == 5 else ()), "heads").reshape(
            *shape, *x.shape[-2:]
        )

    def queries(self, x: jax.Array) -> jax.Array:
        """[B, …, D] → [B, …, heads, head_dim]; … are F frames and S tokens of each, or T tokens."""
        query = self._heads(self.query, x)
        return _rms_norm(query, self.norm_query) if self.normalize else query

    def keys_values(self, x: jax.Array) -> KeyValues:
        """[B, …, D] → keys and values [B, …, heads, head_dim]; … as for `queries`."""
        key = self._heads(self.key, x)
        return KeyValues(_rms_norm(key, self.norm_key) if self.normalize else key, self._heads(self.value, x))

    def merge(self, x: jax.Array) -> jax.Array:
        """[B, …, heads, head_dim] → [B, …, D], through the output projection."""
        return self.output(x, axes=2)


class Block(nnx.Module):
    """Self-attention, cross-attention and feed-forward, modulated per frame by the timestep."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        linear = _block_linear(config, rngs)
        self.self_attention = Attention(config, rngs=rngs)
        self.cross_attention = Attention(config, rngs=rngs)
        self.ffn_in = linear(config.dim, config.ffn_dim)
        self.ffn_out = linear(config.ffn_dim, config.dim)
        if config.cross_attn_norm:
            self.norm_cross = nnx.LayerNorm(
                config.dim, epsilon=config.eps, dtype=jnp.float32, param_dtype=config.param_dtype, rngs=rngs
            )
        self.normalize_cross = config.cross_attn_norm
        self.modulation = _modulation(rngs, 6, config)
        self.eps = config.eps
        self.backend = config.attention

    def __call__(self, x, time, text: KeyValues, attend) -> tuple[jax.Array, KeyValues]:
        """Args:
            x: residual stream [B, F, S, D], S tokens per frame.
            time: projected timestep embedding [B, F, 6, D] float32.
            text: this layer's text keys and values [B, T, heads, head_dim].
            attend: (query, keys and values) → output, all [B, F, S, heads, head_dim], and what it keeps of the layer.

        Returns:
            The stream, and what `attend` kept.
        """
        dtype = x.dtype
        modulation = constrain(self.modulation[...].astype(jnp.float32) + time, "batch")
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (modulation[:, :, None, i] for i in range(6))

        def gated(residual, gate, y):
            return (residual.astype(jnp.float32) + gate * y.astype(jnp.float32)).astype(dtype)

        y = (_layer_norm(x, self.eps) * (1 + scale) + shift).astype(dtype)
        fresh = self.self_attention.keys_values(y)
        y, kept = attend(self.self_attention.queries(y), fresh)
        x = gated(x, gate, self.self_attention.merge(checkpoint_name(y, "attention_output")))

        y = self.norm_cross(x).astype(dtype) if self.normalize_cross else x
        y = cross_attention(self.cross_attention.queries(y), text, self.backend)
        x = x + self.cross_attention.merge(checkpoint_name(y, "attention_output"))

        y = (_layer_norm(x, self.eps) * (1 + ffn_scale) + ffn_shift).astype(dtype)
        x = gated(x, ffn_gate, self.ffn_out(jax.nn.gelu(_apart(self.ffn_in(y)), approximate=True)))
        return x, kept


class DiT(nnx.Module):
    """The transformer. A plain pytree of weights; every block's leaf is stacked along a leading layer axis."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        linear, exact = _linear(config, rngs), _linear(config, rngs, "float32")
        patch = math.prod(config.patch_size)
        self.config = config
        self.patch_embedding = linear(patch * config.in_channels, config.dim)
        self.text_in, self.text_out = linear(config.text_dim, config.dim), linear(config.dim, config.dim)
        self.time_in = exact(config.freq_dim, config.dim, kernel_init=_small)
        self.time_out = exact(config.dim, config.dim, kernel_init=_small)
        self.time_projection = exact(config.dim, 6 * config.dim)
        layer_keys = jax.random.split(rngs.params(), config.num_layers)
        self.blocks = jax.lax.map(lambda key: Block(config, rngs=nnx.Rngs(key)), layer_keys)
        self.head_modulation = _modulation(rngs, 2, config)
        # Wan2.1 starts the head at zero; so does training here.
        self.head = exact(config.dim, patch * config.out_channels, kernel_init=nnx.initializers.zeros_init())

    def text_keys_values(self, embeddings: jax.Array) -> KeyValues:
        """Cross-attention keys and values of a prompt, once for all passes.

        Args:
            embeddings: text embeddings [B, T, text_dim], zero past the prompt; padding is attended to.

        Returns:
            Keys and values [layers, B, T, heads, head_dim].
        """
        text = self.text_in(embeddings.astype(self.config.dtype))
        text = self.text_out(jax.nn.gelu(text, approximate=True))
        return jax.lax.map(lambda block: constrain_kept(block.cross_attention.keys_values(text)), self.blocks)

    def lay_out(self, context: Context | None, latents: jax.Array) -> Context | None:
        """A context as the passes over live `latents` [B, F, H, W, C] read it fastest: see `attention.lay_out`.

        Every pass does this for itself; several passes with one context need it only once.
        """
        if not isinstance(context, KeyValues):
            return context
        tokens = latents.shape[1] * self.config.frame_tokens(*latents.shape[2:4])
        return attention_lib.lay_out(context, tokens, self.config.attention, self.config.dtype)

    def __call__(
        self,
        latents: jax.Array,
        timesteps: jax.Array,
        text: KeyValues,
        positions,
        attend: Attend | None = None,
        context: Context | None = None,
    ) -> tuple[jax.Array, KeyValues]:
        """One pass over the live frames.

        Args:
            latents: noisy latents [B, F, H, W, C].
            timesteps: noise level of each frame on 0..1000, [B, F].
            text: `text_keys_values` of the prompts, [layers, B, T, heads, head_dim].
            positions: temporal position of each frame, [F].
            attend: who sees whom; the default lets all frames see each other and the context.
            context: cached keys, rotated to their positions, and values, [layers, B, S, heads, head_dim], or what
                `lay_out` made of them.

        Returns:
            The flow [B, F, H, W, C] in float32, and what `attend` kept of the layers: the frames' own keys (un-rotated)
            and values [layers, B, F·H·W / patch, heads, head_dim].
        """
        config = self.config
        _, patch_height, patch_width = config.patch_size
        if attend is None:
            attend = attention_lib.attend_all(config.attention)
            context = self.lay_out(context, latents)
        config.frame_tokens(*latents.shape[2:4])
        height, width = latents.shape[2] // patch_height, latents.shape[3] // patch_width
        turn = rotation(positions, height, width, config.head_dim)

        patches = einops.rearrange(
            latents, "b f (h ph) (w pw) c -> b f (h w) (ph pw c)", ph=patch_height, pw=patch_width
        )
        x = constrain(self.patch_embedding(patches.astype(config.dtype)), "batch", None, "tokens")
        hidden = constrain(self.time_in(_sinusoid(timesteps, config.freq_dim)), "batch")
        embedding = constrain(self.time_out(jax.nn.silu(hidden)), "batch")  # [B, F, D]
        time = einops.rearrange(self.time_projection(jax.nn.silu(embedding)), "b f (n d) -> b f n d", n=6)
        time = constrain(time, "batch")  # gathered once here, not in every layer

        def run_block(x, layer):
            block, layer_text, layer_context = layer
            x, fresh = block(
                x, time, layer_text, lambda query, live: self_attention(attend, query, live, turn, layer_context)
            )
            return constrain(x, "batch", None, "tokens"), fresh

        x, fresh = jax.lax.scan(_remat(run_block, config.remat), x, (self.blocks, text, context))

        shift, scale = (self.head_modulation[i].astype(jnp.float32) + embedding for i in range(2))
        x = _layer_norm(x, config.eps) * (1 + scale[:, :, None]) + shift[:, :, None]
        output = einops.rearrange(
            constrain(self.head(x), "batch"),
            "b f (h w) (ph pw c) -> b f (h ph) (w pw) c",
            h=height,
            w=width,
            ph=patch_height,
            pw=patch_width,
        )
        if config.prediction == "clean":
            output = clean_to_flow(output, latents, timesteps / MAX_TIMESTEP, min_sigma=0.05)
        return output, fresh


def _sinusoid(timesteps: jax.Array, dim: int) -> jax.Array:
    """Cosines, then sines, of the timesteps at dim / 2 frequencies.  [B, F] → [B, F, dim] float32."""
    half = dim // 2
    frequencies = np.power(10000.0, -np.arange(half, dtype=np.float64) / half).astype(np.float32)
    angles = timesteps.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _remat(function, policy: str):
    if policy == "none":
        return function
    policies = jax.checkpoint_policies
    kept = {
        "block": None,
        "attention": policies.save_only_these_names("attention_output"),
        "dots": policies.dots_with_no_batch_dims_saveable,
    }[policy]
    return jax.checkpoint(function, policy=kept, prevent_cse=False)  # needless in the body of a scan
