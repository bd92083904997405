"""Rows for teacher forcing, of images with a prompt (prefix) and the answer to it (suffix), and the file they come from.

A file has one JSON object a line, as big_vision, the Hub's PaliGemma notebooks and Roboflow write it; paths begin where the
file is, and several images may come before a prompt:

    {"image": "kitchen.jpg", "prefix": "detect cup", "suffix": "<loc0102><loc0341><loc0290><loc0488> cup"}
    {"image": ["left.jpg", "right.jpg"], "prefix": "answer en are these the same?", "suffix": "no"}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..config import PaliGemmaError
from ..images import open_image
from ..processor import Processor
from .losses import NO_LABEL

MAX_ERRORS = 20  # listed of a file


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, right-padded, and the image of each.

    An image of two patches with the prompt `ocr` and the answer `a cat`, beside one whose answer is shorter:

        input_ids         <image> <image> <bos> ocr \\n    a   cat        <image> <image> <bos> ocr \\n    owl   <pad>
        labels            -       -       -     -   a     cat <eos>      -       -       -     -   owl   <eos> -
        attention_mask    1       1       1     1   1     1   1          1       1       1     1   1     1     0
        prefix_lengths    5                                              5

    pixel_values: float32 [B, N, 3, H, W] of N images a row.
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


def collate(processor: Processor, examples: Sequence[tuple[Sequence[Image.Image], str, str]]) -> Batch:
    """Images, prompts and answers as a checkpoint expects them; each answer is ended by `<eos>`.

    Args:
        examples: images, as many in each row, prompt and answer.

    Raises:
        PaliGemmaError: an image, a prompt or an answer cannot be used.
    """
    config = processor.config
    rows = [token_ids(processor, len(images), prompt, answer) for images, prompt, answer in examples]
    lengths = [len(prefix) + len(answer) for prefix, answer in rows]
    input_ids = torch.full((len(examples), max(lengths)), config.pad_token_id)
    labels = torch.full_like(input_ids, NO_LABEL)
    for row, ((prefix, answer), length) in enumerate(zip(rows, lengths)):
        input_ids[row, :length] = torch.tensor(prefix + answer)
        labels[row, len(prefix) - 1 : length] = torch.tensor([*answer, config.eos_token_ids[0]])
    return Batch(
        pixel_values=torch.stack([torch.cat(list(map(processor.pixel_values, images))) for images, _, _ in examples]),
        input_ids=input_ids,
        labels=labels,
        attention_mask=torch.arange(max(lengths)) < torch.tensor(lengths)[:, None],
        prefix_lengths=torch.tensor([len(prefix) for prefix, _ in rows]),
    )


def token_ids(processor: Processor, images: int, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Of the placeholders with the prompt, and of the answer; raises PaliGemmaError if they cannot be used."""
    prefix, suffix = processor.input_ids(prompt, images), _answer_ids(processor, answer)
    length, fitting = len(prefix) + len(suffix), processor.config.text.max_position_embeddings
    if length > fitting:
        raise PaliGemmaError(
            f"The answer to “{prompt}” is too long: {length} tokens with image and prompt, but {fitting} fit; please "
            "shorten it."
        )
    return prefix, suffix


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


@dataclass(frozen=True)
class Example:
    """A row of a file of examples: the paths of its images, the prompt and the answer."""

    images: tuple[Path, ...]
    prompt: str
    answer: str

    def read(self) -> tuple[list[Image.Image], str, str]:
        """With the images themselves, as `collate` takes it."""
        return [open_image(path) for path in self.images], self.prompt, self.answer


def read_examples(path: Path, processor: Processor) -> list[Example]:
    """Read a file of examples, and check each: its images must open, prompt and answer must fit.

    Raises:
        PaliGemmaError: one sentence for each row that cannot be used, with its line.
    """

    def read(row: Mapping[str, Any], folder: Path) -> Example:
        example = Example(images_of(row, folder), text_of(row, "prefix"), text_of(row, "suffix"))
        token_ids(processor, len(example.images), example.prompt, example.answer)
        return example

    return read_rows(path, read)


RowT = TypeVar("RowT")


def read_rows(path: Path, read: Callable[[Mapping[str, Any], Path], RowT]) -> list[RowT]:
    """What `read` makes of each JSON object of a file, and of the folder that its paths begin in; empty lines are left out.

    Raises:
        PaliGemmaError: the sentences that `read` raised, each with its line; or the file cannot be read, or is empty.
    """
    rows, errors = [], []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PaliGemmaError(
            f"{path} cannot be read ({error}); please give a file with a JSON object a line."
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(read(_json_object(line), path.parent))
        except PaliGemmaError as error:
            errors.append(f"{path}, line {number}: {error}")
    if errors:
        more = [f"… and {len(errors) - MAX_ERRORS} more rows."] if len(errors) > MAX_ERRORS else []
        raise PaliGemmaError("\n".join(errors[:MAX_ERRORS] + more))
    if not rows:
        raise PaliGemmaError(f"{path} has no rows; please write one JSON object a line.")
    return rows


def text_of(row: Mapping[str, Any], name: str) -> str:
    """The text under a name; raises PaliGemmaError if there is none."""
    if name not in row:
        raise PaliGemmaError(f"There is no “{name}”; please give it as text.")
    if not isinstance(row[name], str):
        raise PaliGemmaError(f"“{name}” is {json.dumps(row[name])[:40]}; please give text.")
    return row[name]


def images_of(row: Mapping[str, Any], folder: Path) -> tuple[Path, ...]:
    """The paths under `image`, one or several, of files that open; raises PaliGemmaError if one does not."""
    names = row.get("image")
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise PaliGemmaError("“image” is no path, nor a list of them; please give the path of an image file.")
    paths = tuple(folder / name for name in names)
    for image in paths:
        open_image(image)  # whole, since a file that is cut short opens
    return paths


def _json_object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PaliGemmaError(f"This is not JSON ({error}); please write one object a line.") from error
    if not isinstance(row, dict):
        raise PaliGemmaError("This is no JSON object; please write one a line: {…}")
    return row


class ExampleSteps(Dataset[list[tuple[Batch, float]]]):
    """The batches of each step, with the share that each has of the step's answer tokens.

    Each example is seen once before any is seen again, in an order that depends on the seed alone.

    Args:
        rows_a_step: how many examples a step learns from.
        rows_at_once: how many of them go through the model at once.
    """

    def __init__(
        self, processor: Processor, examples: Sequence[Example], rows_a_step: int, rows_at_once: int, seed: int
    ):
        self.processor, self.examples = processor, examples
        self.rows_a_step, self.rows_at_once, self.seed = rows_a_step, rows_at_once, seed

    def __getitem__(self, step: int) -> list[tuple[Batch, float]]:
        rows = range(step * self.rows_a_step, (step + 1) * self.rows_a_step)
        orders = {epoch: self._order(epoch) for epoch in {row // len(self.examples) for row in rows}}
        chosen = [self.examples[orders[row // len(self.examples)][row % len(self.examples)]] for row in rows]
        return with_shares(list(batches(self.processor, chosen, self.rows_at_once)))

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))


def hold_back(rows: Sequence[RowT], share: float, seed: int) -> tuple[list[RowT], list[RowT]]:
    """The rows to learn from, and a share of them to measure on, which the seed chooses.

    Raises:
        PaliGemmaError: the share leaves no row on one of the two sides.
    """
    count = round(share * len(rows)) if 0 < share < 1 else 0
    if not 0 < count < len(rows):
        raise PaliGemmaError(
            f"A share of {share} of {len(rows)} rows cannot be held back; please give one between 0 and 1 that leaves rows "
            "on both sides."
        )
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[row] for row in order[count:]], [rows[row] for row in order[:count]]


def batches(processor: Processor, examples: Sequence[Example], rows_at_once: int) -> Iterator[Batch]:
    """All examples, so many at once; only those with as many images go together."""
    by_images = sorted(examples, key=lambda example: len(example.images))
    for _, group in groupby(by_images, key=lambda example: len(example.images)):
        alike = list(group)
        for first in range(0, len(alike), rows_at_once):
            yield collate(processor, [example.read() for example in alike[first : first + rows_at_once]])


def with_shares(parts: Sequence[Batch]) -> list[tuple[Batch, float]]:
    """Batches with the share that each has of all answer tokens: what its mean loss counts for."""
    counts = [int((batch.labels != NO_LABEL).sum()) for batch in parts]
    return [(batch, count / sum(counts)) for batch, count in zip(parts, counts)]
