"""Steps of every stage on meshes of eight simulated devices equal those on one device, also after a change of mesh."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from causvid_jax.checkpoints import store
from causvid_jax.config import LoraConfig, OptimizerConfig, ParallelConfig
from causvid_jax.models import adapters
from causvid_jax.sharding.placement import place
from causvid_jax.training import autoencoder, checkpoint, dmd, stages
from causvid_jax.training.metrics import read_metrics
from tests.tiny import RecordedRun, changed, tiny_recipe, tiny_workdir

pytestmark = pytest.mark.usefixtures("compiled_anew")

NET = {"dim": 24, "ffn_dim": 32, "num_heads": 4, "num_layers": 2}
EIGHT = {"batch_size": 8}
RECIPE = tiny_recipe(
    video={"width": 32},
    teacher=NET,
    student=NET,
    train_vae=EIGHT | {"curriculum": ()},
    train_taehv=EIGHT,
    train_teacher=EIGHT,
    train_causal=EIGHT,
    train_init=EIGHT | {"trajectories": 8, "prompt_switch_prob": 0.5},
    train_consistency=EIGHT,
    train_distill=EIGHT
    | {
        "continuation_prob": 0.5,
        "prompt_switch_prob": 0.5,
        "critic_optimizer": {"learning_rate": 1e-3, "warmup_steps": 1},
    },
)
STEPS = {
    **{name: (name, {}) for name in ("teacher", "init", "distill", "vae", "taehv", "causal", "consistency")},
    "continuous": ("consistency", {"kind": "continuous"}),
}
"""Name of a train step to its stage and the changes of its settings."""
MESHES = {
    "data": ParallelConfig(data=8),
    "fsdp": ParallelConfig(fsdp=8),
    "tensor": ParallelConfig(data=2, tensor=4),
    "context": ParallelConfig(data=2, context=4),
    "all": ParallelConfig(data=1, fsdp=2, context=2, tensor=2),
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tiny_workdir(tmp_path_factory.mktemp("sharded"), RECIPE)


@pytest.fixture(autouse=True)
def random_clips(monkeypatch):
    """Give the codecs clips of random pixels, and the VAE no statistics."""
    rng = np.random.default_rng(0)
    shape = (RECIPE.video.frames, RECIPE.video.height, RECIPE.video.width, 3)
    clips = [{"video": rng.integers(0, 256, shape, np.uint8), "caption": ""} for _ in range(16)]
    monkeypatch.setattr(autoencoder.sources, "clips", lambda *_: clips)
    monkeypatch.setattr(autoencoder, "latent_statistics", lambda *_: ((), ()))


class HeldRun(RecordedRun):
    """Keeps the last state, ``held``, on the devices; ``at_start`` replaces the first one."""

    def __init__(self, *given, at_start):
        super().__init__(*given)
        self.at_start = at_start

    def restore(self, state):
        return super().restore(self.at_start(state))

    def after_step(self, state, metrics):
        self.held = state
        return super().after_step(state, metrics)


def take_steps(name, recipe, workdir, count=2, at_start=lambda state: state):
    """Return the losses of ``count`` steps of a stage and its state after them, still on the devices."""
    run = run_steps(name, recipe, workdir, count, at_start)
    return losses_of(run.records), run.held


def run_steps(name, recipe, workdir, count, at_start=lambda state: state):
    recipe = changed(stages.with_lora(name, recipe), **{f"train_{name}": {"steps": count}})
    return HeldRun(name, recipe, workdir, at_start=at_start).train()


def losses_of(records):
    return np.array([value for record in records for key, value in sorted(record.items()) if key.endswith("loss")])


def settings(step, **changes):
    """Return the stage of one of :data:`STEPS` and its recipe, with other changes of the recipe."""
    name, own = STEPS[step]
    return name, changed(RECIPE, **{f"train_{name}": own}, **changes)


@pytest.fixture(scope="module")
def alone(workdir):
    """``alone(step)``: three steps on one device."""

    @functools.cache
    def run(step):
        name, recipe = settings(step)
        return run_steps(name, recipe, workdir, 3)

    return run


def trained(state):
    if hasattr(state, "network"):
        return {"params": state.network.params}
    return {"student": state.student.params, "critic": state.critic.params}


@pytest.fixture(autouse=True)
def no_involuntary_rematerialization(capfd):
    """XLA says it when it compiles, and a program is compiled in whichever of these tests comes first."""
    yield
    assert "rematerialization" not in capfd.readouterr().err


# Every axis alone with the teacher; with the others all axes at once, and each alone in slow tests of init and distill.
CASES = [
    pytest.param(step, mesh, marks=pytest.mark.slow if step != "teacher" and mesh != "all" else (), id=f"{step}-{mesh}")
    for step in STEPS
    for mesh in (MESHES if step in ("teacher", "init", "distill") else ("all",))
]


def assert_near(tree, expected):
    """Assert equal parameters, but for a key's bias.

    Adam divides by the gradient's size: where that is rounding noise (a key's bias), so is the step.
    """
    tree = store.flatten(tree)
    for path, value in store.flatten(expected).items():
        if not path.endswith("k/bias"):
            np.testing.assert_allclose(np.asarray(tree[path]), np.asarray(value), rtol=1e-5, atol=2e-5, err_msg=path)


@pytest.mark.parametrize("step, mesh", CASES)
def test_sharded_step_equals_the_single_device_step(workdir, alone, step, mesh):
    name, recipe = settings(step, parallel=MESHES[mesh])
    found, state = take_steps(name, recipe, workdir)
    np.testing.assert_allclose(found, losses_of(alone(step).records[:2]), rtol=1e-5)
    if step != "vae":  # a change of 1e-7 in its new weights changes the gradient of conv1/bias by half
        assert_near(trained(state), trained(alone(step).states[2]))


@pytest.mark.parametrize("name", ["teacher", "distill"])
def test_a_run_that_continues_on_another_mesh_ends_like_an_uninterrupted_one(workdir, alone, tmp_path, name):
    """Two steps on one mesh and a third on another, by the real run: state, data position and random numbers."""
    for folder in workdir.iterdir():
        if folder.name != name:
            (tmp_path / folder.name).symlink_to(folder)
    for steps, mesh in ((2, "fsdp"), (3, "tensor")):
        recipe = changed(RECIPE, parallel=MESHES[mesh], **{f"train_{name}": {"steps": steps, "samples": 0}})
        stages.train(name, recipe, tmp_path)
    expected = alone(name)
    records = [record for record in read_metrics(tmp_path / name) if "input_wait" in record]
    assert [record["step"] for record in records] == [1, 2, 3]
    np.testing.assert_allclose(losses_of(records), losses_of(expected.records), rtol=1e-5)
    for part in ("network",) if name == "teacher" else ("student", "critic"):
        found = checkpoint.read(tmp_path / name / "checkpoints", f"{part}.params")[1]
        assert_near(found, getattr(expected.states[3], part).params)
    averaged = expected.states[3].network.ema if name == "teacher" else expected.states[3].student.ema
    assert_near(store.load_params(tmp_path / name / "weights.safetensors")[0], averaged)


LORA = LoraConfig(rank=3, alpha=6.0, targets=("q", "o", "fc1", "fc2"))
MODULES = (("self_attn", "q"), ("self_attn", "o"), ("cross_attn", "q"), ("ffn", "fc1"), ("ffn", "fc2"))


def with_lora(name, mesh=None, **changes):
    parallel = {} if mesh is None else {"parallel": MESHES[mesh]}
    return changed(RECIPE, **{f"train_{name}": {"lora": LORA, **changes}}, **parallel)


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
    recipe = changed(RECIPE, train_teacher={"optimizer": OptimizerConfig(kind="muon", warmup_steps=1)})
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
    faster = {"learning_rate": 3e-3}
    recipe = changed(RECIPE, train_distill={"optimizer": faster, "critic_optimizer": faster})

    def saved_by(state):
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
