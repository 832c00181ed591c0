"""The queue as JSON over HTTP: for scripts, and for the buttons of the page. docs/page.md describes it."""

from __future__ import annotations

import asyncio
import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from leanwan.errors import InputError

from ..utils.files import is_plain_file
from .guard import parsed, told
from .jobs import FILES, TYPES, UPLOADS, Job, settings_of
from .queue import WrongStatus
from .service import Service
from .views import Views

_FULL = (errno.ENOSPC, errno.EDQUOT)
_HERE = Path(__file__).parent / "static"
_FILES = {"page.js": "text/javascript", "page.css": "text/css"}


def build_app(service: Service) -> FastAPI:
    """The application with the JSON interface of a service."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, exception_handlers=HANDLERS)
    views = Views(service)

    @app.post("/jobs")
    async def add(request: Request) -> Response:
        settings = service.settings(await _object(request))
        job = await asyncio.to_thread(service.queue.add, settings)
        return JSONResponse(_told(service, job), 201, {"location": f"/jobs/{job.id}"})

    @app.get("/jobs")
    async def jobs() -> Response:
        told = [_told(service, job) for job in service.queue.jobs()]
        return JSONResponse({"jobs": told, "trouble": service.queue.trouble})

    @app.get("/jobs/{name}")
    async def job(name: str) -> Response:
        return JSONResponse(_told(service, service.queue.get(name)))

    @app.delete("/jobs/{name}")
    async def forget(name: str) -> Response:
        await asyncio.to_thread(service.queue.remove, name)
        return Response(status_code=204)

    def action(verb: str, do: Callable[[str], Job]) -> None:
        @app.post(f"/jobs/{{name}}/{verb}", name=verb)
        async def act(name: str) -> Response:
            return JSONResponse(_told(service, await asyncio.to_thread(do, name)))

    for verb in ("cancel", "pause", "resume"):
        action(verb, getattr(service.queue, verb))
    action("sooner", lambda name: service.queue.move(name, -1))
    action("later", lambda name: service.queue.move(name, 1))

    @app.get("/jobs/{name}/preview")
    async def preview(name: str) -> Response:
        progress = service.queue.progress.get(service.queue.get(name).id)
        if not progress or not progress.preview:
            raise KeyError("preview")
        path = Path(progress.preview[0])
        try:
            picture = path.read_bytes()  # read whole: the next preview may replace it at any time
        except FileNotFoundError:
            raise KeyError("preview") from None
        kind = f"image/{path.suffix.removeprefix('.')}"
        return Response(picture, media_type=kind, headers={"cache-control": "no-store"})

    @app.post("/plan")
    async def plan(request: Request) -> Response:
        found = await asyncio.shield(asyncio.wrap_future(service.plan(await _object(request))))
        return JSONResponse(found["plan"]) if "plan" in found else _line(422, found["error"])

    @app.post("/uploads")
    async def upload(request: Request) -> Response:
        field, name = request.query_params.get("field", ""), request.query_params.get("name", "")
        if field not in FILES or not name:
            raise HTTPException(400, "say ?field=FIELD&name=FILE of what is uploaded")
        with tempfile.TemporaryFile(dir=service.rules.folder / UPLOADS) as file:
            async for piece in request.stream():
                file.write(piece)
            file.seek(0)
            return JSONResponse({"path": await asyncio.to_thread(service.upload, file, name, field)}, 201)

    @app.get(f"/{UPLOADS}/{{name}}")
    async def uploaded(name: str) -> Response:
        return _attachment(service.rules.folder / UPLOADS, name)

    @app.api_route("/gradio_api/file={name:path}", methods=["GET", "HEAD"])
    async def shown(name: str) -> Response:
        """An upload that Gradio keeps. Gradio's own route, replaced by this, would fetch addresses and serve more."""
        return _attachment(service.rules.gradio_folder, name)

    @app.get("/results")
    async def results() -> Response:
        found = await asyncio.to_thread(service.gallery.results)
        return JSONResponse({"results": [vars(result) for result in found]})

    @app.get("/results/{name}")
    async def result(name: str) -> Response:
        return _file(await asyncio.to_thread(service.gallery.path, name))

    @app.get("/results/{name}/poster")
    async def poster(name: str) -> Response:
        return Response(await asyncio.to_thread(service.gallery.poster, name), media_type="image/jpeg")

    @app.delete("/results/{name}")
    async def delete(name: str) -> Response:
        await asyncio.to_thread(service.gallery.delete, name)
        return Response(status_code=204)

    @app.get("/live")
    async def live(known: str = "") -> Response:
        return JSONResponse(await asyncio.to_thread(views.since, known))

    for name, kind in _FILES.items():
        _serve(app, name, kind)
    return app


def _serve(app: FastAPI, name: str, kind: str) -> None:
    @app.get(f"/own/{name}", name=name)
    async def own() -> Response:
        return FileResponse(_HERE / name, media_type=kind, headers={"cache-control": "no-cache"})


def _told(service: Service, job: Job) -> dict[str, Any]:
    """A job as the JSON interface tells it."""
    names = ("id", "status", "created", "started", "ended", "error", "notes")
    values = {name: getattr(job, name) for name in names} | {"settings": settings_of(job.request)}
    result = Path(job.result) if job.result else None
    inside = result is not None and result.parent == service.rules.folder
    values |= {"result": job.result, "url": f"/results/{result.name}" if inside else None}
    progress = service.queue.progress.get(job.id)
    values["progress"] = progress.to_json() if progress else None
    return values


def _attachment(folder: Path, name: str) -> Response:
    """A file in or below a folder, as a download, not as a page. Raises KeyError for any other path."""
    path = folder / name
    if "\0" in name or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise KeyError(name)
    kind = TYPES.get(path.suffix.lower(), "application/octet-stream")
    return _file(path, media_type=kind, filename=path.name)


def _file(path: Path, **named: Any) -> Response:
    """A regular file. Raises KeyError for anything else, links included."""
    if not is_plain_file(path):
        raise KeyError(path.name)
    return FileResponse(path, **named)


async def _object(request: Request) -> dict[str, Any]:
    """The JSON object in the request's body. The guard has checked that the body is JSON."""
    body = await request.body()
    values = parsed(body) if body else None
    if not isinstance(values, dict):
        raise HTTPException(400, "not a JSON object")
    return values


def _line(status: int, line: str) -> Response:
    return JSONResponse(told(line), status)


async def _bad_input(_: Request, error: InputError) -> Response:
    return _line(422, error.told())


async def _bad_query(_: Request, error: RequestValidationError) -> Response:
    return _line(422, "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()))


async def _unknown(_: Request, error: KeyError) -> Response:
    return _line(404, f"there is no {error.args[0]}")


async def _wrong_status(_: Request, error: WrongStatus) -> Response:
    return _line(409, str(error))


async def _http(_: Request, error: HTTPException) -> Response:
    return JSONResponse(told(str(error.detail)), error.status_code, error.headers)


async def _system(_: Request, error: OSError) -> Response:
    status = 404 if isinstance(error, FileNotFoundError) else 507 if error.errno in _FULL else 409
    return _line(status, error.strerror or str(error))


# The answer to each exception, in the page's own application and in Gradio's.
HANDLERS: dict[Any, Any] = {
    InputError: _bad_input,
    RequestValidationError: _bad_query,
    KeyError: _unknown,
    WrongStatus: _wrong_status,
    HTTPException: _http,
    OSError: _system,
}
