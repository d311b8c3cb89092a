"""The routes of the OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

import finespun
from finespun.serving import responses
from finespun.serving.door import Door
from finespun.serving.errors import REFUSALS, ApiError
from finespun.serving.protocol import (
    ChatCompletion,
    ChatRequest,
    CompletionRequest,
    ModelCard,
    ModelList,
    Status,
    TextCompletion,
)
from finespun.serving.requests import count_texts, read_chat, read_completion
from finespun.serving.service import Answer, ClientGone, ServedModel, Service


class _JsonRequest(Request):
    """Reads JSON as RFC 8259 has it: no NaN, no half surrogate pairs, nothing that is not UTF-8, and no more than 1024
    levels."""

    async def json(self) -> Any:
        return orjson.loads(await self.body())


class _JsonRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return handle_json


router = APIRouter(route_class=_JsonRoute)


def create_app(service: Service) -> FastAPI:
    """The application around `service`; it loads the models when it starts."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        loading = asyncio.create_task(service.load_models())
        yield
        loading.cancel()
        await service.close()

    app = FastAPI(
        title="finespun",
        version=finespun.__version__,
        lifespan=lifespan,
        docs_url=None,  # their pages fetch scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    app.include_router(router)
    app.add_exception_handler(ApiError, _refuse)
    app.add_exception_handler(HTTPException, _refuse_http)
    app.add_exception_handler(RequestValidationError, _refuse_invalid)
    app.add_middleware(Door, service=service)
    if service.settings.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.cors_origin,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


def _refuse(request: Request, error: Any) -> JSONResponse:
    return error.response()


def _refuse_http(request: Request, error: Any) -> JSONResponse:
    """No such path, or not with this method."""
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return ApiError(error.status_code, str(error.detail), code, headers=error.headers).response()


def _refuse_invalid(request: Request, error: Any) -> JSONResponse:
    """The first thing that is wrong with a body; the others are counted."""
    faults = error.errors()
    first = faults[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not JSON: {first['ctx']['error']}", "invalid_json").response()
    place = ".".join(str(part) for part in first["loc"][1:])
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    if not place:
        message = "The body should be a JSON object, sent as application/json."
        return ApiError(422, message, first["type"]).response()
    return ApiError(422, f"{place}: {first['msg']}{more}", first["type"], param=str(first["loc"][1])).response()


def _service(request: Request) -> Service:
    return request.app.state.service


async def _closing() -> AsyncIterator[contextlib.ExitStack]:
    """What is put on it is closed after the answer was sent, or could not be."""
    with contextlib.ExitStack() as stack:
        yield stack


TEXTS: dict[int | str, dict[str, Any]] = {**REFUSALS, 200: {"content": {"text/event-stream": {}}}}
TheService = Annotated[Service, Depends(_service)]
Closing = Annotated[contextlib.ExitStack, Depends(_closing)]


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=TEXTS)
async def chat_completions(body: ChatRequest, request: Request, service: TheService, closing: Closing) -> Any:
    """The assistant's next message."""
    answer = _take_place(body, request, service, closing)
    asked = await read_chat(body, answer.model, service.settings)
    await answer.begin(asked, body.n or 1)
    if body.stream:
        return _stream(responses.chat_chunks(answer, asked, _with_usage(body)))
    return await responses.whole_chat(answer, asked)


@router.post("/v1/completions", response_model=TextCompletion, responses=TEXTS)
async def completions(body: CompletionRequest, request: Request, service: TheService, closing: Closing) -> Any:
    """What follows a text."""
    answer = _take_place(body, request, service, closing)
    await answer.begin(await read_completion(body, answer.model, service.settings), body.n or 1)
    if body.stream:
        return _stream(responses.completion_chunks(answer, _with_usage(body)))
    return await responses.whole_completion(answer)


@router.get("/v1/models", responses={status: REFUSALS[status] for status in (401,)})
async def models(service: TheService) -> ModelList:
    """The models that can be asked for by now."""
    return ModelList(data=[_card(model) for model in service.models.values()])


@router.get("/v1/models/{name:path}", responses={status: REFUSALS[status] for status in (401, 404, 503)})
async def model(name: str, service: TheService) -> ModelCard:
    """One of them."""
    return _card(service.model(name))


@router.get("/health", responses={503: {"model": Status}})
async def health(service: TheService) -> Status:
    """Whether the process works; one that does not is best started again."""
    return _status("ok" if service.healthy else "failed", service.healthy)


@router.get("/ready", responses={503: {"model": Status}})
async def ready(service: TheService) -> Status:
    """Whether requests are taken: not while models are loaded, nor once the server is asked to stop."""
    return _status("ready" if service.ready else "stopping" if service.draining else "loading", service.ready)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(service: TheService) -> Response:
    """Figures in Prometheus' text format."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _take_place(
    body: ChatRequest | CompletionRequest, request: Request, service: Service, closing: contextlib.ExitStack
) -> Answer:
    """The answer to be, which is closed with the request, and told if its client goes away."""
    record = request.scope["finespun"]
    record["model"] = body.model if body.model in service.sources else None
    if service.settings.log_prompts:
        record["asked"] = body.model_dump(exclude_unset=True, by_alias=True)
    answer = Answer(service, service.model(body.model), count_texts(body), record)
    closing.callback(answer.close)
    closing.callback(asyncio.create_task(_watch(request, answer)).cancel)
    return answer


async def _watch(request: Request, answer: Answer) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    answer.fail(ClientGone())


def _with_usage(body: ChatRequest | CompletionRequest) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


def _stream(events: AsyncIterator[bytes]) -> StreamingResponse:
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


def _card(model: ServedModel) -> ModelCard:
    return ModelCard(id=model.name, created=model.created, context_length=model.context_length)


def _status(status: str, good: bool) -> Any:
    return JSONResponse({"status": status}, 200 if good else 503)
