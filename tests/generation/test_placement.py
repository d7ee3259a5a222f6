"""Where a stream's networks lie: on several devices, on another than the decoder's, in eight bits; the same video."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_wan
from conftest import make_dit

import adastate_jax as ada
from adastate_jax.benchmarking.program import read_program
from adastate_jax.errors import UserError
from adastate_jax.generation.placement import WEIGHTS, Placement, find_device, in_eight_bits, stream_mesh
from adastate_jax.models.quantized import QUANTIZATIONS
from adastate_jax.sharding import make_mesh, replicated, tree_shardings
from adastate_jax.streaming.carry import initial_carry, seed_keys
from adastate_jax.streaming.rollout import stream_step
from adastate_jax.streaming.schedule import phase_of

# Heads that 2, 3 and 4 devices divide, and a feed-forward network that 3 do not, as Wan2.1 1.3B's; 12 tokens a frame.
WIDE = dataclasses.replace(
    small_wan.CONFIG,
    model=dataclasses.replace(small_wan.CONFIG.model, dim=96, ffn_dim=64, num_heads=12),
    data=dataclasses.replace(
        small_wan.CONFIG.data, clips=dataclasses.replace(small_wan.CONFIG.data.clips, height=24, width=32)
    ),
)
# Relative L2 error of a steady chunk's latents against float32 weights.
LATENT_ERROR = {"int8": 0.05, "float8": 0.15}
STREAM, SHAPE = WIDE.stream, WIDE.latent_shape
STEADY = phase_of(STREAM.num_fill_chunks, STREAM)


@pytest.fixture(scope="module")
def student():
    return make_dit(WIDE.model, 0)


@pytest.fixture(scope="module")
def begun(student):
    """The carry of a stream behind its fill, its cache full of random numbers, and its text's keys and values."""
    rng = np.random.default_rng(0)
    text = student.text_keys_values(rng.standard_normal((1, WIDE.text.text_length, WIDE.text.dim), np.float32))
    carry = initial_carry(student.config, STREAM, seed_keys(0, 1), *SHAPE[:2])
    cache = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), carry.cache)
    return dataclasses.replace(carry, cache=cache, chunk=jnp.int32(STREAM.num_fill_chunks)), text


def steady_chunk(student, begun, mesh):
    """The next chunk: its latents and the keys and values behind it on the host, and the program."""
    student = jax.device_put(student, tree_shardings(student, mesh))
    carry, text = jax.device_put(jax.tree.map(jnp.copy, begun), replicated(mesh))  # the carry is donated
    with jax.set_mesh(mesh):
        compiled = stream_step.lower(student, carry, text, STREAM, SHAPE, STEADY).compile()
        carry, chunk = compiled(student, carry, text)
    return [np.asarray(x) for x in jax.tree.leaves((chunk, carry.cache))], compiled


@pytest.fixture(scope="module")
def one(student, begun):
    return steady_chunk(student, begun, make_mesh())[0]


@pytest.mark.parametrize(("devices", "axis"), [(2, "model"), (3, "context"), (4, "model")])
def test_heads_over_devices_change_nothing(devices, axis, student, begun, one):
    mesh = stream_mesh(WIDE, devices, trained_here=False)
    assert mesh.shape[axis] == mesh.size == devices
    found, compiled = steady_chunk(student, begun, mesh)
    for ours, wanted in zip(found, one, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5)
    layers, passes = WIDE.model.num_layers, len(STREAM.sigmas) + 1
    exchanged = {(row.kind, row.axes): row.runs for row in read_program(compiled.as_text()).collectives(mesh)}
    if axis == "model":
        # Per layer three output projections, and the norms of queries and of keys, which are over all heads; per pass
        # the timestep's modulation.
        assert exchanged == {("all-reduce", axis): 5 * layers * passes, ("all-gather", axis): passes}
    else:
        # Tokens for heads and back: queries, keys, values and output. Weights and prompts are gathered.
        assert exchanged.keys() == {("all-to-all", axis), ("all-gather", axis), ("all-reduce", axis)}
        assert exchanged["all-to-all", axis] == 4 * layers * passes
        assert exchanged["all-reduce", axis] <= passes


@pytest.mark.parametrize("weights", WEIGHTS)
def test_eight_bits_stream_nearly_the_same_chunk(weights, student, begun, one):
    """Relative error of the latents of a chunk from one carry; later ones are other than the model's anyway."""
    small = in_eight_bits(student, weights, make_mesh())
    latents = steady_chunk(small, begun, make_mesh())[0][0]
    error = np.linalg.norm(latents - one[0]) / np.linalg.norm(one[0])
    assert 0 < error < LATENT_ERROR[weights]
    assert in_eight_bits(small, weights, make_mesh()) is small


def test_the_mesh_is_what_divides_the_network_or_refused_by_name(folder):
    with pytest.raises(UserError, match=re.escape("devices 5: cannot share this transformer: student.num_heads 12")):
        stream_mesh(WIDE, 5, trained_here=False)
    with pytest.raises(UserError, match="devices 12: mesh"):
        stream_mesh(dataclasses.replace(WIDE, model=dataclasses.replace(WIDE.model, ffn_dim=96)), 12, False)
    with pytest.raises(UserError, match=re.escape("devices 3: cannot share this transformer: student.num_heads 2")):
        ada.load(folder, small_wan.CONFIG, devices=3)
    with pytest.raises(UserError, match=re.escape("text.dim_attention 64")):
        ada.load("tiny", devices=3)


def test_another_devices_decoder_makes_the_same_video(folder, model, tmp_path):
    apart = ada.load(folder, small_wan.CONFIG, decoder_device="3")
    assert {device.id for leaf in jax.tree.leaves(apart.codec) for device in leaf.devices()} == {3}
    options = {"seconds": 1.25, "start": np.full((5, 16, 24, 3), 90, np.uint8)}
    wanted = np.concatenate(list(ada.stream(model, "a fox", **options)))
    np.testing.assert_array_equal(np.concatenate(list(ada.stream(apart, "a fox", **options))), wanted)
    video = ada.stream(apart, "a fox", **options)
    first = next(video)
    ada.save_stream(video, tmp_path / "saved")
    np.testing.assert_array_equal(np.concatenate([first, *ada.load_stream(apart, tmp_path / "saved")]), wanted)
    with pytest.raises(UserError, match="anchor causvid: decodes and encodes between its chunks"):
        ada.stream(apart, "a fox", seconds=2, anchor="causvid")


@pytest.mark.parametrize(("name", "id"), [("cpu", 0), ("2", 2), ("cpu:1", 1)])
def test_a_device_is_found_by_number_or_platform(name, id):
    assert find_device(name).id == id


@pytest.mark.parametrize("name", ["99", "gpu", "cpu:x", "", "-1"])
def test_a_device_that_is_not_here_is_refused_by_name(name):
    with pytest.raises(UserError, match=f"decoder_device {name}: no such device; of cpu there are 0 … 7"):
        find_device(name)


def test_low_memory_keeps_no_text_encoder(folder, tmp_path):
    model = ada.load(folder, small_wan.CONFIG, low_memory=True, text_cache=tmp_path / "low")
    assert model.student.config.quantization == "int8"
    embedded = model.embed(["a fox"])
    assert "_encoder" not in vars(model.embed)
    other = ada.load(folder, small_wan.CONFIG, text_cache=tmp_path / "other")
    np.testing.assert_array_equal(other.embed(["a fox"]), embedded)
    assert "_encoder" in vars(other.embed)


def test_wrong_placements_are_refused_in_a_line(student):
    assert ("", *WEIGHTS) == QUANTIZATIONS
    for field, value in (("weights", "int4"), ("devices", 0), ("devices", True), ("decoder_device", 3)):
        with pytest.raises(UserError, match=f"^{field} must be"):
            Placement(**{field: value})
    with pytest.raises(UserError, match="devices: the mesh says how many"):
        ada.load(config=WIDE, random_weights=True, mesh=make_mesh(), devices=1)
    with pytest.raises(UserError, match="weights int8: the configuration has them in float8 already"):
        in_eight_bits(in_eight_bits(student, "float8", make_mesh()), "int8", make_mesh())
