"""Messages of the WebSocket ``/v1/stream``, version ``causvid.v1``; docs/serving.md describes them.

A text message is one JSON object. A binary message is a header and a payload: four bytes, the length of the header in
big-endian, then the header as JSON, then the payload. Headers and text messages from the client are the models here.
"""

import json
import struct
from typing import Annotated, Any, Literal

import pydantic

from causvid_jax.config import ConfigError, require
from causvid_jax.sampling.script import MOST_BLEND

SUBPROTOCOL = "causvid.v1"
TOKEN_PREFIX = "token."
"""A browser cannot set headers of a WebSocket, so the token is a second subprotocol, ``token.SECRET``."""
Format = Literal["webp", "mp4", "webrtc"]


class Message(pydantic.BaseModel):
    """A message of the client; unknown fields are refused."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class Start(Message):
    """Start a film: the first message, and later for a new film.

    A film of a ``prompt`` may start from a picture, the payload. A ``script`` or a ``snapshot`` is given alone.
    """

    type: Literal["start"]
    prompt: str = ""
    seed: int = pydantic.Field(0, ge=0, lt=2**32)
    format: Format | None = None
    script: dict[str, Any] | None = None
    snapshot: str | None = pydantic.Field(None, max_length=64)


class Resume(Message):
    """Resume a lost connection: the first message instead of ``start``. ``received`` chunks have arrived."""

    type: Literal["resume"]
    token: str = pydantic.Field(max_length=64)
    received: int = pydantic.Field(ge=0)
    format: Format | None = None


class Prompt(Message):
    """Switch the prompt from the next block on, or over ``blend`` blocks; keep, recompute or reset the ``context``."""

    type: Literal["prompt"]
    prompt: str
    context: Literal["keep", "recompute", "reset"] = "reset"
    blend: int = pydantic.Field(0, ge=0, le=MOST_BLEND)
    id: int = pydantic.Field(0, ge=0, lt=2**53)


class Pull(Message):
    """Allow chunks up to index ``upto``; those below ``received`` have arrived."""

    type: Literal["pull"]
    upto: int = pydantic.Field(ge=0, lt=2**53)
    received: int = pydantic.Field(ge=0, lt=2**53)


class Pause(Message):
    """Pause or resume generation."""

    type: Literal["pause"]
    paused: bool


class Input(Message):
    """A frame of a video to follow at ``strength`` (default: 0.5), as the payload (a picture).

    Without a payload, and then without a ``strength``, the video ends.
    """

    type: Literal["input"]
    strength: float | None = pydantic.Field(None, gt=0, le=1)


class Snapshot(Message):
    """Keep a copy of the film."""

    type: Literal["snapshot"]
    name: int = pydantic.Field(0, ge=0, lt=2**53)


class TellScript(Message):
    """Ask for the script of the film so far."""

    type: Literal["script"]


class Record(Message):
    """Start or finish a recording."""

    type: Literal["record"]
    on: bool


class Stop(Message):
    """End the session."""

    type: Literal["stop"]


class Offer(Message):
    """Body of ``POST /v1/webrtc``: the token of a session that started with the format ``webrtc``, and an SDP offer."""

    session: str = pydantic.Field(max_length=64)
    sdp: str = pydantic.Field(max_length=65536)


Any_ = Annotated[
    Start | Resume | Prompt | Pull | Pause | Input | Snapshot | TellScript | Record | Stop,
    pydantic.Field(discriminator="type"),
]
_READER: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(Any_)


def read(message: str | bytes) -> tuple[Any, bytes]:
    """Return a message of the client and its payload.

    Raises:
        ConfigError: it is malformed.
    """
    header, payload = message, b""
    if isinstance(message, bytes):
        size = int.from_bytes(message[:4], "big")
        if len(message) < 4 or size > min(len(message) - 4, 65536):
            raise ConfigError("a binary message has no header of the length that it declares")
        header, payload = message[4 : 4 + size], message[4 + size :]
    try:
        result = _READER.validate_json(header)
    except pydantic.ValidationError as error:
        raise ConfigError(f"malformed message: {first_error(error)}") from None
    except RecursionError:
        raise ConfigError("malformed message: it is nested too deeply") from None
    require(not payload or isinstance(result, Start | Input), f"malformed message: {result.type} has no payload")
    return result, payload


def first_error(error: pydantic.ValidationError) -> str:
    """Return the first of the errors as ``FIELD: MESSAGE``."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where + ': ' if where else ''}{first['msg']}"


def write(header: dict[str, Any], payload: bytes) -> bytes:
    """Return a binary message of a header, as JSON, and a payload."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack(">I", len(text)) + text + payload
