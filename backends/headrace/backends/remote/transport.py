"""The way to a provider: HTTP by aiohttp (docs/adr/0021-remote-http-client.md says why), and its connections.

No redirect is followed, no variable of the environment chooses a proxy, certificates are always checked, and nothing is
asked for in a compressed form: a few bytes cannot become many.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from headrace.backends.remote.failures import TRANSPORT_ERRORS

_HEADERS = {
    "Accept": "text/event-stream",
    "Accept-Encoding": "identity",
    "Content-Type": "application/json",
    "User-Agent": "headrace",
}
_KEEP_ALIVE_SECONDS = 30.0
_CLOSING_SECONDS = 5.0
_LAST_CHUNK_SECONDS = 0.05
_LONG_BODY_BYTES = 1 << 20
"""Longer ones aiohttp wants as a file: then it sends them in pieces."""
_MAX_LEFT_BYTES = 65_536
"""Of an answer that is complete, what else may come before its connection is given up."""


@dataclass(slots=True)
class _Trip:
    """One request on its way."""

    is_reused: bool = False
    """Whether its connection had another before."""


class HttpClient:
    """Connections to one address, kept for later calls: a pool for each event loop, opened when it is first used."""

    def __init__(self, url: str, *, connect_seconds: float, proxy: str | None, tls: ssl.SSLContext) -> None:
        """``url`` is sent as it is: its path and query are quoted already."""
        self._url = URL(url, encoded=True)
        self._proxy, to_proxy = (None, {}) if proxy is None else _without_password(URL(proxy))
        # A proxy passes http on itself, and makes a tunnel for https.
        is_tunnel = self._url.scheme == "https"
        self._proxy_headers = to_proxy if is_tunnel else {}
        self._headers = _HEADERS if is_tunnel else _HEADERS | to_proxy
        self._tls = tls
        self._timeout = aiohttp.ClientTimeout(sock_connect=connect_seconds)
        self._tracing = aiohttp.TraceConfig()
        self._tracing.on_connection_reuseconn.append(_note_reuse)
        self._sessions: dict[asyncio.AbstractEventLoop, aiohttp.ClientSession] = {}

    async def post(self, headers: Mapping[str, str], body: bytes) -> aiohttp.ClientResponse:
        """The head of the answer; whoever gets it closes or ``finish``es it. Raises one of ``TRANSPORT_ERRORS``."""
        trip = _Trip()
        merged = CIMultiDict(self._headers)
        merged.update(headers)
        try:
            return await self._post(merged, body, trip)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            if not trip.is_reused:
                raise
        # The other side has closed a connection that was kept, as it may at any time, and has answered nothing.
        return await self._post(merged, body, _Trip())

    async def _post(self, headers: CIMultiDict[str], body: bytes, trip: _Trip) -> aiohttp.ClientResponse:
        return await self._session().post(
            self._url,
            data=io.BytesIO(body) if len(body) > _LONG_BODY_BYTES else body,
            headers=headers,
            proxy=self._proxy,
            proxy_headers=self._proxy_headers,
            allow_redirects=False,
            trace_request_ctx=trip,
        )

    def close(self) -> None:
        """Closes every connection. Waits for that, but on an event loop of its own."""
        sessions, self._sessions = self._sessions, {}
        for loop, session in sessions.items():
            if loop.is_running():
                closing = asyncio.run_coroutine_threadsafe(_close(session), loop)
                if not _is_here(loop):
                    closing.result(_CLOSING_SECONDS)
            elif not loop.is_closed():
                loop.run_until_complete(_close(session))

    def _session(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        session = self._sessions.get(loop)
        if session is None:
            # The limits of the settings hold, not those of a pool.
            connector = aiohttp.TCPConnector(
                limit=0, ssl=self._tls, keepalive_timeout=_KEEP_ALIVE_SECONDS, resolver=aiohttp.ThreadedResolver()
            )
            session = self._sessions[loop] = aiohttp.ClientSession(
                connector=connector,
                timeout=self._timeout,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
                trace_configs=[self._tracing],
            )
        return session


async def _note_reuse(_session: aiohttp.ClientSession, context: SimpleNamespace, _: object) -> None:
    context.trace_request_ctx.is_reused = True


async def finish(response: aiohttp.ClientResponse) -> None:
    """Keeps the connection of an answer that is complete, if its end is there or about to come; closes it otherwise."""
    left = _MAX_LEFT_BYTES
    with contextlib.suppress(*TRANSPORT_ERRORS):
        async with asyncio.timeout(_LAST_CHUNK_SECONDS):
            while left > 0 and (piece := await response.content.readany()):
                left -= len(piece)
    response.close()  # does nothing if the end was read: the connection is in the pool again


async def read_some(response: aiohttp.ClientResponse, num_bytes: int) -> bytes:
    """The beginning of a body. Raises one of ``TRANSPORT_ERRORS``."""
    body = bytearray()
    while len(body) < num_bytes and (piece := await response.content.readany()):
        body += piece
    return bytes(body[:num_bytes])


def _without_password(proxy: URL) -> tuple[URL | None, dict[str, str]]:
    """Its address, which errors may quote, and the header that says who comes."""
    if proxy.user is None:
        return proxy, {}
    said = base64.b64encode(f"{proxy.user}:{proxy.password or ''}".encode()).decode()
    return proxy.with_user(None), {"Proxy-Authorization": f"Basic {said}"}


async def _close(session: aiohttp.ClientSession) -> None:
    await session.close()
    await asyncio.sleep(0)  # the loop closes the sockets a moment later


def _is_here(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False
