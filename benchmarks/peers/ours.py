"""Our side of each case, on the weights that PyTorch's drew."""

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.peers.settings import (
    CACHED_FRAMES,
    DECODED,
    LIVE_FRAMES,
    PRODUCTS,
    SIDES,
    TEXT_TOKENS,
    TIMESTEP,
    TOKENS,
    Setting,
    attention_inputs,
    normal,
)


def _converted(setting: Setting, kind: str, **fields: Any):
    """What PyTorch's side saved, by the `convert` command."""
    from adastate_jax.convert import main
    from adastate_jax.weights.converted import load_converted

    source = setting.folder / "theirs"
    source = source if source.exists() else source.with_suffix(".safetensors")
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()) as said:
        status = main([f"--source={source}", f"--output={setting.folder / 'ours'}"])
    if status:
        sys.exit(said.getvalue())
    return load_converted(setting.folder / "ours", kind, dtype=setting.dtype, **fields)


def our_product(setting: Setting) -> Iterator:
    import jax
    import jax.numpy as jnp

    side = PRODUCTS[setting.size]
    left, right = (jnp.asarray(normal(seed, side, side), setting.dtype) for seed in (1, 2))
    product = jax.jit(jnp.matmul)
    yield lambda: product(left, right)


def our_attention(setting: Setting) -> Iterator:
    import jax
    import jax.numpy as jnp

    from adastate_jax.models.attention import attention

    inputs = [jnp.asarray(x, setting.dtype) for x in attention_inputs(setting.size)]
    attend = jax.jit(lambda *x: attention(*x, "auto"))
    yield lambda: attend(*inputs)


def our_pass(setting: Setting) -> Iterator:
    import jax

    model = _converted(setting, "transformer")
    latents = jax.numpy.asarray(normal(1, 1, LIVE_FRAMES, *SIDES[setting.size], 16))
    text = jax.numpy.asarray(normal(2, 1, TEXT_TOKENS, model.config.text_dim))
    timesteps = np.full((1, LIVE_FRAMES), TIMESTEP, np.float32)

    @jax.jit
    def flow(model, latents, text):
        return model(latents, timesteps, model.text_keys_values(text), np.arange(LIVE_FRAMES))[0]

    yield lambda: flow(model, latents, text)


def our_cached_pass(setting: Setting) -> Iterator:
    import jax
    import jax.numpy as jnp

    from adastate_jax.models.attention import KeyValues

    model = _converted(setting, "transformer")
    config = model.config
    height, width = SIDES[setting.size]
    shape = (config.num_layers, 1, CACHED_FRAMES * height * width // 4, config.num_heads, config.head_dim)
    keys, values = normal(4, *shape), normal(5, *shape)
    positions = CACHED_FRAMES + np.arange(LIVE_FRAMES)
    np.savez(setting.folder / "context.npz", keys=keys, values=values, positions=positions)
    context = KeyValues(jnp.asarray(keys, config.dtype), jnp.asarray(values, config.dtype))
    latents = jnp.asarray(normal(1, 1, LIVE_FRAMES, height, width, 16))
    text = jax.jit(type(model).text_keys_values)(model, jnp.asarray(normal(2, 1, TEXT_TOKENS, config.text_dim)))
    timesteps = np.full((1, LIVE_FRAMES), TIMESTEP, np.float32)

    @jax.jit
    def flow(model, latents, text, context):
        return model(latents, timesteps, text, positions, context=context)[0]

    yield lambda: flow(model, latents, text, context)


def our_chunk(setting: Setting) -> Iterator:
    """AdaState's steady chunk, its state frame denoised with it: noise is given, the cache is random."""
    import jax
    import jax.numpy as jnp

    from adastate_jax.streaming.carry import draw_noise, initial_carry, seed_keys
    from adastate_jax.streaming.denoising import generate_chunk, live_noise, read_context
    from adastate_jax.streaming.schedule import StreamConfig, layout_of, phase_of

    model = _converted(setting, "transformer")
    stream, config = StreamConfig(), model.config
    height, width = SIDES[setting.size]
    carry = initial_carry(config, stream, seed_keys(0, 1), height, width)
    leaves, tree = jax.tree.flatten(carry.cache)
    cache = jax.tree.unflatten(
        tree, [jnp.asarray(normal(6 + number, *leaf.shape), leaf.dtype) for number, leaf in enumerate(leaves)]
    )
    phase = phase_of(stream.num_fill_chunks, stream)
    layout = layout_of(phase, stream)
    noise = draw_noise(carry, stream, (height, width, 16))
    noises = live_noise(noise, layout)
    context = read_context(config, cache, stream, layout, noises[0])
    np.savez(
        setting.folder / "context.npz",
        keys=np.asarray(context.key, np.float32),
        values=np.asarray(context.value, np.float32),
        positions=np.asarray(layout.live),
        noises=np.asarray(noises),
        sigmas=np.asarray(stream.sigmas),
    )
    text = jax.jit(type(model).text_keys_values)(model, jnp.asarray(normal(2, 1, TEXT_TOKENS, config.text_dim)))

    @jax.jit
    def chunk(model, cache, text, noise):
        made = generate_chunk(model, cache, text, noise, stream, phase, len(stream.sigmas) - 1)
        return made.clean, made.fresh.key

    yield lambda: chunk(model, cache, text, noise)


def _our_decoder(setting: Setting, kind: str) -> Iterator:
    import jax

    from adastate_jax.models.video_coding import decode_clip

    model = _converted(setting, kind, latents_per_call=3)  # a chunk's: as a stream's steady call may have them
    latents = jax.numpy.asarray(normal(1, 1, 4, *DECODED[setting.size], 16))
    decode = jax.jit(decode_clip)
    clip = kind == "vae"  # diffusers clamps what it decodes

    def step():
        video = decode(model, latents)
        return video.clip(-1, 1) if clip else video

    yield step


def our_decoder(setting: Setting) -> Iterator:
    return _our_decoder(setting, "vae")


def our_tiny_decoder(setting: Setting) -> Iterator:
    return _our_decoder(setting, "tiny_vae")


def our_text(setting: Setting) -> Iterator:
    import jax

    model = _converted(setting, "text_encoder")
    count = TOKENS[setting.size]
    ids = np.random.default_rng(1).integers(0, 1024, (1, count)).astype(np.int32)
    encode, mask = jax.jit(type(model).__call__), np.ones((1, count), bool)
    yield lambda: encode(model, ids, mask)


def our_training(setting: Setting) -> Iterator:
    import jax
    import jax.numpy as jnp

    from adastate_jax.config.stages import OptimizerConfig
    from adastate_jax.training.pretrain import flow_loss
    from adastate_jax.training.state import apply_gradients, create_state

    model = _converted(setting, "transformer", param_dtype="float32", remat="none")
    shape = (1, LIVE_FRAMES, *SIDES[setting.size], 16)
    latents, noise = jnp.asarray(normal(1, *shape)), jnp.asarray(normal(3, *shape))
    text = jnp.asarray(normal(2, 1, TEXT_TOKENS, model.config.text_dim))
    optimizer = OptimizerConfig(learning_rate=1e-5, betas=(0.9, 0.999), weight_decay=0.01, max_gradient_norm=10.0)
    sigma = jnp.full((1,), TIMESTEP / 1000)

    def update(state, latents, noise, text):
        loss, gradients = jax.value_and_grad(flow_loss)(state.params, latents, noise, sigma, text)
        return apply_gradients(state, gradients, optimizer)[0], loss

    state, update = create_state(model, optimizer, ema=False), jax.jit(update, donate_argnums=0)

    def step():
        nonlocal state
        state, loss = update(state, latents, noise, text)
        jax.block_until_ready(state)
        return loss

    yield step
