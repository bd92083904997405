"""What a machine has: devices, dtypes, cores and memory."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace

import pytest
import torch

import paligemma
from paligemma import PaliGemmaError, hardware
from paligemma.gemma import operations
from paligemma.quantization import Int8Linear


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantized_weights_are_refused_where_they_cannot_run(monkeypatch, dtype):
    with pytest.raises(PaliGemmaError, match=f"{dtype} runs on CPUs, not on meta; please choose bfloat16"):
        paligemma.load(device="meta", dtype=dtype)
    monkeypatch.setattr(hardware, "int8_is_available", lambda: False)
    with pytest.raises(PaliGemmaError, match=f"{dtype} needs an x86 CPU; please choose bfloat16"):
        paligemma.load(dtype=dtype)


def test_int4_is_refused_without_its_instructions(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(PaliGemmaError, match=r"int4 needs a CPU with AVX2 or AVX-512; please choose int8\."):
        paligemma.load(dtype="int4")


DRIVER = "The NVIDIA driver on your system is too old (found version 11040)"


@pytest.fixture
def with_gpu(tmp_path, monkeypatch):
    """An NVIDIA GPU that torch cannot use, for this reason."""

    def appear(reason, is_available=False):
        (tmp_path / "nvidia0").touch()
        ones = torch.ones

        def fail_on_cuda(*arguments, device=None, **settings):
            if torch.device(device or "cpu").type == "cuda":
                raise RuntimeError(reason)
            return ones(*arguments, **settings)

        monkeypatch.setattr(hardware, "DEVICES", tmp_path)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: is_available)
        monkeypatch.setattr(torch, "ones", fail_on_cuda)

    return appear


@pytest.mark.parametrize(
    ("message", "is_available", "reason"),
    [
        (f"{DRIVER}. Please update your GPU driver by downloading a new version", False, DRIVER),
        ("CUDA error: no kernel image is available\nCUDA kernel errors might", True, "no kernel image is available"),
    ],
)
def test_gpu_that_torch_cannot_use_is_explained_with_a_way_out(with_gpu, message, is_available, reason):
    with_gpu(message, is_available)
    sentence = hardware.unused_gpu()
    assert sentence.startswith("This machine has an NVIDIA GPU, but torch ")
    assert f"{reason}), so models run on the CPU; please update the NVIDIA driver, or install" in sentence
    assert hardware.choose_device(None) == torch.device("cpu")


def test_gpu_that_torch_was_not_built_for_is_explained(tmp_path, monkeypatch):
    if torch.version.cuda is not None:
        pytest.skip("this torch is built for CUDA")
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(hardware, "DEVICES", tmp_path)
    assert "cannot use it (Torch not compiled with CUDA enabled), so models run on the CPU" in hardware.unused_gpu()


def test_gpu_may_be_there_for_nvidia_smi_alone(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-0)'")
    program.chmod(0o755)
    monkeypatch.setattr(hardware, "DEVICES", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "This machine has an NVIDIA GPU" in hardware.unused_gpu()
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9")
    assert hardware.unused_gpu() is None


def test_nothing_is_said_where_there_is_no_gpu_or_it_is_hidden_on_purpose(tmp_path, with_gpu, monkeypatch):
    with_gpu(DRIVER)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert hardware.unused_gpu() is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "nvidia0").unlink()
    assert hardware.unused_gpu() is None


@pytest.mark.parametrize(
    ("device", "parameters", "available", "bfloat16", "faster", "expected"),
    [
        ("cpu", 9_000_000_000, True, True, False, torch.int8),
        ("cuda", 5_000_000, True, False, True, torch.bfloat16),
        ("cuda", 3_000_000_000, True, False, True, torch.bfloat16),
        ("cpu", 5_000_000, True, True, True, torch.float32),
        ("cpu", 3_000_000_000, True, False, False, torch.int8),
        ("cpu", 3_000_000_000, True, True, True, torch.int8),
        ("cpu", 3_000_000_000, True, True, False, torch.bfloat16),
        ("cpu", 3_000_000_000, False, False, True, torch.bfloat16),
    ],
)
def test_auto_takes_what_suits_device_and_size(device, parameters, available, bfloat16, faster, expected, monkeypatch):
    monkeypatch.setattr(hardware, "total_memory", lambda _: 16 * 10**9)
    monkeypatch.setattr(hardware, "int8_is_available", lambda: available)
    monkeypatch.setattr(hardware, "int8_is_faster", lambda: faster)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bfloat16})
    assert hardware.choose_dtype(torch.device(device), parameters) == expected


@pytest.mark.parametrize(("slow", "expected"), [(Int8Linear, False), (torch.nn.Linear, True)])
def test_the_faster_dtype_is_measured(slow, expected, monkeypatch):
    clock = SimpleNamespace(now=0.0)

    def take_a_second(layer, states):
        clock.now += isinstance(layer, slow)
        return states

    for kind in (Int8Linear, torch.nn.Linear):
        monkeypatch.setattr(kind, "forward", take_a_second)
    monkeypatch.setattr(hardware, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    assert hardware.int8_is_faster() == expected


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Writes the files in which Linux says what a process may use, on a machine of 64 cores."""
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr(hardware, "PROC", tmp_path / "proc")
    monkeypatch.setattr(hardware, "CGROUPS", tmp_path / "cgroup")

    def write(groups, files):
        for name, content in {"proc/self/cgroup": groups, **{f"cgroup/{name}": files[name] for name in files}}.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content + "\n")

    return write


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "300000 100000"}, 3),
        ("0::/", {"cpu.max": "max 100000"}, 64),
        ("0::/", {}, 64),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, 2),
        ("0::/of/the/host", {"cpu.max": "200000 100000"}, 2),
        (
            "3:memory:/x\n2:cpu,cpuacct:/x",
            {"cpu/x/cpu.cfs_quota_us": "400000", "cpu/x/cpu.cfs_period_us": "100000"},
            4,
        ),
        ("2:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
    ],
)
def test_cores_are_those_of_the_container(machine, groups, files, expected):
    machine(groups, files)
    assert hardware.available_cores() == expected


def test_without_cgroups_all_cores_are_used(machine):
    assert hardware.available_cores() == 64


@pytest.mark.parametrize(
    ("groups", "files", "free", "total"),
    [
        ("9:cpuset:/", {}, 5000 * 1024, 9000 * 1024),
        ("0::/", {"memory.max": "max", "memory.current": "1024"}, 5000 * 1024, 9000 * 1024),
        ("0::/", {"memory.max": "4096", "memory.current": "1024"}, 3072, 4096),
        (
            "0::/a",
            {"a/memory.max": "4096", "a/memory.current": "1024", "a/memory.stat": "anon 10\ninactive_file 512"},
            3584,
            4096,
        ),
        ("0::/a", {"a/memory.max": "max", "memory.max": "4096", "memory.current": "1024"}, 3072, 4096),
        (
            "4:memory:/x",
            {
                "memory/x/memory.limit_in_bytes": "4096",
                "memory/x/memory.usage_in_bytes": "1024",
                "memory/x/memory.stat": "inactive_file 1\ntotal_inactive_file 256",
            },
            3328,
            4096,
        ),
    ],
)
def test_memory_is_that_of_the_machine_or_of_its_container(machine, groups, files, free, total):
    machine(groups, {**files, "../proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 5000 kB"})
    assert hardware.available_memory() == free
    assert hardware.total_memory(torch.device("cpu")) == total


def test_loading_takes_no_more_threads_than_there_are_cores_also_to_measure_dtypes(machine, monkeypatch):
    before, seen = torch.get_num_threads(), []
    machine("0::/", {"cpu.max": "100000 100000"})
    monkeypatch.setattr(hardware, "LARGE", 1)
    monkeypatch.setattr(hardware, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(hardware, "int8_is_faster", lambda: seen.append(torch.get_num_threads()))
    try:
        vlm = paligemma.load(device="cpu")
        assert seen == [vlm.engine.call(torch.get_num_threads)] == [1]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("device", "free", "expected"), [("cpu", 64, 1), ("cuda", 64, 32), ("cuda", 1, 1)])
def test_a_gpu_gives_half_of_its_free_memory_to_the_cache(monkeypatch, device, free, expected):
    monkeypatch.setattr(hardware, "available_memory", lambda: free * 2**30)
    assert hardware.cache_bytes(torch.device(device)) == expected * 2**30


def test_the_steps_of_small_checkpoints_are_made_by_one_thread(tiny, monkeypatch):
    monkeypatch.setattr(hardware, "THREADS", 2)
    monkeypatch.setattr(hardware, "available_cores", lambda: 4)
    assert hardware.choose_threads() == hardware.choose_threads(2_000_000_000) == 2
    assert hardware.choose_threads(operations(tiny.config.text, 1, 0)) == 1
    before = torch.get_num_threads()
    with hardware.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_work_in_its_own_thread_gives_back_what_it_returns_or_raises():
    def work(one, *, other):
        return threading.current_thread(), one / other

    thread, result = hardware.in_own_thread(work)(6, other=3)
    assert (thread is threading.current_thread(), result) == (False, 2)
    thread.join(timeout=5)
    assert not thread.is_alive()
    with pytest.raises(ZeroDivisionError):
        hardware.in_own_thread(work)(6, other=0)


def test_models_take_as_many_threads_as_the_program_has_asked_torch_for(monkeypatch):
    monkeypatch.setattr(hardware, "THREADS", hardware.THREADS)
    monkeypatch.setattr(hardware, "available_cores", lambda: 4)
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert paligemma.load(device="cpu").engine.call(torch.get_num_threads) == count
            hardware.in_own_thread(torch.set_num_threads)(2)
            hardware.in_own_thread(hardware.take_over_threads)()
            assert hardware.choose_threads() == count, "another thread than the main one asks for nothing"
    finally:
        torch.set_num_threads(before)
