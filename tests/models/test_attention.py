"""Attention kernels against the XLA one, and the ring's running softmax against the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causvid_jax.models import attention


def qkv(t, s, n=2, d=32, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((2, length, n, d)).astype(np.float32) for length in (t, s, s))


@pytest.mark.parametrize("t,s,d,masked", [(128, 128, 128, False), (70, 200, 48, True)])
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


def test_parts_merge_to_the_whole():
    q, k, v = qkv(5, 12)
    parts = [attention._partial(q, k[:, i : i + 4], v[:, i : i + 4], "float32") for i in (0, 4, 8)]
    out, _, total = attention._merge(attention._merge(parts[0], parts[1]), parts[2])
    np.testing.assert_allclose(out / total[..., None], attention.dense(q, k, v, dtype="float32"), atol=1e-6)


def test_auto_is_xla_on_the_cpu():
    assert attention.resolve("auto", "bfloat16") == "xla"
    assert attention.resolve("cudnn", "bfloat16") == "cudnn"
