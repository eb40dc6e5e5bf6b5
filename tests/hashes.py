"""Hash what the programs make of the tiny recipe: weights of every stage, a stream, a teacher's clip.

A change of the code that must not change a number is checked on one machine by::

    python tests/hashes.py before.json      # on the old state
    python tests/hashes.py after.json --compare before.json

Hashes differ between processors and JAX versions, so none are committed. Only the programs are run, so the layout of
the package does not matter.
"""

import argparse
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import av
import numpy as np
from safetensors.numpy import load_file

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = pathlib.Path(__file__).with_name("tiny_config.py")
STAGES = (
    "prepare data",
    "train vae",
    "prepare latents",
    "train taehv",
    "train teacher",
    "train causal",
    "prepare trajectories",
    "train init",
    "train distill",
)
VARIANTS = {
    "continued": ["--config.train_distill.continuation_prob=0.8", "--config.train_distill.prompt_switch_prob=0.5"],
    "data": ["--config.train_distill.rollout=data"],
    "accumulated": ["--config.train_distill.accumulate=2"],
}
"""Further distillations, each after the one of the recipe."""
SAMPLES = {
    "stream": ["--frames=41", "--prompt=a red 3 moving left", "--switch=20:a blue 7 moving up"],
    "clip": ["--teacher", "--prompt=a red 3 moving left"],
}


FIELDS: list[str] = []
"""``--config.FIELD=VALUE`` flags of every program."""


def run(program: str, *arguments: str) -> None:
    """Run ``python -m launch.PROGRAM`` on the tiny recipe."""
    command = [sys.executable, "-m", f"launch.{program}", f"--config={CONFIG}", *FIELDS, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")


def tensors(path: pathlib.Path) -> str:
    """Return the hash of all tensors of a safetensors file, in the order of their names, without metadata."""
    digest = hashlib.sha256()
    for name, value in sorted(load_file(path).items()):
        digest.update(f"{name} {value.dtype} {value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def frames(path: pathlib.Path) -> str:
    """Return the hash of all decoded frames of a video."""
    digest = hashlib.sha256()
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            digest.update(frame.to_ndarray(format="rgb24").tobytes())
    return digest.hexdigest()


def hashes(folder: pathlib.Path) -> dict[str, str]:
    """Run every stage and sampler in ``folder`` and return their hashes."""
    result = {}
    for stage in STAGES:
        program, name = stage.split()
        run(program, f"--stage={name}", f"--workdir={folder}")
        if program == "train":
            result[name] = tensors(folder / name / "weights.safetensors")
    for name, flags in SAMPLES.items():
        run("sample", f"--checkpoint={folder}", f"--output={folder / name}.mp4", *flags)
        result[name] = frames(folder / f"{name}.mp4")
    for name, flags in VARIANTS.items():
        (folder / "distill").rename(folder / f"distill_before_{name}")
        run("train", "--stage=distill", f"--workdir={folder}", *flags)
        result[f"distill {name}"] = tensors(folder / "distill" / "weights.safetensors")
    return result


def main() -> None:
    """Write the hashes; with ``--compare`` name those that differ and end with status 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--compare", type=pathlib.Path)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the recipe")
    arguments = parser.parse_args()
    FIELDS.extend(f"--config.{field}" for field in arguments.set)
    with tempfile.TemporaryDirectory() as folder:
        result = hashes(pathlib.Path(folder))
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.compare:
        before = json.loads(arguments.compare.read_text())
        different = [name for name in before | result if before.get(name) != result.get(name)]
        sys.exit(f"different: {', '.join(different)}" if different else 0)


if __name__ == "__main__":
    main()
