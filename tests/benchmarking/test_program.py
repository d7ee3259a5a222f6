"""The reader of compiled programs: on programs compiled here, and on lines as TPU and GPU compilers write them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adastate_jax.benchmarking.program import Collective, read_program, received_bytes, sizes
from adastate_jax.sharding import make_mesh

SQUARE = jnp.ones((32, 32))
SQUARE_BYTES = 32 * 32 * 4


def compiled(function, *arguments, unknown_turns: float = 1.0):
    return read_program(jax.jit(function).lower(*arguments).compile().as_text(), unknown_turns)


def test_loops_are_multiplied_out():
    """Seven turns of a loop around one of three, and a product behind them."""

    def nested(x):
        def turn(_, x):
            return jax.lax.scan(lambda x, _: (x @ SQUARE, None), x, length=3)[0]

        return jax.lax.fori_loop(0, 7, turn, x) @ SQUARE

    program = compiled(nested, SQUARE)
    assert program.products() == {"f32 f32 -> f32": 22}
    # Every product reads two arrays and writes one, at least.
    assert program.kernel_bytes() >= 22 * 3 * SQUARE_BYTES
    assert compiled(lambda x: x @ SQUARE, SQUARE).kernel_bytes() < 22 * 3 * SQUARE_BYTES


def test_turns_that_only_the_data_knows_are_the_callers():
    def loop(x, turns):
        return jax.lax.fori_loop(0, turns, lambda _, x: x @ SQUARE, x)

    assert compiled(loop, SQUARE, 3).products() == {"f32 f32 -> f32": 1}
    assert compiled(loop, SQUARE, 3, unknown_turns=3.5).products() == {"f32 f32 -> f32": 3.5}


def test_products_are_told_by_dtype_and_precision():
    double = jnp.ones((32, 32), jnp.int32)

    def several(x):
        exact = jnp.matmul(x, SQUARE, precision="highest")
        image = jax.lax.conv(x[None, None], jnp.ones((1, 1, 3, 3)), (1, 1), "SAME")
        return exact @ SQUARE + image[0, 0], double @ double

    products = compiled(several, SQUARE).products()
    assert products == {"f32 f32 -> f32 highest": 1, "f32 f32 -> f32": 2, "s32 s32 -> s32": 1}


def test_copies_are_found_by_their_size():
    def turned(x):
        def turn(_, x):
            both = jnp.concatenate([x.T, x.T], axis=1)
            return jax.lax.optimization_barrier(both) @ jnp.ones((64, 32))

        return jax.lax.fori_loop(0, 5, turn, x)

    program = compiled(turned, SQUARE)
    found = program.copies(2 * SQUARE_BYTES)
    assert [(copy.bytes, runs) for copy, runs in found] == [(2 * SQUARE_BYTES, 5)]
    found = program.copies(1)
    assert len(found) > 1
    moved = [copy.bytes * runs for copy, runs in found]
    assert moved == sorted(moved, reverse=True)


HERE = "data", "fsdp", "model"


@pytest.mark.parametrize(
    ("kind", "axes", "exchange", "result"),
    [
        ("all-reduce", "model", lambda x: jax.lax.psum(x, "model"), 1),
        ("all-reduce", "fsdp+model", lambda x: jax.lax.psum(x, ("fsdp", "model")), 1),
        ("all-reduce", "data+model", lambda x: jax.lax.psum(x, ("data", "model")), 1),
        ("all-reduce", "data+fsdp+model", lambda x: jax.lax.psum(x, HERE), 1),
        ("all-gather", "fsdp", lambda x: jax.lax.all_gather(x, "fsdp"), 2),
        ("reduce-scatter", "data", lambda x: jax.lax.psum_scatter(x, "data", tiled=True), 1 / 2),
        ("all-to-all", "model", lambda x: jax.lax.all_to_all(x, "model", 0, 1, tiled=True), 1),
        ("collective-permute", "fsdp", lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]), 1),
    ],
)
def test_collectives_are_told_by_mesh_axis(kind, axes, exchange, result):
    """With their bytes, in a loop of three turns."""
    mesh = make_mesh(2, 2, 2)

    def three(x):  # [4, 4] of the whole on each device
        def turn(x, _):
            return x + jnp.sum(exchange(x)), None

        return jax.lax.scan(turn, x, length=3)[0]

    spec = jax.P("data", ("fsdp", "model"))
    program = compiled(
        jax.shard_map(three, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False), jnp.ones((8, 16))
    )
    (found,) = program.collectives(mesh)
    assert found == Collective(kind, axes, 1, 3, 3 * 4 * 4 * 4 * result)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("mesh['x'=2,'y'=4] {'x'}", "data"),
        ("mesh['x'=2,'y'=4] {'y'}", "fsdp+model"),
        ("mesh['x'=2,'y'=4] {'y':(1)2}", "fsdp"),
        ("mesh['x'=2,'y'=4] {'x','y':(2)2}", "data+model"),
        ("mesh['x'=8] {'x'}", "data+fsdp+model"),
        ("mesh['x'=4,'y'=1,'z'=2], device_ids=([2,4]T(1,0)) {'x'}", "fsdp+model"),
        ("mesh['x'=4,'y'=1,'z'=2], device_ids=([2,4]T(1,0)) {'z'}", "data"),
        ("mesh['x'=2,'y'=2,'z'=2], device_ids=([2,2,2]T(0,2,1)) {'z'}", "fsdp"),
        ("[4,2]<=[8]", "model"),
        ("[4,2]<=[2,2,2]T(0,2,1)", "fsdp"),
        ("[2,4]<=[2,4]T(0,1)", "fsdp+model"),
        ("{{0,4},{1,5},{2,6},{3,7}}", "data"),
        ("{{0,1},{2,3},{4},{5},{6},{7}}", "part of model"),
        ("{{0,1,2},{3,4,5},{6,7}}", "part of data+fsdp+model"),
        ("{}", "data+fsdp+model"),
    ],
)
def test_groups_are_read_in_every_notation(groups, axes):
    line = f"  ROOT %r = f32[2]{{0}} all-reduce(%a), replica_groups={groups}, use_global_device_ids=true, to_apply=%add"
    program = read_program(f"ENTRY %main (a: f32[2]) -> f32[2] {{\n{line}\n}}\n")
    assert program.collectives(make_mesh(2, 2, 2)) == [Collective("all-reduce", axes, 1, 1, 8)]


@pytest.mark.parametrize(
    ("line", "kind", "size", "received"),
    [
        ("f32[8] all-gather(%a)", "all-gather", 32, 16),
        ("(f32[4], f32[8]) all-gather-start(%a)", "all-gather", 32, 16),
        ("((f32[4], f32[2]), (f32[8], f32[4])) all-gather-start(%a, %b)", "all-gather", 48, 24),
        ("(f32[8], f32[4]) all-reduce-start(%a, %b)", "all-reduce", 48, 48),
        ("((f32[8], f32[4]), (f32[4], f32[2])) reduce-scatter-start(%a, %b)", "reduce-scatter", 24, 24),
        ("((f32[8]{0:T(8)}), f32[4]) reduce-scatter-start(%a)", "reduce-scatter", 16, 16),
        ("(f32[8], f32[8]) all-to-all(%a, %b)", "all-to-all", 64, 32),
        ("(f32[8], f32[8], u32[], u32[]) collective-permute-start(%a)", "collective-permute", 32, 32),
    ],
)
def test_results_alone_count(line, kind, size, received):
    """However many arrays one collective exchanges at once, started or not; and what a device has to wait for."""
    groups = "source_target_pairs={{0,1},{1,0}}" if "permute" in kind else "replica_groups={{0,1}}"
    program = read_program(f"ENTRY %main (a: f32[4]) -> f32[4] {{\n  ROOT %r = {line}, {groups}\n}}\n")
    mesh = make_mesh(fsdp=2)
    assert program.collectives(mesh) == [Collective(kind, "fsdp", 1, 1, size)]
    assert received_bytes(program.collectives(mesh)[0], mesh) == received


TEXT = """HloModule jit_step, is_scheduled=true

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  %x = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %fetched = (bf16[4,8]{1,0:T(8,128)S(1)}, bf16[4,8]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %y = bf16[4,8]{1,0:T(8,128)S(1)} copy-done(%fetched)
  %z = f32[4,8]{1,0} convolution(%y, %x), dim_labels=bf_io->bf, backend_config={"estimated_cycles":"70"}
  %splash_mha_fwd.1 = (f32[4,8]{1,0}, bf16[4,8]{1,0}) custom-call(%x, %x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block_q": 896
}}, metadata={op_name="jit(step)/attention_splash/splash_mha_fwd/pallas_call"}
  ROOT %t = (s32[], bf16[4,8]{1,0}) tuple(%x)
}

%condition (p: (s32[], bf16[4,8])) -> pred[] {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  %c = s32[]{:T(128)} constant(6)
  ROOT %less = pred[] compare(%p, %c), direction=LT
}

ENTRY %main (a: bf16[4,8], b: f32[4,8]) -> bf16[4,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = f32[4,8]{1,0} parameter(1)
  %loop = (s32[], bf16[4,8]{1,0}) while(%a), condition=%condition, body=%body
  %gemm.1 = (f32[4,8]{1,0}, s8[512]{0}) custom-call(f32[4,8]{1,0} %b, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"precision_config":{"operand_precision":["HIGHEST","HIGHEST"]}}}
  %fmha.1 = (bf16[4,8]{1,0}, u8[0]{0}) custom-call(%a, %a, %a), custom_call_target="__cudnn$fmhaSoftmax"
  %fusion.1 = bf16[4,8]{1,0} fusion(%a), kind=kLoop, calls=%condition, backend_config={"estimated_cycles":"5"}
  ROOT %r = bf16[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_what_compilers_for_accelerators_write_is_read():
    """Loops without a noted count, lines that are broken, library kernels, estimates."""
    program = read_program(TEXT)
    assert program.products() == {"bf16 bf16 -> f32": 6, "f32 f32 -> f32 highest": 1}
    assert program.attention() == {"splash": 6, "cudnn": 1}
    assert program.custom_kernels() == {"tpu_custom_call": 6, "__cublas$gemm": 1, "__cudnn$fmhaSoftmax": 1}
    assert program.cycles() == 6 * 70 + 5
    assert program.copies(1) == []  # what is fetched into fast memory is no copy


def test_what_lies_in_fast_memory_is_not_moved():
    """Per turn: the array that is fetched, once; the product's other operand and its result; the kernel's four."""
    array, wide = 4 * 8 * 2, 4 * 8 * 4
    turn = array + (array + wide) + (2 * array + wide + array)
    comparison = 4 + array + 1  # of the fusion that stands for it, and the loop's own
    outside = (2 * wide + wide + 512) + (3 * array + array) + 2 * array
    moved = read_program(TEXT).kernel_bytes()
    assert 6 * turn + outside <= moved <= 6 * (turn + comparison) + comparison + outside


def test_sizes_of_shapes():
    assert sizes("(f32[2,3]{1,0}, bf16[4]{0:T(128)}, pred[5], s4[8], f8e4m3fn[7], u32[], token[])") == [
        24,
        8,
        5,
        4,
        7,
        4,
        0,
    ]


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        read_program("module @jit_step {}")
    assert np.isclose(read_program(TEXT, unknown_turns=9).runs["body"], 6)  # a known count is not overruled
