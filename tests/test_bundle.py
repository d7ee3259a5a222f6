"""Bundles: what ships as `tiny`, and that a bundle is its run, rounded."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import make_dit
from flax import nnx

import adastate_jax as ada
from adastate_jax import bundle
from adastate_jax.checkpoint import save_tree
from adastate_jax.config.files import parse_config, save_config
from adastate_jax.errors import UserError
from adastate_jax.fields import to_dict
from adastate_jax.generation import shipped
from adastate_jax.generation.trained import Trained, load_run, write_bundle
from adastate_jax.generation.video_stream import stream_batch
from adastate_jax.models.patch_codec import PatchCodec
from adastate_jax.models.text import TextEncoder
from adastate_jax.sharding import make_mesh
from adastate_jax.training.frozen import Frozen
from adastate_jax.weights.safetensors_file import SafeTensors, write_safetensors

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "adastate_jax" / "bundled"
PROMPT = "a camera pans left over green hills with a red ball"


@pytest.fixture(scope="module")
def trained():
    """Everything random that a run of this configuration would have trained."""
    channels = 8
    overrides = [f"codec.channels={channels}", f"model.in_channels={channels}", f"model.out_channels={channels}"]
    overrides += ["model.dim=16", "model.ffn_dim=16", "model.num_heads=1", "model.num_layers=2"]
    config = parse_config([f"--config={ROOT / 'configs' / 'tiny.py'}", *(f"--config.{line}" for line in overrides)])
    rng = np.random.default_rng(0)
    size = 3 * config.codec.patch**2
    codec = PatchCodec(*(rng.standard_normal(shape, np.float32) for shape in (size, (size, channels), channels)))
    encoder = jax.jit(lambda: TextEncoder(config.text, rngs=nnx.Rngs(0)))()
    return config, Trained(make_dit(config.model, 1), Frozen(codec, encoder))


@pytest.fixture
def run(trained, tmp_path):
    """A folder with what `train` leaves there when it is done."""
    config, parts = trained
    folder = tmp_path / "run"
    folder.mkdir()
    save_config(config, folder / "config.json")
    save_tree(folder / "frozen", parts.frozen)
    save_tree(folder / "distill" / str(config.distill.steps), {"student": {"ema": parts.student}})
    return folder


def pack(run, output):
    return bundle.main([f"--run={run}", f"--output={output}"])


def test_a_bundle_is_its_run_rounded_to_half_precision(run, tmp_path):
    output = tmp_path / "new" / "small.safetensors"
    assert pack(run, output) == 0
    config, whole = load_run(run, make_mesh())
    model = ada.load(output)
    assert model.config == config
    for exact, rounded in zip(
        jax.tree.leaves((whole.student, whole.frozen.codec)), jax.tree.leaves((model.student, model.codec)), strict=True
    ):
        assert rounded.dtype == exact.dtype
        np.testing.assert_array_equal(rounded, np.asarray(exact).astype(np.float16))
    np.testing.assert_allclose(model.embed([PROMPT]), ada.load(run).embed([PROMPT]), rtol=0, atol=0.02)
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_a_bundle_is_split_over_devices(run, tmp_path):
    output = tmp_path / "small.safetensors"
    pack(run, output)
    kernel = ada.load(output, mesh=make_mesh(fsdp=2, model=2)).student.blocks.ffn_in.kernel[...]
    assert len(kernel.sharding.device_set) == 4


def test_the_shipped_model_streams_what_the_prompt_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = ada.load("tiny")
    prompts = [PROMPT, PROMPT.replace("green hills", "sand dunes")]
    videos = np.concatenate(list(stream_batch(model, prompts, seed=0, num_frames=16)), axis=1)
    assert videos.shape == (2, 16, *model.config.data.size, 3)
    assert np.abs(np.diff(videos.astype(int), axis=1)).mean(axis=(2, 3, 4)).min() > 1  # no frame repeats
    (hills_red, hills_green), (dunes_red, dunes_green) = videos[..., :2].mean(axis=(1, 2, 3))
    assert hills_green > hills_red
    assert dunes_red > dunes_green


def test_what_ships_is_small():
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) < 8e6
    assert sorted(file.name for file in SHIPPED.iterdir()) == ["fixtures", "tiny.safetensors"]


def test_ones_own_folder_goes_before_the_shipped_model(run, trained, tmp_path, monkeypatch):
    run.rename(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert ada.load("tiny").config == trained[0]
    assert ada.load(SHIPPED / "tiny.safetensors").config != trained[0]


# --- what is refused --------------------------------------------------------------------------------------------------


def refusal(function, *arguments) -> str:
    """The one line by which a call is refused."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unfinished_run_is_not_packed(run, trained, tmp_path):
    config, parts = trained
    output = tmp_path / "small.safetensors"
    longer = dataclasses.replace(config.distill, steps=config.distill.steps + 1)
    save_config(dataclasses.replace(config, distill=longer), run / "config.json")
    assert re.search(r"run: stage distill is at step 100 of 101; train to its end first", refusal(pack, run, output))
    shutil.rmtree(run / "distill")
    assert re.search("run: holds no causal student yet", refusal(ada.load, run))
    save_tree(run / "initialize" / "3", {"ema": parts.student})
    assert re.search(r"run: stage distill is at step 0 of 101", refusal(pack, run, output))
    assert re.search("must end in .safetensors", refusal(pack, run, tmp_path / "small"))
    assert re.search(
        r"cannot be written \(", refusal(write_bundle, config, parts, run / "config.json" / "small.safetensors")
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_weights_beyond_half_precision_are_refused(run, trained, tmp_path):
    _, parts = trained
    codec = dataclasses.replace(parts.frozen.codec, mean=parts.frozen.codec.mean * 1e5)
    save_tree(run / "frozen", dataclasses.replace(parts.frozen, codec=codec))
    assert re.search(
        "frozen/codec/mean: holds NaN, infinity or numbers beyond float16",
        refusal(pack, run, tmp_path / "a.safetensors"),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_damaged_bundle_is_named(tmp_path, monkeypatch):
    whole = (SHIPPED / "tiny.safetensors").read_bytes()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shipped, "_BUNDLED", tmp_path / "bundled")
    assert re.search("^tiny: no such folder", refusal(ada.load, "tiny"))
    broken = tmp_path / "bundled" / "tiny.safetensors"
    broken.parent.mkdir()
    broken.write_bytes(whole[:-1])
    assert re.search(r"tiny\.safetensors: not a readable \.safetensors file", refusal(ada.load, "tiny"))
    broken.write_bytes(b"")
    assert re.search(r"tiny\.safetensors: not a readable \.safetensors file", refusal(ada.load, "tiny"))


def test_a_file_that_is_no_bundle_is_named(trained, run, tmp_path):
    config, _ = trained
    output = tmp_path / "small.safetensors"
    write_safetensors(output, {}, [], {})
    assert re.search("holds no configuration", refusal(ada.load, output))
    write_safetensors(output, {}, [], {"config": "[" * 100_000})
    assert re.search("its configuration: is nested too deeply", refusal(ada.load, output))
    fields = to_dict(config)
    fields["model"]["num_layers"] = 3
    repack(run, output, config=json.dumps(fields))
    assert re.search("its tensors are not those of its configuration: student/blocks", refusal(ada.load, output))
    assert re.search("has its own configuration", refusal(ada.load, output, config))


def repack(run, output, change=lambda tensors: None, **metadata):
    """A bundle of the run with other numbers or another header."""
    packed = output.with_name("packed.safetensors")
    if not packed.exists():
        pack(run, packed)
    opened = SafeTensors(packed)
    tensors = {name: np.array(opened[name]) for name in opened}
    change(tensors)
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    header = {key: value for key, value in (opened.metadata | metadata).items() if value is not None}
    write_safetensors(output, layout, tensors.values(), header)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_do_not_stream(run, tmp_path, value):
    output = tmp_path / "small.safetensors"
    damage = lambda tensors: tensors["frozen/codec/mean"].__setitem__(3, value)  # noqa: E731
    repack(run, output, damage, crc32=None)
    assert re.search("small.safetensors: frozen/codec/mean holds NaN or infinity", refusal(ada.load, output))


def test_any_flipped_bit_is_noticed_and_bundles_without_checksum_load(run, tmp_path):
    output = tmp_path / "small.safetensors"
    repack(run, output, lambda tensors: tensors["frozen/codec/mean"].__setitem__(3, 0.5))
    assert re.search(
        "small.safetensors: damaged: does not match its checksum; copy it again", refusal(ada.load, output)
    )
    config = SafeTensors(tmp_path / "packed.safetensors").metadata["config"]
    repack(run, output, config=config.replace('"seed": 0', '"seed": 1', 1))
    assert re.search("does not match its checksum", refusal(ada.load, output))
    repack(run, output, crc32="x")
    assert re.search("does not match its checksum", refusal(ada.load, output))
    repack(run, output, crc32=None)
    assert ada.load(output).config == ada.load(tmp_path / "packed.safetensors").config


def test_a_model_says_what_it_is(run, trained, tmp_path):
    _, parts = trained
    output = tmp_path / "small.safetensors"
    pack(run, output)
    weights = sum(leaf.size for leaf in jax.tree.leaves(parts.student))
    for path, origin in ((run, f"{run}, distilled student at step 100"), (output, str(output))):
        first, second, third = repr(ada.load(path)).splitlines()
        assert first == f"Model from {origin}"
        assert second == (
            f"  transformer of {weights / 1e6:.3g} M weights (2 layers of 16, float32); videos of 32×32 pixels by the "
            "patch decoder"
        )
        assert third == (
            "  anchor adaptive (frames=1); chunks of 3 latent frames, a window of 3, denoising steps 1000, 750, 500, "
            "250"
        )


def test_it_is_said_which_student_streams(run, trained, capsys):
    config, parts = trained
    assert ada.load(run) is not None
    assert capsys.readouterr().err == ""
    longer = dataclasses.replace(config.distill, steps=config.distill.steps + 1)
    save_config(dataclasses.replace(config, distill=longer), run / "config.json")
    assert "distilled student at step 100 of 101" in repr(ada.load(run))
    shutil.rmtree(run / "distill")
    save_tree(run / "initialize" / "3", {"ema": parts.student})
    assert "initialised student at step 3 of" in repr(ada.load(run))
    assert capsys.readouterr().err == (
        f"note: {run}: has no finished checkpoint of distill; the student of initialize streams instead\n"
    )


def test_an_existing_output_stays_unless_told(run, tmp_path):
    output = tmp_path / "small.safetensors"
    output.write_text("mine")
    assert re.search(r"--output=.*: exists; name another, or add --overwrite", refusal(pack, run, output))
    assert output.read_text() == "mine"
    assert bundle.main([f"--run={run}", f"--output={output}", "--overwrite"]) == 0
    assert ada.load(output).config == ada.load(run).config
