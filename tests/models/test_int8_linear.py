"""Linear layers in 8 bits against NumPy's integers: the rounding, the error, the bytes, and streams with them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import causvid_jax as cv
from causvid_jax.analysis import bench, estimate, flops, memory, topology
from causvid_jax.checkpoints import lora_factors, store, workdir
from causvid_jax.config import CausalConfig, ConfigError, LoraConfig
from causvid_jax.config.recipes import load_recipe
from causvid_jax.models import int8_linear, precision, transformer
from causvid_jax.sampling import batch, state_io, stream, weights
from causvid_jax.training import stages
from tests import tiny

FULL = dataclasses.replace(tiny.RECIPE, causal=CausalConfig(frames_per_block=1, window=3, sink=1))
INT8 = dataclasses.replace(FULL, student=dataclasses.replace(FULL.student, linear="int8"))
PROMPT = "a red 3 moving left"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny.tiny_workdir(tmp_path_factory.mktemp("run"), examples=1)
    store.save_params(workdir.stage_path(folder, "distill"), tiny.random_transformer(FULL.student, 3, 0.15), {})
    return folder


def arrays(inputs=200, outputs=24, seed=0):
    """Return x ``[2, 5, inputs]``, W and b; channels and tokens differ in magnitude, and one token is zero."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 5, inputs)) * np.geomspace(1e-2, 1e2, 10).reshape(2, 5, 1)
    x[1, 2] = 0.0
    w = rng.standard_normal((inputs, outputs)) * np.geomspace(1e-3, 1e1, outputs)
    return x.astype(np.float32), w.astype(np.float32), rng.standard_normal(outputs).astype(np.float32)


def integers(x, axis):
    """Return the result of :func:`quantize` by its formula, in float64 and int64."""
    scale = np.abs(x).max(axis, keepdims=True).astype(np.float64) / 127
    return np.rint(x / np.where(scale > 0, scale, 1)).astype(np.int64), scale


def test_a_layer_is_numpys_integers_and_near_float32():
    x, w, b = arrays()
    kernel = int8_linear.round_parameter("blocks/ffn/fc1/kernel", jnp.asarray(w), config=FULL.student)
    w8, w_scale = integers(w, 0)
    assert kernel["int8"].dtype == jnp.int8 and kernel["scale"].shape == (1, 24)
    assert np.abs(np.asarray(kernel["int8"]) - w8).max() <= 1 and np.mean(kernel["int8"] == w8) > 0.999
    np.testing.assert_allclose(kernel["scale"], w_scale, rtol=1e-6)
    x8, x_scale = integers(x, -1)
    total = np.asarray(x8 @ np.asarray(kernel["int8"], np.int64))  # exact
    assert np.abs(total).max() > 2**15  # beyond what narrower sums hold
    out = np.asarray(precision.linear({"kernel": kernel, "bias": jnp.asarray(b)}, jnp.asarray(x), INT8.student))
    expected = total * x_scale * w_scale + b
    one = 127 * x_scale * w_scale  # an activation between two integers may go either way
    assert np.all(np.abs(out - expected) <= one + 1e-5 * np.abs(expected))
    assert np.mean(np.abs(out - expected) <= 1e-5 * np.abs(expected) + 1e-6) > 0.97
    np.testing.assert_array_equal(out[1, 2], b)
    # |x W - s x8 s W8| <= sum of |x| s_w / 2 + |W| s_x / 2 + s_x s_w / 4 over the inputs
    bound = np.abs(x).sum(-1, keepdims=True) * w_scale / 2 + np.abs(w).sum(0) * x_scale / 2 + 50 * x_scale * w_scale
    error = np.abs(out - (x.astype(np.float64) @ w + b))
    assert np.all(error <= bound + 1e-5 * np.abs(expected)) and np.all(error.sum((0, 1)) > 0)
    assert np.square(error).sum() < 1e-3 * np.square(x @ w).sum()


def test_a_block_sums_exactly_at_the_width_of_14b():
    x, kernel = np.full((1, 13824), 1.0, np.float32), np.full((13824, 8), 127, np.int8)
    out = int8_linear.product(jnp.asarray(x), {"int8": jnp.asarray(kernel), "scale": jnp.ones((1, 8))})
    np.testing.assert_allclose(out, 127.0 * 13824, rtol=1e-6)  # 127 * 127 * 13824 = 2.2e8 as an integer


def test_bytes_of_14b_halve_and_the_plan_and_the_estimate_know():
    recipe = load_recipe("wan_14b")
    net = dataclasses.replace(recipe.student, linear="int8")
    eight = dataclasses.replace(recipe, student=net)
    kernels = net.num_layers * (8 * net.dim**2 + 2 * net.dim * net.ffn_dim)
    scales = net.num_layers * (9 * net.dim + net.ffn_dim)
    before, after = (memory.sizes(transformer.inference(n, unstacked=True)) for n in (recipe.student, net))
    assert after["int8"] == kernels == (before["bfloat16"] - after["bfloat16"]) // 2
    assert after["float32"] == before["float32"] + 4 * scales
    assert sum(after.values()) < 0.52 * sum(before.values())
    phases = {p.name: p for p in memory.sampling_phases(eight, "student", batch=1, latents=21, prompts=0)}
    largest = net.num_layers * net.dim * net.ffn_dim
    assert phases["read the weights"].items == {"transformer": after, "array being read": {"bfloat16": 2 * largest}}
    assert phases["read the weights"].total < 21e9 and phases["stream"].items["transformer"] == after
    machine = topology.parse("h100:1")
    whole, half = (estimate.estimate(r, "stream", machine) for r in (recipe, eight))
    assert whole.parts["parameters"] - half.parts["parameters"] == kernels - 4 * scales
    assert half.work == whole.work
    tokens = 5 * 3 * 1560 * net.num_layers  # four steps and the cache write
    saved = tokens * (12 * net.dim**2 + 4 * net.dim * net.ffn_dim) / 2
    assert saved == 2.5 * flops.linear_layers(net, 3 * 1560)
    rate = machine.chip.flops * estimate.EFFICIENCY[0]
    assert (whole.seconds[0] - half.seconds[0]) * rate == pytest.approx(saved, rel=1e-6)


def test_a_stream_through_the_pipeline(folder, tmp_path):
    """Loaded weights are int8; a stream is near float32's, and saved, batched or stacked it has the same bits."""
    pipes = {kind: cv.load(recipe, checkpoint=folder) for kind, recipe in (("full", FULL), ("int8", INT8))}
    held, shapes = pipes["int8"].params["student"], transformer.inference(INT8.student, unstacked=True)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), held) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    shown = {}
    for kind, pipe in pipes.items():
        state, latents = pipe.stream(PROMPT, seed=1), []
        for block, (x, state) in enumerate(pipe.latents(state, blocks=5)):  # noqa: B020
            if kind == "int8" and block == 3:
                state_io.save_stream(tmp_path / "state.safetensors", state, config=pipe.config)
            latents.append(np.asarray(x))
        shown[kind] = np.stack(latents)
    error = np.sqrt(np.square(shown["int8"] - shown["full"]).mean()) / shown["full"].std()
    assert 1e-4 < error < 0.05
    pipe = pipes["int8"]
    fresh = pipe.stream("a blue 7 moving up", seed=4)
    state = state_io.load_stream(tmp_path / "state.safetensors", fresh, config=pipe.config)
    (resumed, _), *_ = pipe.latents(state, blocks=1)
    np.testing.assert_array_equal(resumed, shown["int8"][4])
    frames = np.concatenate([x for x, _ in pipe.frames(pipe.stream(PROMPT, seed=1), blocks=3)], 1)
    params = {name: store.load_params(workdir.stage_path(folder, name))[0] for name in ("distill", "vae", "teacher")}
    params = {"student": params["distill"], "vae": params["vae"], "teacher": params["teacher"]}
    both = dataclasses.replace(pipe.config, teacher=INT8.student)
    samplers = batch.make_samplers(jax.tree.map(jnp.asarray, params), both)
    np.testing.assert_array_equal(samplers.student([PROMPT], 1, frames=frames.shape[1]), frames)
    teacher = cv.load_teacher(both, checkpoint=folder)
    (clip, _), *_ = teacher.frames(teacher.stream(PROMPT, seed=2))
    np.testing.assert_array_equal(samplers.teacher([PROMPT], 2)[:, : clip.shape[1]], clip)
    full, eight = (weights.find(recipe, "student", folder)[0] for recipe in (FULL, INT8))
    assert weights.checksum(full, FULL) != weights.checksum(eight, INT8)


def test_a_lora_at_run_time_is_added_in_full_beside_rounded_kernels(folder, tmp_path):
    net = dataclasses.replace(FULL.student, lora=LoraConfig(2, 4.0))
    lora_factors.save_lora(tmp_path / "style", tiny.random_params(transformer.abstract(net), 5, 0.3), net)
    shown = {}
    for name, recipe, strength in (("full", FULL, 1.0), ("int8", INT8, 1.0), ("off", INT8, 0.0), ("plain", INT8, None)):
        pipe = cv.load(recipe, checkpoint=folder, loras=None if strength is None else {"style": tmp_path / "style"})
        state = pipe.stream(PROMPT, seed=1)
        state = state if strength is None else pipe.lora(state, {"style": strength})
        shown[name] = np.stack([np.asarray(x) for x, _ in pipe.latents(state, blocks=1)])
    np.testing.assert_array_equal(shown["off"], shown["plain"])

    def error(a, b):
        return np.sqrt(np.square(shown[a] - shown[b]).mean()) / shown[b].std()

    assert 1e-4 < error("int8", "full") < 0.05 < error("off", "full")


def test_random_weights_of_the_benchmark_have_the_variance_of_others():
    student = bench.random_weights(transformer.inference(dataclasses.replace(INT8.student, dim=64, ffn_dim=256)))
    kernel = student["blocks"]["ffn"]["fc1"]["kernel"]
    assert np.std(kernel["int8"] * kernel["scale"]) == pytest.approx(0.02, rel=0.02)
    assert bench.settings(INT8, bench.Options())["precision"] == "float32, linear layers in int8"


def test_refusals(folder, tmp_path):
    for role in ("teacher", "student"):
        net = dataclasses.replace(getattr(tiny.RECIPE, role), linear="int8")
        with pytest.raises(ConfigError, match=f"{role}.linear is 'int8', which has no gradient and is for sampling"):
            stages.train("teacher", dataclasses.replace(tiny.RECIPE, **{role: net}), tmp_path)
    kernel = {"int8": jnp.ones((4, 2), jnp.int8), "scale": jnp.ones((1, 2))}
    with pytest.raises(ConfigError, match="transformer.linear is 'int8', which has no gradient"):
        jax.grad(lambda x: int8_linear.product(x, kernel).sum())(jnp.ones((1, 4)))
    pipe = dataclasses.replace(cv.load(FULL, checkpoint=folder), config=INT8)
    with pytest.raises(ConfigError, match="transformer.linear is 'int8', but these weights are for 'dtype'"):
        stream.init_stream(pipe.params, pipe.encode_prompt([PROMPT]), config=INT8)
    with pytest.raises(ConfigError, match="transformer.linear is 'int4'; accepted: 'dtype', 'int8'"):
        dataclasses.replace(FULL.student, linear="int4")
