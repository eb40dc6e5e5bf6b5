"""Convert a file or a folder of several networks: open everything, report the outputs, save them."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

import tqdm

from causvid_jax.checkpoints import pickles, workdir
from causvid_jax.checkpoints.checkpoint import NETWORKS, Checkpoint, open_checkpoint
from causvid_jax.checkpoints.lora import Lora, open_lora
from causvid_jax.checkpoints.save import file_stem, layout, save, size, summary
from causvid_jax.checkpoints.store import storage_type
from causvid_jax.checkpoints.table import FORMATS, OURS
from causvid_jax.config import TransformerConfig, require

STAGES = ("teacher", "init", "distill")
_TOKENIZER_FOLDERS = {"original": "google/umt5-xxl", "diffusers": "tokenizer"}


@dataclasses.dataclass(frozen=True)
class Request:
    """A conversion: input, output and settings. Creating it checks the settings and raises a ConfigError.

    Attributes:
        input: a file or folder of any known format.
        output: a ``.safetensors`` file, or a folder that is empty or absent.
        form: format of the output: causvid_jax, original or diffusers.
        part: part of a transformer's file that has several; None prefers the EMA.
        components: convert only these of a folder with several; empty for all.
        stage: stage under which a transformer is saved in a working directory: teacher, init or distill; None takes
            distill for a part of a student, else teacher.
        loras: (file, strength) of each LoRA to merge.
        layers: the layers that the LoRAs change; None for all.
        skip_foreign: whether to leave out targets of a LoRA that the transformer does not have.
        dtype: float32, float16 or bfloat16; None keeps the stored types.
        num_heads: of a transformer; 0 derives it from the width.
    """

    input: pathlib.Path
    output: pathlib.Path
    form: str = OURS
    part: str | None = None
    components: tuple[str, ...] = ()
    stage: str | None = None
    loras: tuple[tuple[pathlib.Path, float], ...] = ()
    layers: frozenset[int] | None = None
    skip_foreign: bool = False
    dtype: str | None = None
    num_heads: int = 0

    def __post_init__(self) -> None:
        require(self.stage in (None, *STAGES), f"--stage is {self.stage!r}; accepted: {', '.join(STAGES)}")
        require(self.form in FORMATS, f"--to is {self.form!r}; accepted: {', '.join(FORMATS)}")
        storage_type(self.dtype)
        components = [network.component for network in NETWORKS]
        for component in self.components:
            require(component in components, f"--component is {component!r}; accepted: {', '.join(components)}")
        require(
            self.output.suffix not in pickles.SUFFIXES,
            f"--output is {str(self.output)!r}, a pickle; accepted: a .safetensors file, a folder",
        )


def parse_lora(value: str) -> tuple[pathlib.Path, float]:
    """Return (file, strength) of ``FILE`` or ``FILE:STRENGTH``; the strength is 1 by default.

    Raises:
        ConfigError: the file does not exist.
    """
    path, colon, number = value.rpartition(":")
    try:
        file, strength = (path, float(number)) if colon else (value, 1.0)
    except ValueError:
        file, strength = value, 1.0
    require(pathlib.Path(file).exists(), f"--lora {value!r}: {file} does not exist; accepted: FILE or FILE:STRENGTH")
    return pathlib.Path(file), strength


def parse_layers(value: str | None) -> frozenset[int] | None:
    """Return the layers of a text such as ``0-9,20``; None for None.

    Raises:
        ConfigError: another text, or a descending range.
    """
    if value is None:
        return None
    layers: set[int] = set()
    for part in value.split(","):
        first, dash, last = part.strip().partition("-")
        numbers = [first, *([last] if dash else [])]
        require(
            all(number.isascii() and number.isdigit() and len(number) <= 4 for number in numbers)
            and int(numbers[0]) <= int(numbers[-1]),
            f"--lora_layers is {value!r}; accepted: numbers and ranges, as 0-9,20",
        )
        layers |= set(range(int(first), int(last or first) + 1))
    return frozenset(layers)


def convert(request: Request, dry_run: bool = False, say: Callable[[str], None] = print) -> None:
    """Convert the input of ``request``; call ``say`` with a sentence for every input, ignored tensor and output.

    With ``dry_run`` nothing is written.

    Raises:
        ConfigError: an input cannot be read or an output cannot be written. Nothing is written then.
    """
    opened = {}
    for name, path in _choose(request, say).items():
        is_transformer = name in ("", "transformer")
        part = request.part if is_transformer else None
        one = open_checkpoint(path, part=part, num_heads=request.num_heads)
        opened[name] = _with_loras(one, request, say) if is_transformer else one
    outputs = _places(opened, request)
    copies = _tokenizer(outputs, request, say)
    for one in outputs.values():
        say(summary(one, request.form, request.dtype))
    for target, file in copies.items():
        say(f"{file}: copied to {target}")
    total = sum(size(layout(one, request.form, request.dtype)) for one in outputs.values())
    if dry_run:
        say("Nothing is written (--dry_run).")
        return
    with tqdm.tqdm(total=total, unit="B", unit_scale=True, mininterval=1.0, disable=None) as bar:
        save(outputs, request.output, request.form, request.dtype, progress=bar.update, copies=copies)
    say(f"Wrote {request.output}")


def _with_loras(opened: Checkpoint, request: Request, say: Callable[[str], None]) -> Checkpoint:
    if not request.loras:
        return opened
    config = opened.config
    if not isinstance(config, TransformerConfig):
        require(False, f"a LoRA changes a transformer, but {opened}")
    loras: list[Lora] = [
        open_lora(file, strength, config, request.layers, skip_foreign=request.skip_foreign)
        for file, strength in request.loras
    ]
    for lora in loras:
        if lora.skipped:
            say(f"Ignored: {len(lora.skipped)} tensors of {lora.path} that this transformer does not have.")
    return dataclasses.replace(opened, updates=tuple(loras))


def _choose(request: Request, say: Callable[[str], None]) -> dict[str, pathlib.Path]:
    """Return the components to convert, {"": path} for the checkpoint of one network."""
    inside = workdir.components(request.input)
    for component in request.components:
        require(
            not inside or component in inside,
            f"{request.input} has no {component}; accepted: {', '.join(inside)}",
        )
    for sentence in workdir.left_out(request.input):
        say(f"Ignored: {sentence}.")
    if not inside:
        return {"": request.input}
    selected = {name: path for name, path in inside.items() if not request.components or name in request.components}
    for name in inside.keys() - selected.keys():
        say(f"Ignored: {name} ({inside[name]}).")
    return selected


def _places(opened: Mapping[str, Checkpoint], request: Request) -> dict[str, Checkpoint]:
    """Return each checkpoint by its path under the output, as :func:`causvid_jax.checkpoints.save.save` takes them."""
    only = next(iter(opened.values()))
    if request.output.suffix == ".safetensors":
        require(
            len(opened) == 1,
            f"--output is the file {request.output}, but the input holds {', '.join(opened)}; "
            "give a folder or --component",
        )
        return {"": only}
    if request.form != OURS and len(opened) == 1:
        return {"": only}
    outputs = {}
    for one in opened.values():
        component = one.network.component
        if request.form == "diffusers":
            path = component
        elif request.form == "original":
            path = "." if component == "transformer" else f"{file_stem(component, request.form)}.safetensors"
        elif component == "transformer":
            student = any(word.startswith(("generator", "student")) for word in one.source.part.split("."))
            path = workdir.place(request.stage or ("distill" if student else "teacher"))
        else:
            path = workdir.place(component)
        outputs[path] = one
    return outputs


def _tokenizer(
    outputs: Mapping[str, Checkpoint], request: Request, say: Callable[[str], None]
) -> dict[str, pathlib.Path]:
    """Return the tokenizer files to copy beside a text encoder: path under the output to file."""
    encoders: Sequence[Checkpoint] = [one for one in outputs.values() if one.network.component == "text_encoder"]
    whole = request.output.suffix != ".safetensors" and (request.form == OURS or len(outputs) > 1)
    if not whole or not encoders:
        return {}
    folder = request.input if workdir.components(request.input) else request.input.parent
    files = workdir.tokenizer_files(folder)
    if not files:
        say(f"No tokenizer.json was found in {request.input}; copy that of google/umt5-xxl beside the text encoder.")
    if request.form == OURS:
        return {workdir.TOKENIZER: files["tokenizer.json"]} if files else {}
    return {f"{_TOKENIZER_FOLDERS[request.form]}/{name}": file for name, file in files.items()}
