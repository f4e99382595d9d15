"""Errors as clients of the OpenAI API expect them.

Every error has one form, `{"error": {"message", "type", "param", "code"}}`, and its status tells the client what to do:
it retries 408, 409, 429 and everything from 500 on (after Retry-After seconds, where the answer says so), and raises
the rest as the exception of that status. Invalid input is 400 there, not 422 as in FastAPI.
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from zero2hero.errors import UserError

log = logging.getLogger("zero2hero.serve")

_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_KINDS |= {500: "server_error", 503: "unavailable_error"}


class ErrorContent(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every error looks like."""

    error: ErrorContent


class ApiError(Exception):
    """A request that is refused or that failed. `retry_after` is in seconds; `param` names the field that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        kind = _KINDS.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return JSONResponse(self.body, self.status, headers)


def unsupported(param: str, why: str = "is not supported by this server") -> ApiError:
    """For what the API knows and this server does not do: said aloud, where ignoring it would give a wrong answer."""
    return ApiError(400, f"{param} {why}", param=param, code="unsupported_parameter")


def as_api_error(error: BaseException) -> ApiError:
    """Any exception as what the client is told; of an unforeseen one no more than that it happened."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    log.error("an answer failed", exc_info=error)
    return ApiError(500, "the server failed to answer; its log says why")


def explain_errors(app: FastAPI) -> None:
    """Give all errors of the application the one form."""

    async def explained(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _invalid(error.errors()[0]).response()

    async def status(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        code = "not_found" if error.status_code == 404 else None
        refused = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}", code=code)
        response = refused.response()
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(ApiError, explained)
    app.add_exception_handler(UserError, explained)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, status)
    app.add_exception_handler(Exception, explained)


def _invalid(first: dict[str, Any]) -> ApiError:
    """pydantic's first complaint, with the place of it; never the value, which may be megabytes."""
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UnsupportedField):
        return unsupported(cause.field)
    place = ".".join(str(part) for part in first["loc"][1:]) or "body"
    return ApiError(400, f"{place}: {first['msg']}", param=place, code="invalid_value")


class UnsupportedField(ValueError):
    """Raised while a request is validated, for a field that the API knows and this server does not."""

    def __init__(self, field: str) -> None:
        super().__init__(f"{field} is not supported by this server")
        self.field = field
