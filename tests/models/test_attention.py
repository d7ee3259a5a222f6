"""Laws of the attention backends: they agree, and which one runs is never a surprise."""

import logging
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adastate_jax.errors import UserError
from adastate_jax.models import attention as attention_lib
from adastate_jax.models import by_head
from adastate_jax.models.attention import (
    MOST_SCORE_BYTES,
    KeyValues,
    attend_all,
    attention,
    attention_in_blocks,
    concatenate,
    resolve_backend,
    shortcoming,
    splash_attention,
)
from adastate_jax.models.rope import rotation
from adastate_jax.sharding import make_mesh


class Device(NamedTuple):
    """What the choice of a backend reads of a `jax.Device`."""

    platform: str
    compute_capability: str = ""
    client: types.SimpleNamespace | None = None
    device_kind: str = "a device"

    __hash__ = object.__hash__


CPU, TPU = Device("cpu"), Device("tpu")


def gpu(capability: str, runtime: str = "cuda 13000") -> Device:
    return Device("gpu", capability, types.SimpleNamespace(platform_version=runtime))


def draw(batch, queries, keys, heads=2, dtype=jnp.float32):
    shapes = [(batch, tokens, heads, 128) for tokens in (queries, keys, keys)]
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize(("queries", "keys"), [(128, 256), (100, 130), (60, 1100)])
def test_splash_is_attention(queries, keys):
    """With tokens that fill the kernel's tiles, with padding, and with several tiles."""
    inputs = draw(2, queries, keys)
    splash = jax.jit(lambda *x: splash_attention(*x, interpret=True))(*inputs)
    np.testing.assert_allclose(splash, attention(*inputs, "xla"), atol=5e-6)


def test_splash_is_attention_in_16_bits():
    exact = attention(*draw(1, 100, 130), "xla")
    low = splash_attention(*draw(1, 100, 130, dtype=jnp.bfloat16), interpret=True)
    assert low.dtype == jnp.bfloat16
    assert np.abs(low - exact).max() < 0.03 * np.abs(exact).max()


def test_splash_has_the_gradient_of_attention():
    inputs = draw(1, 40, 130)
    ours = gradients(lambda *x: splash_attention(*x, interpret=True), inputs)
    for mine, exact in zip(ours, gradients(lambda *x: attention(*x, "xla"), inputs), strict=True):
        np.testing.assert_allclose(mine, exact, atol=2e-5)


@pytest.mark.parametrize("batch", [4, 1])
def test_splash_runs_on_a_mesh(batch):
    """Samples and heads are split over the devices where they can be; tokens never are."""
    inputs = draw(batch, 40, 130)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        split = jax.jit(lambda *x: splash_attention(*x, interpret=True))(*inputs)
    np.testing.assert_allclose(split, attention(*inputs, "xla"), atol=5e-6)


def gradients(function, inputs):
    weight = jax.random.normal(jax.random.key(1), inputs[0].shape)
    return jax.jit(jax.grad(lambda *x: (weight * function(*x)).sum(), argnums=(0, 1, 2)))(*inputs)


@pytest.mark.parametrize(("queries", "most"), [(96, 32), (100, 30), (7, 1), (20, 500)])
def test_blocks_of_queries_are_attention(queries, most):
    """With blocks that are full, with padding, and of one query; the gradient too."""
    inputs = draw(2, queries, 130)
    blocked = jax.jit(lambda *x: attention_in_blocks(*x, most))
    np.testing.assert_allclose(blocked(*inputs), attention(*inputs, "xla"), atol=1e-6)
    whole = gradients(lambda *x: attention(*x, "xla"), inputs)
    for ours, exact in zip(gradients(blocked, inputs), whole, strict=True):
        np.testing.assert_allclose(ours, exact, atol=5e-6)


def test_blocks_of_queries_lose_no_more_in_16_bits():
    inputs = draw(1, 400, 60)
    exact = gradients(lambda *x: attention(*x, "xla"), inputs)
    low = [x.astype(jnp.bfloat16) for x in inputs]

    def error(function):
        return max(
            np.abs(ours.astype(np.float32) - x).max() / np.abs(x).max()
            for ours, x in zip(gradients(function, low), exact, strict=True)
        )

    assert error(lambda *x: attention_in_blocks(*x, 5)) < 1.2 * error(lambda *x: attention(*x, "xla"))


def sizes_of_all_arrays(jaxpr):
    """Bytes of everything that a traced program computes, the bodies of its loops among it."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size * variable.aval.dtype.itemsize for variable in equation.outvars)
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from sizes_of_all_arrays(inner)


SAMPLE = jax.ShapeDtypeStruct((1, 21 * 30 * 52, 40, 128), jnp.float32)  # of the 14B teacher at 480×832


def sizes_in_a_gradient(shape):
    def loss(query, key, value):
        return attention(query, key, value, "auto").sum()

    program = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1, 2)))(shape, shape, shape)
    return list(sizes_of_all_arrays(program.jaxpr))


@pytest.mark.parametrize(("queries", "keys"), [(150, 250), (128, 128)])
def test_head_by_head_is_attention(queries, keys, monkeypatch):
    """With one block of queries, and with several of which the last is filled up; the gradient too."""
    inputs = draw(2, queries, keys)
    wanted = [attention_lib._exact_attention(*inputs), *gradients(attention_lib._exact_attention, inputs)]
    for bytes_at_once in (by_head.MOST_CACHED_BYTES, 4 * keys * 40):
        monkeypatch.setattr(by_head, "MOST_CACHED_BYTES", bytes_at_once)
        found = [jax.jit(lambda *x: attention(*x, "xla"))(*inputs), *gradients(lambda *x: attention(*x, "xla"), inputs)]
        for ours, exact in zip(found, wanted, strict=True):
            np.testing.assert_allclose(ours, exact, atol=5e-6)


def test_head_by_head_loses_no_more_in_16_bits():
    inputs = draw(1, 200, 160)
    plain = attention_lib._exact_attention
    exact = [plain(*inputs), *gradients(plain, inputs)]
    low = [x.astype(jnp.bfloat16) for x in inputs]

    def error(function):
        found = [jax.jit(function)(*low), *gradients(function, low)]
        assert {x.dtype for x in found} == {jnp.dtype("bfloat16")}
        pairs = zip(found, exact, strict=True)
        return max(np.abs(ours.astype(np.float32) - x).max() / np.abs(x).max() for ours, x in pairs)

    assert error(lambda *x: attention(*x, "xla")) < 1.5 * error(plain)


def test_heads_of_a_processor_come_one_after_another():
    """Of a sample whose scores are 172 GB a layer, no more are held than its cache holds; nothing for other chips."""
    held = max(size for size in sizes_in_a_gradient(SAMPLE) if size not in (4 * SAMPLE.size, 4 * SAMPLE.size // 40))
    assert 0.9 * by_head.MOST_CACHED_BYTES < held <= by_head.MOST_CACHED_BYTES

    short = jax.make_jaxpr(lambda *x: attention(*x, "xla"))(*draw(1, 16, 16))
    assert "scan" not in str(short)


def test_scores_that_would_not_fit_are_never_held(caplog, monkeypatch):
    """Elsewhere, too, where no kernel serves: forwards and backwards."""
    monkeypatch.setattr(attention_lib, "_by_head", lambda *_: False)
    with caplog.at_level(logging.INFO):
        sizes = sizes_in_a_gradient(SAMPLE)
    held = max(size for size in sizes if size > 4 * SAMPLE.size)  # beyond queries, keys and values themselves
    assert 0.9 * MOST_SCORE_BYTES < held <= MOST_SCORE_BYTES
    assert "204 queries at a time: the scores of 32760 queries and 32760 keys would take 171.7 GB" in caplog.text


def test_a_mesh_holds_a_device_s_share_of_the_scores(monkeypatch):
    inputs = draw(8, 64, 64, heads=4)
    whole = 4 * 64 * 64 * 8 * 4
    monkeypatch.setattr(attention_lib, "MOST_SCORE_BYTES", whole // 8)
    blocked = str(jax.make_jaxpr(lambda *x: attention(*x, "xla"))(*inputs))
    with jax.set_mesh(make_mesh(2, 2, 2)):
        split = jax.make_jaxpr(lambda *x: attention(*x, "xla"))(*inputs)
        monkeypatch.setattr(attention_lib, "MOST_SCORE_BYTES", whole // 30)
        in_blocks = jax.jit(lambda *x: attention(*x, "xla"))(*inputs)
    assert "scan" in blocked
    assert "scan" not in str(split)
    np.testing.assert_allclose(in_blocks, attention(*inputs, "xla"), atol=1e-6)


def test_auto_is_the_platforms_own_backend():
    assert resolve_backend("auto", CPU, "float32", 128) == resolve_backend("auto", CPU, "bfloat16", 128) == "xla"
    assert resolve_backend("auto", gpu("9.0"), "bfloat16", 128) == "cudnn"
    assert resolve_backend("auto", TPU, "bfloat16", 128) == "splash"
    assert resolve_backend("xla", gpu("9.0"), "bfloat16", 128) == "xla"


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "head_dim", "reason"),
    [
        ("cudnn", gpu("9.0"), "float32", 128, "not for float32"),
        ("cudnn", gpu("9.0"), "bfloat16", 264, "head dim 264 is no multiple of 8 up to 256"),
        ("cudnn", gpu("9.0"), "bfloat16", 36, "head dim 36"),
        ("cudnn", gpu("8.6"), "bfloat16", 256, "up to 128"),
        ("cudnn", gpu("7.5"), "float16", 64, "compute capability 8.0, not 7.5"),
        ("cudnn", gpu("gfx942", "rocm 60300"), "bfloat16", 128, "needs CUDA"),
        ("splash", TPU, "float32", 128, "not for float32"),
        ("splash", TPU, "bfloat16", 64, "head dim 64 is no multiple of 128"),
    ],
)
def test_a_backend_that_cannot_serve_says_why(backend, device, dtype, head_dim, reason, caplog):
    """`auto` takes XLA's with one line in the log, whatever the number of traces; a backend by name fails."""
    resolve_backend.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [resolve_backend("auto", device, dtype, head_dim) for _ in range(2)] == ["xla", "xla"]
    assert len(caplog.messages) == 1
    assert reason in caplog.messages[0]
    with pytest.raises(UserError, match=reason):
        resolve_backend(backend, device, dtype, head_dim)


def test_a_backend_of_another_platform_fails_by_name():
    inputs = draw(1, 4, 4)
    for backend in ("cudnn", "splash"):
        with pytest.raises(UserError, match=f"attention {backend}: it does not run on cpu; choose auto or xla"):
            attention(*inputs, backend)
    assert shortcoming("cudnn", TPU, "bfloat16", 128) == "it does not run on tpu"
    with pytest.raises(ValueError, match="got 'fast'"):
        attention(*inputs, "fast")


def test_the_choice_is_named_once(caplog):
    resolve_backend.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            attention(*draw(1, 4, 4), "auto")
    assert caplog.messages == [f"attention: xla (float32, head dim 128, on {jax.devices()[0].device_kind})"]


def test_constant_values_are_kept():
    """Whatever the scores, a mean of equal values is that value."""
    query = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))
    turn = rotation(np.arange(1), 2, 2, 8)
    np.testing.assert_allclose(
        attend_all("xla")(query, query, jnp.ones_like(query), turn, None)[0], jnp.ones_like(query), atol=1e-6
    )


@pytest.mark.parametrize(("live", "cached"), [(128, 256), (100, 130), (1200, 60), (40, 30)])
def test_splash_reads_a_laid_out_context(live, cached, monkeypatch):
    """The same as of context and live tokens joined, whether or not tiles need filling up; and its gradient."""
    monkeypatch.setattr(attention_lib, "_serving", lambda *_: "splash")
    query, key, value = draw(2, live, live)
    context = KeyValues(*draw(2, 1, cached)[1:])
    layers = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), context)
    laid_out = jax.tree.map(lambda x: x[0], attention_lib.lay_out(layers, live, "splash", "float32"))
    assert laid_out.num_tokens == cached
    assert laid_out.key.shape[2] + live == -(-(cached + live) // 128) * 128  # zeros fill the last tile

    def splash(*x):
        return splash_attention(*x, laid_out, interpret=True)

    def joined(query, key, value):
        seen = concatenate(context, KeyValues(key, value))
        return attention(query, seen.key, seen.value, "xla")

    monkeypatch.undo()
    inputs = query, key, value
    np.testing.assert_allclose(jax.jit(splash)(*inputs), joined(*inputs), atol=5e-6)
    for mine, exact in zip(gradients(splash, inputs), gradients(joined, inputs), strict=True):
        np.testing.assert_allclose(mine, exact, atol=2e-5)


def test_a_context_is_laid_out_for_splash_alone():
    context = KeyValues(*draw(1, 1, 30)[1:])
    assert attention_lib.lay_out(context, 10, "xla", "float32") is context
    assert attention_lib.lay_out(None, 10, "xla", "float32") is None
