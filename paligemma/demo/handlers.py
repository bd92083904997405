"""What happens when something on the page is pressed and what programs call: one function for each event.

They take and return plain values. Where an event changes several parts of the page, they are named in a dict; what is
not in it stays as it is.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote
from weakref import WeakValueDictionary

import numpy as np
from gradio.utils import get_upload_folder
from PIL import Image

from ..annotations import Detection
from ..config import PaliGemmaError, is_number, shorten
from ..images import open_image
from ..prompts import ENGLISH, LANGUAGES, TASKS, Task, detect_prompt, segment_prompt, task_of
from . import rendering
from .records import (
    MAX_IMAGES,
    MAX_NEW_TOKENS,
    MAX_PIXELS,
    MAX_PROMPT_CHARACTERS,
    MAX_PROMPT_TOKENS,
    MAX_PROMPTS,
    Record,
    plain_tokens,
    read_record,
)
from .serving import EMBEDDED, STATUS_SECONDS, Answer, Models, Tokens, tokens_per_second

if TYPE_CHECKING:
    from ..generation import VisionLanguageModel
    from ..scenes.painter import Painter

EXAMPLES_FOLDER = Path(__file__).parent / "examples"
DEFAULT_NEW_TOKENS = 128  # six masks
MAX_LINK_SEED = 2**53 - 1  # the largest whole number that a browser keeps exactly
MAX_LINK_CHARACTERS = 2000
SCENE_SIZE, SCENE_OBJECTS = 336, 6  # pixels, and how many at most
MAX_HELD_PIXELS = MAX_PIXELS // 2  # of images that are being asked about; more are not read until one of these goes
HELD_SECONDS, MAX_HELD_SECONDS = 0.1, 30  # between two looks at that, and at most
MAX_READERS = 2  # images read at the same time, each of which may take half a gigabyte; others wait

TASK_BY_NAME = {task.name: task for task in TASKS}
TAGLINE = "Ask a picture, watch the answer arrive, and see inside the model that gives it."
ABOUT_EMBEDDED = "It runs the **small checkpoint that ships with it**."
ABOUT_OTHER = "It runs `{}`."
ABOUT_PHOTOGRAPHS = (
    "A photograph? This small checkpoint has learned drawings only, of 125 kinds of things. An official one knows the "
    "world: start the page with `PALIGEMMA_MODEL=google/paligemma2-3b-mix-224`."
)
STORED = "A stored answer of the small checkpoint. Press **Run** to see it made."
EMPTY_ANSWER = "An empty answer. To “detect” and “segment” it means: there is none."
SEE_INSIDE = "See inside: how did it choose each word?"
CLOSED: dict[str, Any] = {"is_open": False, "view": {}, "heat": "", "see_inside": SEE_INSIDE}  # of the panel
SEVERAL_PROMPTS = "*Shift + Enter: one more prompt about the same picture.*"


@dataclass(frozen=True)
class Setting:
    """A number that decides how an answer is made; see `VisionLanguageModel.stream`."""

    name: str
    label: str
    default: float | None
    minimum: float
    maximum: float
    step: float


SETTINGS = (
    Setting("max_new_tokens", "Max new tokens", DEFAULT_NEW_TOKENS, 1, MAX_NEW_TOKENS, 1),
    Setting("temperature", "Temperature (0: always the likeliest token)", 0, 0, 2, 0.05),
    Setting("top_k", "Top-k (0: off)", 0, 0, 200, 1),
    Setting("top_p", "Top-p (1: off)", 1, 0.05, 1, 0.05),
    Setting("seed", "Seed (empty: a new one each time)", None, 0, MAX_LINK_SEED, 1),
)
LINK_FIELDS = ("prompt", "checkpoint", *(setting.name for setting in SETTINGS))


_held: WeakValueDictionary[int, Image.Image] = WeakValueDictionary()  # images that are being asked about
_readers = ThreadPoolExecutor(MAX_READERS, thread_name_prefix="reader")
T = TypeVar("T")

# A picture that comes with the page: `picture`, its file, a `prompt`, and the `answer` of the embedded checkpoint, with the
# `ids` and `probabilities` of its tokens.
EXAMPLES: list[dict[str, Any]] = json.loads((EXAMPLES_FOLDER / "answers.json").read_text())
_Found = tuple[Image.Image | None, list[dict[str, object]]]


def run(
    models: Models,
    image: object,
    more_images: object,
    prompt: str,
    checkpoint: str,
    *settings: object,
) -> Iterator[dict[str, Any]]:
    """Answer a prompt, or one in each line, about an uploaded image, or several.

    Args:
        image: what `gr.Image` sends, see `open_upload`; objects are marked on this one.
        more_images: what `gr.Gallery` sends.
        settings: values of `SETTINGS`; the seed as it was typed.

    Yields:
        `speed`, a line about time; `figure` and `answers`, HTML; `is_answered`, whether there is an answer to save; at
        the end `record`, see `records`.
    """
    opened, record = yield from open_uploads(image, more_images, meanwhile={})
    count = len(opened)
    # What was shown before goes, also if this answer is stopped.
    yield {"figure": "", "answers": "", "speed": "", "is_answered": False} | CLOSED
    drawn: list[rendering.MarkedObject] | None = None
    answers: list[Answer] = []
    for status, answers, objects in _answer(models, checkpoint, opened, prompt, read_settings(settings)):
        if status:
            yield {"speed": status}
            continue
        step = {
            "answers": rendering.answers_html(answers, objects, EMPTY_ANSWER),
            "speed": _speed(answers, count),
        }
        if objects is not drawn:
            drawn = objects
            step["figure"] = _figure(record, objects)
        yield step
    if not any(answer.text or answer.is_finished for answer in answers):
        return  # stopped before it began
    record |= {"checkpoint": checkpoint, "answers": [(answer.prompt, answer.text) for answer in answers]}
    record["tokens"] = [plain_tokens(Tokens.of(answer.tokens)) for answer in answers]
    yield {"record": record, "is_answered": True}


def read_settings(values: Sequence[object]) -> dict[str, Any]:
    """Settings by name, from their values on the page, where the seed is typed; an empty one is None."""
    settings = dict(zip((setting.name for setting in SETTINGS), values))
    seed = settings["seed"]
    if isinstance(seed, str):
        is_whole = seed.strip().isdecimal() and len(seed) < 100  # Python reads none of more than 4,300 digits
        settings["seed"] = int(seed) if is_whole else seed.strip() or None
    return settings


def example_records(paths: Sequence[str]) -> list[Record]:
    """The answers of `EXAMPLES`, as if this visit had asked for them; `paths` are those of their images as uploads."""
    return [
        {"path": path, "size": Image.open(path).size, "more": [], "checkpoint": EMBEDDED}
        | {"answers": [(example["prompt"], example["answer"])]}
        | {"tokens": [{name: example[name] for name in ("ids", "probabilities")}]}
        for path, example in zip(paths, EXAMPLES, strict=True)
    ]


def choose_example(examples: Sequence[Record], index: int) -> dict[str, Any]:
    """Take an example's image and prompt."""
    if not 0 <= index < len(examples):
        raise PaliGemmaError(f"There are {len(examples)} examples; please choose one of them.")
    return {"image": examples[index]["path"], "more_images": [], "prompt": prompts_of(examples[index])}


def show_again(models: Models, record: object) -> dict[str, Any]:
    """Bring an earlier answer back, with its image and prompts."""
    record = read_record(record)
    for path in (record["path"], *record["more"]):
        _check_upload(path)
    answers, objects = _read_again(models, record)
    return {
        "image": record["path"],
        "more_images": record["more"],
        "prompt": prompts_of(record),
        "figure": _figure(record, objects),
        "answers": rendering.answers_html(answers, objects, EMPTY_ANSWER),
        "speed": "",
        "record": record | {"tokens": [plain_tokens(tokens) for tokens in record["tokens"]]},
        "is_answered": True,
        **CLOSED,
    }


def thumbnails(title: str, records: Iterable[Record]) -> str:
    """Answers to choose from, as HTML; see `rendering.thumbnails_html`."""
    return rendering.thumbnails_html(
        title, [(_url(record["path"]), prompts_of(record).replace("\n", " · ")) for record in records]
    )


def prompts_of(record: Record) -> str:
    """The prompts of an earlier answer, one a line."""
    return "\n".join(prompt for prompt, _ in record["answers"])


def save_image(models: Models, record: object) -> str:
    """Draw an answer's boxes and masks on its image; returns the path of the file."""
    record = read_record(record)
    image = result(_open(record["path"], None))
    path = _new_file(record, "marked.png")
    rendering.draw(image, _read_again(models, record)[1]).save(path)
    return str(path)


def save_objects(models: Models, record: object) -> str:
    """Write an answer's objects as JSON; returns the path of the file."""
    record = read_record(record)
    path = _new_file(record, "objects.json")
    path.write_text(json.dumps(rendering.to_json(_read_again(models, record)[1], record["size"])))
    return str(path)


def draw_scene() -> Image.Image:
    """Draw a new image, of what the embedded checkpoint knows."""
    rng = np.random.default_rng()
    return _painter().random_scene(rng, SCENE_SIZE, int(rng.integers(1, SCENE_OBJECTS, endpoint=True))).image


def choose_task(name: str, language: str) -> str:
    """The prompt of a task that was chosen."""
    return TASK_BY_NAME[name].prompt(language)


def describe_prompt(prompt: str, checkpoint: str) -> dict[str, Any]:
    """The `task` that a prompt asks for, a `hint` how to write others, and whether it `has_language`; also while typed."""
    task = task_of(prompt)
    return {
        "task": task.name if task else None,
        "hint": hint(task),
        # The embedded checkpoint answers in English only.
        "has_language": bool(task and task.has_language) and checkpoint != EMBEDDED,
    }


def hint(task: Task | None) -> str:
    """How to write other prompts of a task, or that it is none."""
    return f"{task.hint if task else 'A free question.'} {SEVERAL_PROMPTS}"


def read_link(query: Mapping[str, str], checkpoints: Sequence[str]) -> dict[str, Any]:
    """The fields of the page that a link fills in; what the page could not hold is left out."""
    fields: dict[str, Any] = {}
    if query.get("prompt"):
        fields["prompt"] = query["prompt"][:MAX_LINK_CHARACTERS]
    if query.get("checkpoint") in checkpoints:
        fields["checkpoint"] = query["checkpoint"]
    for setting in SETTINGS:
        try:
            value = float(query[setting.name])
        except (KeyError, ValueError):
            continue
        is_whole = math.isfinite(value) and value.is_integer()
        if setting.minimum <= value <= setting.maximum and (is_whole or setting.step < 1):
            fields[setting.name] = int(value) if is_whole else value
    return fields


def show_status(models: Models, checkpoint: str) -> dict[str, Any]:
    """Say what a checkpoint is (`about`), how it runs (`status`), whether it `is_loading` and if it `is_embedded`."""
    is_loading = models.loaded(checkpoint) is None  # before the status, so that the last one shown is of the end
    return {
        "about": about(checkpoint),
        "status": models.status(checkpoint),
        "is_loading": is_loading,
        "is_embedded": checkpoint == EMBEDDED,
    }


@cache
def official_checkpoints() -> str:
    """What the official checkpoints are for, how large they are and where they run, in Markdown."""
    from ..checkpoints import official

    return f"Whoever starts this page chooses: `PALIGEMMA_MODEL=google/paligemma2-3b-mix-224`.\n\n{official.table()}"


def about(checkpoint: str) -> str:
    """What the page runs, in Markdown."""
    return ABOUT_EMBEDDED if checkpoint == EMBEDDED else ABOUT_OTHER.format(checkpoint)


# --- what programs call: Gradio shows their names, parameters and descriptions


def generate(
    models: Models,
    image: object,
    prompt: str,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    temperature: float = 0,
    top_k: int = 0,
    top_p: float = 1,
    seed: int | None = None,
    more_images: object = None,
) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """Answer a prompt about a picture; streams the text so far, and the objects so far, with their masks at the end.

    Args:
        image: the picture
        prompt: in PaliGemma's own syntax: `caption en`, `describe en`, `answer en QUESTION`, `detect KIND ; KIND`,
            `segment KIND ; KIND` or `ocr`; one more in each further line
        max_new_tokens: the longest answer
        temperature: 0 takes the likeliest token always
        top_k: sample among so many of the likeliest tokens; 0 among all
        top_p: sample among the likeliest tokens that have this much probability together; 1 among all
        seed: a whole number; the same one gives the same text
        more_images: others that come before the prompt with the first, for checkpoints that were trained on several
    """
    opened, _ = yield from open_uploads(image, more_images, meanwhile=("", []))
    size = opened[0].size
    settings = read_settings((max_new_tokens, temperature, top_k, top_p, seed))
    text, objects = "", list[rendering.MarkedObject]()
    for status, answers, objects in _answer(models, models.names[0], opened, prompt, settings):
        if not status:
            text = "\n".join(answer.text for answer in answers)
            yield text, rendering.to_json(objects, size, with_masks=False)
    if any(marked.mask is not None for marked in objects):
        yield text, rendering.to_json(objects, size)


def caption(models: Models, image: object, language: str = ENGLISH) -> Iterator[str]:
    """Describe a picture in a sentence; streams the text so far.

    Args:
        image: the picture
        language: code of the language to answer in, such as `en`; the embedded checkpoint knows only that one
    """
    if not isinstance(language, str) or language not in LANGUAGES:
        raise PaliGemmaError(f"language is {shorten(language)}; please give one of {', '.join(LANGUAGES)}.")
    for text, _ in generate(models, image, f"caption {language}"):
        yield text


def detect(models: Models, image: object, objects: str) -> Iterator[_Found]:
    """Find all objects of some kinds in a picture, with their boxes; streams those so far, and the picture at the end.

    Args:
        image: the picture
        objects: what to find: `cat`, or several kinds: `cat ; dog`
    """
    yield from _find_objects(models, image, objects, detect_prompt)


def segment(models: Models, image: object, objects: str) -> Iterator[_Found]:
    """Find all objects of some kinds in a picture, with their masks; streams those so far, and picture and masks at the end.

    Args:
        image: the picture
        objects: what to find: `cat`, or several kinds: `cat ; dog`
    """
    yield from _find_objects(models, image, objects, segment_prompt)


def inspect(
    models: Models,
    image: object,
    prompt: str,
    index: int = 0,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    temperature: float = 0,
    top_k: int = 0,
    top_p: float = 1,
    seed: int | None = None,
    heads: bool = False,
    more_images: object = None,
) -> Iterator[dict[str, Any]]:
    """Answer a prompt about a picture, and look inside the step that made one of its tokens; gives one dictionary at the end.

    It has `text`, `tokens`, the `token` and its `rivals` with probabilities, `attention` by layer and position with the
    `spans` of picture, prompt and answer, the `lens` (the likeliest token after each layer), the `distribution` under the
    settings, and more.

    Args:
        image: the picture
        prompt: one, as for `generate`
        index: which token of the answer, from 0
        max_new_tokens: the longest answer
        temperature: as for `generate`, as are the next three
        top_k: 0 is off
        top_p: 1 is off
        seed: a whole number
        heads: whether the attention of each head is given, instead of their mean
        more_images: as for `generate`
    """
    if len(str(prompt).strip().splitlines()) > 1:
        raise PaliGemmaError("These are several prompts; please give one.")
    opened, _ = yield from open_uploads(image, more_images, meanwhile={})
    again, name = list(opened), models.names[0]
    settings = read_settings((max_new_tokens, temperature, top_k, top_p, seed))
    with models.use(name):
        answer = Answer("")
        for status, answers, _ in _answer(models, name, opened, prompt, settings):
            if not status:
                (answer,) = answers
        ids = [token.id for token in answer.tokens]
        for seen in models.look(name, again, answer.prompt, ids, "inspect", index):
            tokens = [asdict(token) for token in answer.tokens]
            distribution = [asdict(one) for one in seen.distribution(temperature, top_k, top_p)]
            yield {"text": answer.text, "tokens": tokens} | seen.to_json(bool(heads)) | {"distribution": distribution}


def _find_objects(models: Models, image: object, kinds: object, to_prompt: Callable[[str], str]) -> Iterator[_Found]:
    """Yield the objects so far, when there are more, then the image with all drawn on it; see `rendering.to_json`."""
    if not isinstance(kinds, str) or len(kinds.splitlines()) > 1:  # each line would be a prompt
        raise PaliGemmaError(
            f"objects is {shorten(kinds)}; please give a text of one line, such as “cat” or “cat ; dog”."
        )
    opened, _ = yield from open_upload(image, meanwhile=(None, []))
    settings = {"max_new_tokens": MAX_NEW_TOKENS}
    known: list[rendering.MarkedObject] = []
    objects = known
    for _, _, objects in _answer(models, models.names[0], [opened], to_prompt(kinds), settings):
        if len(objects) != len(known):
            known = objects
            yield None, rendering.to_json(objects, opened.size, with_masks=False)
    yield rendering.draw(opened, objects), rendering.to_json(objects, opened.size)


# --- what they share


def open_upload(image: object, meanwhile: T) -> Generator[T, None, tuple[Image.Image, Record]]:
    """Open what `gr.Image` sends: the fields of its `ImageData`, with the path of the uploaded file.

    Yields:
        `meanwhile`, again and again while the image is being read; who closes the generator ends that.

    Returns:
        the image, and its `path` and `size`.
    """
    if not image or isinstance(image, dict) and not image.get("path"):
        raise PaliGemmaError("There is no picture yet; please upload one or choose an example.")
    if not isinstance(image, dict) or not isinstance(image["path"], str):
        raise PaliGemmaError(
            'The picture is not an uploaded file; please upload it to /gradio_api/upload and give {"path": …} with the '
            "path that comes back."
        )
    opened = yield from _open(image["path"], meanwhile)
    return opened, {"path": image["path"], "size": opened.size}


def open_uploads(
    image: object, more_images: object, meanwhile: T
) -> Generator[T, None, tuple[list[Image.Image], Record]]:
    """Open an image, see `open_upload`, and a list of others; what `gr.Gallery` sends has each under the key `image`.

    Returns:
        the images, and where they are: as of `open_upload`, and the paths of the others as `more`.
    """
    others = more_images or []
    if not isinstance(others, list):
        raise PaliGemmaError(f"more_images is of type {type(others).__name__}; please give a list of uploaded files.")
    if len(others) >= MAX_IMAGES:
        raise PaliGemmaError(f"These are {1 + len(others)} pictures; please give at most {MAX_IMAGES}.")
    opened, record = yield from open_upload(image, meanwhile)
    images, paths = [opened], []
    for one in others:
        other, where = yield from open_upload(one.get("image", one) if isinstance(one, dict) else one, meanwhile)
        images.append(other)
        paths.append(where["path"])
    return images, record | {"more": paths}


def _check_upload(path: str) -> None:
    """Refuse a path that is none of an upload or example: whoever calls the endpoints may write any there."""
    if "\0" in path or not Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
        raise PaliGemmaError("The picture was not uploaded to this page; please upload it.")
    if os.path.isdir(path):
        raise PaliGemmaError(f"{shorten(Path(path).name)} is a folder; please choose a picture.")
    if not os.path.exists(path):
        raise PaliGemmaError(f"The picture {shorten(Path(path).name)} was deleted meanwhile; please upload it again.")


def _open(path: str, meanwhile: T) -> Generator[T, None, Image.Image]:
    _check_upload(path)
    is_over = Event()
    reading: Future[Image.Image] = _readers.submit(_read, path, is_over)
    reading.add_done_callback(_give_back_later)
    try:
        while wait([reading], STATUS_SECONDS).not_done:
            yield meanwhile
        return reading.result()
    finally:
        is_over.set()
        reading.cancel()


def _give_back_later(_: Future[Image.Image]) -> None:
    """Give back what an image took also where no answer follows, whose end does so too."""
    from ..hardware import give_back_freed_memory_later  # brings torch

    give_back_freed_memory_later()


def _read(path: str, is_over: Event) -> Image.Image:
    """Read an image once there is place for it among those that are being asked about, which it takes while it lives."""
    end = time.monotonic() + MAX_HELD_SECONDS
    while _held_pixels() >= MAX_HELD_PIXELS and time.monotonic() < end and not is_over.wait(HELD_SECONDS):
        pass
    image = open_image(path, MAX_PIXELS, lambda: not is_over.is_set())
    _held[id(image)] = image
    return image


def _held_pixels() -> int:
    return sum(image.width * image.height for held in _held.valuerefs() if (image := held()))


def _url(path: str) -> str:
    """Where the page finds an uploaded file."""
    return f"gradio_api/file={quote(path)}"


def result(steps: Generator[object, None, T]) -> T:
    """What a generator returns at its end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def _answer(
    models: Models, checkpoint: str, images: list[Image.Image], prompt: str, settings: dict[str, Any]
) -> Iterator[tuple[str, list[Answer], list[rendering.MarkedObject]]]:
    """Yield how far the loading is, then the answers so far and their objects, which are a new list when they change."""
    lines = prompt.splitlines() if isinstance(prompt, str) else []
    prompts = [line for line in map(str.strip, lines) if line] or [prompt]
    with models.use(checkpoint), models.observed(checkpoint, prompts) as begun:
        for status in models.wait(checkpoint):
            yield status, [], []
        vlm = models.get(checkpoint)
        check_limits(vlm, len(images), prompts, settings["max_new_tokens"])
        detections: list[Detection] = []
        objects: list[rendering.MarkedObject] = []
        masks = rendering.MaskCache(vlm.decode_mask)
        for answers in models.answer(checkpoint, images, prompts, settings):
            begun[:] = answers
            found = _detections(answers)
            if found != detections:
                detections, objects = found, rendering.mark_objects(found, masks)
            yield "", answers, objects


def check_limits(vlm: VisionLanguageModel, images: int, prompts: Sequence[str], max_new_tokens: object) -> None:
    """Refuse what the model could do but a shared page should not spend its time on."""
    if len(prompts) > MAX_PROMPTS:
        raise PaliGemmaError(f"These are {len(prompts)} prompts; please ask at most {MAX_PROMPTS} at once.")
    if not is_number(max_new_tokens, whole=True) or not 1 <= max_new_tokens <= MAX_NEW_TOKENS:
        raise PaliGemmaError(
            f"max_new_tokens is {shorten(max_new_tokens)}; please give a whole number from 1 to {MAX_NEW_TOKENS}."
        )
    for prompt in prompts:
        if isinstance(prompt, str) and len(prompt) > MAX_PROMPT_CHARACTERS:
            raise PaliGemmaError(
                f"The prompt has {len(prompt)} characters, but this page takes {MAX_PROMPT_CHARACTERS}; please shorten it."
            )
        vlm.processor.input_ids(prompt, images, MAX_PROMPT_TOKENS)


def _detections(answers: Sequence[Answer]) -> list[Detection]:
    return [detection for answer in answers for detection in answer.annotated.detections]


def _read_again(models: Models, record: Record) -> tuple[list[Answer], list[rendering.MarkedObject]]:
    """The answers of a record, and their objects."""
    answers = [Answer.of(prompt, text) for prompt, text in record["answers"]]
    # A checkpoint that was unloaded meanwhile is not loaded for this: its masks are drawn as boxes.
    vlm = models.loaded(record["checkpoint"]) if record["checkpoint"] in models.names else None
    return answers, rendering.mark_objects(_detections(answers), rendering.MaskCache(vlm.decode_mask if vlm else None))


def _figure(record: Record, objects: Sequence[rendering.MarkedObject]) -> str:
    return rendering.figure_html(record["size"], objects) if objects else ""


def _speed(answers: Sequence[Answer], images: int) -> str:
    """Time to first token, and tokens per second after it, of all prompts together; and the images, if there are several."""
    times = sorted(seconds for answer in answers for seconds in answer.times)
    if not times:
        return "Looking at the picture …" if images == 1 else f"Looking at {images} pictures …"
    line = f"First token after {times[0]:.2f} s"
    if len(times) > 1:
        line += f" · {tokens_per_second(times):.1f} tokens/s · {len(times)} tokens"
    return line if images == 1 else f"{line} · {images} pictures, with boxes and masks on the first"


def _new_file(record: Record, name: str) -> Path:
    """A path in the folder of uploads, for a file that the visitor may download."""
    stem = Path(record["path"]).stem.replace("\0", "")[:100]
    return Path(tempfile.mkdtemp(dir=get_upload_folder())) / f"{stem}-{name}"


def prepare_scenes() -> None:
    """Load what `draw_scene` needs, which takes seconds."""
    _painter()


@cache
def _painter() -> Painter:
    from ..scenes.artwork import load_sheet
    from ..scenes.painter import Painter

    return Painter(load_sheet())
