"""Every program that writes is killed with -9 at random moments: nothing half is called whole, and it ends as it would.

``CAUSVID_JAX_KILLS`` is the number of kills of each program.
"""

import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from causvid_jax import media
from causvid_jax.checkpoints import safetensors_io, store
from causvid_jax.data import arrays
from causvid_jax.sampling import exported
from tests.programs import write_recipe
from tests.tiny import RECIPE, save_classifier, tiny_workdir

KILLS = int(os.environ.get("CAUSVID_JAX_KILLS", "10"))
ROOT = pathlib.Path(__file__).resolve().parents[1]
PROGRAMS = {
    "sample": ["--prompt=a red 3 moving left", "--frames=200", "--checkpoint={run}", "--output={run}/out.mp4"],
    "sample gif": ["--prompt=a red 3", "--frames=60", "--checkpoint={run}", "--output={run}/out.gif"],
    "prepare data": ["--stage=data", "--workdir={run}"],
    "prepare latents": ["--stage=latents", "--workdir={run}"],
    "prepare trajectories": ["--stage=trajectories", "--workdir={run}"],
    "prepare prompts": ["--stage=prompts", "--prompts={run}/prompts.txt", "--workdir={run}"],
    "train": ["--stage=teacher", "--workdir={run}"],
    "convert": [
        "--input={run}/distill/weights.safetensors",
        "--output={run}/x.safetensors",
        "--to=original",
        "--num_heads=2",
    ],
    "convert folder": [
        "--input={run}",
        "--output={run}/converted",
        "--to=diffusers",
        "--component=transformer,vae",
        "--num_heads=2",
    ],
    "compile": ["--stage=stream", "--platform=cpu", "--output={run}/x.program", "--checkpoint={run}"],
    "compile report": ["--stage=teacher", "--estimate", "--topology=h100:1", "--output={run}/report.json"],
    "export": ["--stage=teacher", "--workdir={trained}", "--output={run}/exported.safetensors"],
    "curves": ["--workdir={trained}", "--output={run}/curves.png"],
    "prepare videos": [
        "--stage=videos",
        "--videos={trained}/videos",
        "--captions={trained}/videos/captions.json",
        "--shard_videos=1",
        "--workdir={run}",
    ],
    "evaluate": [
        "--workdir={run}",
        "--classifier={run}/classifier.safetensors",
        "--output={run}/report.json",
        *("--samples=2", "--reference=4", "--batch=2", "--long_factor=2", "--repeats=1"),
        # Motion is read in at least 5 frames.
        *("--config.causal.frames_per_block=2", "--config.causal.independent_first_frame=true"),
    ],
    "demo": ["--workdir={run}", "--output={run}/demo", "--seconds=3", "--upscale=1"],
    "bench": ["--output={run}/bench.json", "--repeats=2"],
    "road": ["--workdir={run}"],
    "experiment": [
        "--name={trained}/rows.py",
        "--base={trained}",
        "--workdir={run}/rows",
        "--output={run}/rows.json",
        *("--seeds=1", "--samples=2"),
    ],
    "vbench": [
        "--stage=sample",
        "--info={trained}/info.json",
        "--checkpoint={run}",
        "--output={run}/clips",
        *("--samples=4", "--frames=40"),
    ],
    "vbench drift": ["--stage=drift", "--videos={trained}/videos/0.mp4", "--output={run}/drift"],
    "recording": ["{run}", "{run}/recordings"],
}
REMOVED = {
    "prepare latents": "data/latents",
    "prepare trajectories": "data/trajectories",
    "prepare prompts": "data/prompts",
    "prepare videos": "data/latents",
    "road": "distill",
}
"""What tiny_workdir has and the program makes."""
WITHOUT_CONFIG = ("convert", "export", "curves", "recording")
TIMES = ("seconds_per_clip", "targets", "seconds", "machine", "code")
"""Keys of reports that differ from run to run, or if a commit comes in between."""
ROWS = """
from causvid_jax.training.experiment import Experiment, Row
def get_experiment():
    return Experiment("Two rows", "A claim.", (Row("as it is"), Row("again", stages=("distill",))))
"""


@pytest.fixture(scope="module")
def server():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CAUSVID_JAX_CACHE": ""}
    command = [sys.executable, str(ROOT / "tests" / "fork_server.py")]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    yield process
    process.stdin.close()
    process.wait(timeout=60)
    process.stdout.close()


@pytest.fixture(scope="module")
def start(server, tmp_path_factory):
    """Return ``start(name, folder, kill_after)``, which runs a program and returns status, seconds and what it said."""
    folder = tmp_path_factory.mktemp("recipe")
    config = write_recipe(folder, RECIPE)
    trained = tiny_workdir(folder / "trained")
    save_classifier(trained)
    (trained / "rows.py").write_text(ROWS)
    info = [{"prompt_en": f"a red {digit}", "dimension": ["color"]} for digit in range(3)]
    (trained / "info.json").write_text(json.dumps(info))
    rng = np.random.default_rng(0)
    for i in range(6):
        frames = rng.integers(0, 255, (40, 16, 16, 3), np.uint8)
        media.write_video(trained / "videos" / f"{i}.mp4", frames, RECIPE.video.fps)
    captions = [{"file": f"{i}.mp4", "caption": f"a red {i}"} for i in range(6)]
    (trained / "videos" / "captions.json").write_text(json.dumps(captions))

    def run(name, run_folder, seconds=None):
        program = name.split()[0]
        arguments = [a.format(run=run_folder, trained=trained) for a in PROGRAMS[name]]
        arguments += [] if program in WITHOUT_CONFIG else [f"--config={config}"]
        log = run_folder.with_suffix(".log")
        log.unlink(missing_ok=True)
        server.stdin.write(json.dumps([program, arguments, seconds, str(log)]) + "\n")
        server.stdin.flush()
        status, duration = json.loads(server.stdout.readline())
        return status, duration, log.read_text() if log.is_file() else ""

    status, _, said = run("train", trained)
    assert status == 0, said
    return run


def visible(folder):
    """Return the files whose path has no hidden part and no name of an unfinished one."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") or "tmp" in part for part in parts):
            yield path


def check_whole(folder):
    """Read every file that has its final name."""
    for path in visible(folder):
        if path.suffix == ".safetensors" and path.name != "x.safetensors" and "converted" not in path.parts:
            store.verify(path)
        elif path.suffix in (".mp4", ".gif"):
            assert len(media.read_video(path, 16, 16)) >= 1
        elif path.suffix == ".json" and "checkpoints" not in path.parts:
            json.loads(path.read_text())
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".program":
            exported.load(path, RECIPE, batch=1, latents=3)
        elif path.name == "FINISHED":
            assert arrays.is_complete(path.parent) and len(arrays.source(path.parent)) > 0


def content(folder):
    """Return what does not depend on time, of every file that is not a checkpoint of a run."""
    result = {}
    for path in visible(folder):
        name = path.relative_to(folder).as_posix()
        if "checkpoints/" in name or path.suffix == ".jsonl" or "events.out" in name or path.name == "run.lock":
            continue
        if path.suffix == ".safetensors":
            for key, tensor in safetensors_io.open_safetensors(path)[0].items():
                with tensor.view() as array:
                    result[f"{name} {key}"] = array.tobytes()
        elif path.suffix == ".program":
            # XLA does not give the same bytes twice; the other entries are its executables and their checksums.
            with zipfile.ZipFile(path) as archive:
                programs = [part for part in archive.infolist() if part.filename.endswith(".stablehlo")]
                result |= {f"{name} {part.filename}": part.CRC for part in programs}
        elif path.suffix == ".mp4":
            video = media.read_video(path, 16, 16).tobytes()
            if path.parent.name == "recordings":  # it has a random name; those of killed servers are shorter
                name, video = "recording", max(result.get("recording", b""), video, key=len)
            result[name] = video
        elif path.suffix == ".md" or path.name == "bench.json":
            result[name] = b"times"
        elif path.name in ("report.json", "road.json", "rows.json"):
            report = json.loads(path.read_text())
            result[name] = json.dumps({key: value for key, value in report.items() if key not in TIMES})
        else:
            result[name] = path.read_bytes()
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_killed_at_random_moments_it_ends_as_if_it_never_was(start, tmp_path, name):
    def prepared(folder):
        tiny_workdir(folder)
        (folder / "prompts.txt").write_text("a red 3 moving left\na blue 7 moving up\n")
        save_classifier(folder)
        if name == "road":  # what the report writes, evaluate does too
            (folder / "report.json").write_text("{}")
        if name in REMOVED:
            shutil.rmtree(folder / REMOVED[name], ignore_errors=True)
        if name == "prepare latents":
            status, _, said = start("prepare data", folder)
            assert status == 0, said
        return folder

    status, _, said = start(name, prepared(tmp_path / "warm"))  # compiles
    assert status == 0, said
    status, seconds, said = start(name, prepared(tmp_path / "whole"))
    assert status == 0, said
    rng, killed = random.Random(name), prepared(tmp_path / "killed")
    done = 0
    for _ in range(KILLS):
        status, _, said = start(name, killed, rng.uniform(0, seconds))
        assert "Traceback" not in said, said
        check_whole(killed)
        if status == 0:  # it was faster this time
            shutil.rmtree(killed)
            prepared(killed)
        done += status == -9
    status, _, said = start(name, killed)
    assert status == 0, said
    check_whole(killed)
    expected, got = content(tmp_path / "whole"), content(killed)
    assert got.keys() == expected.keys()
    different = [key for key in expected if got[key] != expected[key] and "log" not in key]
    assert not different
    left = [path.name for path in killed.rglob("*") if path.name.endswith((".tmp", ".partial", ".lock"))]
    assert set(left) <= {"run.lock"}  # of a training
    assert done >= KILLS // 3
    print(f"{name}: {done} kills within {seconds:.1f} s")
