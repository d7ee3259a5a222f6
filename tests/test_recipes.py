"""The configurations of the published recipes: their sizes, numbers and shapes, without any weights."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from adastate_jax.config import parse_config
from adastate_jax.sharding import make_mesh
from adastate_jax.training.dmd import critic_gradients, draw_update, student_gradients
from adastate_jax.training.frozen import abstract_network, with_shardings
from adastate_jax.training.stages.run import abstract_states

CONFIGS = Path(__file__).parents[1] / "configs"
# Weights of the published files: the sums of manifest_wan_t2v_1.3B and manifest_wan_t2v_14B.
SMALL, LARGE = 1_418_996_800, 14_288_491_584


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
