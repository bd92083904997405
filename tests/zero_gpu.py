"""Run `app.py` as ZeroGPU would, with the real `spaces` package, on a machine without CUDA.

Everything but the GPU is real: the emulation of `cuda` in the main thread, the packing of tensors at launch, the forked
worker. There the tensors come back from the pack to the CPU.
"""

from __future__ import annotations

import itertools
import runpy
import sys
from pathlib import Path

import torch


def is_in_bad_fork() -> bool:
    """In place of torch's, which must be found by its name from another process."""
    return False


torch.version.cuda = "13.0"
torch.cuda._is_in_bad_fork = is_in_bad_fork
for name in ("_cuda_init", "_cuda_cudart"):  # missing in a torch without CUDA
    if not hasattr(torch._C, name):
        setattr(torch._C, name, lambda *_: None)
import spaces.zero.torch  # noqa: E402
from spaces.zero.torch.patching import tensor_packs  # noqa: E402


def move_to_cpu(callback: object) -> None:
    """In place of `spaces.zero.torch.move`: read the packed tensors into those that stand for them."""
    for pack in tensor_packs:
        data = torch.frombuffer(bytearray(Path(pack.path()).read_bytes()), dtype=torch.uint8)
        offset = 0
        for tensor, size, size_on_disk in itertools.chain(*pack.batches, pack.big_tensors):
            stored = data[offset : offset + size].clone().untyped_storage()  # some have no numbers
            values = torch.tensor([], dtype=tensor.dtype).set_(stored, 0, tensor.shape, tensor.stride())
            for fake in pack.fakes[tensor]:
                fake.data = values
            offset += size_on_disk


spaces.zero.torch.init = lambda nvidia_uuid: None
spaces.zero.torch.move = move_to_cpu
sys.argv = sys.argv[1:]
sys.path[0] = str(Path(sys.argv[0]).parent)
runpy.run_path(sys.argv[0], run_name="__main__")
