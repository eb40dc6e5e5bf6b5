"""Export a stream's programs to one file: lowered for a platform and a shape, they run without tracing the model.

A file holds the programs that :mod:`causvid_jax.sampling.player` needs for text to video and prompt switches, as
versioned StableHLO (``jax.export``). Its header holds every setting of the recipe that the programs depend on, the
number of parallel streams, and the platform. The file is a zip archive of ``header.json`` and one entry per program. If
the file was built on the platform that it is for, it also holds the compiled executables. On an equal machine
(:func:`machine`) these are copied to JAX's compilation cache; on others XLA compiles the programs once.

A file is bound to the recipe, the version of this package and its own checksums: damaged or unsuitable files are
refused. The checksums do not prove who made a file, so run only files that you trust, as with code.

| program | reads | gives |
|---|---|---|
| ``start`` | params, text ``[B, S, E]``, seeds ``[B]`` | state |
| ``next_frames`` | params, state | latents ``[B, K, h, w, C]``, frames ``[B, 4K, H, W, 3]``, state |
| ``first_frames``, where the first frame is independent | the same | the same of one latent frame |
| ``change_prompt`` | params, state, text | state |

Reference: JAX's export documentation. Later versions of JAX can read an artifact for at least six months.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import export
from jax.experimental.compilation_cache import compilation_cache

from causvid_jax import __version__
from causvid_jax.config import ConfigError, Recipe, require
from causvid_jax.config.files import atomic, format_bytes, reason
from causvid_jax.models import attention, kv_cache, taehv, vae
from causvid_jax.sampling import stream, weights
from causvid_jax.sharding import constraints

FORMAT = 5
PLATFORMS = ("cpu", "cuda", "tpu")
SUFFIX = ".program"
ENTRY = ".stablehlo"
EXECUTABLE = "-cache"
_EXECUTABLE = re.compile(r"[\w.-]{1,200}-cache", re.ASCII)
HEADER_BYTES, ENTRY_BYTES = 2**24, 2**31
"""The largest header, and the largest program, in bytes."""
FIELDS: Mapping[str, Any] = {
    "version": str, "platform": str, "streams": int, "frames": (int, type(None)), "jax": str, "recipe": dict,
    "machine": str, "sha256": dict, "checksum": str,
}  # fmt: skip
"""Fields of the header that are read, and their types."""
_CUSTOM_CALLS = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaScaleBiasSoftmax", "tpu_custom_call")
_ELSEWHERE = {
    "student": ("remat", "rules"),  # of training, of meshes
    "diffusion": ("num_inference_steps", "solver", "guidance_scale", "guidance_interval", "guidance_eta"),
    "video": ("fps",),
    "text": ("kind", "vocabulary", "negative_prompt"),
}
"""Fields of a recipe's groups that do not change a program."""


def _register() -> None:
    """Register the state of a stream for export; its static field is part of the serialized name."""
    nodes = {
        "KVCache": kv_cache.KVCache,
        "TextCache": kv_cache.TextCache,
        "VAEDecodeCache": vae.DecodeCache,
        "VAEEncodeCache": vae.EncodeCache,
        "TAEHVDecodeCache": taehv.DecodeCache,
        "StreamState": stream.StreamState,
    }
    for name, node in nodes.items():
        export.register_pytree_node_serialization(
            node,
            serialized_name=f"causvid_jax.{name}",
            serialize_auxdata=lambda static: json.dumps(static).encode(),
            deserialize_auxdata=lambda data: tuple(json.loads(bytes(data))),
        )


_register()


def name_of(function: Any, started: bool) -> str:
    """Return the name of the program of ``stream.next_frames`` or ``stream.change_prompt``.

    ``started`` is that of the state: False if an independent first frame is next.
    """
    names = {
        stream.next_frames: "next_frames" if started else "first_frames",
        stream.change_prompt: "change_prompt",
    }
    return names[function]


# ---- what a program is built for ------------------------------------------------------------------------------------


def identity(recipe: Recipe) -> dict[str, Any]:
    """Return every setting of ``recipe`` that a stream's programs depend on, as JSON values."""
    groups = ["video", "text", "vae", "student", "causal", "diffusion"]
    groups += ["taehv"] if recipe.decoder == "taehv" else []
    settings: dict[str, Any] = {"decoder": recipe.decoder}
    for group in groups:
        values = dataclasses.asdict(getattr(recipe, group))
        settings[group] = {name: value for name, value in values.items() if name not in _ELSEWHERE.get(group, ())}
    if recipe.decoder == "taehv":  # programs depend on the shape of the VAE's latents only
        settings["vae"] = {name: settings["vae"][name] for name in ("z_dim", "temporal_downsample")}
    return json.loads(json.dumps(settings))


def _difference(have: Mapping[str, Any], want: Mapping[str, Any], path: str = "") -> str:
    """Describe the first setting in which two identities differ; "" if they are equal."""
    for name in [*want, *(name for name in have if name not in want)]:
        a, b, where = have.get(name), want.get(name), f"{path}{name}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            inner = _difference(a, b, f"{where}.")
            if inner:
                return inner
        elif a != b:
            return f"{where} = {a!r}, and the recipe has {b!r}"
    return ""


def this_platform() -> str:
    """Return the platform of this process's default device, one of :data:`PLATFORMS`."""
    name = jax.default_backend()
    return "cuda" if name == "gpu" else name


# ---- building -------------------------------------------------------------------------------------------------------


def _start_arguments(recipe: Recipe, batch: int) -> tuple[dict[str, Any], jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Return the shapes of the arguments of the program ``start``: params, prompt embeddings and seeds."""
    embeds = jax.ShapeDtypeStruct((batch, recipe.text.length, recipe.text.dim), jnp.float32)
    return weights.stream_shapes(recipe), embeds, jax.ShapeDtypeStruct((batch,), jnp.uint32)


def build(recipe: Recipe, platform: str, *, batch: int = 1) -> tuple[dict[str, Any], dict[str, export.Exported]]:
    """Return (header, programs by name) of ``recipe``'s stream on one device of ``platform``.

    The vectors that normalise latents are constants of the programs: ``recipe.vae`` must have those of the VAE.

    Args:
        recipe: with a window, or with the maximum length of the streams.
        platform: one of :data:`PLATFORMS`; cuDNN's kernels can be lowered only where cuDNN is installed.
        batch: streams side by side.

    Raises:
        ConfigError: an unknown platform, fewer than one stream, or a kernel that cannot be lowered here.
    """
    require(batch >= 1, f"batch is {batch}; it must be at least 1")
    capacity = stream.capacity_of(recipe)
    params, embeds, seeds = _start_arguments(recipe, batch)

    def of(function: Callable[..., Any]) -> Any:
        return jax.jit(functools.partial(function, config=recipe))

    def calls() -> dict[str, tuple[Any, ...]]:
        start = functools.partial(stream.first_state, config=recipe, capacity=capacity)
        state = jax.eval_shape(start, params, embeds, seeds)
        result: dict[str, tuple[Any, ...]] = {"start": (jax.jit(start), params, embeds, seeds)}
        if not state.started:
            result["first_frames"] = of(stream.next_frames), params, state
            state = dataclasses.replace(state, started=True)
        result["next_frames"] = of(stream.next_frames), params, state
        result["change_prompt"] = of(stream.change_prompt), params, state, embeds
        return result

    return build_calls(recipe, platform, calls, batch=batch, capacity=capacity)


def build_calls(
    recipe: Recipe,
    platform: str,
    calls: Callable[[], Mapping[str, tuple[Any, ...]]],
    *,
    batch: int,
    capacity: int | None,
) -> tuple[dict[str, Any], dict[str, export.Exported]]:
    """Lower functions ``{name: (jitted, *shapes of its arguments)}`` for a platform; return header and programs.

    ``calls`` returns these functions. The shapes are made for the platform, because the form of a cache depends on it.
    ``batch`` streams and at most ``capacity`` latent frames (None: no end) are only noted in the header.

    Raises:
        ConfigError: an unknown platform, or a kernel that cannot be lowered here.
    """
    require(platform in PLATFORMS, f"platform is {platform!r}; accepted: {', '.join(PLATFORMS)}")
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in _CUSTOM_CALLS]
    programs: dict[str, export.Exported] = {}
    with constraints.lowering_for(platform):
        kernel = attention.resolve(recipe.student.attention, recipe.student.dtype)
        try:
            for name, (function, *shapes) in calls().items():
                jitted = jax.jit(lambda *arrays, function=function: function(*arrays))
                programs[name] = export.export(jitted, platforms=[platform], disabled_checks=checks)(*shapes)
        except RuntimeError as error:
            if "cuDNN" not in str(error):
                raise
            raise ConfigError(
                "attention by cuDNN can be lowered only where cuDNN is installed (extra cuda12 or cuda13), and here it "
                "is not; build on a machine that has it, or use --config.student.attention=xla"
            ) from error
    header = {
        "format": FORMAT,
        "version": __version__,
        "name": recipe.name,
        "platform": platform,
        "streams": batch,
        "frames": capacity,  # latent frames of a stream at most; null: no end
        "attention": kernel,
        "jax": jax.__version__,
        "machine": machine(),
        "calling_convention": programs["start"].calling_convention_version,
        "recipe": identity(recipe),
    }
    return header, programs


def machine() -> str:
    """Return a checksum of the JAX version, devices and processor, on which an executable also depends."""
    device = jax.devices()[0]
    parts = [jax.__version__, jaxlib.__version__, device.platform, device.device_kind, os.environ.get("XLA_FLAGS", "")]
    parts += [getattr(device.client, "platform_version", "")]
    if device.platform == "cpu":
        with contextlib.suppress(OSError):
            lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
            parts += sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))})
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


_SAME_KEYS = {"jax_persistent_cache_enable_xla_caches": "none"}
"""Options with which the names in JAX's compilation cache do not depend on the folder of the cache."""


def compiled(programs: Mapping[str, export.Exported]) -> dict[str, bytes]:
    """Compile programs for this machine; return the entries of JAX's compilation cache for them, by name.

    Save them to a file for this platform. :func:`load` copies them to the cache of an equal machine.
    """
    with tempfile.TemporaryDirectory(prefix="causvid_compiled_") as folder:
        options = {
            "jax_compilation_cache_dir": folder,
            "jax_persistent_cache_min_compile_time_secs": 0.0,
            **_SAME_KEYS,
        }
        before = {name: getattr(jax.config, name) for name in options}
        try:
            for name, value in options.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
            for name, exported in programs.items():
                arguments, keywords = jax.tree.unflatten(exported.in_tree, _shapes(exported.in_avals))
                _jitted(name, exported).lower(*arguments, **keywords).compile()
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
        return {path.name: path.read_bytes() for path in pathlib.Path(folder).glob(f"*{EXECUTABLE}")}


def _shapes(avals: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in avals]


KEEP = ("start", "encode_image", "encode_first", "encode_next")
"""Programs that donate no argument; the others donate the state, their second argument."""


def _jitted(name: str, exported: export.Exported) -> Any:
    return jax.jit(exported.call, donate_argnums=() if name in KEEP else (1,))


def save(
    path: str | os.PathLike,
    header: Mapping[str, Any],
    programs: Mapping[str, export.Exported],
    executables: Mapping[str, bytes] | None = None,
) -> None:
    """Write the result of :func:`build` with its SHA-256 checksums; the file appears complete or not at all.

    ``executables`` are those of :func:`compiled`.
    """
    entries = {f"{name}{ENTRY}": bytes(exported.serialize()) for name, exported in programs.items()}
    write(path, header, entries | dict(executables or {}))


def write(path: str | os.PathLike, header: Mapping[str, Any], entries: Mapping[str, bytes]) -> None:
    """Write a header and serialized programs ``{name: bytes}`` with their SHA-256 checksums."""
    header = {**header, "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in entries.items()}}
    header["checksum"] = _checksum(header)
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("header.json", json.dumps(header, indent=1))
        for name, data in entries.items():
            archive.writestr(name, data)


def _checksum(header: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a header without its own checksum."""
    rest = {name: value for name, value in header.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# ---- running --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Programs:
    """The checked programs of a file, made by :func:`load`."""

    path: pathlib.Path
    header: Mapping[str, Any]
    exported: Mapping[str, export.Exported]

    def jitted(self, name: str) -> Any:
        """Return a program as a jitted function of (params, ...) that donates the state like the sampler's function.

        Raises:
            ConfigError: the file has no such program.
        """
        require(name in self.exported, f"{self.path} has no program {name!r}; it has {', '.join(self.exported)}")
        return _jitted(name, self.exported[name])

    def shapes(self) -> stream.StreamState:
        """Return the first state with the shape and type of every array."""
        first = self.exported["start"]
        return jax.tree.unflatten(first.out_tree, _shapes(first.out_avals))

    def start(self, params: stream.Params, text: jax.Array, seed: int | Sequence[int]) -> stream.StreamState:
        """Return the state before the first block, like :func:`causvid_jax.sampling.state.init_stream`."""
        return self.jitted("start")(params, text, stream.seeds_of(seed, text.shape[0]))


def load(path: str | os.PathLike, recipe: Recipe, *, batch: int, latents: int) -> Programs:
    """Load the programs in ``path`` for ``batch`` streams of ``recipe`` of ``latents`` latent frames, on this platform.

    Raises:
        ConfigError: no such file, a damaged one, or one that was built for other settings; the message names them.
    """
    names = ["start", "next_frames", "change_prompt", *(["first_frames"] * recipe.causal.independent_first_frame)]
    arguments = dict.fromkeys(names) | {"start": _start_arguments(recipe, batch)}
    return open_programs(path, recipe, arguments, batch=batch, latents=latents)


def open_programs(
    path: str | os.PathLike, recipe: Recipe, arguments: Mapping[str, Any], *, batch: int, latents: int
) -> Programs:
    """Return the programs of a file, which must have the names and shapes of ``arguments`` (None: any shapes).

    If the file holds executables for this machine, they are copied to JAX's compilation cache, if that is on.

    Raises:
        ConfigError: as :func:`load`.
    """
    place = pathlib.Path(path)
    require(place.is_file(), f"program {place} does not exist; causvid compile --platform builds one")
    try:
        header, entries = _read(place)
    except _DAMAGE as error:
        raise ConfigError(f"{place} is not a readable program of causvid compile: {reason(error)}") from error
    _check(place, header, recipe, batch=batch, latents=latents)
    programs = {name: data for name, data in entries.items() if name.endswith(ENTRY)}
    require(
        sorted(programs) == sorted(f"{name}{ENTRY}" for name in arguments),
        f"program {place} holds {', '.join(sorted(programs))}; it must hold {', '.join(sorted(arguments))}",
    )
    try:
        exported = {name.removesuffix(ENTRY): export.deserialize(bytearray(x)) for name, x in programs.items()}
    except Exception as error:  # flatbuffers and MLIR raise errors of any type for bytes of another version
        raise ConfigError(
            f"program {place} cannot be read by JAX {jax.__version__}; it was built by {header['jax']}"
        ) from error
    for name, shapes in arguments.items():
        require(
            shapes is None
            or [(x.shape, x.dtype) for x in exported[name].in_avals]
            == [(x.shape, x.dtype) for x in jax.tree.leaves(shapes)],
            f"program {place} does not fit the recipe's weights and prompts; build it again",
        )
    if header["machine"] == machine():
        _fill_cache({name: data for name, data in entries.items() if name.endswith(EXECUTABLE)})
    return Programs(place, header, exported)


def _fill_cache(executables: Mapping[str, bytes]) -> None:
    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    for option, value in _SAME_KEYS.items():
        jax.config.update(option, value)
    for name, data in executables.items() if folder else ():
        target = pathlib.Path(folder) / name
        with contextlib.suppress(OSError):  # without the cache the program is compiled again
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                with atomic(target) as temporary:
                    temporary.write_bytes(data)


_DAMAGE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RuntimeError, RecursionError,
    OverflowError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""Exceptions that reading a damaged archive raises."""


def _read(path: pathlib.Path) -> tuple[Mapping[str, Any], dict[str, bytes]]:
    """Return header and entries of a file whose checksums match; raise one of :data:`_DAMAGE` otherwise."""
    with zipfile.ZipFile(path) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        if sizes["header.json"] > HEADER_BYTES or sum(sizes.values()) > ENTRY_BYTES:
            raise ValueError("its declared size is larger than that of any program")
        header = json.loads(archive.read("header.json"))
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
        if header.get("format") != FORMAT:
            return header, {}  # the caller refuses the format
        for name, kind in FIELDS.items():
            if not isinstance(header[name], kind):
                raise ValueError(f"its header has {name} {header[name]!r}")
        if header["checksum"] != _checksum(header):
            raise ValueError("its header was changed")
        entries = {name: archive.read(name) for name in sizes if name.endswith(ENTRY) or _EXECUTABLE.fullmatch(name)}
    for name, data in entries.items():
        if header["sha256"].get(name) != hashlib.sha256(data).hexdigest():
            raise ValueError(f"its {name} was changed")
    return header, entries


def _check(path: pathlib.Path, header: Mapping[str, Any], recipe: Recipe, *, batch: int, latents: int) -> None:
    version, built = header.get("format"), f"program {path} was built for"
    require(version == FORMAT, f"program {path} is of format {version}; accepted: {FORMAT}; build it again")
    require(
        header["version"] == __version__,
        f"{built} causvid_jax {header['version']}; this is {__version__}: build it again",
    )
    platform = this_platform()
    require(header["platform"] == platform, f"{built} {header['platform']}; this machine is {platform}")
    difference = _difference(header["recipe"], identity(recipe))
    require(not difference, f"{built} {difference}")
    streams, most = header["streams"], header["frames"]
    require(streams == batch, f"{built} {streams} video(s) at once, and {batch} prompt(s) are given")
    require(
        most is None or latents <= most,
        f"{built} at most {most} latent frames, and {latents} are requested; accepted: fewer --frames, or a program "
        "built with more --config.video.frames",
    )


def describe(header: Mapping[str, Any], programs: Mapping[str, export.Exported]) -> str:
    """Return lines of text about a file: its settings, and the number and bytes of each program's inputs."""
    lines = [
        f"{header['name']} for {header['platform']}, {header['streams']} video(s) at once, attention by "
        f"{header['attention']}, JAX {header['jax']}"
    ]
    for name, exported in programs.items():
        inputs = sum(int(np.prod(x.shape, dtype=np.int64)) * x.dtype.itemsize for x in exported.in_avals)
        lines.append(f"  {name}: {len(exported.in_avals)} arrays in ({format_bytes(inputs)})")
    return "\n".join(lines)
