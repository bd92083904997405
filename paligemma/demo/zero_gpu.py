"""ZeroGPU, where each answer borrows a GPU: what its package `spaces` asks of a page.

To be imported before torch. Without the package, or elsewhere, nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

try:
    import spaces
    from spaces.config import Config

    IS_ZERO_GPU: bool = Config.zero_gpu
except ImportError:
    IS_ZERO_GPU = False

IMAGE_SECONDS, TOKEN_SECONDS = 15, 0.1  # asked for the images, and for each token


def borrow_gpu(running: Callable) -> Callable:
    """Let a generator function with the arguments of `Models.answer`, and maybe others, run in a process with a GPU.

    The GPU is asked for as long as the longest answers may take. Arguments travel to that process, and answers back.
    """
    return spaces.GPU(duration=_seconds)(running) if IS_ZERO_GPU else running


def _seconds(name: str, images: object, prompts: Sequence[str], settings: dict[str, Any], *others: object) -> float:
    max_new_tokens = settings.get("max_new_tokens", 0)
    if not isinstance(max_new_tokens, (int, float)):
        max_new_tokens = 0  # refused with a sentence later
    return IMAGE_SECONDS + TOKEN_SECONDS * len(prompts) * max_new_tokens
