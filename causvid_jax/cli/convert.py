"""Published weights in and out: ``python -m launch.convert --input=Wan2.1-T2V-1.3B --output=runs/wan``.

Reads original Wan folders, diffusers folders, the checkpoints of CausVid, Self-Forcing, Causal-Forcing, LongLive and
Krea, and our own files and working directories; writes our own (default), or with ``--to`` the original or diffusers'
names. ``--lora=FILE:0.8`` merges a LoRA. ``--dry_run`` only says what would be done. A folder with several components
becomes a folder of them: for our own format a working directory that ``launch.sample`` and ``launch.train`` read:

| in OUTPUT | from an original folder | from a diffusers folder |
|---|---|---|
| ``teacher/weights.safetensors`` (``--stage``) | ``diffusion_pytorch_model*.safetensors`` | ``transformer/`` |
| ``vae/weights.safetensors`` | ``Wan2.1_VAE.pth`` | ``vae/`` |
| ``text_encoder/weights.safetensors`` | ``models_t5_umt5-xxl-enc-bf16.pth`` | ``text_encoder/`` |
| ``text_encoder/tokenizer.json``, copied | ``google/umt5-xxl/`` | ``tokenizer/`` |
| ``image_encoder/weights.safetensors``, of image to video | ``models_clip_*.pth`` | ``image_encoder/`` |
| ``taehv/weights.safetensors``, if it was put there | ``taew2_1.pth`` or ``.safetensors`` | the same |

The tiny codec comes by itself: ``--input=taew2_1.pth --output=runs/wan/taehv/weights.safetensors`` adds it to a
directory.
"""

import functools
import pathlib
from collections.abc import Collection, Mapping, Sequence

from absl import flags

from causvid_jax.checkpoints import convert, exports, files, layouts, lora, pickles, sources, workdir
from causvid_jax.config import ConfigError, require

_INPUT = flags.DEFINE_string("input", None, "The checkpoint: a file or a folder.")
_OUTPUT = flags.DEFINE_string("output", None, "A .safetensors file, or a folder that does not exist yet.")
_TO = flags.DEFINE_string("to", "causvid_jax", "Names to write: causvid_jax, original or diffusers.")
_PART = flags.DEFINE_string("part", None, "Of a checkpoint with several, for example generator_ema (preferred).")
_COMPONENT = flags.DEFINE_list("component", None, "Of a folder with several, only these: transformer,vae for example.")
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


def choose(path: str, components: Sequence[str] | None) -> dict[str, pathlib.Path]:
    """The components to convert, {"": path} for a checkpoint of one."""
    found = sources.components(path)
    known = [network.component for network in layouts.NETWORKS]
    for component in components or ():
        require(component in known, f"--component is {component!r}; accepted: {', '.join(known)}")
        require(
            not found or component in found,
            f"{path} has no {component} that could be converted, but {', '.join(found)}",
        )
    if not found:
        return {"": pathlib.Path(path)}
    chosen = {name: place for name, place in found.items() if not components or name in components}
    for name in found.keys() - chosen.keys():
        print(f"Left out: {name} ({found[name]}).")
    return chosen


def tokenizer(plans: Collection[convert.Plan], path: str, output: str, naming: str) -> dict[str, pathlib.Path]:
    """What to copy beside a text encoder: places under ``output`` to files."""
    ours = naming == "causvid_jax"
    whole = pathlib.Path(output).suffix != ".safetensors" and (ours or len(plans) > 1)
    if not whole or not any(plan.match.network is layouts.UMT5 for plan in plans):
        return {}
    folder = pathlib.Path(path)
    found = sources.tokenizer_files(folder if folder.is_dir() and sources.components(folder) else folder.parent)
    if not found:
        print(f"No tokenizer.json is near {path}: put the one of google/umt5-xxl beside the text encoder.")
    if ours:
        return {workdir.TOKENIZER: found["tokenizer.json"]} if found else {}
    return {f"{exports.TOKENIZERS[naming]}/{name}": file for name, file in found.items()}


def places(plans: Mapping[str, convert.Plan], output: str, naming: str, stage: str | None) -> dict[str, convert.Plan]:
    """Each plan's place under ``output``, as :func:`causvid_jax.checkpoints.convert.run` takes them."""
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
        if naming == "diffusers":
            where = component
        elif naming == "original":
            where = "." if component == "transformer" else f"{exports.file_stem(component, naming)}.safetensors"
        elif component == "transformer":
            student = plan.source.part.split(".")[-1].startswith("generator")
            where = workdir.place(stage or ("distill" if student else "teacher"))
        else:
            where = workdir.place(component)
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
    copies = tokenizer(placed.values(), given, output, _TO.value)
    for plan in placed.values():
        print(plan, flush=True)
    for copy, file in copies.items():
        print(f"{file}: copied to {copy}")
    if _DRY_RUN.value:
        print("Nothing is written (--dry_run).")
        return
    convert.run(placed, output, Progress(sum(plan.bytes_written for plan in placed.values())), copies=copies)
    print(f"Wrote {output}")
