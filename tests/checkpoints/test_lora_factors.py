"""LoRAs at run time: equal to merged weights, strengths without compilation, the base untouched, files and back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import causvid_jax as cv
from causvid_jax.checkpoints import load, lora_factors, open_checkpoint, open_lora, state_dict
from causvid_jax.config import LoraConfig
from causvid_jax.models import adapters, transformer, vae
from causvid_jax.sampling import stream
from tests import tiny
from tests.refusals import refused
from tests.tiny import random_params

NET = dataclasses.replace(tiny.RECIPE.student, num_layers=2)
RECIPE = dataclasses.replace(tiny.RECIPE, student=NET)
RED, BLUE = "a red 3 moving left", "a blue 7 moving up"


def lora_net(rank, alpha=0.0, targets=("q", "k", "v", "o", "fc1", "fc2")):
    return dataclasses.replace(NET, lora=LoraConfig(rank, alpha, targets))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base, its VAE, and two LoRAs of other ranks, alphas and targets, in the names of peft and diffusers."""
    folder = tmp_path_factory.mktemp("lora")
    base = random_params(transformer.abstract(NET), 0, 0.3)
    codec = random_params(vae.abstract(RECIPE.vae), 1)
    for name, params, config in (("student", base, NET), ("vae", codec, RECIPE.vae)):
        safetensors.numpy.save_file(state_dict(params, config, "original"), folder / f"{name}.safetensors")
    for seed, (name, names, net) in enumerate(
        (("style", "peft", lora_net(3, 6.0)), ("motion.safetensors", "diffusers", lora_net(2, 1.0, ("q", "fc2"))))
    ):
        lora_factors.save_lora(folder / name, random_params(transformer.abstract(net), 5 + seed, 0.3), net, names)
    return folder


def pipeline(files, loras=None, updates=()):
    """Return a pipeline with ``loras`` at run time, or with ``updates`` (file, strength) merged into its weights."""
    pipe = cv.load(RECIPE, student=files / "student.safetensors", vae=files / "vae.safetensors", loras=loras)
    if updates:
        opened = [open_lora(files / name, strength, NET) for name, strength in updates]
        params = load(files / "student.safetensors", config=NET, updates=opened)[0]
        pipe = dataclasses.replace(pipe, params={**pipe.params, "student": transformer.unstack(params, NET)})
    return pipe


def blocks(pipe, state, count=1):
    return [np.asarray(latents) for latents, state in pipe.latents(state, blocks=count)]


def test_strengths_at_run_time_equal_merged_weights_without_a_new_compilation(files):
    both = {"style": files / "style", "motion": files / "motion.safetensors"}
    pipe = pipeline(files, both)
    assert {name: part.stop - part.start for name, part in pipe.loras.columns.items()} == {"style": 3, "motion": 2}
    results = {}
    for strengths in ((1.0, 1.0), (0.8, -0.5), (0.0, 0.0)):
        state = pipe.lora(pipe.stream(RED, seed=1), dict(zip(("style", "motion"), strengths, strict=True)))
        if len(results) == 1:
            sizes = stream.next_block._cache_size(), stream.set_adapters._cache_size()
        results[strengths] = blocks(pipe, state, 2)
    assert (stream.next_block._cache_size(), stream.set_adapters._cache_size()) == sizes
    for strengths, latents in results.items():
        names = ("style", "motion.safetensors")
        merged = pipeline(files, updates=list(zip(names, strengths, strict=True)))
        expected = blocks(merged, merged.stream(RED, seed=1), 2)
        np.testing.assert_allclose(latents, expected, atol=2e-6 * max(1, np.abs(expected).max()))
    assert np.abs(np.subtract(results[1.0, 1.0], results[0.0, 0.0])).max() > 1e-2


def test_strengths_change_between_blocks_and_the_prompt_follows(files):
    pipe = pipeline(files, {"style": files / "style"})
    (_, state), *_ = pipe.latents(pipe.stream(RED, seed=1))
    state = pipe.switch(pipe.lora(state, {"style": 0.25}), BLUE)
    merged = pipeline(files, updates=[("style", 0.25)])
    expected = merged.encode_prompt(BLUE)
    text = transformer.encode_text(merged.params["student"], expected, config=NET)
    np.testing.assert_allclose(state.text.k[1], text.k[1], atol=1e-6)
    np.testing.assert_array_equal(state.adapters.scale, np.float32([0.25] * 3))
    for strengths, words in (
        ({"other": 1.0}, "no LoRA is called 'other'; accepted: style"),
        ({"style": np.nan}, "nan"),
    ):
        refused(words, pipe.lora, state, strengths)
    plain = pipeline(files)
    refused("loaded without LoRAs", plain.lora, plain.stream(RED), {})


def test_a_saved_stream_has_its_strengths_in_whatever_order_loras_are_given(files, tmp_path):
    """Both have three columns in all; in another order each had the strength of the other."""
    given = {"style": files / "style", "again": files / "style"}
    one, other = (pipeline(files, dict(items)) for items in (given.items(), reversed(given.items())))
    state = one.lora(one.stream(RED), {"style": 0.5, "again": -2.0})
    cv.save_stream(tmp_path / "state", state, config=RECIPE)
    state = cv.load_stream(tmp_path / "state", other.stream(BLUE), config=RECIPE)
    columns = {name: float(state.adapters.scale[part.start]) for name, part in other.loras.columns.items()}
    assert columns == {"style": 0.5, "again": -2.0}


def test_the_base_is_neither_changed_nor_copied(files):
    base = load(files / "student.safetensors", config=NET)[0]
    factors = lora_factors.open_factors({"style": files / "style"}, NET)
    attached = lora_factors.attach(base, factors)
    own, frozen = adapters.split(attached)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, frozen, base))
    assert jax.tree.structure(adapters.join(own, frozen)) == jax.tree.structure(attached)
    grown = adapters.scaled(attached, jnp.ones(3))
    assert grown["blocks"]["ffn"]["fc1"]["kernel"] is base["blocks"]["ffn"]["fc1"]["kernel"]


def test_adapters_that_a_scan_would_not_read_are_refused(files):
    """Streams ignored adapters of stacked layers in all passes and read them in the prompt's keys and values."""
    pipe, base = pipeline(files), load(files / "student.safetensors", config=NET)[0]
    attached = lora_factors.attach(base, lora_factors.open_factors({"style": files / "style"}, NET))
    state, text = pipe.stream(RED), pipe.encode_prompt(RED)
    params = {"student": attached}
    refused("the student's layers are stacked", stream.set_adapters, params, state, jnp.ones(3), text, config=RECIPE)
    x = jnp.zeros((1, 2, 4, 4, 4))
    refused("in stacked layers", transformer.bidirectional, attached, x, jnp.zeros((1, 2)), text, config=NET)


@pytest.mark.parametrize("names", ["peft", "diffusers"])
def test_trained_adapters_come_back_from_files(names, tmp_path):
    """``merged`` against the merging reader, and both against the product in the forward pass."""
    net = lora_net(4, 2.0)
    params = jax.tree.map(jnp.asarray, random_params(transformer.abstract(net), 3, 0.3))
    path = tmp_path / ("lora" if names == "peft" else "lora.safetensors")
    lora_factors.save_lora(path, params, net, names)
    # Of another LoRA in the folder, which has no say where the file itself gives its alpha.
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 100, "r": 4}')
    opened = open_checkpoint(adapters.split(params)[1], NET)
    read = load(opened, "host", updates=[open_lora(path, 1.0, NET)])[0]
    merged = adapters.merged(params, net)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, read)
    rng = np.random.default_rng(0)
    x, text = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((1, 2, 4, 4, 4), (1, 8, NET.text_dim)))
    plain = transformer.bidirectional(merged, x, jnp.full((1, 2), 500.0), text, config=NET)
    beside = transformer.bidirectional(params, x, jnp.full((1, 2), 500.0), text, config=net)
    np.testing.assert_allclose(beside, plain, atol=1e-5 * float(jnp.abs(plain).max()))


def test_what_is_no_product_of_a_layer_can_be_merged_only(files, tmp_path):
    change = {"diffusion_model.blocks.0.ffn.0.diff_b": np.zeros(NET.ffn_dim, np.float32)}
    safetensors.numpy.save_file(change, tmp_path / "bias.safetensors")
    refused("it can be merged only", lora_factors.open_factors, {"bias": tmp_path / "bias.safetensors"}, NET)
