"""What decoding together gives, and what it costs those who stream while somebody comes.

    python tests/benchmarks/together.py                                  # the embedded checkpoint
    python tests/benchmarks/together.py --folder FOLDER --dtype int8     # such as full_size.py leaves with --folder

Prints tokens per second of 1, 2, 4, 8 and 16 answers together; the slowest gap between two tokens of a running answer
while another image is read, in parts of its usual gap; and a newcomer's time to first token while four others stream,
in parts of that alone. Medians of several.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import paligemma
from paligemma import VisionLanguageModel

PROMPT = "caption en"
LONGEST = 500  # tokens of an answer: none ends while the last of others is prefilled


def images() -> Iterator[Image.Image]:
    """Images of noise, no two alike, so that none's features are kept already."""
    for seed in itertools.count():
        yield Image.fromarray(np.random.default_rng(seed).integers(0, 256, (224, 224, 3), np.uint8))


def never_ending(vlm: VisionLanguageModel) -> None:
    """Let no token end an answer, since answers of random weights may end at once."""
    vlm.model.config = type(vlm.model.config)(**{**vars(vlm.model.config), "eos_token_ids": ()})


def tokens_per_second(vlm: VisionLanguageModel, source: Iterator[Image.Image], rows: int, count: int) -> float:
    """Of `rows` answers, from when all have begun on, for as long as each is given `count` tokens."""
    batch = vlm.stream_batch([next(source) for _ in range(rows)], [PROMPT] * rows, max_new_tokens=LONGEST)
    counts = [0] * rows
    start, begin = 0.0, 0
    for number, _ in batch:
        counts[number] += 1
        if not start and min(counts) >= 1:
            start, begin = time.perf_counter(), sum(counts)
        if start and sum(counts) - begin >= rows * (count - 1):
            break
    seconds = time.perf_counter() - start
    batch.close()
    return (sum(counts) - begin) / seconds


class Reader(threading.Thread):
    """Reads an answer to its end, or until it is closed, and notes when it began and when its tokens were computed."""

    def __init__(self, vlm: VisionLanguageModel, image: Image.Image, count: int):
        super().__init__(daemon=True)
        self.answer, self.times = vlm.stream(image, PROMPT, max_new_tokens=count), [time.perf_counter()]
        self.start()

    def run(self) -> None:
        for token in self.answer:
            self.times.append(self.times[0] + token.seconds)

    def wait_for(self, count: int) -> None:
        while len(self.times) <= count and self.is_alive():
            time.sleep(0.001)


def newcomer(vlm: VisionLanguageModel, source: Iterator[Image.Image], others: int, count: int) -> tuple[float, float]:
    """The newcomer's seconds to first token while `others` stream, and their slowest gap then over their usual one."""
    running = [Reader(vlm, next(source), LONGEST) for _ in range(others)]
    for reader in running:
        reader.wait_for(count)
    image, start = next(source), time.perf_counter()
    new = Reader(vlm, image, 2)
    new.wait_for(1)
    end = new.times[1]
    ratio = 0.0
    if running:
        gaps = list(zip(running[0].times[2:], running[0].times[3:]))
        usual = statistics.median(after - before for before, after in gaps if after < start)
        ratio = max(after - before for before, after in gaps if after > start and before < end) / usual
    for reader in [*running, new]:
        reader.answer.close()
        reader.join()
    return end - start, ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="the checkpoint; the embedded one if not given")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="answers together; ratios are to the first"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer that is timed")
    parser.add_argument("--newcomers", type=int, default=12, help="who come beside four, and as many who come alone")
    options = parser.parse_args()
    vlm = paligemma.load(options.folder, dtype=options.dtype)
    never_ending(vlm)
    source = images()
    vlm.generate(next(source), PROMPT, max_new_tokens=4)
    print(f"{platform.processor() or platform.machine()}, {vlm.weight_dtype} on {vlm.device}")
    rates: dict[int, list[float]] = {rows: [] for rows in options.rows}
    for _ in range(options.rounds):
        for rows, measured in rates.items():  # in turn, so that a slow minute of the machine meets all
            measured.append(tokens_per_second(vlm, source, rows, options.tokens))
    alone = statistics.median(rates[options.rows[0]])
    for rows, measured in rates.items():
        rate = statistics.median(measured)
        print(f"{rows:3} rows {rate:8.1f} tokens/s  {rate / alone:5.2f} × one row")
    together, apart = [], []
    for _ in range(options.newcomers):
        together.append(newcomer(vlm, source, 4, options.tokens // 4))
        apart.append(newcomer(vlm, source, 0, 0)[0])
    seconds = statistics.median(first for first, _ in together)
    print(f"newcomer's first token: {seconds:.3f} s beside four, {seconds / statistics.median(apart):.2f} × alone")
    print(f"slowest gap of a running answer meanwhile: {statistics.median(gap for _, gap in together):.2f} × usual")


if __name__ == "__main__":
    main()
