"""The HTTP application: page, probes, metrics, recordings, ``/v1/videos`` and the WebSocket ``/v1/stream``."""

import asyncio
import contextlib
import json
import pathlib
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

import pydantic
from fastapi import FastAPI, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from causvid_jax import __version__
from causvid_jax.config import ConfigError
from causvid_jax.serve import protocol, uploads
from causvid_jax.serve.engine import Engine
from causvid_jax.serve.guard import BODY_SECONDS, Guard, TooLarge, TooSlow
from causvid_jax.serve.jobs import Job, Jobs
from causvid_jax.serve.socket import Connection, describe

PAGE = pathlib.Path(__file__).with_name("page")


class VideoRequest(pydantic.BaseModel):
    """The body of ``POST /v1/videos``, as JSON or as a form; unknown fields are refused.

    A form may add a file ``input_reference``: a picture to start from, or a video to follow at ``strength``.
    """

    model_config = pydantic.ConfigDict(extra="forbid")
    prompt: str
    model: str = ""
    seconds: float | None = pydantic.Field(None, gt=0, description="Default: as long as the video, or 4.")
    size: str = ""
    seed: int | None = None
    strength: float | None = pydantic.Field(None, gt=0, le=1, description="Needs a video; default: 0.5.")


class Video(pydantic.BaseModel):
    """A job, as in OpenAI's video API: ``progress`` in percent, ``seconds`` of video, ``size`` as WIDTHxHEIGHT."""

    model_config = pydantic.ConfigDict(extra="allow")
    id: str
    object: str
    model: str
    status: str
    progress: int
    seconds: str
    size: str
    created_at: int


_FORM = {"schema": VideoRequest.model_json_schema()}
_BODY = {"requestBody": {"content": {"application/json": _FORM, "multipart/form-data": _FORM}, "required": True}}
_OFFER = {"requestBody": {"content": {"application/json": {"schema": protocol.Offer.model_json_schema()}}}}


def create_app(engine: Engine) -> Any:
    """Return the ASGI application. Its lifespan starts and stops the engine."""
    jobs = Jobs(engine)
    peers = None
    if engine.settings.webrtc:
        from causvid_jax.serve.webrtc import Peers  # the extra webrtc

        peers = Peers(engine)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        task = asyncio.create_task(_tick(engine))
        yield
        task.cancel()
        if peers is not None:
            await peers.close()
        await asyncio.to_thread(engine.stop)

    app = FastAPI(title="causvid_jax", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_exception_handler(ConfigError, _sentence)
    app.add_exception_handler(HTTPException, _sentence)
    app.add_exception_handler(RequestValidationError, _sentence)
    app.add_exception_handler(TooLarge, _sentence)
    app.add_exception_handler(TooSlow, _sentence)
    _add_probes(app, engine)
    _add_videos(app, engine, jobs)

    @app.websocket("/v1/stream")
    async def stream(socket: WebSocket) -> None:
        await Connection(socket, engine, peers).run()

    if peers is not None:

        @app.post("/v1/webrtc", openapi_extra=_OFFER, summary="Answer a WebRTC offer", tags=["stream"])
        async def webrtc(request: Request) -> dict[str, str]:
            with _sentences():
                offer = protocol.Offer.model_validate_json(await request.body())
            return {"type": "answer", "sdp": await peers.answer(offer.session, offer.sdp)}

    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return Guard(app, engine.settings)


async def _tick(engine: Engine) -> None:
    while True:
        await asyncio.sleep(1)
        await asyncio.to_thread(engine.tick)


async def _sentence(_: Request, error: Exception) -> JSONResponse:
    """Return the response to an error in the format of the API."""
    status, message = getattr(error, "status_code", 400), getattr(error, "detail", str(error))
    if isinstance(error, RequestValidationError):  # of the address, such as ?limit=abc
        first = error.errors()[0]
        message = f"{first['loc'][-1]}: {first['msg']}"
    if isinstance(error, TooLarge):
        status, message = 413, "the request is too large"
    if isinstance(error, TooSlow):
        status, message = 408, f"the request did not arrive within {BODY_SECONDS:.0f} s"
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=status)


def _add_probes(app: FastAPI, engine: Engine) -> None:
    @app.get("/healthz", summary="Whether the process is alive", tags=["operation"])
    async def healthz() -> Response:
        return JSONResponse({"status": engine.failure or "ok"}, status_code=500 if engine.failure else 200)

    @app.get("/readyz", summary="Whether everything is compiled", tags=["operation"])
    async def readyz() -> Response:
        ready = engine.ready.is_set() and not engine.failure
        return JSONResponse({"status": "ready" if ready else "warming up"}, status_code=200 if ready else 503)

    @app.get("/metrics", summary="Figures for Prometheus", tags=["operation"])
    async def metrics() -> Response:
        return Response(engine.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", summary="The recipe that is served", tags=["videos"])
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": engine.recipe.name, "object": "model", **describe(engine)}]}

    @app.get("/v1/recordings/{name}", summary="A finished recording", tags=["stream"])
    async def recording(name: str) -> Response:
        path = pathlib.Path(engine.settings.recordings) / name
        if not re.fullmatch(r"[0-9a-f]{24}\.mp4", name) or not path.is_file():
            raise HTTPException(404, "there is no such recording")
        return FileResponse(path, media_type="video/mp4", filename=name)


def _add_videos(app: FastAPI, engine: Engine, jobs: Jobs) -> None:
    def find(key: str) -> Job:
        job = jobs.get(key)
        if job is None:
            raise HTTPException(404, f"there is no video {key[:64]!r}")
        return job

    @app.post("/v1/videos", response_model=Video, openapi_extra=_BODY, summary="Make a video", tags=["videos"])
    async def create(request: Request) -> Any:
        values, files = await _video_request(request, engine)
        job = await asyncio.to_thread(jobs.create, **values.model_dump(), **files)
        return job.public()

    @app.get("/v1/videos", summary="All videos, the newest first, or pages of them", tags=["videos"])
    async def everything(
        limit: int = 20, after: str | None = None, order: Literal["asc", "desc"] = "desc"
    ) -> dict[str, Any]:
        data = [job.public() for job in (jobs.all() if order == "desc" else reversed(jobs.all()))]
        if after is not None:
            places = [place for place, video in enumerate(data) if video["id"] == after]
            if not places:
                raise HTTPException(404, f"there is no video {after[:64]!r}")
            data = data[places[0] + 1 :]
        page = data[: max(1, min(limit, 100))]
        ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
        return {"object": "list", "data": page, "has_more": len(page) < len(data), **ends}

    @app.get("/v1/videos/{key}", response_model=Video, summary="Status and progress", tags=["videos"])
    async def retrieve(key: str) -> Any:
        return find(key).public()

    @app.get("/v1/videos/{key}/content", summary="The MP4", tags=["videos"])
    async def content(key: str) -> Response:
        job = find(key)
        if job.status != "completed" or job.path is None:
            raise HTTPException(404 if job.status == "failed" else 409, f"the video is {job.status}")
        if not job.path.is_file():
            raise HTTPException(404, "the video is no longer kept; --kept is the number of files")
        return FileResponse(job.path, media_type="video/mp4", filename=f"{job.id}.mp4")

    @app.delete("/v1/videos/{key}", summary="Stop and remove", tags=["videos"])
    async def delete(key: str) -> dict[str, Any]:
        find(key)
        await asyncio.to_thread(jobs.delete, key)
        return {"id": key, "object": "video.deleted", "deleted": True}


async def _video_request(request: Request, engine: Engine) -> tuple[VideoRequest, dict[str, Any]]:
    """Return the request's values and its ``picture`` or ``video``."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    files: dict[str, Any] = {}
    with _sentences():
        if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
            async with request.form(max_files=1, max_fields=16) as form:
                fields = dict(form)
                file = fields.get("input_reference")
                if isinstance(file, UploadFile):
                    del fields["input_reference"]
                values = VideoRequest.model_validate(fields)
                if isinstance(file, UploadFile):
                    files = await asyncio.to_thread(_decode, await file.read(), engine)
        else:
            values = VideoRequest.model_validate(json.loads(await request.body()))
    return values, files


@contextlib.contextmanager
def _sentences() -> Iterator[None]:
    """Turn errors of a request's body into status 400 with one sentence."""
    try:
        yield
    except pydantic.ValidationError as error:
        raise HTTPException(400, protocol.first_error(error)) from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise HTTPException(400, "the body is no JSON") from None


def _decode(data: bytes, engine: Engine) -> dict[str, Any]:
    """Return an uploaded file as the argument ``picture`` or ``video`` of a job."""
    video, settings = engine.recipe.video, engine.settings
    size = video.height, video.width
    if uploads.is_video(data):
        return {"video": uploads.decode_video(data, *size, round(settings.seconds * video.fps), video.fps)}
    return {"picture": uploads.decode_picture(data, *size, settings.picture_pixels)}
