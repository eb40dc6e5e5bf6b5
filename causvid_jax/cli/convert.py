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

import pathlib

from absl import flags

from causvid_jax.checkpoints import convert
from causvid_jax.config import ConfigError

_INPUT = flags.DEFINE_string("input", None, "The checkpoint: a file or a folder.")
_OUTPUT = flags.DEFINE_string("output", None, "A .safetensors file, or a folder that does not exist yet.")
_TO = flags.DEFINE_string("to", "causvid_jax", "Names to write: causvid_jax, original or diffusers.")
_PART = flags.DEFINE_string("part", None, "Of a checkpoint with several, for example generator_ema (preferred).")
_COMPONENT = flags.DEFINE_list("component", None, "Of a folder with several, only these: transformer,vae for example.")
_STAGE = flags.DEFINE_string("stage", None, "The transformer's place in a working directory: teacher, init or distill.")
_LORA = flags.DEFINE_multi_string("lora", [], "FILE or FILE:STRENGTH, a LoRA to merge; several are added.")
_LORA_LAYERS = flags.DEFINE_string("lora_layers", None, "Only these layers change, for example 0-9,20.")
_SKIP = flags.DEFINE_bool("skip_foreign", False, "Leave out LoRA targets that the transformer does not have.")
_DTYPE = flags.DEFINE_string("dtype", None, "float32, float16 or bfloat16; default: as stored.")
_HEADS = flags.DEFINE_integer("num_heads", 0, "Of a transformer whose heads are not 128 wide.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check and say what would be done, write nothing.")


def main() -> None:
    """Parse the flags and convert."""
    if not _INPUT.value:
        raise ConfigError("no --input is given; it must be a checkpoint's file or folder")
    if not _OUTPUT.value:
        raise ConfigError("no --output is given; it must be a .safetensors file or a new folder")
    request = convert.Request(
        input=pathlib.Path(_INPUT.value),
        output=pathlib.Path(_OUTPUT.value),
        form=_TO.value,
        part=_PART.value,
        components=tuple(_COMPONENT.value or ()),
        stage=_STAGE.value,
        loras=tuple(map(convert.parse_lora, _LORA.value)),
        layers=convert.parse_layers(_LORA_LAYERS.value),
        skip_foreign=_SKIP.value,
        dtype=_DTYPE.value,
        num_heads=_HEADS.value,
    )
    convert.convert(request, dry_run=_DRY_RUN.value)
