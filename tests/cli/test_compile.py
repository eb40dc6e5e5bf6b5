"""``causvid compile``: what it says and its status, by computation (the compilers: analysis/test_compile_report.py)."""

import pytest

from causvid_jax.cli import common


@pytest.fixture
def compile_for(capsys):
    """Return ``compile_for(config, topology, *flags)``, which returns status, what is said and what is advised."""

    def run(config, topology, *flags):
        status = 0
        try:
            common.run("compile", [f"--config={config}", f"--topology={topology}", "--stage=distill", *flags])
        except SystemExit as ended:
            status = ended.code
        return status, *capsys.readouterr()

    return run


def test_without_a_mesh_the_machine_gets_one_and_its_flags_give_the_same(compile_for):
    status, told, _ = compile_for("wan_14b", "v5p:4x4x4", "--estimate")
    assert status == 0 and "v5p:4x4x4: 64 devices, mesh " in told and ": fits" in told
    first, *rest = told.splitlines()
    said, flags = first.split(" is: ")
    assert said == "no mesh is given; by estimate the fastest mesh that fits v5p:4x4x4" and flags
    status, again, _ = compile_for("wan_14b", "v5p:4x4x4", "--estimate", *flags.split())
    assert status == 0 and again.splitlines() == rest


@pytest.mark.parametrize(
    "topology,flags,advice",
    [
        ("h200:8", ("--config.parallel.fsdp=8",), "what should make it fit ("),
        ("h100:1", (), "no mesh, remat policy or offload should make it fit"),
        ("h100:2", (), "no mesh, remat policy or offload should make it fit"),
    ],
)
def test_what_does_not_fit_has_status_1_and_advice(compile_for, topology, flags, advice):
    status, _, told = compile_for("wan_14b", topology, "--estimate", *flags)
    assert status == 1 and advice in told


def test_a_mesh_that_is_not_the_machines_is_refused(compile_for):
    status, _, told = compile_for("wan_14b", "v5p:4x4x4", "--estimate", "--config.parallel.fsdp=8")
    assert status == 2 and "64 devices per slice need a product of 64 (data 8 fits)" in told
