"""Training in several processes over loopback gives what one process gives, and all of them stop together.

The case of four processes takes minutes on two cores and is left out by default: ``pytest -m slow tests/parallel``.
"""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from causvid_jax.config import DataConfig, Recipe, from_config_dict, to_json
from causvid_jax.data import digits
from causvid_jax.training import loop, stages
from causvid_jax.training.metrics import read_metrics
from causvid_jax.weights import store
from launch import prepare

PROGRAM = pathlib.Path(__file__).with_name("hosts_program.py")
ROOT = PROGRAM.parents[2]
WORDS = digits.vocabulary(DataConfig())
NET = {
    "dim": 16,
    "ffn_dim": 16,
    "num_heads": 2,
    "num_layers": 1,
    "in_channels": 4,
    "out_channels": 4,
    "text_length": 8,
    "text_dim": len(WORDS) + 8,
    "freq_dim": 8,
}
TRAIN = {
    "steps": 3,
    "batch_size": 4,
    "log_every": 1,
    "sample_every": 100,
    "samples": 2,
    "save_every": 2,
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1, "ema_decay": 0.9},
}
STEPS = {"teacher": 8}
PREPARED = {"vae": "data", "teacher": "latents", "init": "trajectories"}
LOSSES = {"distill": ["generator_loss", "critic_loss"]}


def make_recipe(**parallel) -> Recipe:
    return from_config_dict(
        {
            "name": "tiny",
            "video": {"height": 16, "width": 16, "frames": 9},
            "data": {"train_clips": 6, "test_clips": 2, "digit_size": 8},
            "text": {"kind": "words", "vocabulary": WORDS, "length": 8, "dim": len(WORDS) + 8},
            "vae": {
                "base_dim": 2,
                "dim_mult": (1, 1, 1),
                "temporal_downsample": (True, True),
                "num_res_blocks": 1,
                "z_dim": 4,
            },
            "teacher": NET,
            "student": NET,
            "causal": {"frames_per_block": 1, "window": 2},
            "diffusion": {"shift": 3.0, "teacher_steps": 2, "student_steps": (1000.0, 500.0)},
            "train_vae": TRAIN | {"frames": 9},
            "train_teacher": TRAIN | {"steps": STEPS["teacher"]},
            "train_causal": TRAIN,
            "train_init": TRAIN | {"trajectories": 4},
            "train_distill": TRAIN | {"critic_updates": 2},
            "parallel": parallel,
        }
    )


@pytest.fixture(scope="module")
def road(tmp_path_factory) -> pathlib.Path:
    """A working directory in which one process trained every stage on one device."""
    workdir, recipe = tmp_path_factory.mktemp("alone"), make_recipe()
    for name in stages.STAGES:
        if name in PREPARED:
            prepare.STAGES[PREPARED[name]](recipe, workdir, 0)
        loop.train(stages.make_stage(name, recipe, workdir), workdir)
    return workdir


def beginning(road, folder, recipe, *link) -> None:
    """A working directory with the data of ``road`` and the stages ``link`` of it."""
    for name in ("data", *link):
        (folder / name).symlink_to(road / name)
    (folder / "recipe.json").write_text(to_json(recipe))
    (folder / "recipe.py").write_text(
        "import json, pathlib, ml_collections\n"
        "def get_config():\n"
        "    text = pathlib.Path(__file__).with_name('recipe.json').read_text()\n"
        "    return ml_collections.ConfigDict(json.loads(text))\n"
    )


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run(count, arguments, timeout=900):
    """Start ``count`` processes, process i with ``arguments(i, port)``; their (status, stdout, stderr)."""
    port = free_port()
    keep = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    environment = os.environ | {
        "XLA_FLAGS": " ".join([*keep, "--xla_force_host_platform_device_count=1"]),
        "PYTHONPATH": str(ROOT),
        "CAUSVID_JAX_CACHE": "",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), *map(str, arguments(i, port))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def losses(workdir, stage):
    """[steps, 1 + losses]: every step of ``metrics.jsonl`` and its losses."""
    names = LOSSES.get(stage, ["loss"])
    records = [r for r in read_metrics(workdir / stage) if names[0] in r]
    return np.array([[r["step"], *(r[name] for name in names)] for r in records])


def check_all_stages(road, folder, count, **parallel):
    """``count`` processes train every stage; the answers are compared with those of one process."""
    beginning(road, folder, make_recipe(**parallel))
    results = run(count, lambda i, port: ("stages", folder, i, count, port))
    assert [r[0] for r in results] == [0] * count, "\n".join(r[2][-3000:] for r in results)
    said = [json.loads(r[1].split("RESULT ")[1].splitlines()[0]) for r in results]
    for i, one in enumerate(said):
        assert one["count"] == count and one["first"] == (i == 0)
        assert one["same"] is None and one["shared"] is None
        assert "config.train_vae.batch_size is 4 on process 0 and 5 on process 1" in one["other"]
        others = ", ".join(map(str, range(1, count)))
        assert one["not shared"].startswith(f"process(es) {others} do not see in ")
        # Each reads its share of every batch of 4; K + 1 = 3 batches at once in the distillation.
        shares = [4] * (3 + STEPS["teacher"] + 3 + 3) + [12] * 3
        assert one["read"] == [share // count for share in shares]
    for stage in stages.STAGES:
        np.testing.assert_allclose(losses(folder, stage), losses(road, stage), rtol=1e-6, err_msg=stage)
        assert len(losses(folder, stage)) == STEPS.get(stage, 3)
        once, many = (store.flatten(store.load_params(f / stage / "weights.safetensors")[0]) for f in (road, folder))
        assert once.keys() == many.keys()
        for key in once:
            # A key's bias moves no softmax: its gradient is rounding noise, which Adam blows up.
            if not key.endswith("k/bias"):
                np.testing.assert_allclose(many[key], once[key], rtol=1e-4, atol=2e-5, err_msg=f"{stage} {key}")
        assert len(list((folder / stage / "samples").iterdir())) == 1
        assert len(list((folder / stage / "tensorboard").iterdir())) == 1
    # The progress of one process is shown, not that of all.
    assert "distill 3/3" in results[0][2] and all("distill 3/3" not in r[2] for r in results[1:])


@pytest.mark.slow
def test_two_processes_train_every_stage_as_one_does(road, tmp_path):
    check_all_stages(road, tmp_path, 2, data=1, fsdp=2)


@pytest.mark.slow
def test_four_processes_train_every_stage_as_one_does(road, tmp_path):
    check_all_stages(road, tmp_path, 4, data=2, fsdp=2)


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_after_the_same_step(road, tmp_path):
    folder = tmp_path / "stopped"
    folder.mkdir()
    beginning(road, folder, make_recipe(data=2), "vae")

    def program(signal_at):
        def arguments(i, port):
            flags = [f"--config={folder}/recipe.py", "--stage=teacher", f"--workdir={folder}"]
            flags += [f"--coordinator=127.0.0.1:{port}", "--processes=2", f"--process={i}"]
            return ("train", signal_at[i], *flags)

        return arguments

    results = run(2, program((0, 2)))
    assert [r[0] for r in results] == [0, 0], "\n".join(r[2][-3000:] for r in results)
    step = losses(folder, "teacher")[-1, 0]
    assert 2 <= step < STEPS["teacher"]
    assert f"teacher: stopped by SIGTERM at step {step:.0f}; the same command goes on" in results[0][2]
    assert "Ctrl-C" not in results[0][2] + results[1][2]
    saved = [p.name for p in (folder / "teacher" / "checkpoints").iterdir() if p.name.isdigit()]
    assert max(map(int, saved)) == step
    assert not (folder / "teacher" / "weights.safetensors").exists()

    # One process goes on from the checkpoint of two; so do two.
    single = tmp_path / "single"
    shutil.copytree(folder, single, symlinks=True)
    loop.train(stages.make_stage("teacher", make_recipe(), single), single)
    results = run(2, program((0, 0)))
    assert [r[0] for r in results] == [0, 0], "\n".join(r[2][-3000:] for r in results)
    assert f"going on from step {step:.0f}" in results[0][2]
    for finished in (single, folder):
        np.testing.assert_allclose(losses(finished, "teacher"), losses(road, "teacher"), rtol=1e-6)
