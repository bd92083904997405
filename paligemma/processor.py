"""Between people and tensors: picture to pixel values, prompt to token ids, token ids to text."""

from __future__ import annotations

import os

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders
from torch import Tensor

from .config import PaliGemmaConfig, PaliGemmaError
from .images import to_rgb


class Processor:
    """Prepares pictures and prompts as a checkpoint expects them, and reads its tokens back."""

    def __init__(self, config: PaliGemmaConfig, tokenizer: Tokenizer):
        self.config = config
        self.tokenizer = tokenizer
        special = (config.image_token_id, config.bos_token_id, config.pad_token_id, *config.eos_token_ids)
        self._control_ids = frozenset(special)
        self._control_tokens = tuple(filter(None, map(tokenizer.id_to_token, special)))
        self._bos = tokenizer.id_to_token(config.bos_token_id) or ""

    @classmethod
    def from_file(cls, config: PaliGemmaConfig, path: str | os.PathLike) -> Processor:
        """Read a `tokenizer.json`; raises PaliGemmaError if it is missing or damaged."""
        if not os.path.exists(path):
            raise PaliGemmaError(f"{path} is missing; a checkpoint needs the tokenizer.json of its model.")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises the bare class
            raise PaliGemmaError(f"{path} cannot be read as a tokenizer: {error}.") from error
        return cls(config, tokenizer)

    def pixel_values(self, image: Image.Image) -> Tensor:
        """Any Pillow picture to float32 [1, 3, image_size, image_size] in -1 to 1 (bicubic resize to the square)."""
        size = self.config.vision.image_size
        return self.normalise(to_rgb(image).resize((size, size), Image.Resampling.BICUBIC))

    def normalise(self, image: Image.Image) -> Tensor:
        """RGB picture to float32 [1, 3, height, width], 0-255 mapped to -1 to 1, at the size it has."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        return ((pixels.float() / 255.0 - 0.5) / 0.5).contiguous()

    def input_ids(self, prompt: str) -> list[int]:
        """Image placeholders, `<bos>`, the prompt and a line end, as the checkpoints were trained.

        Raises:
            PaliGemmaError: the prompt is empty, holds a reserved token or is longer than the context.
        """
        if not isinstance(prompt, str):
            raise PaliGemmaError(f"The prompt is of type {type(prompt).__name__}; please give text.")
        if not prompt.strip():
            raise PaliGemmaError("The prompt is empty; please ask something, for example: caption en")
        for token in self._control_tokens:
            if token in prompt:
                raise PaliGemmaError(f"The prompt contains the reserved token {token}; please remove it.")
        try:
            text = self.tokenizer.encode(f"{self._bos}{prompt}\n", add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise PaliGemmaError("The prompt has characters that are not valid Unicode; please retype it.") from error
        placeholders = [self.config.image_token_id] * self.config.vision.num_patches
        room = self.config.text.max_position_embeddings - len(placeholders) - 1  # one for the first answer token
        if len(text) > room:
            raise PaliGemmaError(f"The prompt has {len(text)} tokens, but {room} fit; please shorten it.")
        return placeholders + text

    def text_stream(self) -> TextStream:
        """A new reader of one answer's tokens."""
        return TextStream(self.tokenizer, self._control_ids)


class TextStream:
    """Token ids in, text out, piece by piece, so that the joined pieces are the decoded whole.

    A character of several bytes comes out with its last token, and a word keeps the space before it. Bytes that make
    no valid text come out as replacement characters, once the token after them is there; bytes at the very end that
    only begin a character stay inside.
    """

    def __init__(self, tokenizer: Tokenizer, control_ids: frozenset[int]):
        self._tokenizer = tokenizer
        self._control_ids = control_ids
        self._stream = decoders.DecodeStream(skip_special_tokens=False)
        self._held: list[int] = []  # tokens whose text has not come out yet

    def push(self, token_id: int) -> str:
        """The text that this token completes: empty for a control token or in the middle of a character."""
        if token_id in self._control_ids:
            return ""
        self._held.append(token_id)
        try:
            text = self._stream.step(self._tokenizer, token_id) or ""
        except Exception:
            # The decoder turns a run of bytes into text all or none: invalid bytes change what valid ones before them
            # have become already, which the library reports as the bare class. What is out stays; go on from there.
            text = self._tokenizer.decode(self._held, skip_special_tokens=False)
            self._stream = decoders.DecodeStream(skip_special_tokens=False)
        if text:
            self._held.clear()
        return text
