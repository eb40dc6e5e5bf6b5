"""Compare attention kernels with XLA's, and the ring's running softmax with the softmax of all keys."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causvid_jax.analysis import flops
from causvid_jax.config.recipes import load_recipe
from causvid_jax.models import attention, kv_cache, splash


def qkv(t, s, n=2, d=32, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((2, length, n, d)).astype(np.float32) for length in (t, s, s))


@pytest.mark.parametrize("t,s,d,masked", [(128, 128, 128, False), (70, 200, 48, True), (70, 1000, 48, True)])
def test_splash_equals_dense_with_its_gradient(t, s, d, masked):
    q, k, v = qkv(t, s, d=d)
    mask = jnp.asarray(np.random.default_rng(1).uniform(size=s) < 0.6) if masked else None
    weight = np.random.default_rng(2).standard_normal((2, t, 2, d)).astype(np.float32)

    def loss(backend):
        def f(q, k, v):
            out = attention.dense(q, k, v, dtype="float32", backend=backend, mask=mask)
            return jnp.sum(weight * out), out

        return jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    ((_, expected), gradients), ((_, out), gradients_) = loss("xla"), loss("splash")
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for a, b in zip(gradients, gradients_, strict=True):
        np.testing.assert_allclose(b, a, atol=2e-5)


@pytest.mark.parametrize("keys,parts", [(512, 1), (1000, 1), (2048, 1), (2049, 5), (4680, 5), (32760, 16)])
def test_the_gradient_of_queries_is_written_once_for_2048_keys(keys, parts):
    """At the sizes of Wan: 512 tokens of text, blocks of 4680, a clip of 32760. Five parts are of 512 and 1024 keys."""
    spec = jax.ShapeDtypeStruct((1, 256, 1, 128), jnp.bfloat16)
    many = jax.ShapeDtypeStruct((1, keys, 1, 128), jnp.bfloat16)
    gradient = jax.grad(lambda q, k, v: splash.attention(q, k, v).sum(), argnums=(0, 1, 2))
    text = str(jax.make_jaxpr(gradient)(spec, many, many))
    written = [int(n) for n in re.findall(r"bf16\[(?:1,)?(\d+),1,256,128\]", text)]
    assert max(written) == parts


@pytest.mark.parametrize("visible", [[0], [1, 2], [0, 3]])
def test_splash_computes_the_blocks_of_visible_keys_alone(visible):
    """Keys and values of hidden blocks are NaN, which reaches the result of every block that is computed."""
    q, k, v = qkv(130, 4 * splash.BLOCK)
    mask = np.zeros(4 * splash.BLOCK, bool)
    for block in visible:
        mask[block * splash.BLOCK + 1 : (block + 1) * splash.BLOCK - 200] = True
    run = jax.jit(lambda k, v, mask: attention.dense(q, k, v, dtype="float32", backend="splash", mask=mask))
    expected = attention.dense(q, k[:, mask], v[:, mask], dtype="float32")
    hidden = ~np.repeat(np.isin(np.arange(4), visible), splash.BLOCK)
    k[:, hidden], v[:, hidden] = np.nan, np.nan
    np.testing.assert_allclose(run(k, v, mask), expected, atol=1e-5)
    assert np.isnan(run(k, v, np.ones_like(mask))).all()  # the same program


def test_a_clip_on_tpu_costs_what_its_blocks_see():
    """Wan 1.3B takes 202 TFLOP a block with a full window; what a clip of 81 frames sees takes 141 in the mean."""
    recipe = load_recipe("wan_1_3b")
    recipe = dataclasses.replace(recipe, causal=dataclasses.replace(recipe.causal, window=21, sink=0))
    net, causal, tokens = recipe.student, recipe.causal, flops.tokens_per_frame(recipe, recipe.student)
    assert (tokens, causal.frames_per_block) == (1560, 3)
    costs, seen = [], []
    for position in range(0, 21, 3):
        frame = np.where(np.arange(21) < position + 3, np.arange(21), -1)
        mask = jnp.repeat(kv_cache.visible_slots(jnp.asarray(frame), jnp.int32(position), 3, causal), tokens)
        keys = splash.BLOCK * int(splash.visible_blocks(mask).sum())
        costs.append(5 * flops.forward(net, 3, tokens, 3 * keys / tokens, text=False) / 1e12)
        seen.append(5 * flops.forward(net, 3, tokens, 3 * (position + 3), text=False) / 1e12)
    assert costs[-1] == pytest.approx(202, abs=0.1) and np.mean(seen) == pytest.approx(141.5, abs=0.6)
    assert all(0 <= cost - least < 3 for cost, least in zip(costs, seen, strict=True))  # whole blocks of 512 keys
    assert np.mean(costs) < 143


def test_parts_merge_to_the_whole():
    q, k, v = qkv(5, 12)
    parts = [attention._partial(q, k[:, i : i + 4], v[:, i : i + 4], dtype="float32") for i in (0, 4, 8)]
    out, _, total = attention._merge(attention._merge(parts[0], parts[1]), parts[2])
    np.testing.assert_allclose(out / total[..., None], attention.dense(q, k, v, dtype="float32"), atol=1e-6)


def test_auto_is_xla_on_the_cpu():
    assert attention.resolve("auto", "bfloat16") == "xla"
    assert attention.resolve("cudnn", "bfloat16") == "cudnn"


@pytest.mark.parametrize("dtype,atol", [("float32", 1e-6), ("bfloat16", 0.02)])
@pytest.mark.parametrize("shown", [(0, 13), (4, 6), (6, 13)])  # all; parts of the keys before or after are hidden
def test_parts_of_a_head_equal_float64(monkeypatch, dtype, atol, shown):
    """Compare value and gradient for lengths that no part divides, two examples and a mask."""
    monkeypatch.setattr(attention, "CHUNKED", 0)
    monkeypatch.setattr(attention, "QUERIES", 4)
    monkeypatch.setattr(attention, "KEYS", 4)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, length, 3, 8)) for length in (10, 13, 13))
    mask = (np.arange(13) % 3 > 0) & (np.arange(13) >= shown[0]) & (np.arange(13) < shown[1])
    scores = np.where(mask, np.einsum("btnd,bsnd->bnts", q, k) / np.sqrt(8), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bnts,bsnd->btnd", weights / weights.sum(-1, keepdims=True), v)

    def dense(q, k, v):
        return attention.dense(q, k, v, dtype=dtype, mask=jnp.asarray(mask))

    arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    np.testing.assert_allclose(dense(*arrays), expected, atol=atol)
    chunked = jax.grad(lambda *x: (dense(*x) ** 2).sum(), (0, 1, 2))(*arrays)
    monkeypatch.setattr(attention, "CHUNKED", 1 << 30)
    whole = jax.grad(lambda *x: (dense(*x) ** 2).sum(), (0, 1, 2))(*arrays)
    for one, other in zip(chunked, whole, strict=True):
        np.testing.assert_allclose(one, other, atol=10 * atol)
