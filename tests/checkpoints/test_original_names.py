"""Original Wan names, from the published definitions, with values: a swapped name in either direction is seen."""

import json
import pathlib
import sys

import numpy as np
import pytest

from causvid_jax.checkpoints import load, state_dict
from causvid_jax.config import TransformerConfig, VAEConfig

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
sys.path.append(str(GOLDEN))
import make_image_branch  # noqa: E402
import make_names  # noqa: E402
import make_transformer  # noqa: E402
import make_vae  # noqa: E402
import wan_definitions  # noqa: E402


def test_the_committed_names_are_those_of_the_published_definitions():
    golden = json.loads((GOLDEN / "names.json").read_text())
    for size in make_names.SIZES:
        original = make_names.original_transformer(size)
        assert make_names.collapse(original) == {k: [v[0], v[1]] for k, v in golden[f"{size} original"].items()}
        renamed = {wan_definitions.diffusers_name(name): shape for name, shape in original.items()}
        assert make_names.collapse(renamed) == golden[f"{size} diffusers"]
    original = wan_definitions.vae()
    assert make_names.collapse(original) == golden["VAE original"]
    renamed = {wan_definitions.vae_diffusers_name(name): shape for name, shape in original.items()}
    assert make_names.collapse(renamed) == golden["VAE diffusers"]


def transformer_state(sizes, seed):
    """The weights of a golden under original names: diffusers' draws, renamed by the published conversion."""
    shapes = wan_definitions.transformer(**sizes)
    names = {name: wan_definitions.diffusers_name(name) for name in shapes}
    drawn = make_transformer.random_weights({names[name]: shape for name, shape in shapes.items()}, seed)
    return {name: drawn[names[name]] for name in shapes}


def test_original_names_give_the_velocity_that_diffusers_computes():
    state = transformer_state(make_transformer.SIZES, make_transformer.SEED)
    with np.load(make_transformer.GOLDEN) as arrays:
        assert make_transformer.error_of(state, arrays) <= 5e-5


@pytest.mark.parametrize("sizes", [make_transformer.SIZES, make_image_branch.SIZES], ids=["text", "image branch"])
def test_original_and_diffusers_names_are_one_network_and_are_written_back(sizes):
    config, state = TransformerConfig(**sizes), transformer_state(sizes, 7)
    both(state, {wan_definitions.diffusers_name(name): value for name, value in state.items()}, config)


def test_original_and_diffusers_names_of_the_vae_are_one_network_and_are_written_back():
    config = VAEConfig(base_dim=4, z_dim=3)
    state = make_vae.random_weights(wan_definitions.vae(base_dim=4, z_dim=3), 7)
    both(state, {wan_definitions.vae_diffusers_name(name): value for name, value in state.items()}, config)


def both(original, diffusers, config):
    params = [load(state, config=config)[0] for state in (original, diffusers)]
    for form, state in (("original", original), ("diffusers", diffusers)):
        written = state_dict(params[0], config, form)
        assert written.keys() == state.keys()
        for name, value in state.items():
            np.testing.assert_array_equal(written[name], value, err_msg=name)
        written = state_dict(params[1], config, form)
        for name, value in state.items():
            np.testing.assert_array_equal(written[name], value, err_msg=name)
