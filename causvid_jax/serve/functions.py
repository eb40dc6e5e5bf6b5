"""The functions of a stream that a server runs, with the shapes of their arguments.

Shapes do not depend on weights, so functions compile while the weights are read. ``causvid compile --stage=serve``
writes the same functions to a file, traced and compiled.
"""

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from causvid_jax.config import Recipe, require
from causvid_jax.models import vae
from causvid_jax.models.image_branch import has_branch
from causvid_jax.sampling import exported, stream, weights
from causvid_jax.sampling.pipeline import encode_chunk
from causvid_jax.sampling.script import CONTEXTS

ENCODING = ("encode_image", "append", "encode_first", "encode_next", "follow", "decode_block")
"""Functions for pictures and videos, which need the VAE's encoder."""


@dataclasses.dataclass(frozen=True)
class Function:
    """A jitted function of parameters and arrays.

    Attributes:
        function: with static keyword arguments.
        static: the static arguments.
        reads: names of the networks, for a dict of their parameters; or one name, for the tree of that network.
        shapes: of the arrays after the parameters; empty if they are not known in advance.
    """

    function: Any
    static: Mapping[str, Any]
    reads: tuple[str, ...] | str
    shapes: tuple[Any, ...] = ()

    def of(self, params: Mapping[str, Any]) -> Any:
        """Return the parameters that the function takes, from all parameters ``{network: tree}``."""
        return params[self.reads] if isinstance(self.reads, str) else {name: params[name] for name in self.reads}

    def __call__(self, params: Any, *arrays: Any) -> Any:
        """Run it; ``params`` are those of :meth:`of`."""
        return self.function(params, *arrays, **self.static)

    def lower(self, params: Any, *arrays: Any) -> Any:
        """Trace and lower it."""
        return self.function.lower(params, *arrays, **self.static)


def with_context(recipe: Recipe, context: Any) -> Recipe:
    """Return the recipe with another ``causal.on_prompt_switch``."""
    return dataclasses.replace(recipe, causal=dataclasses.replace(recipe.causal, on_prompt_switch=context))


def functions(recipe: Recipe) -> dict[str, Function]:
    """Return every function of a server by name, without shapes. Blocks are decoded as after a reset.

    ``change_prompt_keep``, ``change_prompt_recompute`` and ``change_prompt_reset`` differ in their effect on the cache.
    """
    play = with_context(recipe, "reset")
    still, codec = {"config": play}, recipe.decoder
    changes = {
        f"change_prompt_{context}": Function(
            stream.change_prompt, {"config": with_context(recipe, context)}, ("student",)
        )
        for context in CONTEXTS
    }
    return {
        "start": Function(stream.first_state, still | {"capacity": stream.capacity_of(recipe)}, ("student",)),
        "next_frames": Function(stream.next_frames, still, ("student", codec)),
        **changes,
        "encode_image": Function(stream.encode_image, still, ("vae",)),
        "append": Function(stream.append, still, ("student",)),
        "encode_first": Function(encode_chunk, {"config": recipe.vae, "first": True}, "vae"),
        "encode_next": Function(encode_chunk, {"config": recipe.vae, "first": False}, "vae"),
        "follow": Function(stream.next_block_from, still, ("student",)),
        "decode_block": Function(stream.decode_block, still, (codec,)),
    }


def has_fixed_shapes(recipe: Recipe) -> bool:
    """Return whether every function of a stream has only one shape, which is known without weights.

    This needs a window, blocks of one size, and no image branch, because its picture has the shape of CLIP's tokens.
    """
    endless = bool(recipe.causal.window) and not recipe.causal.independent_first_frame
    return endless and not has_branch(recipe.student)


def shaped(recipe: Recipe) -> dict[str, Function]:
    """Return :func:`functions` with the shapes of one stream.

    Raises:
        ConfigError: some have several shapes.
    """
    require(
        has_fixed_shapes(recipe),
        f"recipe {recipe.name!r} has streams of changing shapes, or from pictures; accepted: causal.window, no "
        "causal.independent_first_frame, and a student without an image branch",
    )
    every, params = functions(recipe), weights.stream_shapes(recipe, encodes=True)
    video, k = recipe.video, recipe.causal.frames_per_block
    text = jax.ShapeDtypeStruct((1, recipe.text.length, recipe.text.dim), jnp.float32)
    seeds, step = jax.ShapeDtypeStruct((1,), jnp.uint32), jax.ShapeDtypeStruct((), jnp.int32)
    start = every["start"]
    state = jax.eval_shape(functools.partial(start.function, **start.static), start.of(params), text, seeds)
    size = {"batch": 1, "height": video.height, "width": video.width}
    coder = jax.eval_shape(functools.partial(vae.init_encode_cache, recipe.vae, **size))
    latents = jax.ShapeDtypeStruct((1, k, *recipe.latent_size, recipe.vae.z_dim), jnp.float32)

    def frames(count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, count, video.height, video.width, 3), jnp.float32)

    factor = vae.time_factor(recipe.vae)
    shapes: dict[str, tuple[Any, ...]] = {
        "start": (text, seeds),
        "next_frames": (state,),
        "encode_image": (jax.ShapeDtypeStruct((1, video.height, video.width, 3), jnp.float32),),
        "append": (state, latents),
        "encode_first": (frames(1 + factor * (k - 1)), coder),
        "encode_next": (frames(factor * k), coder),
        "follow": (state, latents, step),
        "decode_block": (state, latents),
        **{f"change_prompt_{context}": (state, text) for context in CONTEXTS},
    }
    return {name: dataclasses.replace(each, shapes=shapes[name]) for name, each in every.items()}


# ---- compiled beforehand --------------------------------------------------------------------------------------------


def build(recipe: Recipe, platform: str) -> tuple[dict[str, Any], dict[str, export.Exported]]:
    """Return header and programs of a server for one device of ``platform``, for ``sampling.exported.save``.

    Raises:
        ConfigError: as :func:`causvid_jax.sampling.exported.build` and :func:`shaped`.
    """
    params = weights.stream_shapes(recipe, encodes=True)

    def calls() -> dict[str, Any]:
        return {name: (each, each.of(params), *each.shapes) for name, each in shaped(recipe).items()}

    return exported.build_calls(recipe, platform, calls, batch=1, capacity=None)


def load(path: str | os.PathLike, recipe: Recipe) -> exported.Programs:
    """Return the programs of a file that :func:`build` made for this recipe and platform.

    Raises:
        ConfigError: as :func:`causvid_jax.sampling.exported.load`.
    """
    params = weights.stream_shapes(recipe, encodes=True)
    arguments = {name: (each.of(params), *each.shapes) for name, each in shaped(recipe).items()}
    return exported.open_programs(path, recipe, arguments, batch=1, latents=1)


def compile_all(
    recipe: Recipe, encodes: bool, loaded: exported.Programs | None, pool: concurrent.futures.Executor
) -> Callable[[], dict[str, Callable[..., Any]]]:
    """Start to compile a server's functions in the threads of ``pool``; the result waits for them.

    Args:
        recipe: of the networks.
        encodes: whether the functions of :data:`ENCODING` are needed.
        loaded: programs to compile instead of tracing the model.
        pool: threads. Python traces one function at a time; XLA and the compilation cache run in parallel.
    """
    params, waiting = weights.stream_shapes(recipe, encodes=True), {}
    # Start with the longest compilations.
    for name, each in sorted(shaped(recipe).items(), key=lambda item: item[0] not in ("next_frames", "follow")):
        if encodes or name not in ENCODING:
            jitted = each if loaded is None else loaded.jitted(name)
            waiting[name] = pool.submit(_compile, jitted, each.of(params), *each.shapes)
    return lambda: {name: future.result() for name, future in waiting.items()}


def _compile(jitted: Any, *shapes: Any) -> Callable[..., Any]:
    return jitted.lower(*shapes).compile()
