"""A server under load: many clients that stream at once, beside some that misbehave.

    python benchmarks/serving_load.py [--model smollm2-135m] [--clients 64] [--seconds 60] [--warm-up 60]

`finespun serve` runs in a process of its own, this one is its clients. First each prompt is answered greedily with
nobody else there. Then `--clients` clients ask for one after the other, as streams, and each text has to be the one
that was written alone; the others leave in the middle of a text, send their body byte by byte, read slowly, or send
what is no request. Latencies and tokens are counted after `--warm-up` seconds, and so is the growth of the server's
memory: what it takes at the end of the warm-up, and at the end, each the largest of five seconds.

In bfloat16 near ties may fall otherwise in company than alone, so texts are compared in float32 by default.

The exit code is 1 if a text was another one, a request failed, or nobody was answered. What clients and server share
are the cores of one machine, so the figures are of both together.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

SUBJECTS = ["a lighthouse", "the old mill", "a ferry", "snow", "the market", "a heron", "bread", "the night train"]
ASKED = [
    "Write one sentence about {}.",
    "What is {} good for?",
    "Tell me a short story about {}.",
    "List three words that go with {}.",
]
PROMPTS = [asked.format(subject) for asked in ASKED for subject in SUBJECTS]
GARBAGE = [b"{", b"\xff\xfe", b'{"model": "m"}', b"[" * 10_000, b'{"temperature": NaN}', b"x" * 5_000_000]


@dataclass
class Tally:
    """What was seen since the warm-up ended."""

    first_token: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens: int = 0
    answers: int = 0
    wrong: list[tuple[str, str, str]] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    rude: Counter[str] = field(default_factory=Counter)


class Load:
    def __init__(self, url: str, model: str, max_tokens: int) -> None:
        self.url, self.model, self.max_tokens = url, model, max_tokens
        self.port = int(url.split(":")[2].split("/")[0])
        self.expected: dict[str, str] = {}
        self.tally = Tally()
        self.client = httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=None))

    def body(self, prompt: str) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    async def pieces(self, prompt: str) -> AsyncIterator[dict[str, Any]]:
        async with self.client.stream("POST", f"{self.url}/chat/completions", json=self.body(prompt)) as answer:
            if answer.status_code != 200:
                await answer.aread()
                raise RuntimeError(f"{answer.status_code} {answer.text[:200]}")
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    return
                if line:
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        raise RuntimeError(chunk["error"]["message"])
                    yield chunk
        raise RuntimeError("the stream ended without [DONE]")

    async def ask(self, prompt: str) -> tuple[str, float, float, int]:
        """The text, seconds to its first piece and to its end, and its tokens."""
        begun = time.perf_counter()
        text, first, tokens = "", 0.0, 0
        async for chunk in self.pieces(prompt):
            for choice in chunk["choices"]:
                if choice["delta"].get("content"):
                    first = first or time.perf_counter() - begun
                    text += choice["delta"]["content"]
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
        return text, first, time.perf_counter() - begun, tokens

    async def client_loop(self, number: int) -> None:
        for prompt in itertools.islice(itertools.cycle(PROMPTS), number, None):
            tally = self.tally
            try:
                text, first, whole, tokens = await self.ask(prompt)
            except (RuntimeError, httpx.HTTPError) as error:
                tally.failures[f"{type(error).__name__}: {error}"] += 1
                await asyncio.sleep(0.1)
                continue
            tally.answers += 1
            tally.first_token.append(first)
            tally.whole.append(whole)
            tally.tokens += tokens
            if text != self.expected[prompt]:
                tally.wrong.append((prompt, self.expected[prompt], text))

    async def leaver(self) -> None:
        """Goes away in the middle of a text."""
        while True:
            pieces = self.pieces(random.choice(PROMPTS))
            with suppress(RuntimeError, httpx.HTTPError):
                for _ in range(random.randint(0, 10)):
                    await anext(pieces, None)
            await pieces.aclose()
            self.tally.rude["left in the middle"] += 1

    async def raw(self, body: bytes, delay: float = 0.0, read_bytes: int = 65536, length: int | None = None) -> bytes:
        """What comes back for a body that is sent as it is, byte by byte where there is a delay."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**16)
        try:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length or len(body)}\r\nConnection: close\r\n\r\n"
            writer.write(head.encode())
            for byte in body if delay else ():
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(delay)
            if not delay:
                writer.write(body)
            received = b""
            while piece := await reader.read(read_bytes):
                received += piece
                await asyncio.sleep(delay)
            return received
        finally:
            writer.close()

    async def slow_sender(self) -> None:
        while True:
            with suppress(OSError):
                await self.raw(json.dumps(self.body(PROMPTS[0])).encode(), delay=0.02)
            self.tally.rude["sent and read slowly"] += 1

    async def garbler(self) -> None:
        while True:
            body = random.choice(GARBAGE)
            with suppress(OSError):
                status = (await self.raw(body)).split(b" ", 2)[1:2]
                if status and not status[0].startswith(b"4"):
                    self.tally.failures[f"garbage got {status[0].decode()}"] += 1
            self.tally.rude["sent garbage"] += 1
            await asyncio.sleep(0.1)

    async def run(self, clients: int, warm_up: float, seconds: float, server: psutil.Process) -> tuple[int, int, float]:
        """The server's memory in bytes at the end of the warm-up and at the end; the seconds between them."""
        for prompt in PROMPTS:
            self.expected[prompt] = (await self.ask(prompt))[0]
        works: list[Coroutine[Any, Any, None]] = [self.client_loop(number) for number in range(clients)]
        works += [self.leaver(), self.leaver(), self.slow_sender(), self.slow_sender(), self.garbler()]
        tasks = [asyncio.create_task(work) for work in works]
        await asyncio.sleep(max(0, warm_up - 5))
        before = await most_memory(server)
        begun, self.tally = time.perf_counter(), Tally()
        await asyncio.sleep(max(0, seconds - 5))
        after = await most_memory(server)
        took = time.perf_counter() - begun
        for task in tasks:
            task.cancel()
        for end in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(end, asyncio.CancelledError):
                self.tally.failures[f"a client broke: {end!r}"] += 1
        await self.client.aclose()
        return before, after, took


async def most_memory(server: psutil.Process) -> int:
    """The largest resident size in five seconds."""
    sizes = []
    for _ in range(5):
        sizes.append(server.memory_info().rss)
        await asyncio.sleep(1)
    return max(sizes)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--warm-up", type=float, default=60)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--max-tokens", type=int, default=32)
    options = parser.parse_args()
    command = [
        sys.executable,
        "-m",
        "finespun",
        "serve",
        f"m={options.model}",
        "--port",
        "0",
        "--precision",
        options.precision,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            told = process.stdout.readline()
            if not told:
                sys.exit("The server did not start.")
            load = Load(told.split()[-1], "m", options.max_tokens)
            server = psutil.Process(process.pid)
            before, after, seconds = asyncio.run(load.run(options.clients, options.warm_up, options.seconds, server))
        finally:
            process.terminate()
            stopped = time.perf_counter()
            code = process.wait(60)
    tally = load.tally
    print(
        f"{options.model} in {options.precision}, {options.clients} clients, {seconds:.0f} s after a warm-up of {options.warm_up:.0f} s"
    )
    print(f"answers            {tally.answers} ({tally.tokens / seconds:.0f} tokens/s)")
    print(f"other than alone   {len(tally.wrong)}")
    print(f"failed             {sum(tally.failures.values())} {dict(tally.failures) or ''}")
    print(
        f"first token        p50 {percentile(tally.first_token, 0.5):.2f} s, p95 {percentile(tally.first_token, 0.95):.2f} s"
    )
    print(
        f"whole answer       p50 {percentile(tally.whole, 0.5):.2f} s, p95 {percentile(tally.whole, 0.95):.2f} s, mean {statistics.fmean(tally.whole or [0]):.2f} s"
    )
    print(f"server's memory    {before / 1e6:.0f} MB, then {after / 1e6:.0f} MB ({(after - before) / 1e6:+.0f} MB)")
    print(f"misbehaved         {dict(tally.rude)}")
    print(f"stopped            in {time.perf_counter() - stopped:.1f} s with exit code {code}")
    for prompt, expected, text in tally.wrong[:3]:
        print(f"--- {prompt}\nalone: {expected!r}\nhere:  {text!r}")
    sys.exit(bool(tally.wrong or tally.failures or not tally.answers or code))


if __name__ == "__main__":
    main()
