"""Every stage's step on eight devices is that of one, and what travels for it is what must.

`python -m benchmarks.meshes` shows the same of every step on five meshes; here each is on two.
"""

import functools
import importlib.metadata
import math

import jax
import pytest

from adastate_jax.sharding import make_mesh, tree_shardings
from benchmarks.meshes import FRAMES, MESHES, NETWORK, STEPS, STREAM, broken_laws, inputs, run_step

WEIGHTS, EVERYTHING = "data 2 x fsdp 4", "fsdp 2 x context 2 x model 2"  # what these meshes split
CHUNKS, LAYERS = FRAMES // STREAM.chunk_frames, NETWORK.num_layers

# Passes over the layers of a network, there and back. What is in a loop whose turns are drawn counts once.
# A rollout has two for each chunk, but the second fills the cache, which nothing reads after the last chunk.
ROLLOUT = 2 * CHUNKS - 1
PASSES = {
    "pretrain": 1 + 1,
    "initialize": 1 + 1,
    "critic": ROLLOUT + 1 + 1,
    # The critic; the teacher with and without a prompt; the student's last passes again, there and back.
    "student": ROLLOUT + 1 + 2 + 2 * CHUNKS,
}


@functools.cache
def on_one_device(name):
    return run_step(name, make_mesh(devices=jax.devices()[:1]))


@functools.cache
def weights(**mesh):
    """Of a network on a mesh: arrays, a stack of layers as so many, of which no device has all; bytes of a device."""
    student = inputs()[1]
    rules = jax.tree.leaves(tree_shardings(student, make_mesh(**mesh)))
    pairs = list(zip(jax.tree.leaves(student), rules, strict=True))
    split = [x for x, rule in pairs if rule.shard_shape(x.shape) != x.shape]
    arrays = sum(x.shape[0] if x.ndim > 2 and x.shape[0] == LAYERS else 1 for x in split)
    return arrays, sum(math.prod(rule.shard_shape(x.shape)) * x.dtype.itemsize for x, rule in pairs)


def totals(rows, of):
    """Sums over exchanges by their kind."""
    return {kind: sum(getattr(row, of) for row in rows if row.kind == kind) for kind in {row.kind for row in rows}}


@pytest.mark.parametrize("name", STEPS)
def test_split_weights_are_gathered_and_gradients_summed(name):
    """A pass gathers every array once at most; between copies of the shards nothing travels but sums of gradients."""
    found = run_step(name, make_mesh(**MESHES[WEIGHTS]))
    assert broken_laws(on_one_device(name), found) == []
    assert {row.kind for row in found.collectives} == {"all-gather", "all-reduce"}
    assert {row.kind for row in found.collectives if "data" in row.axes} == {"all-reduce"}
    arrays, _ = weights(**MESHES[WEIGHTS])
    _, whole = weights()
    runs, size = (totals(found.collectives, of) for of in ("runs", "bytes"))
    assert runs["all-gather"] <= PASSES[name] * arrays
    assert size["all-gather"] <= PASSES[name] * whole
    # All of the gradients along one axis, and the parts of a device along the other; losses and norms beside them. The
    # student's are summed chunk by chunk.
    summed = {axes: sum(row.bytes for row in found.collectives if row.kind == "all-reduce" and row.axes == axes)
              for axes in ("fsdp", "data", "data+fsdp")}  # fmt: skip
    assert sum(summed.values()) <= (CHUNKS if name == "student" else 1) * 1.3 * whole
    if one_compiler():
        assert runs == RUNS[name, WEIGHTS]


@pytest.mark.parametrize("name", STEPS)
def test_tokens_are_exchanged_for_heads(name):
    """In every attention to live tokens: queries, keys, values and output, once a pass; along `context` alone."""
    found = run_step(name, make_mesh(**MESHES[EVERYTHING]))
    assert broken_laws(on_one_device(name), found) == []
    exchanges = [
        times
        for instruction, times in found.program.instructions()
        if instruction.operation.startswith("all-to-all") and "shard_map/all_to_all" in instruction.line
    ]
    assert sum(exchanges) == 4 * LAYERS * PASSES[name]
    assert {row.axes for row in found.collectives if row.kind in ("all-to-all", "reduce-scatter")} == {"context"}
    if one_compiler():
        assert totals(found.collectives, "runs") == RUNS[name, EVERYTHING]


def one_compiler():
    """Whether exchanges are counted as they stand below: another compiler may join some, or split them."""
    return importlib.metadata.version("jaxlib").startswith("0.10.")


RUNS = {
    ("pretrain", WEIGHTS): {"all-gather": 51, "all-reduce": 17},
    ("initialize", WEIGHTS): {"all-gather": 51, "all-reduce": 17},
    ("critic", WEIGHTS): {"all-gather": 172, "all-reduce": 17},
    ("student", WEIGHTS): {"all-gather": 324, "all-reduce": 32},
    ("pretrain", EVERYTHING): {
        "all-gather": 87,
        "all-reduce": 44,
        "all-to-all": 17,
        "collective-permute": 11,
        "reduce-scatter": 4,
    },
    ("initialize", EVERYTHING): {
        "all-gather": 88,
        "all-reduce": 44,
        "all-to-all": 17,
        "collective-permute": 11,
        "reduce-scatter": 4,
    },
    ("critic", EVERYTHING): {
        "all-gather": 247,
        "all-reduce": 96,
        "all-to-all": 57,
        "collective-permute": 21,
        "reduce-scatter": 4,
    },
    ("student", EVERYTHING): {
        "all-gather": 431,
        "all-reduce": 193,
        "all-to-all": 115,
        "collective-permute": 36,
        "reduce-scatter": 12,
    },
}
