"""What a second replica gives, and what the way to a replica costs a token (needs `pip install "ray[serve]"`).

    python tests/benchmarks/cluster.py                                    # the embedded checkpoint, a core each
    python tests/benchmarks/cluster.py --folder FOLDER --dtype int8

Starts a Ray cluster on this machine. Prints the tokens per second of answers that are asked for by many at once: of the model
in this process, of one replica and of two; then the time to first token and per token of a single answer, here and
from a replica. Medians of several rounds in turn.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from full_size import noise
from together import never_ending

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import paligemma
from paligemma.demo import cluster as module
from paligemma.demo.cluster import Cluster, Replica

PROMPT = "caption en"
SINGLES = 8  # answers in each round that nobody else disturbs


class NeverEnding(Replica):
    """A replica whose answers have the length that was asked for."""

    def __init__(self, source: str | None, settings: dict):
        super().__init__(source, settings)
        never_ending(self._vlm)


def throughput(vlm: object, seeds: Iterator[int], clients: int, tokens: int, seconds: float) -> float:
    """Tokens per second of `clients` who ask about one new image after the other."""
    end = time.perf_counter() + seconds

    def ask(_: int) -> int:
        count = 0
        while time.perf_counter() < end:
            for _, token in vlm.stream_batch([noise(next(seeds))], [PROMPT], max_new_tokens=tokens):
                if time.perf_counter() >= end:
                    break
                count += token is not None
        return count

    with ThreadPoolExecutor(clients) as threads:
        return sum(threads.map(ask, range(clients))) / seconds


def single(vlm: object, seeds: Iterator[int], tokens: int) -> tuple[float, float]:
    """Seconds to the first token of an answer, and for each after it."""
    times = [time.perf_counter()]
    for _ in vlm.stream_batch([noise(next(seeds))], [PROMPT], max_new_tokens=tokens):
        times.append(time.perf_counter())
    return times[1] - times[0], (times[-2] - times[1]) / (len(times) - 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="the checkpoint; the embedded one if not given")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement of throughput")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Ray's processes let all others go first (nice 15); here they are to have the same turn.
    os.environ.setdefault("RAY_worker_niceness", str(os.nice(0)))
    settings = {"device": "cpu", "dtype": options.dtype}
    local = paligemma.load(options.folder, **settings)
    never_ending(local)
    module.Replica = NeverEnding
    seeds = itertools.count()
    alone = {"in this process": local}
    quiet = {"object_store_memory": 100_000_000, "include_dashboard": False}
    rates: dict[str, list[float]] = {}
    latencies: dict[str, list[tuple[float, float]]] = {}
    for replicas in (1, 2):
        cluster = Cluster("local", (replicas, replicas), cpus=1, device="cpu", num_cpus=2, **quiet)
        remote = cluster.load(options.folder, settings, lambda *_: None)
        contenders = {f"replicas: {replicas}": remote} | (alone if replicas == 1 else {})
        for vlm in contenders.values():
            throughput(vlm, seeds, options.clients, options.tokens, 2)
        for _ in range(options.rounds):
            for name, vlm in contenders.items():
                rate = throughput(vlm, seeds, options.clients, options.tokens, options.seconds)
                rates.setdefault(name, []).append(rate)
            for name, vlm in list(contenders.items()) * SINGLES if replicas == 1 else ():
                latencies.setdefault(name, []).append(single(vlm, seeds, options.tokens))
        cluster.close()
    one = statistics.median(rates["replicas: 1"])
    for name, measured in sorted(rates.items()):
        rate = statistics.median(measured)
        print(f"{name:16} {rate:7.1f} tokens/s of {options.clients} clients, {rate / one:.2f} × one replica")
    for name, measured in sorted(latencies.items()):
        first, token = (statistics.median(values) for values in zip(*measured))
        print(f"{name:16} first token {first * 1e3:.1f} ms, then {token * 1e3:.2f} ms a token")


if __name__ == "__main__":
    main()
