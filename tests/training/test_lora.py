"""Laws of LoRA: it starts as its base, trains nothing else, and is what is merged, loaded and exported."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LATENT_SHAPE, SMALL, make_dit
from flax import nnx

from adastate_jax.config.stages import DistillConfig, InitializeConfig, OptimizerConfig
from adastate_jax.models.adapters import (
    AdaptedLinear,
    LoRAConfig,
    adapted_shapes,
    create_adapters,
    join,
    merge,
    split,
    stack,
)
from adastate_jax.models.linear import Linear
from adastate_jax.models.quantized import quantize_network
from adastate_jax.sharding import make_mesh, path_name, shard_batch, tree_shardings
from adastate_jax.streaming.schedule import StreamConfig
from adastate_jax.training.dmd import draw_update, student_step
from adastate_jax.training.initialize import initialize_step
from adastate_jax.training.state import create_state

LORA = LoRAConfig(rank=2, alpha=6.0)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, betas=(0.9, 0.999), weight_decay=0.0)
STREAM = StreamConfig(2, 2, denoising_steps=(1000.0, 500.0))
BATCH, FRAMES = 4, 6
NULL_TEXT = jnp.ones((1, SMALL.text_length, SMALL.text_dim))
DISTILL = DistillConfig(rollout_frames=FRAMES, student=OPTIMIZER, critic=OPTIMIZER, ema_start=0)
# Tokens come by sixteens, so a product of the shape of a weight is seen in a program.
NARROW = dataclasses.replace(SMALL, num_layers=1, dim=24, ffn_dim=40)


def fresh(config=NARROW, lora=LORA):
    return create_adapters(config, lora, jax.random.key(3))


def trained(config=NARROW, lora=LORA):
    """Adapters all of whose factors are random."""
    rng = np.random.default_rng(4)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), fresh(config, lora))


@pytest.fixture(scope="module")
def base():
    return make_dit(NARROW, 0)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    normal = functools.partial(rng.standard_normal, dtype=np.float32)
    return {
        "trajectory": normal((BATCH, 3, FRAMES, *LATENT_SHAPE)),
        "text": normal((BATCH, SMALL.text_length, SMALL.text_dim)),
    }


# Unless told so, XLA leaves out some of the roundings to 16 bits, and not the same ones in other programs.
@functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
def flow(network, batch):
    latents = batch["trajectory"][:, 0]
    timesteps = jnp.full(latents.shape[:2], 700.0)
    return network(latents, timesteps, network.text_keys_values(batch["text"]), np.arange(FRAMES))[0]


@pytest.mark.parametrize(("dtype", "quantization"), [("float32", ""), ("bfloat16", ""), ("bfloat16", "int8")])
def test_before_the_first_update_an_adapted_network_is_its_base_to_the_bit(dtype, quantization, batch):
    network = make_dit(dataclasses.replace(NARROW, dtype=dtype), 0)
    network = jax.tree.map(lambda x: x.astype(dtype), network)
    if quantization:
        network = quantize_network(network, quantization, make_mesh())
    joined = join(fresh(), network)
    assert isinstance(joined.blocks.ffn_in, AdaptedLinear)
    np.testing.assert_array_equal(flow(joined, batch), flow(network, batch))
    assert np.abs(flow(join(trained(), network), batch) - flow(network, batch)).max() > 1e-3


def test_merged_is_adapted(base, batch):
    """And what is split off again is what was joined; two adapters side by side are their sum."""
    one, other = trained(), jax.tree.map(lambda x: -0.5 * x, trained(lora=LoRAConfig(3, 1.5, ("self_attention/.*",))))
    merged = merge(base, one)
    np.testing.assert_allclose(flow(merged, batch), flow(join(one, base), batch), atol=2e-5)
    jax.tree.map(np.testing.assert_array_equal, split(join(one, base)), (one, base))
    assert split(base) == (base, None)
    assert join(base, None) is base
    for found, wanted in zip(
        *map(jax.tree.leaves, (merge(base, stack(one, other)), merge(merged, other))), strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def student_update(state, base, critic, teacher, batch):
    draws = draw_update(jax.random.key(1), BATCH, DISTILL, STREAM, LATENT_SHAPE)
    critic = join(trained(), critic)
    step = jnp.int32(3)
    return student_step(state, critic, teacher, batch["text"], NULL_TEXT, step, draws, DISTILL, STREAM, base)


def initialization(state, base, _, __, batch):
    config = InitializeConfig(optimizer=OPTIMIZER, context="clean")
    return initialize_step(state, batch["trajectory"], batch["text"], jax.random.key(1), config, STREAM, base)


STEPS = {
    "student": student_update,
    "initialize": initialization,
}


def products(program):
    """How many products of a compiled program have the shape of the feed-forward network's weights."""
    found = re.findall(r"= f32\[(?:1,)?(\d+),(\d+)\]\S* dot\(", program)
    return sum({int(a), int(b)} == {NARROW.dim, NARROW.ffn_dim} for a, b in found)


def named(tree):
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("name", STEPS)
def test_adapters_alone_are_trained_and_no_gradient_of_the_base_is_computed(name, base, batch):
    """In the optimizer's state and in the program there is nothing of the base's size; on eight devices as on one."""
    state = create_state(trained(), OPTIMIZER, True)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.params)}
    assert {leaf.shape for leaf in jax.tree.leaves((state.optimizer, state.ema))} <= shapes | {()}
    found = []
    for mesh in (make_mesh(), make_mesh(data=2, fsdp=2, model=2))[: 1 if name == "student" else 2]:
        with jax.set_mesh(mesh):
            trees = (state, base, make_dit(NARROW, 10), make_dit(NARROW, 20))
            placed = (jax.device_put(tree, tree_shardings(tree, mesh)) for tree in trees)
            arguments = (*placed, shard_batch(batch, mesh))
            compiled = jax.jit(STEPS[name]).lower(*arguments).compile()
            found.append(compiled(*arguments))
        assert products(compiled.as_text()) == 0
    one, *others = (named(new.params) for new, _ in found)
    assert np.isfinite(found[0][1]["loss"])
    for path, before in named(state.params).items():
        assert np.abs(one[path] - before).max() > 1e-4, path
        for other in others:
            np.testing.assert_allclose(other[path], one[path], atol=1e-4)


def test_products_of_the_size_of_a_weight_are_found():
    """Of a layer's gradient."""
    layer = Linear(NARROW.dim, NARROW.ffn_dim, dtype="float32", rngs=nnx.Rngs(0))
    gradient = jax.jit(jax.grad(lambda layer, x: jnp.square(layer(x)).sum()))
    assert products(gradient.lower(layer, jnp.ones((32, NARROW.dim))).compile().as_text()) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": -1}, "rank must be at least 1, or 0 to train all weights, got -1"),
        ({"alpha": 8.0}, "rank is 0, which trains all weights; set rank to at least 1"),
        ({"rank": 2, "alpha": 0.0}, "alpha must be positive, got 0.0"),
        ({"rank": 2, "targets": ()}, "targets are none; name some layers, such as query"),
        ({"rank": 2, "targets": ("(",)}, r"targets: '\(' is no regular expression"),
        ({"rank": 2, "targets": ("uery",)}, r"lora.targets: 'uery' is the end of no layer's path; there are blocks/"),
        ({"rank": 25}, r"lora.rank 25 is more than the 24 inputs or the 24 outputs of blocks/.*; choose at most 24$"),
    ],
)
def test_adapters_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        adapted_shapes(NARROW, LoRAConfig(**fields))


def test_targets_are_ends_of_paths():
    names = {*adapted_shapes(NARROW, LoRAConfig(1, 1.0, ("self_attention/(key|value)", "head", "text_in")))}
    assert names == {"blocks/self_attention/key", "blocks/self_attention/value", "head", "text_in"}
    assert len(adapted_shapes(NARROW, LORA)) == 10  # all of a block


def test_every_factor_of_the_real_networks_is_split():
    """Over `fsdp`, both of each; a rank that it does not divide stays whole, and the kernel's own side is split."""
    for rank, whole in ((2, 0), (3, 1)):
        shapes = jax.eval_shape(
            lambda rank=rank: create_adapters(SMALL, LoRAConfig(rank, 1.0, (".*",)), jax.random.key(0))
        )
        for name, shardings in tree_shardings(shapes, make_mesh(fsdp=2, model=2)).items():
            specs = shardings.down.spec, shardings.up.spec
            assert sum("fsdp" not in str(spec) for spec in specs) == whole, f"{name} of rank {rank}: {specs}"
