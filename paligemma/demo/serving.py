"""What a server does between requests and model: load what is asked for, time and log each answer."""

from __future__ import annotations

import gc
import logging
import time
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..annotations import AnnotatedText
from ..config import PaliGemmaError, shorten
from ..prompts import task_of

if TYPE_CHECKING:
    from ..generation import Token, VisionLanguageModel

_Running = Callable[..., Generator[Any, None, None]]

EMBEDDED = "embedded"
STATUS_SECONDS = 0.5  # between two reports of how far the loading is
FREE_QUESTION = "question"
LESS_EXACT = ", where answers come faster than in int8 and are less exact"

# What to call, from whatever thread, to end the answer that is made in this context.
ON_STOP: ContextVar[list[Callable[[], None]]] = ContextVar("ON_STOP")

log = logging.getLogger(__name__)


def load_checkpoint(
    source: str | None,
    settings: dict[str, Any],
    adapters: Mapping[str | None, str] | None = None,
    **callbacks: Callable[..., None],
) -> VisionLanguageModel:
    """`paligemma.load`, imported when it is called, since it brings torch: a page can be served before.

    A tokenizer among the settings is not for the embedded checkpoint, which has its own. `adapters` are by their source.
    """
    import paligemma

    own: dict[str, Any] = {"adapter": adapters[source]} if adapters and source in adapters else {}
    if source is None:
        own["tokenizer"] = None
    return paligemma.load(source, **(settings | own | callbacks))


@dataclass
class _Checkpoint:
    """A checkpoint that is offered; `loading` is there once it was asked for, the rest of the optional ones at its end."""

    source: str | None
    loading: Future[VisionLanguageModel] | None = None
    vlm: VisionLanguageModel | None = None
    description: str = ""
    doing: str = "Starting"
    fraction: float | None = None
    users: int = 0
    last_used: float = 0.0


class Models:
    """Checkpoints by name, each loaded when first asked for; where memory is short, idle ones are unloaded for it.

    Args:
        sources: what `paligemma.load` takes as source, None or an empty one for the embedded checkpoint.
        load: called as load(source, progress=…, make_room=…), see `paligemma.load`.
        free_memory: how many bytes a new one could take.
        borrow_gpu: wraps each generator function that runs a model; on ZeroGPU, so that it runs in a process with a GPU.
    """

    def __init__(
        self,
        sources: Sequence[str | None],
        load: Callable[..., VisionLanguageModel],
        free_memory: Callable[[], int] | None = None,
        borrow_gpu: Callable[[_Running], _Running] = lambda running: running,
    ):
        self._checkpoints = {source or EMBEDDED: _Checkpoint(source or None) for source in sources}
        self._load = load
        self._free_memory = free_memory or _available_memory
        self._running = borrow_gpu(self._run)
        self._lock = Lock()
        self._loads_when_asked = True
        self._is_closing = False
        # Each is called when prompts have their answers, or will have none: see `observed`.
        self.observers: list[Callable[[str, Sequence[Answer], str], object]] = []

    @property
    def names(self) -> list[str]:
        return list(self._checkpoints)

    def close(self) -> None:
        """Let nobody begin to use one; who does already may finish."""
        with self._lock:
            self._is_closing = True

    def start(self, name: str) -> Future[VisionLanguageModel]:
        """Begin to load a checkpoint, unless it is loaded or about to be; one that failed is tried again."""
        checkpoint = self._find(name)
        with self._lock:
            loading = checkpoint.loading
            has_failed = loading is not None and loading.done() and loading.exception() is not None
            if loading is None or has_failed and self._loads_when_asked:
                loading = checkpoint.loading = Future()
                Thread(target=self._load_into, args=(checkpoint, loading), daemon=True).start()
        return loading

    def load_all(self) -> None:
        """Load all checkpoints in the calling thread, and none again later.

        ZeroGPU takes over what the main thread puts on `cuda` before the page is launched, and nothing else.
        """
        self._loads_when_asked = False
        for checkpoint in self._checkpoints.values():
            checkpoint.loading = Future()
            self._load_into(checkpoint, checkpoint.loading)

    def loaded(self, name: str) -> VisionLanguageModel | None:
        """The model, unless it is not loaded at present."""
        return self._find(name).vlm

    def state(self, name: str) -> str:
        """`ready` from when a checkpoint was first loaded, though it may be unloaded now; `loading`, `failed`, `ending`."""
        checkpoint = self._find(name)
        if self._is_closing:
            return "ending"
        if checkpoint.description:
            return "ready"
        loading = checkpoint.loading
        return "failed" if loading is not None and loading.done() else "loading"

    def status(self, name: str) -> str:
        """What a checkpoint runs as, or how far its loading is."""
        checkpoint = self._find(name)
        loading = checkpoint.loading  # once, since another thread may unload it meanwhile
        if loading is None:
            return "This checkpoint is loaded with the first question."
        if loading.done():
            return str(loading.exception() or checkpoint.description)
        done = "" if checkpoint.fraction is None else f" {checkpoint.fraction:.0%}"
        return f"Loading the model: {checkpoint.doing}{done} … You can already ask; the answer comes when it is ready."

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Inside, the checkpoint is not unloaded, and it is on its way if it is not there."""
        checkpoint = self._find(name)
        with self._lock:
            if self._is_closing:
                raise PaliGemmaError("The page is about to start anew; please ask again in a minute.")
            checkpoint.users += 1
        try:
            self.start(name)
            yield
        finally:
            with self._lock:
                checkpoint.users -= 1
                checkpoint.last_used = time.monotonic()

    def wait(self, name: str) -> Iterator[str]:
        """Yield the status again and again until the checkpoint is loaded, or has failed to."""
        loading = self.start(name)
        while not loading.done():
            yield self.status(name)
            time.sleep(STATUS_SECONDS)

    def get(self, name: str) -> VisionLanguageModel:
        """The model, once it is loaded.

        Raises:
            PaliGemmaError: it could not be, or there is none of this name.
        """
        return self.start(name).result()

    @contextmanager
    def observed(self, name: str, prompts: Sequence[str]) -> Iterator[list[Answer]]:
        """Let the observers know what becomes of prompts.

        Inside, the list that this gives takes the answers, once they are begun. Each observer is called as
        observer(name, answers, outcome), the latter of the answers that are not finished: `refused` with a sentence
        before they were begun, `stopped`, or `failed`.
        """
        answers: list[Answer] = []
        outcome = "stopped"
        try:
            yield answers
        except Exception:
            outcome = "failed" if answers else "refused"
            raise
        finally:
            for observe in self.observers:
                observe(name, answers or [Answer(prompt) for prompt in prompts], outcome)

    def answer(
        self, name: str, images: list[Image.Image], prompts: Sequence[str], settings: dict[str, Any]
    ) -> Iterator[list[Answer]]:
        """Answer prompts with a checkpoint that is loaded and in use, see `answer_prompts`."""
        return _until_stopped(self._running(name, images, prompts, settings, answer_prompts))

    def look(
        self,
        name: str,
        images: list[Image.Image],
        prompt: str,
        token_ids: Sequence[int],
        method: str,
        *arguments: object,
        **settings: object,
    ) -> Iterator[Any]:
        """Look inside an answer with a checkpoint that is loaded and in use.

        Args:
            token_ids: those of the answer, see `VisionLanguageModel.resume`.
            method: which one of `generation.Answer` is called, with these arguments and settings; or `inspect_encoder`.

        Yields:
            what it returns; of `branch` each token.
        """
        work = self._running(name, images, [prompt], settings, look_inside, token_ids, method, arguments)
        return _until_stopped(work)

    def _run(
        self,
        name: str,
        images: list[Image.Image],
        prompts: Sequence[str],
        settings: dict[str, Any],
        work: Callable[..., Iterator[Any]],
        *arguments: object,
    ) -> Generator[Any, None, None]:
        """Yield what `work` yields of a model, and an error that a caller can act on as the last value.

        On ZeroGPU this runs in a fork, from which values come back whole, but of exceptions only their class. It takes
        no lock, since another thread may have held that one at the fork.
        """
        vlm = self._checkpoints[name].vlm
        assert vlm is not None, name
        try:
            yield from work(vlm, images, prompts, settings, *arguments)
        except PaliGemmaError as error:
            yield error

    def _find(self, name: str) -> _Checkpoint:
        if not isinstance(name, str) or name not in self._checkpoints:
            raise PaliGemmaError(
                f"The checkpoint {shorten(name)} is not offered here; please choose one of {', '.join(self._checkpoints)}."
            )
        return self._checkpoints[name]

    def _load_into(self, checkpoint: _Checkpoint, loading: Future[VisionLanguageModel]) -> None:
        def report(doing: str, fraction: float | None) -> None:
            checkpoint.doing, checkpoint.fraction = doing, fraction

        try:
            vlm = self._load(checkpoint.source, progress=report, make_room=self._make_room)
            description = _describe(vlm)  # here, since on ZeroGPU only the thread that loads sees a GPU
            checkpoint.vlm, checkpoint.description = vlm, description
            loading.set_result(vlm)
        except BaseException as error:  # reaches whoever waits
            log.warning("%s cannot be loaded: %s", checkpoint.source or EMBEDDED, error)
            loading.set_exception(error)

    def _make_room(self, needed: int) -> None:
        """Unload idle checkpoints, the least recently used first, until `needed` bytes are free."""
        while self._loads_when_asked and self._free_memory() < needed:
            with self._lock:
                idle = [
                    one for one in self._checkpoints.values() if not one.users and one.loading and one.loading.done()
                ]
                if not idle:
                    return  # what is there must do
                oldest = min(idle, key=lambda one: one.last_used)
                log.info("unloading %s to free memory", oldest.source or EMBEDDED)
                oldest.loading = oldest.vlm = None
            _free()


def _until_stopped(steps: Generator[Any, None, None]) -> Iterator[Any]:
    """What comes from a model's process, until the visitor stops it; an error among it is raised."""
    is_stopped = Event()  # for ZeroGPU, where the tokens are computed in another process
    ON_STOP.get([]).append(is_stopped.set)
    with closing(steps):
        for step in steps:
            if isinstance(step, PaliGemmaError):
                raise step
            yield step
            if is_stopped.is_set():
                return


def _describe(vlm: VisionLanguageModel) -> str:
    """What a model runs in and on, and why not on a GPU where there is one that torch cannot use."""
    from ..hardware import dtype_name, unused_gpu  # brings torch

    dtype = dtype_name(vlm.weight_dtype)
    description = f"It runs in {dtype} on {vlm.device}{LESS_EXACT if dtype == 'int4' else ''}."
    problem = unused_gpu() if vlm.device.type == "cpu" else None
    if problem:
        log.warning("%s", problem)
        description += f" {problem}"
    return description


def _available_memory() -> int:
    from ..hardware import available_memory  # brings torch

    return available_memory()


def _free() -> None:
    import torch

    from ..hardware import give_back_freed_memory

    gc.collect()
    give_back_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class Tokens:
    """Ids of tokens, int32, and the model's own probabilities of them, float32: compact, since a visitor's are kept."""

    ids: array[int] = field(default_factory=lambda: array("i"))
    probabilities: array[float] = field(default_factory=lambda: array("f"))

    @classmethod
    def of(cls, tokens: Iterable[Token]) -> Tokens:
        """Those of an answer."""
        kept = cls()
        for token in tokens:
            kept.add(token)
        return kept

    def add(self, token: Token) -> None:
        self.ids.append(token.id)
        self.probabilities.append(token.probability)


@dataclass
class Answer:
    """One prompt's answer as it grows."""

    prompt: str
    annotated: AnnotatedText = field(default_factory=AnnotatedText)
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    is_finished: bool = False

    @classmethod
    def of(cls, prompt: str, text: str) -> Answer:
        """An answer that was given before."""
        answer = cls(prompt, AnnotatedText(text), text, is_finished=True)
        answer.annotated.finish()
        return answer

    @property
    def times(self) -> list[float]:
        """The seconds after the request at which its tokens were computed."""
        return [token.seconds for token in self.tokens]

    def push(self, token: Token) -> None:
        """Add a token."""
        self.tokens.append(token)
        self.text += token.text
        self.annotated.push(token.text)


def answer_prompts(
    vlm: VisionLanguageModel, images: list[Image.Image], prompts: Sequence[str], settings: dict[str, Any]
) -> Iterator[list[Answer]]:
    """Answer prompts together, each about all of the images; their features are computed once.

    All prompts are checked before the first is answered. One line a prompt is logged: what was done and how fast, never
    what was asked or shown.

    Args:
        images: taken out of the list when they are read, since they are large, and answers take long.
        settings: as for `VisionLanguageModel.stream`.

    Yields:
        the answers so far.
    """
    size = images[0].size
    tokens = vlm.stream_batch([images] * len(prompts), prompts, **settings)
    images.clear()
    answers = [Answer(prompt) for prompt in prompts]
    ON_STOP.get([]).append(tokens.close)
    outcome = "stopped"
    try:
        yield answers
        while taken := tokens.take():
            for number, token in taken:
                answer = answers[number]
                if token is None:
                    answer.annotated.finish()
                    answer.is_finished = True
                else:
                    answer.push(token)
            yield answers
    except Exception:
        outcome = "failed"
        raise
    finally:
        tokens.close()
        for answer in answers:
            _log(answer, size, "finished" if answer.is_finished else outcome)


def look_inside(
    vlm: VisionLanguageModel,
    images: list[Image.Image],
    prompts: Sequence[str],
    settings: dict[str, Any],
    token_ids: Sequence[int],
    method: str,
    arguments: Sequence[Any],
) -> Iterator[Any]:
    """See `Models.look`; there is one prompt."""
    if method == "inspect_encoder":
        yield vlm.inspect_encoder(images[0], *arguments)
        return
    answer = vlm.resume(images, prompts[0], token_ids)
    images.clear()
    seen = getattr(answer, method)(*arguments, **settings)
    if method == "branch":
        yield from seen
    else:
        yield seen


def tokens_per_second(times: Sequence[float]) -> float:
    """Of tokens that came at these seconds, two or more; the first waits for the vision encoder, and does not count."""
    return (len(times) - 1) / (times[-1] - times[0])


def task_word(prompt: str) -> str:
    """The first word of a prompt's task; of any other prompt `FREE_QUESTION`."""
    task = task_of(str(prompt))
    return task.word if task else FREE_QUESTION


def _log(answer: Answer, size: tuple[int, int], outcome: str) -> None:
    times = answer.times
    log.info(
        "task=%s picture=%dx%d prompt_characters=%d tokens=%d first_token=%s tokens_per_second=%s outcome=%s",
        task_word(answer.prompt),
        *size,
        len(answer.prompt),
        len(times),
        f"{times[0]:.3f}s" if times else "-",
        f"{tokens_per_second(times):.1f}" if len(times) > 1 else "-",
        outcome,
    )
