"""Steps of teacher, init and DMD on meshes of eight simulated devices equal those on one device."""

import dataclasses
import pathlib
import tempfile

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from causvid_jax.checkpoints import store
from causvid_jax.checkpoints import workdir as weight_files
from causvid_jax.config import LoraConfig, OptimizerConfig, ParallelConfig, from_config_dict
from causvid_jax.data import arrays, digits
from causvid_jax.models import adapters, transformer, vae
from causvid_jax.sharding.placement import place
from causvid_jax.training import checkpoint, dmd, stages
from causvid_jax.training.run import Run

pytestmark = pytest.mark.usefixtures("compiled_anew")

WORDS = digits.vocabulary(digits.DataConfig())
NET = {
    "dim": 24,
    "ffn_dim": 32,
    "num_heads": 4,
    "num_layers": 2,
    "in_channels": 4,
    "out_channels": 4,
    "text_length": 8,
    "text_dim": len(WORDS) + 8,
    "freq_dim": 8,
}
TRAIN = {"batch_size": 8, "steps": 4, "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1, "ema_decay": 0.9}}
RECIPE = from_config_dict(
    {
        "name": "tiny",
        "video": {"height": 16, "width": 32, "frames": 9},
        "data": {"digit_size": 8},
        "text": {"kind": "words", "vocabulary": WORDS, "length": 8, "dim": len(WORDS) + 8},
        "vae": {
            "base_dim": 2,
            "dim_mult": (1, 1, 1),
            "temporal_downsample": (True, True),
            "num_res_blocks": 1,
            "z_dim": 4,
        },
        "teacher": NET,
        "student": NET,
        "causal": {"frames_per_block": 1, "window": 2},
        "diffusion": {"shift": 3.0, "num_inference_steps": 2, "denoising_timesteps": (1000.0, 500.0)},
        "train_vae": TRAIN,
        "train_teacher": TRAIN,
        "train_init": TRAIN | {"trajectories": 8, "prompt_switch_prob": 0.5},
        "train_distill": TRAIN
        | {
            "critic_steps": 2,
            "continuation_prob": 0.5,
            "prompt_switch_prob": 0.5,
            "critic_optimizer": TRAIN["optimizer"],
        },
    }
)
SHAPE = (3, 4, 8, 4)
MESHES = {
    "data": ParallelConfig(data=8),
    "fsdp": ParallelConfig(fsdp=8),
    "tensor": ParallelConfig(data=2, tensor=4),
    "context": ParallelConfig(data=2, context=4),
    "all": ParallelConfig(data=1, fsdp=2, context=2, tensor=2),
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Make random weights of the earlier stages, and random datasets."""
    folder = tmp_path_factory.mktemp("sharded")
    rng = np.random.default_rng(0)

    def shaken(params):
        return jax.tree.map(lambda p: np.asarray(p) + 0.05 * rng.standard_normal(p.shape).astype(np.float32), params)

    for i, stage in enumerate(("teacher", "init")):
        params = shaken(transformer.init(jax.random.key(i), RECIPE.teacher))
        store.save_params(weight_files.stage_path(folder, stage), params, {})
    store.save_params(weight_files.stage_path(folder, "vae"), vae.init(jax.random.key(2), RECIPE.vae), {})
    captions = digits.captions(RECIPE.data, "train")
    for name, key, shape in (("latents", "latents", SHAPE), ("trajectories", "trajectory", (3, *SHAPE))):
        arrays.write_dataset(
            folder / "data" / name,
            name=name,
            features=arrays.array_features(**{key: shape}),
            chunks=1,
            make_chunk=lambda _, key=key, shape=shape: [
                {key: rng.standard_normal(shape).astype(np.float16), "caption": captions[i]} for i in range(24)
            ],
            identity={},
            progress=False,
        )
    return folder


class Stopped(Exception):
    """Raised to end a run from a step."""


def take_steps(name, recipe, workdir, count=2, at_start=lambda run, state: state):
    """Return the losses of ``count`` steps of a stage and its state after them, still on the devices."""
    losses = []

    def after_step(run, state, metrics):
        run.step += 1
        run._pending.clear()
        losses.append([float(value) for key, value in sorted(metrics.items()) if key.endswith("loss")])
        if run.step == count:
            raise Stopped(state)
        return state

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        for path in workdir.iterdir():
            (pathlib.Path(folder) / path.name).symlink_to(path)
        (pathlib.Path(folder) / name).unlink(missing_ok=True)
        patch.setattr(Run, "after_step", after_step)
        patch.setattr(Run, "restore", at_start)
        with pytest.raises(Stopped) as stopped:
            stages.train(name, recipe, pathlib.Path(folder))
    return np.concatenate(losses), stopped.value.args[0]


@pytest.fixture(scope="module")
def alone(workdir):
    return {name: take_steps(name, RECIPE, workdir) for name in ("teacher", "init", "distill")}


def trained(state):
    if hasattr(state, "network"):
        return {"params": state.network.params}
    return {"student": state.student.params, "critic": state.critic.params}


@pytest.fixture(autouse=True)
def no_involuntary_rematerialization(capfd):
    """XLA says it when it compiles, and a program is compiled in whichever of these tests comes first."""
    yield
    assert "rematerialization" not in capfd.readouterr().err


# Every axis alone with the teacher; with the others all axes at once, and each alone in the slow tests.
CASES = [
    pytest.param(name, mesh, marks=pytest.mark.slow if name != "teacher" and mesh != "all" else (), id=f"{name}-{mesh}")
    for name in ("teacher", "init", "distill")
    for mesh in MESHES
]


@pytest.mark.parametrize("name, mesh", CASES)
def test_sharded_step_equals_the_single_device_step(workdir, alone, name, mesh):
    recipe = dataclasses.replace(RECIPE, parallel=MESHES[mesh])
    losses, state = take_steps(name, recipe, workdir)
    expected, single = alone[name]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for path, value in store.flatten(trained(single)).items():
        sharded = store.flatten(trained(state))[path]
        # Adam divides by the gradient's size: where that is rounding noise (a key's bias), so is the step.
        if path.endswith("k/bias"):
            continue
        np.testing.assert_allclose(np.asarray(sharded), np.asarray(value), rtol=1e-5, atol=2e-5, err_msg=path)


LORA = LoraConfig(rank=3, alpha=6.0, targets=("q", "o", "fc1", "fc2"))
MODULES = (("self_attn", "q"), ("self_attn", "o"), ("cross_attn", "q"), ("ffn", "fc1"), ("ffn", "fc2"))


def with_lora(name, mesh=None, **changes):
    config = dataclasses.replace(getattr(RECIPE, f"train_{name}"), lora=LORA, **changes)
    parallel = {} if mesh is None else {"parallel": MESHES[mesh]}
    return dataclasses.replace(RECIPE, **{f"train_{name}": config}, **parallel)


def lies_like(tree, base):
    """A of every module is split as the input axis of its kernel, B as the output axis; the rank is whole."""
    for group, name in MODULES:
        kernel, lora = (part["blocks"][group][name] for part in (base, tree))
        layers, rows, columns = (*kernel["kernel"].spec, None, None, None)[:3]
        assert {rows, columns} == {"fsdp", "tensor"}
        for side, axes in (("down", (layers, rows, None)), ("up", (layers, None, columns))):
            expected = NamedSharding(kernel["kernel"].mesh, PartitionSpec(*axes))
            assert lora["lora"][side].is_equivalent_to(expected, 3), (group, name, side)


def test_adapters_take_the_single_device_step_split_like_their_kernels(workdir):
    """The third step is the first one that moves A: the rate warms up, and A has no gradient while B is zero."""
    expected, single = take_steps("init", with_lora("init"), workdir, count=3)
    losses, state = take_steps("init", with_lora("init", "all"), workdir, count=3)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    whole = store.flatten(single.network.params)
    for path, value in store.flatten(state.network.params).items():
        np.testing.assert_allclose(np.asarray(value), np.asarray(whole[path]), rtol=1e-5, atol=2e-5, err_msg=path)
    for module in adapters.modules(single.network.params):
        assert all(np.abs(np.asarray(module["lora"]["up"])).max(axis=(1, 2)) > 1e-4)
    shardings = jax.tree.map(lambda x: x.sharding, state.network)
    moments = shardings.opt[1][0]
    for tree in (shardings.params, shardings.ema, moments.mu, moments.nu):
        lies_like(tree, shardings.params)


def test_a_fake_score_of_adapters_shares_the_base_of_the_student():
    recipe = stages.with_lora("distill", with_lora("distill", "all", critic_init="student"))
    optimizers = dmd.make_optimizers(recipe.train_distill)
    state = dmd.state_shardings(recipe, place(recipe.parallel, recipe.student.rules), optimizers)
    student, critic = state.student, state.critic
    for tree in (student.params, student.ema, student.opt[1][0].mu, critic.params, critic.opt[1][0].nu):
        lies_like(tree, student.params)
    assert len(jax.tree.leaves(critic.params)) == len(jax.tree.leaves(student.ema)) == 2 * (len(MODULES) + 1)


def test_muons_steps_on_matrices_that_are_split(workdir):
    config = dataclasses.replace(RECIPE.train_teacher, optimizer=OptimizerConfig(kind="muon", warmup_steps=1))
    recipe = dataclasses.replace(RECIPE, train_teacher=config)
    expected, single = take_steps("teacher", recipe, workdir)
    losses, state = take_steps("teacher", dataclasses.replace(recipe, parallel=MESHES["all"]), workdir)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for path, value in store.flatten(state.network.params).items():
        whole = np.asarray(store.flatten(single.network.params)[path])
        np.testing.assert_allclose(np.asarray(value), whole, rtol=1e-5, atol=2e-5, err_msg=path)
    layers = state.network.opt[1].inner_states["muon"].inner_state[0].mu["blocks"]
    assert layers["ffn"]["fc1"]["kernel"].addressable_shards[0].data.shape == (2, 12, 16)


def test_parameters_moments_and_ema_lie_where_the_rules_say(workdir):
    recipe = dataclasses.replace(RECIPE, parallel=MESHES["all"])
    _, state = take_steps("distill", recipe, workdir, count=1)
    student, critic = state.student, state.critic
    for tree in (student.params, critic.params, student.ema, student.opt[1][0].mu, critic.opt[1][0].nu):
        kernel = tree["blocks"]["ffn"]["fc1"]["kernel"]  # [L, 24, 32], split 2 x 2
        assert kernel.addressable_shards[0].data.shape == (2, 12, 16)
        assert tree["blocks"]["self_attn"]["o"]["kernel"].addressable_shards[0].data.shape == (2, 12, 12)
        assert tree["blocks"]["modulation"].addressable_shards[0].data.shape == (2, 6, 24)


def test_a_checkpoint_of_one_mesh_goes_on_on_another(workdir, tmp_path):
    """To 1e-6, once the scores differ: the generator's loss is the square of their difference, and a fake score that
    has hardly left the real one gives a loss of 1e-3 whose sixth digit is the rounding of the two.
    """
    config = RECIPE.train_distill
    rates = {
        name: dataclasses.replace(getattr(config, name), learning_rate=3e-3)
        for name in ("optimizer", "critic_optimizer")
    }
    recipe = dataclasses.replace(RECIPE, train_distill=dataclasses.replace(config, **rates))

    def saved_by(run, state):
        checkpoints = checkpoint.Checkpoints(tmp_path, 1)
        restored, _ = checkpoints.restore(state)
        checkpoints.close()
        jax.tree.map(np.testing.assert_array_equal, restored, saved)
        kernel = restored.critic.params["blocks"]["ffn"]["fc1"]["kernel"]  # [L, 24, 32]
        assert kernel.addressable_shards[0].data.shape in ((2, 24, 8), (2, 3, 32))
        return restored

    _, state = take_steps("distill", dataclasses.replace(recipe, parallel=MESHES["fsdp"]), workdir, count=1)
    checkpoints = checkpoint.Checkpoints(tmp_path, 1)
    checkpoints.save(1, state, {})
    checkpoints.close()
    saved = jax.tree.map(np.asarray, state)
    expected, losses = (
        take_steps("distill", dataclasses.replace(recipe, parallel=MESHES[name]), workdir, at_start=saved_by)[0]
        for name in ("fsdp", "tensor")
    )
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
