"""The script of a film: recipe, weights, seed and the events at its blocks, stored as JSON.

Noise is a function of (seed, block). A script therefore reproduces the same frames bit for bit on the same kind of
device.
"""

import base64
import binascii
import dataclasses
import io
import json
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

import av
import numpy as np
from PIL import Image

from causvid_jax.config import ConfigError, Recipe, require
from causvid_jax.media.pixels import MAX_PIXELS

VERSION = 1
Context = Literal["keep", "recompute", "reset"]
CONTEXTS: tuple[str, ...] = get_args(Context)
MOST_EVENTS = 100_000
MOST_BLEND = 64
MOST_INPUT = 2**22
"""Maximum characters of pictures and video in a script. A film with more input cannot be replayed."""


@dataclasses.dataclass(frozen=True)
class Event:
    """An event that takes effect at a block.

    Attributes:
        block: counted from 0.
        prompt: the new prompt; None keeps it.
        context: ``keep``, ``recompute`` or ``reset`` (a cut) the context at a new prompt.
        blend: number of blocks over which the embeddings change to those of the prompt; 0: at once.
        frames: input of this block, of :func:`pack`: a picture to start from, or video to follow.
        strength: distance from the video, up to 1; None: ``frames`` is a picture.

    Raises:
        ConfigError: a value out of bounds, or neither a prompt nor frames.
    """

    block: int
    prompt: str | None = None
    context: str = "reset"
    blend: int = 0
    frames: str | None = None
    strength: float | None = None

    def __post_init__(self) -> None:
        require(self.block >= 0, f"an event is at block {self.block}; accepted: from 0")
        require(self.context in CONTEXTS, f"context is {self.context!r}; accepted: {', '.join(CONTEXTS)}")
        require(0 <= self.blend <= MOST_BLEND, f"blend is {self.blend} blocks; accepted: 0 to {MOST_BLEND}")
        require(self.prompt is not None or self.frames is not None, "an event has neither a prompt nor frames")


@dataclasses.dataclass(frozen=True)
class Script:
    """A film from its seed to its last block.

    Attributes:
        recipe: name of the recipe.
        weights: checksum of student and decoders.
        seed: of the noise.
        events: in the order of their blocks; the first is at block 0 and has the prompt.
        first: first block that a recording shows.
        blocks: number of blocks from the start of the film.
        latents: maximum latent frames, for a recipe without a window.
        length: number of pixel frames that a recording shows; None: those of all its blocks.
        size: ``WIDTHxHEIGHT`` of the frames; "" if it is not known, in scripts of older versions.
        fps: frames per second; None if it is not known.
        complete: False if inputs were too large to be stored.
        sha256: of the uint8 frames from block ``first`` to the end; "" if it is not known.

    Raises:
        ConfigError: another version, a value out of bounds, or events that are out of order or do not start with a
            prompt at block 0.
    """

    recipe: str
    weights: str
    seed: int
    events: tuple[Event, ...] = ()
    first: int = 0
    blocks: int = 0
    latents: int | None = None
    length: int | None = None
    size: str = ""
    fps: float | None = None
    complete: bool = True
    sha256: str = ""
    version: int = VERSION

    def __post_init__(self) -> None:
        require(self.version == VERSION, f"a script of version {self.version}; this program reads version {VERSION}")
        require(0 <= self.seed < 2**32, f"seed is {self.seed}; accepted: 0 to {2**32 - 1}")
        require(0 <= self.first <= self.blocks, f"a film of {self.blocks} blocks cannot start at block {self.first}")
        require(len(self.events) <= MOST_EVENTS, f"a script of {len(self.events)} events; accepted: {MOST_EVENTS}")
        require(
            bool(self.events) and self.events[0].block == 0 and self.events[0].prompt is not None,
            "a script starts with an event at block 0 that has a prompt",
        )
        blocks = [event.block for event in self.events]
        require(blocks == sorted(blocks), "the events of a script are not in the order of their blocks")

    def to_json(self) -> str:
        """Return the script as JSON on one line, without fields that have their default."""
        return json.dumps(_plain(self), separators=(",", ":"))


def size_of(recipe: Recipe) -> str:
    """Return ``WIDTHxHEIGHT`` of a recipe's frames."""
    return f"{recipe.video.width}x{recipe.video.height}"


def _plain(value: Script | Event) -> dict[str, Any]:
    fields = dataclasses.fields(value)
    result = {field.name: getattr(value, field.name) for field in fields if field.name != "events"}
    defaults = {field.name: field.default for field in fields if field.name != "version"}
    result = {name: item for name, item in result.items() if item != defaults.get(name, dataclasses.MISSING)}
    if isinstance(value, Script):
        result["events"] = [_plain(event) for event in value.events]
    return result


def from_json(text: str | Mapping[str, Any]) -> Script:
    """Return the script of the JSON text of :meth:`Script.to_json`, or of the same values as a mapping.

    Raises:
        ConfigError: not a script.
    """
    try:
        values = dict(json.loads(text) if isinstance(text, str) else text)
        events = tuple(_typed(Event, dict(event)) for event in values.pop("events"))
        return _typed(Script, {**values, "events": events})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"this is no script of a film ({error})") from error


_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("block", "blend", "seed", "first", "blocks", "version"), (int,)),
    **dict.fromkeys(("latents", "length"), (int, type(None))),
    **dict.fromkeys(("context", "recipe", "weights", "size", "sha256"), (str,)),
    **dict.fromkeys(("prompt", "frames"), (str, type(None))),
    **dict.fromkeys(("strength", "fps"), (int, float, type(None))),
    "complete": (bool,),
    "events": (tuple,),
}


def _typed(cls: Any, values: dict[str, Any]) -> Any:
    """Return ``cls(**values)`` after a check of every value's type."""
    fields = {field.name for field in dataclasses.fields(cls)}
    for name, value in values.items():
        require(name in fields, f"a script has no field {name!r}")
        fits = isinstance(value, _KINDS[name]) and (not isinstance(value, bool) or name == "complete")
        require(fits, f"field {name!r} of a script is {value!r}")
    return cls(**values)


# ---- pictures inside a script ---------------------------------------------------------------------------------------


def pack(frames: np.ndarray) -> str:
    """Return uint8 frames ``[T, H, W, 3]`` as text: a PNG of all frames below each other, in base64."""
    file = io.BytesIO()
    Image.fromarray(frames.reshape(-1, *frames.shape[2:])).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def unpack(text: str, height: int) -> np.ndarray:
    """Return the frames uint8 ``[T, height, W, 3]`` of a text of :func:`pack`.

    Raises:
        ConfigError: a text that is damaged or too large, or frames of another height.
    """
    require(len(text) <= MOST_INPUT, "the frames in a script are too large")
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("PNG",)) as image:
            require(image.width * image.height <= MAX_PIXELS, "the frames in a script are too large")
            pixels = np.asarray(image.convert("RGB"), np.uint8)
    except (OSError, ValueError, SyntaxError, binascii.Error, zlib.error, Image.DecompressionBombError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError("the frames in a script are damaged") from error
    require(len(pixels) % height == 0, f"the frames in a script are not {height} pixels high")
    return pixels.reshape(-1, height, *pixels.shape[1:])


# ---- in files -------------------------------------------------------------------------------------------------------

KEY = "comment"
"""The metadata of a video that holds its script; every container has it."""


def read_script(path: str | pathlib.Path) -> Script:
    """Return the script in the metadata of a video that this package made.

    Raises:
        ConfigError: no such file, no video, or a video without a script.
    """
    path = pathlib.Path(path)
    require(path.is_file(), f"video {str(path)!r} does not exist")
    options = {"protocol_whitelist": "file", "format_whitelist": "mov,mp4"}
    try:
        with av.open(f"file:{path.absolute()}", container_options=options) as container:
            text = container.metadata.get(KEY, "")
    except (OSError, ValueError, av.FFmpegError) as error:
        raise ConfigError(f"cannot read video {str(path)!r}: it is not an MP4 or it is damaged") from error
    require(text.startswith("{"), f"video {str(path)!r} holds no script, so it cannot be replayed")
    return from_json(text)
