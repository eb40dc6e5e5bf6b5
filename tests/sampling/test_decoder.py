"""Either decoder, block by block, shows what it shows of the whole clip."""

import dataclasses

import jax
import numpy as np
import pytest

from causvid_jax.config import ConfigError, TAEHVConfig
from causvid_jax.models import decoder, taehv, vae
from causvid_jax.sampling import stream
from tests.refusals import refused
from tests.sampling.conftest import PLAIN, prompt

TINY = dataclasses.replace(PLAIN, decoder="taehv")


def test_a_stream_through_taehv(params):
    given = {name: params[name] for name in ("student", "taehv")}  # the VAE is not needed
    latents, clip = stream.generate(given, prompt(0), config=TINY, seed=2)
    plain, _ = stream.generate(params, prompt(0), config=PLAIN, seed=2, decode=False)
    np.testing.assert_array_equal(latents, plain)
    whole = jax.jit(taehv.decode, static_argnames="config")(params["taehv"], latents, config=TINY.taehv)
    assert clip.shape == (1, 21, 16, 16, 3) and np.asarray(clip).std() > 0.01
    np.testing.assert_allclose(clip, whole[:, -21:], atol=1e-5)


@pytest.mark.parametrize("frames", [6, 5])  # whole blocks, and not
def test_a_clip_in_pieces(params, frames):
    latents = np.random.default_rng(0).normal(size=(2, frames, 4, 4, 4)).astype(np.float32)
    for config, network in ((PLAIN, vae), (TINY, taehv)):
        pieces = list(decoder.decode_clip(params, latents, config=config))
        made = np.concatenate(pieces, axis=1)
        own = getattr(config, config.decoder)
        whole = jax.jit(network.decode, static_argnames="config")(params[config.decoder], latents, config=own)
        assert len(pieces) == (3 if frames == 6 else 5)
        np.testing.assert_allclose(made, whole[:, -made.shape[1] :], atol=1e-5)
        assert made.shape[1] == 1 + 4 * (frames - 1)


def test_decoders_that_do_not_fit():
    refused("decoder is 'tae'; accepted: 'vae', 'taehv'", dataclasses.replace, PLAIN, decoder="tae")
    with pytest.raises(ConfigError, match="taehv decodes 16 channels, 3 .*; the VAE's latents have 4, 2 and 2"):
        dataclasses.replace(PLAIN, decoder="taehv", taehv=TAEHVConfig())
