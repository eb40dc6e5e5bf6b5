"""``dtype="auto"``: what each machine gets, where the type is recorded, and what a resumed run says."""

import json
import logging

import pytest

from causvid_jax.config import ConfigError, changed_fields, from_config_dict, from_json, machine, to_json
from causvid_jax.config.recipes import override
from tests import tiny_config


@pytest.fixture
def on(monkeypatch):
    """Return a function that sets what the machine has."""

    def units(device, has_units):
        machine.auto_dtype.cache_clear()
        monkeypatch.setattr(machine, "units", lambda _: (device, has_units))

    yield units
    machine.auto_dtype.cache_clear()


@pytest.mark.parametrize(
    "platforms,installed,files,flags,expected",
    [
        ("", (), (), "fpu avx512f", ("CPU", False)),
        ("", (), (), "fpu avx512f avx512_bf16", ("CPU", True)),
        ("", (), (), "amx_bf16", ("CPU", True)),
        ("", (), (), None, ("CPU", False)),
        ("", ("jax_cuda12_plugin",), ("dev/nvidia0",), "fpu", ("GPU", True)),
        ("", (), ("dev/nvidia0",), "fpu", ("CPU", False)),  # JAX has no plugin for it
        ("", ("jax_cuda12_plugin", "libtpu"), (), "fpu", ("CPU", False)),  # plugins without a device
        ("", ("libtpu",), ("dev/vfio/0",), "fpu", ("TPU", True)),
        ("cpu", ("libtpu",), ("dev/vfio/0",), "fpu", ("CPU", False)),
        ("cuda,cpu", (), (), "fpu", ("GPU", True)),
    ],
)
def test_units_of_a_machine(platforms, installed, files, flags, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_installed", lambda *modules: not set(modules).isdisjoint(installed))
    for file in (*files, *(("proc/cpuinfo",) if flags is not None else ())):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(f"model name : any\nflags\t\t: {flags}\n")
    assert machine.units(platforms, tmp_path) == expected


@pytest.mark.parametrize("has_units,dtype", [(True, "bfloat16"), (False, "float32")])
def test_a_recipe_holds_the_type_and_the_log_names_the_machine(on, has_units, dtype, caplog):
    on("CPU", has_units)
    values = tiny_config.get_config()
    values.student.dtype = values.vae.dtype = "auto"
    with caplog.at_level(logging.INFO, "absl"):
        recipe = from_config_dict(values)
    assert (recipe.student.dtype, recipe.vae.dtype, recipe.taehv.dtype) == (dtype, dtype, "float32")
    (record,) = caplog.records
    word = "has" if has_units else "has no"
    assert record.getMessage() == f"dtype 'auto' is {dtype} on this machine: its CPU {word} units for bfloat16."
    assert json.loads(to_json(recipe))["student"]["dtype"] == dtype and from_json(to_json(recipe)) == recipe
    assert override(recipe, {"teacher.dtype": "auto"}).teacher.dtype == dtype
    with pytest.raises(ConfigError, match="vae.dtype is 'auto'; accepted: 'float32', 'bfloat16'"):  # files name a type
        from_json(to_json(recipe).replace(f'"dtype": "{dtype}"', '"dtype": "auto"'))


def test_a_run_that_continues_on_another_machine_says_so(on):
    values = tiny_config.get_config()
    values.student.dtype = "auto"  # and the teacher's, since they are one group in that file
    recipes = []
    for has_units in (True, False):
        on("CPU", has_units)
        recipes.append(to_json(from_config_dict(values)))
    changes = changed_fields(*map(json.loads, recipes)).values()
    assert list(changes) == [f"{role}.dtype 'bfloat16', now 'float32'" for role in ("teacher", "student")]
