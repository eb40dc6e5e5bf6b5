"""Which checkpoint is this: layouts, sizes from shapes, published names and counts, and what an error says."""

import json
import pathlib

import jax
import numpy as np
import pytest

from causvid_jax.checkpoints import files, layouts, sources, store
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

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "names.json").read_text())
SIZES = {
    "1.3B": TransformerConfig(),
    "14B": TransformerConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
    "I2V-14B": TransformerConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_channels=36, image_dim=1280),
}


def source_of(shapes, metadata=None, config=None):
    tensors = {name: files.Tensor(shape, np.dtype(np.float32), None) for name, shape in shapes.items()}
    return sources.Source(pathlib.Path("x.safetensors"), tensors, metadata=metadata or {}, config=config or {})


def every(tiny, tiny_vae):
    """(network, small sizes) of each network."""
    others = (
        UMT5Config(vocab_size=11, dim=6, ffn_dim=10, num_heads=2, head_dim=4, num_layers=3),
        CLIPConfig(image_size=8, patch_size=4, dim=80, ffn_dim=6, num_heads=1, num_layers=2, projection_dim=3),
        TAEHVConfig(z_dim=4, encoder_dim=10, decoder_dims=(14, 12, 8, 6)),
    )
    return [(layouts.network_of(config), config) for config in (tiny, tiny_vae, *others)]


def expand(collapsed):
    """The golden's tensors, every layer written out."""
    shapes = {}
    for name, (shape, layers) in collapsed.items():
        for layer in range(layers) if layers else (0,):
            shapes[name.replace("{}", str(layer))] = tuple(shape)
    return shapes


@pytest.mark.parametrize("size,count", [("1.3B", 1_418_996_800), ("14B", 14_288_491_584), ("I2V-14B", 16_394_878_784)])
@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_published_transformers(size, count, naming):
    """Names and shapes of diffusers' own full-size models, and of the original names it converts from."""
    published = expand(GOLDEN[f"{size} {naming}"])
    assert sum(int(np.prod(shape)) for shape in published.values()) == count
    assert layouts.TRANSFORMER.shapes(SIZES[size], naming) == published
    match = layouts.detect(source_of(published))
    assert (match.naming, match.config, match.misfit, match.parameters) == (naming, SIZES[size], "", count)


@pytest.mark.parametrize(
    "model,network,config,count",
    [
        ("umT5-XXL", layouts.UMT5, UMT5Config(), 5_680_910_336),
        ("CLIP ViT-H/14", layouts.CLIP, CLIPConfig(), 632_076_800),
    ],
    ids=("umT5", "CLIP"),
)
def test_published_encoders(model, network, config, count):
    """Names and shapes of transformers' own full-size models; the original names have the same sizes."""
    published = expand(GOLDEN[f"{model} diffusers"])
    assert network.shapes(config, "diffusers") == published
    for naming in layouts.NAMINGS:
        shapes = network.shapes(config, naming)
        assert sum(int(np.prod(shape)) for shape in shapes.values()) == count
        match = layouts.detect(source_of(shapes))
        assert (match.network, match.naming, match.config, match.misfit) == (network, naming, config, "")


def test_the_original_image_encoder_stands_beside_a_text_half():
    shapes = dict(layouts.CLIP.shapes(CLIPConfig(), "original"))
    assert shapes["visual.transformer.31.attn.to_qkv.weight"] == (3840, 1280)
    assert shapes["visual.transformer.0.attn.to_qkv.bias"] == (3840,)
    assert (shapes["visual.cls_embedding"], shapes["visual.pos_embedding"]) == ((1, 1, 1280), (1, 257, 1280))
    assert (shapes["visual.head"], shapes["visual.patch_embedding.weight"]) == ((1280, 1024), (1280, 3, 14, 14))
    assert len(shapes) == 392
    shapes |= {"log_scale": (), "textual.token_embedding.weight": (250002, 1024)}
    match = layouts.detect(source_of(shapes))
    assert (match.config, match.source.unread, len(match.source.tensors)) == (CLIPConfig(), 2, 392)


@pytest.mark.parametrize(
    "config",
    [
        UMT5Config(vocab_size=11, dim=6, ffn_dim=10, num_heads=2, head_dim=4, num_layers=3, num_buckets=8),
        CLIPConfig(image_size=12, patch_size=4, dim=160, ffn_dim=6, num_heads=2, num_layers=3, projection_dim=5),
        CLIPConfig(image_size=8, patch_size=8, dim=80, ffn_dim=6, num_heads=1, num_layers=2, projection_dim=0),
        TAEHVConfig(),
        TAEHVConfig(
            z_dim=4,
            encoder_dim=10,
            decoder_dims=(14, 12, 8, 6),
            temporal_downsample=(False, True, True),
            temporal_upsample=(True, False, True),
        ),
    ],
    ids=str,
)
def test_sizes_from_shapes(config):
    network = layouts.network_of(config)
    for naming in network.namings:
        match = layouts.detect(source_of(network.shapes(config, naming)))
        assert (match.naming, match.config) == (naming, config), naming


def test_heads_of_an_image_encoder_come_from_beside_it_or_are_80_wide():
    config = CLIPConfig(image_size=8, patch_size=4, dim=24, ffn_dim=6, num_heads=3, num_layers=2)
    shapes = layouts.CLIP.shapes(config, "diffusers")
    assert layouts.detect(source_of(shapes, config={"num_attention_heads": 3})).config == config
    with pytest.raises(ConfigError, match="width 24 .* 80 each.; give it in a config.json"):
        layouts.detect(source_of(shapes), num_heads=3)
    quick = layouts.detect(source_of(shapes, config={"num_attention_heads": 3, "hidden_act": "quick_gelu"}))
    assert quick.config.activation == "quick_gelu"


@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_published_vae(naming):
    published = expand(GOLDEN[f"VAE {naming}"])
    assert len(published) == 194
    match = layouts.detect(source_of(published))
    statistics = {"latent_mean": WAN_LATENT_MEAN, "latent_std": WAN_LATENT_STD}
    assert (match.naming, match.config, match.misfit) == (naming, VAEConfig(**statistics), "")
    assert match.parameters == 126_892_531


@pytest.mark.parametrize("naming", layouts.NAMINGS)
@pytest.mark.parametrize(
    "config",
    [
        VAEConfig(base_dim=4, z_dim=2),
        VAEConfig(base_dim=8, z_dim=16, num_res_blocks=1),
        VAEConfig(base_dim=4, z_dim=3, dim_mult=(1, 1, 3), temporal_downsample=(True, False)),
    ],
    ids=str,
)
def test_sizes_of_a_vae_from_its_shapes(config, naming):
    match = layouts.detect(source_of(layouts.VAE.shapes(config, naming)))
    published = naming != "causvid_jax" and config.z_dim == 16
    assert match.config == VAEConfig(
        **{
            **vars(config),
            "latent_mean": WAN_LATENT_MEAN if published else (),
            "latent_std": WAN_LATENT_STD if published else (),
        }
    )


@pytest.mark.parametrize("naming", layouts.NAMINGS)
def test_heads_come_from_beside_the_weights_or_must_be_given(tiny, naming):
    shapes = layouts.TRANSFORMER.shapes(tiny, naming)
    with pytest.raises(ConfigError, match="width 24 .* does not tell the number of heads .* give --num_heads"):
        layouts.detect(source_of(shapes))
    assert layouts.detect(source_of(shapes), num_heads=2).config == tiny
    for described in ({"config": {"num_heads": 2}}, {"metadata": {"network": '{"num_heads": 2}'}}):
        assert layouts.detect(source_of(shapes, **described)).config == tiny
    assert layouts.detect(source_of(shapes, config={"num_attention_heads": 4, "eps": 1e-5})).config.eps == 1e-5


def test_a_training_export_tells_its_sizes_by_its_recipe():
    """The trained weights that come with the package."""
    from causvid_jax.cli.common import load_recipe_file

    root = pathlib.Path(__file__).parents[2]
    recipe = load_recipe_file(str(root / "configs" / "digits.py"))
    for stage, net in (("teacher", recipe.teacher), ("distill", recipe.student)):
        match = layouts.detect(sources.open_source(root / f"causvid_jax/assets/digits/{stage}.safetensors"))
        assert match.naming == "causvid_jax"
        for field in ("dim", "ffn_dim", "num_heads", "num_layers", "text_dim", "text_length", "rope_theta"):
            assert getattr(match.config, field) == getattr(net, field)
    coder = layouts.detect(sources.open_source(root / "causvid_jax/assets/digits/vae.safetensors")).config
    assert (coder.base_dim, coder.dim_mult, coder.num_res_blocks) == (8, (1, 2, 4, 4), 1)
    assert len(coder.latent_mean) == 16


def test_errors_name_what_does_not_fit_and_the_closest_layout():
    shapes = layouts.TRANSFORMER.shapes(SIZES["1.3B"], "diffusers")
    wrong = {name: shape for name, shape in shapes.items() if not name.endswith("attn2.norm_q.weight")}
    wrong |= {"patch_embedding.weight": (1536, 16, 2, 2), "extra.weight": (3,)}
    with pytest.raises(ConfigError) as caught:
        layouts.detect(source_of(wrong))
    assert str(caught.value) == (
        "x.safetensors is no checkpoint that can be read; the closest layout is transformer of 30 layers, width 1536, "
        "12 heads, 16 channels, diffusers names: missing: blocks.0.attn2.norm_q.weight, blocks.1.attn2.norm_q.weight, "
        "blocks.2.attn2.norm_q.weight, blocks.3.attn2.norm_q.weight, blocks.4.attn2.norm_q.weight and 25 more; "
        "unexpected: extra.weight; misshapen: patch_embedding.weight (1536, 16, 2, 2) instead of (1536, 16, 1, 2, 2)"
    )


def test_one_bad_tensor_is_outvoted():
    shapes = dict(layouts.TRANSFORMER.shapes(SIZES["1.3B"], "original"))
    for name in ("patch_embedding.bias", "blocks.0.ffn.0.bias", "time_embedding.2.bias"):
        bad = {**shapes, name: (7,)}
        with pytest.raises(
            ConfigError, match=rf"width 1536, .*: misshapen: {name} \(7,\) instead of \({shapes[name][0]},\)"
        ):
            layouts.detect(source_of(bad))


@pytest.mark.parametrize(
    "extra,sentence",
    [
        ({"img_emb.emb_pos": (1, 514, 1280)}, "a transformer between a first and a last frame"),
        ({"vace_blocks.0.before_proj.weight": (3, 3)}, "a VACE transformer"),
        ({"blocks.0.ffn.0.scale_weight": ()}, "quantised to 8 bits"),
    ],
)
def test_relatives_are_called_by_their_name(extra, sentence):
    with pytest.raises(ConfigError, match=sentence):
        layouts.detect(source_of({**layouts.TRANSFORMER.shapes(SIZES["1.3B"], "original"), **extra}))


def test_strangers(tiny, tiny_vae):
    umt5 = {"token_embedding.weight": (256384, 4096), "blocks.0.pos_embedding.embedding.weight": (32, 64)}
    with pytest.raises(ConfigError, match="closest layout is umT5 text encoder of 1 layers, width 4096, .* missing: "):
        layouts.detect(source_of(umt5))
    with pytest.raises(ConfigError, match="no tensor of it is known: missing: .* unexpected: w"):
        layouts.detect(source_of({"w": (3,)}))
    # Names that fit with shapes that make no sense must be an error of the same kind, and no crash.
    for shape in ((), (1,), (0, 0), (2, 3, 4, 5, 6, 7)):
        for naming in layouts.NAMINGS:
            for network, config in every(tiny, tiny_vae):
                if naming not in network.namings:
                    continue
                with pytest.raises(ConfigError, match="is no checkpoint that can be read"):
                    layouts.detect(source_of(dict.fromkeys(network.shapes(config, naming), shape)))


def test_a_given_configuration_must_be_that_of_the_file(tiny):
    source = source_of(layouts.TRANSFORMER.shapes(tiny, "original"))
    assert layouts.detect(source, tiny).naming == "original"
    with pytest.raises(ConfigError, match="does not fit the configuration; the closest layout is .* width 1536"):
        layouts.detect(source, SIZES["1.3B"])


@pytest.mark.parametrize("naming", layouts.NAMINGS)
def test_names_and_shapes_agree(tiny, tiny_vae, naming):
    for network, config in every(tiny, tiny_vae):
        if naming not in network.namings:
            continue
        names, shapes = network.names(config, naming), network.shapes(config, naming)
        assert set(names.values()) == set(shapes)
        tree = store.flatten(jax.tree.map(lambda leaf: leaf.shape, network.abstract(config)))
        assert {piece.path for piece in names} == set(tree)
