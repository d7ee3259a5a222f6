"""What is split stays split, and a step on 8 devices gives what one gives; see `test_meshes.py` for every stage's."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL, make_dit
from flax import nnx

from adastate_jax.config.mesh import MeshConfig, require_divisible_batches
from adastate_jax.config.stages import InitializeConfig, OptimizerConfig, PretrainConfig
from adastate_jax.errors import UserError
from adastate_jax.models.adapters import LoRAConfig, create_adapters
from adastate_jax.models.dit import DiT, DiTConfig
from adastate_jax.models.linear import Linear
from adastate_jax.models.text import TextConfig, TextEncoder
from adastate_jax.models.vae import VAE, VAEConfig
from adastate_jax.sharding import (
    PARAMETER_AXES,
    RULES,
    constrain,
    init_sharded,
    logical_axes,
    make_mesh,
    path_name,
    shard_batch,
    tree_shardings,
)
from adastate_jax.streaming.carry import draw_noise, initial_carry, seed_keys
from adastate_jax.streaming.denoising import generate_chunk
from adastate_jax.streaming.schedule import StreamConfig, phase_of
from adastate_jax.training.initialize import initialize_step
from adastate_jax.training.pretrain import pretrain_step
from adastate_jax.training.stages.run import compile_step
from adastate_jax.training.state import create_state

# Heads that four devices can share, and eight cannot.
SPLIT = dataclasses.replace(SMALL, num_heads=4)
STREAM = StreamConfig(denoising_steps=(1000.0, 500.0))
# Keeps both of Adam's moments, and so shows gradients as they are: the first updates are but their signs.
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, betas=(0.9, 0.999))
BATCH, FRAMES = 8, 9
SHAPE = (4, 8, 4)  # eight tokens a frame


def place(tree, mesh):
    return jax.device_put(tree, tree_shardings(tree, mesh))


def run_on(mesh, function, states, batch):
    """What function(states, batch) returns on a mesh, as it lies on its devices."""
    with jax.set_mesh(mesh):
        return jax.jit(function)(place(states, mesh), shard_batch(batch, mesh))


def differing(tree, other, atol=1e-5, rtol=1e-4):
    """Paths of the leaves of two trees that are not the same numbers."""
    leaves = zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(other), strict=True)
    return [path_name(path) for (path, x), y in leaves if not np.allclose(x, y, atol=atol, rtol=rtol)]


def split_kernels(tree):
    """Paths of the kernels of which no device holds the whole."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [path_name(path) for path, x in leaves if x.size > 1000 and not x.sharding.is_fully_replicated]


@pytest.fixture(scope="module")
def meshes():
    """One device, and those that all steps are computed on."""
    of_every_kind = make_mesh(fsdp=2, model=2, context=2)
    return make_mesh(devices=jax.devices()[:1]), make_mesh(data=2, fsdp=4), of_every_kind


@pytest.fixture(scope="module")
def student():
    return make_dit(SPLIT, 0)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    normal = functools.partial(rng.standard_normal, dtype=np.float32)
    return {
        "latents": normal((BATCH, FRAMES, *SHAPE)),
        "trajectory": normal((BATCH, len(STREAM.sigmas) + 1, FRAMES, *SHAPE)),
        "text": normal((BATCH, SMALL.text_length, SMALL.text_dim)),
    }


NULL_TEXT = jnp.ones((1, SMALL.text_length, SMALL.text_dim))


def gathered(program):
    """Shapes of what devices gather."""
    return re.findall(r"= \w+\[([\d,]*)\]\S* all-gather(?:-start)?\(", program)


def test_one_program_serves_every_step(student, batch, meshes):
    """As the train command compiles it: what it returns lies where what it takes lay."""
    config = PretrainConfig(optimizer=OPTIMIZER)

    def function(state, batch):
        return pretrain_step(state, batch["latents"], batch["text"], NULL_TEXT, jax.random.key(1), config)

    with jax.set_mesh(meshes[1]):
        state = place(jax.tree.map(jnp.copy, create_state(student, OPTIMIZER, True)), meshes[1])
        step = compile_step(types.SimpleNamespace(mesh=meshes[1]), function, state)
        for _ in range(2):
            state, _ = step(state, shard_batch(batch, meshes[1]))
    assert step._cache_size() == 1


def test_tensor_parallel_layers_gather_nothing(student, batch):
    """Keys and values stay on their heads' devices; all that is gathered is the projected timestep."""
    mesh = make_mesh(model=2)
    text = batch["text"]

    def first_chunk(student, text):
        carry = initial_carry(SPLIT, STREAM, seed_keys(0, BATCH), *SHAPE[:2])
        noise, phase = draw_noise(carry, STREAM, SHAPE), phase_of(0, STREAM)
        return generate_chunk(student, carry.cache, student.text_keys_values(text), noise, STREAM, phase, 1)

    with jax.set_mesh(mesh):
        compiled = jax.jit(first_chunk).lower(place(student, mesh), text).compile()
    assert all(
        sharding.spec == jax.P(None, None, None, "model")
        for sharding in jax.tree.leaves(compiled.output_shardings.fresh)
    )
    program = compiled.as_text()
    assert set(gathered(program)) == {f"{BATCH},{STREAM.chunk_frames},{6 * SMALL.dim}"}
    assert "all-to-all" not in program
    assert "collective-permute" not in program


@pytest.mark.parametrize("context", ["clean", "stream", "state"])
def test_initialize_step(context, student, batch, meshes):
    config = InitializeConfig(optimizer=OPTIMIZER, context=context)

    def step(state, batch):
        return initialize_step(state, batch["trajectory"], batch["text"], jax.random.key(1), config, STREAM)

    where = meshes if context == "clean" else meshes[:2]
    one, *others = (run_on(mesh, step, create_state(student, OPTIMIZER, True), batch) for mesh in where)
    for other in others:
        assert split_kernels(other)
        assert differing(one, other) == []


def reductions(program):
    """Of a compiled program, the values that devices add up: {name: whether it was bfloat16 just before}."""
    operations, roots, computation = {}, {}, None  # name -> (type, kind, operands, the computation that it calls)
    for line in program.splitlines():
        if header := re.match(r"(?:ENTRY )?(%\S+) \(", line):
            computation = header[1]
        if found := re.match(r"\s+(ROOT )?(%\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)", line):
            root, name, dtype, kind, rest = found.groups()
            called = re.search(r"calls=(%[^\s,]+)", rest)
            operations[name] = dtype, kind, re.findall(r"%[^\s,)]+", rest.partition("), ")[0]), called and called[1]
            if root:
                roots[computation] = name

    def was_rounded(name):
        dtype, kind, operands, called = operations[name]
        if dtype.startswith("bf16"):
            return True
        if kind == "fusion":
            return was_rounded(roots[called])
        passes_on = ("convert", "bitcast", "copy", "dynamic-slice", "reshape", "slice", "transpose")
        return kind in passes_on and was_rounded(operands[0])

    added = [operands for _, kind, operands, _ in operations.values() if kind in ("all-reduce", "reduce-scatter")]
    return {name: was_rounded(name) for names in added for name in names}


@pytest.mark.parametrize(("kind", "in_16_bits"), [(nnx.Linear, True), (Linear, False)])
def test_what_is_added_up_in_16_bits_is_found(kind, in_16_bits, meshes):
    """Of one layer's gradient: flax's is, ours is not. XLA on CPU adds in float32, but what was rounded before."""
    layer = kind(64, 32, dtype="bfloat16", rngs=nnx.Rngs(0))

    def gradient(layer, x):
        return jax.grad(lambda layer: jnp.square(layer(x).astype(jnp.float32)).mean())(layer)

    with jax.set_mesh(meshes[1]):
        x = shard_batch(np.ones((BATCH, 6, 64), np.float32), meshes[1])
        found = reductions(jax.jit(gradient).lower(place(layer, meshes[1]), x).compile().as_text())
    assert len(found) == 2  # kernel and bias
    assert any(found.values()) == in_16_bits


def test_gradients_are_added_up_in_float32(batch, meshes):
    """Whatever dtype the network computes in: the weights' gradients, and with them all that devices add up."""
    config = PretrainConfig(optimizer=OPTIMIZER)
    network = make_dit(dataclasses.replace(SMALL, dtype="bfloat16"), 0)

    def step(state, batch):
        return pretrain_step(state, batch["latents"], batch["text"], NULL_TEXT, jax.random.key(1), config)

    with jax.set_mesh(meshes[1]):
        state = place(create_state(network, OPTIMIZER, True), meshes[1])
        program = jax.jit(step).lower(state, shard_batch(batch, meshes[1])).compile().as_text()
    assert "bf16" in program
    found = reductions(program)
    assert len(found) > len(jax.tree.leaves(network))
    assert [name for name, in_16_bits in found.items() if in_16_bits] == []


def test_states_are_born_in_their_shards(meshes):
    state = init_sharded(
        lambda key: create_state(DiT(SMALL, rngs=nnx.Rngs(key)), OPTIMIZER, True), meshes[1], jax.random.key(0)
    )
    kernels = {
        path_name(path): x.sharding.spec
        for path, x in jax.tree_util.tree_leaves_with_path(state)
        if path_name(path).endswith("ffn_in/kernel/value")
    }
    assert len(kernels) == 4  # params, EMA, and Adam's two moments
    assert len(set(map(str, kernels.values()))) == 1
    assert all("fsdp" in str(spec) for spec in kernels.values())


def full_size_networks():
    return {
        "dit 1.3B": lambda: DiT(DiTConfig(), rngs=nnx.Rngs(0)),
        "dit 14B": lambda: DiT(DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40), rngs=nnx.Rngs(0)),
        "umt5": lambda: TextEncoder(TextConfig(), rngs=nnx.Rngs(0)),
        "adapters of dit 1.3B": lambda: create_adapters(DiTConfig(), LoRAConfig(rank=128), jax.random.key(0)),
    }


@pytest.mark.parametrize("name", full_size_networks())
def test_every_large_leaf_of_the_real_networks_is_sharded(name):
    """No leaf of a MiB or more falls through the table, and eight shards divide every one of them."""
    abstract = jax.eval_shape(full_size_networks()[name])
    mesh = make_mesh(data=1, fsdp=4, model=2)
    shardings = tree_shardings(abstract, mesh)
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(abstract), jax.tree.leaves(shardings), strict=True
    ):
        if leaf.size * leaf.dtype.itemsize >= 1 << 20:
            assert logical_axes(path_name(path)), f"{path_name(path)} {leaf.shape} has no rule"
            assert not sharding.is_fully_replicated, f"{path_name(path)} {leaf.shape} is on every device whole"


def test_every_rule_names_known_axes_and_is_used():
    networks = [jax.eval_shape(make) for make in full_size_networks().values()]
    lora = LoRAConfig(rank=1, targets=(".*",))
    networks.append(jax.eval_shape(lambda: create_adapters(DiTConfig(), lora, jax.random.key(0))))
    names = [path_name(path) for tree in networks for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    for pattern, axes in PARAMETER_AXES:
        assert all(axis is None or axis in RULES for axis in axes)
        assert any(logical_axes(name) == axes for name in names), f"no parameter is matched by {pattern}"


def test_the_vae_is_small_enough_to_stay_whole():
    abstract = jax.eval_shape(lambda: VAE(VAEConfig(), rngs=nnx.Rngs(0)))
    assert all(s.is_fully_replicated for s in jax.tree.leaves(tree_shardings(abstract, make_mesh(fsdp=4, model=2))))


def test_too_large_a_mesh_is_refused():
    with pytest.raises(ValueError, match="mesh data 4 x fsdp 4 needs 16 devices, 8 are here"):
        make_mesh(data=4, fsdp=4)


def test_a_dimension_that_does_not_divide_is_refused_by_name(student):
    """Of a weight, never replicated instead; the nearest sizes and numbers of devices are named."""
    mesh = make_mesh(model=5)
    with pytest.raises(UserError) as error:
        tree_shardings({"ffn_in": {"kernel": jnp.zeros((10, 48))}}, mesh)
    assert str(error.value) == (
        "ffn_in/kernel: its mlp of 48 must be a multiple of mesh.model = 5: choose 45 or 50, or mesh.model = 4 or 6"
    )
    with pytest.raises(UserError, match=r"its embed of 32 must be a multiple of mesh\.fsdp"):
        tree_shardings(student, make_mesh(fsdp=3))


def test_a_batch_that_does_not_divide_is_refused_by_name():
    mesh = MeshConfig(data=2, fsdp=4)
    require_divisible_batches(mesh, {"distill.batch_size": 16})
    with pytest.raises(
        ValueError, match=re.escape("mesh.data * mesh.fsdp = 8: choose 8, or mesh.data * mesh.fsdp = 4")
    ):
        require_divisible_batches(mesh, {"pretrain.batch_size": 8, "distill.batch_size": 4})


def test_what_may_stay_whole_does(caplog):
    """By rule: the byte tokenizer's rows. A single sample is computed by all devices, and that is said once."""
    mesh = make_mesh(fsdp=2, model=4)
    assert tree_shardings({"token_embedding": jnp.zeros((259, 32))}, mesh)["token_embedding"].spec == jax.P(
        None, ("fsdp", "context")
    )
    with jax.set_mesh(mesh):
        x = jax.jit(lambda x: constrain(x, "batch"))(jnp.zeros((5, 7)))
    assert x.sharding.is_fully_replicated
    assert "whole on every device: a batch of 5 must be a multiple of mesh.data * mesh.fsdp = 2" in caplog.text
