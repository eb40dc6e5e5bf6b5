"""Change the core line by line and check that a test notices: ``python tests/mutations.py [--only WORD] [--jobs 2]``.

Each mutant is a wrong line that has a plausible reason: a sign, an axis, an order, a condition. It is put into a copy of
the repository, and the tests named beside it must fail there. A survivor means that a test is missing. The program ends
with status 1 if one survives, and also if a mutant no longer applies because the code has changed: bring it up to date.
"""

import argparse
import concurrent.futures
import dataclasses
import os
import pathlib
import queue
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "causvid_jax"


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A wrong line: ``new`` instead of ``old`` (which occurs once) in ``file``; one of ``tests`` must fail."""

    file: str
    old: str
    new: str
    tests: str


FLOW, SOLVERS = "tests/diffusion/test_flow.py", "tests/diffusion/test_solvers.py"
DMD, ODE, ROLLOUT = "tests/distill/test_dmd.py", "tests/distill/test_ode_regression.py", "tests/distill/test_rollout.py"
TRANSFORMER, STREAM = "tests/models/test_transformer.py", "tests/sampling/test_stream.py"
ROLLING = "tests/sampling/test_rolling.py"
CONTEXT = f"{STREAM}::test_finished_given_and_rewritten_blocks_are_written_at_the_context_noise"
UPDATE, WIRING = "tests/training/test_dmd_update.py", "tests/training/test_wiring.py"
SETTINGS = "tests/training/test_distill_settings.py::test_score_timesteps_follow_the_exit_step"
LOAD, PIPELINE = "tests/checkpoints/test_load.py", "tests/data/test_pipeline.py"

MUTANTS = [
    # Noise schedule and guidance
    Mutant("diffusion/flow.py", "shift * u / (1 + (shift - 1) * u)", "shift * u / (1 + shift * u)", FLOW),
    Mutant("diffusion/flow.py", "return (1 - sigma) * x0 + sigma * noise", "return (1 - sigma) * noise + sigma * x0", FLOW),
    Mutant("diffusion/flow.py", "return noise - x0", "return x0 - noise", FLOW),
    Mutant("diffusion/flow.py", "return x_t - expand(sigma, x_t) * velocity", "return x_t + expand(sigma, x_t) * velocity", FLOW),
    Mutant("diffusion/flow.py", "sigma / (shift - (shift - 1) * sigma)", "sigma / (shift + (shift - 1) * sigma)", SETTINGS),
    Mutant("diffusion/flow.py", "if not config.warp:", "if config.warp:", FLOW),
    Mutant("diffusion/flow.py", "np.arange(1000, 0, -1)", "np.arange(1, 1001)", FLOW),
    Mutant("diffusion/flow.py", "1 - steps / config.num_inference_steps, config.shift", "1 - steps / config.num_inference_steps, 1.0", FLOW),
    Mutant("diffusion/guidance.py", "return unconditional + guidance_scale", "return conditional + guidance_scale", FLOW),
    Mutant("diffusion/guidance.py", "not per_frame and guidance_scale == 1.0:", "not per_frame and guidance_scale <= 1.0:", FLOW),
    Mutant("diffusion/guidance.py", "rearrange([negative, prompt_embeds]", "rearrange([prompt_embeds, negative]", FLOW),
    Mutant("diffusion/guidance.py", "return jnp.repeat(value, len(x) // len(value), axis=0)", "return jnp.concatenate([value] * (len(x) // len(value)))", FLOW),
    # Solvers
    Mutant("diffusion/solvers.py", "x = x + change * velocity_fn", "x = x - change * velocity_fn", SOLVERS),
    Mutant("diffusion/solvers.py", "order = [min(2, i + 1, steps - i)", "order = [min(2, i + 1)", SOLVERS),
    Mutant("diffusion/solvers.py", "timesteps = np.floor(timesteps)", "timesteps = np.ceil(timesteps)", SOLVERS),
    Mutant("diffusion/solvers.py", "predictor[i] += 0.0, -weight, weight", "predictor[i] += 0.0, weight, -weight", SOLVERS),
    Mutant("diffusion/solvers.py", "corrector[0, 0] = 1.0", "corrector[0, 0] = 0.0", SOLVERS),
    # DMD
    Mutant("distill/dmd.py", "gradient = (fake_x0 - real_x0) / scale", "gradient = (real_x0 - fake_x0) / scale", DMD),
    Mutant("distill/dmd.py", "jnp.abs(x0 - real_x0), axis", "jnp.abs(x0 - fake_x0), axis", DMD),
    Mutant("distill/dmd.py", "axis=tuple(range(1, x0.ndim)), keepdims", "keepdims", DMD),
    Mutant("distill/dmd.py", "loss = 0.5 * masked_mean", "loss = masked_mean", DMD),
    Mutant("distill/dmd.py", "flow.velocity_from(x, noise)), mask)", "flow.velocity_from(x, noise)), None)", DMD),
    Mutant("distill/dmd.py", "jnp.square((x0 - x) + gradient), mask)", "jnp.square((x0 - x) + gradient), None)", DMD),
    Mutant("distill/scores.py", "jnp.clip(timestep, distill.score_timestep_min, distill.score_timestep_max)", "jnp.clip(timestep, 0.0, 1000.0)", DMD),
    Mutant("distill/dmd.py", "return jnp.where(jnp.isfinite(gradient), gradient, 0.0)", "return gradient", DMD),
    Mutant("distill/dmd.py", "x = jax.lax.stop_gradient(x0)  #", "x = x0  #", DMD),
    Mutant("distill/dmd.py", "jax.lax.stop_gradient(x0.astype(jnp.float32))", "x0.astype(jnp.float32)", DMD),
    # ODE regression and trajectories
    Mutant("distill/ode_regression.py", "(timestep != 0).astype", "(timestep >= 0).astype", ODE),
    Mutant("distill/ode_regression.py", "jnp.roll(states, -1, axis=1)", "jnp.roll(states, 1, axis=1)", ODE),
    Mutant("distill/ode_regression.py", "(batch, 1), 1, len(block_sizes))", "(batch, 1), 0, len(block_sizes))", ODE),
    Mutant("distill/ode_regression.py", "jnp.asarray(block)[None, :] < first", "jnp.asarray(block)[None, :] <= first", ODE),
    Mutant("distill/ode_regression.py", "q + 1 if include_clean and context is None else q", "q + 1 if include_clean else q", ODE),
    Mutant("distill/trajectories.py", "levels[distance > 1e-9]", "levels[distance > 1e-2]", SOLVERS),
    # Rollouts
    Mutant("distill/rollout.py", "sigma), timestep > 0", "sigma), timestep >= 0", ROLLOUT),
    Mutant("distill/rollout.py", "len(timesteps) + include_clean)", "len(timesteps))", ROLLOUT),
    Mutant("distill/rollout.py", "x0_cotangent), reverse=True)", "x0_cotangent), reverse=False)", ROLLOUT),
    Mutant("distill/rollout.py", "cache = cache_undo.undo(cache, replaced, shape[1], rollout.causal)", "cache = cache", ROLLOUT),
    Mutant("distill/rollout.py", "block_key = jax.random.fold_in(key, inputs.number)", "block_key = key", ROLLOUT),
    Mutant("distill/rollout.py", "rollout.causal.context_noise, jnp.float32)", "0.0, jnp.float32)", ROLLOUT),
    Mutant("distill/rollout.py", "if rollout.causal.context_pass:", "if not rollout.causal.context_pass:", ROLLOUT),
    Mutant("distill/rollout.py", "flow.add_noise(x0, noise(step + 1)", "flow.add_noise(x0, noise(step)", ROLLOUT),
    Mutant("distill/exit_steps.py", "rows[min(block, len(rows) - 1)]", "rows[min(block, 1)]", ROLLOUT),
    Mutant("distill/exit_steps.py", "shared = jax.random.randint(key, (), 0, steps)", "shared = jax.random.randint(key, (), 0, steps - 1)", ROLLOUT),
    # Cache and rotary positions
    Mutant("models/kv_cache.py", "(index - causal.sink) % causal.window", "index % causal.window", TRANSFORMER),
    Mutant("models/kv_cache.py", "frame >= end - causal.window", "frame > end - causal.window", TRANSFORMER),
    Mutant("models/kv_cache.py", " | (frame < causal.sink)", "", TRANSFORMER),
    Mutant("models/kv_cache.py", "(frame >= 0) & (frame < end)", "(frame >= 0)", f"{TRANSFORMER} {STREAM}"),
    Mutant("models/kv_cache.py", "relative + window_start - causal.sink", "relative + window_start", TRANSFORMER),
    Mutant("models/cache_undo.py", "frame=cache.frame.at[slots].set(frame), position=position", "position=position", "tests/models/test_cache_undo.py"),
    Mutant("models/rope.py", "even * sin + odd * cos", "odd * cos - even * sin", TRANSFORMER),
    Mutant("models/rope.py", "return head_dim // 2 - 2 * side, side, side", "return side, side, head_dim // 2 - 2 * side", TRANSFORMER),
    # Transformer
    Mutant("models/transformer_layer.py", "x = precision.add(x, out, config, gate_sa)", "x = precision.add(x, out, config, gate_ffn)", TRANSFORMER),
    Mutant("models/transformer_layer.py", "shift_ffn, scale_ffn, config)", "scale_ffn, shift_ffn, config)", TRANSFORMER),
    Mutant("models/transformer.py", "jnp.full((timestep.shape[0], copies), clean_timestep,", "jnp.full((timestep.shape[0], copies), 0.0,", TRANSFORMER),
    Mutant("models/transformer.py", "positions = jnp.concatenate([jnp.arange(copies), past + positions])", "positions = jnp.arange(copies + frames)", TRANSFORMER),
    Mutant("models/attention.py", "* q.shape[-1] ** -0.5\n    )\n    if mask is not None:", "* q.shape[-1] ** -1.0\n    )\n    if mask is not None:", TRANSFORMER),
    # Stream
    Mutant("sampling/schedule.py", "write = [config.causal.context_noise]", "write = [0.0]", CONTEXT),
    Mutant("sampling/stream.py", "latents, causal.context_noise, config, rewrites)", "latents, 0.0, config, rewrites)", CONTEXT),
    Mutant("sampling/stream.py", "flow.add_noise(latents, _noise(state, step, config, noise), level)", "latents", STREAM),
    Mutant("sampling/stream.py", "_noise(state, j + 1, config, noise)", "_noise(state, j, config, noise)", STREAM),
    Mutant("sampling/stream.py", "jax.random.fold_in(jax.random.fold_in(jax.random.key(s), block), step)", "jax.random.fold_in(jax.random.key(s), step)", STREAM),
    Mutant("sampling/state.py", "each + np.arange(batch) if each.ndim == 0", "np.repeat(each, batch) if each.ndim == 0", STREAM),
    Mutant("sampling/stream.py", "frames[:, LEAD : LEAD + 1], frames)", "frames, frames)", STREAM),
    Mutant("sampling/schedule.py", "step <= 1000.0 * (strength + ROUNDING)", "step < 1000.0 * (strength - ROUNDING)", STREAM),
    Mutant("sampling/player.py", "visible[:, 0] = image", "pass", "tests/sampling/test_player.py"),
    Mutant("sampling/schedule.py", "row = jnp.minimum(block, len(first))", "row = jnp.minimum(block, 1)", STREAM),
    Mutant("sampling/rolling.py", "stages = [age + place for place", "stages = [place for place", ROLLING),
    Mutant("sampling/rolling.py", "jnp.repeat(timesteps[index], size)", "jnp.tile(timesteps[index], size)", ROLLING),
    Mutant("sampling/rolling.py", "state.block + place, step, shape", "state.block, step, shape", ROLLING),
    # Updates
    Mutant("training/guard.py", "jnp.isfinite(loss) & jnp.isfinite(gradient_norm) & finite", "jnp.isfinite(loss) & finite", WIRING),
    Mutant("training/guard.py", "(loss > config.bad_loss_factor * median)", "(loss < config.bad_loss_factor * median)", UPDATE),
    Mutant("training/guard.py", "applied &= history.skipped == 0", "applied &= True", "tests/training/test_runs.py tests/training/test_dmd_update.py"),
    Mutant("training/update.py", "step >= config.ema_start", "step > config.ema_start", WIRING),
    Mutant("training/update.py", "ema, 1.0 - decay)", "ema, decay)", WIRING),
    Mutant("training/update.py", "jax.tree.map(jnp.copy, trained) if ema", "trained if ema", WIRING),
    Mutant("training/update.py", "jax.random.fold_in(jax.random.key(config.seed), state.step)", "jax.random.key(config.seed)", WIRING),
    Mutant("training/dmd_data.py", "[0.0, config.continuation_prob], further", "[0.0, further], further", UPDATE),
    Mutant("training/dmd.py", 'previous["rollouts"], 0) + 1', 'previous["rollouts"], 0)', UPDATE),
    Mutant("training/dmd_data.py", "jnp.where(continued & ~switched,", "jnp.where(continued,", UPDATE),
    Mutant("training/dmd_data.py", ".at[:, 0].set(begins)", ".at[:, 0].set(~begins)", WIRING),
    Mutant("training/dmd.py", "noisy if config.include_clean and config.mask_clean else None", "noisy if config.include_clean else None", WIRING),
    Mutant("training/checksums.py", "if have[name] != size:", "if False:", "tests/training/test_runs.py::test_a_file_of_another_size_is_named_with_both_sizes"),
    # Weights and data
    Mutant(
        "checkpoints/wan_transformer.py",
        '("blocks.{n}.self_attn.q", "blocks.{n}.attn1.to_q"),\n    "blocks/self_attn/k": ("blocks.{n}.self_attn.k", "blocks',
        '("blocks.{n}.self_attn.k", "blocks.{n}.attn1.to_q"),\n    "blocks/self_attn/k": ("blocks.{n}.self_attn.q", "blocks',
        LOAD,
    ),
    Mutant("checkpoints/table.py", "LINEAR = Transform(lambda x: x.T, lambda x: x.T)", "LINEAR = SAME", LOAD),
    Mutant("checkpoints/store.py", "require(expected == digest.hexdigest()", "require(True", "tests/checkpoints/test_store.py tests/checkpoints/test_safetensors_io.py"),
    Mutant("checkpoints/lineage.py", "return other is None or digest == other", "return True", "tests/checkpoints/test_lineage.py"),
    Mutant("data/pipeline.py", 'arrays["latents"][: frames or total]', 'arrays["latents"][-(frames or total) :]', PIPELINE),
]  # fmt: skip


def run(root: pathlib.Path, mutant: Mutant) -> str:
    """Run the tests of a mutant in the copy ``root``; return what became of it."""
    path = root / PACKAGE / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        return "stale"
    path.write_text(text.replace(mutant.old, mutant.new))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *mutant.tests.split()]
    try:
        environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
        status = subprocess.run(command, cwd=root, env=environment, capture_output=True, timeout=900).returncode
    except subprocess.TimeoutExpired:
        status = 1
    finally:
        path.write_text(text)
    return {0: "SURVIVED", 1: "killed"}.get(status, f"tests did not run (status {status})")


def main() -> None:
    """Run all mutants, or those with a word in them, and list what became of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="only mutants with this text in file or lines")
    parser.add_argument("--start", type=int, default=1, help="number of the first mutant, to go on with a list")
    parser.add_argument("--jobs", type=int, default=1, help="copies of the repository to run tests in")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS[options.start - 1 :] if options.only in f"{m.file} {m.old} {m.new}"]
    outcomes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        copies: queue.Queue[pathlib.Path] = queue.Queue()
        for job in range(options.jobs):
            skipped = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "runs", "site", ".*_cache")
            copies.put(shutil.copytree(ROOT, pathlib.Path(folder) / str(job), ignore=skipped))

        def one(mutant: Mutant) -> None:
            root, begin = copies.get(), time.monotonic()
            outcome = run(root, mutant)
            copies.put(root)
            outcomes.append(outcome)
            seconds = time.monotonic() - begin
            print(f"{outcome:9} {seconds:5.0f} s  {mutant.file}: {mutant.new.strip()[:90]!r}", flush=True)

        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(one, chosen))
    killed = outcomes.count("killed")
    print(f"{killed} of {len(chosen)} mutants killed")
    sys.exit(killed != len(chosen))


if __name__ == "__main__":
    main()
