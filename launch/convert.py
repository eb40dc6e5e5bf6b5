"""Published weights in and out: ``python -m launch.convert --input=Wan2.1-T2V-1.3B --output=runs/wan``.

Reads original Wan folders, diffusers folders, the checkpoints of CausVid, Self-Forcing, Causal-Forcing, LongLive and
Krea, and our own files; writes our own (default), or with ``--to`` the original or diffusers' names.
``--lora=FILE:0.8`` merges a LoRA. ``--dry_run`` only says what would be done. A folder with several components becomes
a folder of them: for our own format a working directory that ``launch.sample`` and ``launch.train`` read.
"""

import functools
import pathlib
from collections.abc import Mapping, Sequence

from absl import flags

from causvid_jax.config import ConfigError, require
from causvid_jax.weights import convert, files, layouts, lora, pickles, sources
from launch import common

_INPUT = flags.DEFINE_string("input", None, "The checkpoint: a file or a folder.")
_OUTPUT = flags.DEFINE_string("output", None, "A .safetensors file, or a folder that does not exist yet.")
_TO = flags.DEFINE_string("to", "causvid_jax", "Names to write: causvid_jax, original or diffusers.")
_PART = flags.DEFINE_string("part", None, "Of a checkpoint with several, for example generator_ema (preferred).")
_COMPONENT = flags.DEFINE_string("component", None, "Of a folder with several, only this: transformer or vae.")
_STAGE = flags.DEFINE_string("stage", None, "The transformer's place in a working directory: teacher, init or distill.")
_LORA = flags.DEFINE_multi_string("lora", [], "FILE or FILE:STRENGTH, a LoRA to merge; several are added.")
_LORA_LAYERS = flags.DEFINE_string("lora_layers", None, "Only these layers change, for example 0-9,20.")
_DTYPE = flags.DEFINE_string("dtype", None, "float32, float16 or bfloat16; default: as stored.")
_HEADS = flags.DEFINE_integer("num_heads", 0, "Of a transformer whose heads are not 128 wide.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check and say what would be done, write nothing.")

STAGES = ("teacher", "init", "distill")


def parse_lora(value: str) -> tuple[pathlib.Path, float]:
    """``FILE`` or ``FILE:STRENGTH`` as (file, strength)."""
    path, colon, number = value.rpartition(":")
    try:
        file, strength = (path, float(number)) if colon else (value, 1.0)
    except ValueError:
        file, strength = value, 1.0
    require(pathlib.Path(file).exists(), f"--lora {value!r}: {file} does not exist; accepted: FILE or FILE:STRENGTH")
    return pathlib.Path(file), strength


def parse_layers(value: str | None) -> frozenset[int] | None:
    """``0-9,20`` as a set of layers; None stays None."""
    if value is None:
        return None
    layers: set[int] = set()
    for part in value.split(","):
        first, dash, last = part.strip().partition("-")
        require(
            first.isdigit() and (last.isdigit() or not dash),
            f"--lora_layers is {value!r}; accepted: numbers and ranges, as 0-9,20",
        )
        layers |= set(range(int(first), int(last or first) + 1))
    return frozenset(layers)


def choose(path: str, component: str | None) -> dict[str, pathlib.Path]:
    """The components to convert, {"": path} for a checkpoint of one."""
    found = sources.components(path)
    known = [network.component for network in layouts.NETWORKS]
    require(component is None or component in known, f"--component is {component!r}; accepted: {', '.join(known)}")
    if not found:
        return {"": pathlib.Path(path)}
    chosen = {name: place for name, place in found.items() if component in (None, name) and name in known}
    require(
        chosen, f"{path} holds {', '.join(found)}, and no {component or ' or '.join(known)} that could be converted"
    )
    for name in found.keys() - chosen.keys():
        print(f"Left out: {name} ({found[name]}).")
    return chosen


def places(plans: Mapping[str, convert.Plan], output: str, naming: str, stage: str | None) -> dict[str, convert.Plan]:
    """Each plan's place under ``output``, as :func:`causvid_jax.weights.convert.run` takes them."""
    suffix = pathlib.Path(output).suffix
    require(
        suffix not in pickles.SUFFIXES, f"--output is {output!r}, a pickle; accepted: a .safetensors file, a folder"
    )
    if suffix == ".safetensors":
        require(
            len(plans) == 1,
            f"--output is the file {output}, but the input holds {', '.join(plans)}; give a folder or --component",
        )
        return {"": next(iter(plans.values()))}
    if naming != "causvid_jax" and len(plans) == 1:
        return {"": next(iter(plans.values()))}
    placed = {}
    for plan in plans.values():
        component = plan.match.network.component
        where = {"diffusers": component, "original": "."}.get(naming)
        if where is None:
            student = plan.source.part.split(".")[-1].startswith("generator")
            own = stage or ("distill" if student else "teacher")
            where = f"{own if component == 'transformer' else component}/weights.safetensors"
        elif naming == "original" and component == "vae":
            where = "Wan2.1_VAE.safetensors"
        placed[where] = plan
    return placed


class Progress:
    """Prints a line at every tenth of ``total`` bytes."""

    def __init__(self, total: int):
        self._total, self._done, self._said = max(1, total), 0, 0

    def __call__(self, count: int) -> None:
        self._done += count
        tenth = 10 * self._done // self._total
        if tenth > self._said:
            self._said = tenth
            print(f"{10 * tenth:3d} %, {files.in_words(self._done)}", flush=True)


def main() -> None:
    """Check everything, say what will be done, do it."""
    given, output = _INPUT.value, _OUTPUT.value
    if not given:
        raise ConfigError("no --input is given; it must be a checkpoint's file or folder")
    if not output:
        raise ConfigError("no --output is given; it must be a .safetensors file or a new folder")
    require(_STAGE.value in (None, *STAGES), f"--stage is {_STAGE.value!r}; accepted: {', '.join(STAGES)}")
    layers = parse_layers(_LORA_LAYERS.value)
    openers = [
        functools.partial(lora.open_lora, file, strength, layers=layers)
        for file, strength in map(parse_lora, _LORA.value)
    ]
    plans: dict[str, convert.Plan] = {}
    for name, place in choose(given, _COMPONENT.value).items():
        part = _PART.value if name in ("", "transformer") else None
        use: Sequence = openers if name in ("", "transformer") else ()
        source = sources.open_source(place, part)
        plans[name] = convert.plan(source, _TO.value, _DTYPE.value, use, _HEADS.value)
    placed = places(plans, output, _TO.value, _STAGE.value)
    for plan in placed.values():
        print(plan, flush=True)
    if _DRY_RUN.value:
        print("Nothing is written (--dry_run).")
        return
    convert.run(placed, output, Progress(sum(plan.bytes_written for plan in placed.values())))
    print(f"Wrote {output}")


if __name__ == "__main__":
    common.run(main)
