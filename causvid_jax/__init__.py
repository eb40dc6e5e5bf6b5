"""Causal, few-step video diffusion in JAX: a reimplementation of CausVid (arXiv 2412.07772).

    import causvid_jax as cv

    pipe = cv.load("digits")
    state = pipe.stream("a red 3 moving left", seed=0)
    for frames, state in pipe.frames(state, blocks=20):
        ...
    state = pipe.switch(state, "a blue 7 moving up")

Names load when they are first used, so the import itself is fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from causvid_jax.config import ConfigError as ConfigError
    from causvid_jax.config import Recipe as Recipe
    from causvid_jax.config import RunError as RunError
    from causvid_jax.config.recipes import load_recipe as load_recipe
    from causvid_jax.diffusion.guidance import guided_velocity as guided_velocity
    from causvid_jax.diffusion.solvers import euler as euler
    from causvid_jax.diffusion.solvers import unipc as unipc
    from causvid_jax.distill.dmd import critic_loss as critic_loss
    from causvid_jax.distill.dmd import generator_loss as generator_loss
    from causvid_jax.distill.ode_regression import ode_regression_loss as ode_regression_loss
    from causvid_jax.media import read_video as read_video
    from causvid_jax.media import write_video as write_video
    from causvid_jax.sampling.pipeline import StudentPipeline as StudentPipeline
    from causvid_jax.sampling.pipeline import TeacherPipeline as TeacherPipeline
    from causvid_jax.sampling.pipeline import load as load
    from causvid_jax.sampling.pipeline import load_teacher as load_teacher
    from causvid_jax.sampling.request import SampleRequest as SampleRequest
    from causvid_jax.sampling.state import StreamState as StreamState
    from causvid_jax.sampling.state import init_stream as init_stream
    from causvid_jax.sampling.state_io import load_stream as load_stream
    from causvid_jax.sampling.state_io import save_stream as save_stream
    from causvid_jax.sampling.stream import append as append
    from causvid_jax.sampling.stream import change_prompt as change_prompt
    from causvid_jax.sampling.stream import encode_image as encode_image
    from causvid_jax.sampling.stream import generate as generate
    from causvid_jax.sampling.stream import next_block as next_block
    from causvid_jax.sampling.stream import next_block_from as next_block_from
    from causvid_jax.sampling.stream import next_frames as next_frames
    from causvid_jax.sampling.teacher import sample_clip as sample_clip

_HOMES = {
    "config": ("Recipe", "ConfigError", "RunError"),
    "config.recipes": ("load_recipe",),
    "media": ("read_video", "write_video"),
    "diffusion.guidance": ("guided_velocity",),
    "diffusion.solvers": ("euler", "unipc"),
    "distill.dmd": ("generator_loss", "critic_loss"),
    "distill.ode_regression": ("ode_regression_loss",),
    "sampling.pipeline": ("load", "load_teacher", "StudentPipeline", "TeacherPipeline"),
    "sampling.request": ("SampleRequest",),
    "sampling.stream": (
        "next_block",
        "next_frames",
        "next_block_from",
        "append",
        "encode_image",
        "change_prompt",
        "generate",
    ),
    "sampling.state": ("StreamState", "init_stream"),
    "sampling.state_io": ("save_stream", "load_stream"),
    "sampling.teacher": ("sample_clip",),
}
_MODULE_OF = {name: f"causvid_jax.{module}" for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'causvid_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
