"""What this machine has: a device to run on, the dtype that it runs best in, cores and memory."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from threading import Thread, Timer, current_thread, main_thread
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from .config import PaliGemmaError
from .quantization import INT4, Int8Linear, int4, pack, packing, quantize
from .quantization import is_available as int8_is_available

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "int4": INT4,
}
# From this many parameters on, reading them is what a CPU spends its time with.
LARGE = 500_000_000
# Up to so many multiplications, a second core makes a decode step no faster: measured with 3 million, of 1 to 16 rows.
SMALL_STEP = 10_000_000
THREADS = torch.get_num_threads()  # see `take_over_threads`
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of malloc.h
KEPT_BYTES = 2**30
IDLE_SECONDS = 5.0  # after which what has been freed is given back
LACK_OF_MEMORY = re.compile(
    "can(no|')t allocate memory|not enough memory", re.IGNORECASE
)  # of torch, and of the kernel
# Of keys and values; a 3B checkpoint has 38 MB of them for 1,024 positions, in float32.
MAX_CACHE_BYTES = 2**30
PROC, CGROUPS, DEVICES = Path("/proc"), Path("/sys/fs/cgroup"), Path("/dev")
Parameters = ParamSpec("Parameters")
T = TypeVar("T")


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device that was asked for, the best one that works if none was.

    Raises:
        PaliGemmaError: it is not here, or torch cannot use it.
    """
    if device is None:
        has_cuda = torch.cuda.is_available() and _problem_with("cuda") is None
        device = "cuda" if has_cuda else "mps" if torch.backends.mps.is_available() else "cpu"
    if problem := _problem_with(device):
        raise PaliGemmaError(f"The device {device} cannot be used here ({problem}); please choose cpu.")
    return torch.device(device)


def on_device(numbers: Sequence, device: torch.device) -> Tensor:
    """An int64 tensor of them on a device, without waiting for it."""
    return torch.tensor(numbers).to(device, non_blocking=True)


def unused_gpu() -> str | None:
    """A sentence on why torch cannot use the NVIDIA GPU of this machine and what to do; None if it can, or there is none."""
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    problem = None if is_hidden or not _has_nvidia_gpu() else _problem_with("cuda")
    return problem and (
        f"This machine has an NVIDIA GPU, but torch {torch.__version__} cannot use it ({problem}), so models run on the "
        "CPU; please update the NVIDIA driver, or install the torch that fits it, see https://pytorch.org/get-started."
    )


def _problem_with(device: str | torch.device) -> str | None:
    """What torch says when it cannot compute on a device; None if it can."""
    try:
        torch.ones(1, device=torch.device(device)).add_(1)
    except torch.OutOfMemoryError:
        return None  # it could, but for others
    except (RuntimeError, AssertionError) as error:  # the latter, of builds that know no such device
        return str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
    return None


def _has_nvidia_gpu() -> bool:
    if any(DEVICES.glob("nvidia[0-9]*")):
        return True
    try:  # elsewhere than on Linux, and where Windows lends its GPU to a Linux inside
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return False
    return listed.stdout.startswith("GPU")


def lack_of_memory(error: Exception, device: torch.device) -> Exception:
    """The error itself, or if it says that the memory of `device` is full, a PaliGemmaError that says what to do."""
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not LACK_OF_MEMORY.search(str(error)):
        return error
    return PaliGemmaError(
        f"The memory of {device} is too small; please choose the dtype bfloat16, a smaller checkpoint or a larger machine."
    )


@contextmanager
def explained_lack_of_memory(device: torch.device) -> Iterator[None]:
    """Raise a device's running out of memory as a PaliGemmaError."""
    try:
        yield
    except Exception as error:
        explained = lack_of_memory(error, device)
        if explained is error:
            raise
        raise explained from error


def check_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of this name, if the device can run it."""
    dtype = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES.values():
        raise PaliGemmaError(f"The dtype {dtype} is not known; please choose auto or one of {', '.join(DTYPES)}.")
    if dtype in (torch.int8, INT4):
        name = dtype_name(dtype)
        if device.type != "cpu":
            raise PaliGemmaError(f"{name} runs on CPUs, not on {device}; please choose bfloat16.")
        if not int8_is_available():
            raise PaliGemmaError(f"{name} needs an x86 CPU; please choose bfloat16.")
    if dtype == INT4 and not int4.is_available():
        raise PaliGemmaError("int4 needs a CPU with AVX2 or AVX-512; please choose int8.")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """As it is given to `load`: bfloat16."""
    return str(dtype).removeprefix("torch.")


def choose_dtype(device: torch.device, parameters: int) -> torch.dtype:
    """What `auto` stands for: bfloat16 on a GPU; on a CPU float32 for small checkpoints and int8 for large ones.

    Where a CPU has instructions for bfloat16, and memory for it, large checkpoints run in that of the two which is
    measured to be faster.
    """
    if device.type != "cpu":
        return torch.bfloat16
    if parameters < LARGE:
        return torch.float32
    if not int8_is_available():
        return torch.bfloat16
    fits = parameters * torch.bfloat16.itemsize <= total_memory(device)
    return torch.bfloat16 if fits and multiplies_bfloat16() and not int8_is_faster() else torch.int8


def smallest_dtype(device: torch.device) -> torch.dtype:
    """The dtype that runs here in which weights take the least memory."""
    return torch.int8 if device.type == "cpu" and int8_is_available() else torch.bfloat16


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions that multiply matrices of bfloat16, about twice as fast as of float32."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


@torch.inference_mode()
def int8_is_faster() -> bool:
    """Whether int8 beats bfloat16 here, over a prefill and an answer of a few tokens."""
    quantized = quantize(torch.randn(8192, 2048))
    with packing():  # together they are larger than the cache of a CPU, as a checkpoint is
        int8 = [Int8Linear(pack(*quantized)) for _ in range(8)]
    bfloat16 = [nn.Linear(2048, 8192, bias=False, dtype=torch.bfloat16) for _ in int8]

    def seconds(layers: Sequence[nn.Module], prompt: Tensor) -> float:
        for layer in layers:
            layer(prompt[:1])
        layers[0](prompt[:])
        start = time.perf_counter()
        layers[0](prompt[:])  # another tensor, as in a model: int8 layers remember what they prepared from the last one
        middle = time.perf_counter()
        for _ in range(16):
            for layer in layers:
                layer(prompt[:1])
        return len(layers) * (middle - start) + time.perf_counter() - middle

    prompt = torch.randn(260, 2048)
    return seconds(int8, prompt) < seconds(bfloat16, prompt.bfloat16())


def take_over_threads() -> None:
    """Note how many threads the program wants torch to use, by OMP_NUM_THREADS or `torch.set_num_threads`.

    In its main thread only: another that is new may see what an engine has set for one of its steps.
    """
    global THREADS
    if current_thread() is main_thread():
        THREADS = torch.get_num_threads()


def choose_threads(operations: int | None = None) -> int:
    """How many threads may compute; where so many multiplications a row are given, how many make that decode step."""
    return 1 if operations is not None and operations <= SMALL_STEP else min(THREADS, available_cores())


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, compute with so many threads; torch sets this for the calling thread, and for others that are yet to come."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_own_thread(work: Callable[Parameters, T]) -> Callable[Parameters, T]:
    """`work`, run in a thread that ends with it, for what computes on a CPU beside the engine.

    OpenMP keeps a team of threads for every thread that has computed with it. As long as all teams together are more
    than the cores, their members go to sleep between two operations instead of waiting awake, and are slow to come back:
    the embedded checkpoint's answers take half as long again (measured on two cores).
    """

    @wraps(work)
    def run(*arguments: Parameters.args, **keywords: Parameters.kwargs) -> T:
        future: Future[T] = Future()

        def target() -> None:
            try:
                future.set_result(work(*arguments, **keywords))
            except BaseException as error:  # reaches whoever waits
                future.set_exception(error)

        Thread(target=target, daemon=True).start()
        return future.result()

    return run


def available_cores() -> int:
    """How many cores the process may keep busy: those it may run on, or fewer if its container has a quota.

    torch sees the cores of the host; more threads than a quota allows wait for each other.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _control_groups("cpu"):
        # Microseconds of CPU time in so many microseconds; -1 of them: no limit.
        match _numbers(group / "cpu.max") or _numbers(group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us"):
            case [quota, period] if quota > 0 < period:
                cores = min(cores, max(1, quota // period))
    return cores


def available_memory() -> int:
    """Bytes that a model could still take: of the GPU where there is one, else of the machine and of this container."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    free = [1024 * _number_after("MemAvailable:", PROC / "meminfo", default=2**53)]
    for group in _control_groups("memory"):
        match _numbers(group / "memory.max", group / "memory.current") or _numbers(
            group / "memory.limit_in_bytes", group / "memory.usage_in_bytes"
        ):
            case [limit, used]:
                # Pages that only keep files at hand can be had at any time; version 1 counts those of the groups below apart.
                own = _number_after("inactive_file", group / "memory.stat", default=0)
                free.append(limit - used + _number_after("total_inactive_file", group / "memory.stat", default=own))
    return min(free)


def cache_bytes(device: torch.device) -> int:
    """What keys and values may take: on a GPU half of the memory that is free, if that is more than elsewhere."""
    return max(MAX_CACHE_BYTES, available_memory() // 2) if device.type == "cuda" else MAX_CACHE_BYTES


def total_memory(device: torch.device) -> int:
    """Bytes of memory that the device has, taken or not; of a CPU, what its container allows."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [1024 * _number_after("MemTotal:", PROC / "meminfo", default=2**53)]
    for group in _control_groups("memory"):
        limits += _numbers(group / "memory.max") or _numbers(group / "memory.limit_in_bytes")
    return min(limits)


def _control_groups(controller: str) -> Iterator[Path]:
    """Folders of the cgroups, of version 2 or 1, whose limits on `cpu` or `memory` hold for this process."""
    for line in _lines(PROC / "self" / "cgroup"):
        _, controllers, group = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            base = CGROUPS / controller if controllers else CGROUPS
            own = base / group.lstrip("/")
            # A limit on any group above holds as well. Inside a container the path may be the host's: then only base is here.
            yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(base))


def _numbers(*files: Path) -> list[int]:
    """The whole numbers in files of one line each; none if a file is missing or says `max`."""
    try:
        return [int(word) for file in files for word in file.read_text(encoding="utf-8").split()]
    except (OSError, ValueError):
        return []


def _number_after(word: str, file: Path, default: int) -> int:
    """The whole number that follows `word` at the start of a line."""
    found = (line.split()[1] for line in _lines(file) if line.startswith(f"{word} "))
    return int(next(found, default))


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free for the next ones, where it is the C library.

    It would give large pieces back to the kernel and fetch them anew, page by page, for each layer's activations: a
    twentieth of the time of a prefill (measured in the 3B shapes, in int8). What loading has freed is given back before.
    """
    give_back_freed_memory()
    # Pieces of more bytes are given back when freed, and the end of the heap is when more bytes of it are free.
    _call_glibc("mallopt", M_MMAP_THRESHOLD, KEPT_BYTES)
    _call_glibc("mallopt", M_TRIM_THRESHOLD, KEPT_BYTES)


def give_back_freed_memory() -> None:
    """Let glibc, where it is the C library, give the kernel what has been freed since."""
    _call_glibc("malloc_trim", 0)


_giving_back = Timer(0.0, give_back_freed_memory)


def give_back_freed_memory_later() -> None:
    """Give back what is free after `IDLE_SECONDS`, unless this is called again before: prefills in a row keep theirs."""
    global _giving_back
    _giving_back.cancel()
    _giving_back = Timer(IDLE_SECONDS, give_back_freed_memory)
    _giving_back.daemon = True
    _giving_back.start()


def _call_glibc(name: str, *arguments: int) -> None:
    if sys.platform == "linux" and (function := getattr(ctypes.CDLL(None), name, None)):
        function(*arguments)
