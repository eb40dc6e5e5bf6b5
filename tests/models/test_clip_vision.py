"""CLIP's image encoder: parity with transformers, scaling as PyTorch scales, and what it refuses."""

import jax
import jax.numpy as jnp
import make_clip as golden
import numpy as np
import pytest

from causvid_jax.config import CLIPConfig, ConfigError
from causvid_jax.models import clip_vision

CONFIG = CLIPConfig(**golden.SIZES)


def count(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("naming", ["diffusers", "original"])
def test_equals_transformers(naming):
    arrays, state = dict(np.load(golden.GOLDEN)), golden.random_weights(golden.shapes(), golden.SEED)
    state = golden.as_original(state) if naming == "original" else state
    pixels, rows = golden.errors_of(state, arrays, naming)
    assert arrays["rows"].shape == (3, 10, 24) and arrays["rows"].std() > 0.5
    assert pixels <= 5e-5 and rows <= 1e-4


def test_published_size():
    """ViT-H/14's image encoder: 632,076,800 parameters, of which the last layer is not read, and 257 rows."""
    config = CLIPConfig()
    made = jax.eval_shape(lambda key: clip_vision.init(key, config), jax.random.key(0))
    assert count(made) == count(clip_vision.abstract(config)) == 632_076_800
    picture = jax.ShapeDtypeStruct((1, 480, 832, 3), jnp.float32)
    rows = jax.eval_shape(
        lambda p, x: clip_vision.encode(p, clip_vision.preprocess(x, config=config), config=config), made, picture
    )
    assert rows.shape == (1, 257, 1280) and config.tokens == 257 and rows.dtype == jnp.float32


def test_the_last_layer_is_not_read_and_the_first_is():
    params = clip_vision.init(jax.random.key(1), CONFIG)
    pixels = jax.random.normal(jax.random.key(2), (1, 12, 12, 3))
    encode = jax.jit(lambda p: clip_vision.encode(p, pixels, config=CONFIG))
    rows = encode(params)
    for layer, reads in ((2, False), (1, True), (0, True)):
        changed = dict(params, blocks=jax.tree.map(lambda x, i=layer: x.at[i].add(0.1), params["blocks"]))
        assert (np.abs(encode(changed) - rows).max() > 1e-3) == reads


def test_bicubic_weights():
    """Rows sum to one, keep an image of the target size, are symmetric, and halve an image as computed by hand."""
    for size, target in ((30, 12), (7, 12), (224, 224), (5, 1)):
        matrix = clip_vision.bicubic_matrix(size, target)
        np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
        np.testing.assert_allclose(matrix[::-1, ::-1], matrix, atol=1e-6)
    np.testing.assert_array_equal(clip_vision.bicubic_matrix(9, 9), np.eye(9))
    # Halfway between two pixels: distances 3/2, 1/2, 1/2, 3/2.
    np.testing.assert_array_equal(clip_vision.bicubic_matrix(8, 4)[1, 1:5], [-0.09375, 0.59375, 0.59375, -0.09375])


def test_half_precision_stays_close():
    params = clip_vision.init(jax.random.key(3), CONFIG)
    pixels = jax.random.normal(jax.random.key(4), (1, 12, 12, 3))
    half = CLIPConfig(**{**golden.SIZES, "dtype": "bfloat16"})
    full, rounded = (jax.jit(lambda p, c=c: clip_vision.encode(p, pixels, config=c))(params) for c in (CONFIG, half))
    assert rounded.dtype == jnp.float32
    assert 0 < np.abs(full - rounded).max() < 0.05 * np.abs(full).max()


@pytest.mark.parametrize(
    "call,message",
    [
        (
            lambda p: clip_vision.preprocess(jnp.zeros((4, 4, 3)), config=CONFIG),
            r"shape \(4, 4, 3\) .*accepted: \[batch",
        ),
        (lambda p: clip_vision.encode(p, jnp.zeros((1, 8, 12, 3)), config=CONFIG), r"accepted: \[batch, 12, 12, 3\]"),
        (lambda p: CLIPConfig(patch_size=15), "image_size is 224; it must be a multiple of patch_size = 15"),
        (lambda p: CLIPConfig(num_heads=7), "clip.dim is 1280, which 7 heads do not divide"),
        (lambda p: CLIPConfig(activation="relu"), "clip.activation is 'relu'; accepted: 'gelu', 'quick_gelu'"),
        (lambda p: CLIPConfig(num_layers=1), "clip.num_layers is 1; accepted: at least 2"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ConfigError, match=message):
        call(clip_vision.abstract(CONFIG))
