"""A server from a file of compiled programs, and on a mesh, makes the film of one that traces the model."""

import concurrent.futures
import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from causvid_jax.config import ConfigError, ParallelConfig
from causvid_jax.models import decoder, transformer, vae
from causvid_jax.sampling import exported
from causvid_jax.serve import functions
from causvid_jax.serve.film import Film, Replay
from causvid_jax.serve.programs import Programs, open_programs
from causvid_jax.sharding import placement
from causvid_jax.sharding.mesh import make_mesh
from tests.refusals import refused
from tests.serve.conftest import RECIPE
from tests.tiny import tiny_workdir

VIDEO = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)


def film_of(programs):
    """Return a film that runs every function, its frames, and a snapshot before the last two blocks."""
    film = Film(programs, 7, "a red 3 moving left")
    frames = [film.step(VIDEO, None), film.step()]
    for context in ("keep", "recompute", "reset"):
        film.change("a green 7 moving up", context)
        frames.append(film.step())
    kept = film.snapshot()
    frames += [film.step(VIDEO[i:], 0.5) for i in range(2)]
    return film, frames, kept


def test_a_program_starts_without_model_and_compiler(programs, tmp_path, monkeypatch):
    film, frames, _ = film_of(programs)
    header, made = functions.build(programs.recipe, "cpu")
    exported.save(tmp_path / "x.program", header, made, exported.compiled(made))
    for module, name in ((transformer, "cached"), (decoder, "decode_chunk"), (vae, "encode_chunk")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("the model was traced"))
    cache, before = tmp_path / "cache", jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(cache))
        compilation_cache.reset_cache()
        loaded = functions.load(tmp_path / "x.program", programs.recipe)
        filled = {path.name for path in cache.glob("*")}
        assert len(filled) == len(made) == 11
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            compiled = functions.compile_all(programs.recipe, True, loaded, pool)()
        assert {path.name for path in cache.glob("jit_call-*-cache")} == filled  # nothing was compiled
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
    again = Replay(Programs(programs.pipe, programs.weights, compiled=compiled), film.script())
    for expected in frames:
        np.testing.assert_array_equal(again.step(), expected)
    other = dataclasses.replace(programs.recipe, causal=dataclasses.replace(RECIPE.causal, window=3))
    refused("was built for causal.window = 2, and the recipe has 3", functions.load, tmp_path / "x.program", other)
    header["machine"] = "another"
    exported.save(tmp_path / "y.program", header, made, {"jit_call-0-cache": b"not for this machine"})
    functions.load(tmp_path / "y.program", programs.recipe)
    assert not pathlib.Path(before or cache, "jit_call-0-cache").exists()


def test_everything_compiles_beside_the_reading_of_weights(programs, tmp_path):
    film, frames, _ = film_of(programs)
    made = open_programs(RECIPE, str(tiny_workdir(tmp_path, RECIPE)), compiles=True)
    again = Replay(made, dataclasses.replace(film.script(), weights=made.weights))
    for expected in frames:
        np.testing.assert_array_equal(again.step(), expected)
    assert set(made._compiled) == set(functions.functions(RECIPE))


@pytest.mark.usefixtures("compiled_anew")
def test_a_mesh_shows_the_film_of_one_device(programs, tmp_path, monkeypatch):
    """Two pretended devices hold half of the heads each; replay and fork have the same bits there, too."""
    monkeypatch.setattr(placement, "make_mesh", lambda config: make_mesh(config, jax.devices()[:2]))
    recipe = dataclasses.replace(RECIPE, parallel=ParallelConfig(tensor=2))
    with pytest.raises(ConfigError, match="runs on one device"):
        open_programs(recipe, str(tiny_workdir(tmp_path, recipe)), program=tmp_path / "x.program")
    made = open_programs(recipe, str(tmp_path), compiles=True)
    kernel = made.pipe.params["student"]["blocks"][0]["self_attn"]["q"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 2 == kernel.size
    film, frames, kept = film_of(made)
    again = Replay(made, film.script())
    for expected in frames:
        np.testing.assert_array_equal(again.step(), expected)
    fork = kept.fork()
    for i in range(2):
        np.testing.assert_array_equal(fork.step(VIDEO[i:], 0.5), frames[5 + i])
    for ours, one in zip(frames, film_of(programs)[1], strict=True):
        assert np.abs(ours.astype(int) - one).max() <= 2
