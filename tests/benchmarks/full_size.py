"""Speed and memory in the shapes of the official 3B checkpoints, next to transformers and llama.cpp (Linux, CPU).

python tests/benchmarks/full_size.py --size small --rounds 1      # tiny shapes, a minute, to see that it runs
python tests/benchmarks/full_size.py                              # 9 GB on disk, 18 GB of memory (transformers in float32)
python tests/benchmarks/full_size.py --family gemma2 --image-size 896 --libraries paligemma --dtypes int8

llama.cpp takes part where `pip install llama-cpp-python gguf` has been done, with its decoder alone: it has no image to
encode. Each of its files takes up to 3 GB on disk.

Where the CPU has no bfloat16 instructions a prefill in that dtype takes a minute: `--prefills 1` times fewer of them.

The weights are random: neither speed nor memory depends on them. Every measurement has a process of its own, so that no
library pays for what another left behind, and the two take turns, so that a slow minute of the machine hits both.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.llama_cpp_peer import LlamaCpp

import paligemma
from paligemma.checkpoints import EMBEDDED_FOLDER
from paligemma.checkpoints.weights import MLP_GROUP, OUTPUT_GROUP, weight_files
from paligemma.config import LEFT_OUT_TEXT, PaliGemmaConfig, TextConfig, VisionConfig
from paligemma.hardware import in_own_thread
from paligemma.processor import Processor

# Of the first generation at 224 pixels; the defaults are the official shapes. The tokenizer is the embedded checkpoint's,
# of 2401 tokens: neither speed nor memory depends on what they mean.
SIZES = {
    "3b": PaliGemmaConfig(VisionConfig(), TextConfig(), image_token_id=2400),
    # The widths of a 3B checkpoint, for what a layer costs.
    "3b-few-layers": PaliGemmaConfig(
        VisionConfig(num_hidden_layers=2), TextConfig(num_hidden_layers=4), image_token_id=2400
    ),
    "small": PaliGemmaConfig(
        VisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=56),
        TextConfig(
            vocab_size=2401,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            head_dim=16,
            max_position_embeddings=1024,
        ),
        image_token_id=2400,
    ),
}
SMALL_GEMMA2 = {
    "num_key_value_heads": 2,
    "query_pre_attn_scalar": 16,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
}
GEMMA2_TEXTS = {
    "3b": replace(LEFT_OUT_TEXT["gemma2"], vocab_size=257216),
    "3b-few-layers": replace(LEFT_OUT_TEXT["gemma2"], vocab_size=257216, num_hidden_layers=4),
    "small": replace(SIZES["small"].text, model_type="gemma2", **SMALL_GEMMA2),
}
PROMPT, SECOND_PROMPT = "caption en", "describe en"
SHARD_SIZE = "5GB"  # the official one
GB = 1e9
# Of what is measured, and in which order within a round.
CONTENDERS = [
    ("paligemma", "int8"),
    ("paligemma", "int4"),
    ("paligemma", "float32"),
    ("transformers", "float32"),
    ("paligemma", "bfloat16"),
    ("transformers", "bfloat16"),
    ("llama.cpp", "Q8_0"),
    ("llama.cpp", "Q4_0"),
]
# Of a weight in attention, in an MLP and in the output layer. llama.cpp has a float16 scale for each 32 of them.
WEIGHT_BYTES = {
    "int8": (1, 1, 1),
    "int4": (1, 1 / 2 + 4 / MLP_GROUP, 1 / 2 + 4 / OUTPUT_GROUP),
    "float32": (4, 4, 4),
    "bfloat16": (2, 2, 2),
    "Q8_0": (34 / 32, 34 / 32, 34 / 32),
    "Q4_0": (18 / 32, 18 / 32, 18 / 32),
}
READ_BYTES = 2**30
LONG_ANSWER = 512  # tokens

Result = TypeVar("Result")


def checkpoint(size: str, folder: Path | None = None, family: str = "gemma", image_size: int | None = None) -> Path:
    """The folder of a checkpoint of random bfloat16 weights, made if it is not there yet.

    Args:
        size: a name in `SIZES`.
        folder: where it is to be; None for one below the system's temporary folder. A checkpoint that is there already
            is used as it is, so that this may also be the folder of a real one.
        family: `gemma`, or `gemma2` for the shapes of PaliGemma 2.
        image_size: in pixels; None for that in `SIZES`.
    """
    config = SIZES[size]
    if family == "gemma2":
        config = replace(config, text=GEMMA2_TEXTS[size])
    if image_size is not None:
        config = replace(config, vision=replace(config.vision, image_size=image_size))
    shape = f"{size}{'-gemma2' if family == 'gemma2' else ''}{f'-{image_size}' if image_size else ''}"
    folder = folder or Path(tempfile.gettempdir()) / f"paligemma-random-weights-{shape}"
    if not (folder / "config.json").exists():
        run_alone(make_checkpoint, config, folder)
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
    shutil.copy(EMBEDDED_FOLDER / "tokenizer.json", unfinished)
    unfinished.rename(folder)


def file_bytes(folder: Path) -> int:
    """What the weights of a checkpoint take on disk."""
    return sum(file.stat().st_size for file in weight_files(folder))


def run_alone(function: Callable[..., Result], *arguments: object) -> Result:
    """Call `function` in a fresh process, which ends with it; what it raises is raised here."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def value_in(path: str, name: str) -> str:
    """The value in a file of lines such as `name: value`."""
    lines = (line.partition(":") for line in Path(path).read_text(encoding="utf-8").splitlines())
    return next(value.strip() for key, _, value in lines if key.strip() == name)


def peak_resident_bytes() -> int:
    """The most memory that this process has ever held, pages of mapped files included."""
    return 1024 * int(value_in("/proc/self/status", "VmHWM").split()[0])


def noise(seed: int, size: int = 224) -> Image.Image:
    """An image that nobody has seen before."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


class Ours:
    """This package, as anybody uses it."""

    def __init__(self, folder: Path, dtype: str):
        started = time.perf_counter()
        self.vlm = paligemma.load(folder, device="cpu", dtype=dtype)
        self.load_seconds = time.perf_counter() - started
        self.model = self.vlm.model

    def answer(self, image: Image.Image, prompt: str, count: int) -> Iterator[int]:
        """The ids of the first `count` tokens of the greedy answer."""
        return (token.id for token in self.vlm.stream(image, prompt, max_new_tokens=count))

    def logits(self, image: Image.Image, prompt: str) -> Tensor:
        """Float32 [vocab_size], of the answer's first token."""
        seen, logits = [], self.model.logits
        self.model.logits = lambda hidden_states: seen.append(logits(hidden_states)) or seen[0]
        next(self.vlm.stream(image, prompt, max_new_tokens=1))
        return seen[0][0]


class Theirs:
    """transformers, as its `generate` drives it, without the loop around it.

    There is no attention mask, since nothing is padded, and only the last position's logits are computed.
    """

    def __init__(self, folder: Path, dtype: str):
        from transformers import PaliGemmaForConditionalGeneration
        from transformers.utils import logging

        logging.disable_progress_bar()
        started = time.perf_counter()
        self.model = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.load_seconds = time.perf_counter() - started
        self.processor = Processor.from_file(
            PaliGemmaConfig.from_file(folder / "config.json"), folder / "tokenizer.json"
        )

    @torch.inference_mode()
    def answer(self, image: Image.Image, prompt: str, count: int) -> Iterator[int]:
        """As `Ours.answer`."""
        output = self._prefill(image, prompt)
        for remaining in reversed(range(count)):
            token_id = output.logits[:, -1].argmax(-1)
            yield token_id.item()
            if remaining:
                cache = output.past_key_values
                output = self.model(token_id[:, None], past_key_values=cache, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def logits(self, image: Image.Image, prompt: str) -> Tensor:
        """As `Ours.logits`."""
        return self._prefill(image, prompt).logits[0, -1].float()

    def _prefill(self, image: Image.Image, prompt: str) -> object:
        input_ids = torch.tensor([self.processor.input_ids(prompt)])
        return self.model(
            input_ids=input_ids,
            pixel_values=self.processor.pixel_values(image).to(self.model.dtype),
            token_type_ids=torch.zeros_like(input_ids),  # its processor's mark of a prefix
            use_cache=True,
            logits_to_keep=1,
        )


LIBRARIES = {"paligemma": Ours, "transformers": Theirs, "llama.cpp": LlamaCpp}


def timed(ids: Iterator[int]) -> tuple[list[int], list[float]]:
    """All ids, and the seconds that each took."""
    seen, times = [], [time.perf_counter()]
    for token_id in ids:
        seen.append(token_id)
        times.append(time.perf_counter())
    return seen, [end - start for start, end in zip(times, times[1:])]


def read_all(parameters: Iterable[Tensor]) -> None:
    """Bring every page of the weights into memory: those that a mapped file backs come when they are first read."""
    for parameter in parameters:
        # One byte a page, so that the sum makes no copy of a size that counts.
        parameter.detach().view(torch.uint8).flatten()[::4096].sum()


@in_own_thread
def read_bandwidth() -> float:
    """Bytes a second that all threads read from memory together: the best of several sums over a large tensor."""
    large = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        large.sum()
        seconds.append(time.perf_counter() - started)
    return READ_BYTES / min(seconds)


def bytes_per_token(config: PaliGemmaConfig, dtype: str) -> float:
    """What a step reads of the weights: the decoder's layers, and the embedding as its output."""
    text = config.text
    attention = text.hidden_size * text.head_dim * 2 * (text.num_attention_heads + text.num_key_value_heads)
    layers, mlp = text.num_hidden_layers, 3 * text.hidden_size * text.intermediate_size
    numbers = layers * attention, layers * mlp, text.vocab_size * text.hidden_size
    return sum(size * count for size, count in zip(WEIGHT_BYTES[dtype], numbers))


@dataclass(frozen=True)
class Measurement:
    """What one process saw; times in seconds, memory in bytes."""

    load: float
    load_and_read: float  # until every weight was in memory
    prefill: list[float]  # each time to a first token, from an image and a prompt
    decode: list[float]  # each step that made a further token
    peak_after_load: int  # the most memory held until all weights had been read
    peak: int  # and until the last prefill
    first_id: int  # of the greedy answer
    read_bandwidth: float  # bytes a second that this machine reads from memory, before and after the steps


def measure(library: str, folder: Path, dtype: str, prefills: int, new_tokens: int) -> Measurement:
    """Load, warm up with a short answer, then time `prefills` first tokens and `new_tokens` further ones."""
    model = LIBRARIES[library](folder, dtype)
    started = time.perf_counter()
    in_own_thread(read_all)(model.model.parameters())
    load_and_read, peak_after_load = model.load_seconds + time.perf_counter() - started, peak_resident_bytes()
    timed(model.answer(noise(0), PROMPT, 3))
    prefill = [timed(model.answer(noise(number), PROMPT, 1))[1][0] for number in range(1, prefills)]
    peak, before = peak_resident_bytes(), read_bandwidth()
    ids, (last_prefill, *decode) = timed(model.answer(noise(prefills), PROMPT, 1 + new_tokens))
    bandwidth = (before + read_bandwidth()) / 2
    prefill.append(last_prefill)
    return Measurement(model.load_seconds, load_and_read, prefill, decode, peak_after_load, peak, ids[0], bandwidth)


def prefill_once(library: str, folder: Path, dtype: str) -> tuple[np.ndarray, int, int]:
    """Load and prefill: the logits, float32 [vocab_size], and `peak_after_load` and `peak` as in `Measurement`."""
    model = LIBRARIES[library](folder, dtype)
    in_own_thread(read_all)(model.model.parameters())
    peak_after_load = peak_resident_bytes()
    return model.logits(noise(0), PROMPT).numpy(), peak_after_load, peak_resident_bytes()


def answers(folder: Path, dtype: str, images: int) -> str:
    """Two lines: about a second prompt on the same image, and about the cost of a token at the end of a long answer."""
    model = Ours(folder, dtype)
    timed(model.answer(noise(0), PROMPT, 1))
    first, second = (
        statistics.median(timed(model.answer(noise(number), prompt, 1))[1][0] for number in range(1, images + 1))
        for prompt in (PROMPT, SECOND_PROMPT)
    )
    _, (_, *seconds) = timed(model.answer(noise(0), PROMPT, 1 + LONG_ANSWER))
    early, late = statistics.median(seconds[:16]), statistics.median(seconds[-16:])
    return (
        f"{dtype}: first prompt {first:.3g} s, second prompt on the same image {second:.3g} s: {second / first:.2f}\n"
        f"{dtype}: a token at {LONG_ANSWER} costs {late / early:.2f} of one at 16"
    )


def report(measurements: dict[tuple[str, str], list[Measurement]], config: PaliGemmaConfig, size_on_disk: int) -> str:
    """A markdown table with a line for each (library, dtype), and what one library takes of the other."""
    lines = [
        "| library | dtype | load, s | load and read, s | time to first token, s | per token, s "
        "| peak after load, GB | peak, GB | peak after load / file | memory read, of what the machine can |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    medians = {}
    for (library, dtype), rounds in measurements.items():
        seconds = {field: [value for one in rounds for value in getattr(one, field)] for field in ("prefill", "decode")}
        medians[library, dtype] = {field: statistics.median(values) for field, values in seconds.items()}
        peak_after_load = max(one.peak_after_load for one in rounds)
        read = bytes_per_token(config, dtype) / medians[library, dtype]["decode"]
        cells = (
            library,
            dtype,
            spread(one.load for one in rounds),
            spread(one.load_and_read for one in rounds),
            spread(seconds["prefill"]),
            spread(seconds["decode"]),
            f"{peak_after_load / GB:.2f}",
            f"{max(one.peak for one in rounds) / GB:.2f}",
            f"{peak_after_load / size_on_disk:.2f}",
            f"{read / statistics.median(one.read_bandwidth for one in rounds):.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    bandwidth = spread(one.read_bandwidth / GB for rounds in measurements.values() for one in rounds)
    lines.append(f"\nThis machine reads {bandwidth} GB/s from memory.")

    names = {"prefill": "time to first token", "decode": "per token"}
    dtypes = [
        dtype for library, dtype in measurements if library == "transformers" and ("paligemma", dtype) in measurements
    ]
    for dtype in dtypes:
        ours, theirs = medians["paligemma", dtype], medians["transformers", dtype]
        ratios = ", ".join(f"{name} {theirs[field] / ours[field]:.2f}" for field, name in names.items())
        found = first_ids(measurements, dtype)
        agreement = "first tokens agree" if len(found) == 1 else f"first tokens differ: {sorted(found)}"
        lines.append(f"{dtype}: transformers / paligemma: {ratios}; {agreement}")
    if dtypes and ("paligemma", "int8") in measurements:
        ratios = []
        for field, name in names.items():
            best, dtype = min((medians["transformers", dtype][field], dtype) for dtype in dtypes)
            ratios.append(f"{name} {best / medians['paligemma', 'int8'][field]:.2f} ({dtype})")
        lines.append(f"int8: the best of transformers / paligemma: {', '.join(ratios)}")
    for ours in ("int8", "int4"):
        for library, dtype in measurements:
            if library == "llama.cpp" and ("paligemma", ours) in measurements:
                seconds = {
                    field: (medians[library, dtype][field], medians["paligemma", ours][field]) for field in names
                }
                ratios = ", ".join(f"{names[field]} {theirs / own:.2f}" for field, (theirs, own) in seconds.items())
                lines.append(f"{ours}: llama.cpp's decoder in {dtype} / paligemma: {ratios}")
    if {("paligemma", "int8"), ("paligemma", "int4")} <= measurements.keys():
        int8, int4 = (medians["paligemma", dtype] for dtype in ("int8", "int4"))
        ratios = ", ".join(f"{name} {int8[field] / int4[field]:.2f}" for field, name in names.items())
        lines.append(f"int4: int8 / int4: {ratios}")
    return "\n".join(lines)


def first_ids(measurements: dict[tuple[str, str], list[Measurement]], dtype: str) -> set[int]:
    """The first tokens of all answers in this dtype: one if the libraries agree."""
    return {one.first_id for (_, of), rounds in measurements.items() if of == dtype for one in rounds}


def spread(values: Iterable[float]) -> str:
    """Median and range."""
    values = sorted(values)
    return f"{statistics.median(values):.3g} ({values[0]:.3g}–{values[-1]:.3g})"


def main() -> None:
    """Make the checkpoint, measure in turn, print the report; exit 1 if float32 answers start differently."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="3b", help="shapes of the checkpoint to make")
    parser.add_argument("--family", choices=["gemma", "gemma2"], default="gemma", help="of its decoder")
    parser.add_argument("--image-size", type=int, help="in pixels, such as 896; that of the size if not given")
    parser.add_argument("--folder", type=Path, help="where it is, or is to be; a temporary folder if not given")
    parser.add_argument(
        "--libraries",
        nargs="+",
        choices=LIBRARIES,
        default=[name for name in LIBRARIES if name != "llama.cpp" or find_spec("llama_cpp")],
    )
    parser.add_argument("--dtypes", nargs="+", choices=WEIGHT_BYTES, default=list(WEIGHT_BYTES))
    parser.add_argument("--rounds", type=int, default=3, help="processes for each library and dtype")
    parser.add_argument("--prefills", type=int, default=3, help="timed in each process")
    parser.add_argument("--new-tokens", type=int, default=8, help="timed in each process")
    arguments = parser.parse_args()

    if arguments.family != "gemma" and "llama.cpp" in arguments.libraries:
        arguments.libraries.remove("llama.cpp")  # its files are written for the first generation only
    folder = checkpoint(arguments.size, arguments.folder, arguments.family, arguments.image_size)
    config, size_on_disk = PaliGemmaConfig.from_file(folder / "config.json"), file_bytes(folder)
    print(f"{value_in('/proc/cpuinfo', 'model name')}, {torch.backends.cpu.get_cpu_capability()}")
    print(f"{torch.get_num_threads()} threads, Python {platform.python_version()}, ", end="")
    print(f"torch {torch.__version__}, transformers {version('transformers')}")
    print(f"{folder}: {size_on_disk / GB:.2f} GB in {len(weight_files(folder))} file(s)")

    measurements: dict[tuple[str, str], list[Measurement]] = {}
    for number in range(arguments.rounds):
        for library, dtype in CONTENDERS:
            if library in arguments.libraries and dtype in arguments.dtypes:
                print(f"round {number + 1} of {arguments.rounds}: {library}, {dtype}", file=sys.stderr)
                one = run_alone(measure, library, folder, dtype, arguments.prefills, arguments.new_tokens)
                measurements.setdefault((library, dtype), []).append(one)
    print(report(measurements, config, size_on_disk), flush=True)
    if "int8" in arguments.dtypes:
        print(run_alone(answers, folder, "int8", arguments.rounds))

    # In bfloat16 the likeliest two may be one rounding apart.
    if len(first_ids(measurements, "float32")) > 1:
        sys.exit("The libraries do not compute the same: their first tokens in float32 differ.")


if __name__ == "__main__":
    main()
