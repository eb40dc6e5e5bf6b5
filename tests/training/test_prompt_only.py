"""Self rollouts read only prompts, so no video is needed."""

import shutil

import numpy as np

from causvid_jax.data import arrays, digits, prepare
from causvid_jax.text import words
from causvid_jax.training import stages
from causvid_jax.training.run import Run
from tests.tiny import RECIPE, tiny_recipe, tiny_workdir


def test_distillation_by_self_rollout_reads_the_prompt_list(tmp_path, monkeypatch):
    shutil.rmtree(tiny_workdir(tmp_path) / "data")
    listed = digits.captions(RECIPE.data, "train")[:6]
    (tmp_path / "prompts.txt").write_text("\n".join(listed))
    recipe = tiny_recipe(data={"prompt_file": str(tmp_path / "prompts.txt")})
    prepare.prompts(recipe, tmp_path)
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
