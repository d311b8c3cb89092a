"""Answers that say no, in the shape that OpenAI's clients read: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel

log = logging.getLogger("finespun.serving")


class ErrorDetail(BaseModel):
    """What is wrong, of which kind, and with which field."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of every answer that says no."""

    error: ErrorDetail


class ApiError(Exception):
    """A request that is answered with `status` instead of a text."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(status)
        self.detail = ErrorDetail(
            message=message,
            type=kind or ("server_error" if status >= 500 else "invalid_request_error"),
            param=param,
            code=code,
        )

    def body(self) -> dict[str, Any]:
        return ErrorResponse(error=self.detail).model_dump()

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of `error`; of one that is a bug of ours, only the log says more."""
    if isinstance(error, ApiError):
        return error
    log.error("request failed", exc_info=error)
    return ApiError(500, "Something went wrong in the server; its log says what.", "internal_error")


def busy(message: str, seconds: float = 1.0, status: int = 503) -> ApiError:
    """The server cannot now, but may in `seconds`."""
    code = "rate_limit_exceeded" if status == 429 else "unavailable"
    return ApiError(status, message, code, headers={"Retry-After": str(max(1, round(seconds)))})


STATUSES = {
    400: "Not JSON, or something that this model or server cannot do",
    401: "No API key, or a wrong one",
    404: "No such model",
    408: "The body came too slowly",
    413: "The body is too large",
    422: "A field that is unknown, missing, or out of its range",
    429: "Too many requests wait; Retry-After says when to come again",
    503: "The server is starting, stopping, or took too long; Retry-After says when to come again",
}
"""What the statuses of refusals mean, for the OpenAPI description."""

REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": meaning} for status, meaning in STATUSES.items()
}
