"""The probe against a dense recomputation, and the laws of its shares."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LATENT_SHAPE, SMALL

from adastate_jax import probe
from adastate_jax.errors import UserError
from adastate_jax.evaluation.attention_probe import context_shares, frame_masses, probe_chunk, probe_stream
from adastate_jax.generation import loading
from adastate_jax.generation.loading import load
from adastate_jax.models.attention import attend_all
from adastate_jax.models.rope import rotate
from adastate_jax.streaming.anchors.adaptive import AdaptiveAnchor
from adastate_jax.streaming.anchors.contract import NoAnchor
from adastate_jax.streaming.anchors.static import RollingAnchor, StaticAnchor
from adastate_jax.streaming.carry import draw_noise, initial_carry, seed_keys
from adastate_jax.streaming.denoising import live_noise, read_context
from adastate_jax.streaming.rollout import stream_step
from adastate_jax.streaming.schedule import StreamConfig, layout_of, phase_of

TOKENS = SMALL.frame_tokens(*LATENT_SHAPE[:2])


def carry_at(student, text, config, chunk):
    carry = initial_carry(SMALL, config, seed_keys(0, text.key.shape[1]), *LATENT_SHAPE[:2])
    for number in range(chunk):
        carry, _ = stream_step(student, carry, text, config, LATENT_SHAPE, phase_of(number, config))
    return carry


def dense_masses(query, key):
    """As the paper says it, on the full matrix, in float64."""
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    batch, heads, queries, keys = weights.shape
    per_frame = weights.reshape(batch, heads, queries // TOKENS, TOKENS, keys // TOKENS, TOKENS).sum(axis=-1)
    return per_frame.mean(axis=(1, 3))


def test_masses_are_those_of_the_full_matrix():
    query, key = (
        jax.random.normal(jax.random.key(seed), (2, frames * TOKENS, 2, 16)) * 3 for seed, frames in ((0, 4), (1, 7))
    )
    masses = frame_masses(query, key, TOKENS)
    assert masses.shape == (2, 4, 7)
    np.testing.assert_allclose(masses, dense_masses(query, key), atol=1e-6)
    np.testing.assert_allclose(masses.sum(axis=-1), 1.0, atol=1e-6)


def test_a_probed_chunk_gives_the_dense_masses_of_each_layer(student, text):
    """The first step's queries and keys are recomputed by a pass that keeps them instead of the masses."""
    config = StreamConfig(past_frames=3, anchor=AdaptiveAnchor(1))
    text = student.text_keys_values(text)
    carry = carry_at(student, text, config, 3)
    phase = phase_of(3, config)
    layout = layout_of(phase, config)
    live = live_noise(draw_noise(carry, config, LATENT_SHAPE), layout)[0]
    context = read_context(SMALL, carry.cache, config, layout, live)

    def keep_queries(query, key, value, rotation, context):
        output, _ = attend_all("xla")(query, key, value, rotation, context)
        return output, (rotate(query, rotation), jnp.concatenate([context.key, rotate(key, rotation)], axis=1))

    timesteps = jnp.full(live.shape[:2], 1000.0)
    _, (queries, keys) = student(live, timesteps, text, layout.live, keep_queries, context)
    masses = probe_chunk(student, carry, text, config, LATENT_SHAPE, phase)
    assert masses.shape == (len(config.sigmas), SMALL.num_layers, 2, 4, 1 + 3 + 4)
    for layer in range(SMALL.num_layers):
        np.testing.assert_allclose(masses[0, layer], dense_masses(queries[layer], keys[layer]), atol=1e-5)


@pytest.mark.parametrize("anchor", [NoAnchor(), StaticAnchor(2), AdaptiveAnchor(1)], ids=lambda a: type(a).__name__)
def test_shares_name_every_cached_frame_and_sum_to_one(student, text, anchor):
    config = StreamConfig(past_frames=3, anchor=anchor)
    text = student.text_keys_values(text)
    found = list(probe_stream(student, carry_at(student, text, config, 0), text, config, LATENT_SHAPE, [4, 1]))
    assert [one.chunk for one in found] == [1, 4]
    roles = ["anchor"] * anchor.frames + ["state"] * anchor.state_frames + ["window"] * 3 + ["siblings"]
    assert list(found[1].roles) == roles
    for one in found:
        assert one.shares.shape == (len(config.sigmas), SMALL.num_layers, len(one.roles))
        assert (one.shares >= 0).all()
        np.testing.assert_allclose(one.shares.sum(axis=-1), 1.0, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (StreamConfig(1, 2, NoAnchor()), "chunk 0 of a frame-wise stream sees no other frame; probe a later one"),
        (StreamConfig(1, 0, NoAnchor()), "chunk 3 of a frame-wise stream sees no other frame; enlarge past_frames"),
        (StreamConfig(3, 3, RollingAnchor(3)), "RollingAnchor denoises chunks jointly"),
    ],
)
def test_what_looks_nowhere_else_is_refused_before_anything_is_generated(config, complaint):
    chunks = [3] if "chunk 3" in complaint else [3, 0]
    with pytest.raises(UserError, match=complaint):
        next(probe_stream(None, None, None, config, LATENT_SHAPE, chunks))


def test_a_first_chunk_is_probed_at_its_own_noise_levels(student, text):
    """Causal-Forcing++'s: more steps for the first chunk; the probe's last input is that of the stream's last step."""
    steps = {"denoising_steps": (1000.0,), "first_denoising_steps": (1000.0, 750.0, 500.0)}
    config = StreamConfig(2, 2, NoAnchor(), **steps)
    text = student.text_keys_values(text)
    found = list(probe_stream(student, carry_at(student, text, config, 0), text, config, LATENT_SHAPE, [0, 1]))
    assert [one.sigmas for one in found] == [config.first_sigmas, config.sigmas]
    assert [len(one.shares) for one in found] == [3, 1]
    alike = dataclasses.replace(config, denoising_steps=steps["first_denoising_steps"])
    carry = carry_at(student, text, config, 0)
    masses = (probe_chunk(student, carry, text, one, LATENT_SHAPE, phase_of(0, one)) for one in (config, alike))
    np.testing.assert_allclose(*masses, atol=1e-6)


def test_the_command_writes_each_chunks_noise_levels(tmp_path, monkeypatch):
    config = str(Path(__file__).parents[2] / "configs" / "tiny.py")
    monkeypatch.setattr(loading, "load", lambda _: load(config=config, random_weights=True))
    output = tmp_path / "probe"
    command = ["--checkpoint=tiny", "--prompt=x", f"--output={output}", "--anchors", "causal_forcing_one_step"]
    with pytest.raises(UserError, match="chunk 0 of a frame-wise stream sees no other frame"):
        probe.main([*command, "--chunks", "1", "0"])
    assert not output.exists()
    assert probe.main([*command, "--past-frames", "1", "--chunks", "1"]) == 0
    (stream,) = json.loads((output / "probe.json").read_text())["streams"]
    (chunk,) = stream["chunks"]
    assert chunk["sigmas"] == [1.0]
    assert len(chunk["shares"]) == 1


def test_probing_changes_nothing_of_the_stream(student, text):
    config = StreamConfig(past_frames=3, anchor=AdaptiveAnchor(1))
    text = student.text_keys_values(text)
    one, other = (carry_at(student, text, config, 3) for _ in range(2))
    probe_chunk(student, one, text, config, LATENT_SHAPE, phase_of(3, config))
    ends = [stream_step(student, carry, text, config, LATENT_SHAPE, phase_of(3, config)) for carry in (one, other)]
    np.testing.assert_array_equal(ends[0][1].content, ends[1][1].content)


def test_a_frames_own_mass_is_left_out():
    """Two cached frames, no state, two live ones: each looks at itself with a half, at the others unevenly."""
    masses = np.array([[0.3, 0.1, 0.5, 0.1], [0.1, 0.2, 0.2, 0.5]])
    expected = np.array([[0.6, 0.2, 0.2], [0.2, 0.4, 0.4]]).mean(axis=0)
    np.testing.assert_allclose(context_shares(masses, 0), expected)
