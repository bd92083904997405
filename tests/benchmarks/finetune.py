"""Peak memory and time of a training step: an adapter and all weights, and gradient checkpointing of one layer in so many.

python tests/benchmarks/finetune.py                                         # the embedded checkpoint, 8 rows a step
python tests/benchmarks/finetune.py --model FOLDER --dtype bfloat16 --rows 1 --kinds lora --intervals 0 1   # a 3B one

Every measurement has a process of its own; its memory is the most that it ever had resident, or on a GPU allocated. The
optimizer's step is included. On a machine that others use, the time of all cores says more than that of the clock. Weights may be random: neither speed nor memory depends on them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from paligemma.training import finetune
from paligemma.training.data import Batch, collate
from paligemma.training.loop import Run

PROMPT, ANSWER = "detect cat", "<loc0008><loc0016><loc0512><loc1000> cat ; <loc0104><loc0200><loc0304><loc0400> cat"


class SameBatch(torch.utils.data.Dataset):
    """The same rows at each step."""

    def __init__(self, batch: Batch):
        self.batch = batch

    def __getitem__(self, step: int) -> list[tuple[Batch, float]]:
        return [(self.batch, 1.0)]


def measure(kind: str, interval: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Gigabytes before and at the peak, and medians of a step: seconds, and seconds of all cores together."""
    torch.set_num_threads(arguments.threads)
    given = ["--data=-", "--output=-", "--device", arguments.device, *(["--full"] if kind == "full" else [])]
    given += ["--checkpoint-every", str(interval)] if interval else []
    given += ["--model", arguments.model] if arguments.model else []
    options = finetune.parse([*given, "--dtype", arguments.dtype])
    vlm = finetune.load_to_train(options)
    finetune.prepare(vlm.model, options)
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    batch = collate(vlm.processor, [([Image.fromarray(noise)], PROMPT, ANSWER)] * arguments.rows)
    before, starts = peak(vlm.device), []

    def losses(part: tuple[Batch, float]) -> dict[str, Tensor]:
        starts.append((time.perf_counter(), time.process_time()))
        return finetune.losses(vlm.model, part)

    with tempfile.TemporaryDirectory() as folder:
        run = Run("steps", vlm.model, Path(folder), arguments.steps + 2, 1e-5)
        run._save = lambda: None  # which is no part of a step
        run.train(SameBatch(batch), losses, workers=0)
    steps = [(wall - its_wall, busy - its_busy) for (its_wall, its_busy), (wall, busy) in zip(starts[1:], starts[2:])]
    seconds, of_cores = (statistics.median(times) for times in zip(*steps))
    numbers = finetune.trained(vlm.model) / 1e6
    memory = {"before": before, "peak": peak(vlm.device)}
    return {"trained": numbers, **memory, "seconds": seconds, "of cores": of_cores}


def peak(device: torch.device) -> float:
    """Gigabytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def in_own_process(*arguments: Any) -> dict[str, float]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(measure, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder (default: the embedded checkpoint)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=["lora", "full"], choices=("lora", "full"))
    parser.add_argument("--intervals", nargs="+", type=int, default=[0, 3, 2, 1], help="0: no gradient checkpointing")
    arguments = parser.parse_args()
    print(f"{arguments.model or 'the embedded checkpoint'}, {arguments.rows} rows a step, {arguments.threads} threads")
    print(
        "| trained | numbers | layers that keep only their input | memory before | at the peak | seconds a step | of all cores |"
    )
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for kind in arguments.kinds:
        for interval in arguments.intervals:
            found = in_own_process(kind, interval, arguments)
            layers = {0: "none", 1: "all"}.get(interval, f"one in {interval}")
            print(
                f"| {kind} | {found['trained']:.2f} million | {layers} | {found['before']:.2f} GB | {found['peak']:.2f} GB | "
                f"{found['seconds']:.2f} | {found['of cores']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
