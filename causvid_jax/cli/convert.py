"""Convert published weights to our format and back: ``causvid convert --input=Wan2.1-T2V-1.3B --output=runs/wan``.

Reads original Wan folders, diffusers folders, the checkpoints of CausVid, Self-Forcing, Causal-Forcing, LongLive and
Krea, and our own files and working directories; writes our own (default), or with ``--to`` the original or diffusers'
names. ``--lora=FILE:0.8`` merges a LoRA. ``--dry_run`` only prints what would be done. A folder with several components
becomes a folder of them. In our own format it is a working directory for ``causvid sample`` and ``causvid train``:

| in OUTPUT | from an original folder | from a diffusers folder |
|---|---|---|
| ``teacher/weights.safetensors`` (``--stage``) | ``diffusion_pytorch_model*.safetensors`` | ``transformer/`` |
| ``vae/weights.safetensors`` | ``Wan2.1_VAE.pth`` | ``vae/`` |
| ``text_encoder/weights.safetensors`` | ``models_t5_umt5-xxl-enc-bf16.pth`` | ``text_encoder/`` |
| ``text_encoder/tokenizer.json``, copied | ``google/umt5-xxl/`` | ``tokenizer/`` |
| ``image_encoder/weights.safetensors``, of image to video | ``models_clip_*.pth`` | ``image_encoder/`` |
| ``taehv/weights.safetensors``, if it was put there | ``taew2_1.pth`` or ``.safetensors`` | the same |

The tiny codec is a separate file: ``--input=taew2_1.pth --output=runs/wan/taehv/weights.safetensors`` adds it to a
directory.
"""

import dataclasses
import pathlib
from typing import Annotated, Literal

from causvid_jax.cli.options import option
from causvid_jax.config import require
from causvid_jax.config.fields import Bounds


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags."""

    input: str = option("", "The checkpoint: a file or a folder.")
    output: str = option("", "A .safetensors file, or a folder that does not exist yet.")
    to: str = option("causvid_jax", "Names to write: causvid_jax, original or diffusers.")
    part: str | None = option(None, "Part of a checkpoint with several parts, for example generator_ema (preferred).")
    component: str = option("", "Convert only these components of a folder, for example transformer,vae.")
    stage: Literal["teacher", "init", "distill"] | None = option(
        None, "The transformer's place in a working directory: teacher, init or distill."
    )
    lora: tuple[str, ...] = option((), "FILE or FILE:STRENGTH, a LoRA to merge; several are added.")
    lora_layers: str | None = option(None, "Only these layers change, for example 0-9,20.")
    skip_foreign: bool = option(False, "Leave out LoRA targets that the transformer does not have.")
    dtype: str | None = option(None, "float32, float16 or bfloat16; default: as stored.")
    num_heads: Annotated[int, Bounds(least=0, most=2**22)] = option(0, "Number of heads, if a head is not 128 wide.")
    dry_run: bool = option(False, "Check and print what would be done; write nothing.")

    def __post_init__(self) -> None:
        require(self.input, "no --input is given; it must be a checkpoint's file or folder")
        require(self.output, "no --output is given; it must be a .safetensors file or a new folder")


def main(options: Options) -> None:
    """Convert the input, or with ``--dry_run`` print what would be done."""
    from causvid_jax.checkpoints import convert

    request = convert.Request(
        input=pathlib.Path(options.input),
        output=pathlib.Path(options.output),
        form=options.to,
        part=options.part,
        components=tuple(name.strip() for name in options.component.split(",") if name.strip()),
        stage=options.stage,
        loras=tuple(map(convert.parse_lora, options.lora)),
        layers=convert.parse_layers(options.lora_layers),
        skip_foreign=options.skip_foreign,
        dtype=options.dtype,
        num_heads=options.num_heads,
    )
    convert.convert(request, dry_run=options.dry_run)
