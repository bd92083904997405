"""What happens in the panel “See inside”: one function for each event, as in `handlers`.

Nothing is computed before the panel is opened, then only what it shows. That is its `View`, plain values: the `tab`; the
chosen token, by its `line` among the answers and `branches`, and its `index`; `layer` and `head` of the decoder; `patch` and
`encoder_layer`; and the `seconds` of each token without a cache. A branch, which went on from a rival, has a prompt, `Tokens`
and the number of the rival.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import PaliGemmaError, is_number, shorten
from . import drawings
from .handlers import CLOSED, check_limits, open_uploads, result
from .records import FORGOTTEN, MAX_NEW_TOKENS, Record, read_record
from .serving import EMBEDDED, Models, Tokens

if TYPE_CHECKING:
    from ..generation import VisionLanguageModel
    from ..inspection import Inspection

ATTENTION, LAYERS, WHAT_IF, MASK, CACHE, ENCODER, WALK = TABS = (
    "Attention", "Layers", "What if", "Mask", "Cache", "Encoder", "Walk",
)  # fmt: skip
CLOSE = "Close"
MAX_BRANCHES = 3
MAX_SEEN = 16  # steps that are remembered, of all visitors; each takes some MB at most
NO_TOKEN = '<p class="tip">This answer is empty: the model ended it at once.</p>'
SLIDERS = (
    ("temperature", "Temperature", 0, 2, 0.05, 1),
    ("top_k", "Top-k (0: off)", 0, 50, 1, 0),
    ("top_p", "Top-p", 0.05, 1, 0.05, 1),
)
ROOT = Path(__file__).parents[2]

View = dict[str, Any]


class _Seen:
    """The steps that were looked at latest, without anything of the model's."""

    def __init__(self) -> None:
        self._steps: OrderedDict[object, Inspection] = OrderedDict()
        self._lock = Lock()

    def get(self, key: object, inspect: Callable[[], Inspection]) -> Inspection:
        with self._lock:
            found = self._steps.pop(key, None)
        found = found or inspect()
        with self._lock:
            self._steps[key] = found
            while len(self._steps) > MAX_SEEN:
                self._steps.popitem(last=False)
        return found


_seen = _Seen()


class _Look:
    """What a visitor looks at: an answer's record, whose checkpoint is in use, and a view of it, whose values are checked."""

    def __init__(self, models: Models, record: Record, view: View):
        self.record = record
        self.view: View = {"tab": ATTENTION, "branches": [], **view}
        self._models = models
        prompts = [prompt for prompt, _ in record["answers"]]
        branches = [(prompt, tokens) for prompt, tokens, _ in self.view["branches"]]
        self.lines: list[tuple[str, Tokens]] = [*zip(prompts, record["tokens"]), *branches]
        line = self.number("line", len(self.lines)) or 0
        self.prompt, self.tokens = self.lines[line]
        self.view["line"] = line
        if self.tokens.ids:
            index = self.number("index", len(self.tokens.ids))
            self.view["index"] = self._first_word() if index is None else index

    @property
    def vlm(self) -> VisionLanguageModel:
        return self._models.get(self.record["checkpoint"])

    @property
    def key(self) -> tuple:
        """What tells the answer from others."""
        paths = self.record["path"], *self.record["more"]
        return self.record["checkpoint"], paths, self.prompt, self.tokens.ids.tobytes()

    def ask(self, method: str, *arguments: object, **settings: object) -> Iterator[Any]:
        """What `Models.look` yields of the answer."""
        more = [{"path": path} for path in self.record["more"]]
        check_limits(self.vlm, 1 + len(more), [self.prompt], MAX_NEW_TOKENS)
        images, _ = result(open_uploads({"path": self.record["path"]}, more, {}))
        ids = self.tokens.ids.tolist()
        return self._models.look(self.record["checkpoint"], images, self.prompt, ids, method, *arguments, **settings)

    def seen(self) -> Inspection:
        """The step of the chosen token."""
        index = self.view["index"]
        return _seen.get((*self.key, index), lambda: next(self.ask("inspect", index)))

    def texts(self, tokens: Tokens) -> list[str]:
        return [self.vlm.processor.token_text(token_id) for token_id in tokens.ids]

    def number(self, name: str, end: int) -> int | None:
        """A value of the view, a whole number below `end`, or None."""
        value = self.view.get(name)
        if value is None:
            return None
        if not is_number(value, whole=True) or not 0 <= value < end:
            raise PaliGemmaError(f"{name} is {shorten(value)}; please choose something that the panel shows.")
        return int(value)

    def _first_word(self) -> int:
        """The first token that is a word, rather than a location."""
        return next((at for at, text in enumerate(self.texts(self.tokens)) if text.strip().isalpha()), 0)


def toggle(models: Models, answer: object, view: View) -> Iterator[dict[str, Any]]:
    """Open the panel, or close it; `answer` is a record as a browser keeps it, here and below."""
    if view:
        yield CLOSED
        return
    _read(models, answer)
    yield {"is_open": True, "see_inside": CLOSE, "words": '<p class="tip">Looking inside …</p>'}
    yield from look(models, answer, {}, {})


def look(models: Models, answer: object, view: View, choice: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Show what was chosen.

    Args:
        choice: values of the view that change; `rival`, the id of a token from which the answer shall go on; `measure`, to
            answer without a cache.

    Yields:
        HTML for `words`, `rivals`, `section`, `distribution`, SVG for `heat`, and the `view`.
    """
    changes = {
        name: choice[name]
        for name in ("line", "index", "tab", "layer", "head", "patch", "encoder_layer")
        if name in choice
    }
    if changes.keys() & {"line", "index"} and "seconds" in view:
        view = {name: value for name, value in view.items() if name != "seconds"}
    record = _read(models, answer)
    name = record["checkpoint"]
    with models.use(name):
        for status in models.wait(name):
            yield {"words": f'<p class="tip">{escape(status)}</p>'}
        looking = _Look(models, record, view | changes)
        if "rival" in choice:
            yield from _branch(models, looking, choice["rival"])
            return
        if choice.get("measure") and name == EMBEDDED:
            looking.view["seconds"] = next(looking.ask("seconds_without_cache"))
        yield _shown(looking)


def peek(models: Models, answer: object, view: View, choice: dict[str, Any]) -> dict[str, Any]:
    """The rivals of a token that is pointed at."""
    record = _read(models, answer)
    with models.use(record["checkpoint"]):
        looking = _Look(models, record, view | {name: choice.get(name) for name in ("line", "index")})
        return {"rivals": drawings.rivals_html(looking.seen(), looking.view["line"]) if looking.tokens.ids else ""}


def redraw(models: Models, answer: object, view: View, settings: dict[str, Any]) -> dict[str, Any]:
    """The distribution of the chosen step under other settings."""
    record = _read(models, answer)
    with models.use(record["checkpoint"]):
        looking = _Look(models, record, view)
        values = {name: settings.get(name, default) for name, *_, default in SLIDERS}
        candidates = looking.seen().distribution(**values, count=drawings.MAX_BARS)
    return {"distribution": drawings.distribution_html(candidates)}


def _read(models: Models, answer: object) -> Record:
    """An answer that can be looked into: it has tokens, from a checkpoint that this page offers."""
    record = read_record(answer)
    if not record["tokens"]:
        raise PaliGemmaError(FORGOTTEN)
    if record["checkpoint"] not in models.names:
        raise PaliGemmaError(
            "This stored answer is of a checkpoint that this page does not offer; please press Run first."
        )
    return record


def _branch(models: Models, looking: _Look, token_id: object) -> Iterator[dict[str, Any]]:
    """Let the answer go on from another token, as a line of its own."""
    view, index = looking.view, looking.view["index"]
    tokens = Tokens(looking.tokens.ids[:index], looking.tokens.probabilities[:index])
    view["branches"] = [*view["branches"], (looking.prompt, tokens, index)][-MAX_BRANCHES:]
    view["line"] = len(looking.record["answers"]) + len(view["branches"]) - 1
    for token in looking.ask("branch", index, token_id, max_new_tokens=MAX_NEW_TOKENS):
        tokens.add(token)
        yield {"words": _words(_Look(models, looking.record, view))}
    view["index"] = min(index, max(0, len(tokens.ids) - 1))  # an end token is none
    yield _shown(_Look(models, looking.record, view))


def _shown(looking: _Look) -> dict[str, Any]:
    """All that the panel shows."""
    shown = {
        "words": _words(looking),
        "rivals": "",
        "section": NO_TOKEN,
        "distribution": "",
        "heat": "",
        "view": looking.view,
    }
    if not looking.tokens.ids:
        return shown
    view, seen, size = looking.view, looking.seen(), looking.record["size"]
    line, tab = view["line"], view["tab"]
    if "layer" not in view:  # the mean of its heads is the clearest
        view["layer"] = int(np.argmax([seen.heat_map(layer).max() for layer in range(len(seen.attention))]))
    layer, head = (looking.number(name, end) for name, end in zip(("layer", "head"), seen.attention.shape))
    shown["rivals"] = drawings.rivals_html(seen, line)
    shown["heat"] = drawings.heat_svg(seen.heat_map(layer, head), size)
    if tab == ATTENTION:
        section = drawings.attention_html(seen, layer, head, line)
    elif tab == LAYERS:
        section = drawings.lens_html(seen.lens, seen.token)
    elif tab == WHAT_IF:
        section = drawings.sliders_html(SLIDERS)
        shown["distribution"] = drawings.distribution_html(seen.distribution(count=drawings.MAX_BARS))
    elif tab == MASK:
        section = drawings.mask_html(seen, looking.texts(looking.tokens))
    elif tab == CACHE:
        can_measure = looking.record["checkpoint"] == EMBEDDED
        section = drawings.cache_html(seen.cache, line, can_measure, view.get("seconds", ()))
    elif tab == ENCODER:
        section = _encoder(looking, shown)
    elif tab == WALK:
        section = drawings.walk_html(next(looking.ask("walk_through")), ROOT, _code_address())
    else:
        raise PaliGemmaError(f"There is no tab {shorten(tab)}; please choose one of {', '.join(TABS)}.")
    shown["section"] = drawings.tabs_html(TABS, tab) + section
    return shown


def _encoder(looking: _Look, shown: dict[str, Any]) -> str:
    """The section about a patch, whose heat map is `shown` instead of the token's."""
    patch, patches = looking.view.get("patch"), looking.vlm.config.vision.num_patches
    seen = next(looking.ask("inspect_encoder", patches // 2 if patch is None else patch))
    layer = looking.number("encoder_layer", len(seen.attention))
    shown["heat"] = drawings.heat_svg(seen.heat_map(layer), looking.record["size"], seen.patch, has_grid=True)
    return drawings.encoder_html(seen, layer)


def _words(looking: _Look) -> str:
    """All answers and branches, as tokens."""
    titles = [prompt for prompt, _ in looking.record["answers"]]
    for _, tokens, index in looking.view["branches"]:
        rival = looking.texts(tokens)[index : index + 1] or ["an end"]
        titles.append(f"What if it were “{rival[0].strip()}”?")
    return drawings.WORDS_TIP + "".join(
        drawings.words_html(
            title,
            number,
            list(zip(looking.texts(tokens), tokens.probabilities)),
            looking.view.get("index") if number == looking.view["line"] else None,
        )
        for number, (title, (_, tokens)) in enumerate(zip(titles, looking.lines))
    )


def _code_address() -> str | None:
    """Where this Space's files can be read, if it is one."""
    space = os.environ.get("SPACE_ID")
    return f"https://huggingface.co/spaces/{space}/blob/main" if space else None
