"""Stages compiled for machines that are not there: on pretended CPU devices always, for TPU and GPU where the compilers
are installed (extras ``tpu``, ``cuda12``)."""

import dataclasses
import importlib.util
import math

import jax
import pytest

from causvid_jax.analysis import compile_report, estimate, hlo, topology
from causvid_jax.config import ParallelConfig
from causvid_jax.config.recipes import load_recipe
from causvid_jax.models import transformer
from causvid_jax.sharding.mesh import make_mesh
from tests.sharding.test_sharded_training import RECIPE

MESH = ParallelConfig(data=0, fsdp=2, context=2)
INSTALLED = {"v5e:2x2": "libtpu", "h100:4": "jax_cuda12_plugin"}


def with_mesh(**changes):
    return dataclasses.replace(RECIPE, parallel=dataclasses.replace(MESH, **changes))


@pytest.mark.parametrize(
    "stage,quick,linear",
    [("teacher", False, "dtype"), ("teacher", True, "dtype"), ("stream", False, "dtype"), ("stream", False, "int8")],
)
def test_a_compiled_program_holds_what_is_computed(stage, quick, linear):
    """The pretended machine has the figures of eight GPUs and the CPU devices of this process."""
    machine = topology.Topology(topology.parse("h100:8"), jax.devices())
    recipe = with_mesh()
    recipe = dataclasses.replace(recipe, student=dataclasses.replace(recipe.student, linear=linear))
    report = compile_report.compile_for(recipe, stage, machine, quick=quick)
    known = compile_report.estimate_for(recipe, stage, machine.machine)
    assert report.compiled and report.fits and report.mesh == {"data": 2, "fsdp": 2, "context": 2, "tensor": 1}
    state = sum(known.parts[name] for name in ("parameters", "running mean", "moments") if name in known.parts)
    state += known.parts["caches"] if stage == "stream" else 0.0
    # Beside the state: the batch, in a stream the prompt's keys and values.
    assert state <= report.arguments <= state + 200_000
    # Training scans the layers; a stream runs them in a row, so that its collectives stand outside of loops.
    where, least = ("count_once", RECIPE.student.num_layers) if stage == "stream" else ("count", 1)
    assert {kind for kind, entry in report.collectives.items() if entry[where] >= least} >= {"all-gather", "all-to-all"}
    assert report.quick == quick and ("compiled quickly in" if quick else "compiled in") in compile_report.table(report)


@pytest.mark.parametrize("linear", ["dtype", "int8"])
def test_a_stream_has_the_parameter_types_of_a_sampler(linear):
    """Only kernels are in the compute type; biases, norms and the time embedding stay float32, as they are loaded."""
    recipe = with_mesh()
    net = dataclasses.replace(recipe.student, dtype="bfloat16", linear=linear)
    recipe = dataclasses.replace(recipe, student=net)
    machine = topology.parse("h100:8")
    _, (params, *_) = compile_report.program(recipe, "stream", make_mesh(recipe.parallel, jax.devices()))
    loaded = transformer.inference(net, unstacked=True)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), loaded)
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(params))
    assert estimate.estimate(recipe, "stream", machine).parts["parameters"] == held


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("offload", [False, True])
def test_real_compilers(name, offload):
    if importlib.util.find_spec(INSTALLED[name]) is None:
        pytest.skip(f"{INSTALLED[name]} is not installed: no compiler for {name}")
    recipe = with_mesh(offload_optimizer=offload)
    recipe = dataclasses.replace(recipe, teacher=dataclasses.replace(recipe.teacher, remat="attention"))
    report = compile_report.compile_for(recipe, "teacher", topology.describe(name))
    assert report.fits and report.devices == 4
    moments = compile_report.estimate_for(with_mesh(), "teacher", topology.parse(name)).parts["moments"]
    assert report.host >= moments * 0.99 if offload else report.host == 0
    if name.startswith("h100"):  # a TPU would fill tiny arrays up to whole tiles
        state = sum(report.parts.get(part, 0) for part in ("parameters", "running mean", "moments"))
        assert state <= report.arguments <= state + 20_000  # with the batch; offloaded moments are no part of them


@pytest.mark.parametrize("name", INSTALLED)
def test_real_compilers_of_a_stream(name):
    if importlib.util.find_spec(INSTALLED[name]) is None:
        pytest.skip(f"{INSTALLED[name]} is not installed: no compiler for {name}")
    report = compile_report.compile_for(with_mesh(), "stream", topology.describe(name), quick=True)
    assert report.fits and report.quick and report.streams == 2
    assert report.collectives["all-to-all"]["count_once"] >= RECIPE.student.num_layers


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason="no compiler for h100")
def test_a_split_step_gathers_no_activations_and_repeats_no_attention():
    """Tokens over two devices: no all-gather, since every device sums its part of a weight's gradient; one forward call
    of cuDNN for self-attention and one for the text, since remat keeps their results."""
    small = {"num_layers": 2, "dim": 256, "num_heads": 4, "ffn_dim": 512}
    recipe = load_recipe("wan_1_3b")
    recipe = dataclasses.replace(
        recipe,
        teacher=dataclasses.replace(recipe.teacher, **small, remat="attention"),
        student=dataclasses.replace(recipe.student, **small),
        train_teacher=dataclasses.replace(recipe.train_teacher, batch_size=2, accumulate=1),
        parallel=ParallelConfig(data=2, context=2),
    )
    machine = topology.describe("h100:4")
    mesh = make_mesh(recipe.parallel, machine.devices)
    function, arguments = compile_report.program(recipe, "teacher", mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), jax.default_matmul_precision("default"):
        text = function.lower(*arguments).compile({"xla_gpu_enable_triton_gemm": False}).as_text()
    kinds = hlo.totals(text)
    assert "all-gather" not in kinds and kinds["all-to-all"]["count"] > 0
    assert (text.count('"__cudnn$fmhaSoftmax"'), text.count('"__cudnn$fmhaSoftmaxBackward"')) == (2, 2)
