"""From converted networks and a prompt to frames: laws of loading and streaming, schedules, streams on disk."""

import dataclasses
import doctest
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_wan

import adastate_jax as ada
from adastate_jax.config.files import parse_config
from adastate_jax.errors import UserError
from adastate_jax.generation import loading as generate
from adastate_jax.generation import video_stream
from adastate_jax.generation.embeddings import StoredTextEncoder
from adastate_jax.models.text import PieceTokenizer
from adastate_jax.models.video_coding import decode_clip, encode_clip
from adastate_jax.sharding import make_mesh
from adastate_jax.streaming.anchors.restart import RestartAnchor
from adastate_jax.streaming.carry import initial_carry, seed_keys
from adastate_jax.streaming.cues import Cue
from adastate_jax.streaming.rollout import stream
from adastate_jax.streaming.schedule import StreamConfig
from adastate_jax.weights.parts import load_part

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red fox runs", "snow"]


@pytest.mark.parametrize("module", [ada, generate, video_stream], ids=lambda module: module.__name__)
def test_the_examples_in_docstrings_run(module, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = doctest.testmod(module)
    assert found.attempted > 1
    assert found.failed == 0


def test_a_stream_is_text_then_rollout_then_the_whole_clips_decoding(folder, model):
    """Chunks of 3 latents: 1 + 4 · 2 frames, then 12 each, the last one cut."""
    parts = list(video_stream.stream_batch(model, PROMPTS, seed=3, num_frames=40))
    assert [part.shape for part in parts] == [(2, n, 16, 24, 3) for n in (9, 12, 12, 7)]
    assert all(part.dtype == np.uint8 for part in parts)

    tokens = PieceTokenizer(folder / "tokenizer.json", 70).tokenize(PROMPTS)
    text = model.student.text_keys_values(
        load_part(folder, "text_encoder", small_wan.CONFIG.text, None).encode(*tokens)
    )
    latents, carry = ada.make_sampler(model.config)(model.student, text, seed_keys(3, 2), num_chunks=4)
    assert carry.chunk == 4
    video = jax.jit(decode_clip)(load_part(folder, "vae", small_wan.CONFIG.vae, None), latents)
    expected = np.asarray(jnp.round((jnp.clip(video, -1, 1) + 1) * 127.5))[:, :40]
    assert expected.std() > 1
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, rtol=0, atol=1)


def test_a_sample_does_not_depend_on_its_batch_but_on_its_seed_and_prompt(model):
    pair = next(video_stream.stream_batch(model, PROMPTS, seed=3, num_frames=9))
    alone = next(ada.stream(model, PROMPTS[1], seconds=9 / 16, seed=4))
    np.testing.assert_allclose(pair[1].astype(int), alone, rtol=0, atol=1)
    for seed, prompt in ((5, PROMPTS[1]), (4, PROMPTS[0])):
        assert np.any(next(ada.stream(model, prompt, seconds=9 / 16, seed=seed)) != alone)


def test_the_tiny_decoder(folder):
    model = ada.load(folder, small_wan.TINY_DECODER)
    assert [part.shape for part in ada.stream(model, "a fox", seconds=20 / 16)] == [(9, 32, 48, 3), (11, 32, 48, 3)]


def test_weights_split_over_devices_change_nothing(folder, model, tmp_path):
    """The transformer on four devices, and the text encoder, whose embeddings are not on disk yet, on the first."""
    mesh = dataclasses.replace(small_wan.CONFIG.mesh, fsdp=2, model=2)
    split = ada.load(folder, dataclasses.replace(small_wan.CONFIG, mesh=mesh), text_cache=tmp_path)
    assert len(split.student.blocks.ffn_in.kernel[...].sharding.device_set) == 4
    frames = [np.concatenate(list(ada.stream(m, PROMPTS[0], seconds=1))) for m in (model, split)]
    np.testing.assert_allclose(frames[0].astype(int), frames[1], rtol=0, atol=1)
    video = ada.stream(split, PROMPTS[0], seconds=1)
    next(video)
    ada.save_stream(video, tmp_path / "saved")
    np.testing.assert_array_equal(next(ada.load_stream(split, tmp_path / "saved")), frames[1][9:])


def small_config():
    sizes = ("dim=32", "ffn_dim=32", "num_heads=2", "num_layers=1")
    return parse_config([f"--config={ROOT / 'configs' / 'tiny.py'}", *(f"--config.model.{size}" for size in sizes)])


def test_a_given_mesh_goes_before_the_configurations(folder, tmp_path):
    mesh, text_mesh = make_mesh(fsdp=2, model=2), make_mesh(data=2, fsdp=2, model=2)
    split = ada.load(folder, small_wan.CONFIG, mesh=mesh, text_mesh=text_mesh, text_cache=tmp_path)
    drawn = ada.load(config=small_config(), random_weights=True, mesh=mesh)
    for model in (split, drawn):
        assert model.mesh == mesh
        assert len(model.student.blocks.ffn_in.kernel[...].sharding.device_set) == 4
    embeddings = split.embed(PROMPTS)
    assert len(split.embed._encoder[1].token_embedding[...].sharding.device_set) == 8
    np.testing.assert_allclose(embeddings, ada.load(folder, small_wan.CONFIG).embed(PROMPTS), rtol=0, atol=1e-5)


def test_a_first_image_does_not_wait_for_what_follows(model):
    video = ada.stream(model, "a fox", seconds=2)
    begun = []
    for _ in range(2):
        next(video)
        begun.append(int(video.video.state.carry.stream.chunk))
    assert begun == [1, 3]  # from the second on, one is dispatched ahead


def test_the_decoder_cache_is_not_held_twice(model):
    video = ada.stream(model, "a fox", seconds=2)
    next(video)
    before = jax.tree.leaves(video.video.state.decoder)
    next(video)
    assert before
    assert all(leaf.is_deleted() for leaf in before)


def test_a_restart_begins_with_the_first_frame_that_both_rollouts_show(model):
    """As a picture, where the codec can encode one: CausVid. Two chunks fill the window, the second is the overlap.

    What is shown from that frame on is the new rollout's decoding; without an encoder the old one's goes on.
    """
    config = StreamConfig(anchor=RestartAnchor(), denoising_steps=(1000.0, 500.0))
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, stream=config))
    student, codec, shape = model.student, model.codec, model.config.latent_shape

    def streamed(codec):
        video = video_stream.stream_batch(dataclasses.replace(model, codec=codec), PROMPTS[:1], 0, 21)
        frames = frames_of(video)
        assert len(frames) == 2
        return video.state.carry.stream.cache.window.key, np.concatenate(frames, axis=1)

    @jax.jit
    def expected(codec, latents, text):
        frames = jnp.clip(decode_clip(codec.decoder, latents), -1, 1)
        picture = encode_clip(codec.encoder, frames[:, 12:13])  # 9 to 12 are of the fourth latent
        overlaps = latents[:, 3:].at[:, :1].set(picture), latents[:, 3:]
        again = decode_clip(codec.decoder, overlaps[0])
        keys = [student(overlap, jnp.zeros((1, 3)), text, (0, 1, 2))[1].key for overlap in overlaps]
        shown = [jnp.concatenate([frames[:, :12], again], axis=1), frames]
        return keys, [jnp.round((jnp.clip(x, -1, 1) + 1) * 127.5) for x in shown]

    text = student.text_keys_values(model.embed(PROMPTS[:1]))
    chunks = stream(student, initial_carry(student.config, config, seed_keys(0, 1), *shape[:2]), text, config, shape, 2)
    latents = jnp.concatenate([chunk.content for _, chunk in chunks], axis=1)
    (anew, as_it_was), shown = expected(codec, latents, text)
    assert np.abs(anew - as_it_was).max() > 0.1
    assert np.abs(shown[0] - shown[1])[:, 13:].max() > 10
    codecs = codec, dataclasses.replace(codec, encoder=None)
    for one, window, frames in zip(codecs, (anew, as_it_was), shown, strict=True):
        found = streamed(one)
        np.testing.assert_allclose(found[0], window, rtol=0, atol=1e-3)
        np.testing.assert_allclose(found[1].astype(int), frames, rtol=0, atol=1)


def test_random_weights_depend_on_the_configured_seed_alone():
    config = small_config()
    one, same, other = (
        ada.load(config=dataclasses.replace(config, seed=seed), random_weights=True) for seed in (1, 1, 2)
    )
    leaves = [jax.tree.leaves((m.student, m.codec)) for m in (one, same, other)]
    assert all(np.array_equal(a, b) for a, b in zip(leaves[0], leaves[1], strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(leaves[0], leaves[2], strict=True))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            "text_encoder",
            "text_encoder: no such network; make it with python -m adastate_jax.convert --source=models_t5",
        ),
        ("vae", "vae: no such network; make it with python -m adastate_jax.convert --source=Wan2.1_VAE.pth"),
        ("tokenizer.json", "tokenizer.json: cannot be read"),
        ("transformer", r"config\.json: no such file"),
    ],
)
def test_a_missing_part_is_named(part, message, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    missing = copy / part
    shutil.rmtree(missing) if missing.is_dir() else missing.unlink()
    config = None if part == "transformer" else small_wan.CONFIG
    with pytest.raises(UserError, match=message):
        ada.load(copy, config)


def test_other_sizes_are_named(folder):
    larger = dataclasses.replace(small_wan.CONFIG, vae=dataclasses.replace(small_wan.CONFIG.vae, dim=8))
    with pytest.raises(UserError, match=r"vae: its dim is 4, config\.vae\.dim is 8"):
        ada.load(folder, larger)


def test_what_does_not_go_together_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="needs a configuration, and no folder"):
        ada.load(folder, small_wan.CONFIG, random_weights=True)
    with pytest.raises(UserError, match="needs a configuration, and no folder"):
        ada.load(random_weights=True)
    with pytest.raises(UserError, match="decoder film"):
        ada.load(folder, small_wan.CONFIG, decoder="film")
    with pytest.raises(UserError, match="has its own configuration"):
        ada.load(tmp_path, small_wan.CONFIG)
    small_wan.write_tokenizer(tmp_path / "tokenizer.json", [f"w{i}" for i in range(40)])
    shutil.copytree(folder / "text_encoder", tmp_path / "text_encoder")
    with pytest.raises(UserError, match=r"has 44 pieces, which is more than config\.text\.vocab_size 40"):
        StoredTextEncoder(tmp_path, small_wan.CONFIG.text, None)


STORY = (Cue(0, "a red fox runs"), Cue(1.5, "snow", "recache"))


def frames_of(video, count=None):
    return [next(video) for _ in range(count)] if count else list(video)


def test_a_schedule_changes_the_video_from_its_chunk_on(model, tmp_path):
    """At 1.5 seconds, video frame 24, chunk 2 has begun (frames 21 to 32): the cue waits for chunk 3."""
    plain = frames_of(ada.stream(model, STORY[0].prompt, seconds=4))
    story = frames_of(ada.stream(model, seconds=4, prompts=STORY))
    differs = [bool(np.any(one != other)) for one, other in zip(plain, story, strict=True)]
    assert differs == [False, False, False, True, True, True]
    file = tmp_path / "story.txt"
    file.write_text("0 | a red fox runs\n1.5 recache | snow\n")
    read = frames_of(ada.stream(model, seconds=4, prompts=file))
    assert all(np.array_equal(one, other) for one, other in zip(story, read, strict=True))


def test_a_prompt_that_does_not_fit_is_refused_by_entry(model):
    with pytest.raises(UserError, match="entry 2 is longer than 70 tokens"):
        ada.stream(model, seconds=4, prompts=(Cue(0, "a fox"), Cue(2, " ".join(["fox"] * 100))))


def test_a_prompt_that_is_cut_is_said(model, capsys):
    ada.stream(model, " ".join(["fox"] * 60), seconds=1)
    assert not capsys.readouterr().err
    ada.stream(model, " ".join(["fox"] * 100), seconds=1)
    assert capsys.readouterr().err == "note: the prompt is longer than 70 tokens: it is cut\n"


def test_a_video_without_end(model):
    assert len(frames_of(ada.stream(model, "a fox"), 7)) == 7


@pytest.mark.parametrize("count", [None, 1, 3, 4])
def test_a_saved_stream_goes_on_to_the_bit(model, tmp_path, count):
    """Before the first chunk, before and behind the cue of the schedule."""
    whole = frames_of(ada.stream(model, seconds=4, prompts=STORY, seed=2))
    video = ada.stream(model, seconds=4, prompts=STORY, seed=2)
    before = [next(video) for _ in range(count or 0)]
    ada.save_stream(video, tmp_path / "saved")
    after = frames_of(ada.load_stream(model, tmp_path / "saved"))
    for found in (before + after, before + frames_of(video)):
        assert len(found) == len(whole)
        assert all(np.array_equal(one, other) for one, other in zip(found, whole, strict=True))


def test_a_saved_batch_that_starts_from_frames(model, tmp_path):
    start = np.random.default_rng(0).integers(0, 255, (21, 16, 24, 3), np.uint8)
    begin = lambda: video_stream.stream_batch(model, PROMPTS, 1, 60, "static", start)  # noqa: E731
    whole, video = frames_of(begin()), begin()
    next(video)
    ada.save_stream(video, tmp_path / "saved")
    after = frames_of(ada.load_stream(model, tmp_path / "saved"))
    np.testing.assert_array_equal(np.concatenate(after, axis=1), np.concatenate(whole[1:], axis=1))


def test_a_saved_stream_needs_no_text_encoder(model, tmp_path):
    video = ada.stream(model, seconds=4, prompts=STORY)
    next(video)
    ada.save_stream(video, tmp_path / "saved")
    again = ada.load_stream(dataclasses.replace(model, embed=None), tmp_path / "saved")
    assert all(np.array_equal(one, other) for one, other in zip(again, video, strict=True))


def test_what_is_no_stream_of_this_model_is_refused(model, tmp_path):
    video = ada.stream(model, "a fox", seconds=4)
    next(video)
    ada.save_stream(video, tmp_path / "saved")
    with pytest.raises(UserError, match="exists; name a new folder"):
        ada.save_stream(video, tmp_path / "saved")
    with pytest.raises(UserError, match=r"stream\.json: cannot be read"):
        ada.load_stream(model, tmp_path)
    block = lambda student: student.blocks.ffn_in.kernel  # noqa: E731
    decoder = lambda codec: codec.decoder.decoder.conv_out.kernel  # noqa: E731
    for part, leaf in (("student", block), ("codec", decoder)):
        for change in (
            lambda x: x.at[(1,) * x.ndim].multiply(1.0001),
            lambda x: x.at[0, :2].set(x[0, 1::-1]),  # the same numbers in other places
        ):
            other = dataclasses.replace(model, **{part: jax.tree.map(lambda x: x, getattr(model, part))})
            changed = leaf(getattr(other, part))
            changed[...] = change(changed[...])
            with pytest.raises(UserError, match="saved with another model"):
                ada.load_stream(other, tmp_path / "saved")
    largest = max((tmp_path / "saved" / "state").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-7])
    with pytest.raises(UserError, match="damaged"):
        ada.load_stream(model, tmp_path / "saved")
    (tmp_path / "saved" / "stream.json").write_text("{")
    with pytest.raises(UserError, match=r"stream\.json: is damaged"):
        ada.load_stream(model, tmp_path / "saved")
