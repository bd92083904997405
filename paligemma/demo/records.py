"""Answers as browsers keep them: plain values, which may have been changed by anybody when they come back.

They hold no picture, so the server needs no place for them; the page's script adds a small copy of the picture, which
stays in the browser until the server's own is gone.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any, TypeGuard

from ..config import PaliGemmaError, is_number
from .serving import Tokens

MAX_PIXELS = 60_000_000
MAX_IMAGES = 8
MAX_PROMPTS = 8
MAX_PROMPT_TOKENS = 512
MAX_PROMPT_CHARACTERS = 8 * MAX_PROMPT_TOKENS  # checked first: to split a text into tokens takes time
MAX_NEW_TOKENS = 256
MAX_ANSWER_CHARACTERS = 64 * MAX_NEW_TOKENS
MAX_PATH_CHARACTERS = 1000
FORGOTTEN = "This answer is forgotten; please choose one of those below, or ask again."

# `path` and `size` (width, height) of the first image, `more`, the paths of others, `checkpoint`, `answers`, pairs of a
# prompt and the text that answers it, and the `tokens` of each with `ids` and `probabilities`, or none at all.
Record = dict[str, Any]


def plain_tokens(tokens: Tokens) -> dict[str, list]:
    """Tokens as a record holds them."""
    return {"ids": tokens.ids.tolist(), "probabilities": [round(one, 4) for one in tokens.probabilities]}


def read_record(value: object) -> Record:
    """A record that comes back from a browser, with `Tokens` and nothing that no answer of the page has.

    Its paths are only known to be texts: whoever opens one has to see to it that it is an upload.

    Raises:
        PaliGemmaError: it is none, or longer or larger than an answer of the page can be.
    """
    if not isinstance(value, dict):
        raise PaliGemmaError(FORGOTTEN)
    answers, tokens = value.get("answers"), value.get("tokens")
    if not (
        _is_text(value.get("path"), MAX_PATH_CHARACTERS)
        and _is_list(value.get("more"), MAX_IMAGES - 1, lambda path: _is_text(path, MAX_PATH_CHARACTERS))
        and _is_size(value.get("size"))
        and _is_text(value.get("checkpoint"), MAX_PATH_CHARACTERS)
        and _is_list(answers, MAX_PROMPTS, _is_answer)
        and _is_list(tokens, MAX_PROMPTS, _are_tokens)
        and len(tokens) in (0, len(answers))
    ):
        raise PaliGemmaError(FORGOTTEN)
    return {
        "path": value["path"],
        "more": list(value["more"]),
        "size": tuple(map(int, value["size"])),
        "checkpoint": value["checkpoint"],
        "answers": [(prompt, text) for prompt, text in answers],
        "tokens": [
            Tokens(array("i", map(int, one["ids"])), array("f", map(float, one["probabilities"]))) for one in tokens
        ],
    }


def _is_text(value: object, longest: int) -> bool:
    return isinstance(value, str) and len(value) <= longest


def _is_list(value: object, longest: int, is_one: Callable[[Any], bool]) -> TypeGuard[list[Any]]:
    return isinstance(value, (list, tuple)) and len(value) <= longest and all(map(is_one, value))


def _is_size(value: object) -> bool:
    """Whether it is a width and a height of an image that the page takes."""
    return (
        _is_list(value, 2, lambda side: is_number(side, whole=True) and 1 <= side <= MAX_PIXELS)
        and len(value) == 2
        and value[0] * value[1] <= MAX_PIXELS
    )


def _is_answer(value: object) -> bool:
    """Whether it is a prompt and a text, of no more tokens than an answer can have as far as can be seen."""
    return (
        _is_list(value, 2, lambda text: isinstance(text, str))
        and len(value) == 2
        and len(value[0]) <= MAX_PROMPT_CHARACTERS
        and len(value[1]) <= MAX_ANSWER_CHARACTERS
        and value[1].count("<loc") + value[1].count("<seg") <= MAX_NEW_TOKENS  # each of them costs work
    )


def _are_tokens(value: object) -> bool:
    """Whether it holds ids that an int32 holds, and as many probabilities."""
    return (
        isinstance(value, dict)
        and _is_list(value.get("ids"), MAX_NEW_TOKENS, lambda one: is_number(one, whole=True) and 0 <= one < 2**31)
        and _is_list(value.get("probabilities"), MAX_NEW_TOKENS, lambda one: is_number(one) and 0 <= one <= 1)
        and len(value["ids"]) == len(value["probabilities"])
    )
