"""`VisionLanguageModel`, a loaded checkpoint, and `Answer`, what it answers: the public face of the engine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TypedDict, Unpack

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .config import PaliGemmaConfig, PaliGemmaError, is_number, shorten
from .engine import Engine
from .images import open_image
from .inspection import EncoderInspection, Inspection, Inspector, WalkStep
from .mask_decoder import MaskDecoder
from .model import PaliGemma
from .processor import Processor, TextStream
from .replay import encoder_attention
from .sampling import Sampler
from .sequence import ChosenToken, Events, TokenSequence, read

MAX_SEED = 2**63
ImageSource = Image.Image | str | os.PathLike
Images = ImageSource | Sequence[ImageSource]


def as_list(images: Images) -> list[ImageSource]:
    """One image or several, as a list; a text is a path."""
    return [images] if isinstance(images, str) or not isinstance(images, Sequence) else list(images)


@dataclass(frozen=True)
class Token:
    """One generated token.

    id: its number in the vocabulary.
    text: what it adds to the answer; empty in the middle of a character of several bytes. A character that is still
        unfinished when the answer ends is left out.
    probability: the model's own, before temperature and filters.
    seconds: from when the answer was asked for until this was computed, which may be long before it is read.
    """

    id: int
    text: str
    probability: float
    seconds: float = field(default=0.0, compare=False)


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
    Of the tokens that were read so far one can see inside (`inspect`), and go on from others (`branch`). That is cheap
    once the answer is over or closed, and its keys and values are among those of the latest answers; else they are
    computed again.

    Args:
        sequence: with the tokens that are there already, of which the last is the first to be read if its `probability`
            is given.
    """

    def __init__(self, vlm: VisionLanguageModel, sequence: TokenSequence, probability: float | None = None):
        self._vlm, self._sequence = vlm, sequence
        self._text, self._given = vlm.processor.text_stream(), None
        self._count = len(sequence.answer_ids)  # of the tokens that were read, since more may be computed
        pieces = [self._text.push(token_id) for token_id in sequence.answer_ids]
        if probability is not None:
            self._given, self._count = Token(sequence.answer_ids[-1], pieces[-1], probability), self._count - 1
        self._events: Iterator[tuple[TokenSequence, ChosenToken | None]] | None = None
        if sequence.max_new_tokens == 0:
            self._events = iter(())

    def __iter__(self) -> Answer:
        return self

    def __next__(self) -> Token:
        given, self._given = self._given, None
        if given is None:
            if self._events is None:
                self._vlm.engine.submit(self._sequence)
                self._events = read(self._sequence.events, [self._sequence])
            _, event = next(self._events)
            if event is None:
                raise StopIteration
            given = _token(event, self._text)
        self._count += 1
        return given

    @property
    def token_ids(self) -> list[int]:
        """The ids of all tokens so far; `VisionLanguageModel.resume` makes the same answer of image, prompt and these."""
        return self._sequence.answer_ids[: self._count]

    def inspect(self, index: int) -> Inspection:
        """What the step of a token was like inside, by its number from 0.

        Raises:
            PaliGemmaError: there is no such token.
        """
        return self._inspector().inspect(index)

    def branch(self, index: int, token_id: int, **settings: Unpack[Settings]) -> Answer:
        """The answer that goes on from another token at `index`: an iterator of that token and those after it.

        An end token ends it there.

        Args:
            settings: as for `VisionLanguageModel.stream`; max_new_tokens counts the tokens before as well.

        Raises:
            PaliGemmaError: there is no such token, or a setting cannot be used.
        """
        probability = self._inspector().probability(index, token_id)
        before = self.token_ids[: int(index)]
        if token_id in self._vlm.config.eos_token_ids:
            return Answer(self._vlm, self._sequence.again(before))
        ids, old = [*before, int(token_id)], self._sequence
        sequence = self._vlm.make_sequence(old.pixel_values, old.input_ids, SimpleQueue(), ids, **settings)
        return Answer(self._vlm, sequence, probability)

    def seconds_without_cache(self) -> list[float]:
        """How long the decoder takes for each token without keys and values from before; measured now.

        Raises:
            PaliGemmaError: the answer has no token.
        """
        return self._inspector().seconds_without_cache()

    def walk_through(self) -> tuple[WalkStep, ...]:
        """The seven steps from pixels to words, with this answer's own numbers.

        Raises:
            PaliGemmaError: the answer has no token.
        """
        return self._inspector().walk_through()

    def close(self) -> None:
        """Free its place; there are no more tokens."""
        self._sequence.close()
        self._events = iter(())

    def __del__(self) -> None:
        self.close()

    def _inspector(self) -> Inspector:
        return Inspector(self._vlm.engine, self._vlm.processor, self._sequence.again(self.token_ids))


class AnswerBatch:
    """Answers that are made together: an iterator of each token with its prompt's number, and of None where one ends.

    Closing it, from whatever thread, ends the work within one token; a thread that waits for the next one has no more.
    """

    def __init__(self, vlm: VisionLanguageModel, sequences: Sequence[TokenSequence], events: Events):
        self._vlm, self._sequences = vlm, sequences
        self._numbers = {sequence: number for number, sequence in enumerate(sequences)}
        self._texts = [vlm.processor.text_stream() for _ in sequences]
        self._counts = [0] * len(sequences)
        self._queue, self._events = events, read(events, sequences)
        self._is_submitted = False

    def __iter__(self) -> AnswerBatch:
        return self

    def __next__(self) -> tuple[int, Token | None]:
        if not self._is_submitted:
            self._is_submitted = True
            for sequence in self._sequences:
                self._vlm.engine.submit(sequence)
        sequence, event = next(self._events)
        number = self._numbers[sequence]
        self._counts[number] += event is not None
        return number, None if event is None else _token(event, self._texts[number])

    def take(self) -> list[tuple[int, Token | None]]:
        """The next one, and all others that are there already; none at the end."""
        taken = []
        try:
            for one in self:
                taken.append(one)
                if self._queue.empty():
                    break
        except Exception as error:
            if not taken:
                raise
            self._events = _failed(error)  # what came before it is not lost
        return taken

    def answer(self, number: int) -> Answer:
        """The answer to a prompt as far as it was read, to see inside it or to go on from it; it has no more tokens."""
        sequence = self._sequences[number]
        return Answer(self._vlm, sequence.again(sequence.answer_ids[: self._counts[number]]))

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
        """The dtype of the weights: int8, int4, or that of the activations."""
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
            seed: the same one gives the same text, whoever else is being served (but for int4, see `Engine`); None draws a
                new one.

        Raises:
            PaliGemmaError: at the call, not at the first token, if an argument cannot be used.
        """
        settings = Settings(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        sequence = self._sequence(image, {}, SimpleQueue(), prompt, **settings)
        return Answer(self, sequence)

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
        return AnswerBatch(self, sequences, events)

    def resume(self, image: Images, prompt: str, token_ids: Sequence[int], **settings: Unpack[Settings]) -> Answer:
        """An answer of which some tokens are there already, to see inside it, branch off, or read those that come next.

        Nothing is computed before it is asked for, and then nothing that is still there from when the answer was made.

        Args:
            token_ids: such as those of `Answer.token_ids`.
            settings: as for `stream`; max_new_tokens counts these tokens as well.

        Raises:
            PaliGemmaError: an argument cannot be used.
        """
        return Answer(self, self._sequence(image, {}, SimpleQueue(), prompt, token_ids, **settings))

    def inspect_encoder(self, image: ImageSource, patch: int) -> EncoderInspection:
        """What a patch of an image attends to in each layer of the vision encoder.

        Args:
            patch: its number, row by row from 0.

        Raises:
            PaliGemmaError: there is no such patch, or the image cannot be used.
        """
        vision = self.config.vision
        if not is_number(patch, whole=True) or not 0 <= patch < vision.num_patches:
            raise PaliGemmaError(
                f"patch is {shorten(patch)}; please give a whole number from 0 to {vision.num_patches - 1}."
            )
        pixel_values = self._pixel_values(image)
        attention = self.engine.call(lambda: encoder_attention(self.model, pixel_values, int(patch)))
        return EncoderInspection(int(patch), (vision.patches_per_side,) * 2, attention)

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

    def decode_mask(self, codes: Sequence[int]) -> np.ndarray | None:
        """The mask that 16 `<seg>` codes stand for, see `annotations.place_mask`.

        Returns:
            float32 [64, 64], above zero where the object is; None if the checkpoint came without a mask decoder.
        """
        decoder = self.mask_decoder
        if decoder is None:
            return None
        return self.engine.call(lambda: decoder(torch.tensor([list(codes)])))[0].numpy()

    def make_sequence(
        self,
        pixel_values: list[Tensor],
        input_ids: list[int],
        events: Events,
        answer_ids: Sequence[int] = (),
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> TokenSequence:
        """What the engine takes, from the ids of a prefix, those of its answer so far, and settings, which are checked."""
        sampler = Sampler(temperature, top_k, top_p)
        longest, vocab_size = self.config.text.max_position_embeddings - len(input_ids), self.config.text.vocab_size
        if not is_number(max_new_tokens, whole=True) or not 1 <= max_new_tokens <= longest:
            raise PaliGemmaError(
                f"max_new_tokens is {shorten(max_new_tokens)}; after this prompt please give a whole number "
                f"from 1 to {longest}."
            )
        if len(answer_ids) > longest:
            raise PaliGemmaError(f"token_ids has {len(answer_ids)} tokens, but {longest} fit; please give fewer.")
        for token_id in answer_ids:
            if not is_number(token_id, whole=True) or not 0 <= token_id < vocab_size:
                raise PaliGemmaError(
                    f"token_ids has {shorten(token_id)}; please give whole numbers from 0 to {vocab_size - 1}."
                )
        left = max(0, int(max_new_tokens) - len(answer_ids))
        return TokenSequence(pixel_values, input_ids, left, sampler, self._generator(seed), events, answer_ids)

    def _sequence(
        self,
        image: Images,
        seen: dict[int, Tensor],
        events: Events,
        prompt: str,
        answer_ids: Sequence[int] = (),
        **settings: Unpack[Settings],
    ) -> TokenSequence:
        """As `make_sequence`, from images and a prompt, which are checked; `seen` holds images' pixel values."""
        images = as_list(image)
        input_ids = self.processor.input_ids(prompt, len(images))
        sequence = self.make_sequence([], input_ids, events, answer_ids, **settings)
        for one in images:
            if id(one) not in seen:
                seen[id(one)] = self._pixel_values(one)
        sequence.pixel_values = [seen[id(one)] for one in images]
        return sequence

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


def _failed(error: Exception) -> Iterator[tuple[TokenSequence, ChosenToken | None]]:
    raise error
    yield  # which makes it an iterator


def _token(chosen: ChosenToken, text: TextStream) -> Token:
    return Token(chosen.id, text.push(chosen.id), chosen.probability, chosen.seconds)
