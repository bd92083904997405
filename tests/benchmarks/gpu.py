"""Speed and memory on a GPU, in the shapes of the 3B checkpoints of both generations, next to transformers.

python tests/benchmarks/gpu.py                           # 8 minutes at most, 8 GB of GPU memory, 7 GB on disk
python tests/benchmarks/gpu.py --device cpu --size small --rows 1 4    # tiny shapes on a CPU, to see that it runs

The weights are random bfloat16: neither speed nor memory depends on them. Every contender has a process of its own:
ours as it is, ours compiled, and transformers. A step's part of the bandwidth is what it reads of the weights, over what the
device was measured to read in the same time.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from full_size import GB, GEMMA2_TEXTS, PROMPT, SIZES, bytes_per_token, noise, run_alone
from safetensors.torch import save_file
from together import images, never_ending, tokens_per_second
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import paligemma
from paligemma.checkpoints import EMBEDDED_FOLDER
from paligemma.checkpoints.load import empty_model
from paligemma.config import PaliGemmaConfig
from paligemma.processor import Processor

CONTENDERS = ["paligemma", "paligemma, compiled", "transformers"]
FIRST_TOKENS, TOKENS = 7, 48  # timed: images, and tokens of each answer
READ_BYTES = {"cuda": 2**32, "cpu": 2**28}


def shapes(size: str, family: str) -> PaliGemmaConfig:
    """The config of a generation in a size of `full_size.SIZES`."""
    config = SIZES[size]
    return config if family == "gemma" else replace(config, text=GEMMA2_TEXTS[size])


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Draw the weights of a model so that every layer keeps the size of its inputs."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(std=0.1 if parameter.dim() == 1 else parameter[0].numel() ** -0.5)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.add_(1.0)
    model.eval()


def make_checkpoint(config: PaliGemmaConfig, folder: Path, device: str) -> None:
    """Write a checkpoint of random weights."""
    model = empty_model(config).to(torch.bfloat16).to_empty(device=device)
    randomize(model)
    save_file({name: tensor.cpu() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    shutil.copy(EMBEDDED_FOLDER / "tokenizer.json", folder)


def wait(device: str) -> None:
    """Until the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def read_bandwidth(device: str) -> float:
    """Bytes a second that the device reads from its memory: the best of several sums over a large tensor."""
    large = torch.ones(READ_BYTES[device] // 4, dtype=torch.float32, device=device)
    seconds = []
    for _ in range(8):
        wait(device)
        start = time.perf_counter()
        large.sum()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return large.nbytes / min(seconds)


@dataclass(frozen=True)
class Measurement:
    """What one process saw: seconds, tokens a second by rows, bytes."""

    load: float
    first_token: float
    tokens_per_second: dict[int, float]
    peak: int
    warm_up: float  # until all graphs were there


def measure(contender: str, folder: Path, device: str, rows: Sequence[int]) -> Measurement:
    """Load, warm up, and time first tokens and steps."""
    if contender == "transformers":
        return measure_transformers(folder, device, rows)
    start = time.perf_counter()
    vlm = paligemma.load(folder, device=device, dtype="bfloat16")
    wait(device)
    load = time.perf_counter() - start
    vlm.engine.rows = max(rows)
    never_ending(vlm)
    source, start = images(), time.perf_counter()
    if contender != "paligemma":
        vlm.engine.compile()
    for count in rows:  # what a graph records, it records when it is run for the second time
        for _ in range(2):
            vlm.generate_batch([next(source)] * count, [PROMPT] * count, max_new_tokens=3)
    warm_up = time.perf_counter() - start

    def first_token() -> float:
        image, start = next(source), time.perf_counter()
        answer = vlm.stream(image, PROMPT, max_new_tokens=1)
        next(answer)
        return time.perf_counter() - start

    seconds = statistics.median(first_token() for _ in range(FIRST_TOKENS))
    rates = {count: tokens_per_second(vlm, source, count, TOKENS) for count in rows}
    return Measurement(load, seconds, rates, peak(device), warm_up)


@torch.inference_mode()
def measure_transformers(folder: Path, device: str, rows: Sequence[int]) -> Measurement:
    """The same of transformers, by the loop that its `generate` makes, without what is around it."""
    from transformers import PaliGemmaConfig as TransformersConfig
    from transformers import PaliGemmaForConditionalGeneration

    config = PaliGemmaConfig.from_file(folder / "config.json")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = PaliGemmaForConditionalGeneration(TransformersConfig.from_dict(config.to_dict()))
    randomize(model)
    processor = Processor.from_file(config, folder / "tokenizer.json")
    ids = torch.tensor([processor.input_ids(PROMPT)], device=device)

    def prefill(count: int, seed: int) -> object:
        pixel_values = processor.pixel_values(noise(seed)).to(device, model.dtype).expand(count, -1, -1, -1)
        input_ids = ids.expand(count, -1)
        return model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            token_type_ids=torch.zeros_like(input_ids),
            use_cache=True,
            logits_to_keep=1,
        )

    def rate(count: int) -> float:
        output, start = prefill(count, 0), 0.0
        for step in range(TOKENS):
            token_ids = output.logits[:, -1].argmax(-1)
            token_ids.tolist()
            if step == 1:
                start = time.perf_counter()
            output = model(token_ids[:, None], past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
        wait(device)
        return count * (TOKENS - 1) / (time.perf_counter() - start)

    def first_token(seed: int) -> float:
        start = time.perf_counter()
        prefill(1, seed).logits[:, -1].argmax(-1).tolist()
        return time.perf_counter() - start

    first_token(0)
    seconds = statistics.median(first_token(seed) for seed in range(1, 1 + FIRST_TOKENS))
    return Measurement(float("nan"), seconds, {count: rate(count) for count in rows}, peak(device), 0.0)


def peak(device: str) -> int:
    """The most bytes of GPU memory that tensors took; none on a CPU."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0


def row(name: str, one: Measurement, rows: Sequence[int], limit: float) -> str:
    """A line of the table; `limit` is the seconds that a step takes at least, by the bandwidth."""
    rates = one.tokens_per_second
    steps = [count / rates[count] for count in rows]
    cells = [name, f"{one.first_token * 1e3:.1f}", *(f"{seconds * 1e3:.2f}" for seconds in steps)]
    cells += [f"{limit / steps[0]:.2f}", f"{rates[rows[-1]] / rates[rows[0]]:.1f}"]
    cells += [f"{one.peak / GB:.2f}", f"{one.load:.1f}", f"{one.warm_up:.0f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=SIZES, default="3b")
    parser.add_argument("--families", nargs="+", choices=["gemma", "gemma2"], default=["gemma", "gemma2"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--minutes", type=float, default=8, help="after which no further contender begins")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no CUDA GPU that torch can use; to see that this runs: --device cpu --size small --rows 1 4")
    start, rows = time.monotonic(), sorted(options.rows)
    bandwidth = run_alone(read_bandwidth, options.device)
    card = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    print(f"{card}, torch {torch.__version__}, transformers {version('transformers')}; ", end="")
    print(f"{bandwidth / GB:.0f} GB/s measured; random bfloat16 in the {options.size} shapes, {PROMPT!r}\n")
    head = ["", "first token, ms", *(f"a step of {count}, ms" for count in rows), "of the bandwidth, 1 row"]
    head += [f"tokens/s, {rows[-1]} rows / {rows[0]}", "peak, GB", "load, s", "warm-up, s"]
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}", flush=True)
    for family in options.families:
        config = shapes(options.size, family)
        limit = bytes_per_token(config, "bfloat16") / bandwidth
        with tempfile.TemporaryDirectory() as folder:
            run_alone(make_checkpoint, config, Path(folder), options.device)
            for contender in options.contenders:
                name = f"{family}: {contender}"
                if time.monotonic() - start > 60 * options.minutes:
                    print(f"| {name} | not begun after {options.minutes:.0f} minutes |", flush=True)
                    continue
                measured = run_alone(measure, contender, Path(folder), options.device, rows)
                print(row(name, measured, rows, limit), flush=True)


if __name__ == "__main__":
    main()
