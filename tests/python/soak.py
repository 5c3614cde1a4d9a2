#!/usr/bin/env python3
"""Many requests to `mixtral serve`, and clients that misbehave, on the example model. It is run by hand.

    soak.py --mixtral PATH [--requests 20000] [--leave 0.1] [--connections 10000] [--seed N]
    soak.py --mixtral PATH --backend cuda --convert "--dtype bf16 --tp_size 2" --requests 1000 --leave 0.4 --connections 0

The soak sends requests of mixed lengths, 32 at a time. Some of the clients leave at a random moment, and some bodies are
malformed. Every answer must be the one that the same request had alone; afterwards no sequence runs and no block is held, and
memory is as it was after the first tenth. Then come the clients that do harm: bodies of 100 MB, heads and bodies that arrive
byte by byte, connections that are left half open, and thousands that say nothing. Others must be answered meanwhile. With
--connections 0 they do not come.
"""

import argparse
import asyncio
import json
import multiprocessing
import random
import resource
import tempfile
import time
from pathlib import Path

from server import KEY, tiny

PROMPTS = ["ROMEO:", "First Citizen:", "What is", "Now the", "JULIET:\nO", "My lord,", "The king", "Enter a"]
AT_ONCE = 32
MALFORMED = ["", "{", "[]", '{"model": "tiny"}', '{"model": "tiny", "prompt": 3}', '{"model": "tiny", "prompt": "a", "x": 1}',
             '{"model": "tiny", "prompt": "a", "max_tokens": 100000}', "\x00" * 100]


class Client:
    def __init__(self, url):
        self.host, port = url.removeprefix("http://").rsplit(":", 1)
        self.port = int(port)

    def request(self, body, path="/v1/completions", method="POST"):
        body = body.encode()
        return (f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {KEY}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n").encode() + body

    async def open(self):
        return await asyncio.open_connection(self.host, self.port)

    async def ask(self, body, path="/v1/completions", method="POST", leave_after=None):
        """(status, body) of an answer; None if the client left before it was complete."""
        reader, writer = await self.open()
        try:
            writer.write(self.request(body, path, method))
            answer = await asyncio.wait_for(reader.read(-1), leave_after)
        except asyncio.TimeoutError:
            return None
        finally:
            writer.close()
        head, _, rest = answer.partition(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1]), rest.decode()

    async def metrics(self):
        _, text = await self.ask("", "/metrics", "GET")
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in filter(lambda line: len(line) == 2, lines)}


def resident(process):
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def body(prompt, tokens):
    return json.dumps({"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0})


async def soak(server, client, count, leave, rng):
    expected = {}
    for prompt in PROMPTS:
        begun = time.monotonic()
        status, text = await client.ask(body(prompt, 80))
        assert status == 200
        # Who leaves does so within the time that a long answer takes alone.
        patience = time.monotonic() - begun
        for tokens in (1, 5, 20, 80):
            _, text = await client.ask(body(prompt, tokens))
            expected[prompt, tokens] = json.loads(text)["choices"][0]["text"]
    counts = {"answered": 0, "left": 0, "refused": 0}
    places = asyncio.Semaphore(AT_ONCE)
    sizes = []

    async def one(number):
        async with places:
            if rng.random() < 0.05:
                status, _ = await client.ask(rng.choice(MALFORMED))
                assert status == 400, status
                counts["refused"] += 1
                return
            prompt, tokens = rng.choice(list(expected))
            leaves = rng.random() < leave
            answer = await client.ask(body(prompt, tokens), leave_after=rng.random() * patience if leaves else None)
            if answer is None:
                counts["left"] += 1
                return
            status, text = answer
            assert status == 200, (status, text)
            assert json.loads(text)["choices"][0]["text"] == expected[prompt, tokens], "an answer is another's"
            counts["answered"] += 1

    start = time.monotonic()
    tenth = count // 10
    for part in range(10):
        await asyncio.gather(*(one(part * tenth + number) for number in range(tenth)))
        sizes.append(resident(server.process))
    seconds = time.monotonic() - start
    for _ in range(100):
        metrics = await client.metrics()
        held = [value for name, value in metrics.items() if name.startswith(("vllm:num_requests_", "vllm:kv_cache_usage"))]
        if not any(held):
            break
        await asyncio.sleep(0.1)
    assert not any(held), f"sequences or blocks are left: {held}"
    print(f"{10 * tenth} requests in {seconds:.0f} s: {counts}; memory {sizes[0]:.1f} MB after a tenth, {sizes[-1]:.1f} MB at the end")
    assert abs(sizes[-1] / sizes[0] - 1) < 0.05, f"memory is not flat: {sizes}"


async def latencies(client, seconds):
    """Times of answers to a client that asks again and again."""
    times, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.monotonic()
        status, _ = await client.ask(body("ROMEO:", 5))
        assert status == 200, status
        times.append(time.monotonic() - start)
    return times


def p99(times):
    return 1e3 * sorted(times)[int(0.99 * len(times))]


async def large_bodies(client):
    """Sends 100 MB again and again; the server refuses them by their size, and closes."""
    while True:
        reader, writer = await client.open()
        head = client.request("").replace(b"Content-Length: 0", b"Content-Length: 100000000")
        writer.write(head)
        try:
            for _ in range(100):
                writer.write(b" " * 1_000_000)
                await writer.drain()
            answer = await reader.read(-1)
        except ConnectionError:
            answer = b"HTTP/1.1 413"
        assert answer.startswith(b"HTTP/1.1 413"), answer[:100]
        writer.close()


async def slow_loris(client, part):
    """Sends a request byte by byte, until the server has had enough."""
    while True:
        reader, writer = await client.open()
        request = client.request(body("a", 1))
        start = time.monotonic()
        try:
            for byte in request[: len(request) * part // 10]:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.2)
                if reader.at_eof():
                    break
            await reader.read(-1)
        except ConnectionError:
            pass
        assert time.monotonic() - start < 30, "a client that sends byte by byte was waited for"
        writer.close()


async def leavers(client):
    """Begins long answers and resets the connection."""
    while True:
        _, writer = await client.open()
        writer.write(client.request(json.dumps({"model": "tiny", "prompt": "ROMEO:", "max_tokens": 400, "stream": True})))
        await asyncio.sleep(0.05)
        writer.transport.abort()


async def silent(client, count):
    """Opens connections and says nothing."""
    opened = []
    try:
        for _ in range(count):
            opened.append(await client.open())
        print(f"  {len(opened)} connections are open")
        await asyncio.sleep(3600)
    finally:
        for _, writer in opened:
            writer.close()


def clients(client, connections):
    """The clients that do harm, by what they do."""
    return {
        "bodies of 100 MB": [large_bodies(client)],
        "heads and bodies byte by byte": [slow_loris(client, part) for part in (3, 9) for _ in range(50)],
        "long answers that are left": [leavers(client)],
        f"{connections} silent connections": [silent(client, connections)],
    }


def misbehave(url, connections, kind):
    """Runs the clients of one kind, in a process of their own."""
    async def together():
        kinds = clients(Client(url), connections)
        wanted = kinds.pop(kind)
        [other.close() for others in kinds.values() for other in others]
        await asyncio.gather(*wanted)

    asyncio.run(together())


async def disturb(url, connections):
    client = Client(url)
    await latencies(client, 2)
    kinds = clients(client, connections)
    [coroutine.close() for coroutines in kinds.values() for coroutine in coroutines]
    for kind in kinds:
        undisturbed = p99(await latencies(client, 5))
        process = multiprocessing.Process(target=misbehave, args=(url, connections, kind), daemon=True)
        process.start()
        await asyncio.sleep(3)
        times = await latencies(client, 8)
        assert process.is_alive(), f"{kind}: the clients were not treated as expected"
        process.kill()
        process.join()
        print(f"{kind}: p99 {p99(times):.1f} ms, undisturbed {undisturbed:.1f} ms")


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--mixtral", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=20_000, help="0 leaves the soak out")
    parser.add_argument("--leave", type=float, default=0.1, help="part of the clients that leave")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--convert", default="--dtype f32", metavar="FLAGS", help="flags of convert: formats, ranks")
    parser.add_argument("--max-batch-size", type=int, default=4)
    parser.add_argument("--connections", type=int, default=10_000, help="silent clients; 0 leaves out all that do harm")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    args = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(f"seed {args.seed}")
    with tempfile.TemporaryDirectory() as folder:
        build = f"--max-batch-size {args.max_batch_size} --backend {args.backend}"
        flags = ["--backend", args.backend, "--receive-timeout", "10"]
        with tiny(args.mixtral.resolve(), Path(folder), *flags, convert=args.convert, build=build) as server:
            client = Client(server.url)
            while (await client.ask("", "/ready", "GET"))[0] != 200:
                await asyncio.sleep(0.05)
            if args.requests:
                await soak(server, client, args.requests, args.leave, random.Random(args.seed))
            if args.connections:
                await disturb(server.url, args.connections)


if __name__ == "__main__":
    asyncio.run(main())
