"""PaliGemma in plain PyTorch: a picture and a prompt in, an answer out, token by token.

import paligemma

vlm = paligemma.load()
print(vlm.generate("picture.png", "caption en"))
"""

from .checkpoints import load
from .config import PaliGemmaError
from .generation import Token, VisionLanguageModel

__all__ = ["PaliGemmaError", "Token", "VisionLanguageModel", "load"]
