"""What happens on the page and in its endpoints, without a browser."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from conftest import EXAMPLES, wait_until
from gradio.utils import get_upload_folder
from PIL import Image

from paligemma import PaliGemmaError, hardware
from paligemma.demo import handlers
from paligemma.demo.layout import example_files
from paligemma.demo.serving import EMBEDDED, Models

GREEDY = (64, 0, 0, 1, "")
BOX = "<loc0256><loc0256><loc0768><loc0768>"


@pytest.fixture
def upload(tmp_path, monkeypatch):
    """Put an example into the folder of uploads, as a visitor does; returns what `gr.Image` sends of it."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))

    def put(name):
        path = shutil.copy(EXAMPLES / name, tmp_path)
        return {"path": str(path), "url": f"http://page/file={path}"}

    return put


def test_a_run_clears_what_was_shown_streams_and_ends_with_a_record(models, tiny, upload):
    image = upload("cats.png")
    first, *steps, last = handlers.run(models, image, None, "detect cat\n\n caption en ", EMBEDDED, *GREEDY)
    assert first == {"figure": "", "answers": "", "speed": "", "is_answered": False} | handlers.CLOSED
    assert len([step for step in steps if step.get("figure")]) >= 2, "objects are drawn one after another"
    answers = [(prompt, tiny.generate(image["path"], prompt)) for prompt in ("detect cat", "caption en")]
    assert last["record"]["answers"] == answers
    tokens = list(tiny.stream(image["path"], "detect cat"))
    assert last["record"]["tokens"][0]["ids"] == [token.id for token in tokens]
    assert last["record"]["size"] == Image.open(image["path"]).size
    assert last["is_answered"]
    assert answers[1][1] in steps[-1]["answers"]
    assert steps[-1]["speed"].startswith("First token after")


@pytest.mark.parametrize("example", handlers.EXAMPLES, ids=lambda example: example["prompt"])
def test_the_answers_that_come_with_the_page_are_those_of_the_embedded_checkpoint(tiny, example):
    image = handlers.EXAMPLES_FOLDER / example["picture"]
    tokens = list(tiny.stream(image, example["prompt"], max_new_tokens=handlers.DEFAULT_NEW_TOKENS))
    assert "".join(token.text for token in tokens) == example["answer"]
    assert [token.id for token in tokens] == example["ids"]
    assert [token.probability for token in tokens] == pytest.approx(example["probabilities"], abs=0.01)


def test_a_page_without_the_embedded_checkpoint_shows_its_stored_answers_as_well(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    models, records = Models(["a/b"], lambda source, **_: tiny), handlers.example_records(example_files())
    for record, example in zip(records, handlers.EXAMPLES):
        shown = handlers.show_again(models, record)
        boxes = example["answer"].count("<loc") // 4
        assert shown["figure"].count('class="box"') == boxes
        assert shown["prompt"] == example["prompt"]
    assert json.loads(Path(handlers.save_objects(models, records[0])).read_text())[0]["label"] == "apple"


def test_further_images_come_before_the_prompt_with_the_first(models, tiny, upload):
    image, *others = map(upload, ("cats.png", "music.png", "sign.png"))
    in_gallery = [{"image": other, "caption": None} for other in others]
    *_, step, last = handlers.run(models, image, in_gallery, "caption en", EMBEDDED, *GREEDY)
    answer = tiny.generate([one["path"] for one in (image, *others)], "caption en")
    assert answer != tiny.generate(image["path"], "caption en")
    assert last["record"]["answers"] == [("caption en", answer)]
    assert last["record"]["more"] == [other["path"] for other in others]
    assert step["speed"].endswith("3 pictures, with boxes and masks on the first")
    *_, (text, _) = handlers.generate(models, image, "caption en", more_images=others)
    assert text == answer


def test_a_step_of_an_answer_is_given_as_plain_values(models, tiny, upload):
    image, other = upload("cats.png"), upload("music.png")
    answer = tiny.stream([image["path"], other["path"]], "caption en")
    tokens = list(answer)
    *_, values = handlers.inspect(models, image, "caption en", 3, heads=True, more_images=[other])
    assert values["text"] == "".join(token.text for token in tokens)
    assert [token["id"] for token in values["tokens"]] == answer.token_ids
    expected = json.loads(json.dumps(answer.inspect(3).to_json(with_heads=True)))
    assert json.loads(json.dumps(values["attention"])) == expected["attention"]
    assert values["token"]["id"] == tokens[3].id
    assert values["distribution"][0]["probability"] == 1  # greedy


def test_an_answer_that_was_shown_goes_on_from_another_token(models, tiny, upload):
    path = upload("cats.png")["path"]
    answer = tiny.stream(path, "caption en")
    rival = [list(answer), answer.inspect(1).rivals[0]][1]
    expected = list(answer.branch(1, rival.id))
    models.get(EMBEDDED)
    looking = models.look(EMBEDDED, [Image.open(path)], "caption en", answer.token_ids, "branch", 1, rival.id)
    assert [token.id for token in looking] == [token.id for token in expected]
    with pytest.raises(PaliGemmaError, match="There is no token 99"):
        next(models.look(EMBEDDED, [Image.open(path)], "caption en", answer.token_ids, "inspect", 99))


@pytest.mark.parametrize(
    ("index", "prompt", "sentence"),
    [
        (999, "detect cat", "There is no token 999 in this answer; please give a whole number from 0 to"),
        (None, "detect cat", "There is no token None"),
        (0, "detect cat\nocr", "These are several prompts; please give one."),
        (0, "", "The prompt is empty"),
    ],
)
def test_a_step_that_is_not_there_gets_one_sentence(models, upload, index, prompt, sentence):
    with pytest.raises(PaliGemmaError, match=sentence):
        list(handlers.inspect(models, upload("cats.png"), prompt, index))


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        (5, "^more_images is of type int; please give a list of uploaded files.$"),
        (["cats.png"], "^The picture is not an uploaded file; "),
        ([{"path": "/etc/hostname"}], "^The picture was not uploaded to this page; "),
        ([{"image": {"path": "/etc/hostname"}}], "^The picture was not uploaded to this page; "),
        ([{"video": {"path": "/etc/hostname"}}], "^There is no picture yet; "),
        ([None] * handlers.MAX_IMAGES, "^These are 9 pictures; please give at most 8.$"),
    ],
)
def test_further_images_that_cannot_be_taken_get_one_sentence(models, upload, others, sentence):
    with pytest.raises(PaliGemmaError, match=sentence):
        next(handlers.generate(models, upload("cats.png"), "caption en", more_images=others))


def test_an_earlier_answer_comes_back_and_can_be_saved(models, upload):
    image = upload("cats.png")
    width, height = Image.open(image["path"]).size
    record = {"path": image["path"], "size": (width, height), "checkpoint": EMBEDDED, "tokens": []}
    record |= {"answers": [["detect cat", f"{BOX} cat"]], "more": [image["path"]]}
    shown = handlers.show_again(models, record)
    assert (shown["image"], shown["more_images"]) == (image["path"], record["more"])
    assert shown["prompt"] == "detect cat"
    assert "cat</b>" in shown["answers"]
    assert 'data-object="0"' in shown["figure"]
    box = [width // 4, height // 4, 3 * width // 4, 3 * height // 4]
    objects = json.loads(Path(handlers.save_objects(models, record)).read_text())
    assert objects == [{"label": "cat", "box": box, "mask": None}]
    assert Image.open(handlers.save_image(models, record)).size == (width, height)
    Path(image["path"]).unlink()
    for event in (handlers.save_image, handlers.show_again):
        with pytest.raises(PaliGemmaError, match="The picture cats.png was deleted meanwhile"):
            event(models, record)
    assert json.loads(Path(handlers.save_objects(models, record)).read_text()) == objects


@pytest.mark.parametrize("name", ["path", "more"])
@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("/etc/hostname", "The picture was not uploaded to this page"),
        ("{folder}/../x.png", "The picture was not uploaded to this page"),
        ("{folder}/a\0b.png", "The picture was not uploaded to this page"),
        ("{folder}", "is a folder; please choose a picture"),
        ("{folder}/missing.png", "The picture missing.png was deleted meanwhile"),
    ],
)
def test_no_path_that_a_browser_has_kept_leads_out_of_the_uploads(models, upload, tmp_path, name, path, sentence):
    record = {"path": upload("cats.png")["path"], "more": [], "size": [448, 448], "checkpoint": EMBEDDED}
    record |= {"answers": [["detect cat", f"{BOX} cat"]], "tokens": []}
    path = path.replace("{folder}", str(tmp_path))
    record |= {name: path if name == "path" else [path]}
    with pytest.raises(PaliGemmaError, match=sentence):
        handlers.show_again(models, record)


@pytest.mark.parametrize(
    ("typed", "seed"),
    [(None, None), ("", None), (" ", None), ("5", 5), (" 7 ", 7), (5, 5), ("-1", "-1"), ("x", "x"), ("1" * 5000,) * 2],
)
def test_a_seed_is_read_as_it_is_typed(typed, seed):
    assert handlers.read_settings((64, 0, 0, 1, typed))["seed"] == seed


@pytest.mark.parametrize(
    ("query", "fields"),
    [
        ({}, {}),
        ({"prompt": "detect cat", "checkpoint": "a/b"}, {"prompt": "detect cat", "checkpoint": "a/b"}),
        ({"prompt": "x" * 9000, "checkpoint": "another"}, {"prompt": "x" * handlers.MAX_LINK_CHARACTERS}),
        (
            {"max_new_tokens": "77", "temperature": "0.5", "top_k": "3", "top_p": "1", "seed": "5"},
            {"max_new_tokens": 77, "temperature": 0.5, "top_k": 3, "top_p": 1, "seed": 5},
        ),
        *(
            ({"seed": seed, "top_k": "3"}, {"top_k": 3})
            for seed in ("inf", "nan", "1e400", str(2**64), "-1", "1.5", "")
        ),
        ({"max_new_tokens": "many", "temperature": "3", "top_p": "nan"}, {}),
        ({"max_new_tokens": "-1", "top_k": "0.5", "top_p": "-inf", "x": "1"}, {}),
    ],
)
def test_of_a_link_only_what_the_page_can_hold_is_taken(query, fields):
    assert handlers.read_link(query, [EMBEDDED, "a/b"]) == fields


def test_a_prompt_is_described_by_its_task_and_what_the_checkpoint_speaks():
    assert handlers.describe_prompt("caption en", EMBEDDED)["has_language"] is False
    described = handlers.describe_prompt("caption de", "a/b")
    assert (described["task"], described["has_language"]) == ("Caption", True)
    described = handlers.describe_prompt("is this a cat?", "a/b")
    assert (described["task"], described["has_language"]) == (None, False)
    assert "free question" in described["hint"]
    assert handlers.choose_task("Caption", "de") == "caption de"


def test_a_scene_is_a_new_image_each_time():
    first, second = handlers.draw_scene(), handlers.draw_scene()
    assert first.size == second.size == (handlers.SCENE_SIZE, handlers.SCENE_SIZE)
    assert first.tobytes() != second.tobytes()


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (None, "There is no picture yet"),
        ({"path": None, "url": "http://x/y.png"}, "There is no picture yet"),
        ("cats.png", "The picture is not an uploaded file"),
        (["cats.png"], "The picture is not an uploaded file"),
        ({"path": 5}, "The picture is not an uploaded file"),
        ({"path": "/etc/hostname"}, "The picture was not uploaded to this page"),
        ({"path": "{folder}/../x.png"}, "The picture was not uploaded to this page"),
        ({"path": "{folder}/a\0b.png"}, "The picture was not uploaded to this page"),
        ({"path": "{folder}/missing.png"}, "missing.png"),
        ({"path": "{folder}/" + "x" * 5000}, "xxx"),
    ],
)
def test_an_image_that_cannot_be_opened_gets_one_sentence(models, image, sentence):
    if isinstance(image, dict) and isinstance(image["path"], str):
        image = {"path": image["path"].replace("{folder}", get_upload_folder())}
    with pytest.raises(PaliGemmaError, match=sentence):
        next(handlers.caption(models, image))


@pytest.mark.parametrize("language", ["en\ndetect cat", "xx", "", None, ["en"], "e" * 5000])
def test_a_language_that_is_none_is_refused(models, upload, language):
    with pytest.raises(PaliGemmaError, match=r"^language is [\s\S]{,50}; please give one of ar, bn, "):
        next(handlers.caption(models, upload("cats.png"), language))


@pytest.mark.parametrize("checkpoint", [None, ["embedded"], {}, "another"])
def test_a_checkpoint_that_is_not_offered_is_refused(models, upload, checkpoint):
    with pytest.raises(PaliGemmaError, match="^The checkpoint .* is not offered here; please choose one of embedded"):
        list(handlers.run(models, upload("cats.png"), None, "caption en", checkpoint, *GREEDY))


@pytest.mark.parametrize("number", [0, -1, 257, 1.5, "many", None, 10**400, float("nan")])
def test_a_length_is_refused_with_the_range_of_the_page(models, upload, number):
    with pytest.raises(PaliGemmaError, match="^max_new_tokens is .*; please give a whole number from 1 to 256.$"):
        list(handlers.generate(models, upload("cats.png"), "caption en", number))


def test_more_prompts_than_a_page_takes_are_refused(models, upload):
    with pytest.raises(PaliGemmaError, match="^These are 9 prompts; please ask at most 8 at once.$"):
        list(handlers.generate(models, upload("cats.png"), "ocr\n" * 9))


def test_a_long_prompt_is_refused_before_it_is_split_into_tokens(models, upload):
    start = time.process_time()
    with pytest.raises(PaliGemmaError, match="^The prompt has 4000000 characters, but this page takes 4096; please "):
        list(handlers.generate(models, upload("cats.png"), "x" * 4_000_000))
    assert time.process_time() - start < 1


@pytest.mark.parametrize("prompt", ["cat " * 600, "cat " * 1000])
def test_a_prompt_of_many_tokens_is_refused_with_the_range_of_the_page(models, upload, prompt):
    with pytest.raises(PaliGemmaError, match=r"^The prompt has \d+ tokens, but 512 fit; please shorten it.$"):
        list(handlers.generate(models, upload("cats.png"), prompt))


@pytest.mark.parametrize("prompt", [None, 5, ["caption en"], {"a": 1}])
def test_a_prompt_must_be_a_text(models, upload, prompt):
    with pytest.raises(PaliGemmaError, match="^The prompt is of type .*; please give text.$"):
        list(handlers.generate(models, upload("cats.png"), prompt))


@pytest.mark.parametrize("objects", [None, 5, ["cat"], "cat\ncaption en"])
def test_what_to_find_must_be_a_text(models, objects):
    for endpoint in (handlers.detect, handlers.segment):
        with pytest.raises(PaliGemmaError, match=r"^objects is [\s\S]*; please give a text of one line"):
            next(endpoint(models, {"path": "x"}, objects))


def test_of_images_that_nobody_waits_for_few_are_being_read_and_soon_none(models, upload, monkeypatch):
    monkeypatch.setattr(handlers, "STATUS_SECONDS", 0.01)
    image = upload("cats.png")
    Image.new("RGB", (7000, 7000)).save(image["path"], "JPEG", progressive=True)  # a second or so each
    runs = [handlers.run(models, image, None, "caption en", EMBEDDED, *GREEDY) for _ in range(30)]
    assert all(next(run) == {} for run in runs)
    readers = [thread for thread in threading.enumerate() if thread.name.startswith("reader")]
    assert len(readers) == handlers.MAX_READERS
    for run in runs:
        run.close()
    start = time.process_time()
    assert handlers._readers.submit(lambda: True).result(timeout=20)
    time.sleep(1)
    assert time.process_time() - start < 2


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is another one")
def test_what_an_image_took_is_given_back_though_no_answer_follows(models, upload, monkeypatch):
    monkeypatch.setattr(hardware, "IDLE_SECONDS", 0.2)
    hardware.keep_freed_memory()
    image, process = upload("cats.png"), psutil.Process()
    Image.new("RGB", (6000, 6000)).save(image["path"])
    before = process.memory_info().rss
    opened, _ = handlers.result(handlers.open_upload(image, None))
    assert process.memory_info().rss > before + 80e6
    del opened
    wait_until(lambda: process.memory_info().rss < before + 20e6, seconds=10)


def test_large_images_are_read_when_others_are_done_with(upload, monkeypatch):
    monkeypatch.setattr(handlers, "STATUS_SECONDS", 0.01)
    monkeypatch.setattr(handlers, "MAX_HELD_PIXELS", 100)
    image = upload("cats.png")
    (opened, _), second = handlers.result(handlers.open_upload(image, None)), handlers.open_upload(image, "meanwhile")
    assert [next(second) for _ in range(50)] == ["meanwhile"] * 50
    del opened
    start = time.monotonic()
    assert handlers.result(second)[0].size == Image.open(image["path"]).size
    assert time.monotonic() - start < handlers.MAX_HELD_SECONDS / 2


def test_a_folder_is_no_image(models, upload, tmp_path):
    with pytest.raises(PaliGemmaError, match="is a folder"):
        next(handlers.caption(models, {"path": str(tmp_path)}))
