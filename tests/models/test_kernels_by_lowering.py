"""Name the kernels that the forward modes call on a GPU and a TPU, in programs lowered for these devices.

Lowering asks cuDNN for nothing but its version, which is stated (9.10) where it is not installed. That the kernels
compute what they should is another matter: numerically they are compared where such a device is at hand.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causvid_jax.config import CausalConfig, TransformerConfig
from causvid_jax.models import layers, transformer
from causvid_jax.sharding import constraints
from tests.tiny import NETWORK

CONFIG = TransformerConfig(**NETWORK, dtype="bfloat16", attention="auto", remat="none")
CAUSAL = CausalConfig(frames_per_block=2, window=4)
HEIGHT, WIDTH, BATCH = 8, 8, 3
TOKENS = (HEIGHT // 2) * (WIDTH // 2)  # of a frame
CALL = re.compile(r"custom_call @(__cudnn\$\w+)\(.*?mask_type\\22: \\22(\w+)\\22.* : \((.*?)\) -> ")


def lowered(reading: str, platform: str) -> str:
    """Return the StableHLO of a forward mode, with the shapes of a run."""
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    params = transformer.inference(CONFIG)
    frames = 4 if reading == "bidirectional" else 2
    x, timestep, text = spec(BATCH, frames, HEIGHT, WIDTH, 4), spec(BATCH, frames), spec(BATCH, 8, 5)
    with constraints.lowering_for(platform):
        if reading == "bidirectional":
            function = lambda p, x, t, text: transformer.bidirectional(p, x, t, text, config=CONFIG)  # noqa: E731
            given = (params, x, timestep, text)
        else:
            cache = jax.eval_shape(
                lambda: transformer.init_cache(CONFIG, CAUSAL, batch=BATCH, height=HEIGHT, width=WIDTH)
            )
            known = jax.eval_shape(lambda p, text: transformer.encode_text(p, text, config=CONFIG), params, text)

            def function(p, x, t, text, cache):
                rewrites = reading == "rewriting"
                return transformer.cached(p, x, t, text, cache, config=CONFIG, causal=CAUSAL, rewrites=rewrites)

            given = (params, x, timestep, known, cache)
        return jax.jit(function).trace(*given).lower(lowering_platforms=(platform,)).as_text()


@pytest.fixture
def cudnn(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as kernels

    if kernels.cuda_versions is None:
        monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 91000)


QUERY, KEYS = f"tensor<3x{2 * TOKENS}x2x16xbf16>", f"tensor<3x{4 * TOKENS}x2x16xbf16>"
TEXT, LENGTHS = "tensor<3x8x2x16xbf16>", "tensor<3xi32>"
CROSS = ("__cudnn$fmhaSoftmax", "NO_MASK", [QUERY, TEXT, TEXT])


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize(
    "reading,expected",
    [
        # The keys in use are told as a length for each row; nothing of size T x S exists.
        ("streaming", [("__cudnn$fmhaSoftmax", "PADDING", [QUERY, KEYS, KEYS, LENGTHS, LENGTHS]), CROSS]),
        (
            "rewriting",
            [
                (
                    "__cudnn$fmhaScaleBiasSoftmax",
                    "NO_MASK",
                    [QUERY, KEYS, KEYS, f"tensor<1x1x{2 * TOKENS}x{4 * TOKENS}xbf16>"],
                ),
                CROSS,
            ],
        ),
        (
            "bidirectional",
            [("__cudnn$fmhaSoftmax", "NO_MASK", [KEYS] * 3), ("__cudnn$fmhaSoftmax", "NO_MASK", [KEYS, TEXT, TEXT])],
        ),
    ],
)
def test_cudnn(reading, expected):
    text = lowered(reading, "cuda")
    calls = [(name, mask, operands.split(", ")) for name, mask, operands in CALL.findall(text)]
    assert calls == expected
    # Nowhere else does a softmax's maximum run over keys.
    assert not re.search(rf"tensor<3x2x\d+x{4 * TOKENS}xf32>", text)


def test_splash():
    text = lowered("streaming", "tpu")
    assert text.count("stablehlo.custom_call @tpu_custom_call") >= 1 and "__cudnn" not in text


def test_on_the_cpu_there_is_no_kernel():
    text = lowered("streaming", "cpu")
    assert "__cudnn" not in text and "tpu_custom_call" not in text
    assert re.search(rf"tensor<3x2x{2 * TOKENS}x{4 * TOKENS}xf32>", text)


@pytest.mark.parametrize("platform, barriers", [("cuda", 1), ("cpu", 0)])
def test_rotated_norms_on_a_gpu_keep_only_the_sums(platform, barriers):
    """A barrier after the sums keeps XLA from writing normalized queries and keys for the rotation to read.

    It changes neither values nor derivatives, in both directions of differentiation.
    """
    x, scale = jax.random.normal(jax.random.key(0), (2, 3, 8)), jnp.linspace(0.5, 2.0, 8)

    def norm(x):
        return layers.rms_norm(x, scale, 1e-6, rotated=True)

    def expected(x):
        return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale

    with constraints.lowering_for(platform):
        found = jax.jit(norm).trace(x).lower(lowering_platforms=(platform,)).as_text()
        values, directions = jax.jvp(norm, (x,), (jnp.ones_like(x),))
        gradient = jax.grad(lambda x: norm(x).sum())(x)
    assert found.count("optimization_barrier") == barriers
    wanted, wanted_directions = jax.jvp(expected, (x,), (jnp.ones_like(x),))
    np.testing.assert_allclose(values, wanted, rtol=1e-6)
    np.testing.assert_allclose(directions, wanted_directions, atol=1e-6)
    np.testing.assert_allclose(gradient, jax.grad(lambda x: expected(x).sum())(x), atol=1e-6)
