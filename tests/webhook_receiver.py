"""An HTTP server on loopback that a webhook may call, and that answers as badly as a test wants."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

#: What follows a request. The connection is closed afterwards.
Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Request:
    #: Method, target and version.
    line: str
    #: Names in lower case.
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    answer: Answer
    #: `host:port`.
    authority: str = ""
    requests: list[Request] = field(default_factory=list)


def status(code: int, *headers: str, body: bytes = b"") -> Answer:
    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = (f"HTTP/1.1 {code} Whatever", f"Content-Length: {len(body)}", *headers, "", "")
        writer.write("\r\n".join(lines).encode() + body)

    return answer


def text(data: bytes) -> Answer:
    """`data`, whatever it is, instead of an answer."""

    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)

    return answer


async def silence(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    """No answer until the caller hangs up."""
    await reader.read()


async def endless_head(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One header after the other, each soon enough for a limit on single reads."""
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"x: y\r\n")
        await writer.drain()
        await asyncio.sleep(0.02)


async def endless_body(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
        await writer.drain()


@contextlib.asynccontextmanager
async def serve(answer: Answer, tls: ssl.SSLContext | None = None, port: int = 0) -> AsyncIterator[Receiver]:
    receiver = Receiver(answer)
    handlers = set[asyncio.Task[None]]()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.add(asyncio.create_task(_handle(receiver, reader, writer)))

    async with await asyncio.start_server(accept, "127.0.0.1", port, ssl=tls) as server:
        receiver.authority = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield receiver
        for handler in handlers:
            handler.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)


async def _handle(receiver: Receiver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        receiver.requests.append(await _request(reader))
        await receiver.answer(reader, writer)
        writer.close()
        await writer.wait_closed()
    except ConnectionError:
        # A caller that hangs up is what some tests are about.
        pass
    finally:
        writer.transport.abort()


async def _request(reader: asyncio.StreamReader) -> Request:
    line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
    headers = {name.lower(): value for name, _, value in (header.partition(": ") for header in lines)}
    return Request(line, headers, await reader.readexactly(int(headers.get("content-length", 0))))
