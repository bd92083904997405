"""Image to pixel values, prompt to token ids, token ids to text."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders
from torch import Tensor

from .config import LOC_TOKENS, SEG_TOKENS, PaliGemmaConfig, PaliGemmaError
from .images import to_rgb

IMAGE_TOKEN, BOS_TOKEN, EOS_TOKEN = "<image>", "<bos>", "<eos>"


class Processor:
    """Prepares images and prompts as a checkpoint expects them, and reads its tokens back.

    config: that of the checkpoint, with the image token that the tokenizer has.
    """

    def __init__(self, config: PaliGemmaConfig, tokenizer: Tokenizer):
        self.config = config
        self.tokenizer = tokenizer
        special = (config.image_token_id, config.bos_token_id, config.pad_token_id, *config.eos_token_ids)
        self._control_ids = frozenset(special)
        self._control_tokens = tuple(filter(None, map(tokenizer.id_to_token, special)))
        self._bos = tokenizer.id_to_token(config.bos_token_id) or ""
        self._longest_token = max(map(len, tokenizer.get_vocab()))

    @classmethod
    def from_file(cls, config: PaliGemmaConfig, path: str | os.PathLike) -> Processor:
        """Read a `tokenizer.json` and compare it with the config, whose image token it overrules.

        Raises:
            PaliGemmaError: the file is missing, damaged, or of another model than the config.
        """
        if not os.path.exists(path):
            raise PaliGemmaError(f"{path} is missing; a checkpoint needs the tokenizer.json of its model.")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises the bare class
            raise PaliGemmaError(f"{path} cannot be read as a tokenizer: {error}.") from error
        # Files keep both as whoever saved them last had set them.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        vocabulary = tokenizer.get_vocab()
        if problem := _disagreement(config, vocabulary):
            raise PaliGemmaError(f"{path} {problem}; please take both files from the same PaliGemma checkpoint.")
        # Official files list few of these as tokens of their own; the others would fall apart in a prompt.
        listed = tokenizer.get_added_tokens_decoder()
        tokenizer.add_special_tokens([IMAGE_TOKEN, BOS_TOKEN, EOS_TOKEN])
        tokenizer.add_tokens([token for token in (*LOC_TOKENS, *SEG_TOKENS) if vocabulary[token] not in listed])
        config = replace(config, image_token_id=_image_token_id(vocabulary))
        return cls(config, tokenizer)

    def pixel_values(self, image: Image.Image) -> Tensor:
        """Any Pillow image to float32 [1, 3, image_size, image_size] in -1 to 1 (bicubic resize to the square)."""
        size = self.config.vision.image_size
        resized = to_rgb(image).resize((size, size), Image.Resampling.BICUBIC)
        # By NumPy, since this runs in threads beside the engine's, see `in_own_thread`.
        pixels = np.array(resized, dtype=np.float32).transpose(2, 0, 1)[None]
        return torch.from_numpy(np.ascontiguousarray((pixels / 255 - 0.5) / 0.5))

    def input_ids(self, prompt: str, images: int = 1, longest: int | None = None) -> list[int]:
        """The placeholders of all images, `<bos>`, the prompt and a line end, as the checkpoints were trained.

        An `<image>` for each at the prompt's start, as model cards write it, stands for placeholders and is left out.

        Args:
            longest: how many tokens the prompt may have, with `<bos>` and line end, where that is less than fits.

        Raises:
            PaliGemmaError: there is no image, or the images fill the context; or the prompt is empty, holds a token that
                it must not, or is longer than what is left.
        """
        if not isinstance(prompt, str):
            raise PaliGemmaError(f"The prompt is of type {type(prompt).__name__}; please give text.")
        patches, context = self.config.vision.num_patches, self.config.text.max_position_embeddings
        capacity = context - images * patches - 1  # one for the first answer token
        if images < 1:
            raise PaliGemmaError("There is no picture; please give one or more.")
        if images > 1 and capacity < 3:  # `<bos>`, a token, a line end
            fitting = max(1, (context - 4) // patches)
            raise PaliGemmaError(f"There are {images} pictures, but {fitting} fit; please give fewer.")
        if longest is not None:
            capacity = min(capacity, longest)
        if len(prompt) > capacity * self._longest_token:  # before all work that takes time in proportion to it
            fitting = capacity * self._longest_token
            raise PaliGemmaError(f"The prompt has {len(prompt)} characters, but {fitting} fit; please shorten it.")
        for _ in range(images):
            if prompt.lstrip().startswith(IMAGE_TOKEN):
                prompt = prompt.lstrip().removeprefix(IMAGE_TOKEN).lstrip()
        if not prompt.strip():
            raise PaliGemmaError("The prompt is empty; please ask something, for example: caption en")
        for token in self._control_tokens:
            if token in prompt:
                raise PaliGemmaError(f"The prompt contains the reserved token {token}; please remove it.")
        try:
            text = self.tokenizer.encode(f"{self._bos}{prompt}\n", add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise PaliGemmaError("The prompt has characters that are not valid Unicode; please retype it.") from error
        if len(text) > capacity:
            raise PaliGemmaError(f"The prompt has {len(text)} tokens, but {capacity} fit; please shorten it.")
        if max(text) >= self.config.text.vocab_size:
            unknown = self.tokenizer.id_to_token(max(text))
            raise PaliGemmaError(
                f"The prompt contains {unknown}, which this checkpoint does not know; please remove it."
            )
        return [self.config.image_token_id] * (images * patches) + text

    def token_text(self, token_id: int) -> str:
        """A token as the vocabulary writes it, with spaces for its `▁`; empty for an id without a token."""
        return (self.tokenizer.id_to_token(token_id) or "").replace("▁", " ")

    def text_stream(self) -> TextStream:
        """A new reader of one answer's tokens."""
        return TextStream(self.tokenizer, self._control_ids)


def _disagreement(config: PaliGemmaConfig, vocabulary: dict[str, int]) -> str | None:
    """What is wrong with a tokenizer's ids for this config, as the end of a sentence."""
    needed = (BOS_TOKEN, EOS_TOKEN, *LOC_TOKENS, *SEG_TOKENS)
    if missing := [token for token in needed if token not in vocabulary]:
        return f"has no token {missing[0]}"
    if vocabulary[BOS_TOKEN] != config.bos_token_id:
        return f"numbers {BOS_TOKEN} {vocabulary[BOS_TOKEN]}, but bos_token_id in config.json is {config.bos_token_id}"
    last, rows = max(needed, key=lambda token: vocabulary[token]), config.text.vocab_size
    if vocabulary[last] >= rows:
        return f"numbers {last} {vocabulary[last]}, but vocab_size in config.json is {rows}"
    if _image_token_id(vocabulary) > rows:  # the placeholder itself is never embedded
        return f"numbers {IMAGE_TOKEN} {_image_token_id(vocabulary)}, but vocab_size in config.json is {rows}"
    return None


def _image_token_id(vocabulary: dict[str, int]) -> int:
    """The id of `<image>`: the next free one where the tokenizer does not have it."""
    return vocabulary.get(IMAGE_TOKEN, len(vocabulary))


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
