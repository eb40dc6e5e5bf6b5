"""A field that a train step does not read is refused when it is set, or another part of the stage reads it."""

import dataclasses
import functools
import sys
import typing

import jax
import jax.numpy as jnp
import pytest

from causvid_jax.config import ConfigError, StageConfig
from causvid_jax.config.fields import Config, field_types
from causvid_jax.models import transformer
from causvid_jax.sharding.placement import Placement
from causvid_jax.training import autoencoder, consistency, dmd, flow_matching, ode, update
from tests import tiny

# Sizes of no other test, so that JAX traces every function anew.
NET = {"ffn_dim": 18, "num_layers": 2}
CAUSAL_SCORES = {"teacher": "causal", "critic_mode": "causal"}
CASES = {
    "vae": ("vae", {}),
    "teacher": ("teacher", {}),
    "causal": ("causal", {}),
    "init": ("init", {}),
    "init of a causal teacher": ("init", {"teacher": "causal"}),
    "consistency, discrete": ("consistency", {}),
    "consistency, continuous": ("consistency", {"kind": "continuous"}),
    "dmd": ("distill", {}),
    "dmd of data": ("distill", {"rollout": "data"}),
    "dmd, causal scores": ("distill", CAUSAL_SCORES),
    "sid, replay": ("distill", {"objective": "sid", "gradient": "replay", "continuation_prob": 0.5}),
    "gan": ("distill", {"objective": "dmd_gan"}),
}
ELSEWHERE = {
    "vae": {"decoder_from"},
    "init": {"trajectories", "extra_trajectories", "num_inference_steps", "teacher"},
    "distill": {"init"},
}
"""Fields of a stage that are read where its data are made and its weights are loaded."""
VACUOUS = {
    # A recipe holds the settings of both kinds (configs/digits.py), which are named as such.
    "consistency, discrete": {"tangent_warmup", "loss_scale"},
    "consistency, continuous": {"grid_steps"},
    # There are no clean blocks, which is what False asks for.
    **dict.fromkeys(("dmd", "dmd, causal scores", "sid, replay", "gan"), {"include_clean", "mask_clean"}),
}
"""Fields that a case accepts although they have no effect."""


def trace(stage, recipe):
    """Trace the train step of ``stage`` on shapes."""
    like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    key, teacher, student = (
        jax.random.key(0),
        transformer.abstract(recipe.teacher),
        transformer.abstract(recipe.student),
    )
    negative, clip = like(recipe.text.length, recipe.text.dim), recipe.latent_shape
    batch = {"latents": like(2, *clip), "text": like(2, recipe.text.length, recipe.text.dim)}
    if stage == "vae":
        loss = functools.partial(autoencoder.vae_loss, config=recipe.vae, stage=recipe.train_vae)
        jax.eval_shape(loss, jax.eval_shape(lambda: autoencoder.init_vae(key, recipe.vae)), like(2, 9, 16, 16, 3), key)
    elif stage == "distill":
        optimizers = dmd.make_optimizers(recipe.train_distill)
        critic = jax.eval_shape(functools.partial(dmd.init_tree, key, dmd.critic_spec(recipe)))
        init = functools.partial(dmd.new_state, recipe=recipe, optimizers=optimizers)
        state = jax.eval_shape(init, student, critic)
        dmd.compiled_step(recipe, Placement()).eval_shape(state, teacher, dmd.batch_shapes(recipe), negative)
    elif stage == "consistency":
        loss = functools.partial(consistency.consistency_loss, recipe=recipe)
        step = update.network_step(loss, recipe.train_consistency, recipe.student, Placement())
        step.train_step.eval_shape(jax.eval_shape(step.init, student), batch, teacher, negative)
    elif stage == "init":
        step = ode.init_step(recipe, Placement())
        step.train_step.eval_shape(jax.eval_shape(step.init, student), ode.batch_shapes(recipe))
    else:
        loss = flow_matching.teacher_loss if stage == "teacher" else flow_matching.causal_loss
        config = getattr(recipe, f"train_{stage}")
        step = update.network_step(functools.partial(loss, recipe=recipe), config, recipe.teacher, Placement())
        step.train_step.eval_shape(jax.eval_shape(step.init, teacher), batch)


@pytest.fixture
def reads(monkeypatch):
    """Record the fields that are read, but for those that only a check or a copy of the config reads."""
    found = set()

    def recorded(self, name):
        reader = sys._getframe(1).f_code
        if reader.co_filename.startswith("/") and "_check" not in reader.co_name and reader.co_name not in COPIES:
            found.add((type(self), name))
        return object.__getattribute__(self, name)

    monkeypatch.setattr(Config, "__getattribute__", recorded, raising=False)
    return found


COPIES = {"__post_init__", "replace", "_replace", "_asdict_inner", "asdict"}


def other_values(hint, value):
    """Return values of the type ``hint`` that differ from ``value``."""
    if typing.get_origin(hint) is typing.Literal:
        return [choice for choice in typing.get_args(hint) if choice != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, tuple):
        return [(0.0, 500.0)] if value and isinstance(value[0], float) else [(1,), ((1, 2),)]
    return [value + 1 if isinstance(value, int) else value / 2 or 0.5]


@pytest.mark.parametrize("name", CASES)
def test_a_field_that_is_not_read_is_refused(name, reads):
    stage, changes = CASES[name]
    recipe = tiny.tiny_recipe(teacher=NET, student=NET, **{f"train_{stage}": changes})
    reads.clear()
    trace(stage, recipe)
    config = getattr(recipe, f"train_{stage}")
    types = field_types(type(config))
    own = types.keys() - field_types(StageConfig).keys() - ELSEWHERE.get(stage, set())
    assert not own or own & {field for kind, field in reads if kind is type(config)}
    ignored = set()
    for field in sorted(own - {field for kind, field in reads if kind is type(config)}):
        for value in other_values(types[field], getattr(config, field)):
            try:
                dataclasses.replace(config, **{field: value})
            except ConfigError:
                continue
            ignored.add(field)
    assert ignored == VACUOUS.get(name, set())
