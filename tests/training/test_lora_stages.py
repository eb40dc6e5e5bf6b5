"""Stages that train adapters: the base is constant, and optimizer, EMA and files hold the adapters alone."""

import dataclasses

import jax
import numpy as np
import pytest

from causvid_jax.checkpoints import load, open_checkpoint, open_lora
from causvid_jax.checkpoints import workdir as paths
from causvid_jax.config import ConfigError
from causvid_jax.models import adapters, transformer
from causvid_jax.training import dmd_scores, stages
from tests import tiny

LORA = {"lora": {"rank": 2, "alpha": 4.0, "targets": ("q", "fc1")}}
RECIPE = tiny.tiny_recipe(
    train_teacher={**LORA, "steps": 2},
    train_causal={**LORA, "steps": 2},
    train_init={**LORA, "steps": 2},
    train_distill={**LORA, "steps": 2, "critic_init": "student"},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.tiny_workdir(tmp_path_factory.mktemp("run"), RECIPE)


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name,start", [("causal", "teacher"), ("init", "teacher"), ("distill", "init")])
def test_a_stage_trains_adapters_on_a_frozen_base(name, start, folder):
    recipe = stages.with_lora(name, RECIPE)
    run = tiny.RecordedRun(name, recipe, folder).train()
    net = recipe.teacher if name == "causal" else recipe.student
    networks = [state.student if name == "distill" else state.network for state in run.states]
    base = load(paths.stage_path(folder, start), "host", config=dataclasses.replace(net, lora=RECIPE.teacher.lora))[0]
    own, frozen = adapters.split(networks[-1].params)
    jax.tree.map(np.testing.assert_array_equal, frozen, base)
    assert len(own["blocks"]["self_attn"]) == 1 and set(own["blocks"]) == {"self_attn", "cross_attn", "ffn"}
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(own))  # the first update moves B, the next one A
    first = adapters.split(networks[0].params)[0]
    assert np.abs(first["blocks"]["ffn"]["fc1"]["lora"]["up"]).max() == 0
    assert size(networks[0].ema) == size(own) and size(networks[0].opt) <= 2 * size(own) + 4
    if name == "distill":  # the fake score is adapters on the student's base, which is stored once
        critic = run.states[-1].critic.params
        assert size(critic) == size(own) and all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(critic))
        whole = dmd_scores.fake_params(critic, networks[-1].params, recipe)
        jax.tree.map(np.testing.assert_array_equal, adapters.split(whole)[1], base)
        assert jax.tree.structure(whole) == jax.tree.structure(networks[-1].params)
    # What is exported is the base plus the adapters, and lora/ holds these.
    averaged = adapters.merged(networks[-1].averaged, net)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), run.exported, averaged)
    plain = dataclasses.replace(net, lora=RECIPE.teacher.lora)
    lora = open_lora(run.folder / "lora", 1.0, plain)
    read = load(open_checkpoint(base, plain), "host", updates=[lora])[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), run.exported, read)


def test_a_codec_has_no_adapters():
    recipe = tiny.tiny_recipe(train_vae=LORA)
    with pytest.raises(ConfigError, match="train_vae.lora.rank is 2; only transformers have adapters"):
        stages.with_lora("vae", recipe)


def test_adapters_of_new_weights_are_refused(folder):
    """The base, which is frozen, stayed random."""
    other = {"student": {"dim": 24}}  # of another size than the teacher, so that it does not start from its weights
    for name, recipe in (("teacher", RECIPE), ("init", tiny.changed(RECIPE, **other))):
        with pytest.raises(ConfigError, match=f"train_{name}.lora.rank is 2, but the stage starts from new weights"):
            tiny.RecordedRun(name, stages.with_lora(name, recipe), folder).train()


def test_adapters_are_split_over_the_mesh_like_their_kernels():
    spec = transformer.spec(stages.with_lora("distill", RECIPE).student)["blocks"]
    for module in (spec["self_attn"]["q"], spec["cross_attn"]["q"], spec["ffn"]["fc1"]):
        layers, rows, columns = module["kernel"].axes
        assert module["lora"]["down"].axes == (layers, rows, None) and module["lora"]["up"].axes == (
            layers,
            None,
            columns,
        )
