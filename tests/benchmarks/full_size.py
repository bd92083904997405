"""Speed and memory in the shapes of the official 3B checkpoint at 224 pixels, next to transformers (Linux, CPU).

python tests/benchmarks/full_size.py --size small --rounds 1      # tiny shapes, a minute, to see that it runs
python tests/benchmarks/full_size.py                              # 9 GB on disk, 18 GB of memory (transformers in float32)

Where the CPU has no bfloat16 instructions a prefill in that dtype takes a minute: `--prefills 1` times fewer of them.

The weights are random: neither speed nor memory depends on them. Every measurement has a process of its own, so that no
library pays for what another left behind, and the two take turns, so that a slow minute of the machine hits both.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageChops
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import paligemma
from paligemma.checkpoints import EMBEDDED_FOLDER
from paligemma.checkpoints.quantized import int8_folder
from paligemma.checkpoints.weights import weight_files
from paligemma.config import PaliGemmaConfig, TextConfig, VisionConfig
from paligemma.kv_cache import KVCache

SIZES = {
    "3b": PaliGemmaConfig(VisionConfig(), TextConfig()),  # their defaults are the official shapes
    "small": PaliGemmaConfig(
        VisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=56),
        TextConfig(
            vocab_size=1024,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            head_dim=16,
            max_position_embeddings=1024,
        ),
        image_token_id=1000,
    ),
}
PROMPT_IDS = [10, 20, 30]  # any three words: a prompt such as "caption en" is about as long
SHARD_SIZE = "5GB"  # the official one
GB = 1e9
# Of what is measured, and in which order within a round.
CONTENDERS = [
    ("paligemma", "int8"),
    ("paligemma", "float32"),
    ("transformers", "float32"),
    ("paligemma", "bfloat16"),
    ("transformers", "bfloat16"),
]
ACTIVATIONS = {"int8": torch.float32}  # for dtypes in which only the weights are
WEIGHT_BYTES = {"int8": 1, "float32": 4, "bfloat16": 2}
READ_BYTES = 2**30
LONG_ANSWER = 512  # tokens

Result = TypeVar("Result")


def checkpoint(size: str, folder: Path | None = None) -> Path:
    """The folder of a checkpoint of random bfloat16 weights, made if it is not there yet.

    Args:
        size: a name in `SIZES`.
        folder: where it is to be; None for one below the system's temporary folder. A checkpoint that is there already
            is used as it is, so that this may also be the folder of a real one.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"paligemma-random-{size}"
    if not (folder / "config.json").exists():
        run_alone(make_checkpoint, SIZES[size], folder)
    return folder


def make_checkpoint(config: PaliGemmaConfig, folder: Path) -> None:
    """Let transformers write a checkpoint of these shapes, so that keys and files are those found in the wild.

    Memory holds the weights once. The gain of every norm is near one and every layer keeps the size of its inputs, so
    that logits have a spread of about one, as in a trained model.
    """
    from transformers import PaliGemmaConfig as TransformersConfig
    from transformers import PaliGemmaForConditionalGeneration

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = PaliGemmaForConditionalGeneration(TransformersConfig.from_dict(config.to_dict()))
    model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            # Vectors are biases and gains; Gemma stores the latter's distance from one, LayerNorm the gain itself.
            parameter.normal_(std=0.1 if parameter.dim() == 1 else parameter[0].numel() ** -0.5)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.add_(1.0)

    # Under its own name only once it is whole.
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished, max_shard_size=SHARD_SIZE)
    # Its words are not those of these shapes, which does not matter to whoever works with ids.
    shutil.copy(EMBEDDED_FOLDER / "tokenizer.json", unfinished)
    unfinished.rename(folder)


def file_bytes(folder: Path) -> int:
    """What the weights of a checkpoint take on disk."""
    return sum(file.stat().st_size for file in weight_files(folder))


def run_alone(function: Callable[..., Result], *arguments: object) -> Result:
    """Call `function` in a fresh process, which ends with it; what it raises is raised here."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_resident_bytes() -> int:
    """The most memory that this process has ever held, pages of mapped files included."""
    return 1024 * int(_line_of("/proc/self/status", "VmHWM").split()[0])


def _line_of(path: str, name: str) -> str:
    """The value in a file of lines such as `name: value`."""
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    raise LookupError(f"{path} has no line {name}")


def inputs(config: PaliGemmaConfig, dtype: str) -> tuple[Tensor, Tensor]:
    """A picture of noise, [1, 3, H, W] in -1 to 1, and a prompt, int64 [1, T], placeholders first."""
    size = config.vision.image_size
    pixel_values = torch.rand((1, 3, size, size), generator=torch.Generator().manual_seed(0)) * 2 - 1
    placeholders = [config.image_token_id] * config.vision.num_patches
    return pixel_values.to(ACTIVATIONS.get(dtype) or getattr(torch, dtype)), torch.tensor(
        [[*placeholders, config.bos_token_id, *PROMPT_IDS]]
    )


class Ours:
    """This package, as `VisionLanguageModel.stream` drives it."""

    def __init__(self, folder: Path, dtype: str):
        started = time.perf_counter()
        self.vlm = paligemma.load(folder, device="cpu", dtype=dtype)
        self.load_seconds = time.perf_counter() - started
        self.model = self.vlm.model

    def prefill(self, pixel_values: Tensor, input_ids: Tensor, new_tokens: int) -> Tensor:
        """Picture and prompt to the next token's logits, [1, vocab_size], with room for `new_tokens` steps."""
        length = input_ids.shape[1] + new_tokens
        self.cache = KVCache(self.model.config.text, 1, length, pixel_values.dtype, pixel_values.device)
        return self.model.prefill(self.model.image_features(pixel_values), input_ids, self.cache)

    def decode(self, token_id: Tensor) -> Tensor:
        """One more token, int64 [1], to the next one's logits, [1, vocab_size]."""
        return self.model.decode(token_id[:, None], self.cache)


class Theirs:
    """transformers, as its `generate` drives it, without the loop around it.

    There is no attention mask, since nothing is padded, and only the last position's logits are computed.
    """

    def __init__(self, folder: Path, dtype: str):
        from transformers import PaliGemmaForConditionalGeneration
        from transformers.utils import logging

        logging.disable_progress_bar()
        started = time.perf_counter()
        self.model = PaliGemmaForConditionalGeneration.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()
        self.load_seconds = time.perf_counter() - started

    def prefill(self, pixel_values: Tensor, input_ids: Tensor, new_tokens: int) -> Tensor:
        """As `Ours.prefill`; this cache grows by itself."""
        output = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            token_type_ids=torch.zeros_like(input_ids),  # its processor's mark of a prefix
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = output.past_key_values
        return output.logits[:, -1]

    def decode(self, token_id: Tensor) -> Tensor:
        """As `Ours.decode`."""
        return self.model(
            input_ids=token_id[:, None], past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]


LIBRARIES = {"paligemma": Ours, "transformers": Theirs}


def read_all(parameters: Iterable[Tensor]) -> None:
    """Bring every page of the weights into memory: those that a mapped file backs come when they are first read."""
    for parameter in parameters:
        # One byte a page, so that the sum makes no copy of a size that counts.
        parameter.detach().view(torch.uint8).flatten()[::4096].sum()


def read_bandwidth() -> float:
    """Bytes a second that all threads read from memory together: the best of several sums over a large tensor."""
    large = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        large.sum()
        seconds.append(time.perf_counter() - started)
    return READ_BYTES / min(seconds)


def bytes_per_token(config: PaliGemmaConfig, dtype: str) -> int:
    """What a step reads of the weights: the decoder's layers, and the embedding as its output."""
    text = config.text
    attention = text.hidden_size * text.head_dim * 2 * (text.num_attention_heads + text.num_key_value_heads)
    layer = attention + 3 * text.hidden_size * text.intermediate_size
    return WEIGHT_BYTES[dtype] * (text.num_hidden_layers * layer + text.vocab_size * text.hidden_size)


@dataclass(frozen=True)
class Measurement:
    """What one process saw; times in seconds, memory in bytes.

    load: the call that loads.
    load_and_read: until every weight was in memory.
    prefill: each time to a first token, from pixels and ids.
    decode: each step that made a further token from the one before.
    peak_after_load: the most memory held until all weights had been read.
    peak: the most memory held at all.
    token_ids: the greedy answer.
    read_bandwidth: bytes a second that this machine reads from memory, just before and after the steps.
    """

    load: float
    load_and_read: float
    prefill: list[float]
    decode: list[float]
    peak_after_load: int
    peak: int
    token_ids: list[int]
    read_bandwidth: float


@torch.inference_mode()
def measure(library: str, folder: Path, dtype: str, prefills: int, new_tokens: int) -> Measurement:
    """Load, warm up with a prefill and two steps, then time `prefills` prefills and `new_tokens` steps.

    Args:
        library: a name in `LIBRARIES`.
        folder: the checkpoint.
        dtype: `float32`, `bfloat16` or, of ours, `int8`.
        prefills, new_tokens: how many of each are timed.
    """
    model = LIBRARIES[library](folder, dtype)
    started = time.perf_counter()
    read_all(model.model.parameters())
    load_and_read = model.load_seconds + time.perf_counter() - started
    peak_after_load = peak_resident_bytes()

    pixel_values, input_ids = inputs(PaliGemmaConfig.from_file(folder / "config.json"), dtype)
    token_id = model.prefill(pixel_values, input_ids, 2).argmax(-1)
    for _ in range(2):
        token_id = model.decode(token_id).argmax(-1)

    prefill_seconds, decode_seconds = [], []
    for _ in range(prefills):
        started = time.perf_counter()
        token_id = model.prefill(pixel_values, input_ids, new_tokens).argmax(-1)
        prefill_seconds.append(time.perf_counter() - started)
    token_ids = [token_id.item()]
    peak = peak_resident_bytes()
    bandwidth = [read_bandwidth()]
    for _ in range(new_tokens):
        started = time.perf_counter()
        token_id = model.decode(token_id).argmax(-1)
        decode_seconds.append(time.perf_counter() - started)
        token_ids.append(token_id.item())
    bandwidth.append(read_bandwidth())
    return Measurement(
        load=model.load_seconds,
        load_and_read=load_and_read,
        prefill=prefill_seconds,
        decode=decode_seconds,
        peak_after_load=peak_after_load,
        peak=peak,
        token_ids=token_ids,
        read_bandwidth=statistics.mean(bandwidth),
    )


def load_seconds(folder: Path, dtype: str) -> float:
    """What our load takes."""
    return Ours(folder, dtype).load_seconds


def first_and_second_prompt(folder: Path, dtype: str, turns: int) -> tuple[list[float], list[float]]:
    """Seconds from picture to first token, for new pictures and for a second prompt about each."""
    vlm = paligemma.load(folder, device="cpu", dtype=dtype)
    size = vlm.config.vision.image_size
    first, second = [], []
    for turn in range(turns + 1):
        picture = Image.fromarray(np.random.default_rng(turn).integers(0, 256, (size, size, 3), dtype=np.uint8))
        for prompt, seconds in (("caption en", first), ("describe en", second)):
            started = time.perf_counter()
            for _ in vlm.stream(picture, prompt, max_new_tokens=1):
                pass
            seconds.append(time.perf_counter() - started)
    return first[1:], second[1:]  # the first picture warms up


@torch.inference_mode()
def long_answer(folder: Path, dtype: str) -> list[float]:
    """Seconds for each step of an answer of `LONG_ANSWER` tokens."""
    model = Ours(folder, dtype)
    pixel_values, input_ids = inputs(model.model.config, dtype)
    token_id = model.prefill(pixel_values, input_ids, LONG_ANSWER).argmax(-1)
    seconds = []
    for _ in range(LONG_ANSWER):
        started = time.perf_counter()
        token_id = model.decode(token_id).argmax(-1)
        seconds.append(time.perf_counter() - started)
    return seconds


def seconds_to_page() -> float:
    """From `python app.py` to its first answer with status 200, with the embedded checkpoint."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "app.py", "--host", "127.0.0.1", "--port", str(port)]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5).close()
                return time.perf_counter() - started
            except OSError:
                time.sleep(0.02)
        raise RuntimeError("app.py ended by itself")
    finally:
        process.kill()
        process.wait()


def seconds_to_captions(turns: int) -> list[float]:
    """From picture to finished caption with the embedded checkpoint, each time without its eye's cache."""
    vlm, seconds = paligemma.load(device="cpu"), []
    pictures = sorted((Path(paligemma.__file__).parent / "demo" / "examples").glob("*.png"))
    vlm.generate(Image.new("RGB", (64, 64)), "caption en")
    for turn in range(turns):
        for file in pictures:
            with Image.open(file) as picture:
                moved = ImageChops.offset(picture.convert("RGB"), turn)  # the same objects, other pixels
            started = time.perf_counter()
            vlm.generate(moved, "caption en")
            seconds.append(time.perf_counter() - started)
    return seconds


@torch.inference_mode()
def prefill_once(library: str, folder: Path, dtype: str) -> tuple[np.ndarray, int, int]:
    """Load and prefill: the logits, float32 [vocab_size], and `peak_after_load` and `peak` as in `Measurement`."""
    model = LIBRARIES[library](folder, dtype)
    read_all(model.model.parameters())
    peak_after_load = peak_resident_bytes()
    logits = model.prefill(*inputs(PaliGemmaConfig.from_file(folder / "config.json"), dtype), 0)
    return logits[0].float().numpy(), peak_after_load, peak_resident_bytes()


def report(measurements: dict[tuple[str, str], list[Measurement]], config: PaliGemmaConfig, size_on_disk: int) -> str:
    """A markdown table with a line for each (library, dtype), and what one library takes of the other."""
    lines = [
        "| library | dtype | load, s | load and read, s | time to first token, s | per token, s "
        "| peak after load, GB | peak, GB | peak after load / file | memory read, of what the machine can |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (library, dtype), rounds in measurements.items():
        peak_after_load = max(one.peak_after_load for one in rounds)
        read = bytes_per_token(config, dtype) / _median_of(rounds, "decode")
        cells = (
            library,
            dtype,
            _spread(one.load for one in rounds),
            _spread(one.load_and_read for one in rounds),
            _spread(seconds for one in rounds for seconds in one.prefill),
            _spread(seconds for one in rounds for seconds in one.decode),
            f"{peak_after_load / GB:.2f}",
            f"{max(one.peak for one in rounds) / GB:.2f}",
            f"{peak_after_load / size_on_disk:.2f}",
            f"{read / statistics.median(one.read_bandwidth for one in rounds):.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    bandwidth = _spread(one.read_bandwidth / GB for rounds in measurements.values() for one in rounds)
    lines.append(f"\nThis machine reads {bandwidth} GB/s from memory.")

    figures = (("time to first token", "prefill"), ("per token", "decode"))
    dtypes = [dtype for library, dtype in measurements if library == "transformers"]
    for dtype in dtypes:
        if ("paligemma", dtype) not in measurements:
            continue
        ours, theirs = measurements["paligemma", dtype], measurements["transformers", dtype]
        ratios = (f"{name} {_median_of(theirs, field) / _median_of(ours, field):.2f}" for name, field in figures)
        first_ids = _first_ids(measurements, dtype)
        agreement = "first tokens agree" if len(first_ids) == 1 else f"first tokens differ: {sorted(first_ids)}"
        lines.append(f"{dtype}: transformers / paligemma: {', '.join(ratios)}; {agreement}")
    if dtypes and ("paligemma", "int8") in measurements:
        ratios = []
        for name, field in figures:
            best = min(dtypes, key=lambda dtype: _median_of(measurements["transformers", dtype], field))
            theirs, ours = measurements["transformers", best], measurements["paligemma", "int8"]
            ratios.append(f"{name} {_median_of(theirs, field) / _median_of(ours, field):.2f} ({best})")
        lines.append(f"int8: the best of transformers / paligemma: {', '.join(ratios)}")
    return "\n".join(lines)


def report_answers(folder: Path, dtype: str, turns: int) -> str:
    """Lines about a second prompt, and about the cost of a token at the end of a long answer."""
    first, second = run_alone(first_and_second_prompt, folder, dtype, turns)
    ratio = statistics.median(second) / statistics.median(first)
    lines = [
        f"{dtype}: picture to first token: first prompt {_spread(first)} s, second {_spread(second)} s: {ratio:.2f}",
        "",
        "| tokens so far | tokens/s, median of the 16 up to there |",
        "| --- | --- |",
    ]
    seconds = run_alone(long_answer, folder, dtype)
    lengths = [2**power for power in range(4, LONG_ANSWER.bit_length())]
    at = {length: statistics.median(seconds[length - 16 : length]) for length in lengths}
    lines += [f"| {length} | {1 / at[length]:.2f} |" for length in lengths]
    lines.append(f"\n{dtype}: a token at {LONG_ANSWER} costs {at[LONG_ANSWER] / at[16]:.2f} of one at 16")
    return "\n".join(lines)


def _first_ids(measurements: dict[tuple[str, str], list[Measurement]], dtype: str) -> set[int]:
    """The first tokens of all answers in this dtype: one if the libraries agree."""
    return {one.token_ids[0] for (_, of), rounds in measurements.items() if of == dtype for one in rounds}


def _spread(values: Iterable[float]) -> str:
    """Median and range."""
    values = sorted(values)
    return f"{statistics.median(values):.3g} ({values[0]:.3g}–{values[-1]:.3g})"


def _median_of(rounds: list[Measurement], field: str) -> float:
    return statistics.median(seconds for one in rounds for seconds in getattr(one, field))


def main() -> None:
    """Make the checkpoint, measure in turn, print the report; exit 1 if float32 answers start differently."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="3b", help="shapes of the checkpoint to make")
    parser.add_argument("--folder", type=Path, help="where it is, or is to be; a temporary folder if not given")
    parser.add_argument("--dtypes", nargs="+", choices=WEIGHT_BYTES, default=list(WEIGHT_BYTES))
    parser.add_argument("--rounds", type=int, default=3, help="processes for each library and dtype")
    parser.add_argument("--prefills", type=int, default=3, help="timed in each process")
    parser.add_argument("--new-tokens", type=int, default=8, help="timed in each process")
    arguments = parser.parse_args()

    folder = checkpoint(arguments.size, arguments.folder)
    config, size_on_disk = PaliGemmaConfig.from_file(folder / "config.json"), file_bytes(folder)
    print(f"{_line_of('/proc/cpuinfo', 'model name')}, {torch.backends.cpu.get_cpu_capability()}")
    print(f"{torch.get_num_threads()} threads, Python {platform.python_version()}, ", end="")
    print(f"torch {torch.__version__}, transformers {version('transformers')}")
    print(f"{folder}: {size_on_disk / GB:.2f} GB in {len(weight_files(folder))} file(s)")

    pages = [seconds_to_page() for _ in range(arguments.rounds)]
    print(f"python app.py to its first 200: {_spread(pages)} s")
    captions = run_alone(seconds_to_captions, arguments.rounds)
    print(f"embedded checkpoint, picture to finished caption: {_spread(captions)} s")
    if "int8" in arguments.dtypes:
        shutil.rmtree(int8_folder(weight_files(folder)), ignore_errors=True)
        made = run_alone(load_seconds, folder, "int8")
        print(f"int8, first load, which makes the weights: {made:.3g} s")
    print(flush=True)

    measurements: dict[tuple[str, str], list[Measurement]] = {}
    for turn in range(arguments.rounds):
        for library, dtype in CONTENDERS:
            if dtype in arguments.dtypes:
                print(f"round {turn + 1} of {arguments.rounds}: {library}, {dtype}", file=sys.stderr)
                one = run_alone(measure, library, folder, dtype, arguments.prefills, arguments.new_tokens)
                measurements.setdefault((library, dtype), []).append(one)
    print(report(measurements, config, size_on_disk), flush=True)
    if "int8" in arguments.dtypes:
        print(report_answers(folder, "int8", arguments.rounds))

    # In bfloat16 the likeliest two may be one rounding apart.
    if len(_first_ids(measurements, "float32")) > 1:
        sys.exit("The libraries do not compute the same: their first tokens in float32 differ.")


if __name__ == "__main__":
    main()
