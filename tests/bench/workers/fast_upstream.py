"""A provider that costs next to nothing: answers made beforehand, over HTTP/1.1. Prints its port, and serves until its
standard input ends.

The request's model says what comes: ``short`` (5 messages in one write), ``long-N`` (N messages, so many in a write as
`--together` says), ``held-N`` (one message every N milliseconds, until the client goes away). The path says in which
form: ``/v1/chat/completions`` as OpenAI's, ``/v1/messages`` as Anthropic's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_LAST = b"0\r\n\r\n"
_MODEL = re.compile(rb'"model": ?"([a-z]+)(?:-(\d+))?"')


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class OpenAi:
    def __init__(self) -> None:
        usage = {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14}
        self.first = self._message([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        self.more = self._message([{"index": 0, "delta": {"content": " hello"}, "finish_reason": None}])
        self.end = (
            self._message([{"index": 0, "delta": {}, "finish_reason": "stop"}])
            + self._message([], usage=usage)
            + _chunk(b"data: [DONE]\n\n")
            + _LAST
        )

    def _message(self, choices: object, **more: object) -> bytes:
        body = {
            "id": "chatcmpl-B9MHDbslfkBeAs8l4bebGdFOJ6PeG",
            "object": "chat.completion.chunk",
            "created": 1741570283,
            "model": "gpt-4o-mini-2024-07-18",
            "service_tier": "default",
            "system_fingerprint": "fp_44709d6fcb",
            "choices": choices,
            **more,
        }
        return _chunk(b"data: %b\n\n" % json.dumps(body, separators=(",", ":")).encode())


class Anthropic:
    def __init__(self) -> None:
        message = {
            "id": "msg_4QpJur2dWWDjF6C758FbBw5vm12BaVipnK",
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": "claude-opus-4-20250514",
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": 11, "output_tokens": 1},
        }
        block = {"index": 0, "content_block": {"type": "text", "text": ""}}
        self.first = self._message("message_start", message=message) + self._message("content_block_start", **block)
        self.more = self._message("content_block_delta", index=0, delta={"type": "text_delta", "text": " hello"})
        delta = {"stop_reason": "end_turn", "stop_sequence": None}
        self.end = (
            self._message("content_block_stop", index=0)
            + self._message("message_delta", delta=delta, usage={"output_tokens": 5})
            + self._message("message_stop")
            + _LAST
        )

    def _message(self, kind: str, **more: object) -> bytes:
        body = json.dumps({"type": kind, **more}, separators=(",", ":"))
        return _chunk(f"event: {kind}\ndata: {body}\n\n".encode())


class Connection(asyncio.Protocol):
    def __init__(self, together: int) -> None:
        self._together = together
        self._buffer = b""
        self._writable = asyncio.Event()
        self._writable.set()
        self._answering: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._writable.set()
        if self._answering is not None:
            self._answering.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, end, body = self._buffer.partition(b"\r\n\r\n")
        if not end:
            return
        length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
        if length is None or len(body) < int(length[1]):
            return
        self._buffer = b""
        found = _MODEL.search(body)
        assert found is not None, body
        form = ANTHROPIC if b"/messages" in head.split(b"\r\n", 1)[0] else OPENAI
        if found[1] == b"short":
            self._transport.write(_HEAD + form.first + form.more * 3 + form.end)
        else:
            answer = self._hold if found[1] == b"held" else self._stream
            self._answering = asyncio.get_running_loop().create_task(answer(form, int(found[2])))

    async def _stream(self, form: OpenAi | Anthropic, count: int) -> None:
        self._transport.write(_HEAD + form.first)
        while count > 0:
            self._transport.write(form.more * min(count, self._together))
            count -= self._together
            await self._writable.wait()
            await asyncio.sleep(0)
        self._transport.write(form.end)

    async def _hold(self, form: OpenAi | Anthropic, milliseconds: int) -> None:
        self._transport.write(_HEAD + form.first)
        while True:
            self._transport.write(form.more)
            await asyncio.sleep(milliseconds / 1000)


OPENAI = OpenAi()
ANTHROPIC = Anthropic()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--together", type=int, default=1, help="messages in a write (default: %(default)s)")
    arguments = parser.parse_args()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(arguments.together), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
