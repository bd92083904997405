"""The real page on a real server: in headless Chromium, and through the Gradio client as other programs use it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pytest
from conftest import EXAMPLES, Watched, write_png_that_claims
from gradio_client import Client, handle_file
from PIL import Image
from playwright.sync_api import expect

import app
import paligemma

PICTURE = EXAMPLES / "cats.png"
# The one under way, and one that may end while the news travels.
ONE_TOKEN = 2
FIRST_TOKEN = re.compile(r"First token after [\d.]+ s")


@pytest.fixture
def open_page(browser):
    """A function that opens an address in a new tab of the given size."""
    tabs = []

    def open_at(address, width=1280, height=800):
        tab = browser.new_page(viewport={"width": width, "height": height})
        tabs.append(tab)
        tab.goto(address)
        return tab

    yield open_at
    for tab in tabs:
        tab.close()


def answer_in(tab):
    return tab.locator("#answer textarea").input_value()


def upload(tab, path):
    tab.set_input_files("#picture input[type=file]", str(path))
    tab.get_by_role("button", name="Remove").or_(tab.get_by_label("Clear")).first.wait_for()


def set_max_new_tokens(tab, count):
    tab.get_by_role("button", name="Settings").first.click()
    tab.get_by_label("number input for Max new tokens").fill(str(count))
    tab.get_by_label("number input for Max new tokens").press("Tab")


def wait_until(condition, seconds=60, tab=None):
    """Poll; a browser's tab must be given, if there is one, for it to go on meanwhile."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        tab.wait_for_timeout(50) if tab else time.sleep(0.05)


def tokens_after(watched, end_it):
    """How many more tokens are made after `end_it`, the one under way included."""
    before = watched.tokens
    end_it()
    time.sleep(2)
    return watched.tokens - before


# --- in the browser


def test_a_scene_is_captioned_in_the_browser(open_page, page_address, tiny):
    tab = open_page(page_address)
    upload(tab, PICTURE)
    tab.click("#run")
    expect(tab.locator("#speed")).to_have_text(FIRST_TOKEN, timeout=20_000)
    expect(tab.locator("#answer textarea")).to_have_value(tiny.generate(PICTURE, "caption en"), timeout=20_000)


def test_enter_in_the_prompt_runs(open_page, page_address, tiny):
    tab = open_page(page_address)
    upload(tab, PICTURE)
    tab.locator("#prompt textarea, #prompt input").fill("answer en how many cats are there?")
    tab.locator("#prompt textarea, #prompt input").press("Enter")
    expected = tiny.generate(PICTURE, "answer en how many cats are there?")
    expect(tab.locator("#answer textarea")).to_have_value(expected, timeout=20_000)


def test_an_example_fills_picture_and_prompt(open_page, page_address):
    tab = open_page(page_address)
    tab.get_by_text("detect apple").click()
    expect(tab.locator("#prompt textarea, #prompt input")).to_have_value("detect apple")
    expect(tab.locator("#picture img")).to_be_visible()
    tab.click("#run")
    expect(tab.locator("#boxes")).to_be_visible(timeout=20_000)


def test_what_is_segmented_is_drawn_as_a_mask_and_what_is_detected_as_a_box(tiny, with_mask_decoder):
    picture, box = Image.new("RGB", (300, 200)), "<loc0256><loc0256><loc0768><loc0768>"
    text = f"{box}{'<seg005>' * 16} cat ; {box} dog"
    (mask, cat), (corners, dog) = app._annotate(with_mask_decoder, picture, text)["value"][1]
    assert (cat, dog) == ("cat", "dog")
    assert mask.shape == (200, 300)
    assert set(np.unique(mask)) <= {0.0, 1.0}
    assert mask.any()
    assert not mask[:50].any(), "nothing above the box"
    assert not mask[:, :75].any(), "nothing left of it"
    assert corners == (75, 50, 225, 150)

    marks = app._annotate(tiny, picture, text)["value"][1]
    assert [mark for mark, _ in marks] == [corners, corners], "without a decoder a mask is drawn as its box"


def test_masks_reach_the_page_and_the_client(serve, with_mask_decoder, open_page):
    class Segmenting(Watched):
        """Answers every prompt with one mask."""

        def stream(self, *arguments):
            return iter([paligemma.Token(0, "<loc0256><loc0256><loc0768><loc0768>" + "<seg005>" * 16 + " cat", 1.0)])

    address = serve(Segmenting(with_mask_decoder))
    tab = open_page(address)
    upload(tab, PICTURE)
    tab.click("#run")
    expect(tab.locator("#boxes")).to_be_visible(timeout=20_000)
    expect(tab.locator("#boxes").get_by_text("cat")).to_be_visible()
    *_, drawn = Client(address, verbose=False).predict(handle_file(PICTURE), "segment cat", api_name="/generate")
    (annotation,) = drawn["value"]["annotations"]
    assert annotation["label"] == "cat"


def test_the_text_grows_and_stop_ends_it_within_one_token(open_page, long_winded_address, watched):
    tab = open_page(long_winded_address)
    upload(tab, PICTURE)
    set_max_new_tokens(tab, 250)
    tab.click("#run")
    lengths = set()
    wait_until(lambda: lengths.add(len(answer_in(tab))) or len(lengths) >= 4, tab=tab)
    assert tokens_after(watched, lambda: tab.click("#stop")) <= ONE_TOKEN
    kept = answer_in(tab)
    assert kept
    tab.wait_for_timeout(500)
    assert answer_in(tab) == kept


def test_who_has_to_wait_sees_a_place_in_the_queue(open_page, long_winded_address, watched):
    first, second = open_page(long_winded_address), open_page(long_winded_address)
    for tab in (first, second):
        upload(tab, PICTURE)
    before = watched.tokens
    first.click("#run")
    wait_until(lambda: watched.tokens > before, tab=first)
    second.click("#run")
    expect(second.get_by_text("queue: 1/1")).to_be_visible(timeout=20_000)
    assert second.locator("#answer").get_by_text("queue: 1/1").bounding_box()["height"] > 10
    first.click("#stop")
    expect(second.locator("#answer textarea")).not_to_have_value("", timeout=20_000)
    second.click("#stop")


def test_closing_the_tab_ends_the_generation(open_page, long_winded_address, watched):
    tab = open_page(long_winded_address)
    upload(tab, PICTURE)
    set_max_new_tokens(tab, 250)
    before = watched.tokens
    tab.click("#run")
    wait_until(lambda: watched.tokens >= before + 3, tab=tab)
    assert tokens_after(watched, tab.close) <= ONE_TOKEN


def test_a_file_that_is_no_picture_shows_a_sentence_and_leaves_the_page_usable(open_page, page_address, tmp_path, tiny):
    notes = tmp_path / "notes.png"
    notes.write_text("just some text")
    tab = open_page(page_address)
    upload(tab, notes)
    tab.click("#run")
    expect(tab.get_by_text("notes.png is not a picture")).to_be_visible(timeout=20_000)
    assert "Traceback" not in tab.inner_text("body")

    tab = open_page(page_address)
    tab.click("#run")
    expect(tab.get_by_text("There is no picture yet")).to_be_visible(timeout=20_000)
    upload(tab, PICTURE)
    tab.click("#run")
    expect(tab.locator("#answer textarea")).to_have_value(tiny.generate(PICTURE, "caption en"), timeout=20_000)


def test_who_comes_while_the_model_loads_sees_how_far_it_is_and_is_answered(open_page, serve, tiny, monkeypatch):
    go_on = threading.Event()

    def load(progress):
        progress("Reading the weights", 0.42)
        assert go_on.wait(60)
        return tiny

    monkeypatch.setattr(paligemma, "load", load)
    model = app.Model()
    threading.Thread(target=model.load, daemon=True).start()
    tab = open_page(serve(model))
    expect(tab.locator("#status")).to_contain_text("Loading the model: Reading the weights 42%")
    tab.click("#run")
    expect(tab.get_by_text("There is no picture yet")).to_be_visible()
    upload(tab, PICTURE)
    tab.click("#run")
    expect(tab.locator("#speed")).to_contain_text("Reading the weights 42%", timeout=20_000)
    go_on.set()
    expect(tab.locator("#answer textarea")).to_have_value(tiny.generate(PICTURE, "caption en"), timeout=20_000)
    expect(tab.locator("#status")).to_contain_text("The model runs in float32 on cpu")


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_scrolls_sideways(open_page, page_address, width):
    tab = open_page(page_address, width=width)
    tab.wait_for_selector("#run")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_the_page_asks_no_other_host_for_anything(browser, page_address):
    tab = browser.new_page()
    asked = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page_address)
    tab.wait_for_selector("#run")
    tab.close()
    others = [url for url in asked if not url.startswith((page_address, "data:", "blob:"))]
    assert asked
    assert others == []


# --- through the client


@pytest.fixture
def client(page_address):
    return Client(page_address, verbose=False)


def test_the_endpoint_has_its_documented_parameters(client):
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert list(endpoints) == ["/generate"]
    names = [parameter["parameter_name"] for parameter in endpoints["/generate"]["parameters"]]
    assert names == ["image", "prompt", "max_new_tokens", "temperature", "top_k", "top_p", "seed"]


def test_the_client_receives_a_growing_text(client, tiny):
    picture = EXAMPLES / "music.png"
    texts = [outputs[0] for outputs in client.submit(handle_file(picture), "caption en", api_name="/generate")]
    texts = [text for text, following in zip(texts, [*texts[1:], None]) if text and text != following]
    assert len(texts) >= 3
    assert all(longer.startswith(shorter) for shorter, longer in zip(texts, texts[1:]))
    assert texts[-1] == tiny.generate(picture, "caption en")


def test_a_client_that_goes_away_ends_the_generation(long_winded_address, watched):
    script = (
        "import sys; from gradio_client import Client, handle_file;"
        "job = Client(sys.argv[1], verbose=False).submit("
        "    handle_file(sys.argv[2]), 'caption en', max_new_tokens=250, api_name='/generate');"
        "[None for _ in job]"
    )
    before = watched.tokens
    other = subprocess.Popen([sys.executable, "-c", script, long_winded_address, str(PICTURE)])
    wait_until(lambda: watched.tokens >= before + 3)
    assert tokens_after(watched, other.kill) <= ONE_TOKEN


def test_requests_are_answered_one_after_another(long_winded_address, watched):
    clients = [Client(long_winded_address, verbose=False) for _ in range(2)]
    jobs = [
        client.submit(handle_file(PICTURE), "caption en", max_new_tokens=6, api_name="/generate") for client in clients
    ]
    for job in jobs:
        job.result(timeout=60)
    first, second = watched.answers - 1, watched.answers
    assert watched.answer_of_token[-12:] == [first] * 6 + [second] * 6


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A good picture and three bad ones, by name."""
    folder = tmp_path_factory.mktemp("files")
    bad = {name: folder / f"{name}.png" for name in ("text", "empty", "huge")}
    bad["text"].write_text("just some text")
    bad["empty"].touch()
    write_png_that_claims(bad["huge"], 30_000, 30_000)
    return {"good": PICTURE, **bad}


@pytest.mark.parametrize(
    ("image", "prompt", "sentence"),
    [
        (None, "caption en", "There is no picture yet; please upload one or choose an example."),
        ("text", "caption en", "text.png is not a picture; please choose a PNG, JPEG, WebP or GIF file."),
        ("empty", "caption en", "The file empty.png is empty; please choose another picture."),
        (
            "huge",
            "caption en",
            "The picture huge.png has too many pixels; please make it smaller to at most 60 million pixels.",
        ),
        ("good", "", "The prompt is empty; please ask something, for example: caption en"),
        ("good", "cat " * 25_000, "The prompt has 25.* tokens, but .* fit; please shorten it."),
        ("good", "cat " * 600, "The prompt has 60.* tokens, but this page takes 512; please shorten it."),
        ("good", "detect <image>", "The prompt contains the reserved token <image>; please remove it."),
    ],
)
def test_wrong_input_gets_one_sentence(client, files, tiny, image, prompt, sentence):
    picture = handle_file(files[image]) if image else None
    with pytest.raises(Exception, match=f"^{sentence}$"):
        client.predict(picture, prompt, api_name="/generate")
    assert client.predict(handle_file(PICTURE), "caption en", api_name="/generate")[0] == tiny.generate(
        PICTURE, "caption en"
    )


@pytest.mark.parametrize(
    ("setting", "value"),
    [("max_new_tokens", 0), ("max_new_tokens", 300), ("temperature", -1), ("top_k", -5), ("top_p", 0)],
)
def test_a_setting_out_of_range_is_refused(client, setting, value):
    with pytest.raises(Exception, match=f"^{setting} is {value}; .*please give"):
        client.predict(handle_file(PICTURE), "caption en", api_name="/generate", **{setting: value})


@pytest.mark.parametrize(
    ("position", "value", "name"),
    [(1, None, "The prompt"), (2, None, "max_new_tokens"), (3, "hot", "temperature"), (6, "x", "seed")],
)
def test_a_value_of_the_wrong_type_gets_one_sentence(page_address, position, value, name):
    data = [{"path": uploaded_path(page_address)}, "caption en", 8, 0, 0, 1, None]
    data[position] = value
    assert error_of_call(page_address, data).startswith(name)


@pytest.mark.parametrize("path", ["/etc/hostname", str(PICTURE.resolve()), "/no/such/file.png"])
def test_a_path_that_was_not_uploaded_is_refused(page_address, path):
    error = error_of_call(page_address, [{"path": path}, "caption en", 8, 0, 0, 1, None])
    assert error == "The picture was not uploaded to this page; please upload it."


def uploaded_path(address):
    """Upload the picture by plain HTTP, as any program may; returns the server's path of it."""
    answer = httpx.post(f"{address}gradio_api/upload", files={"files": PICTURE.open("rb")})
    return answer.json()[0]


def error_of_call(address, data):
    """Call the endpoint by plain HTTP; returns the sentence of the error that comes back."""
    event = httpx.post(f"{address}gradio_api/call/generate", json={"data": data}).json()["event_id"]
    stream = httpx.get(f"{address}gradio_api/call/generate/{event}", timeout=30).text
    event_name, content = stream.strip().split("\n\n")[-1].split("\n")[:2]
    assert event_name == "event: error", stream
    return json.loads(content.removeprefix("data: "))["error"]
