"""Training in several processes over loopback gives what one process gives, and all of them stop together.

Two stages in two processes are trained every day. The rest takes minutes on two cores:
``pytest -m slow tests/distributed``.
"""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from causvid_jax.checkpoints import store
from causvid_jax.checkpoints.workdir import stage_path
from causvid_jax.config import Recipe
from causvid_jax.data import arrays, digits, prepare
from causvid_jax.models import vae
from causvid_jax.training import stages
from causvid_jax.training.metrics import read_metrics
from tests.programs import free_port, write_recipe
from tests.tiny import tiny_recipe

PROGRAM = pathlib.Path(__file__).with_name("hosts_program.py")
ROOT = PROGRAM.parents[2]
# With a small rate the networks stay almost equal, and their losses are rounding errors only.
FAST = {"optimizer": {"learning_rate": 1e-2, "warmup_steps": 1}}
STEPS = {"teacher": 8}
QUICK = ("teacher", "distill")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
SHAPE = (2, 2, 2, 4)
PREPARED = {"vae": "data", "teacher": "latents", "init": "trajectories"}
LOSSES = {"distill": ["generator_loss", "critic_loss"]}


def make_recipe(quick: bool = False, **parallel) -> Recipe:
    """Return the recipe; ``quick`` is for the stages QUICK only, without samples."""
    train = {"steps": 3, "batch_size": 4, "samples": 0 if quick else 2}
    return tiny_recipe(
        video={"frames": 5 if quick else 9},
        vae={
            # A narrower VAE is chaotic: a norm over two channels turns rounding into other losses.
            "base_dim": 8,
            # Latents of 2 x 2: the fewer terms a mean has, the less its rounding depends on the order of sums.
            "dim_mult": (1, 1, 1, 1),
            "temporal_downsample": (False, True, True),
        },
        taehv={
            "decoder_dims": (8, 8, 8, 8),
            "temporal_downsample": (True, True, False),
            "temporal_upsample": (False, True, True),
        },
        diffusion={"denoising_timesteps": (1000.0,) if quick else (1000.0, 500.0)},
        train_vae=train | {"curriculum": (), "optimizer": {"learning_rate": 2e-5}},
        train_taehv=train | {"optimizer": {"learning_rate": 1e-4}},
        train_teacher=train | FAST | {"steps": STEPS["teacher"]},
        train_causal=train | {"prompt_switch_prob": 0.0},
        train_init=train,
        train_consistency=train,
        train_distill=train | {"critic_optimizer": FAST["optimizer"], "init": "teacher" if quick else "ode"},
        parallel=parallel,
    )


@pytest.fixture(scope="module")
def road(tmp_path_factory) -> pathlib.Path:
    """A working directory in which one process trained every stage on one device."""
    workdir, recipe = tmp_path_factory.mktemp("alone"), make_recipe()
    for name in stages.TRAINERS:
        if name in PREPARED:
            prepare.STAGES[PREPARED[name]](recipe, workdir)
        stages.train(name, recipe, workdir)
    return workdir


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> pathlib.Path:
    """A working directory in which one process trained two stages, with a VAE and on latents that mean nothing."""
    folder, recipe = tmp_path_factory.mktemp("quick"), make_recipe(quick=True)
    store.save_params(stage_path(folder, "vae"), vae.init(jax.random.key(0), recipe.vae), {})
    rng = np.random.default_rng(0)
    arrays.write_dataset(
        folder / "data" / "latents",
        name="latents",
        features=arrays.array_features(latents=SHAPE),
        chunks=1,
        make_chunk=lambda index: (
            {"latents": rng.standard_normal(SHAPE).astype(np.float16), "caption": caption}
            for caption in digits.captions(recipe.data, "train")
        ),
        identity={},
        progress=False,
    )
    for name in QUICK:
        stages.train(name, recipe, folder)
    return folder


def beginning(road, folder, recipe, *link) -> None:
    """A working directory with the data of ``road`` and the stages ``link`` of it."""
    for name in ("data", *link):
        (folder / name).symlink_to(road / name)
    write_recipe(folder, recipe)


def run(count, arguments, timeout=900, before=lambda i: []):
    """Start ``count`` processes, process i with ``arguments(i, port)`` behind the words ``before(i)``; their (status,
    stdout, stderr, time of end)."""
    port = free_port()
    keep = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    environment = os.environ | {
        "XLA_FLAGS": " ".join([*keep, "--xla_force_host_platform_device_count=1"]),
        "PYTHONPATH": str(ROOT),
        "CAUSVID_JAX_CACHE": "",
    }
    command = [sys.executable, str(PROGRAM)]
    processes = [
        subprocess.Popen(
            before(i) + command + [str(argument) for argument in arguments(i, port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(count)
    ]

    def end(process):
        output = process.communicate(timeout=timeout)
        return (process.returncode, *output, time.monotonic())

    try:
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            return list(pool.map(end, processes))
    finally:
        for process in processes:
            process.kill()


def losses(workdir, stage):
    """[steps, 1 + losses]: every step of ``metrics.jsonl`` and its losses."""
    names = LOSSES.get(stage, ["loss"])
    records = [r for r in read_metrics(workdir / stage) if names[0] in r]
    return np.array([[r["step"], *(r[name] for name in names)] for r in records])


def trained(road, folder, count, names, **parallel):
    """``count`` processes train the stages ``names``, each from what ``road`` has and each in a directory of its name
    under ``folder``; what each process said, and its standard error."""
    beginning(road, folder, make_recipe(quick=names == QUICK, **parallel))
    for name in names:
        (folder / name).mkdir()
        for other in ("data", *stages.TRAINERS):
            if other != name and (road / other).exists():
                (folder / name / other).symlink_to(road / other)
    results = run(count, lambda i, port: ("stages", folder, i, count, port, ",".join(names)))
    assert [r[0] for r in results] == [0] * count, "\n".join(r[2][-3000:] for r in results)
    said = [json.loads(r[1].split("RESULT ")[1].splitlines()[0]) for r in results]
    for i, one in enumerate(said):
        assert one["count"] == count and one["first"] == (i == 0)
        assert one["same"] is None and one["shared"] is None
        assert "config.train_vae.batch_size is 4 on process 0 and 5 on process 1" in one["other"]
        others = ", ".join(map(str, range(1, count)))
        assert one["not shared"].startswith(f"process(es) {others} cannot read in ")
    return said, [r[2] for r in results]


def check_stage(road, folder, stage):
    """Check that the stage in ``folder`` has the weights of that in ``road``."""
    np.testing.assert_allclose(losses(folder, stage), losses(road, stage), rtol=1e-6, err_msg=stage)
    assert len(losses(folder, stage)) == STEPS.get(stage, 3)
    once, many = (store.flatten(store.load_params(f / stage / "weights.safetensors")[0]) for f in (road, folder))
    assert once.keys() == many.keys()
    for key in once:
        # A key's bias moves no softmax: its gradient is rounding noise, which Adam blows up.
        still = slice(None) if key.endswith("k/bias") else slice(0)
        if key.endswith("to_qkv/bias"):
            still = slice(once[key].size // 3, 2 * once[key].size // 3)
        once[key][still] = many[key][still] = 0
        np.testing.assert_allclose(many[key], once[key], rtol=1e-4, atol=2e-5, err_msg=f"{stage} {key}")


def check_all_stages(road, folder, count, **parallel):
    """``count`` processes train every stage; the answers are compared with those of one process."""
    said, errors = trained(road, folder, count, tuple(stages.TRAINERS), **parallel)
    # Each reads its share of every batch of 4; K + 1 = 3 batches at once in the distillation.
    shares = [share for name in stages.TRAINERS for share in [12 if name == "distill" else 4] * STEPS.get(name, 3)]
    for one in said:
        assert one["read"] == [share // count for share in shares]
    for stage in stages.TRAINERS:
        check_stage(road, folder / stage, stage)
        assert count > 2 or len(list((folder / stage / stage / "samples").iterdir())) == 1
        assert len(list((folder / stage / stage / "tensorboard").iterdir())) == 1
    # The progress of one process is shown, not that of all.
    assert "distill 3/3" in errors[0] and all("distill 3/3" not in error for error in errors[1:])


def test_two_processes_train_teacher_and_student_as_one_does(quick, tmp_path):
    folder = tmp_path / "together"
    folder.mkdir()
    said, _ = trained(quick, folder, 2, QUICK, data=1, fsdp=2)
    for stage in QUICK:
        check_stage(quick, folder / stage, stage)
    # The teacher is read, and once more as the student; each process reads its half of what is split, and the rest.
    whole = 2 * sum(x.nbytes for x in store.flatten(store.load_params(stage_path(quick, "teacher"))[0]).values())
    assert all(0.5 * whole <= one["weights"] < 0.6 * whole for one in said), (whole, said)


@pytest.mark.slow
def test_two_processes_train_every_stage_as_one_does(road, tmp_path):
    check_all_stages(road, tmp_path, 2, data=1, fsdp=2)


@pytest.mark.slow
def test_four_processes_train_every_stage_as_one_does(road, tmp_path):
    check_all_stages(road, tmp_path, 4, data=2, fsdp=2)


def program(folder, stage, events=None, address="127.0.0.1"):
    """Return arguments of :func:`run` for ``launch.train`` in two processes; ``events[i]`` is (what, step)."""

    def arguments(i, port):
        flags = [f"--config={folder}/recipe.py", f"--stage={stage}", f"--workdir={folder}"]
        flags += [f"--coordinator={address}:{port}", "--processes=2", f"--process={i}"]
        return ("train", *(events or {}).get(i, ("TERM", 0)), *flags)

    return arguments


def saved(folder, stage):
    """Return the steps of the complete checkpoints."""
    names = (folder / stage / "checkpoints").glob("*/checksums.1-of-2.json")
    return sorted(int(path.parent.name) for path in names)


@pytest.mark.slow
@pytest.mark.parametrize(("signal", "statuses"), [("TERM", [0, 0]), ("INT", [0, 130])])
def test_a_signal_to_one_process_stops_both_after_the_same_step(quick, tmp_path, signal, statuses):
    folder = tmp_path / "stopped"
    folder.mkdir()
    beginning(quick, folder, make_recipe(quick=True, data=2), "vae")
    results = run(2, program(folder, "teacher", {1: (signal, 2)}))
    assert [r[0] for r in results] == statuses, "\n".join(r[2][-3000:] for r in results)
    step = losses(folder, "teacher")[-1, 0]
    assert 2 <= step < STEPS["teacher"]
    assert f"teacher: stopped by SIGTERM at step {step:.0f}; the same command continues" in results[0][2]
    assert ("stopped by Ctrl-C" in results[1][2]) == (signal == "INT") and "Ctrl-C" not in results[0][2]
    assert "is gone" not in results[0][2] + results[1][2]
    assert saved(folder, "teacher")[-1] == step
    assert not (folder / "teacher" / "weights.safetensors").exists()

    # One process goes on from the checkpoint of two; so do two.
    single = tmp_path / "single"
    shutil.copytree(folder, single, symlinks=True)
    stages.train("teacher", make_recipe(quick=True), single)
    results = run(2, program(folder, "teacher"))
    assert [r[0] for r in results] == [0, 0], "\n".join(r[2][-3000:] for r in results)
    assert f"continuing from step {step:.0f}" in results[0][2]
    for finished in (single, folder):
        np.testing.assert_allclose(losses(finished, "teacher"), losses(quick, "teacher"), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_is_named_and_the_run_goes_on_from_its_last_checkpoint(quick, tmp_path, victim):
    folder = tmp_path / "killed"
    folder.mkdir()
    beginning(quick, folder, make_recipe(quick=True, data=2), "vae")
    results = run(2, program(folder, "teacher", {victim: ("KILL", 3)}))
    killed, other = results[victim], results[1 - victim]
    print(
        f"process {victim} killed; the other: status {other[0]} after {other[3] - killed[3]:.1f} s\n{other[2][-2000:]}"
    )
    assert killed[0] == -9 and other[0] != 0
    assert other[3] - killed[3] < 60
    # JAX's own word on its coordinator may be faster.
    assert "was lost: it was killed, or its host" in other[2] or (victim == 0 and "another task died" in other[2])
    assert not (folder / "teacher" / "weights.safetensors").exists()
    # That of step 2 was under way: it is whole, or it does not count.
    step = saved(folder, "teacher")
    assert step in ([], [2])
    results = run(2, program(folder, "teacher"))
    assert [r[0] for r in results] == [0, 0], "\n".join(r[2][-3000:] for r in results)
    assert ("continuing from step 2" in results[0][2]) == (step == [2])
    check_stage(quick, folder, "teacher")


@pytest.mark.slow
@pytest.mark.parametrize(("event", "said"), [("ERROR", "ZeroDivisionError: spoilt"), ("INT+INT", "stopped by Ctrl-C")])
@pytest.mark.parametrize("where", [0, 1])
def test_a_process_that_fails_alone_is_named_by_the_other(quick, tmp_path, where, event, said):
    folder = tmp_path / "failed"
    folder.mkdir()
    beginning(quick, folder, make_recipe(quick=True, data=2), "vae")
    results = run(2, program(folder, "teacher", {where: (event, 3)}))
    failed, other = results[where], results[1 - where]
    seconds = other[3] - failed[3]
    print(f"process {where} failed by {event}: status {failed[0]}, the other {other[0]} {seconds:.1f} s later")
    assert failed[0] != 0 and other[0] != 0 and abs(seconds) < 60
    assert said in failed[2]
    assert f"error: process {where} of 2 on " in other[2] and "has failed: see its own log" in other[2]
    assert saved(folder, "teacher") in ([], [2]) and not (folder / "teacher" / "weights.safetensors").exists()


@pytest.fixture
def two_hosts(tmp_path):
    """Two network namespaces joined by one cable, each with a name of its own: ``before`` of :func:`run`."""
    names = [f"causvid-{os.getpid()}-{i}" for i in range(2)]

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    with contextlib.ExitStack() as made:
        try:
            for name in names:
                ip("netns", "add", name)
                made.callback(ip, "netns", "del", name)
            ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
            for name, address in zip(names, ADDRESSES, strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
                ip("-n", name, "link", "set", "cable", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        hosts = tmp_path / "hosts"
        hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{ADDRESSES[i]} host{i}\n" for i in range(2)))
        inside = f'mount --bind {hosts} /etc/hosts && hostname "$0" && exec "$@"'
        yield lambda i: ["ip", "netns", "exec", names[i], "unshare", "--uts", "--mount", "sh", "-c", inside, f"host{i}"]


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "event"), [(1, "UNPLUG+KILL"), (0, "UNPLUG+KILL"), (1, "UNPLUG")])
def test_a_host_that_does_not_answer_is_named_and_the_run_goes_on(quick, tmp_path, two_hosts, victim, event):
    folder = tmp_path / "unplugged"
    folder.mkdir()
    beginning(quick, folder, make_recipe(quick=True, data=2), "vae")
    results = run(2, program(folder, "teacher", {victim: (event, 3)}, ADDRESSES[0]), before=two_hosts)
    lost, other = results[victim], results[1 - victim]
    print(f"process {victim}: {event}; the other: status {other[0]} after {other[3] - lost[3]:.1f} s")
    print(other[2][-2000:])
    assert lost[0] != 0 and other[0] != 0
    assert abs(other[3] - lost[3]) < 60
    said = f"process {victim} of 2 on "
    assert (said in other[2] and "was lost: it was killed, or its host" in other[2]) or (
        victim == 0 and "another task died" in other[2]
    )
    assert event != "UNPLUG" or f"process {1 - victim} of 2 on " in lost[2]
    results = run(2, program(folder, "teacher"))
    assert [r[0] for r in results] == [0, 0], "\n".join(r[2][-3000:] for r in results)
    check_stage(quick, folder, "teacher")
