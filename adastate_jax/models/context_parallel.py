"""Attention of tokens that are split over devices: the mesh axis `context` divides every frame's.

Between attentions each device has a part of every frame, so chunks, windows and anchors are as evenly split as a whole
clip. For self-attention devices exchange tokens for heads (Ulysses, arXiv 2309.14509): each then has all tokens of some
heads, and whoever attends (`models/attention.py`) sees what it would on one device. Heads that `context` does not
divide are filled up with empty ones: 12 over 8 devices cost a third more attention, and no device holds more for it.
Keys and values that are kept for later lie split in heads too; where these are not divided, in a head's channels.
Prompts are short: a device gathers their keys and values, layer by layer, and keeps its own queries.
"""

import functools
from typing import Any

import einops
import jax
import jax.numpy as jnp

from adastate_jax.errors import UserError
from adastate_jax.models.attention import Attend, KeyValues, attention
from adastate_jax.models.rope import Rotation
from adastate_jax.sharding import activation_axes, current_mesh, indivisible

_AXIS = "context"


def kept_axes(heads: int, head_dim: int, mesh) -> tuple[Any, Any]:
    """Mesh axes along which heads, and channels of a head, of kept keys and values lie.

    Raises:
        UserError: `context` divides neither.
    """
    model, context = mesh.shape["model"], mesh.shape[_AXIS]
    split = activation_axes("heads", heads, mesh)
    if context == 1:
        return split, None
    if split and heads % (model * context) == 0:
        return ("model", _AXIS), None
    if head_dim % context == 0:
        return split, _AXIS
    raise UserError(f"mesh.context = {context} divides neither {heads} heads nor {head_dim} channels of a head")


def constrain_kept(keys_values: KeyValues) -> KeyValues:
    """Pins keys and values [..., B, T, heads, head_dim] to where kept ones lie; without a mesh, nothing."""
    mesh = current_mesh()
    if mesh is None:
        return keys_values
    *leading, batch, _, heads, head_dim = keys_values.key.shape
    spec = jax.P(*[None] * len(leading), activation_axes("batch", batch, mesh), None, *kept_axes(heads, head_dim, mesh))
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec), keys_values)


def self_attention(
    attend: Attend, query: jax.Array, live: KeyValues, rotation: Rotation, context: KeyValues | None
) -> tuple[jax.Array, Any]:
    """What `attend` gives for the live tokens, whether or not they are split over devices.

    Args:
        query, live: un-rotated, of F frames with S tokens each, [B, F, S, heads, head_dim].
        rotation: of all F · S tokens.
        context: kept keys (rotated) and values [B, T, heads, head_dim], or None.

    Returns:
        The output [B, F, S, heads, head_dim], and what `attend` kept of the layer.

    Raises:
        UserError: `context` does not divide a frame's tokens, or `attend` keeps more than keys and values where tokens
            are split.
    """
    frames = query.shape[1]

    def whole(query, key, value, rotation, context):
        output, kept = attend(*map(_flat, (query, key, value)), rotation, context)
        return einops.rearrange(output, "b (f s) heads d -> b f s heads d", f=frames), kept

    mesh = current_mesh()
    if not splits_tokens():
        return whole(query, live.key, live.value, rotation, context)
    tokens, kept_spec = _token_spec(query, mesh), _kept_spec(query, mesh)
    heads = query.shape[3] // (mesh.shape["model"] if activation_axes("heads", query.shape[3], mesh) else 1)
    missing = -heads % mesh.shape[_AXIS]
    in_channels = kept_spec[3] is not None  # kept keys and values are split in channels, not in heads

    def fill(x: jax.Array) -> jax.Array:
        return jnp.pad(x, (*[(0, 0)] * (x.ndim - 2), (0, missing), (0, 0))) if missing else x

    def local(query, key, value, rotation, context):
        to_heads = functools.partial(_exchange, give=3, take=2)
        if in_channels:
            context = jax.tree.map(lambda x: _exchange(fill(x), give=2, take=3), context)
        output, kept = whole(*(to_heads(fill(x)) for x in (query, key, value)), rotation, context)
        if not isinstance(kept, KeyValues):
            raise UserError("this attention keeps more than keys and values: set mesh.context to 1")
        if in_channels:
            kept = jax.tree.map(lambda x: _exchange(x, give=3, take=2)[..., :heads, :], kept)
        return _exchange(output, give=2, take=3)[..., :heads, :], kept

    # Told, not left to the partitioner: it would gather, and a fused kernel is opaque to it.
    run = jax.shard_map(
        local,
        in_specs=(tokens, tokens, tokens, jax.P(), kept_spec),
        out_specs=(tokens, kept_spec),
        check_vma=False,
    )
    return run(query, live.key, live.value, rotation, context)


def cross_attention(query: jax.Array, text: KeyValues, backend: str) -> jax.Array:
    """Attention of live tokens to a prompt, whether or not they are split over devices.

    Args:
        query: [B, F, S, heads, head_dim].
        text: kept keys and values [B, T, heads, head_dim].

    Returns:
        [B, F, S, heads, head_dim].
    """
    frames = query.shape[1]

    def whole(query, text):
        output = attention(_flat(query), text.key, text.value, backend)
        return einops.rearrange(output, "b (f s) heads d -> b f s heads d", f=frames)

    mesh = current_mesh()
    if not splits_tokens():
        return whole(query, text)
    tokens, kept_spec = _token_spec(query, mesh), _kept_spec(query, mesh)
    axis = 2 if kept_spec[3] is None else 3

    def local(query, text):
        return whole(query, jax.tree.map(lambda x: _gather(x, axis), text))

    return jax.shard_map(local, in_specs=(tokens, kept_spec), out_specs=tokens, check_vma=False)(query, text)


def splits_tokens() -> bool:
    """Whether the current mesh splits every frame's tokens."""
    mesh = current_mesh()
    return mesh is not None and mesh.shape[_AXIS] > 1


def _token_spec(query: jax.Array, mesh) -> jax.P:
    """Where live [B, F, S, heads, head_dim] lie between attentions."""
    batch, _, frame_tokens, heads, _ = query.shape
    if reason := indivisible("the patches of a frame,", frame_tokens, "tokens", mesh.shape):
        raise UserError(reason)
    return jax.P(activation_axes("batch", batch, mesh), None, _AXIS, activation_axes("heads", heads, mesh), None)


def _kept_spec(query: jax.Array, mesh) -> jax.P:
    """Where one layer's kept keys and values [B, T, heads, head_dim] lie."""
    return jax.P(activation_axes("batch", query.shape[0], mesh), None, *kept_axes(*query.shape[3:], mesh))


def _flat(x: jax.Array) -> jax.Array:
    return einops.rearrange(x, "b f s heads d -> b (f s) heads d")


def _exchange(x: jax.Array, give: int, take: int) -> jax.Array:
    """Every device keeps its part of axis `give`, and gets all of axis `take`, of which it had a part."""
    return jax.lax.all_to_all(x, _AXIS, split_axis=give, concat_axis=take, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(x: jax.Array, axis: int) -> jax.Array:
    """All of `axis`, of which each device has a part; its gradient is a sum over devices in float32."""
    return jax.lax.all_gather(x, _AXIS, axis=axis, tiled=True)


def _gather_forward(x: jax.Array, axis: int):
    return _gather(x, axis), None


def _gather_backward(axis: int, _, gradient: jax.Array):
    exact = gradient.astype(jnp.float32)
    return (jax.lax.psum_scatter(exact, _AXIS, scatter_dimension=axis, tiled=True).astype(gradient.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)
