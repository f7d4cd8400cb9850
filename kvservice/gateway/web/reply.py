"""One HTTP answer: a JSON object, or a stream of server-sent events. Knows nothing of what they say."""

from __future__ import annotations

import json

from aiohttp import web

from kvservice.errors import KVServiceError
from kvservice.gateway.web.answers import Json
from kvservice.gateway.web.errors import error_body, error_headers, http_status

STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    # Proxies such as nginx would hold events back otherwise.
    "X-Accel-Buffering": "no",
}


class Reply:
    """The answer to one request. `headers` may be added to until the first byte goes out."""

    def __init__(self, request: web.Request, request_id: str) -> None:
        self.headers = {"x-request-id": request_id}
        self._request = request
        self._stream: web.StreamResponse | None = None
        self._whole: Json | None = None

    @property
    def has_begun(self) -> bool:
        """Whether the caller has seen its headers."""
        return self._stream is not None

    def whole(self, content: Json) -> None:
        """The answer is this one object."""
        self._whole = content

    async def send(self, piece: Json) -> None:
        """Sends a piece of a stream; the first one sends the status before it. Waits while the reader is slow."""
        if self._stream is None:
            self._stream = web.StreamResponse(headers={**self.headers, **STREAM_HEADERS})
            await self._stream.prepare(self._request)
        await self._stream.write(_event(json.dumps(piece, ensure_ascii=False)))

    async def ended(self, error: KVServiceError | None) -> web.StreamResponse:
        """Sends what is left: the object, the end of the stream, or the error, in the stream if it has begun."""
        if self._stream is None:
            if error is not None:
                return error_response(error, self.headers)
            return web.json_response(self._whole, headers=self.headers)
        last = "[DONE]" if error is None else json.dumps(error_body(error), ensure_ascii=False)
        await self._stream.write(_event(last))
        await self._stream.write_eof()
        return self._stream


def error_response(error: KVServiceError, headers: dict[str, str] | None = None) -> web.Response:
    """An error as the whole answer."""
    return web.json_response(
        error_body(error), status=http_status(error), headers={**(headers or {}), **error_headers(error)}
    )


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()
