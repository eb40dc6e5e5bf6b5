"""What the trainers wire together: networks, lengths, text, keys; on random weights, against formulas."""

import numpy as np
import pytest

from causvid_jax.config import ConfigError
from causvid_jax.distill import rollout
from causvid_jax.training import dmd
from tests import tiny


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tiny.tiny_workdir(tmp_path_factory.mktemp("wiring"))


def test_rollouts_have_the_length_of_the_stretch(workdir, monkeypatch):
    shapes = []
    original = rollout.self_rollout

    def recorded(*arguments, shape, **options):
        shapes.append(shape)
        return original(*arguments, shape=shape, **options)

    monkeypatch.setattr(dmd, "self_rollout", recorded)
    changes = {"steps": 2, "frames": 4, "curriculum": ((1, 1, 3),), "critic_steps": 1}
    recipe = tiny.tiny_recipe(train_distill=changes)
    run = tiny.RecordedRun("distill", recipe, workdir).train()
    assert len(run.records) == 2 and all(np.isfinite(record["generator_loss"]) for record in run.records)
    # One trace of the critic's and one of the student's rollout for each length.
    assert [(size, frames) for size, frames, *_ in dict.fromkeys(shapes)] == [(3, 1), (2, 4)]


def test_a_data_rollout_is_cut_to_its_length(workdir):
    recipe = tiny.tiny_recipe(train_distill={"steps": 1, "frames": 2, "rollout": "data", "critic_steps": 1})
    run = tiny.RecordedRun("distill", recipe, workdir).train()
    assert run.batches_read[0]["latents"].shape == (2, 2, 2, *recipe.latent_shape[1:])


def test_lengths_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="5 latent frames do not fit blocks"):
        tiny.tiny_recipe(causal={"frames_per_block": 3, "window": 3}, train_distill={"frames": 5})
    with pytest.raises(ConfigError, match=r"continue the last 3 latent frames \(causal.window 4\) .* which has 2"):
        tiny.tiny_recipe(causal={"window": 4}, train_distill={"frames": 2, "continuation_prob": 0.5})


def test_prompt_switches_in_parts_of_one_clip_are_refused():
    with pytest.raises(ConfigError, match="train_init.prompt_switch_prob is 0.5.*one clip per part, and needs two"):
        tiny.tiny_recipe(train_init={"prompt_switch_prob": 0.5, "accumulate": 2})
