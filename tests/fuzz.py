"""Give damaged and random input to every parser: ``python -m tests.fuzz --seconds 60 [--only captions]``.

A target reads bytes or text of a user. Whatever they are, it returns or raises a ConfigError. Inputs are
valid ones with a few bytes changed, inserted or cut off, and text of any kind (hypothesis). ``tests/test_parsers.py``
runs a few examples of each target.
"""

import argparse
import contextlib
import csv
import functools
import io
import json
import logging
import pathlib
import tempfile
import time
import warnings
from collections.abc import Callable

import hypothesis
import numpy as np
from hypothesis import strategies as st
from PIL import Image

import causvid_jax
from causvid_jax import media
from causvid_jax.checkpoints import open_checkpoint, store
from causvid_jax.cli import options, sample
from causvid_jax.config import ConfigError, from_json, to_json
from causvid_jax.config.recipes import load_recipe
from causvid_jax.data import arrays, captions, digits
from causvid_jax.sampling import exported
from causvid_jax.sampling.request import SampleRequest
from causvid_jax.text import words
from tests.tiny import RECIPE, random_transformer

DIGITS = load_recipe("digits")
FOLDER = pathlib.Path(tempfile.mkdtemp(prefix="causvid_jax_fuzz_"))


def accepts(function: Callable[[], object]) -> bool:
    """Return whether ``function`` returns; False if it refuses; anything else that it raises goes on.

    Programs print a refusal on one line (``cli.common``), so line breaks of an echoed value are no fault here.
    """
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # Pillow warns of files that it reads nevertheless
            function()
        return True
    except ConfigError as error:
        assert len(str(error)) < 2000, error
        return False


@functools.cache
def seed(name: str) -> bytes:
    """Return a valid file of the kind ``name``."""
    path = FOLDER / f"seed.{name}"
    if name in ("mp4", "gif"):
        media.write_video(path, np.arange(3 * 16 * 16 * 3, dtype=np.uint8).reshape(3, 16, 16, 3), 16)
    elif name in ("png", "jpg", "webp", "tiff", "bmp"):
        Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(path)
    elif name == "safetensors":
        store.save_params(path, random_transformer(RECIPE.student), {"stage": "init", "config": to_json(RECIPE)})
    elif name == "program":
        entries = {f"{part}.stablehlo": b"program" for part in ("start", "next_frames", "change_prompt")}
        header = {"version": causvid_jax.__version__, "platform": "cpu", "streams": 1, "frames": 6, "jax": "0.10"}
        header["machine"] = ""
        identity = exported.identity(DIGITS)
        exported.write(path, {"format": exported.FORMAT, **header, "recipe": identity}, entries)
    elif name in ("csv", "tsv"):
        with open(path, "w", newline="") as file:
            rows = [["file", "caption", "prompt"], ["a.mp4", 'a "red", cat', "a dog"], ["b.mp4", "", "b"]]
            csv.writer(file, delimiter="," if name == "csv" else "\t").writerows(rows)
    elif name == "json":
        path.write_text(json.dumps([{"file": "a.mp4", "caption": "a cat", "prompt": "a dog"}, "b"]))
    elif name == "jsonl":
        path.write_text('{"file": "a.mp4", "caption": "a cat"}\n{"file": "b.mp4", "prompt": "b"}\n')
    elif name == "txt":
        path.write_text("a cat\na dog\n")
    else:
        raise ValueError(name)
    return path.read_bytes()


def damaged(name: str) -> st.SearchStrategy[bytes]:
    """Return a strategy of the file ``name`` with bytes changed or inserted, or its end cut off."""
    edits = st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=6), st.booleans()), max_size=5)

    def apply(changes: list[tuple[float, bytes, bool]], keep: float) -> bytes:
        data = bytearray(seed(name))
        for where, piece, insert in changes:
            at = int(where * len(data))
            data[at : at if insert else at + len(piece)] = piece
        return bytes(data[: max(1, int(keep * len(data)))])

    return st.builds(apply, edits, st.one_of(st.just(1.0), st.floats(0, 1)))


def file_target(names: tuple[str, ...], read: Callable[[pathlib.Path], object]) -> tuple[st.SearchStrategy, Callable]:
    """Return the strategy and the target of a parser of files."""

    def target(example: tuple[str, bytes]) -> bool:
        name, data = example
        path = FOLDER / f"case.{name}"
        path.write_bytes(data)
        return accepts(lambda: read(path))

    return st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), damaged(name))), target


def text_target(strategy: st.SearchStrategy, read: Callable) -> tuple[st.SearchStrategy, Callable]:
    """Return the strategy and the target of a parser of text or numbers."""
    return strategy, lambda example: accepts(lambda: read(example))


def _weights(path: pathlib.Path) -> None:
    open_checkpoint(path)
    store.load_params(path)


def _request(values: tuple[str, int, int, int, str, float]) -> None:
    switch, frames, number, upscale, output, strength = values
    request = SampleRequest(DIGITS, ("a red 3",), frames, number, output, switch=(switch,), upscale=upscale)
    request.switches(request.length)
    SampleRequest(DIGITS, ("a red 3",), video="a.mp4", strength=strength)


def _override(values: tuple[str, str]) -> None:
    load_recipe("digits", {values[0]: values[1]})


def _metadata(values: tuple[str, bytes]) -> None:
    folder = FOLDER / "dataset"
    if not folder.exists():
        example = {"x": np.zeros(1, np.float16), "caption": "a"}
        options = {"chunks": 1, "make_chunk": lambda _: [example], "identity": {}, "progress": False}
        arrays.write_dataset(folder, name="a", features=arrays.array_features(x=(1,)), **options)
        (FOLDER / "whole.json").write_bytes((folder / "features.json").read_bytes())
    name, data = values
    path = folder / name
    whole = path.read_bytes()
    try:
        path.write_bytes(data if len(data) > 3 else whole[: len(data) * len(whole) // 4])
        arrays.read_identity(folder)
        arrays.source(folder)
    finally:
        path.write_bytes(whole)


TEXT = st.text(max_size=60)
NUMBER = st.one_of(st.integers(), st.integers(-(10**30), 10**30), st.integers(-2, 100))
SWITCH = st.one_of(TEXT, st.builds("{}:{}".format, st.one_of(NUMBER, TEXT), TEXT))
FIELDS = st.sampled_from(
    ["diffusion.denoising_timesteps", "video.frames", "causal.window", "student.dim", "name", "data.mixture", "x.y"]
)
FLAGS = st.lists(st.one_of(TEXT, st.builds("--{}={}".format, st.sampled_from(["frames", "config", "seed"]), TEXT)))
PROMPT = st.lists(st.one_of(TEXT, st.sampled_from(digits.vocabulary(DIGITS.data)))).map(" ".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["video", "causal", "name"]), inner),
)
LISTS = ("txt", "json", "jsonl", "csv", "tsv")

TARGETS: dict[str, tuple[st.SearchStrategy, Callable]] = {
    "weights": file_target(("safetensors",), _weights),
    "programs": file_target(("program",), lambda path: exported.load(path, DIGITS, batch=1, latents=6)),
    "prompts": file_target(LISTS, captions.read_prompts),
    "captions": file_target(LISTS[1:], captions.read_captions),
    "pictures": file_target(("png", "jpg", "gif", "webp", "tiff", "bmp"), lambda path: media.read_image(path, 8, 8)),
    "videos": file_target(("mp4", "gif"), lambda path: media.read_video(path, 8, 8, frames=9)),
    "datasets": text_target(
        st.tuples(st.sampled_from(["features.json", "dataset_info.json", "identity.json"]), st.binary(max_size=9)),
        _metadata,
    ),
    "requests": text_target(st.tuples(SWITCH, NUMBER, NUMBER, NUMBER, TEXT, st.floats(allow_nan=True)), _request),
    "flags": text_target(FLAGS, lambda arguments: options.parse(sample.Options, arguments)),
    "overrides": text_target(st.tuples(st.one_of(FIELDS, TEXT), TEXT), _override),
    "recipes": text_target(JSON.map(json.dumps), from_json),
    "words": text_target(PROMPT, lambda prompt: words.encode_words([prompt], DIGITS.text)),
    "digits": text_target(PROMPT, digits.parse_caption),
}


def _counted(name: str, target: Callable, runs: dict[str, int]) -> Callable:
    def run(example: object) -> None:
        runs[name] += 1
        target(example)

    return run


def main() -> None:
    """Run the targets in turns for a number of seconds; an input that breaks one is shown as small as it can be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--only", default="")
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    targets = {name: target for name, target in TARGETS.items() if chosen.only in name}
    end, runs = time.monotonic() + chosen.seconds, dict.fromkeys(targets, 0)
    while time.monotonic() < end:
        for name, (strategy, target) in targets.items():
            settings = hypothesis.settings(
                max_examples=200, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
            )
            settings(hypothesis.seed(runs[name])(hypothesis.given(strategy)(_counted(name, target, runs))))()
    print(", ".join(f"{name} {number}" for name, number in runs.items()))


if __name__ == "__main__":
    main()
