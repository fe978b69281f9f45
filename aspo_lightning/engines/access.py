"""The secret that a trainer shares with its vLLM servers. It is only ever in the environment."""

import os
import re
import secrets
from typing import TYPE_CHECKING

from aspo_lightning.errors import ConfigError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send  # of vLLM's

TOKEN = "VLLM_API_KEY"  # which vLLM itself reads, but requires on some of its paths only


def headers() -> dict[str, str]:
    """The headers of a request. Raises ConfigError where there is no token, or one that no header can hold."""
    token = os.environ.get(TOKEN, "")
    if not token:
        raise ConfigError(
            f"The environment variable {TOKEN} isn't set: the secret that trainer and vLLM servers share. Set the one "
            f"with which scripts/serve.sh was started; a new one is made by export {TOKEN}=$(openssl rand -hex 32)."
        )
    if not re.fullmatch("[!-~]+", token):  # an error of the HTTP client would show it
        raise ConfigError(
            f"The environment variable {TOKEN} has spaces, line ends or letters beyond ASCII: leave them out."
        )
    return {"Authorization": f"Bearer {token}"}


class RequireToken:
    """ASGI middleware for vLLM's ``--middleware``: nothing is answered without the token, on whatever path."""

    def __init__(self, app: "ASGIApp") -> None:
        self.app = app
        self.expected = headers()["Authorization"].encode()

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if scope["type"] == "lifespan" or secrets.compare_digest(given, self.expected):
            await self.app(scope, receive, send)
        else:
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body"})
