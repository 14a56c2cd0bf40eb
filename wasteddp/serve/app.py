"""The HTTP interface: POST /predict, /healthz, /metrics, /openapi.json and a page at /. Only `kept` writes files.

The page takes photos that are dropped, pasted or taken. It is in the style of the report, and shows text as text.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import time
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from wasteddp import __version__
from wasteddp.data.decoding.decode import UndecodableError
from wasteddp.decisions.unlikeness import UNLIKE_FROM
from wasteddp.errors import inert, print_warning
from wasteddp.inference.bundle import BundleCard
from wasteddp.inference.prediction_files import Failure, json_entry
from wasteddp.serve.batches import Batches, BusyError, Limits
from wasteddp.serve.kept import RESULTS, KeptPhotos
from wasteddp.serve.metrics import CONTENT_TYPE, Metrics
from wasteddp.serve.requests import BodyError, TooManyError, images_of

_CSS = (files("wasteddp.report") / "page.css").read_text("utf-8") + (files(__package__) / "try.css").read_text("utf-8")
_JS = (files(__package__) / "try.js").read_text("utf-8").replace("{unlike_from}", f"{UNLIKE_FROM:g}")


class ImageAnswer(BaseModel):
    """Of one image: as in the JSON file of `wasteddp predict`. An image that cannot be read has a name and an error."""

    name: str = Field(description="file name in the request")
    class_: str | None = Field(None, alias="class", description="the most probable class")
    bin: str | None = Field(None, description="that the class belongs in; null: the model knows no bins")
    probability: float | None = Field(None, description="of the class, calibrated, 0 to 1")
    probabilities: dict[str, float] | None = Field(None, description="of each class")
    unlike: float | None = Field(None, description="percentile of unlikeness to the training images; null: not known")
    decision: str | None = Field(None, description="bin, or person; only with a policy")
    bin_probability: float | None = Field(None, description="of the best bin; only with a policy")
    why: str | None = Field(None, description="hazard, cost, doubt or empty; only with a policy")
    error: str | None = Field(None, description="why the image has no answer")


class Answers(BaseModel):
    """Of one request."""

    model: str = Field(description="sha256 of the weights")
    answers: list[ImageAnswer] = Field(description="in the order of the images")


class Problem(BaseModel):
    error: str = Field(description="one line")


class _RefusedError(Exception):
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


_BINARY = {"schema": {"type": "string", "format": "binary"}}
_BODY = {
    "requestBody": {
        "required": True,
        "description": "The bytes of an image file, or images as files of a multipart form.",
        "content": {
            "image/*": _BINARY,
            "application/octet-stream": _BINARY,
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"images": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            },
        },
    }
}
_HEADERS = {
    401: {"www-authenticate": "Bearer"},
    408: {"connection": "close"},
    429: {"retry-after": "1"},
    503: {"retry-after": "1"},
}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "The token is missing or wrong"},
    403: {"model": Problem, "description": "A page of another site asks, or the server is called by another name"},
    408: {"model": Problem, "description": "The body did not arrive in time"},
    413: {"model": Problem, "description": "Too many bytes or images in one request"},
    422: {"model": Problem, "description": "No image can be read, or all have too many pixels"},
    429: {"model": Problem, "description": "Too many images wait, or too many bytes are held; try again later"},
    500: {"model": Problem, "description": "The model failed"},
    503: {"model": Problem, "description": "The answer took too long, or the server has too many connections"},
}


def create_app(
    batches: Batches,
    card: BundleCard,
    limits: Limits,
    metrics: Metrics,
    *,
    token: str = "",
    hosts: frozenset[str] | None = None,
    keep: KeptPhotos | None = None,
) -> FastAPI:
    """Return the ASGI application.

    Args:
        token: that `Authorization: Bearer TOKEN` must have for /predict and /metrics; "": none is needed.
        hosts: names by which requests without a token may call the server, besides its addresses and `localhost`;
            None: any.
        keep: receives each photo with its answer; None: none is kept.
    """
    app = FastAPI(
        title="wasteddp",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        summary=f"{card.arch}, waste images",
    )
    reader = _Reader(limits)
    html = page(needs_token=bool(token), keeps=keep is not None)

    def check(request: Request) -> None:
        if not token:
            _refuse_other_sites(request, hosts)
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.strip().encode("latin-1"), token.encode())
        if scheme.lower() != "bearer" or not is_right:
            raise _RefusedError(401, "the token is missing or wrong: send the header Authorization: Bearer TOKEN")

    async def answer(request: Request, body: bytes) -> dict[str, Any]:
        try:
            images = images_of(request.headers.get("content-type", ""), body, most=limits.images)
            futures = batches.take(images)
            found = await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
        except BodyError as error:
            raise _RefusedError(422, str(error)) from error
        except TooManyError as error:
            raise _RefusedError(413, f"the request has more than {limits.images} images, the limit") from error
        except BusyError as error:
            raise _RefusedError(429, f"{error}; try again later") from error
        finally:
            reader.release(len(body))
        entries = list[dict[str, Any]]()
        for (name, data), one in zip(images, found, strict=True):
            if isinstance(one, BaseException) and not isinstance(one, UndecodableError):
                raise one
            if keep and not isinstance(one, BaseException):
                keep.offer(data, one)
            if isinstance(one, BaseException):
                metrics.count_unreadable()
            else:
                decision = one.decision.bin if one.decision else None
                metrics.count_answer(card.classes[int(one.probabilities.argmax())], decision, one.unlike)
            entry = json_entry(Failure(name, str(one)) if isinstance(one, BaseException) else one, card)
            entries.append({"name": entry.pop("path"), **entry})
        if all(entry["error"] for entry in entries):
            reasons = [f"{entry['name']}: {entry['error']}" for entry in entries]
            raise _RefusedError(422, "; ".join(reasons) if len(reasons) > 1 else entries[0]["error"])
        return {"model": card.hashes.weights, "answers": entries}

    @app.post("/predict", response_model=Answers, responses=_PROBLEMS, openapi_extra=_BODY)
    async def predict(request: Request) -> JSONResponse:
        """Classify one image or several. If several are sent and some cannot be read, those have an error."""
        begin, status, content, body = time.monotonic(), 200, dict[str, Any](), None
        try:
            async with asyncio.timeout(limits.request_s):
                check(request)
                body = await reader.read(request)
                content = await answer(request, body)
        except _RefusedError as refused:
            status, content = refused.status, {"error": " ".join(inert(refused.reason).split())}
        except TimeoutError:
            status, content = 503, {"error": f"no answer within {limits.request_s:g} s; try again later"}
            if body is None:
                status, content = 408, {"error": f"the body did not arrive within {limits.request_s:g} s"}
        except ClientDisconnect:
            status = 400  # nobody reads it
        except Exception as error:
            print_warning(f"a request failed: {error!r}")
            status, content = 500, {"error": "the model failed; the server has printed why"}
        metrics.count_request(status, time.monotonic() - begin)
        return JSONResponse(content, status, headers=_HEADERS.get(status))

    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        """Return "ok" if the server takes requests."""
        return "ok\n"

    @app.get(
        "/metrics", response_class=PlainTextResponse, responses={status: _PROBLEMS[status] for status in (401, 403)}
    )
    async def read_metrics(request: Request) -> Response:
        """Return Prometheus' text format."""
        try:
            check(request)
        except _RefusedError as refused:
            return JSONResponse({"error": inert(refused.reason)}, refused.status, headers=_HEADERS.get(refused.status))
        doubtful = {name: keep.counts[name] for name in RESULTS} if keep else None
        text = metrics.text(num_waiting=batches.num_taken, num_batches=batches.num_batches, doubtful=doubtful)
        return Response(text, media_type=CONTENT_TYPE)

    @app.exception_handler(HTTPException)
    async def no_such_path(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def root() -> HTMLResponse:
        return HTMLResponse(
            html, headers={"content-security-policy": _PAGE_POLICY, "x-content-type-options": "nosniff"}
        )

    return app


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# Nothing else runs or is loaded; the photos' previews are blobs of the page itself.
_PAGE_POLICY = (
    f"default-src 'none'; style-src {_hash(_CSS)}; script-src {_hash(_JS)}; img-src blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def page(*, needs_token: bool, keeps: bool) -> str:
    """Return the page.

    Args:
        needs_token: it has a field for the token, which the page keeps until it is closed.
        keeps: the server keeps doubtful photos.
    """
    kept = "which keeps those that it is not sure of, for labelling" if keeps else "which keeps none"
    hidden = "" if needs_token else " hidden"
    html = (files(__package__) / "try.html").read_text("utf-8")
    return html.replace("{css}", _CSS).replace("{js}", _JS).replace("{token_hidden}", hidden).replace("{kept}", kept)


def _refuse_other_sites(request: Request, hosts: frozenset[str] | None) -> None:
    """Refuse what a page of another site asks through the browser of somebody who reaches this server.

    The browser names the page in Origin, or says that it is another site's in Sec-Fetch-Site. A page whose own name
    leads to this server's address (DNS rebinding) is of the same origin, so the name in Host must be a known one. An
    address cannot be such a name.

    Raises:
        _RefusedError: it is such a request.
    """
    host = request.headers.get("host", "").lower()
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    if hosts is not None and name not in ("localhost", *hosts) and not _is_address(name.strip("[]")):
        raise _RefusedError(
            403,
            f"the server is called by the name {name[:100]!r}, which a page of another site may have; use its "
            "address, or start it with --allow-host NAME or a token",
        )
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    is_other = origin is not None and origin.lower().partition("://")[2] != host if site is None else "-site" in site
    if is_other:
        raise _RefusedError(403, "a page of another site asks; start the server with a token to allow programs there")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class _Reader:
    """Reads bodies, within the limits of one and of all together."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._held = limits, 0

    async def read(self, request: Request) -> bytes:
        """Return the body; `release` must follow. It is held until then."""
        most = self._limits.request_bytes
        length = request.headers.get("content-length", "")[:18]
        if length.isdecimal() and int(length) > most:
            raise _RefusedError(413, f"the request has {int(length):,} bytes; the limit is {most:,}")
        body = bytearray()
        try:
            async for part in request.stream():
                body += part
                self._held += len(part)
                if len(body) > most:
                    raise _RefusedError(413, f"the request has more than {most:,} bytes, the limit")
                if self._held > self._limits.held_bytes:
                    raise _RefusedError(429, "the requests that are being read have too many bytes; try again later")
        except BaseException:
            self.release(len(body))
            raise
        return bytes(body)

    def release(self, num_bytes: int) -> None:
        self._held -= num_bytes
