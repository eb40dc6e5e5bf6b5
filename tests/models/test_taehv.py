"""The tiny codec: parity with PyTorch, the last group, gradients, the published size."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import make_taehv as golden
import numpy as np
import pytest
from test_codecs import SMALL_TAEHV, compiled, params_of, video

from causvid_jax.checkpoints.checkpoint import network_of
from causvid_jax.config import ConfigError, TAEHVConfig, VAEConfig
from causvid_jax.models import taehv, vae


def test_equals_pytorch():
    arrays = dict(np.load(golden.GOLDEN))
    state = golden.random_weights(
        network_of(TAEHVConfig()).shapes(TAEHVConfig(**golden.SIZES), "original"), golden.SEED
    )
    errors = golden.errors_of(state, arrays)
    assert len(errors) == 4 and max(errors.values()) <= 1e-4, errors
    assert arrays["encoded"].std() > 0.1 and arrays["decoded"].std() > 0.5


def test_the_last_group_is_filled_with_its_last_frame():
    frames = video(5)
    filled = jnp.concatenate([frames, frames[:, -1:], frames[:, -1:], frames[:, -1:]], axis=1)
    encode, params = compiled("taehv", "encode"), params_of("taehv")
    short = encode(params, frames)
    assert short.shape == (1, 2, 1, 2, SMALL_TAEHV.z_dim)
    np.testing.assert_array_equal(short, encode(params, filled))


def test_a_stream_can_show_its_frames_through_either_decoder():
    """Arguments, shapes and types are those of the large VAE; parameters and cache are its own."""
    for name in ("decode", "decode_chunk", "init_decode_cache", "encode", "time_factor"):
        ours, theirs = (list(inspect.signature(getattr(module, name)).parameters) for module in (taehv, vae))
        assert ours == theirs, name
    z = jax.ShapeDtypeStruct((2, 3, 4, 6, 3), jnp.float32)

    def shown(module, config):
        def both(params, z):
            cache = module.init_decode_cache(config, batch=2, height=4, width=6)
            return module.decode_chunk(params, z, cache, config=config)[0], module.decode(params, z, config=config)

        return jax.eval_shape(both, module.abstract(config), z)

    assert shown(taehv, SMALL_TAEHV) == shown(vae, VAEConfig(base_dim=2, z_dim=3))


def test_fresh_parameters_carry_signal_and_gradients_reach_all_of_them():
    config = dataclasses.replace(SMALL_TAEHV, encoder_dim=16, decoder_dims=(32, 24, 16, 16))
    params = taehv.init(jax.random.key(0), config)

    def loss(params):
        out = taehv.decode(params, taehv.encode(params, video(5), config=config), config=config, clamp=False)
        return jnp.square(out).mean(), out

    gradient, out = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert out.shape == (1, 5, 8, 16, 3) and 0.05 < out.std() < 20
    silent = [path for path, g in jax.tree_util.tree_flatten_with_path(gradient)[0] if not np.any(g)]
    assert not silent and all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_the_published_size():
    """Count the parameters of the published network (taew2_1), and the bytes of its decoder's cache at 480 x 832."""
    tree = taehv.abstract(TAEHVConfig())
    counts = {net: sum(leaf.size for leaf in jax.tree.leaves(tree[net])) for net in tree}
    assert counts == {"encoder": 1_470_928, "decoder": 9_844_611}
    cache = jax.eval_shape(lambda: taehv.init_decode_cache(TAEHVConfig(), batch=1, height=60, width=104))
    expected = [(1, 1, 60, 104, 256), (1, 1, 120, 208, 128), (1, 1, 240, 416, 64)]
    assert [leaf.shape for leaf in jax.tree.leaves(cache)] == [shape for shape in expected for _ in range(3)]
    assert (taehv.time_factor(TAEHVConfig()), taehv.space_factor(TAEHVConfig())) == (4, 8)


@pytest.mark.parametrize(
    "changes,message",
    [
        (
            {"temporal_upsample": (False, True, False)},
            "the same length and the same number of true entries",
        ),
        ({"decoder_dims": (8, 8)}, "has 2 entries; 3 levels need 4"),
        ({"dtype": "float16"}, "taehv.dtype is 'float16'"),
    ],
)
def test_other_sizes_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        TAEHVConfig(**changes)
