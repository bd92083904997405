"""Where weights come from: the embedded checkpoint, a folder, the Hub; and what this machine runs them best in."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .config import PaliGemmaConfig, PaliGemmaError
from .generation import VisionLanguageModel, explained_lack_of_memory
from .mask_decoder import FILE_NAMES as MASK_DECODER_FILES
from .mask_decoder import MaskDecoder
from .model import PaliGemma
from .processor import Processor
from .quantization import Int8Embedding, Int8Linear, pack, packing, quantize
from .quantization import is_available as int8_is_available

EMBEDDED_FOLDER = Path(__file__).parent / "tiny"
INDEX_FILE = "model.safetensors.index.json"
HUB_FILES = [
    "config.json",
    "tokenizer.json",
    INDEX_FILE,
    "model.safetensors",
    "model-*-of-*.safetensors",
    *MASK_DECODER_FILES,
]
# How safetensors names what torch calls otherwise.
STORED_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
# From this many parameters on, reading them is what a CPU spends its time with.
LARGE = 500_000_000
# Part of the names of int8 files: a new number makes them anew.
INT8_FORMAT = 1
SHARD_BYTES = 256 * 2**20
SCALE_SUFFIX = ".scale"
# From malloc.h: pieces of more bytes are given back when freed; the end of the heap is, when more bytes of it are free.
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
KEPT_BYTES = 2**30

EMBEDDING = "language_model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
# Older files carry these tables, which the model computes for itself.
COMPUTED_SUFFIXES = (".position_ids", ".rotary_emb.inv_freq")


# Told what is being done, and how much of it, 0 to 1, or None if that is not known.
Progress = Callable[[str, float | None], None]


def no_progress(doing: str, fraction: float | None) -> None:
    """What `load` reports to unless told otherwise."""


def no_room_made(needed: int) -> None:
    """What `load` announces its weights to unless told otherwise."""


def load(
    source: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = "auto",
    revision: str | None = None,
    compile: bool = False,
    progress: Progress = no_progress,
    make_room: Callable[[int], None] = no_room_made,
) -> VisionLanguageModel:
    """Load a checkpoint and all that it takes to use it.

    Args:
        source: None for the embedded checkpoint, a folder, or a Hub id such as `google/paligemma-3b-mix-224`, which a
            revision may follow: `google/paligemma-3b-mix-224@bfloat16`.
        device: where to run; None takes a GPU if there is one.
        dtype: `float32`, `bfloat16`, `float16`, `int8` (x86 CPUs only), or `auto`, see `choose_dtype`. Weights in int8
            are kept next to the Hub's cache, so that they are made once.
        revision: branch, tag or commit on the Hub.
        compile: compile the step that makes a token (CUDA), see `VisionLanguageModel.compile`.
        progress: called as the work goes on, from this thread or another, see `Progress`.
        make_room: called with the bytes that the weights will take, before they are read.

    Raises:
        PaliGemmaError: the checkpoint cannot be found, reached, read or run; the sentence says what to do.
    """
    device = choose_device(device)
    dtype = None if dtype in (None, "auto") else check_dtype(dtype, device)
    if compile and device.type != "cuda":
        raise PaliGemmaError("Compiling is for CUDA; please leave it out, or choose the device cuda.")
    folder = find_folder(source, revision, progress)
    config = PaliGemmaConfig.from_file(folder / "config.json")
    processor = Processor.from_file(config, folder / "tokenizer.json")
    with torch.device("meta"), WithoutInitialisation():
        model = PaliGemma(processor.config)
    if device.type == "cpu":
        torch.set_num_threads(min(torch.get_num_threads(), available_cores()))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if dtype is None:
        dtype = choose_dtype(device, parameters)
    make_room(parameters * dtype.itemsize)
    with explained_lack_of_memory(device):
        if dtype == torch.int8:
            load_int8_weights(model, weight_files(folder), progress)
        else:
            load_weights(model, weight_files(folder), dtype, device, progress)
    keep_freed_memory()
    vlm = VisionLanguageModel(model, processor, find_mask_decoder(folder))
    if compile:
        vlm.compile()
    return vlm


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device that was asked for if it is here, the best one if none was."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise PaliGemmaError(f"The device {device} cannot be used here ({reason}); please choose cpu.") from error
    return device


def check_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of this name, if the device can run it."""
    dtype = DTYPES.get(dtype, dtype)
    if dtype not in DTYPES.values():
        raise PaliGemmaError(f"The dtype {dtype} is not known; please choose auto or one of {', '.join(DTYPES)}.")
    if dtype == torch.int8 and device.type != "cpu":
        raise PaliGemmaError(f"int8 runs on CPUs, not on {device}; please choose bfloat16.")
    if dtype == torch.int8 and not int8_is_available():
        raise PaliGemmaError("int8 needs an x86 CPU; please choose bfloat16.")
    return dtype


def choose_dtype(device: torch.device, parameters: int) -> torch.dtype:
    """What `auto` stands for: bfloat16 on a GPU; on a CPU float32 for small checkpoints and int8 for large ones.

    Where a CPU has instructions for bfloat16, large checkpoints run in that of the two which is measured to be faster.
    """
    if device.type != "cpu":
        return torch.bfloat16
    if parameters < LARGE:
        return torch.float32
    if not int8_is_available():
        return torch.bfloat16
    return torch.bfloat16 if multiplies_bfloat16(device) and not int8_is_faster() else torch.int8


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions that multiply matrices of bfloat16, about twice as fast as of float32."""
    if device.type != "cpu":
        return device.type == "cuda"
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


@torch.inference_mode()
def int8_is_faster() -> bool:
    """Whether int8 beats bfloat16 here, over the reading of a picture and an answer of a few words."""
    quantized = quantize(torch.randn(8192, 2048))
    with packing():  # together they are larger than the cache of a CPU, as a checkpoint is
        int8 = [Int8Linear(pack(*quantized)) for _ in range(8)]
    bfloat16 = [nn.Linear(2048, 8192, bias=False, dtype=torch.bfloat16) for _ in int8]

    def seconds(layers: list[nn.Module], prompt: Tensor) -> float:
        for layer in layers:
            layer(prompt[:1])
        layers[0](prompt)
        start = time.perf_counter()
        layers[0](prompt)
        middle = time.perf_counter()
        for _ in range(16):
            for layer in layers:
                layer(prompt[:1])
        return len(layers) * (middle - start) + time.perf_counter() - middle

    prompt = torch.randn(260, 2048)
    return seconds(int8, prompt) < seconds(bfloat16, prompt.bfloat16())


def available_cores(root: Path = Path("/")) -> int:
    """How many cores the process may keep busy: those it may run on, or fewer if its container has a quota.

    torch sees the cores of the host; more threads than a quota allows wait for each other.

    Args:
        root: where `sys` and `proc` are.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    mount = root / "sys/fs/cgroup"
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return cores
    for _, controllers, group in groups:
        base = mount if not controllers else mount / "cpu" if "cpu" in controllers.split(",") else None
        if base is None:
            continue
        own = base / group.lstrip("/")
        # A limit on any group above holds as well. Inside a container the path may be the host's: then only base is here.
        for folder in (own, *own.parents):
            if folder.is_relative_to(base):
                quota, period = _cpu_quota(folder)
                if quota > 0 < period:
                    cores = min(cores, max(1, quota // period))
    return cores


def _cpu_quota(group: Path) -> tuple[int, int]:
    """Microseconds of CPU time in so many microseconds, from the files of version 2 or 1 of cgroups; (0, 0): no limit."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((group / name).read_text(encoding="utf-8") for name in names).split()
            return int(quota), int(period)
        except (OSError, ValueError):  # ValueError: the quota is "max"
            continue
    return 0, 0


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free for the next ones, where it is the C library.

    It would give large pieces back to the kernel and fetch them anew, page by page, for each layer's activations: a
    twentieth of the time of a prefill (measured in the 3B shapes, in int8). What loading has freed is given back before.
    """
    give_back_freed_memory()
    libc = _c_library()
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def give_back_freed_memory() -> None:
    """Let glibc, where it is the C library, give the kernel what has been freed since."""
    libc = _c_library()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _c_library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def find_folder(
    source: str | os.PathLike | None, revision: str | None = None, progress: Progress = no_progress
) -> Path:
    """The folder that holds a checkpoint's files, fetched from the Hub if need be."""
    if source is None:
        return EMBEDDED_FOLDER
    folder = Path(os.path.expanduser(source))
    if folder.is_dir():
        return folder
    source = str(source)
    repository, _, revision_in_source = source.partition("@")
    if folder.is_absolute() or source.startswith((".", "~")) or repository.count("/") != 1:
        raise PaliGemmaError(f"There is no folder {source}; please give a folder or a Hub id such as owner/name.")
    return download(repository, revision or revision_in_source or None, progress)


def find_mask_decoder(folder: Path) -> MaskDecoder | None:
    """The decoder of masks that lies beside a checkpoint, if one does."""
    for name in MASK_DECODER_FILES:
        if (folder / name).exists():
            return MaskDecoder.load(folder / name)
    return None


def download(repository: str, revision: str | None, progress: Progress) -> Path:
    """Fetch what a checkpoint needs from the Hub, with progress bars, unless it is in the cache already."""
    from huggingface_hub import errors, get_token, snapshot_download
    from huggingface_hub.utils import tqdm

    class ReportingBar(tqdm):
        """The Hub's own bar; the one that counts bytes reports as well."""

        def __init__(self, *args: object, **kwargs: object):
            super().__init__(*args, **kwargs)
            # A bar that is not shown counts nothing, and knows no unit.
            self.counts_bytes, self.done = kwargs.get("unit") == "B", kwargs.get("initial") or 0

        def update(self, n: float | None = 1) -> bool | None:
            self.done += n or 0
            if self.counts_bytes and self.total:
                progress(f"Downloading {repository}", min(self.done / self.total, 1.0))
            return super().update(n)

    progress(f"Downloading {repository}", None)
    page = f"https://huggingface.co/{repository}"
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=HUB_FILES, tqdm_class=ReportingBar))
    except errors.GatedRepoError as error:
        if get_token() is None:
            advice = f"accept its licence at {page} and set HF_TOKEN to a token of your account"
        else:
            advice = f"accept its licence at {page} with the account that your HF_TOKEN belongs to"
        raise PaliGemmaError(f"{repository} is a gated repository; please {advice}.") from error
    except errors.RevisionNotFoundError as error:
        raise PaliGemmaError(f"{repository} has no revision {revision}; please check {page}/tree/main.") from error
    except errors.RepositoryNotFoundError as error:
        if get_token() is None:
            advice = "check the name, and if it is a private one, set HF_TOKEN to a token that may read it"
        else:
            advice = "check the name, and that your HF_TOKEN may read it"
        raise PaliGemmaError(f"The Hub knows no repository {repository}; please {advice}.") from error
    except errors.HFValidationError as error:
        raise PaliGemmaError(f"{repository} is no Hub id; please give one of the form owner/name.") from error
    except errors.LocalEntryNotFoundError as error:
        # Raised too when the Hub did answer, but with an error, and the cache could not stand in for it.
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise _bad_answer(repository, error.__cause__.response.status_code) from error
        raise PaliGemmaError(
            f"{repository} is not in the local cache and the Hub cannot be reached; please check the network."
        ) from error
    except errors.HfHubHTTPError as error:
        raise _bad_answer(repository, error.response.status_code) from error
    except (errors.HTTPError, OSError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise PaliGemmaError(f"{repository} could not be downloaded ({reason}); please try again.") from error


def _bad_answer(repository: str, status: int) -> PaliGemmaError:
    if status == 401:
        return PaliGemmaError("The Hub does not accept your HF_TOKEN; please make a new one.")
    if status == 403:
        return PaliGemmaError(
            f"The Hub forbids reading {repository}; please set HF_TOKEN to a token that may read gated repositories."
        )
    return PaliGemmaError(f"The Hub answered {status} for {repository}; please try again later.")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the shards that its index lists, or the single one."""
    index = folder / INDEX_FILE
    if not index.exists():
        files = [folder / "model.safetensors"]
    else:
        try:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files = [folder / name for name in sorted(set(shards))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PaliGemmaError(f"{index} is not an index of shards; please fetch the checkpoint again.") from error
        if not files:
            raise PaliGemmaError(f"{index} lists no shards; please fetch the checkpoint again.")
    for file in files:
        if not file.exists():
            raise PaliGemmaError(f"{file} is missing; please fetch the checkpoint again.")
    return files


def find_tensors(model: PaliGemma, files: list[Path]) -> dict[str, tuple[Path, str]]:
    """The file and the key there of every parameter of `model`, which was built on `meta`.

    Raises:
        PaliGemmaError: a tensor is missing, unexpected or of another shape, or a file is damaged.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    expected[OUTPUT] = expected[EMBEDDING]
    found: dict[str, tuple[Path, str]] = {}
    for file in files:
        with _open(file) as mapped:
            for key in mapped.keys():
                name = canonical_name(key)
                if name.endswith(COMPUTED_SUFFIXES):
                    continue
                if name not in expected:
                    raise PaliGemmaError(f"{file} holds an unexpected tensor, {key}; is this another kind of model?")
                shape = tuple(mapped.get_slice(key).get_shape())
                if shape != expected[name]:
                    raise PaliGemmaError(f"{file}: {key} has the shape {list(shape)}, expected {list(expected[name])}.")
                found[name] = file, key

    # The output layer is the embedding again; files may hold it under either name, or under both.
    output = found.pop(OUTPUT, None)
    if output is not None and not torch.equal(_read(*found.setdefault(EMBEDDING, output)), _read(*output)):
        raise PaliGemmaError(f"{files[0].parent}: {OUTPUT} differs from {EMBEDDING}, expected them to be tied.")
    missing = [name for name in expected if name not in found and name != OUTPUT]
    if missing:
        raise PaliGemmaError(
            f"{files[0].parent} lacks {len(missing)} tensors, the first is {official_name(missing[0])} of shape "
            f"{list(expected[missing[0]])}; please fetch the checkpoint again."
        )
    return found


def load_weights(
    model: PaliGemma,
    files: list[Path],
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = no_progress,
) -> None:
    """Put the tensors of `files` into `model`, which was built on `meta`.

    On a CPU, tensors that already have the right dtype stay where they are: they are views of the mapped file. Others
    are cast or moved one by one, each through a mapping of its own, so that what has been read does not stay resident.

    Raises:
        PaliGemmaError: as `find_tensors`.
    """
    found = find_tensors(model, files)
    mapped = {file: _open(file) for file in files}
    for number, (name, (file, key)) in enumerate(found.items()):
        progress("Reading the weights", number / len(found))
        if device.type == "cpu" and mapped[file].get_slice(key).get_dtype() == STORED_DTYPES[dtype]:
            tensor = mapped[file].get_tensor(key)
        else:
            tensor = _read(file, key).to(dtype).to(device)  # cast here, since not every device knows float8
        _set(model, name, nn.Parameter(tensor, requires_grad=False))
    model.language_model.rotary.to(device)


def load_int8_weights(model: PaliGemma, files: list[Path], progress: Progress = no_progress) -> None:
    """Put the tensors of `files` into `model`, which was built on `meta`, with int8 layers in place of linear ones.

    The int8 weights of a checkpoint are made once, in a folder of their own.

    Raises:
        PaliGemmaError: as `find_tensors`, or there is no room for them on the disk.
    """
    source, folder = find_tensors(model, files), int8_folder(files)
    try:
        found = _file_of_each_key(folder)
    except (OSError, PaliGemmaError):  # not there yet, or damaged
        shutil.rmtree(folder, ignore_errors=True)
        write_int8_weights(model, source, folder, progress)
        give_back_freed_memory()  # packing needs the room
        found = _file_of_each_key(folder)

    def put(name: str) -> None:
        owner = name.removesuffix(".weight")
        if owner + SCALE_SUFFIX not in found:
            if name.removesuffix(".bias") + SCALE_SUFFIX not in found:  # other biases go with their weights
                _set(model, name, nn.Parameter(_read(found[name], name), requires_grad=False))
            return
        scale = _read(found[owner + SCALE_SUFFIX], owner + SCALE_SUFFIX)
        bias = _read(found[f"{owner}.bias"], f"{owner}.bias") if f"{owner}.bias" in found else None
        layer = Int8Linear(pack(_read(found[name], name), scale), bias, single_twice=name == EMBEDDING)
        # Read anew: of this mapping only the rows of the tokens in use become resident, of the other all have.
        _set(model, owner, Int8Embedding(_read(found[name], name), scale, layer) if name == EMBEDDING else layer)

    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    done, total = 0, sum(sizes.values())
    progress("Packing the int8 weights", 0.0)
    with packing(), ThreadPoolExecutor(torch.get_num_threads()) as threads:  # packing one keeps one core busy
        # The largest first, while there is room for both forms of it.
        tasks = {threads.submit(put, name): name for name in sorted(sizes, key=lambda name: name != EMBEDDING)}
        for task in as_completed(tasks):
            task.result()
            done += sizes[tasks[task]]
            progress("Packing the int8 weights", done / total)


def int8_folder(files: list[Path]) -> Path:
    """Where the int8 weights of the checkpoint in `files` belong: next to the Hub's cache, and new when a file changes."""
    from huggingface_hub import constants

    files = [file.resolve() for file in files]  # in the Hub's cache the name of the file itself tells its content
    state = [INT8_FORMAT, *((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)]
    name = re.sub(r"[^A-Za-z0-9.]+", "-", str(files[0].parent)).strip("-")[-80:]
    digest = hashlib.sha256(repr(state).encode()).hexdigest()[:16]
    return Path(constants.HF_HUB_CACHE).parent / "paligemma-int8" / f"{name}-{digest}"


def write_int8_weights(
    model: PaliGemma, found: dict[str, tuple[Path, str]], folder: Path, progress: Progress = no_progress
) -> None:
    """Quantise what `find_tensors` found into `folder`, tensor by tensor: memory holds little of it at any time.

    The weights of linear layers and the embedding become int8, each with its scale, see `quantize`; the rest float32.
    """
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)} | {EMBEDDING}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    done, total = 0, sum(sizes.values())
    unfinished = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder.parent))
        shard: dict[str, Tensor] = {}
        for number, (name, source) in enumerate(found.items(), start=1):
            progress("Turning the weights into int8", done / total)
            if name in linear:
                shard[name], shard[name.removesuffix(".weight") + SCALE_SUFFIX] = quantize(_read(*source))
            else:
                shard[name] = _read(*source).float().contiguous()
            done += sizes[name]
            if number == len(found) or sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
                save_file(shard, unfinished / f"{number:05}.safetensors")
                shard = {}
        # Under its own name only once it is whole. Somebody else may have been faster, with the same result.
        if not folder.exists():
            unfinished.rename(folder)
    except (OSError, SafetensorError) as error:
        raise PaliGemmaError(
            f"The int8 weights cannot be written to {folder.parent} ({error}); please make room there for "
            f"{total / 1e9:.1f} GB, set HF_HOME to another place, or choose another dtype."
        ) from error
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)


def _file_of_each_key(folder: Path) -> dict[str, Path]:
    """Where the tensors of all safetensors files in a folder are."""
    found = {}
    for file in sorted(folder.iterdir()):
        with _open(file) as mapped:
            found |= dict.fromkeys(mapped.keys(), file)
    return found


def _read(file: Path, key: str) -> Tensor:
    """One tensor, as a view of a mapping that ends with it."""
    with _open(file) as mapped:
        return mapped.get_tensor(key)


def _set(model: PaliGemma, name: str, value: nn.Parameter | nn.Module) -> None:
    """Replace the parameter or module of this name."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, value)


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise PaliGemmaError(
            f"{file} is truncated or damaged ({error}), expected a whole safetensors file; please fetch it again."
        ) from error


class WithoutInitialisation(TorchFunctionMode):
    """Builds modules without drawing weights that are about to be replaced; drawing on `meta` alone takes seconds."""

    def __torch_function__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def canonical_name(key: str) -> str:
    """The name in `PaliGemma` of a key of any of the layouts in use.

    `model.language_model.norm.weight` and `language_model.model.norm.weight` are both `language_model.norm.weight`;
    `vision_tower.vision_model.*`, with or without `model.` before it, is `vision_tower.*`.
    """
    key = key.removeprefix("model.")
    if key in ("lm_head.weight", "language_model.lm_head.weight"):
        return OUTPUT
    for outer in ("language_model.model.", "vision_tower.vision_model."):
        if key.startswith(outer):
            return outer.split(".")[0] + "." + key.removeprefix(outer)
    return key


def official_name(name: str) -> str:
    """The key under which the official checkpoints keep a parameter of `PaliGemma`."""
    name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name.replace("language_model.", "language_model.model.", 1)


def save_checkpoint(
    model: PaliGemma,
    tokenizer: Tokenizer,
    folder: str | Path,
    dtype: torch.dtype,
    in_float8: Callable[[str], bool] = lambda name: False,
) -> None:
    """Write `config.json`, `tokenizer.json` and `model.safetensors` in the official layout, weights as `dtype`.

    Parameters whose names, as `model` has them, are `in_float8` take one byte a number (E4M3, arXiv 2209.05433).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    weights = {
        official_name(name): value.detach().to(torch.float8_e4m3fn if in_float8(name) else dtype)
        for name, value in model.named_parameters()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
