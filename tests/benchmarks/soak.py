"""Many visitors at once, hour after hour, and attacks: what a served page answers, how fast, and what grows.

    python tests/benchmarks/soak.py                                # 64 visitors at once, a question each
    python tests/benchmarks/soak.py --insist                       # who is refused (HTTP 503) asks again until there is an answer
    python tests/benchmarks/soak.py --requests 3000 --clients 8    # a line every 500 requests, and the growth since the first
    python tests/benchmarks/soak.py --unread 4                     # before and beside large questions whose answers nobody reads
    python tests/benchmarks/soak.py --unread 34                    # the same with more of them than are answered at once
    python tests/benchmarks/soak.py --large 12                     # images of 60 megapixels at once: peak, and a minute later
    python tests/benchmarks/soak.py --cancelled 45                 # such images, cancelled at once: work 10 seconds later
    python tests/benchmarks/soak.py --scans 2000                   # a JPEG of so many scans: seconds until it is refused or read
    python tests/benchmarks/soak.py --root OTHER_TREE              # the same with another version of the project

Starts `app.py` on a free port of this machine with the embedded checkpoint (or what follows `--`, such as `-- --model
FOLDER --dtype int8`), and asks as programs do, each request in a session of its own. Latency is the time from asking to
the last token as a client sees it; memory, open files and threads are the server's. Who attacks has an address of its own.
Odd calls by the thousand are a test: `pytest -m slow -n 0 tests/browser/test_command.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "paligemma" / "demo" / "examples"
QUESTIONS = [
    ("cats.png", "caption en"),
    ("picnic.png", "detect apple ; banana"),
    ("traffic.png", "segment car"),
    ("music.png", "answer en what is left of the guitar?"),
    ("sign.png", "ocr"),
]
STEP = 500  # requests between two lines
SIDE = 7745  # of an image of 60 megapixels
AGAIN = 0.25  # seconds until who was refused asks again
MINUTE, SOON = 60, 10  # seconds after an attack at which is measured what is left of it
ATTACKER = {"x-forwarded-for": "203.0.113.7"}


@dataclass
class Tally:
    """What clients saw since the last line: seconds of each answer, seconds to its first text, and refusals."""

    latencies: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)


async def ask(client: httpx.AsyncClient, page: str, path: str, prompt: str, tally: Tally, insist: bool = False) -> None:
    """One request in a session of its own; who insists repeats it while it is refused."""
    start, first = time.perf_counter(), None
    call = {"data": [{"path": path}, prompt, 64, 0, 0, 1, None], "session_hash": uuid.uuid4().hex}
    while (answer := await client.post(f"{page}/call/generate", json=call)).status_code == 503 and insist:
        await asyncio.sleep(AGAIN)
    if answer.status_code != 200:
        tally.refusals.append(f"HTTP {answer.status_code}")
        return
    event = "no answer"
    async with client.stream("GET", f"{page}/call/generate/{answer.json()['event_id']}") as stream:
        async for line in stream.aiter_lines():
            if line.startswith("event: "):
                event = line.removeprefix("event: ")
            elif line.startswith("data: ") and event in ("generating", "complete") and first is None:
                first = time.perf_counter() - start if json.loads(line.removeprefix("data: "))[0] else None
            elif line.startswith("data: ") and event == "error":
                event = line
    if event == "complete":
        tally.latencies.append(time.perf_counter() - start)
        tally.firsts.append(first or tally.latencies[-1])
    else:
        tally.refusals.append(event)


async def upload(client: httpx.AsyncClient, page: str, image: Image.Image, **settings: object) -> str:
    """Upload an image as JPEG and return its path."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "jpeg", **settings)
    return (await client.post(f"{page}/upload", files={"files": ("large.jpg", file.getvalue())})).json()[0]


async def ask_unread(client: httpx.AsyncClient, page: str, count: int) -> None:
    """Ask so many times for many masks in an image of 4000 x 4000 pixels, and read no answer."""
    path = await upload(client, page, Image.open(EXAMPLES / "traffic.png").resize((4000, 4000)))
    values = [{"path": path}, "\n".join(["segment car ; bus ; tree ; dog"] * 8), 256, 0, 0, 1, None]
    for _ in range(count):
        await client.post(f"{page}/call/generate", json={"data": values}, headers=ATTACKER)


async def ask_large(client: httpx.AsyncClient, page: str, process: psutil.Process, count: int) -> None:
    """Ask about so many images of 60 megapixels at once."""
    paths = {}
    for number, (_, prompt) in zip(range(count), QUESTIONS * count):
        image = Image.new("RGB", (SIDE, SIDE), (number, 2 * number, 90))
        paths[f"{number} {prompt}"] = await upload(client, page, image)
    before, tally = process.memory_info().rss, Tally()
    async with Peak(process) as peak:
        await asyncio.gather(*(ask(client, page, path, name.partition(" ")[2], tally) for name, path in paths.items()))
        seconds = time.perf_counter() - tally.start
        await asyncio.sleep(MINUTE)
    print(
        f"{count} images of 60 megapixels: {len(tally.latencies)} answered in {seconds:.1f} s, {len(tally.refusals)} refused {' '.join(set(tally.refusals))};"
        f" memory {before / 1e6:.0f} MB before, {peak.bytes / 1e6:.0f} MB at most, {process.memory_info().rss / 1e6:.0f} MB"
        f" {MINUTE} s later",
        flush=True,
    )


async def cancel_large(client: httpx.AsyncClient, page: str, process: psutil.Process, count: int) -> None:
    """Ask so many times about an image of 60 megapixels, and cancel at once."""
    path = await upload(client, page, Image.new("RGB", (SIDE, SIDE), "navy"), progressive=True)
    config = (await client.get(f"{page.removesuffix('/gradio_api')}/config")).json()
    memory = process.memory_info().rss
    number = next(one["id"] for one in config["dependencies"] if one["api_name"] == "generate")
    for _ in range(count):
        session = uuid.uuid4().hex
        call = {"data": [{"path": path}, "caption en", 64, 0, 0, 1, None], "session_hash": session}
        event = (await client.post(f"{page}/call/generate", json=call, headers=ATTACKER)).json()["event_id"]
        cancel = {"fn_index": number, "session_hash": session, "event_id": event}
        await client.post(f"{page}/cancel", json=cancel, headers=ATTACKER)
    await asyncio.sleep(SOON)
    before = sum(process.cpu_times()[:2])
    await asyncio.sleep(SOON)
    seconds = sum(process.cpu_times()[:2]) - before
    await asyncio.sleep(MINUTE - 2 * SOON)
    print(
        f"{count} cancelled: {seconds:.1f} s of CPU from the {SOON}th to the {2 * SOON}th second; memory {memory / 1e6:.0f} MB"
        f" before, {process.memory_info().rss / 1e6:.0f} MB {MINUTE} s later",
        flush=True,
    )


async def ask_about_scans(client: httpx.AsyncClient, page: str, count: int) -> None:
    """Ask about a progressive JPEG whose last scan comes so often."""
    file = io.BytesIO()
    Image.new("L", (7000, 7000), 77).save(file, "jpeg", progressive=True)
    start = file.getvalue().rindex(b"\xff\xda")
    content = file.getvalue()[:start] + file.getvalue()[start:-2] * count + b"\xff\xd9"
    (path,) = (await client.post(f"{page}/upload", files={"files": ("scans.jpg", content)})).json()
    tally = Tally()
    await ask(client, page, path, "caption en", tally)
    seconds = time.perf_counter() - tally.start
    print(f"a JPEG of {count} scans: {(tally.refusals or ['read'])[0]} after {seconds:.2f} s", flush=True)


class Peak:
    """The most resident memory of a process while it is watched, in bytes."""

    def __init__(self, process: psutil.Process):
        self.process, self.bytes = process, 0

    async def __aenter__(self) -> Peak:
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._watching.cancel()

    async def _watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, self.process.memory_info().rss)
            await asyncio.sleep(0.05)


@dataclass
class Visitors:
    """Requests for a page, `clients` at the same time, and what the server was like meanwhile."""

    client: httpx.AsyncClient
    page: str
    process: psutil.Process
    uploads: Path
    log: Path
    clients: int
    insist: bool

    async def ask(self, requests: int) -> None:
        """Ask so many times, print a line every `STEP` requests, and how memory grows from the first line on."""
        paths = {name: await upload(self.client, self.page, Image.open(EXAMPLES / name)) for name, _ in QUESTIONS}
        places, after_first = asyncio.Semaphore(self.clients), 0

        async def one(number: int, tally: Tally) -> None:
            name, prompt = QUESTIONS[number % len(QUESTIONS)]
            async with places:
                await ask(self.client, self.page, paths[name], prompt, tally, self.insist)

        print("requests answered refused  median    p95  first  tokens/s  memory  files threads uploads", flush=True)
        for begin in range(0, requests, STEP):
            end, tally = min(begin + STEP, requests), Tally()
            tokens = count_tokens(self.log)
            await asyncio.gather(*(one(number, tally) for number in range(begin, end)))
            seconds = time.perf_counter() - tally.start
            await asyncio.sleep(1)  # for the last lines of the log
            self._print(end, tally, (count_tokens(self.log) - tokens) / seconds)
            memory = self.process.memory_info().rss
            after_first = after_first or memory
        print(f"memory has grown by {memory / after_first - 1:.1%} since the first line", flush=True)

    def _print(self, end: int, tally: Tally, rate: float) -> None:
        times = sorted(tally.latencies) or [float("nan")]
        files = sum(path.is_file() for path in self.uploads.rglob("*"))
        print(
            f"{end:8} {len(tally.latencies):8} {len(tally.refusals):7} {statistics.median(times):6.2f}s"
            f" {times[int(0.95 * (len(times) - 1))]:5.2f}s {statistics.median(tally.firsts or [float('nan')]):5.2f}s"
            f" {rate:9.1f} {self.process.memory_info().rss / 1e6:4.0f} MB"
            f" {self.process.num_fds():6} {self.process.num_threads():7} {files:7}",
            flush=True,
        )
        for sentence in sorted(set(tally.refusals)):
            print(f"         {tally.refusals.count(sentence)} × {sentence}")


async def soak(page: str, process: psutil.Process, uploads: Path, log: Path, options: argparse.Namespace) -> None:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=options.clients)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        visitors = Visitors(client, page, process, uploads, log, options.clients, options.insist)
        path = await upload(client, page, Image.new("RGB", (448, 448)))
        await ask(client, page, path, "caption en", Tally())  # the first answer warms up
        if options.scans:
            await ask_about_scans(client, page, options.scans)
        if options.large:
            await ask_large(client, page, process, options.large)
        if options.cancelled:
            await cancel_large(client, page, process, options.cancelled)
        if options.requests:
            await visitors.ask(options.requests)
        if options.unread:
            before = process.memory_info().rss
            async with Peak(process) as peak:
                await ask_unread(client, page, options.unread)
                await visitors.ask(options.requests)
                await asyncio.sleep(MINUTE)
            grown = [(memory - before) / 1e6 for memory in (peak.bytes, process.memory_info().rss)]
            print(f"{options.unread} unread: at most {grown[0]:.0f} MB more, {grown[1]:.0f} MB more {MINUTE} s later")


def count_tokens(log: Path) -> int:
    """How many tokens the server has logged."""
    return sum(map(int, re.findall(r" tokens=(\d+)", log.read_text())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, help="64, or none where there is an attack that needs none beside it")
    parser.add_argument("--clients", type=int, default=64, help="how many ask at the same time")
    parser.add_argument("--insist", action="store_true", help="ask again when refused, until there is an answer")
    parser.add_argument("--unread", type=int, default=0, help="how many then ask for much, and read nothing")
    parser.add_argument("--large", type=int, default=0, help="how many ask about 60 megapixels at once")
    parser.add_argument("--cancelled", type=int, default=0, help="how many do so and cancel")
    parser.add_argument("--scans", type=int, default=0, help="of a JPEG that is asked about")
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree whose app.py is started")
    parser.add_argument("arguments", nargs="*", help="further arguments of app.py, after --")
    options = parser.parse_args()
    if options.requests is None:
        options.requests = 0 if options.large or options.cancelled or options.scans else 64
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        log, uploads = Path(folder, "log"), Path(folder, "uploads")
        with log.open("w") as output:
            server = subprocess.Popen(
                [sys.executable, str(options.root / "app.py"), "--port", str(port), *options.arguments],
                cwd=options.root,
                env={**os.environ, "GRADIO_TEMP_DIR": str(uploads)},
                stdout=output,
                stderr=output,
            )
        try:
            page = f"http://127.0.0.1:{port}/gradio_api"
            while True:
                try:
                    httpx.get(f"{page}/info")
                    break
                except httpx.HTTPError:
                    if server.poll() is not None:
                        sys.exit(log.read_text())
                    time.sleep(0.5)
            process = psutil.Process(server.pid)
            asyncio.run(soak(page, process, uploads, log, options))
        finally:
            server.terminate()
            server.wait(timeout=120)


if __name__ == "__main__":
    main()
