"""Loading in the main thread of ZeroGPU, where the real `spaces` package emulates CUDA by a torch function mode."""

import os
import subprocess
import sys
from pathlib import Path

import paligemma

PROGRAM = """
import sys
import torch

def is_in_bad_fork():
    return False

# As far as the package looks at import, let a torch without CUDA pass for one with it.
torch.version.cuda, torch.cuda._is_in_bad_fork = "13.0", is_in_bad_fork
for name in ("_cuda_init", "_cuda_cudart"):
    if not hasattr(torch._C, name):
        setattr(torch._C, name, lambda *_: None)
import spaces
from spaces.zero.torch.patching import cuda_aliases
import paligemma
from paligemma import hardware

assert hardware.choose_device(None).type == "cuda"
assert hardware.unused_gpu() is None
assert hardware.available_memory() > 2**30
needed = []
for asked, dtype in (("auto", torch.bfloat16), ("float32", torch.float32)):
    vlm = paligemma.load(device="cuda", dtype=asked, make_room=needed.append)
    assert (vlm.device, vlm.dtype) == (torch.device("cuda", 0), dtype)
    assert {buffer.device.type for buffer in vlm.model.buffers()} == {"cuda"}
    # What is packed for the workers, with a GPU of their own, is behind each parameter.
    expected = paligemma.load(device="cpu", dtype=dtype).model.parameters()
    assert all(map(torch.equal, map(cuda_aliases.get, vlm.model.parameters()), expected))
assert 2 * needed[0] == needed[1]
print("loaded")
"""


def test_models_reach_the_emulated_gpu(tmp_path):
    environment = {
        **os.environ,
        "SPACES_ZERO_GPU": "1",
        "SPACES_ZERO_DEVICE_API_URL": "http://127.0.0.1:1",
        "PYTHONPATH": str(Path(paligemma.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["loaded"]
