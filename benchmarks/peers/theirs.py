"""PyTorch's side of each case: what a user of diffusers and transformers who cares for speed would run."""

from collections.abc import Iterator

import numpy as np

from benchmarks.peers.settings import (
    DECODED,
    LIVE_FRAMES,
    NARROW,
    PRODUCTS,
    SIDES,
    TEXT_TOKENS,
    TIMESTEP,
    TOKENS,
    TRANSFORMER,
    Setting,
    attention_inputs,
    normal,
)


def _randomized(model):
    """The model with noise on all of its parameters, also on those that start at zero or one."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def _placed(model, setting: Setting):
    """The model on its device, in its dtype; diffusers' keep in float32 what they ask for."""
    import diffusers
    import torch

    dtype = getattr(torch, setting.dtype)
    if isinstance(model, diffusers.ModelMixin):
        return type(model).from_pretrained(setting.folder / "theirs", torch_dtype=dtype).to(setting.device).eval()
    return model.to(setting.device, dtype)


def _tensor(array: np.ndarray, setting: Setting):
    import torch

    return torch.from_numpy(np.ascontiguousarray(array)).to(setting.device, getattr(torch, setting.dtype))


def _maybe_compiled(function, setting: Setting):
    import torch

    return torch.compile(function) if setting.compiled else function


def _channels_first(latents: np.ndarray) -> np.ndarray:
    return np.moveaxis(latents, -1, 1)


def _their_transformer(setting: Setting):
    import diffusers

    model = _randomized(diffusers.WanTransformer3DModel(**(NARROW if setting.trial else TRANSFORMER)))
    model.save_pretrained(setting.folder / "theirs")
    return model


def their_product(setting: Setting) -> Iterator:
    """A product of square matrices: what the machine reaches."""
    yield None
    side = PRODUCTS[setting.size]
    left, right = (_tensor(normal(seed, side, side), setting) for seed in (1, 2))
    yield lambda: left @ right


def their_attention(setting: Setting) -> Iterator:
    """Scaled dot product attention, of tensors as a transformer's projections leave them."""
    import torch

    yield None
    inputs = [_tensor(x, setting) for x in attention_inputs(setting.size)]

    def step():
        found = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs))
        return found.transpose(1, 2).contiguous()

    yield step


def _pass(model, text, setting: Setting):
    """A pass over a chunk's latents at one noise level."""
    import torch

    latents = _tensor(_channels_first(normal(1, 1, LIVE_FRAMES, *SIDES[setting.size], 16)), setting)
    timesteps = torch.tensor([TIMESTEP], device=setting.device)
    run = _maybe_compiled(model, setting)

    def step():
        with torch.no_grad():
            return run(latents, timesteps, text, return_dict=False)[0].movedim(1, -1)

    return step


def their_pass(setting: Setting) -> Iterator:
    """diffusers' Wan transformer, the text's part of the work included."""
    model = _their_transformer(setting)
    yield None
    model = _placed(model, setting)
    yield _pass(model, _text(model, setting), setting)


def _text(model, setting: Setting):
    return _tensor(normal(2, 1, TEXT_TOKENS, model.config.text_dim), setting)


def _with_cache(model, keys: np.ndarray, values: np.ndarray, positions: np.ndarray, text, setting: Setting):
    """Makes a Wan transformer attend to a static cache.

    Keys and values lie heads-major in buffers with room for the live frames', which every pass writes behind the cached
    ones; a prompt's keys and values are computed once, as Self-Forcing's code does. Both are what a user of diffusers
    who cares for speed would write.

    Args:
        keys, values: [layers, 1, S, heads, head_dim], keys rotated.
        positions: of the live frames.
        text: embeddings [1, T, text_dim].

    Returns:
        The text as the model takes it from now on, and for each layer the processor, whose `fresh` are the last pass's
        own keys (un-rotated) and values.
    """
    import torch
    from torch.nn import functional

    def heads_first(x):
        return x.unflatten(2, (model.config.num_attention_heads, -1)).transpose(1, 2)

    class CachedSelf:
        def __init__(self, keys, values, live: int):
            def buffer(cached):
                cached = _tensor(np.moveaxis(cached, 1, 2), setting)
                room = torch.empty((*cached.shape[:2], live, cached.shape[3]), dtype=cached.dtype, device=cached.device)
                return torch.cat([cached, room], dim=2)

            self.keys, self.values, self.cached = buffer(keys), buffer(values), keys.shape[1]
            self.fresh = None

        def __call__(self, attention, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
            query = heads_first(attention.norm_q(attention.to_q(hidden_states)))
            key = heads_first(attention.norm_k(attention.to_k(hidden_states)))
            value = heads_first(attention.to_v(hidden_states))
            self.fresh = key, value
            cosine, sine = (x.transpose(1, 2) for x in rotary_emb)
            self.keys[:, :, self.cached :] = _turned(key, cosine, sine)
            self.values[:, :, self.cached :] = value
            found = functional.scaled_dot_product_attention(_turned(query, cosine, sine), self.keys, self.values)
            return attention.to_out[0](found.transpose(1, 2).flatten(2))

    class StaticCross:
        def __init__(self, attention, text):
            self.key = heads_first(attention.norm_k(attention.to_k(text))).contiguous()
            self.value = heads_first(attention.to_v(text)).contiguous()

        def __call__(self, attention, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
            query = heads_first(attention.norm_q(attention.to_q(hidden_states)))
            found = functional.scaled_dot_product_attention(query, self.key, self.value)
            return attention.to_out[0](found.transpose(1, 2).flatten(2))

    def _turned(x, cosine, sine):
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        cosine, sine = cosine[..., 0::2], sine[..., 0::2]
        return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2).type_as(x)

    class Positions(torch.nn.Module):
        """The model's own rotation, of the live frames' positions, computed once."""

        def __init__(self, rope, latents):
            super().__init__()
            whole = latents.new_empty(1, 1, int(positions.max()) + 1, *latents.shape[3:])
            tokens = latents.shape[3] * latents.shape[4] // 4
            index = (torch.from_numpy(positions)[:, None] * tokens + torch.arange(tokens)).flatten()
            self.tables = [table[:, index.to(table.device)] for table in rope(whole)]

        def forward(self, latents):
            return self.tables

    height, width = SIDES[setting.size]
    live = len(positions) * height * width // 4
    latents = torch.empty(1, 1, 1, height, width, device=setting.device)
    with torch.no_grad():
        model.rope = Positions(model.rope, latents)
        text = model.condition_embedder.text_embedder(text)
        model.condition_embedder.text_embedder = torch.nn.Identity()
        for block, layer_keys, layer_values in zip(model.blocks, keys, values, strict=True):
            block.attn1.processor = CachedSelf(layer_keys, layer_values, live)
            block.attn2.processor = StaticCross(block.attn2, text)
    return text, [block.attn1.processor for block in model.blocks]


def their_cached_pass(setting: Setting) -> Iterator:
    """The same transformer with a static cache of keys and values: a streaming model's steady pass."""
    model = _their_transformer(setting)
    yield None
    model = _placed(model, setting)
    given = np.load(setting.folder / "context.npz")
    context = given["keys"], given["values"], given["positions"]
    text, _ = _with_cache(model, *context, _text(model, setting), setting)
    yield _pass(model, text, setting)


def their_chunk(setting: Setting) -> Iterator:
    """A whole chunk: every denoising step against the static cache, then the clean pass that keeps keys and values."""
    import torch

    model = _their_transformer(setting)
    yield None
    model = _placed(model, setting)
    given = np.load(setting.folder / "context.npz")
    context = given["keys"], given["values"], given["positions"]
    text, layers = _with_cache(model, *context, _text(model, setting), setting)
    noises = [torch.from_numpy(_channels_first(noise).copy()).to(setting.device) for noise in given["noises"]]
    sigmas = [float(sigma) for sigma in given["sigmas"]]
    run = _maybe_compiled(model, setting)

    def flow(latents, sigma: float):
        timesteps = torch.tensor([1000 * sigma], device=setting.device)
        return run(latents.to(text.dtype), timesteps, text, return_dict=False)[0].float()

    def step():
        with torch.no_grad():
            live = noises[0]
            for sigma, following, noise in zip(sigmas, [*sigmas[1:], 0.0], [*noises[1:], noises[0]], strict=True):
                clean = live - sigma * flow(live, sigma)
                live = (1 - following) * clean + following * noise
            flow(clean, 0.0)
            kept = torch.stack([layer.fresh[0].transpose(1, 2) for layer in layers])
            return clean.movedim(1, -1), kept

    yield step


def their_decoder(setting: Setting) -> Iterator:
    """diffusers' AutoencoderKLWan on a clip's latents."""
    import diffusers
    import torch

    narrow = {"base_dim": 6, "dim_mult": [1, 2, 4], "num_res_blocks": 1, "temperal_downsample": [False, True]}
    model = _randomized(diffusers.AutoencoderKLWan(**(narrow if setting.trial else {})))
    model.save_pretrained(setting.folder / "theirs")
    yield None
    model = _placed(model, setting)
    mean, std = (
        torch.tensor(x, device=setting.device).view(1, -1, 1, 1, 1)
        for x in (model.config.latents_mean, model.config.latents_std)
    )
    latents = torch.from_numpy(_channels_first(normal(1, 1, 4, *DECODED[setting.size], 16)).copy()).to(setting.device)
    latents = (latents * std + mean).to(getattr(torch, setting.dtype))
    run = _maybe_compiled(model.decode, setting)

    def step():
        with torch.no_grad():
            return run(latents, return_dict=False)[0].movedim(1, -1)

    yield step


def their_tiny_decoder(setting: Setting) -> Iterator:
    """TAEW2.1 as plain PyTorch, all frames of the clip at once: no package holds it."""
    import torch
    from safetensors.torch import save_file
    from torch import nn

    widths = (256, 128, 64)

    class Memory(nn.Module):
        """Three convolutions over a frame and the one before it."""

        def __init__(self, width: int):
            super().__init__()
            layers = [nn.Conv2d(2 * width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)]
            self.conv = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))

        def forward(self, x):
            before = nn.functional.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:-1]
            return nn.functional.relu(self.conv(torch.cat([x, before], dim=1)) + x)

    class Resample(nn.Module):
        """Frames into channels, or channels into frames, through a pointwise convolution."""

        def __init__(self, width: int, pooled: int, grown: int):
            super().__init__()
            self.conv, self.grown = nn.Conv2d(pooled * width, grown * width, 1, bias=False), grown

        def forward(self, x):
            return self.conv(x).unflatten(1, (self.grown, -1)).flatten(0, 1)

    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            encoder = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU()]
            for temporal in (True, True, False):
                down = nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False)
                encoder += [Resample(64, 1 + temporal, 1), down, Memory(64), Memory(64), Memory(64)]
            self.encoder = nn.Sequential(*encoder, nn.Conv2d(64, 16, 3, padding=1))
            decoder = [nn.Identity(), nn.Conv2d(16, 256, 3, padding=1), nn.ReLU()]
            for inputs, outputs, temporal in zip(widths, (128, 64, 64), (False, True, True), strict=True):
                decoder += [Memory(inputs), Memory(inputs), Memory(inputs), nn.Upsample(scale_factor=2)]
                decoder += [Resample(inputs, 1, 1 + temporal), nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)]
            self.decoder = nn.Sequential(*decoder, nn.ReLU(), nn.Conv2d(64, 3, 3, padding=1))

        def forward(self, latents):
            return 2 * self.decoder(3 * torch.tanh(latents / 3))[3:] - 1

    torch.manual_seed(0)
    model = Tiny().eval()
    save_file(model.state_dict(), setting.folder / "theirs.safetensors")
    yield None
    model = _placed(model, setting)
    latents = _tensor(np.moveaxis(normal(1, 1, 4, *DECODED[setting.size], 16)[0], -1, 1), setting)
    run = _maybe_compiled(model, setting)

    def step():
        with torch.no_grad():
            return run(latents).movedim(1, -1)[None]

    yield step


def their_text(setting: Setting) -> Iterator:
    """transformers' UMT5 encoder: two of XXL's layers, of its vocabulary 1,024 words."""
    import torch
    import transformers

    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64}
    narrow = {"d_model": 16, "d_kv": 6, "d_ff": 24, "num_heads": 3}
    config = transformers.UMT5Config(
        vocab_size=1024,
        num_layers=2,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=True,
        **(narrow if setting.trial else sizes),
    )
    torch.manual_seed(0)
    model = transformers.UMT5EncoderModel(config).eval()
    model.save_pretrained(setting.folder / "theirs")
    yield None
    model = _placed(model, setting)
    count = TOKENS[setting.size]
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 1024, (1, count))).to(setting.device)
    mask = torch.ones((1, count), dtype=torch.int64, device=setting.device)
    run = _maybe_compiled(model, setting)

    def step():
        with torch.no_grad():
            return run(ids, attention_mask=mask).last_hidden_state

    yield step


def their_training(setting: Setting) -> Iterator:
    """Flow matching on a clip: forward, backward, clipping, AdamW; nothing is computed again."""
    import torch

    model = _their_transformer(setting)
    yield None
    model = model.to(setting.device).train()
    latents, noise = (
        torch.from_numpy(_channels_first(normal(seed, 1, LIVE_FRAMES, *SIDES[setting.size], 16)).copy())
        for seed in (1, 3)
    )
    latents, noise = latents.to(setting.device), noise.to(setting.device)
    text = torch.from_numpy(normal(2, 1, TEXT_TOKENS, model.config.text_dim)).to(setting.device)
    sigma = TIMESTEP / 1000
    noisy, timesteps = (1 - sigma) * latents + sigma * noise, torch.tensor([TIMESTEP], device=setting.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.999), eps=1e-8, fused=True)
    run = _maybe_compiled(model, setting)
    half = torch.autocast(setting.device, torch.bfloat16, enabled=setting.dtype == "bfloat16")

    def step():
        with half:
            flow = run(noisy, timesteps, text, return_dict=False)[0]
        loss = (flow.float() - (noise - latents)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    yield step
