"""The bench command: what it counts is what the networks do, and what it writes is complete."""

import importlib.util
import itertools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LATENT_SHAPE, SMALL
from flax import nnx
from jax.extend.core import jaxprs_in_params

from adastate_jax import bench
from adastate_jax.benchmarking import flops, machine, measure, report
from adastate_jax.config.files import parse_config
from adastate_jax.config.stages import DistillConfig
from adastate_jax.errors import UserError
from adastate_jax.media import FPS
from adastate_jax.models.adapters import LoRAConfig, create_adapters, join
from adastate_jax.models.attention import KeyValues
from adastate_jax.models.dit import DiTConfig
from adastate_jax.models.patch_codec import PatchCodecConfig
from adastate_jax.models.tiny_vae import TinyVAE, TinyVAEConfig
from adastate_jax.models.vae import VAE, VAEConfig, decoder_levels
from adastate_jax.models.video_coding import decode, decoder_cache
from adastate_jax.streaming.anchors.adaptive import AdaptiveAnchor
from adastate_jax.streaming.anchors.static import StaticAnchor
from adastate_jax.streaming.prompts import schedule
from adastate_jax.streaming.schedule import StreamConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODEL = ROOT.parent / "shared" / "perf_model.py"  # an independent count for Wan2.1's networks
WAN, STREAM, FRAME = DiTConfig(), StreamConfig(), 1560  # tokens per latent frame of 480×832
TEACHER = DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)

SMALL_CONFIG = [
    f"--config={ROOT / 'configs' / 'tiny.py'}",
    *(
        "--config.model.dim=32",
        "--config.model.num_heads=2",
        "--config.model.ffn_dim=32",
        "--config.model.num_layers=1",
    ),
    *("--config.pretrain.batch_size=2", "--config.initialize.batch_size=2", "--config.distill.batch_size=2"),
    "--config.stream.denoising_steps=(1000.0, 500.0)",
]
WAN_DECODERS = [
    "--config.stages=()",
    "--config.decoder=wan",
    *("--config.model.in_channels=16", "--config.model.out_channels=16"),
    *("--config.vae.dim=8", "--config.tiny_vae.widths=(8, 8, 8)"),
]


# --- counting ---------------------------------------------------------------------------------------------------------


def counted(function, *arguments) -> int:
    """Operations of all matrix products and convolutions that a function traces to."""

    def walk(jaxpr) -> int:
        total = 0
        for equation in jaxpr.eqns:
            shapes = [variable.aval.shape for variable in equation.invars]
            outputs = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
            if equation.primitive.name == "dot_general":
                ((contracted, _), _) = equation.params["dimension_numbers"]
                total += 2 * outputs * math.prod(shapes[0][axis] for axis in contracted)
            elif equation.primitive.name == "conv_general_dilated":
                channels_out = shapes[1][equation.params["dimension_numbers"].rhs_spec[0]]
                total += 2 * outputs * math.prod(shapes[1]) // channels_out
            else:
                inner = sum(walk(sub) for sub in jaxprs_in_params(equation.params))
                total += inner * equation.params.get("length", 1)
        return total

    return walk(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_a_pass_takes_what_is_counted(student):
    """Live frames, and a context of three more."""
    tokens = SMALL.frame_tokens(*LATENT_SHAPE[:2])
    latents = jnp.zeros((1, 2, *LATENT_SHAPE))

    def keys_values(tokens):
        shape = (SMALL.num_layers, 1, tokens, SMALL.num_heads, SMALL.head_dim)
        return KeyValues(jnp.zeros(shape), jnp.zeros(shape))

    def run(text, context):
        return student(latents, jnp.zeros((1, 2)), text, np.arange(2), context=context)

    work = counted(run, keys_values(SMALL.text_length), keys_values(3 * tokens))
    # Queries and keys are turned by a product with a permutation, which is how it runs, not what the network is.
    permutations = 2 * SMALL.num_layers * (2 * 2 * tokens * SMALL.dim * SMALL.head_dim)
    assert work - permutations == flops.pass_flops(SMALL, 2, 5, tokens).total
    embeddings = jnp.zeros((1, SMALL.text_length, SMALL.text_dim))
    assert counted(student.text_keys_values, embeddings) == flops.text_flops(SMALL).total

    lora = LoRAConfig(rank=2)
    adapted = join(create_adapters(SMALL, lora, jax.random.key(0)), student)
    text = keys_values(SMALL.text_length)
    products = counted(lambda: adapted(latents, jnp.zeros((1, 2)), text, np.arange(2), context=keys_values(3 * tokens)))
    assert products - permutations == flops.pass_flops(SMALL, 2, 5, tokens, lora).total > work - permutations
    assert counted(adapted.text_keys_values, embeddings) == flops.text_flops(SMALL, lora).total


def _causal_products(config, height, width) -> int:
    """Products of inputs and outputs over all causal convolutions of 3×3 pixels that a first frame passes, per tap."""
    levels, pixels = decoder_levels(config), height * width
    middle = levels[0].inputs
    total = pixels * (config.latent_channels * middle + 4 * middle**2)
    for level in levels:
        if level.resample:
            pixels *= 4
        else:
            total += pixels * (level.inputs * level.outputs + level.outputs**2)
    return total + pixels * config.dim * 3


@pytest.mark.parametrize("first", [True, False])
def test_a_decoder_takes_what_is_counted(first):
    """But for the convolution behind an upsampling, which ours folds into it: four taps for nine; and for the two
    frames of zeros before the first."""
    config = VAEConfig(dim=4, latent_channels=2, num_res_blocks=1, latents_mean=(0.0, 0.0), latents_std=(1.0, 1.0))
    model = jax.eval_shape(lambda: VAE(config, rngs=nnx.Rngs(0), parts=("decoder",)))
    cache = decoder_cache(model, 1, 2, 3)
    work = counted(lambda model: decode(model, jnp.zeros((1, 3, 2, 3, 2)), cache, first), model)
    saved = 0
    for frames, growth in ((1, 1), (2, 2)) if first else ((3, 2),):  # the first frame is not resampled in time
        height, width = 2, 3
        if first and frames == 1:
            saved += 2 * 18 * _causal_products(config, 2, 3)
        for level in (level for level in decoder_levels(config) if level.resample):
            frames *= growth if level.temporal else 1
            taps = 9 * 4 * height * width - 4 * 4 * (height + 1) * (width + 1)  # four small images, with a margin
            saved += 2 * level.inputs * level.outputs * frames * taps
            height, width = 2 * height, 2 * width
    assert work == flops.decoder_flops(config, 2, 3, 3, first) - saved


def test_the_tiny_decoder_takes_what_is_counted():
    """But for growing in time, which ours does before the upsampling: a quarter of the counted products.

    And on a processor for the convolution behind it, as above.
    """
    config = TinyVAEConfig(latent_channels=2, widths=(4, 4, 4))
    model = jax.eval_shape(lambda: TinyVAE(config, rngs=nnx.Rngs(0), parts=("decoder",)))
    cache = decoder_cache(model, 1, 2, 3)
    work = counted(lambda model: decode(model, jnp.zeros((1, 3, 2, 3, 2)), cache, False), model)
    pixels = 3 * 2 * 3  # and levels of 1, 4 and 2 · 16 times as many latents, growing 1, 2 and 2 times
    growing = 2 * 4**2 * pixels * (1 + 4 * 2 + 2 * 16 * 2)
    saved = 0
    for frames, height, width in ((3, 2, 3), (6, 4, 6), (12, 8, 12)):  # behind growing
        saved += 2 * 4**2 * frames * (9 * 4 * height * width - 4 * 4 * (height + 1) * (width + 1))
    assert work == flops.decoder_flops(config, 2, 3, 3) - 3 * growing - saved


def test_wan_2_1_takes_what_is_published():
    """30.55 TFLOP a pass and 152.8 a chunk at AdaState's window, 40.65 to decode it; see docs/performance.md."""
    one = flops.chunk_pass_flops(WAN, STREAM, 2, FRAME)
    assert [round(x / 1e12, 2) for x in (one.total, one.linear, one.attention)] == [30.55, 15.61, 14.94]
    assert round(flops.chunk_flops(WAN, STREAM, 2, FRAME) / 1e12, 1) == 152.8
    assert round(flops.decoder_flops(VAEConfig(), 60, 104, 3) / 1e12, 2) == 40.65
    assert round(flops.decoder_flops(VAEConfig(), 60, 104, 3, first=True) / 1e12, 2) == 31.45
    assert round(flops.decoder_flops(TinyVAEConfig(), 60, 104, 3) / 1e12, 3) == 1.632
    assert flops.decoder_flops(PatchCodecConfig(patch=2, channels=5), 3, 4, 6) == 2 * 6 * 12 * 5 * 12
    training = (
        flops.rollout_flops(WAN, STREAM, 21, FRAME),
        flops.critic_flops(WAN, WAN, STREAM, DistillConfig(), FRAME),
        flops.student_flops(WAN, WAN, TEACHER, STREAM, DistillConfig(), FRAME),
    )
    assert [round(x.total / 1e15, 2) for x in training] == [0.66, 1.79, 4.87]


def test_longer_rollouts_take_what_their_parts_take():
    """A window of 21 frames in 120 is rolled out up to on average; segments are 18 frames, but for the first."""
    window = DistillConfig(rollout_frames=120, scored_frames=21)
    segments = DistillConfig(rollout_frames=237, scored_frames=21, overlap_frames=3, continue_rollout=True)
    steady = flops.chunk_pass_flops(WAN, STREAM, 2, FRAME)
    scoring = flops.pretrain_flops(WAN, 21, FRAME)
    for config, chunks in ((window, (40 - 7) / 2 + 7), (segments, 79 / 13)):
        rolled = flops.critic_flops(WAN, WAN, STREAM, config, FRAME).total - scoring.total
        assert rolled == pytest.approx(chunks * steady.total * 3.5, rel=0.06)  # the fill takes less


def test_counts_agree_with_an_independent_model():
    if not MODEL.is_file():
        pytest.skip(f"no independent count: {MODEL} is not there")
    spec = importlib.util.spec_from_file_location("perf_model", MODEL)
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    for chunk, (live, seen) in enumerate([(3, 3), (3, 6), (4, 8), (4, 8)]):
        ours = flops.chunk_pass_flops(WAN, STREAM, chunk, FRAME)
        assert (
            ours._asdict().items()
            <= {
                "linear": theirs.W13.fwd(live * FRAME, seen * FRAME, live)["linear"],
                "attention": theirs.W13.fwd(live * FRAME, seen * FRAME, live)["attn"],
            }.items()
        )
    assert flops.text_flops(WAN).total == theirs.W13.prompt_once()
    assert flops.decoder_flops(VAEConfig(), 60, 104, 3) == theirs.tot(theirs.wan_vae_decoder(T=3), 7)
    assert flops.decoder_flops(TinyVAEConfig(), 60, 104, 3) == theirs.tot(theirs.taehv_decoder(T=3), 7)
    for ours, model in ((WAN, theirs.W13), (TEACHER, theirs.W14)):
        whole = model.fwd(21 * FRAME, 21 * FRAME, 21, text_kv_cached=False)
        assert flops.clip_flops(ours, 21, FRAME).total == whole["total"]


def test_remat_is_counted():
    forward = flops.clip_flops(SMALL, 3, 4)
    config = dict(vars(SMALL))
    counts = {
        remat: flops.pretrain_flops(DiTConfig(**config | {"remat": remat}), 3, 4).total - 3 * forward.total
        for remat in ("none", "block", "attention")
    }
    assert counts == {"none": 0, "block": forward.total, "attention": forward.linear}


def test_initialisation_is_counted():
    """A block-causal pass without a limit on the past takes each chunk's own pass; a clean copy takes as many again."""
    stream = StreamConfig(chunk_frames=1, past_frames=2)
    passes = [flops.pass_flops(SMALL, 1, seen, 4).total for seen in (1, 2, 3, 3)]
    text = flops.text_flops(SMALL).total
    assert flops.initialize_flops(SMALL, stream, 4, 4, "noisy").total == 3 * (sum(passes) + text)
    assert flops.initialize_flops(SMALL, stream, 4, 4, "clean").total == 3 * (2 * sum(passes) + text)
    # A stream's chunk sees the anchor too.
    stream = StreamConfig(chunk_frames=1, past_frames=2, anchor=StaticAnchor(1))
    passes = [flops.pass_flops(SMALL, 1, seen, 4).total for seen in (1, 2, 3, 4)]
    assert flops.initialize_flops(SMALL, stream, 4, 4, "stream").total == 3 * (2 * sum(passes) + text)
    # A hidden state is denoised with the fourth chunk, at two levels and clean.
    stream = StreamConfig(chunk_frames=1, past_frames=2, anchor=AdaptiveAnchor(1), denoising_steps=(1000.0, 500.0))
    passes = [*passes[:3], flops.pass_flops(SMALL, 2, 5, 4).total]
    assert flops.initialize_flops(SMALL, stream, 4, 4, "state").total == 3 * (3 * sum(passes) + text)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_probe(monkeypatch):
    """Ceilings without the gigabytes: the probe itself is run once, below."""
    monkeypatch.setattr(machine, "probe", lambda: {"bfloat16": 2e10, "float32": 1e10, "copy": 1e9})


def run(tmp_path, *arguments) -> dict:
    output = tmp_path / "bench.json"
    assert bench.main([*SMALL_CONFIG, *arguments, f"--output={output}"]) == 0
    assert list(tmp_path.iterdir()) == [output]
    return json.loads(output.read_text())


def check_rows(record, repeats) -> dict:
    for row in record["measurements"]:
        assert 0 < row["median_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["repeats"] == repeats
        assert row["peak_mebibytes"] > 1
        if "tflop" in row:
            rate = row["tflop"] / row["median_ms"] * 1e3
            assert row["tflops_per_second"] == pytest.approx(rate)
            assert row["percent_of_ceiling"] == pytest.approx(100 * rate / record["ceilings"]["float32_tflops"])
    return {row["name"]: row for row in record["measurements"]}


def test_a_stream_is_measured(tmp_path, small_probe, capsys):
    """All times with both of Wan2.1's decoders, and three kinds of frames per second that follow from them."""
    sections = ("pass", "chunk", "decode", "end_to_end", "first_image", "prompt_switch")
    record = run(tmp_path, *WAN_DECODERS, "--repeats=2", "--only", *sections)
    rows = check_rows(record, 2)
    per_decoder = [
        f"{kind}{name}"
        for kind in ("decoder ", "end to end, ", "first image, ", "prompt switch, ")
        for name in ("wan", "tiny")
    ]
    assert list(rows) == ["DiT pass", "chunk", *per_decoder]
    # The steady state has two denoising steps and the clean pass.
    assert rows["chunk"]["tflop"] == pytest.approx(3 * rows["DiT pass"]["tflop"])
    assert rows["chunk"]["growth_mebibytes"] >= 0
    assert record["skipped"] == {}
    assert record["attention"] == "xla"
    assert record["device"]["kind"] == jax.devices()[0].device_kind
    assert record["device"]["versions"].keys() >= {"jax", "jaxlib"}
    assert record["config"]["vae"]["dim"] == 8
    fps = record["fps"]
    assert fps["images_per_chunk"] == 12
    assert fps["dit"] == pytest.approx(12e3 / rows["chunk"]["median_ms"])
    for name in ("wan", "tiny"):
        both = rows["chunk"]["median_ms"] + rows[f"decoder {name}"]["median_ms"]
        assert fps["with_decoder"][name] == pytest.approx(12e3 / both)
        assert fps["end_to_end"][name] > 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)
    assert printed.count("FPS") == 5


def test_a_switch_is_timed_at_its_boundary(monkeypatch):
    """With a clock by which a chunk takes a second, and the first of a prompt two."""
    config = parse_config([*SMALL_CONFIG, *WAN_DECODERS])
    clock = 0.0

    def stream(model, prompts):
        nonlocal clock
        starts = schedule(prompts, model.config.stream, model.config.time_factor, FPS).starts
        for chunk in itertools.count():
            clock += 2.0 if chunk in starts else 1.0
            yield

    monkeypatch.setattr(measure.video_stream, "stream", stream)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock)
    subject = measure.Subject(config, None, None, {"wan": None}, None)
    assert measure.time_prompt_switch(subject, "wan", 3).seconds == (2.0, 2.0, 2.0)


def test_training_is_measured(tmp_path, small_probe):
    rows = check_rows(run(tmp_path, "--repeats=1", "--only", "training"), 1)
    assert list(rows) == [
        f"{name}, batch 2" for name in ("pretrain", "initialize", "distill student", "distill critic")
    ]
    assert all(row["tflop"] > 0 for row in rows.values())


def test_a_stream_gets_ready(tmp_path, small_probe):
    """In processes of their own; what they compile is found again."""
    rows = check_rows(run(tmp_path, "--only", "ready"), 1)
    assert list(rows) == ["start to ready, cold", "start to ready, cached"]


def test_what_does_not_fit_is_said(tmp_path, small_probe, monkeypatch):
    """A section that runs out of memory costs only its own rows."""

    def exhausted(subject, repeats):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    monkeypatch.setattr(measure, "time_chunk", exhausted)
    record = run(tmp_path, "--repeats=1", "--only", "pass", "chunk")
    assert record["skipped"] == {"chunk": "out of memory"}
    assert [row["name"] for row in record["measurements"]] == ["DiT pass"]
    assert "chunk: out of memory" in report.table(record)


def test_all_devices_of_the_mesh_share_the_ceiling():
    """Those along `context`, too."""
    config = parse_config([*SMALL_CONFIG, *WAN_DECODERS, "--config.mesh.context=2", "--config.mesh.model=2"])
    row = measure.Measurement("chunk", (0.5,), flops=10**9, dtype="float32")
    record = report._record(config, [row], {}, {"bfloat16": 2e9, "float32": 1e9, "copy": 1e9})
    assert record["devices_used"] == 4
    assert record["measurements"][0]["percent_of_ceiling"] == pytest.approx(50)


def test_the_ceiling_of_float32_is_float32():
    """On a GPU it would be that of TF32, which no network computes in."""
    for dtype, exact in (("float32", 2), ("bfloat16", 0)):
        square = jax.ShapeDtypeStruct((4, 4), dtype)
        assert machine._multiply.lower(square, square).as_text().count("HIGHEST") == exact


def test_the_probe_finds_a_machine():
    ceilings = machine.probe()
    assert ceilings.keys() == {"bfloat16", "float32", "copy"}
    assert all(1e8 < value < 1e17 for value in ceilings.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats=0"], "--repeats=0: must be at least 1"),
        (["--output=/proc/bench.json"], "--output=/proc/bench.json: cannot be written"),
        (["--config.model.layers=1"], "layers"),
        (["--config.mesh.data=99", "--only", "pass"], "config.mesh: .* needs 99 devices"),
        (["--config.model.attention=cudnn", "--only", "pass"], "attention cudnn: it does not run on cpu"),
    ],
)
def test_bad_input_is_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        bench.main([*SMALL_CONFIG, *arguments])
    assert not list(tmp_path.iterdir())


def test_unknown_sections_are_refused():
    with pytest.raises(UserError, match="--only: invalid choice: 'everything'"):
        bench.main([*SMALL_CONFIG, "--only", "everything"])


def test_the_small_configuration_is_one():
    config = parse_config([*SMALL_CONFIG, *WAN_DECODERS])
    assert config.latent_shape == (4, 4, 16)
