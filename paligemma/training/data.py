"""Rows for teacher forcing, of images with a prompt (prefix) and the answer to it (suffix)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ..config import PaliGemmaError
from ..processor import Processor
from .losses import NO_LABEL


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, right-padded, and the image of each.

    An image of two patches with the prompt `ocr` and the answer `a cat`, beside one whose answer is shorter:

        input_ids         <image> <image> <bos> ocr \\n    a   cat        <image> <image> <bos> ocr \\n    owl   <pad>
        labels            -       -       -     -   a     cat <eos>      -       -       -     -   owl   <eos> -
        attention_mask    1       1       1     1   1     1   1          1       1       1     1   1     1     0
        prefix_lengths    5                                              5

    pixel_values: float32 [B, 3, H, W].
    input_ids: int64 [B, T].
    labels: int64 [B, T], the next token at each position, `NO_LABEL` where it is not part of the answer.
    attention_mask: bool [B, T], False at padding.
    prefix_lengths: int64 [B], the number of positions before the answer: they attend to each other both ways.
    """

    pixel_values: Tensor
    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    prefix_lengths: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


def collate(processor: Processor, examples: Sequence[tuple[Image.Image, str, str]]) -> Batch:
    """Images, prompts and answers as a checkpoint expects them; each answer is ended by `<eos>`.

    Args:
        examples: image, prompt and answer of each row.

    Raises:
        PaliGemmaError: an image, a prompt or an answer cannot be used.
    """
    config = processor.config
    prefixes = [processor.input_ids(prompt) for _, prompt, _ in examples]
    answers = [_answer_ids(processor, answer) for _, _, answer in examples]
    lengths = [len(prefix) + len(answer) for prefix, answer in zip(prefixes, answers)]
    if max(lengths) > config.text.max_position_embeddings:
        prompt = examples[lengths.index(max(lengths))][1]
        raise PaliGemmaError(
            f"The answer to “{prompt}” is too long: {max(lengths)} tokens with image and prompt, but "
            f"{config.text.max_position_embeddings} fit; please shorten it."
        )
    input_ids = torch.full((len(examples), max(lengths)), config.pad_token_id)
    labels = torch.full_like(input_ids, NO_LABEL)
    for row, (prefix, answer, length) in enumerate(zip(prefixes, answers, lengths)):
        input_ids[row, :length] = torch.tensor(prefix + answer)
        labels[row, len(prefix) - 1 : length] = torch.tensor([*answer, config.eos_token_ids[0]])
    return Batch(
        pixel_values=torch.cat([processor.pixel_values(image) for image, _, _ in examples]),
        input_ids=input_ids,
        labels=labels,
        attention_mask=torch.arange(max(lengths)) < torch.tensor(lengths)[:, None],
        prefix_lengths=torch.tensor([len(prefix) for prefix in prefixes]),
    )


def _answer_ids(processor: Processor, answer: str) -> list[int]:
    config = processor.config
    try:
        ids = processor.tokenizer.encode(answer, add_special_tokens=False).ids
    except (TypeError, UnicodeEncodeError) as error:
        raise PaliGemmaError(f"The answer {answer!r} is not valid text; please correct it.") from error
    reserved = {config.image_token_id, config.bos_token_id, config.pad_token_id, *config.eos_token_ids}
    for token_id in ids:
        if token_id in reserved or token_id >= config.text.vocab_size:
            token = processor.tokenizer.id_to_token(token_id)
            raise PaliGemmaError(f"The answer “{answer}” contains {token}, which it must not; please remove it.")
    return ids
