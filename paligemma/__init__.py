"""PaliGemma in plain PyTorch: a picture and a prompt in, an answer out, token by token.

import paligemma

vlm = paligemma.load()
print(vlm.generate("picture.png", "caption en"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .config import PaliGemmaError

if TYPE_CHECKING:
    from .checkpoints import load
    from .generation import Token, VisionLanguageModel

__all__ = ["PaliGemmaError", "Token", "VisionLanguageModel", "load"]


def __getattr__(name: str) -> object:
    """Import what needs torch, which takes seconds, when it is first asked for: a page can be served before."""
    if name == "load":
        from .checkpoints import load as value
    elif name in ("Token", "VisionLanguageModel"):
        from . import generation

        value = getattr(generation, name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value
