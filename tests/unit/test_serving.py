"""Checkpoints come and go as they are needed, and each answer leaves one line in the log."""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import EXAMPLES, Watched, wait_until
from PIL import Image

from paligemma import PaliGemmaError, hardware
from paligemma.demo.serving import EMBEDDED, ON_STOP, Answer, Models, answer_prompts
from paligemma.demo.streaming import Answering

IMAGE = Image.open(EXAMPLES / "cats.png")
GIGABYTE = 2**30


class Machine:
    """Memory for so many gigabytes of checkpoints, and what was loaded into it, in order."""

    def __init__(self, capacity, tiny):
        self.tiny, self.loaded = tiny, []
        self.models = Models(["a", "b", "c"], self.load, lambda: (capacity - len(self.here)) * GIGABYTE)

    @property
    def here(self):
        return [name for name in self.models.names if self.models.loaded(name)]

    def load(self, source, progress, make_room):
        make_room(GIGABYTE)
        self.loaded.append(source)
        return self.tiny

    def use(self, name):
        with self.models.use(name):
            return self.models.get(name)


def test_a_checkpoint_is_loaded_once_when_it_is_first_used(tiny):
    machine = Machine(3, tiny)
    assert machine.here == []
    for name in ("b", "b", "a", "b"):
        assert machine.use(name) is tiny
    assert machine.loaded == ["b", "a"]
    assert machine.here == ["a", "b"]


def test_the_least_recently_used_is_unloaded_for_another(tiny):
    machine = Machine(2, tiny)
    for name in ("a", "b", "a", "c"):
        machine.use(name)
    assert machine.here == ["a", "c"]
    machine.use("b")
    assert machine.loaded == ["a", "b", "c", "b"]
    assert machine.here == ["b", "c"]


def test_what_is_being_used_stays(tiny):
    machine = Machine(1, tiny)
    with machine.models.use("a"):
        machine.models.get("a")
        machine.use("b")
        assert machine.here == ["a", "b"], "memory is short, but there is an answer under way"
    machine.use("c")
    assert machine.here == ["c"]


def test_checkpoints_that_are_loaded_at_the_start_stay_and_one_that_failed_is_not_tried_again(tiny):
    machine, loading_threads = Machine(1, tiny), []
    load = machine.load

    def fail_b(source, **callbacks):
        loading_threads.append(threading.current_thread())
        if source == "b":
            raise PaliGemmaError("There is no b; please choose another.")
        return load(source, **callbacks)

    machine.models = Models(machine.models.names, fail_b, lambda: 0)
    machine.models.load_all()
    assert machine.here == ["a", "c"]
    assert loading_threads == [threading.main_thread()] * 3
    for _ in range(2):
        with pytest.raises(PaliGemmaError, match="There is no b"):
            machine.use("b")
    assert machine.models.status("b") == "There is no b; please choose another."
    assert len(loading_threads) == 3


def test_a_gpu_that_torch_cannot_use_is_in_the_status_and_in_the_log(tiny, monkeypatch, caplog):
    monkeypatch.setattr(hardware, "unused_gpu", lambda: "This GPU cannot be used; please update its driver.")
    models = Models([None], lambda source, **_: tiny)
    models.get(EMBEDDED)
    assert models.status(EMBEDDED) == "It runs in float32 on cpu. This GPU cannot be used; please update its driver."
    assert "please update its driver" in caplog.text


def test_who_waits_sees_how_far_the_loading_is_and_a_failure_is_tried_again(tiny):
    go_on, attempts = threading.Event(), []

    def load(source, progress, make_room):
        attempts.append(source)
        progress("Reading the weights", 0.42)
        assert go_on.wait(60)
        if len(attempts) == 1:
            raise PaliGemmaError("There is no such checkpoint; please choose another.")
        return tiny

    models = Models([None], load)
    assert models.names == [EMBEDDED]
    statuses = models.wait(EMBEDDED)
    assert "Loading the model" in next(statuses)
    wait_until(lambda: "Reading the weights 42%" in models.status(EMBEDDED))
    go_on.set()
    assert all("Loading" in line for line in statuses)
    assert models.status(EMBEDDED) == "There is no such checkpoint; please choose another."
    assert models.loaded(EMBEDDED) is None
    assert models.get(EMBEDDED) is tiny
    assert attempts == [None, None]


def test_an_unknown_checkpoint_is_named():
    with pytest.raises(PaliGemmaError, match="The checkpoint x is not offered here; please choose one of a, b."):
        Models(["a", "b"], None).get("x")


def test_after_closing_nobody_begins_but_who_began_may_finish(tiny):
    machine = Machine(3, tiny)
    with machine.models.use("a"):
        machine.models.close()
        assert machine.models.get("a") is tiny
        with pytest.raises(PaliGemmaError, match="ask again in a minute"):
            machine.use("a")


def test_prompts_are_answered_together_and_the_image_is_encoded_once(tiny, nothing_kept, monkeypatch):
    encoded = []
    image_features = tiny.model.image_features
    monkeypatch.setattr(
        tiny.model, "image_features", lambda *arguments: encoded.append(1) or image_features(*arguments)
    )
    tiny.engine.prefill._features.clear()
    prompts = ["caption en", "detect cat"]
    steps = [
        [(answer.text, answer.is_finished) for answer in answers]
        for answers in answer_prompts(tiny, [IMAGE], prompts, {})
    ]
    assert steps[0] == [("", False)] * 2
    assert steps[-1] == [(tiny.generate(IMAGE, prompt), True) for prompt in prompts]
    lengths = [sum(len(text) for text, _ in step) for step in steps]
    assert lengths == sorted(lengths)
    assert len(encoded) == 1


def test_large_images_are_not_kept_while_an_answer_is_made(tiny):
    images = [IMAGE.copy()]
    image = weakref.ref(images[0])
    answers = answer_prompts(tiny, images, ["caption en"], {})
    next(answers)
    assert image() is None
    assert list(answers)[-1][0].text == tiny.generate(IMAGE, "caption en")


def test_a_bad_prompt_among_several_is_found_before_the_first_answer(tiny):
    with pytest.raises(PaliGemmaError, match="prompt is empty"):
        next(answer_prompts(tiny, [IMAGE], ["caption en", ""], {}))


def test_each_answer_leaves_one_line_without_its_content(tiny, caplog):
    with caplog.at_level(logging.INFO, logger="paligemma"):
        list(answer_prompts(tiny, [IMAGE], ["detect cat", "is this a secret?"], {}))
        growing = answer_prompts(Watched(tiny), [IMAGE], ["caption en"], {})
        next(growing), next(growing)
        growing.close()
    first, second, third = (record.getMessage() for record in caplog.records)
    width, height = IMAGE.size
    assert first.startswith(f"task=detect picture={width}x{height} prompt_characters=10 tokens=")
    assert first.endswith("outcome=finished")
    assert "first_token=" in first
    assert "tokens_per_second=" in first
    assert second.startswith("task=question")
    assert third.endswith("tokens=1 first_token=" + third.split("first_token=")[1])
    assert third.endswith("outcome=stopped")
    assert "secret" not in caplog.text
    assert "cats" not in caplog.text


def test_closing_an_answer_ends_what_its_thread_waits_for():
    is_stopped, is_closed = threading.Event(), threading.Event()

    def steps():
        ON_STOP.get().append(is_stopped.set)
        try:
            yield 1
            assert is_stopped.wait(5)
            yield 2
        finally:
            is_closed.set()

    async def answer():
        answering = Answering(steps())
        assert await answering.next() == 1
        waiting = asyncio.create_task(answering.next())
        await asyncio.sleep(0.05)
        answering.close()
        await waiting

    with ThreadPoolExecutor(1) as thread:  # where no loop of Playwright's runs
        thread.submit(asyncio.run, answer()).result()
    assert is_closed.wait(5)


def test_an_earlier_answer_is_read_again():
    answer = Answer.of("detect cat", "<loc0256><loc0128><loc0512><loc0768> cat ; <loc0001>")
    assert [found.label for found in answer.annotated.detections] == ["cat"]
    assert answer.annotated.problems == ["a box of 1 instead of 4 locations"]
    assert answer.is_finished
