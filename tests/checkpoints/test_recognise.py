"""Which checkpoint is this: formats, sizes, published keys and counts, and what a refusal says."""

import json
import pathlib

import numpy as np
import pytest

from causvid_jax.checkpoints import open_checkpoint
from causvid_jax.checkpoints.checkpoint import network_of, recognise
from causvid_jax.checkpoints.safetensors_io import Tensor
from causvid_jax.checkpoints.source import Source
from causvid_jax.checkpoints.table import FORMATS
from causvid_jax.config import (
    WAN_LATENT_MEAN,
    WAN_LATENT_STD,
    CLIPConfig,
    ConfigError,
    TAEHVConfig,
    TransformerConfig,
    UMT5Config,
    VAEConfig,
)
from tests.checkpoints.tiny_files import EVERY, TINY

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests/golden/names.json").read_text())
WAN_14B = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
STATISTICS = {"latent_mean": WAN_LATENT_MEAN, "latent_std": WAN_LATENT_STD}
PUBLISHED = {
    "1.3B": (TransformerConfig(), 1_418_996_800),
    "14B": (TransformerConfig(**WAN_14B), 14_288_491_584),
    "I2V-14B": (TransformerConfig(**WAN_14B, in_channels=36, image_dim=1280), 16_394_878_784),
    "umT5-XXL": (UMT5Config(), 5_680_910_336),
    "CLIP ViT-H/14": (CLIPConfig(), 632_076_800),
    "VAE": (VAEConfig(**STATISTICS), 126_892_531),
}


def source_of(shapes, metadata=None, config=None):
    tensors = {name: Tensor(shape, np.dtype(np.float32), None) for name, shape in shapes.items()}
    return Source(pathlib.Path("x.safetensors"), tensors, metadata=metadata or {}, config=config or {})


def refusal(shapes, config=None, **options):
    with pytest.raises(ConfigError) as caught:
        recognise(source_of(shapes, **options), config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def expand(collapsed):
    """Return the golden's tensors with every layer written out."""
    shapes = {}
    for name, (shape, layers) in collapsed.items():
        for layer in range(layers) if layers else (0,):
            shapes[name.replace("{}", str(layer))] = tuple(shape)
    return shapes


@pytest.mark.parametrize("entry", GOLDEN)
def test_published_keys_shapes_and_counts(entry):
    """Of diffusers' and transformers' own full-size models, and the original keys that diffusers converts."""
    model, _, form = entry.rpartition(" ")
    config, count = PUBLISHED[model]
    shapes = expand(GOLDEN[entry])
    opened = recognise(source_of(shapes))
    assert (opened.format, opened.config) == (form, config)
    assert opened.network.shapes(config, form) == shapes
    assert opened.network.parameters(config) == sum(int(np.prod(s)) for s in shapes.values()) == count


def test_published_keys_of_taehv():
    shapes = network_of(TAEHVConfig()).shapes(TAEHVConfig(), "original")
    assert len(shapes) == 2 * 4 + 3 * 2 * (2 + 3 * 6)
    for name, shape in (
        ("encoder.0.weight", (64, 3, 3, 3)),
        ("encoder.2.conv.weight", (64, 128, 1, 1)),
        ("encoder.4.conv.0.weight", (64, 128, 3, 3)),
        ("encoder.16.conv.2.weight", (64, 64, 3, 3)),
        ("encoder.17.bias", (16,)),
        ("decoder.1.weight", (256, 16, 3, 3)),
        ("decoder.3.conv.0.weight", (256, 512, 3, 3)),
        ("decoder.8.weight", (128, 256, 3, 3)),
        ("decoder.11.conv.4.bias", (128,)),
        ("decoder.13.conv.weight", (256, 128, 1, 1)),
        ("decoder.20.weight", (64, 64, 3, 3)),
        ("decoder.22.weight", (3, 64, 3, 3)),
    ):
        assert shapes[name] == shape, name
    # Upsampling, growing, pooling and the strided convolutions have no biases.
    assert not shapes.keys() & {f"decoder.{i}.bias" for i in (8, 14, 20)} | shapes.keys() & {"encoder.3.bias"}
    assert recognise(source_of(shapes)).config == TAEHVConfig()


def test_the_original_image_encoder_comes_with_a_text_half():
    shapes = dict(network_of(CLIPConfig()).shapes(CLIPConfig(), "original"))
    assert shapes["visual.transformer.31.attn.to_qkv.weight"] == (3840, 1280)
    assert (shapes["visual.cls_embedding"], shapes["visual.pos_embedding"]) == ((1, 1, 1280), (1, 257, 1280))
    assert (shapes["visual.head"], shapes["visual.patch_embedding.weight"]) == ((1280, 1024), (1280, 3, 14, 14))
    opened = recognise(source_of(shapes | {"log_scale": (), "textual.token_embedding.weight": (250002, 1024)}))
    assert (opened.config, opened.ignored, len(opened.source.tensors)) == (CLIPConfig(), 2, 392)


@pytest.mark.parametrize(
    "config",
    [
        *(config for config in EVERY if not isinstance(config, TransformerConfig)),
        TransformerConfig(
            dim=256, ffn_dim=40, num_heads=2, num_layers=3, text_dim=10, freq_dim=8, patch_size=(1, 1, 1)
        ),
        UMT5Config(vocab_size=11, dim=6, ffn_dim=10, num_heads=2, head_dim=4, num_layers=3, num_buckets=8),
        CLIPConfig(image_size=12, patch_size=4, dim=160, ffn_dim=6, num_heads=2, num_layers=3, projection_dim=5),
        CLIPConfig(image_size=8, patch_size=8, dim=80, ffn_dim=6, num_heads=1, num_layers=2, projection_dim=0),
        TAEHVConfig(blocks=2, temporal_downsample=(False, True, True), temporal_upsample=(True, False, True)),
        VAEConfig(base_dim=8, z_dim=16, num_res_blocks=1),
        VAEConfig(base_dim=4, z_dim=3, dim_mult=(1, 1, 3), temporal_downsample=(True, False)),
    ],
    ids=str,
)
def test_sizes_that_no_config_and_no_preset_gives(config):
    network = network_of(config)
    for form in network.formats:
        if form == "causvid_jax" and isinstance(config, TransformerConfig):
            continue  # A matrix does not tell the size of a patch.
        opened = recognise(source_of(network.shapes(config, form)))
        # Files of others with 16 channels have the published statistics.
        statistics = STATISTICS if getattr(config, "z_dim", 0) == 16 and form != "causvid_jax" else {}
        expected = VAEConfig(**{**vars(config), **statistics}) if isinstance(config, VAEConfig) else config
        assert (opened.format, opened.config) == (form, expected), form


@pytest.mark.parametrize("form", FORMATS)
def test_heads_come_from_metadata_or_must_be_given(form):
    shapes = network_of(TINY).shapes(TINY, form)
    assert "the number of heads does not follow from the width 24 of x.safetensors" in refusal(shapes)
    assert recognise(source_of(shapes), num_heads=2).config == TINY
    for known in ({"config": {"num_heads": 2}}, {"metadata": {"network": '{"num_heads": 2}'}}):
        assert recognise(source_of(shapes, **known)).config == TINY
    other = recognise(source_of(shapes, config={"num_attention_heads": 4, "eps": 1e-5, "text_len": 7})).config
    assert (other.num_heads, other.eps, other.text_length) == (4, 1e-5, 7)


def test_heads_and_activation_of_an_image_encoder():
    config = CLIPConfig(image_size=8, patch_size=4, dim=24, ffn_dim=6, num_heads=3, num_layers=2)
    shapes = network_of(config).shapes(config, "diffusers")
    assert recognise(source_of(shapes, config={"num_attention_heads": 3})).config == config
    assert "give it in a config.json" in refusal(shapes)
    quick = recognise(source_of(shapes, config={"num_attention_heads": 3, "hidden_act": "quick_gelu"}))
    assert quick.config.activation == "quick_gelu"


def test_a_training_export_tells_its_sizes_by_its_recipe():
    """The trained weights that come with the package."""
    from causvid_jax.config.recipes import load_recipe

    recipe = load_recipe(str(ROOT / "configs" / "digits.py"))
    for stage, net in (("teacher", recipe.teacher), ("distill", recipe.student)):
        opened = open_checkpoint(ROOT / f"causvid_jax/assets/digits/{stage}.safetensors")
        for field in ("dim", "ffn_dim", "num_heads", "num_layers", "text_dim", "text_length", "rope_theta"):
            assert getattr(opened.config, field) == getattr(net, field)
        assert opened.format == "causvid_jax"
    coder = open_checkpoint(ROOT / "causvid_jax/assets/digits/vae.safetensors").config
    assert (coder.base_dim, coder.dim_mult, coder.num_res_blocks, len(coder.latent_mean)) == (8, (1, 2, 4, 4), 1, 16)


def test_refusals_name_the_closest_network_and_what_does_not_fit():
    shapes = network_of(TINY).shapes(TransformerConfig(), "diffusers")
    wrong = {name: shape for name, shape in shapes.items() if not name.endswith("attn2.norm_q.weight")}
    wrong |= {"patch_embedding.weight": (1536, 16, 2, 2), "extra.weight": (3,)}
    assert refusal(wrong) == (
        "x.safetensors is no checkpoint that can be read; the closest is transformer of 30 layers, width 1536, "
        "12 heads, 16 channels, diffusers names: missing: blocks.0.attn2.norm_q.weight, blocks.1.attn2.norm_q.weight, "
        "blocks.2.attn2.norm_q.weight and 27 more; unexpected: extra.weight; misshapen: patch_embedding.weight "
        "(1536, 16, 2, 2) instead of (1536, 16, 1, 2, 2)"
    )
    original = dict(network_of(TINY).shapes(TransformerConfig(), "original"))
    for name in ("patch_embedding.bias", "blocks.0.ffn.0.bias", "time_embedding.2.bias"):
        assert f"width 1536, 12 heads, 16 channels, original names: misshapen: {name} (7,) instead of" in refusal(
            {**original, name: (7,)}
        )
    given = refusal(network_of(TINY).shapes(TINY, "original"), TransformerConfig())
    assert "does not fit the configuration; the closest is transformer of 30 layers, width 1536" in given


@pytest.mark.parametrize(
    "extra,sentence",
    [
        ({"img_emb.emb_pos": (1, 514, 1280)}, "but a transformer for first and last frame"),
        ({"vace_blocks.0.before_proj.weight": (3, 3)}, "but a VACE transformer"),
        ({"blocks.0.ffn.0.lora_A.weight": (3, 3)}, "but a LoRA; give it with --lora"),
        ({"blocks.0.ffn.0.lokr_w1": (3, 3)}, "but a LoKr adapter"),
        ({"blocks.0.ffn.0.hada_w1_a": (3, 3)}, "but a LoHa adapter"),
    ],
)
def test_relatives_are_called_by_their_name(extra, sentence):
    assert sentence in refusal({**network_of(TINY).shapes(TransformerConfig(), "original"), **extra})


def test_strangers_and_shapes_without_sense():
    assert "the closest is umT5 text encoder" in refusal({"token_embedding.weight": (256384, 4096)})
    assert (
        refusal({"w": (3,)})
        == "x.safetensors is no checkpoint that can be read: none of its tensors is known, first ['w']"
    )
    for shape in ((), (1,), (0, 0), (2, 3, 4, 5, 6, 7)):
        for config in EVERY:
            for form in network_of(config).formats:
                assert "is no checkpoint" in refusal(dict.fromkeys(network_of(config).shapes(config, form), shape))
