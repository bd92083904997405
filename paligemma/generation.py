"""`VisionLanguageModel`, a loaded checkpoint, and `Answer`, what it answers: the public face of the engine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypedDict, Unpack

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .config import PaliGemmaConfig, PaliGemmaError, is_number, shorten
from .engine import Engine
from .images import open_image
from .mask_decoder import MaskDecoder
from .model import PaliGemma
from .processor import Processor, TextStream
from .sampling import Sampler
from .sequence import Events, TokenSequence, read

MAX_SEED = 2**63
ImageSource = Image.Image | str | os.PathLike
Images = ImageSource | Sequence[ImageSource]


@dataclass(frozen=True)
class Token:
    """One generated token.

    id: its number in the vocabulary.
    text: what it adds to the answer; empty in the middle of a character of several bytes. A character that is still
        unfinished when the answer ends is left out.
    probability: the model's own, before temperature and filters.
    """

    id: int
    text: str
    probability: float


class Settings(TypedDict, total=False):
    """The settings of `VisionLanguageModel.stream`."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int | None


class Answer:
    """An answer while it is made: an iterator of its tokens. Closing it ends the work within one token.

    The work begins when the first token is asked for, and waits for its reader when it is some tokens ahead.
    """

    def __init__(self, engine: Engine, sequence: TokenSequence, text: TextStream):
        self._engine, self._sequence, self._text = engine, sequence, text
        self._events: Iterator[tuple[TokenSequence, tuple[int, float] | None]] | None = None

    def __iter__(self) -> Answer:
        return self

    def __next__(self) -> Token:
        if self._events is None:
            self._engine.submit(self._sequence)
            self._events = read(self._sequence.events, [self._sequence])
        _, event = next(self._events)
        if event is None:
            raise StopIteration
        return _token(event, self._text)

    def close(self) -> None:
        """Free its place; there are no more tokens."""
        self._sequence.close()
        self._events = iter(())

    def __del__(self) -> None:
        self.close()


class AnswerBatch:
    """Answers that are made together: an iterator of each token with its prompt's number, and of None where one ends.

    Closing it, from whatever thread, ends the work within one token; a thread that waits for the next one has no more.
    """

    def __init__(self, engine: Engine, sequences: Sequence[TokenSequence], events: Events, processor: Processor):
        self._engine, self._sequences = engine, sequences
        self._texts = {sequence: (number, processor.text_stream()) for number, sequence in enumerate(sequences)}
        self._events = read(events, sequences)
        self._is_submitted = False

    def __iter__(self) -> AnswerBatch:
        return self

    def __next__(self) -> tuple[int, Token | None]:
        if not self._is_submitted:
            self._is_submitted = True
            for sequence in self._sequences:
                self._engine.submit(sequence)
        sequence, event = next(self._events)
        number, text = self._texts[sequence]
        return number, None if event is None else _token(event, text)

    def close(self) -> None:
        """Free their places; there are no more tokens."""
        for sequence in self._sequences:
            sequence.close()

    def __del__(self) -> None:
        self.close()


class VisionLanguageModel:
    """A loaded checkpoint, which answers prompts about images: `stream` and `generate`."""

    def __init__(self, model: PaliGemma, processor: Processor, mask_decoder: MaskDecoder | None = None):
        self.model = model.eval()
        self.processor = processor
        self.mask_decoder = mask_decoder
        self.engine = Engine(model)

    @property
    def config(self) -> PaliGemmaConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations."""
        return self.model.dtype

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the weights: int8, or that of the activations."""
        return self.model.weight_dtype

    def stream(
        self,
        image: Images,
        prompt: str,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Answer:
        """Answer token by token; closing the answer ends the work within one token.

        Args:
            image: a Pillow image, or the path of an image file; or a list of them, for checkpoints that were trained on
                several (NLVR2, videos): the features of all come before the prompt.
            prompt: in the syntax that the checkpoint was trained on, such as `caption en`.
            max_new_tokens: the answer's longest length, if `<eos>` does not end it earlier.
            temperature, top_k, top_p: see `Sampler`; the defaults are greedy.
            seed: the same one gives the same text, whoever else is being served; None draws a new one.

        Raises:
            PaliGemmaError: at the call, not at the first token, if an argument cannot be used.
        """
        sequence = self._sequence(image, {}, SimpleQueue(), prompt, max_new_tokens, temperature, top_k, top_p, seed)
        return Answer(self.engine, sequence, self.processor.text_stream())

    def stream_batch(
        self, images: Sequence[Images], prompts: Sequence[str], **settings: Unpack[Settings]
    ) -> AnswerBatch:
        """Answer prompts together: each token comes with its prompt's number, and None where an answer ends.

        Each prompt has its image, or a list of images. All arguments are checked at the call.

        Raises:
            PaliGemmaError: as `stream`, or there are not as many images as prompts.
        """
        if len(images) != len(prompts):
            raise PaliGemmaError(
                f"There are {len(images)} images for {len(prompts)} prompts; please give one for each."
            )
        events: Events = SimpleQueue()
        seen: dict[int, Tensor] = {}
        sequences = [self._sequence(image, seen, events, prompt, **settings) for image, prompt in zip(images, prompts)]
        return AnswerBatch(self.engine, sequences, events, self.processor)

    def generate(self, image: Images, prompt: str, **settings: Unpack[Settings]) -> str:
        """The whole answer at once; arguments and errors as for `stream`."""
        return "".join(token.text for token in self.stream(image, prompt, **settings))

    def generate_batch(
        self, images: Sequence[Images], prompts: Sequence[str], **settings: Unpack[Settings]
    ) -> list[str]:
        """The whole answers of prompts that are answered together; arguments and errors as for `stream_batch`."""
        texts = [""] * len(prompts)
        for number, token in self.stream_batch(images, prompts, **settings):
            texts[number] += token.text if token else ""
        return texts

    def figures(self) -> dict[str, int]:
        """What the engine does at present, see `Engine.figures`."""
        return self.engine.figures()

    @torch.inference_mode()
    def decode_mask(self, codes: Sequence[int]) -> np.ndarray | None:
        """The mask that 16 `<seg>` codes stand for, see `annotations.place_mask`.

        Returns:
            float32 [64, 64], above zero where the object is; None if the checkpoint came without a mask decoder.
        """
        if self.mask_decoder is None:
            return None
        return self.mask_decoder(torch.tensor([list(codes)]))[0].numpy()

    def _sequence(
        self,
        image: Images,
        seen: dict[int, Tensor],
        events: Events,
        prompt: str,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> TokenSequence:
        """What the engine takes, from the arguments of `stream`, which are checked; `seen` holds images' pixel values."""
        sampler = Sampler(temperature, top_k, top_p)
        images = [image] if isinstance(image, str) or not isinstance(image, Sequence) else list(image)
        input_ids = self.processor.input_ids(prompt, len(images))
        longest = self.config.text.max_position_embeddings - len(input_ids)
        if not is_number(max_new_tokens, whole=True) or not 1 <= max_new_tokens <= longest:
            raise PaliGemmaError(
                f"max_new_tokens is {shorten(max_new_tokens)}; after this prompt please give a whole number "
                f"from 1 to {longest}."
            )
        generator = self._generator(seed)
        for one in images:
            if id(one) not in seen:
                seen[id(one)] = self._pixel_values(one)
        pixel_values = [seen[id(one)] for one in images]
        return TokenSequence(pixel_values, input_ids, int(max_new_tokens), sampler, generator, events)

    def _pixel_values(self, image: ImageSource) -> Tensor:
        if isinstance(image, (str, os.PathLike)):
            image = open_image(image)
        if not isinstance(image, Image.Image):
            raise PaliGemmaError(
                f"The picture is of type {type(image).__name__}; please give a Pillow picture or a path."
            )
        return self.processor.pixel_values(image)

    def _generator(self, seed: int | None) -> torch.Generator:
        generator = torch.Generator(self.device)
        if seed is None:
            generator.seed()
            return generator
        if not is_number(seed, whole=True) or not 0 <= seed < MAX_SEED:
            raise PaliGemmaError(
                f"seed is {shorten(seed)}; please give none or a whole number from 0 to {MAX_SEED - 1}."
            )
        return generator.manual_seed(int(seed))


def _token(chosen: tuple[int, float], text: TextStream) -> Token:
    token_id, probability = chosen
    return Token(token_id, text.push(token_id), probability)
