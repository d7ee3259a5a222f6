"""Runs that read embeddings and latents: no encoder of either is in training, and nothing of another model is read."""

import dataclasses
import json
import shutil
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import small_wan
from conftest import make_dit
from small_inputs import PROMPTS, Inputs

import adastate_jax as ada
from adastate_jax import bundle, convert, embed
from adastate_jax.config import parse_config, save_config
from adastate_jax.data.decoding import decode_frames
from adastate_jax.data.encoded import open_embeddings
from adastate_jax.errors import UserError
from adastate_jax.fields import to_dict
from adastate_jax.models.text import PieceTokenizer
from adastate_jax.sharding import make_mesh
from adastate_jax.train import train
from adastate_jax.training.frozen import Frozen, batch_latents, batch_text
from adastate_jax.training.metrics import Metrics, read_metrics
from adastate_jax.training.stages import run as stage_run
from adastate_jax.training.stages import trajectories
from adastate_jax.training.stages.inputs import (
    guiding_texts,
    open_inputs,
    read_clips,
    read_prompts,
    read_texts,
    update_prompts,
)
from adastate_jax.training.stages.run import Run
from adastate_jax.weights import parts
from adastate_jax.weights.converted import load_converted

ROOT = Path(__file__).parents[1]
TEXT = small_wan.CONFIG.text


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Videos as latents, their captions, prompts for either network as embeddings."""
    inputs = Inputs(tmp_path_factory.mktemp("inputs"))
    clips = inputs.encode(inputs.folder / "clips")
    inputs.embed(inputs.folder / "captions", prompts=clips / "captions.jsonl")
    inputs.embed(inputs.folder / "prompts")
    critic = inputs.folder / "critic.txt"
    critic.write_text("snow\nsnow runs\na fox\n")
    inputs.embed(inputs.folder / "critic", prompts=critic)
    return inputs


def configured(inputs, *others):
    fields = {f"text.{name}": value for name, value in to_dict(TEXT).items()}
    fields |= {f"vae.{name}": value for name, value in to_dict(small_wan.CONFIG.vae).items() if "latents" not in name}
    sizes = ("dim", "ffn_dim", "num_heads", "num_layers", "text_dim", "text_length", "freq_dim")
    fields |= {f"model.{name}": getattr(small_wan.CONFIG.model, name) for name in sizes}
    fields |= {
        "model.dtype": "float32",
        "model.num_layers": 1,
        "model.remat": "none",
        "data.clips.height": 16,
        "data.clips.width": 24,
        "data.clips.num_frames": 9,
    }
    names = {"latents": "clips", "captions": "captions", "embeddings": "prompts", "encoders": "weights"}
    fields |= {f"data.{field}": str(inputs.folder / name) for field, name in names.items()}
    for stage, steps in (("pretrain", 2), ("initialize", 2), ("distill", 2)):
        fields |= {f"{stage}.steps": steps, f"{stage}.batch_size": 2}
    fields |= {"initialize.trajectories": 4, "initialize.ode_steps": 4, "distill.rollout_frames": 6}
    fields |= {"stream.denoising_steps": (1000.0, 500.0)}
    fields |= {"sample.horizon": 1, "sample.count": 1, "logging.log_every": 1}
    arguments = [f"--config.{name}={value}" for name, value in fields.items()]
    return parse_config([f"--config={ROOT / 'configs' / 'latents.py'}", *arguments, *others])


def opened_run(config, workdir=Path("nowhere")):
    inputs = open_inputs(config, workdir)
    frozen = Frozen(None, None)
    texts = inputs.clips, inputs.captions, inputs.prompts, inputs.critic_prompts
    return Run(config, workdir, make_mesh(), *texts, frozen, *guiding_texts(config, inputs, frozen), Metrics(workdir))


@pytest.fixture
def nothing_but_transformers(monkeypatch):
    """Fails where a text encoder or an autoencoder is read."""

    def refuse(path, kind, *arguments, **named):
        raise AssertionError(f"a training stage reads {path}, which it does not train")

    with monkeypatch.context() as patched:
        patched.setattr(parts, "load_converted", refuse)
        yield patched


def test_from_videos_to_a_causal_student(inputs, tmp_path, nothing_but_transformers):
    """Teacher and student on latents and their captions."""
    stages = ("pretrain", "initialize")
    train(configured(inputs, f"--config.stages={stages}"), tmp_path / "run")
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(r["stage"], r["step"]) for r in records] == [(stage, step) for stage in stages for step in range(2)]
    assert not (tmp_path / "run" / "frozen").exists()
    named = json.loads((tmp_path / "run" / "data.json").read_text())
    assert sorted(named) == ["captions", "embeddings", "latents"]


def test_from_videos_to_a_causal_student_without_a_teacher(inputs, tmp_path, nothing_but_transformers):
    """By flow matching behind clean chunks, from nothing; its captions are all that is read beside the latents."""
    fields = {"targets": "clips", "weights": "random", "context": "clean"}
    options = [f"--config.initialize.{name}={value}" for name, value in fields.items()]
    run = tmp_path / "run"
    train(configured(inputs, *options, "--config.stages=('initialize',)", "--config.data.embeddings="), run)
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == [0, 1]
    assert not (run / "trajectories").exists()
    assert sorted(json.loads((run / "data.json").read_text())) == ["captions", "latents"]
    nothing_but_transformers.undo()
    assert ada.load(run).student.config.num_layers == 1


def test_from_published_files_and_prompts_to_sample_videos(inputs, tmp_path, nothing_but_transformers):
    """A teacher of other width, depth and heads, in eight bits; all three networks read from published files."""
    networks = {"teacher": (48, 64, 4, 2), "critic": (32, 48, 2, 2), "student": (32, 48, 2, 1)}
    sizes = ("dim", "ffn_dim", "num_heads", "num_layers")
    options = [f"--config.data.critic_embeddings={inputs.folder / 'critic'}"]
    options += ["--config.data.kind=none", "--config.data.latents=", "--config.data.captions="]
    options += ["--config.teacher.param_dtype=bfloat16", "--config.teacher.quantization=int8"]
    for seed, (name, values) in enumerate(networks.items()):
        own = dict(zip(sizes, values, strict=True))
        config = dataclasses.replace(small_wan.CONFIG.model, **own)
        heads = f"--set=num_heads={config.num_heads}"
        folder, rng = inputs.folder / "networks" / name, np.random.default_rng(seed)
        small_wan.write_network(folder, "transformer", config, rng, heads)
        options += [f"--config.{name}.{field}={value}" for field, value in {**own, "weights": folder}.items()]
    train(configured(inputs, *options, "--config.stages=('distill',)"), tmp_path / "run")
    nothing_but_transformers.undo()
    train(configured(inputs, *options, "--config.stages=('distill', 'sample')"), tmp_path / "run")
    assert [record["stage"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == ["distill"] * 2
    assert len(list(decode_frames(tmp_path / "run" / "samples" / "00.mp4"))) == 1 + 4 * 5

    model = ada.load(tmp_path / "run")
    assert model.student.config.num_layers == 1
    assert model.embed(["snow"]).shape == (1, TEXT.text_length, TEXT.dim)
    convert.main([f"--source={tmp_path / 'run'}", f"--output={tmp_path / 'student'}"])
    assert parts.has_part(tmp_path, "student")
    with pytest.raises(UserError, match="its text encoder is no part of it"):
        bundle.main([f"--run={tmp_path / 'run'}", f"--output={tmp_path / 'a.safetensors'}"])


def test_without_clips_the_prompts_are_enough(inputs, tmp_path, monkeypatch):
    """The teacher's trajectories are drawn for the prompts, over a rollout's frames."""
    config = configured(inputs, "--config.stages=('initialize',)")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, kind="none", latents="", captions=""))
    monkeypatch.setattr(Run, "network", lambda *_: make_dit(config.model, 0))
    save_config(config, tmp_path / "config.json")
    run = opened_run(config, tmp_path)
    found = trajectories.make_trajectories(run)(np.arange(4))
    assert found.shape == (4, 3, config.distill.rollout_frames, *config.latent_shape)
    assert not np.array_equal(found[0], found[1])


def test_a_disk_without_room_for_all_trajectories_is_refused_before_the_first(inputs, tmp_path, monkeypatch):
    run = opened_run(configured(inputs, "--config.stages=('initialize',)"), tmp_path)
    monkeypatch.setattr(Run, "network", lambda *_: pytest.fail("something was made"))
    monkeypatch.setattr(trajectories.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"trajectories: trajectories take .* GB, 1e-06 GB are free there; make room"):
        trajectories.make_trajectories(run)


def test_a_batch_carries_what_the_networks_would_give(inputs):
    config = configured(inputs)
    run = opened_run(config)
    encoder = load_converted(inputs.weights / "text_encoder", "text_encoder", text_length=TEXT.text_length)
    tokens = PieceTokenizer(inputs.weights / "tokenizer.json", TEXT.text_length)
    token_ids, mask = tokens.tokenize([PROMPTS[5], PROMPTS[1], PROMPTS[5]])
    wanted = batch_text(Frozen(None, encoder), {"token_ids": token_ids, "mask": mask})
    found = batch_text(run.frozen, read_texts(run, run.prompts, [5, 1, 5 + len(PROMPTS)]))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    batch = read_clips(run, "pretrain", 12, 0)  # all of them, in the order of the first epoch
    assert batch_latents(run.frozen, batch).shape == (12, 3, 4, 6, 16)
    uncaptioned = np.array([np.array_equal(text, run.empty_text[0]) for text in batch["text"]])
    assert uncaptioned.sum() == 3
    np.testing.assert_allclose(run.negative_text, _guidance(inputs, config.negative_prompt))
    assert not np.array_equal(run.negative_text, run.empty_text)


def _guidance(inputs, prompt):
    folder = str(inputs.folder / "prompts")
    return jnp.asarray(open_embeddings(folder, "", TEXT.text_length, TEXT.dim).guidance(prompt))


def test_batches_are_a_function_of_the_step_and_each_host_reads_its_rows(inputs, monkeypatch):
    run = opened_run(configured(inputs))
    whole = read_prompts(run, run.prompts, 4, 3), read_clips(run, "pretrain", 4, 3)
    for row in (slice(0, 2), slice(2, 4)):
        monkeypatch.setattr(stage_run, "local_rows", lambda batch_size, mesh, row=row: np.arange(batch_size)[row])
        part = read_prompts(run, run.prompts, 4, 3), read_clips(run, "pretrain", 4, 3)
        for batch, mine in zip(whole, part, strict=True):
            assert batch.keys() == mine.keys()
            for name in batch:
                np.testing.assert_array_equal(np.asarray(batch[name])[row], mine[name])


def test_each_network_reads_its_own_prompts_once_an_epoch(inputs):
    config = configured(
        inputs, f"--config.data.critic_embeddings={inputs.folder / 'critic'}", "--config.distill.critic_ratio=2"
    )
    run = opened_run(config)
    numbers = {"student": [], "critic": []}
    for iteration in range(6):
        for name, (texts, number) in update_prompts(run, iteration).items():
            assert texts is (run.prompts if name == "student" else run.critic_prompts)
            numbers[name].append(number)
    assert numbers == {"student": [0, 1, 2], "critic": [0, 1, 2, 3, 4, 5]}
    shared = opened_run(configured(inputs))
    read = [
        number for i in range(12) for texts, number in update_prompts(shared, i).values() if texts is shared.prompts
    ]
    assert read == list(range(len(read)))


def test_inputs_of_another_model_are_refused_before_anything_is_made(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("adastate_jax.training.stages.inputs.make_frozen", lambda *_: pytest.fail("something was made"))
    other = tmp_path / "other"
    other.mkdir()
    for name in ("text_encoder", "vae"):
        shutil.copytree(inputs.weights / name, other / name)
    small_wan.write_tokenizer(other / "tokenizer.json", [*small_wan.WORDS, "more"])
    text_length = [f"--config.{name}.text_length=71" for name in ("text", "model")]
    damaged = tmp_path / "damaged"
    shutil.copytree(inputs.folder / "prompts", damaged)
    next(damaged.glob("*train*00001*")).unlink()
    plain = [f"--checkpoint={inputs.weights}", f"--prompts={inputs.prompts}", "--text-length=70"]
    embed.main([*plain, f"--output={tmp_path / 'snow'}", "--negative-prompt=snow"])
    for options, said in (
        ([f"--config.data.encoders={other}"], "embeddings=.*prompts: was made with another tokenizer than"),
        (["--config.data.encoders=nowhere"], "nowhere/text_encoder: no such network"),
        (["--config.text.num_layers=3"], r"text_encoder: its num_layers is 2, config\.text\.num_layers is 3"),
        (["--config.vae.dim=8"], r"vae: its dim is 4, config\.vae\.dim is 8"),
        (text_length, r"its text_length is 70, but config\.text\.text_length is 71"),
        (["--config.data.clips.height=32"], r"latents are \[3, 4, 6, 16\] .* configuration's \[3, 8, 6, 16\]"),
        ([f"--config.data.captions={inputs.folder / 'critic'}"], "captions=.*critic: holds other prompts than the cap"),
        ([f"--config.data.latents={inputs.folder / 'prompts'}"], "prompts: holds 'embeddings', not latents"),
        (["--config.data.embeddings=nowhere"], r"nowhere: no such folder; make it with .*adastate_jax\.embed"),
        ([f"--config.data.embeddings={damaged}"], r"00001-of-\d+: missing; copy it again"),
        ([f"--config.data.critic_embeddings={tmp_path / 'snow'}"], "snow: holds no embedding of the negative prompt"),
    ):
        with pytest.raises(UserError, match=said):
            train(configured(inputs, *options), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (["data.latents="], "latents is not set; name a folder that encode wrote"),
        (["data.captions="], r"data\.captions is not set; make it of the latents' captions\.jsonl"),
        (["data.encoders="], r"data\.encoders is not set, and stage sample"),
        (["data.prompts=a.txt"], "prompts cannot be read where kind is latents; set embeddings instead"),
        (["data.kind=none"], "captions belong to latents, but kind is none"),
        (["data.kind=none", "data.captions="], "stage pretrain needs clips, and data.kind is none"),
        (["data.kind=videos", "data.folder=a", "data.captions="], "embeddings cannot be read where kind is videos"),
        (
            ["data.kind=none", "data.captions=", "data.embeddings=", "stages=('distill',)"],
            "data.embeddings is not set, and stage distill needs prompts",
        ),
    ],
)
def test_fields_that_do_not_go_together(inputs, fields, said):
    with pytest.raises(UserError, match=said):
        configured(inputs, *(f"--config.{field}" for field in fields))
