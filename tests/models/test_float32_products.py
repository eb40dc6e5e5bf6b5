"""Products of float32 ask for full precision in programs lowered for GPU and TPU, whatever the default is.

Compilers multiply float32 in TF32 or bfloat16 unless a product asks for all its bits.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from causvid_jax.config import CausalConfig, CLIPConfig, ConfigError, TransformerConfig, UMT5Config, VAEConfig
from causvid_jax.distill import consistency
from causvid_jax.models import attention, clip_vision, transformer, umt5, vae
from causvid_jax.sharding import constraints
from tests.tiny import NETWORK

PRODUCT = re.compile(r"stablehlo\.(?:dot_general|convolution).*")
CAUSAL = CausalConfig(frames_per_block=2, window=4)


def spec(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def products(function, platform, *inputs):
    """Return products and convolutions of ``function`` lowered for ``platform``: (both operands are float32, line)."""
    with constraints.lowering_for(platform), jax.default_matmul_precision(None):
        text = jax.jit(function).trace(*inputs).lower(lowering_platforms=(platform,)).as_text()
    lines = PRODUCT.findall(text)
    assert lines
    return [(bool(re.search(r": \(tensor<[\dx]*f32>, tensor<[\dx]*f32>\)", line)), line) for line in lines]


def check(lines, every=False):
    for float32, line in lines:
        assert (line.count("HIGHEST") == 2) == float32, line
        assert float32 or not every, line


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("policy,count", [("default", 3), ("fast", 3), ("wan", 4), ("causvid", 0)])
def test_products_of_the_policies_in_bfloat16(platform, policy, count):
    """The time embedding has three float32 products in every policy but ``causvid``; ``wan`` adds the head."""
    config = TransformerConfig(**NETWORK, dtype="bfloat16", precision=policy, attention="xla", remat="none")
    inputs = transformer.abstract(config), spec(2, 4, 8, 8, 4), spec(2, 4), spec(2, 8, 5)
    for forward in (transformer.bidirectional, functools.partial(transformer.block_causal, causal=CAUSAL)):
        lines = products(lambda p, *rest, f=forward: f(p, *rest, config=config), platform, *inputs)
        check(lines)
        assert sum(float32 for float32, _ in lines) == count
        results = {line.rsplit("x", 1)[1].split(">")[0] for float32, line in lines if not float32}
        assert results == ({"f32", "bf16"} if policy == "fast" else {"f32"})


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_products_of_the_transformer_and_of_its_gradient_in_float32(platform):
    config = TransformerConfig(**NETWORK, dtype="float32", attention="xla", remat="none")

    def loss(params, x, timestep, text):
        one = transformer.bidirectional(params, x, timestep, text, config=config)
        return (one**2 + transformer.block_causal(params, x, timestep, text, config=config, causal=CAUSAL)).sum()

    inputs = transformer.abstract(config), spec(2, 4, 8, 8, 4), spec(2, 4), spec(2, 8, 5)
    check(products(loss, platform, *inputs), every=True)
    check(products(jax.grad(loss), platform, *inputs), every=True)


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_kernels_without_a_float32_product_are_refused_in_float32(kernel):
    with pytest.raises(
        ConfigError, match=f"transformer.attention is '{kernel}' with dtype 'float32', .*; accepted: .*xla"
    ):
        TransformerConfig(**NETWORK, dtype="float32", attention=kernel)
    TransformerConfig(**NETWORK, dtype="bfloat16", attention=kernel)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_products_of_a_stream(platform):
    config = TransformerConfig(**NETWORK, dtype="float32", attention="auto", remat="none")
    cache = jax.eval_shape(lambda: transformer.init_cache(config, CAUSAL, batch=2, height=8, width=8))
    params = transformer.abstract(config)
    text = jax.eval_shape(lambda p, t: transformer.encode_text(p, t, config=config), params, spec(2, 8, 5))

    def step(p, x, t, text, cache):
        return transformer.cached(p, x, t, text, cache, config=config, causal=CAUSAL)

    check(products(step, platform, params, spec(2, 2, 8, 8, 4), spec(2, 2), text, cache), every=True)
    with constraints.lowering_for(platform):
        assert attention.resolve("auto", "float32") == "xla"


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_products_of_the_codec_and_of_the_encoders(platform):
    coder = VAEConfig(base_dim=4, z_dim=2, num_res_blocks=1, dtype="float32")
    check(products(lambda p, x: vae.decode(p, x, config=coder), platform, vae.abstract(coder), spec(1, 2, 2, 2, 2)))
    check(products(lambda p, x: vae.encode(p, x, config=coder), platform, vae.abstract(coder), spec(1, 5, 16, 16, 3)))
    text = UMT5Config(vocab_size=11, dim=6, ffn_dim=10, num_heads=2, head_dim=4, num_layers=2, dtype="float32")
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    check(products(lambda p, t, m: umt5.encode(p, t, m, config=text), platform, umt5.abstract(text), tokens, tokens))
    image = CLIPConfig(image_size=8, patch_size=4, dim=80, ffn_dim=6, num_heads=1, num_layers=2, projection_dim=3)
    check(
        products(
            lambda p, x: clip_vision.encode(p, x, config=image), platform, clip_vision.abstract(image), spec(1, 8, 8, 3)
        )
    )


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_products_of_the_discriminator_and_of_the_sums_over_blocks(platform):
    config = TransformerConfig(**NETWORK, dtype="float32", attention="xla", remat="none")
    inputs = transformer.abstract(config), spec(2, 4, 8, 8, 4), spec(2, 4), spec(2, 8, 5), spec(2, 32)
    check(products(functools.partial(transformer.pooled_features, config=config), platform, *inputs), every=True)

    def loss(x):
        networks = consistency.Networks(*(lambda x, t: 0.5 * x,) * 3)
        options = {"shift": 3.0, "block_sizes": (2, 2), "ratio": 1.0, "scale": 1.0}
        return consistency.continuous_loss(networks, x, jax.random.key(0), **options)[0]

    check(products(jax.value_and_grad(loss), platform, spec(2, 4, 2, 2, 3)), every=True)
