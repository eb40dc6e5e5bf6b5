"""TAEHV: its keys in published checkpoints (``taew2_1``) and its preset.

The published networks are flat sequences whose keys are positions: ``decoder.3.conv.0.weight`` is the first convolution
of the first memory block.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from causvid_jax.checkpoints.table import CONVOLUTION, LEAVES, OURS, SAME, Network, Row, Shapes, Sizes, build
from causvid_jax.config import TAEHVConfig
from causvid_jax.models import taehv

_BLOCK_CONV = {"conv1": "conv.0", "conv2": "conv.2", "conv3": "conv.4"}


def _key(path: str, config: TAEHVConfig) -> str:
    """Return the published key of a path such as ``decoder/levels/0/blocks/1/conv2/kernel``.

    Positions also count layers without parameters. Encoder: input convolution, ReLU; by level pooling, convolution,
    memory blocks; output convolution. Decoder: latent clamp, input convolution, ReLU; by level memory blocks,
    upsampling, growing, convolution; ReLU, output convolution.
    """
    net, *module, leaf = path.split("/")
    levels, blocks = len(config.temporal_upsample), config.blocks
    encoder = net == "encoder"
    if module[0] == "conv_in":
        position = "0" if encoder else "1"
    elif module[0] == "conv_out":
        position = str(2 + levels * (blocks + 2)) if encoder else str(3 + levels * (blocks + 3) + 1)
    else:
        level, kind, *inner = module[1:]
        start = 2 + int(level) * (blocks + 2) if encoder else 3 + int(level) * (blocks + 3)
        if kind == "blocks":
            index, convolution = inner
            position = f"{start + 2 * encoder + int(index)}.{_BLOCK_CONV[convolution]}"
        elif kind == "conv":
            position = str(start + (1 if encoder else blocks + 2))
        else:  # pool and grow
            position = f"{start if encoder else start + blocks + 1}.conv"
    return f"{net}.{position}.{LEAVES[leaf]}"


def _published(config: TAEHVConfig, form: str, shapes: Shapes) -> Iterator[Row]:
    for path in shapes:
        yield Row(path, None, _key(path, config), CONVOLUTION if path.endswith("/kernel") else SAME)


def _infer(size: Sizes, known: Mapping[str, Any]) -> TAEHVConfig | None:
    """Infer the widths and the number of blocks; the number of levels is the published one."""
    levels = range(len(TAEHVConfig().temporal_upsample))
    blocks = sum(re.fullmatch(r"encoder.+(conv1/kernel|conv\.0\.weight)", key) is not None for key in size.shapes)
    blocks //= len(levels)
    size = Sizes(NETWORK, size.shapes, size.form, TAEHVConfig(blocks=blocks))
    dims = [size(f"decoder/levels/{i}/conv/kernel", 2) for i in levels]
    pools = [f"encoder/levels/{i}/pool/kernel" for i in levels]
    grows = [f"decoder/levels/{i}/grow/kernel" for i in levels]
    return build(
        TAEHVConfig,
        blocks=blocks,
        z_dim=size("decoder/conv_in/kernel", 2),
        encoder_dim=size("encoder/conv_in/kernel", 3),
        decoder_dims=(*dims, size("decoder/conv_out/kernel", 2)),
        temporal_downsample=tuple(size(path, 2) == 2 * size(path, 3) for path in pools),
        temporal_upsample=tuple(size(path, 3) == 2 * size(path, 2) for path in grows),
    )


NETWORK = Network(
    component="taehv",
    config=TAEHVConfig,
    abstract=taehv.abstract,
    published=_published,
    template=TAEHVConfig(),
    presets=(TAEHVConfig(),),
    infer=_infer,
    aliases={},
    describe=lambda config: (
        f"TAEHV of widths {config.encoder_dim} and {config.decoder_dims}, {config.z_dim} latent channels"
    ),
    to_json=lambda config, form: None,
    formats=("original", OURS),
)
