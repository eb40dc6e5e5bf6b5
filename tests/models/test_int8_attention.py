"""Attention with 8-bit scores against NumPy: the rounding, the error of the result, and where it is refused."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causvid_jax.analysis import topology
from causvid_jax.config import CausalConfig, ConfigError
from causvid_jax.models import attention, int8_attention, transformer
from causvid_jax.sampling import stream
from causvid_jax.training import stages
from tests import tiny


def exact(q, k, v, mask):
    """Return softmax attention in float64."""
    scores = np.einsum("btnd,bsnd->bnts", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(np.where(mask, scores, -np.inf) - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bsnd->btnd", weights / weights.sum(-1, keepdims=True), v)


def rounded(x):
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return np.round(x / scale) * scale


def oracle(q, k, v, mask):
    """Return the same with keys minus their mean, and queries and keys rounded by token and head."""
    smooth = k - k[:, mask].mean(1, keepdims=True)
    return exact(rounded(q / np.sqrt(q.shape[-1])) * np.sqrt(q.shape[-1]), rounded(smooth), v, mask)


def arrays(t, s, n=2, d=24, seed=0):
    """Return q, k, v ``[2, length, n, d]`` in float64; the keys share an outlier, as trained ones do."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((2, length, n, d)) for length in (t, s, s))
    return q, k + 8 * (np.arange(d) == 3), v


# Lengths that no block divides; all keys, the first ones by their number, any of them.
@pytest.mark.parametrize(
    "t,s,visible,counted", [(5, 70, 70, False), (130, 200, 200, False), (130, 200, 65, True), (3, 200, -3, False)]
)
def test_equals_numpy(t, s, visible, counted):
    q, k, v = arrays(t, s)
    mask = np.arange(s) % -visible == 1 if visible < 0 else np.arange(s) < visible
    given = {"mask": jnp.asarray(mask)} if visible != s else {}
    given |= {"used": jnp.int32(visible)} if counted else {}
    dense = functools.partial(attention.dense, *(jnp.asarray(x, jnp.float32) for x in (q, k, v)), **given)
    out = dense(dtype="float32", backend="int8")
    np.testing.assert_allclose(out, oracle(q, k, v, mask), atol=2e-3)  # a value between two integers may go either way
    error = np.sqrt(np.square(out - exact(q, k, v, mask)).mean())
    assert 1e-5 < error < 0.02 * v.std()
    half = dense(dtype="bfloat16", backend="int8")
    assert half.dtype == jnp.float32 and np.sqrt(np.square(half - out).mean()) < 0.01 * v.std()


def test_the_mean_of_the_keys_carries_the_outlier():
    q, k, v = arrays(20, 90)
    mask = np.ones(90, bool)
    plain = exact(rounded(q), rounded(k), v, mask)
    truth = exact(q, k, v, mask)
    assert np.square(oracle(q, k, v, mask) - truth).mean() < 0.3 * np.square(plain - truth).mean()


def test_a_stream_is_that_of_bfloat16_within_its_error():
    recipe = dataclasses.replace(tiny.RECIPE, causal=CausalConfig(frames_per_block=1, window=3, sink=1))
    params = jax.tree.map(jnp.asarray, tiny.random_transformer(recipe.student, 3, 0.15))
    text = np.random.default_rng(0).standard_normal((1, recipe.text.length, recipe.text.dim)).astype(np.float32)
    shown = {}
    for backend in ("xla", "int8"):
        net = dataclasses.replace(recipe.student, dtype="bfloat16", attention=backend)
        config = dataclasses.replace(recipe, student=net)
        weights, latents = {"student": transformer.unstack(params, net)}, []
        state = stream.init_stream(weights, text, config=config)
        for _ in range(5):
            x, state = stream.next_block(weights, state, config=config)
            latents.append(np.asarray(x))
        shown[backend] = np.stack(latents)
    error = np.sqrt(np.square(shown["int8"] - shown["xla"]).mean()) / shown["xla"].std()
    assert 0 < error < 0.03


def test_it_is_refused_where_it_cannot_be(tmp_path, monkeypatch):
    q = jnp.ones((1, 4, 1, 8))
    with pytest.raises(ConfigError, match="attention is 'int8', which has no gradient and is for sampling"):
        jax.grad(lambda q: attention.dense(q, q, q, dtype="bfloat16", backend="int8").sum())(q)
    with pytest.raises(ConfigError, match="attention is 'int8' with dtype 'float32', but this kernel"):
        dataclasses.replace(tiny.RECIPE.student, attention="int8")
    for role in ("teacher", "student"):
        net = dataclasses.replace(getattr(tiny.RECIPE, role), dtype="bfloat16", attention="int8")
        with pytest.raises(ConfigError, match=f"{role}.attention is 'int8', which has no gradient"):
            stages.train("teacher", dataclasses.replace(tiny.RECIPE, **{role: net}), tmp_path)
    monkeypatch.setattr(int8_attention.constraints, "platform", lambda: "rocm")
    with pytest.raises(ConfigError, match="which has no kernel for rocm; accepted: 'auto', 'xla'"):
        attention.dense(q, q, q, dtype="bfloat16", backend="int8")


@pytest.mark.parametrize(
    "machine,compiler,call", [("h200:1", "jax_cuda12_plugin", "triton"), ("v6e:2x2", "libtpu", "tpu_custom_call")]
)
def test_it_compiles_for_the_published_size(machine, compiler, call):
    """A block of Wan 1.3B over 21 latent frames, in temporaries below two copies of its keys and values."""
    if importlib.util.find_spec(compiler) is None:
        pytest.skip(f"{compiler} is not installed: no compiler for {machine}")
    mesh = jax.sharding.Mesh(topology.describe(machine).devices[:1], "x")
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    q, k = (jax.ShapeDtypeStruct((1, n, 12, 128), jnp.bfloat16, sharding=whole) for n in (4680, 32760))
    used = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)

    def call_it(q, k, v, used):
        return attention.dense(q, k, v, dtype="bfloat16", backend="int8", mask=jnp.arange(32760) < used, used=used)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), jax.default_matmul_precision("default"):
        compiled = jax.jit(call_it).lower(q, k, k, used).compile()
    assert call in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 32760 * 12 * 128 * 2
