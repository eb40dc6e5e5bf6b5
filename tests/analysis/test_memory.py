"""The memory plan against counts by hand, for the published sizes."""

import dataclasses
import os
import pathlib

import pytest

from causvid_jax.analysis import memory
from causvid_jax.config import CLIPConfig, ConfigError
from causvid_jax.config.recipes import load_recipe
from tests.tiny import changed

WAN = load_recipe(str(pathlib.Path(__file__).parents[2] / "configs" / "wan_1_3b.py"))
# Of 1,418,996,800 parameters: what is no kernel of a rounded matmul. A layer has 6 D of modulation, 8 D of attention's
# biases, 4 D of q and k norms, 2 D of norm3 and the MLP's biases. Outside: biases of patch and text embedding, the time
# embedding and projection in whole, the head's modulation and bias.
D, FFN, LAYERS = 1536, 8960, 30
FLOAT32 = (
    LAYERS * (6 * D + 8 * D + 4 * D + 2 * D + FFN + D)
    + D
    + 2 * D
    + (256 * D + D + D * D + D)
    + (D * 6 * D + 6 * D)
    + (2 * D + 64)
)


def phase(name, **changes):
    given = {"role": "student", "batch": 1, "latents": 21, **changes}
    return {p.name: p for p in memory.sampling_phases(WAN, **given)}[name]


def test_published_text_encoder():
    items = phase("encode the prompts").items["text encoder"]
    small = (24 * (2 * 4096 + 32 * 64) + 4096) * 4  # norms and tables of distances
    assert items["float32"] == small
    assert items["bfloat16"] == 2 * (5_680_910_336 - small // 4)


def test_an_int8_text_encoder_fits_24_gb_with_the_array_being_read():
    recipe = changed(WAN, umt5={"weights": "int8"})
    found = memory.sampling_phases(recipe, "student", batch=1, latents=21)[0]
    small = 24 * (2 * 4096 + 32 * 64) + 4096
    scales = 24 * (4 * 4096 + 2 * 10240 + 4096) + 256384
    assert found.items["text encoder"] == {"int8": 5_680_910_336 - small, "float32": 4 * (small + scales)}
    assert found.items["array being read"] == {"bfloat16": 2 * 256384 * 4096}
    assert found.total < 9 * 10**9


def test_a_picture_is_read_before_the_transformer_comes():
    recipe = load_recipe(str(pathlib.Path(__file__).parents[2] / "configs" / "wan_14b.py:i2v"))
    given = {"batch": 2, "latents": 21, "prompts": 0, "image": True, "clip": CLIPConfig()}
    phases = {p.name: p for p in memory.sampling_phases(recipe, "teacher", **given)}
    assert list(phases) == ["embed the picture", "encode the picture", "denoise", "decode"]
    # ViT-H/14: the tower and its projection.
    assert phases["embed the picture"].items["image encoder"] == {"float32": 4 * 632_076_800}
    assert "VAE" in phases["encode the picture"].items
    rows, condition = 2 * 257 * 1280, 2 * 21 * 60 * 104 * 20
    assert phases["denoise"].items["picture's embeddings and latents"] == {"float32": 4 * (rows + condition)}


def test_published_student():
    items = phase("stream").items
    assert items["transformer"] == {"float32": 4 * FLOAT32, "bfloat16": 2 * (1_418_996_800 - FLOAT32)}
    # 30 layers, keys and values, 21 frames of 1560 tokens, 12 heads of 128: 5.62 GiB, as published; 90 MiB of text.
    assert items["keys and values"] == {"bfloat16": 30 * 2 * 32760 * 12 * 128 * 2}
    assert items["prompt's keys and values"] == {"bfloat16": 90 * 2**20}
    assert sum(items["VAE"].values()) == pytest.approx(2 * 126_892_531, rel=1e-3)
    # The decoder keeps two frames in front of each of 32 convolutions of three taps, at the published sizes.
    small, middle, large, full = (60 * 104 * 4**i for i in range(4))
    kept = small * (16 + 11 * 384) + middle * (192 + 6 * 384) + large * 6 * 192 + full * 7 * 96
    assert sum(items["decoder's past"].values()) == pytest.approx(2 * 2 * kept, rel=1e-6)
    window = changed(WAN, causal={"window": 12})
    seen = {p.name: p for p in memory.sampling_phases(window, "student", batch=2, latents=21)}["stream"].items
    assert seen["keys and values"] == {"bfloat16": 2 * 30 * 2 * 12 * 1560 * 12 * 128 * 2}
    # A joint pass on five blocks works on a copy of the cache of 18 + 3 frames.
    rolling = load_recipe("published:rolling_forcing")
    seen = {p.name: p for p in memory.sampling_phases(rolling, "student", batch=1, latents=21)}["stream"].items
    assert seen["copy of keys and values"] == seen["keys and values"] == items["keys and values"]


def test_phases_and_what_they_hold():
    names = [p.name for p in memory.sampling_phases(WAN, "teacher", batch=1, latents=21)]
    assert names == ["encode the prompts", "denoise", "decode"]
    assert [p.name for p in memory.sampling_phases(WAN, "student", batch=1, latents=21, prompts=0)] == ["stream"]
    assert "VAE" not in phase("denoise", role="teacher").items
    assert "transformer" not in phase("decode", role="teacher").items
    tiny = dataclasses.replace(WAN, decoder="taehv")
    held = memory.sampling_phases(tiny, "student", batch=1, latents=21, prompts=0)[0].items
    assert "TAEHV" in held and "VAE" not in held and "VAE and TAEHV" not in held
    shown = memory.sampling_phases(tiny, "student", batch=1, latents=21, prompts=0, image=True)[0].items
    assert "VAE and TAEHV" in shown


def test_in_words_and_against_a_limit():
    plan = memory.sampling_phases(WAN, "student", batch=1, latents=21)
    said = memory.describe(plan)
    for words in ("1. encode the prompts: ", "2. stream: ", "text encoder", "11.36 GB bfloat16", "6.04 GB bfloat16"):
        assert words in said
    assert "the memory of the device is not known" in said and "80.00 GB on the device" in memory.describe(
        plan, 80 * 10**9
    )
    memory.check_fits(plan, None)
    memory.check_fits(plan, 80 * 10**9)
    with pytest.raises(
        ConfigError, match=r"to encode the prompts takes about 1\d\.\d\d GB, and the device has 8.00 GB"
    ):
        memory.check_fits(plan, 8 * 10**9)
    assert memory.memory_limit() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # that of the host
    assert 2**20 < memory.peak_rss() <= memory.memory_limit()
