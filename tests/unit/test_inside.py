"""The panel “See inside”, without a browser."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from paligemma import PaliGemmaError
from paligemma.demo import drawings, handlers, inside
from paligemma.demo.layout import example_files
from paligemma.demo.serving import EMBEDDED, Models
from paligemma.inspection import WalkStep


@pytest.fixture
def record(tmp_path, monkeypatch):
    """The stored answer to `detect apple ; banana`."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    return handlers.example_records(example_files())[0]


@pytest.fixture
def seen(tiny, record):
    """What its first label's step was like, from the model itself."""
    example = handlers.EXAMPLES[0]
    return tiny.resume(record["path"], example["prompt"], example["ids"]).inspect(4)


def opened(models, record):
    *_, shown = inside.toggle(models, record, {})
    return shown


def show(models, record, view, **choice):
    *_, shown = inside.look(models, record, view, choice)
    return shown


def names(html):
    """The tokens of a list of bars, and their notes."""
    return re.findall(r"<span>(?:<b>\d+</b> )?(.*?)</span>.*?<small>(.*?)</small>", unescape(html))


def written(token):
    """A token as the panel writes it."""
    return token.text.replace(" ", "␣").replace("\n", "⏎")


def test_the_panel_opens_at_a_word_with_its_rivals_and_the_clearest_layer(models, record, seen):
    shown = opened(models, record)
    assert shown["view"]["index"] == 4
    tokens = [seen.token, *seen.rivals]
    assert names(shown["rivals"]) == [(written(one), f"{100 * one.probability:.1f} %") for one in tokens]
    layer = shown["view"]["layer"]
    assert seen.heat_map(layer).max() == max(seen.heat_map(one).max() for one in range(6))
    assert (
        f"layer {layer + 1} attended most: one patch has {100 * seen.heat_map(layer).max():.1f} %" in shown["section"]
    )
    layers, heads, _ = seen.attention.shape
    assert shown["section"].count("<img") == layers * (heads + 1)
    assert shown["words"].count("<button") == len(handlers.EXAMPLES[0]["ids"])
    assert shown["words"].count('aria-pressed="true"') == 1
    assert shown["heat"].startswith("<svg")
    closed = list(inside.toggle(models, record, shown["view"]))
    assert closed == [handlers.CLOSED]


def test_of_a_layer_and_head_the_shares_of_picture_prompt_and_answer_are_shown(models, record, seen):
    section = show(models, record, opened(models, record)["view"], layer=2, head=1)["section"]
    attention = seen.attention[2, 1]
    shares = [float(attention[span.start : span.end].sum()) for span in seen.spans]
    assert names(section)[:3] == [
        (name, f"{100 * share:.1f} %") for name, share in zip(("Picture", "Prompt", "Answer so far"), shares)
    ]


def test_each_section_shows_what_the_inspection_found(models, record, seen, tiny):
    view = opened(models, record)["view"]
    sections = {tab: show(models, record, view, tab=tab) for tab in inside.TABS}
    ladder = names(sections[inside.LAYERS]["section"])
    assert [name for name, _ in ladder] == [written(one) for one in reversed(seen.lens)]
    assert ladder[0][1] == f"{100 * seen.token.probability:.1f} %"
    likeliest = seen.distribution(count=24)
    assert [name for name, _ in names(sections[inside.WHAT_IF]["distribution"])][0] == likeliest[0].text.replace(
        " ", "␣"
    )
    mask = sections[inside.MASK]["section"]
    tokens = len(handlers.EXAMPLES[0]["ids"])
    assert mask.count("sees positions 0 to") == tokens
    assert f"Position {263 + tokens - 1}" in mask
    cache = sections[inside.CACHE]["section"]
    assert f"<td>{seen.cache.positions}</td>" in cache
    assert f"{seen.cache.operations_without_cache / seen.cache.operations:.1f} times as many" in cache
    patch = tiny.inspect_encoder(record["path"], 128)
    assert sections[inside.ENCODER]["section"].count("<img") == len(patch.attention)
    assert 'data-rows="16"' in sections[inside.ENCODER]["heat"]
    walk = sections[inside.WALK]["section"]
    assert walk.count("<li>") == 7
    assert "def image_features" in walk, "the lines of code"


def test_an_answer_goes_on_from_a_rival_beside_the_other(models, record, seen, tiny):
    view, rival = opened(models, record)["view"], seen.rivals[0]
    *steps, shown = inside.look(models, record, view, {"line": 0, "index": 4, "rival": rival.id})
    ids = handlers.EXAMPLES[0]["ids"]
    answer = tiny.resume(record["path"], "detect apple ; banana", ids).branch(4, rival.id, max_new_tokens=256)
    expected = [*ids[:4], *(token.id for token in answer)]
    ((_, tokens, _),) = shown["view"]["branches"]
    assert tokens.ids.tolist() == expected
    assert tokens.probabilities[:5].tolist() == pytest.approx(
        [*handlers.EXAMPLES[0]["probabilities"][:4], rival.probability], abs=1e-5
    )
    assert len(steps) == len(expected) - 4, "it streams"
    assert f"What if it were “{rival.text.strip()}”?" in shown["words"]
    assert (shown["view"]["line"], shown["view"]["index"]) == (1, 4)
    assert names(shown["rivals"])[0][0] == written(rival)
    back = show(models, record, shown["view"], line=0, index=0)
    assert names(back["rivals"])[0][0] == tiny.processor.token_text(ids[0])
    view = back["view"]
    for _ in range(inside.MAX_BRANCHES):
        view = show(models, record, view, line=0, index=4, rival=rival.id)["view"]
    assert len(view["branches"]) == inside.MAX_BRANCHES


def test_settings_cut_tokens_off(models, record, seen):
    view = opened(models, record)["view"]
    html = inside.redraw(models, record, view, {"temperature": 1, "top_k": 2, "top_p": 1})["distribution"]
    notes = [note for _, note in names(html)]
    assert "cut off" not in notes[:2]
    assert set(notes[2:]) == {"cut off"}
    with pytest.raises(PaliGemmaError, match="top_p"):
        inside.redraw(models, record, view, {"temperature": 1, "top_k": 2, "top_p": 7})


def test_a_token_that_is_pointed_at_shows_its_rivals_alone(models, record, tiny):
    shown = inside.peek(models, record, opened(models, record)["view"], {"line": 0, "index": 20})
    assert list(shown) == ["rivals"]
    assert names(shown["rivals"])[0][0] == "␣banana"


def test_the_times_without_a_cache_are_measured_when_asked_for(models, record):
    number, example = min(enumerate(handlers.EXAMPLES), key=lambda one: len(one[1]["ids"]))
    record = handlers.example_records(example_files())[number]
    view = show(models, record, opened(models, record)["view"], tab=inside.CACHE)["view"]
    shown = show(models, record, view, line=0, measure=True)
    assert len(shown["view"]["seconds"]) == len(example["ids"])
    assert "tokens without a cache:" in shown["section"]
    assert "seconds" not in show(models, record, shown["view"], line=0, index=0)["view"], "they are of one answer"


def test_the_time_with_a_cache_is_that_of_all_tokens_also_of_those_without_a_bar(seen):
    cache = replace(seen.cache, prefill_seconds=1.0, step_seconds=(0.1,) * 99)
    html = drawings.cache_html(cache, 0, True, [2.0] * 100)
    assert "All 100 tokens without a cache: 200.00 s, with it 10.90 s." in html
    assert [name for name, _ in names(html)] == [
        "prefill", *(f"token {number}" for number in range(2, drawings.MAX_BARS + 1)), "a token without a cache"
    ]  # fmt: skip


def test_what_people_and_models_write_is_no_markup(seen):
    text = '<script>" onerror="y&'
    token = replace(seen.token, text=text)
    seen = replace(seen, token=token, rivals=(token,), texts=(text,) * len(seen.texts))
    step = WalkStep(text, text, (1,), (1.0,), "app.py", 1, text)
    html = (
        drawings.words_html(text, 0, [(text, 0.5)], 0)
        + drawings.rivals_html(seen, 0)
        + drawings.attention_html(seen, 0, 0, 0)
        + drawings.lens_html([replace(seen.lens[0], text=text)], token)
        + drawings.distribution_html([token])
        + drawings.mask_html(seen, [text] * 99)
        + drawings.walk_html([step], ROOT, None)
    )
    assert "<script" not in html.lower()
    assert 'onerror="' not in html


@pytest.mark.parametrize("shape", [(4, 4), (4, 8)])
def test_the_heat_map_is_bright_at_the_patch_that_is_attended_to(shape):
    shares = np.zeros(shape, np.float32)
    shares[1, 2] = 1
    svg = drawings.heat_svg(shares, (80, 40), patch=shape[1] + 2, has_grid=True)
    with Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", svg)[1]))) as image:
        opacity = np.asarray(image)[..., 3].astype(int)
    row, column = np.unravel_index(opacity.argmin(), opacity.shape)
    assert (row * shape[0] // len(opacity), column * shape[1] // opacity.shape[1]) == (1, 2)
    width, height = 80 / shape[1], 40 / shape[0]
    assert f'class="patch" x="{2 * width:.1f}" y="{height:.1f}" width="{width:.1f}" height="{height:.1f}"' in svg
    assert svg.count("h80") == shape[0] - 1
    assert svg.count("v40") == shape[1] - 1


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ({"index": 99}, "^index is 99; please choose"),
        ({"index": "4"}, "^index is 4; please choose"),
        ({"line": 1}, "^line is 1; please choose"),
        ({"layer": -1}, "^layer is -1; please choose"),
        ({"layer": 0, "head": 4}, "^head is 4; please choose"),
        ({"tab": "Attic"}, "^There is no tab Attic; please"),
        ({"tab": "Encoder", "patch": 256}, "^patch is 256; please give"),
        ({"rival": 10**6}, "^token_id is 1000000; please give"),
    ],
)
def test_what_the_panel_does_not_show_cannot_be_chosen(models, record, choice, sentence):
    with pytest.raises(PaliGemmaError, match=sentence):
        show(models, record, {}, **choice)


def test_answers_that_cannot_be_looked_into_get_one_sentence(models, record, tiny):
    with pytest.raises(PaliGemmaError, match="is forgotten"):
        list(inside.toggle(models, {}, {}))
    others = Models(["a/b"], lambda source, **_: tiny)
    with pytest.raises(
        PaliGemmaError, match="is of a checkpoint that this page does not offer; please press Run first"
    ):
        list(inside.toggle(others, record, {}))
    *_, last = handlers.run(models, {"path": record["path"]}, None, "detect cat", EMBEDDED, 64, 0, 0, 1, "")
    assert not last["record"]["tokens"][0]["ids"]
    assert "This answer is empty" in opened(models, last["record"])["section"]
