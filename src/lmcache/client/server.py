"""An OpenAI-compatible server, as far as it is asked here."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any


class ServerError(Exception):
    """The server did not answer, or refused; the message says what it said."""


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
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                answer = json.loads(reply.read())
        except urllib.error.HTTPError as error:
            raise ServerError(f"{address}: {error.code}: {_message(error.read())}") from None
        except (OSError, ValueError) as error:  # refused, timed out, no URL, no JSON
            raise ServerError(f"{address}: {error}") from None
        if not isinstance(answer, dict):
            raise ServerError(f"{address}: answered {type(answer).__name__}, not an object")
        return answer


def _message(raw: bytes) -> str:
    """What an OpenAI-compatible server says of an error, or the beginning of what else it sent."""
    try:
        found = json.loads(raw)
        return str(found.get("error", found)["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return raw[:300].decode(errors="replace")
