"""Prompts are in the official syntax."""

from __future__ import annotations

import pytest

from paligemma.prompts import LANGUAGES, TASKS, detect_prompt, segment_prompt, task_of


def test_prompts_of_the_tasks():
    assert [task.prompt() for task in TASKS] == [
        "caption en",
        "describe en",
        "answer en how many cats are there?",
        "detect cat ; dog",
        "segment cat",
        "ocr",
    ]
    assert TASKS[0].prompt("de") == "caption de"
    assert TASKS[3].prompt("de") == "detect cat ; dog"
    assert len(LANGUAGES) == 35


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_task_is_known_by_its_prompt(task):
    assert task_of(task.prompt("fr")) is task


@pytest.mark.parametrize("prompt", ["", "  ", "what is this?", "captions"])
def test_free_questions_are_no_task(prompt):
    assert task_of(prompt) is None


@pytest.mark.parametrize("objects", ["cat ; dog", "cat;dog", "cat, dog", "cat\ndog", " cat ;; dog ;"])
def test_kinds_may_be_separated_as_people_do(objects):
    assert detect_prompt(objects) == "detect cat ; dog"
    assert segment_prompt(objects) == "segment cat ; dog"
