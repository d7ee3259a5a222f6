"""The structure of a small streaming step as the compilers of TPUs and GPUs write it, where these are installed.

None of these chips need be here: `pip install jax[tpu] jax[cuda12]`, the extra `compile`.
"""

import importlib.util
import math
import pathlib
import re

import jax
import pytest

from adastate_jax.benchmarking import ahead
from adastate_jax.benchmarking.program import read_program
from adastate_jax.benchmarking.targets import find_target
from adastate_jax.benchmarking.workloads import make_workload, mesh_over
from adastate_jax.config.files import parse_config
from adastate_jax.errors import UserError
from adastate_jax.streaming.schedule import layout_of, phase_of

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = parse_config(
    [
        f"--config={ROOT / 'configs' / 'wan_1_3b.py'}",
        *("--config.model.num_layers=4", "--config.model.dim=512", "--config.model.num_heads=4"),
        *("--config.model.ffn_dim=1024", "--config.model.text_dim=64", "--config.text.dim=64"),
        *("--config.model.text_length=128", "--config.text.text_length=128"),
        *("--config.data.clips.height=128", "--config.data.clips.width=128"),
    ]
)
LAYERS, PASSES = CONFIG.model.num_layers, len(CONFIG.stream.sigmas) + 1
FRAME = CONFIG.model.frame_tokens(*CONFIG.latent_shape[:2])
STEADY = layout_of(phase_of(CONFIG.stream.num_fill_chunks, CONFIG.stream), CONFIG.stream)
LIVE, SEEN = FRAME * len(STEADY.live), FRAME * (len(STEADY.live) + len(STEADY.cached))

needs_tpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: jax[tpu]")
needs_gpu = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="the CUDA plugin is not installed: jax[cuda12]"
)
CHIPS = [
    *(pytest.param(name, "splash", marks=needs_tpu) for name in ("v5e:1", "v6e:1")),
    pytest.param("h100:1", "cudnn", marks=needs_gpu),
]


def compiled(name: str):
    target = find_target(name)
    workload = make_workload("stream", CONFIG, CONFIG.model, mesh_over(CONFIG, target, "stream"))
    return workload, ahead.compile_for(workload, target, None)


@pytest.mark.parametrize(("name", "backend"), CHIPS)
def test_a_steady_chunk_has_the_structure_it_should(name, backend):
    workload, compilation = compiled(name)
    program = read_program(compilation.text)
    memory = compilation.memory

    # Two attentions per layer and pass, all by the chip's own kernel.
    assert program.attention() == {backend: PASSES * LAYERS * 2}

    # Eight products per layer and pass in bfloat16 (fewer where the compiler joins some), and the patch embedding.
    # What rotates queries and keys, and the context once, is a permutation, and exact.
    # Whatever else there is comes once per pass: timestep embedding and head.
    products = program.products()
    halves = products.pop("bf16 bf16 -> bf16")
    assert PASSES * (5 * LAYERS + 1) <= halves <= PASSES * (8 * LAYERS + 1)
    assert products.pop("bf16 bf16 -> bf16 highest") <= 2 * PASSES * LAYERS + 1
    assert sum(products.values()) <= 4 * PASSES
    assert all(kind.split(" -> ")[1].startswith("f32") for kind in products)

    # No mask: no array of truth values has an entry per query and key.
    masks = [
        shape
        for instruction, _ in program.instructions()
        for shape in re.findall(r"pred\[([\d,]+)\]", instruction.line)
    ]
    assert all(math.prod(map(int, shape.split(","))) < LIVE * SEEN for shape in masks)

    # The carry takes its own place; a TPU rounds its small arrays up to whole tiles.
    assert workload.donated <= memory["alias"] <= workload.donated + 2**12

    # No copy as large as all layers' cached keys in any loop; a GPU's compiler makes one of the fresh ones per pass.
    keys = LAYERS * (SEEN - LIVE) * CONFIG.model.dim * 2
    turns = {"splash": 1, "cudnn": PASSES}[backend]
    copies = [(re.sub(r"{.*?}", "", copy.shape), runs) for copy, runs in program.copies(keys) if runs > turns]
    assert [shape for shape, _ in copies if shape.endswith(f",{CONFIG.model.num_heads},{CONFIG.model.head_dim}]")] == []
    assert program.collectives(workload.mesh) == []


@needs_tpu
def test_heads_over_four_chips_exchange_what_they_must():
    """Behind each attention and feed-forward, and for the norms of queries and keys; nothing but sums along `model`."""
    workload, compilation = compiled("v6e:2x2")
    collectives = read_program(compilation.text).collectives(workload.mesh)
    assert {row.axes for row in collectives} == {"model"}
    runs = {row.kind: row.runs for row in collectives}
    assert 3 * LAYERS * PASSES <= runs.pop("all-reduce") <= 5 * LAYERS * PASSES
    assert runs.pop("all-gather", 0) <= PASSES  # of the timestep embedding
    assert not runs
    assert workload.donated <= compilation.memory["alias"] <= workload.donated + 2**12


@needs_tpu
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e:2x2x2", "v5e:2x2x2: a slice of v5e has 2 sides, for example v5e:2x2"),
        ("v5p:4", "v5p:4: a slice of v5p has 3 sides, for example v5p:2x2x2"),
        ("v6e:3x5", "v6e:3x5: there is no such slice"),
    ],
)
def test_slices_that_do_not_exist_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        find_target(name)


@needs_gpu
def test_gpus_come_in_hosts():
    assert len(find_target("h100:16").devices) == 16
    with pytest.raises(UserError, match="h100:12: a host has 8 of them"):
        find_target("h100:12")


@needs_tpu
def test_every_kernel_of_the_decoder_is_one_product():
    """Rows are the batch: no image is cut into strips for it, none is enlarged before the convolution that enlarges."""
    config = parse_config(
        [
            f"--config={ROOT / 'configs' / 'wan_1_3b.py'}",
            *("--config.vae.dim=16", "--config.vae.num_res_blocks=1", "--config.vae.latents_per_call=3"),
            *("--config.data.clips.height=128", "--config.data.clips.width=128"),
        ]
    )
    target = find_target("v5e:1")
    workload = make_workload("wan", config, config.model, mesh_over(config, target, "wan"))
    compilation = ahead.compile_for(workload, target, None)
    program = read_program(compilation.text)

    kernels = [
        path
        for path, _ in jax.tree_util.tree_leaves_with_path(workload.arguments[0].decoder)
        if "kernel" in jax.tree_util.keystr(path)
    ]
    products = program.products()
    assert sum(products.values()) == len(kernels) + 2  # and attention's two
    # Exact are the last convolution, whose factors come as bfloat16, and nothing else.
    exact = {kind: runs for kind, runs in products.items() if kind.endswith("highest")}
    assert sum(exact.values()) == 1
    assert {kind.rpartition(" -> ")[0] for kind in products.keys() - exact.keys()} == {"bf16 bf16"}

    assert compilation.memory["alias"] >= workload.donated
    # Nothing is copied that is larger than what the last upsampling gives: of a quarter of the pixels, and one
    # column more of them, two sets of four copies.
    features = 12 * 128 * 128 * config.vae.dim * 2
    assert [copy.shape for copy, _ in program.copies(2 * features * 66 // 64)] == []
