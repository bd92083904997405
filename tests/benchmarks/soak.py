"""Many visitors at once, hour after hour: what a served page answers, how fast, and what grows.

    python tests/benchmarks/soak.py                                # 64 visitors at once, a question each
    python tests/benchmarks/soak.py --requests 3000 --clients 8    # a line every 500 requests
    python tests/benchmarks/soak.py --unread 4                     # beside large questions whose answers nobody reads
    python tests/benchmarks/soak.py --root OTHER_TREE              # the same with another version of the project

Starts `app.py` on a free port of this machine with the embedded checkpoint (or what follows `--`, such as `-- --model
FOLDER --dtype int8`), and asks as programs do, each request in a session of its own. Latency is the time from asking to
the last token as a client sees it; memory, open files and threads are the server's.
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
AFTER_UNREAD = 60  # seconds


@dataclass
class Tally:
    """What clients saw since the last line: seconds of each answer, seconds to its first text, and refusals."""

    latencies: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)


async def ask(client: httpx.AsyncClient, page: str, paths: dict[str, str], number: int, tally: Tally) -> None:
    """One request in a session of its own."""
    name, prompt = QUESTIONS[number % len(QUESTIONS)]
    start, first = time.perf_counter(), None
    answer = await client.post(
        f"{page}/call/generate",
        json={"data": [{"path": paths[name]}, prompt, 64, 0, 0, 1, None], "session_hash": uuid.uuid4().hex},
    )
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


async def ask_unread(client: httpx.AsyncClient, page: str, count: int) -> None:
    """Ask so many times for many masks in an image of 4000 x 4000 pixels, and read no answer."""
    file = io.BytesIO()
    Image.open(EXAMPLES / "traffic.png").convert("RGB").resize((4000, 4000)).save(file, "jpeg")
    (path,) = (await client.post(f"{page}/upload", files={"files": ("large.jpg", file.getvalue())})).json()
    values = [{"path": path}, "\n".join(["segment car ; bus ; tree ; dog"] * 8), 256, 0, 0, 1, None]
    for _ in range(count):
        await client.post(f"{page}/call/generate", json={"data": values})


class Peak:
    """The most resident memory of a process since the beginning, in bytes."""

    def __init__(self, process: psutil.Process):
        self.process, self.bytes = process, 0

    async def watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, self.process.memory_info().rss)
            await asyncio.sleep(0.05)


async def soak(
    page: str, process: psutil.Process, uploads: Path, log: Path, requests: int, clients: int, unread: int
) -> None:
    places = asyncio.Semaphore(clients)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        paths = {}
        for name, _ in QUESTIONS:
            with (EXAMPLES / name).open("rb") as file:
                paths[name] = (await client.post(f"{page}/upload", files={"files": file})).json()[0]

        async def one(number: int, tally: Tally) -> None:
            async with places:
                await ask(client, page, paths, number, tally)

        await one(0, Tally())  # the first answer warms up
        before = process.memory_info().rss
        peak = Peak(process)
        watching = asyncio.create_task(peak.watch())
        await ask_unread(client, page, unread)
        print("requests answered refused  median    p95  first  tokens/s  memory  files threads uploads", flush=True)
        for begin in range(0, requests, STEP):
            end, tally = min(begin + STEP, requests), Tally()
            tokens_before = count_tokens(log)
            await asyncio.gather(*(one(number, tally) for number in range(begin, end)))
            seconds = time.perf_counter() - tally.start
            await asyncio.sleep(1)  # for the last lines of the log
            times = sorted(tally.latencies) or [float("nan")]
            print(
                f"{end:8} {len(tally.latencies):8} {len(tally.refusals):7} {statistics.median(times):6.2f}s"
                f" {times[int(0.95 * (len(times) - 1))]:5.2f}s {statistics.median(tally.firsts or [float('nan')]):5.2f}s"
                f" {(count_tokens(log) - tokens_before) / seconds:9.1f} {process.memory_info().rss / 1e6:4.0f} MB"
                f" {process.num_fds():6} {process.num_threads():7} {sum(path.is_file() for path in uploads.rglob('*')):7}",
                flush=True,
            )
            for sentence in sorted(set(tally.refusals)):
                print(f"         {tally.refusals.count(sentence)} × {sentence}")
        if unread:
            await asyncio.sleep(AFTER_UNREAD)
            grown = (process.memory_info().rss - before) / 1e6
            print(f"{grown:.0f} MB more than at the start, {AFTER_UNREAD} s after the last answer")
        watching.cancel()
        print(f"memory before: {before / 1e6:.0f} MB, at most {(peak.bytes - before) / 1e6:.0f} MB more")


def count_tokens(log: Path) -> int:
    """How many tokens the server has logged."""
    return sum(map(int, re.findall(r" tokens=(\d+)", log.read_text())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--clients", type=int, default=64, help="how many ask at the same time")
    parser.add_argument("--unread", type=int, default=0, help="how many ask first, for much, and read nothing")
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree whose app.py is started")
    parser.add_argument("arguments", nargs="*", help="further arguments of app.py, after --")
    options = parser.parse_args()
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
            asyncio.run(soak(page, process, uploads, log, options.requests, options.clients, options.unread))
        finally:
            server.terminate()
            server.wait(timeout=120)


if __name__ == "__main__":
    main()
