"""An OpenAI-compatible server, as far as it is asked here."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any


class ServerError(Exception):
    """The server did not answer, or refused; the message says what it said."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would turn the POST into a GET, and take the key along to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


@dataclass(frozen=True)
class Server:
    """``url`` is its root, with or without a final ``/v1``."""

    url: str
    api_key: str | None = None
    timeout: float = 600.0

    @property
    def root(self) -> str:
        """Without ``/v1``."""
        return self.url.rstrip("/").removesuffix("/v1")

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON that ``path`` ("/tokenize", say) answers.

        Raises:
            ServerError: no answer, or none of success.
        """
        address = self.root + path
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        try:
            request = urllib.request.Request(address, json.dumps(body).encode(), headers)
            with _OPENER.open(request, timeout=self.timeout) as reply:
                answer = json.loads(reply.read())
        except urllib.error.HTTPError as error:
            raise ServerError(f"{address}: {error.code}: {_message(error)}") from None
        except (
            OSError,
            ValueError,
            http.client.HTTPException,
        ) as error:  # refused, timed out, cut off, no URL, no JSON
            raise ServerError(f"{address}: {error or type(error).__name__}") from None
        if not isinstance(answer, dict):
            raise ServerError(f"{address}: answered {type(answer).__name__}, not an object")
        return answer


def _message(error: urllib.error.HTTPError) -> str:
    """What an OpenAI-compatible server says of an error, or the beginning of what else it sent."""
    try:
        raw = error.read()
    except (OSError, http.client.HTTPException):
        return error.reason
    try:
        found = json.loads(raw)
        return str(found.get("error", found)["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return raw[:300].decode(errors="replace") or error.reason
