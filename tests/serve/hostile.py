"""Hostile clients of a server on this machine: ``python -m tests.serve.hostile PORT SECONDS``.

Prints, as JSON, how often each kind was turned away and with which close code.
"""

import asyncio
import collections
import contextlib
import json
import sys
import time

import websockets.asyncio.client as client
from websockets.exceptions import ConnectionClosed, InvalidHandshake

KINDS = ("silent", "slow", "half_open", "malformed", "oversized", "reconnects", "origin", "flood")
COUNT = 100
START = json.dumps({"type": "start", "prompt": "a red 3 moving left"})
CLOSES: collections.Counter = collections.Counter()


async def attack(kind: str, port: int, end: float) -> None:
    """Misbehave once in the way of ``kind``."""
    url, origin = f"ws://127.0.0.1:{port}/v1/stream", f"http://127.0.0.1:{port}"
    if kind == "half_open":
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /v1/stream HTTP/1.1\r\nHost: local")
        await asyncio.sleep(min(2.0, max(0, end - time.time())))
        writer.close()
        return
    options = {"origin": "https://evil.example" if kind == "origin" else origin, "compression": None}
    async with client.connect(url, **options) as socket:
        if kind == "silent":
            await asyncio.sleep(max(0, min(3, end - time.time())))
        elif kind == "slow":
            await socket.send(START)
            await socket.send(json.dumps({"type": "pull", "upto": 10**9, "received": 0}))
            await asyncio.sleep(max(0, min(5, end - time.time())))  # the transport's buffers fill; nothing is confirmed
        elif kind == "malformed":
            await socket.send('{"type": "start", "seed": "x"}')
            await drain(socket, kind)
        elif kind == "oversized":
            with contextlib.suppress(ConnectionClosed):
                await socket.send(b"x" * 6 * 2**20)
            await drain(socket, kind)
        elif kind == "origin":
            await drain(socket, kind)
        elif kind == "flood":
            await socket.send(START)
            with contextlib.suppress(ConnectionClosed):
                for i in range(10**5):
                    prompt = f"a green {i % 10} moving up"
                    await socket.send(json.dumps({"type": "prompt", "prompt": prompt, "id": i}))
                    if i % 10 == 9:
                        await asyncio.sleep(0.01)  # a thousand a second
                    if time.time() > end:
                        break
            await drain(socket, kind)
        else:
            await socket.send(START)


async def drain(socket: client.ClientConnection, kind: str) -> None:
    """Read until the server closes, and count the code."""
    try:
        while True:
            await asyncio.wait_for(socket.recv(), 5)
    except ConnectionClosed as error:
        CLOSES[f"{kind} {error.rcvd.code if error.rcvd else 'cut'}"] += 1
    except TimeoutError:
        CLOSES[f"{kind} open"] += 1


async def persist(kind: str, port: int, end: float) -> None:
    """Attack again and again."""
    while time.time() < end:
        with contextlib.suppress(OSError, InvalidHandshake, ConnectionClosed, TimeoutError):
            await attack(kind, port, end)
        await asyncio.sleep(0.05)


async def main(port: int, seconds: float) -> None:
    """Run all clients."""
    end = time.time() + seconds
    await asyncio.gather(*(persist(KINDS[i % len(KINDS)], port, end) for i in range(COUNT)))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2])))
    print(json.dumps(CLOSES))
