"""Self rollouts read prompts alone: no video is needed."""

import dataclasses

import jax
import numpy as np

from causvid_jax.checkpoints import store
from causvid_jax.checkpoints import workdir as weight_files
from causvid_jax.data import arrays, digits, prepare
from causvid_jax.models import transformer, vae
from causvid_jax.text import words
from causvid_jax.training import stages
from causvid_jax.training.run import Run
from tests.tiny import RECIPE


def test_distillation_by_self_rollout_reads_the_prompt_list(tmp_path, monkeypatch):
    listed = digits.captions(RECIPE.data, "train")[:6]
    (tmp_path / "prompts.txt").write_text("\n".join(listed))
    recipe = dataclasses.replace(
        RECIPE, data=dataclasses.replace(RECIPE.data, prompt_file=str(tmp_path / "prompts.txt"))
    )
    prepare.prompts(recipe, tmp_path)
    trees = {"vae": vae.abstract(recipe.vae)} | dict.fromkeys(("teacher", "init"), transformer.abstract(recipe.teacher))
    for name, tree in trees.items():
        values = jax.tree.map(lambda x: np.full(x.shape, 0.1, x.dtype), tree)
        store.save_params(weight_files.stage_path(tmp_path, name), values, {})

    assert not arrays.is_complete(tmp_path / "data" / "latents")
    seen = []

    def batches(run, read, to_device):
        batch = next(read(batch_size=2, frames=0, seed=0))
        seen.extend([batch, to_device(batch)])
        return iter(())

    monkeypatch.setattr(Run, "batches", batches)
    stages.train("distill", recipe, tmp_path)
    batch, ready = seen
    assert set(batch) == {"caption", "text", "index"} and sorted(batch["caption"]) == sorted(listed)
    assert set(ready) == {"text"}
    rows = words.encode_words(list(batch["caption"]), recipe.text)
    np.testing.assert_array_equal(ready["text"], rows.reshape(3, 2, *rows.shape[1:]))
