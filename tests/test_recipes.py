"""The configurations of the published recipes: their sizes, numbers and shapes, without any weights."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adastate_jax.config import parse_config
from adastate_jax.config.stages import ode_sigmas
from adastate_jax.diffusion import warp
from adastate_jax.sharding import make_mesh
from adastate_jax.streaming.presets import PRESETS
from adastate_jax.training.dmd import critic_gradients, draw_update, student_gradients
from adastate_jax.training.frozen import abstract_network, with_shardings
from adastate_jax.training.guidance import guided
from adastate_jax.training.stages.run import abstract_states

CONFIGS = Path(__file__).parents[1] / "configs"
# Weights of the published files: the sums of manifest_wan_t2v_1.3B and manifest_wan_t2v_14B.
SMALL, LARGE = 1_418_996_800, 14_288_491_584
# Weights of adapters of rank 256 on the linear layers of 30 blocks: eight of 1536 to 1536, two of 1536 and 8960.
LORA = 30 * 256 * (8 * (1536 + 1536) + 2 * (1536 + 8960))


def recipe(name: str, *others: str):
    file, colon, setting = name.partition(":")
    return parse_config([f"--config={CONFIGS / file}.py{colon}{setting}", *others])


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("name", "teacher", "stages", "batch", "steps", "alpha", "anchor"),
    [
        ("adastate_wan", LARGE, ("distill", "sample"), 4, 1000, 2.0, 1),
        ("adastate_wan:long", LARGE, ("distill", "sample"), 4, 1000, 4.0, 1),
        ("self_forcing_wan", LARGE, ("distill", "sample"), 64, 600, 0.0, 0),
        ("wan_initialize", SMALL, ("initialize",), 64, 3000, None, 0),
    ],
)
def test_a_recipe_has_the_published_sizes_and_numbers(name, teacher, stages, batch, steps, alpha, anchor):
    config = recipe(name)
    networks = {network: abstract_network(config.network(network)) for network in ("teacher", "critic", "student")}
    assert {network: count(tree) for network, tree in networks.items()} == {
        "teacher": teacher,
        "critic": SMALL,
        "student": SMALL,
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(networks["teacher"])} == {jnp.dtype("bfloat16")}
    assert config.stages == stages
    stage = getattr(config, stages[0])
    assert (stage.steps, stage.batch_size, config.trajectory_frames) == (steps, batch, 21)
    assert config.latent_shape == (60, 104, 16)
    assert config.stream.anchor.state_frames == anchor
    assert config.stream.past_frames == (3 if anchor else 18)
    if alpha is not None:
        assert config.distill.horizon_alpha == alpha
    state = abstract_states(config)[stages[0]]
    state = state["student"] if stages[0] == "distill" else state
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_long_tuning_has_the_published_numbers():
    """Segments of 21 and 18 frames to 237, adapters of rank 256, and the stream that it trains for."""
    config = recipe("longlive_wan")
    assert (config.distill.segments, config.distill.clip_frames, config.trajectory_frames) == (13, 21, 21)
    assert config.stream == PRESETS["longlive"].stream
    assert {(config.student.lora.rank, config.critic.lora.rank)} == {(256, 256)}
    state = abstract_states(config)["distill"]
    assert count(state["student"].params) == count(state["critic"].params) == LORA


def test_the_steps_of_the_recipe_are_traced_with_the_large_teacher():
    """Shapes go through both updates: embeddings, latents and three networks of two sizes fit together."""
    config = recipe("adastate_wan")
    teacher, critic, student = (abstract_network(config.network(name)) for name in ("teacher", "critic", "student"))
    settings, stream, batch = config.distill, config.stream, config.distill.batch_size
    text = jax.ShapeDtypeStruct((batch, config.model.text_length, config.model.text_dim), jnp.bfloat16)
    null_text = jax.ShapeDtypeStruct((1, *text.shape[1:]), jnp.bfloat16)
    draws = jax.eval_shape(lambda: draw_update(jax.random.key(0), batch, settings, stream, config.latent_shape))

    def update(critic, student, teacher, text, null_text, draws):
        return student_gradients(student, critic, teacher, text, null_text, draws, settings, stream)

    gradients, latents, _ = jax.eval_shape(update, critic, student, teacher, text, null_text, draws)
    assert count(gradients) == SMALL
    assert latents.shape == (4, 21, 60, 104, 16)
    of_critic = jax.eval_shape(lambda *given: critic_gradients(*given, stream)[0], critic, student, text, draws)
    assert count(of_critic) == SMALL


def test_a_large_teacher_takes_what_it_should_on_every_device():
    """In bfloat16 and in eight bits, on the recipe's four devices."""
    expected = {"": 7.15, "int8": 3.65, "float8": 3.65}  # GB: 2 bytes and 1 byte a weight, divided by four
    for quantization, gigabytes in expected.items():
        config = recipe("adastate_wan", f"--config.teacher.quantization={quantization}")
        network = with_shardings(abstract_network(config.network("teacher")), make_mesh(fsdp=4))
        held = [
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(network)
        ]
        assert sum(held) / 1e9 == pytest.approx(gigabytes, abs=0.01)


def test_an_unknown_setting_is_refused():
    with pytest.raises(Exception, match="unknown setting 'longer'; the only one is long"):
        recipe("adastate_wan:longer")


def test_a_recipe_can_be_made_small():
    """Overrides reach the three networks by name."""
    config = recipe("adastate_wan", "--config.teacher.num_layers=2", "--config.critic.num_layers=3")
    assert [config.network(name).num_layers for name in ("teacher", "critic", "student")] == [2, 3, 30]
    assert dataclasses.replace(config.network("critic"), num_layers=30) == config.network("student")


def test_adapters_take_an_eighth_of_the_students_state():
    """Weights, second moment and average, for which `docs/networks.md` has the numbers."""

    def state(*options):
        return abstract_states(recipe("adastate_wan", *options))["distill"]["student"]

    whole, adapters = state(), state("--config.student.lora.rank=128")
    assert (count(whole.params), count(adapters.params)) == (SMALL, 174_981_120)
    held = [sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in (whole, adapters)]
    assert [round(size / 1e9, 2) for size in held] == [17.03, 2.10]


def test_causal_forcing_is_what_was_published():
    teacher, student = recipe("causal_forcing_wan:teacher"), recipe("causal_forcing_wan")
    for config in (teacher, student):
        assert (config.stream.chunk_frames, config.stream.past_frames, config.clip_frames) == (1, 20, 21)
        assert config.initialize.context == "clean"
        assert config.initialize.optimizer.betas == (0.0, 0.999)
        assert config.initialize.optimizer.learning_rate == 2e-6
        teacher_sizes, student_sizes = (config.network(name) for name in ("teacher", "student"))
        assert dataclasses.replace(teacher_sizes, param_dtype="float32") == student_sizes
    assert (teacher.initialize.targets, teacher.initialize.weighting) == ("clips", "bell")
    grid = ode_sigmas(student.stream, student.initialize.ode_steps)
    np.testing.assert_allclose(grid, warp(np.linspace(1.0, 0.0, 49), 5.0), atol=1e-12)
    assert (student.initialize.ema_decay, student.initialize.ema_start) == (0.99, 200)
    assert guided(1.0, 0.0, student.initialize.guidance_scale) == 3.0
