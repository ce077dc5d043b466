"""The HTTP side: routes of a FastAPI application over a queue.

    POST   /v1/images/generations       make images
    DELETE /v1/images/generations/{id}  give a request up
    GET    /v1/models  /health  /metrics

Errors have OpenAI's form, `{"error": {"message": ..., "type": ..., "code": ...}}`, with a message of
one line.
"""

import asyncio
import base64
import io
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from einops import rearrange
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from torch import Tensor

from tessellar.errors import UserError, in_one_line
from tessellar.pipeline import ImageGenerator
from tessellar.sampling.settings import Sampling
from tessellar.serving.metrics import Metrics
from tessellar.serving.orders import Limits, Order, order_of, read_request
from tessellar.serving.queue import Full, Made, Queue, Ticket

log = logging.getLogger(__name__)
LOOK = 0.1  # seconds between two looks at whether a client is still there
CLIENT_GONE = 499  # nginx's code; nobody reads it, but the log


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status = status
        self.message = in_one_line(message)
        self.kind = kind

    def response(self) -> JSONResponse:
        error = {"message": self.message, "type": self.kind, "param": None, "code": self.status}
        return JSONResponse({"error": error}, status_code=self.status)


class Server:
    """What the routes share: the model and its name, the queue, the requests that are open."""

    def __init__(
        self,
        model: ImageGenerator,
        name: str,
        *,
        defaults: Sampling | None = None,
        limits: Limits | None = None,
        batch_size: int = 16,
        wait: float = 0.01,
        precision: str = "float32",
    ) -> None:
        self.model = model
        self.name = name
        self.defaults = defaults or Sampling()
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self.queue = Queue(
            model,
            batch_size=batch_size,
            wait=wait,
            most_waiting=self.limits.waiting,
            precision=precision,
            finished=self.metrics.finished,
        )
        self.metrics.watch(self.queue)
        self.open: dict[str, Ticket] = {}
        self.started = int(time.time())

    async def generate(self, request: Request) -> Response:
        """Images of a request, when all of them are made."""
        outcome = "failed"
        try:
            response = await self._answered(request)
            outcome = "served" if response.status_code == 200 else "cancelled"
        except Refused as refusal:
            outcome = {409: "cancelled", 429: "full", 500: "failed"}.get(refusal.status, "refused")
            return refusal.response()
        finally:
            self.metrics.requests.labels(outcome).inc()
        return response

    async def _answered(self, request: Request) -> Response:
        body = await read_body(request, self.limits.body)
        try:
            order = order_of(read_request(body), self.model, self.name, self.defaults, self.limits)
            if order.id in self.open:
                raise UserError(f"a request {order.id!r} is open already: give another id")
            ticket = self.queue.submit(order)
        except Full as error:
            raise Refused(429, str(error), "rate_limit_error") from error
        except UserError as error:
            raise Refused(400, str(error)) from error
        started = time.perf_counter()
        self.open[order.id] = ticket
        try:
            made = await finished(ticket, request)
        finally:
            ticket.cancel()  # whatever ended the request
            del self.open[order.id]
        if made is None:
            return Response(status_code=CLIENT_GONE)
        self.metrics.request_seconds.observe(time.perf_counter() - started)
        return JSONResponse(await asyncio.to_thread(self.answer, order, made))

    def answer(self, order: Order, made: list[Made]) -> dict[str, Any]:
        """The body of an answer."""
        data = []
        for index, picture in enumerate(made):
            item: dict[str, Any] = {
                "b64_json": base64.b64encode(png_bytes(picture.image)).decode(),
                "seed": order.seed + index,
                "batch": picture.batch,
            }
            if order.texts is None:
                item["class"] = order.labels[index]
                if self.model.class_names:
                    item["class_name"] = self.model.class_names[order.labels[index]]
            if order.shows_tokens:
                item["tokens"] = picture.tokens.tolist()
            data.append(item)
        height, width = self.model.image_size
        return {
            "created": int(time.time()),
            "id": order.id,
            "model": self.name,
            "size": f"{width}x{height}",
            "output_format": "png",
            "seed": order.seed,
            "data": data,
        }

    def cancel(self, id: str) -> dict[str, Any]:
        """Give an open request up; raises Refused for one that is not open."""
        ticket = self.open.get(id)
        if ticket is None or not ticket.cancel():
            raise Refused(404, f"no request {id[:80]!r} is open", "not_found_error")
        return {"id": id, "cancelled": True}

    def health(self) -> dict[str, Any]:
        """What the server is and how much it has to do; raises Refused where it draws no more."""
        if not self.queue.is_alive:
            raise Refused(503, "the thread that draws has ended", "server_error")
        height, width = self.model.image_size
        return {
            "status": "ok",
            "model": self.name,
            "size": f"{width}x{height}",
            "waiting": self.queue.waiting,
            "running": self.queue.running,
            "batch_size": self.queue.batch_size,
        }

    def models(self) -> dict[str, Any]:
        """The one model, as OpenAI lists them, with the names of its classes."""
        card = {
            "id": self.name,
            "object": "model",
            "created": self.started,
            "owned_by": "tessellar",
        }
        if self.model.class_names:
            card["class_names"] = list(self.model.class_names)
        return {"object": "list", "data": [card]}


def application(server: Server) -> FastAPI:
    """The routes; closing the application draws what waits and ends the queue."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.queue.close)

    # The pages of documentation load scripts from elsewhere: only the description is served.
    app = FastAPI(title="tessellar", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(HTTPException, not_served)
    app.add_api_route(
        "/v1/images/generations", server.generate, methods=["POST"], response_model=None
    )
    app.add_api_route("/v1/images/generations/{id}", server.cancel, methods=["DELETE"])
    app.add_api_route("/v1/models", server.models, methods=["GET"])
    app.add_api_route("/health", server.health, methods=["GET"])

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(server.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return app


async def refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.response()


async def not_served(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:80]}: {error.detail}"
    return Refused(error.status_code, message).response()


async def read_body(request: Request, most: int) -> bytes:
    """The body of a request; raises Refused for one of more than `most` bytes, which is not read on."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise Refused(413, f"the body has more than {most} bytes")
    return body


async def finished(ticket: Ticket, request: Request) -> list[Made] | None:
    """The pictures of a ticket, or None when the client went away; raises Refused for what failed."""
    waiting = asyncio.wrap_future(ticket.pictures)
    while True:
        done, _ = await asyncio.wait([waiting], timeout=LOOK)
        if done:
            break
        if await request.is_disconnected():
            ticket.cancel()
            return None
    if waiting.cancelled():
        raise Refused(409, f"request {ticket.order.id} was cancelled", "cancelled")
    error = waiting.exception()
    if isinstance(error, UserError):
        raise Refused(400, str(error))
    if error is not None:
        raise Refused(500, f"the images could not be made ({type(error).__name__})", "server_error")
    return waiting.result()


def png_bytes(image: Tensor) -> bytes:
    """A uint8 image [3, H, W] as PNG, the bytes that `sample.py` writes."""
    file = io.BytesIO()
    Image.fromarray(rearrange(image, "c h w -> h w c").numpy()).save(file, format="PNG")
    return file.getvalue()
