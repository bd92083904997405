"""What a checkpoint can be asked, in the syntax that it was trained on (arXiv 2407.07726, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

ENGLISH = "en"
# Those of COCO-35L, which the official checkpoints learned to caption and to answer in, by their codes.
LANGUAGES = {
    "ar": "Arabic", "bn": "Bengali", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English",
    "es": "Spanish", "fa": "Persian", "fi": "Finnish", "fil": "Filipino", "fr": "French", "hi": "Hindi",
    "hr": "Croatian", "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "iw": "Hebrew", "ja": "Japanese",
    "ko": "Korean", "mi": "Maori", "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese",
    "ro": "Romanian", "ru": "Russian", "sv": "Swedish", "sw": "Swahili", "te": "Telugu", "th": "Thai",
    "tr": "Turkish", "uk": "Ukrainian", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One thing to ask for.

    name: as a choice. word: the first of its prompts. example: what follows it. hint: how to write others.
    """

    name: str
    word: str
    example: str
    hint: str
    has_language: bool = False

    def prompt(self, language: str = ENGLISH) -> str:
        """A prompt that can be run as it is."""
        return " ".join(filter(None, (self.word, language if self.has_language else "", self.example)))


TASKS = (
    Task("Caption", "caption", "", "One sentence about the whole picture.", has_language=True),
    Task("Describe", "describe", "", "More about it: sizes, colors, places.", has_language=True),
    Task("Ask", "answer", "how many cats are there?", "Write your own question after `answer en`.", has_language=True),
    Task("Detect", "detect", "cat ; dog", "Draws boxes. Name one kind, or several with ` ; ` between them."),
    Task("Segment", "segment", "cat", "Draws outlines. Name one kind, or several with ` ; ` between them."),
    Task("Read", "ocr", "", "Reads the word in the picture."),
)


def task_of(prompt: str) -> Task | None:
    """The task that a prompt asks for; None of a free question."""
    first_word = prompt.split(maxsplit=1)[:1]
    return next((task for task in TASKS if [task.word] == first_word), None)


def detect_prompt(objects: str) -> str:
    """The prompt that asks for boxes of all `objects`, written as `cat, dog`, `cat; dog` or one a line."""
    return f"detect {_separated(objects)}"


def segment_prompt(objects: str) -> str:
    """The prompt that asks for masks, see `detect_prompt`."""
    return f"segment {_separated(objects)}"


def _separated(objects: str) -> str:
    for separator in ",\n":
        objects = objects.replace(separator, ";")
    return " ; ".join(filter(None, map(str.strip, objects.split(";"))))
