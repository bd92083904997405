"""The seven steps from pixels to words, with the numbers of one image and its answer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .gemma import GemmaModel
from .kv_cache import KeptCache
from .model import PaliGemma
from .processor import Processor
from .replay import Replayed, replay
from .sequence import TokenSequence
from .siglip import SiglipVisionModel, VisionEmbeddings

SHOWN_NUMBERS = 6  # of a tensor


@dataclass(frozen=True)
class WalkStep:
    """One of the seven steps from pixels to words, with the numbers of this very image.

    name: patches, embeddings, encoder, projector, prefix, prefill or decode.
    text: what happens, in a sentence or two, with sizes and numbers.
    shape: of what comes out; of the step `prefix` of the text's part alone.
    values: its first few numbers.
    file, line, function: where it happens, the file from the project's folder on.
    """

    name: str
    text: str
    shape: tuple[int, ...]
    values: tuple[float, ...]
    file: str
    line: int
    function: str


def walk_through(
    model: PaliGemma, processor: Processor, sequence: TokenSequence, kept: KeptCache
) -> tuple[WalkStep, ...]:
    """The seven steps of an answer about one image or several; of the encoder's steps only those of the first.

    Args:
        sequence: with at least one token of its answer.
        kept: the keys and values of all its positions but the last.
    """
    return *_image_steps(model, sequence), *_text_steps(model, processor, sequence, kept)


def _image_steps(model: PaliGemma, sequence: TokenSequence) -> Iterator[WalkStep]:
    vision, width = model.config.vision, model.config.text.hidden_size
    size, side = vision.patch_size, vision.patches_per_side
    pixel_values = sequence.pixel_values[0].to(model.device, model.dtype)
    patches = pixel_values[0].unfold(1, size, size).unfold(2, size, size).permute(1, 2, 0, 3, 4)
    embedded, encoded = model.vision_tower.embeddings(pixel_values)[0], model.vision_tower(pixel_values)[0]
    yield _step(
        "patches",
        f"The image becomes {vision.image_size} × {vision.image_size} pixels with values from -1 to 1, in the mean "
        f"{pixel_values.mean():.3f}, and is cut into {side} × {side} patches of {size} × {size}.",
        patches.flatten(2).flatten(0, 1),
        Processor.pixel_values,
    )
    yield _step(
        "embeddings",
        f"A matrix makes {vision.hidden_size} numbers of the {3 * size**2} of each patch, and a learned vector for its "
        f"place is added. The cosine of two patches is {_mean_cosine(embedded):.3f} in the mean.",
        embedded,
        VisionEmbeddings.forward,
    )
    yield _step(
        "encoder",
        f"In {vision.num_hidden_layers} layers of {vision.num_attention_heads} heads every patch attends to every patch. "
        f"Then the mean cosine of two patches is {_mean_cosine(encoded):.3f}.",
        encoded,
        SiglipVisionModel.forward,
    )
    yield _step(
        "projector",
        f"One matrix takes each patch from {vision.hidden_size} to {width} numbers, the width of the decoder, which reads "
        f"the {vision.num_patches} patches as if they were words.",
        model.multi_modal_projector["linear"](encoded),
        PaliGemma.image_features,
    )


def _text_steps(model: PaliGemma, processor: Processor, sequence: TokenSequence, kept: KeptCache) -> Iterator[WalkStep]:
    text, prefix, images = model.config.text, len(sequence.input_ids), len(sequence.pixel_values)
    from_images = images * model.config.vision.num_patches
    words = model.language_model.embed(torch.tensor(sequence.input_ids[from_images:], device=model.device))
    first, second = (replay(model, kept, sequence.ids[:end], prefix) for end in (prefix, prefix + 1))

    def likeliest(step: Replayed) -> str:
        name, probability = processor.token_text(step.lens_ids[-1]), step.lens_probabilities[-1]
        return f"The likeliest is “{name}”, with probability {probability:.3f}."

    yield _step(
        "prefix",
        f"{from_images} positions of {f'{images} images' if images > 1 else 'the image'} come first, then {len(words)} of "
        f"<bos>, the prompt and a line end, whose embeddings are multiplied by √{text.hidden_size} = "
        f"{text.hidden_size**0.5:.2f}: {prefix} positions in all.",
        words,
        GemmaModel.embed,
    )
    yield _step(
        "prefill",
        f"All {prefix} positions go through {text.num_hidden_layers} layers at once, each attending to all others. Their "
        f"keys and values, {prefix * text.cached_numbers * model.dtype.itemsize:,} bytes, stay in the cache. The last "
        f"position gives a number for each of {text.vocab_size:,} tokens. {likeliest(first)}",
        torch.from_numpy(first.logits),
        PaliGemma.prefill,
    )
    yield _step(
        "decode",
        f"The token “{processor.token_text(sequence.answer_ids[0])}” goes through the layers alone, attends to the {prefix} "
        f"positions in the cache and to itself, and gives the numbers of the next token. {likeliest(second)}",
        torch.from_numpy(second.logits),
        PaliGemma.decode,
    )


def _step(name: str, text: str, output: Tensor, function: Callable) -> WalkStep:
    file = Path(inspect.getsourcefile(function) or "").relative_to(Path(__file__).parents[1])
    line = inspect.getsourcelines(function)[1]
    values = tuple(output.flatten()[:SHOWN_NUMBERS].tolist())
    return WalkStep(name, text, tuple(output.shape), values, file.as_posix(), line, function.__qualname__)


def _mean_cosine(features: Tensor) -> float:
    """Of two different rows of float [N, width]."""
    unit, count = F.normalize(features.float(), dim=-1), len(features)
    return ((unit.sum(dim=0).square().sum() - count) / (count * (count - 1))).item()
