"""The real page on a real server, in headless Chromium."""

from __future__ import annotations

import gc
import json
import re
import shutil
import threading
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import EXAMPLES, ONE_TOKEN, Answering, tokens_after, wait_until
from PIL import Image
from playwright.sync_api import expect

import app
from paligemma.demo import handlers
from paligemma.demo.blocks import Page
from paligemma.demo.handlers import SETTINGS, read_settings
from paligemma.demo.hosting import delete_old_files, own_upload_folder
from paligemma.demo.serving import EMBEDDED, Models
from paligemma.prompts import TASKS

PICTURE = EXAMPLES / "cats.png"
BOX, OTHER_BOX = "<loc0256><loc0256><loc0768><loc0768>", "<loc0000><loc0512><loc0256><loc1000>"
PROMPT = "#prompt textarea, #prompt input"
TEXT = "#answers .text"
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
    """The text of all answers, one a line."""
    return "\n".join(tab.locator("#answers .text").all_text_contents())


def ask(tab, prompt):
    tab.locator(PROMPT).fill(prompt)
    tab.click("#run")


def upload(tab, path):
    tab.set_input_files("#picture input[type=file]", str(path))
    expect(tab.locator("#picture img")).to_have_attribute("src", re.compile(re.escape(Path(path).name)))


def set_max_new_tokens(tab, count):
    tab.get_by_role("button", name="Settings ▼").click()
    number = tab.get_by_label("number input for Max new tokens")
    number.wait_for()
    # A number typed at once was lost in 9 of 337 tries, as if the slider's first value came late; after a wait, in none
    # of 133.
    tab.wait_for_timeout(500)
    number.fill(str(count))
    number.press("Tab")


def choose_example(tab, prompt):
    tab.locator("#examples").get_by_text(prompt).click()
    expect(tab.locator(PROMPT)).to_have_value(prompt)


def test_at_first_sight_a_stored_answer_is_there_and_said_to_be_stored(open_page, page_address):
    tab = open_page(page_address)
    picture, prompt, answer = (handlers.EXAMPLES[0][name] for name in ("picture", "prompt", "answer"))
    expect(tab.locator("#speed")).to_contain_text("A stored answer")
    expect(tab.locator(TEXT)).to_have_text(answer)
    expect(tab.locator(PROMPT)).to_have_value(prompt)
    expect(tab.locator("#picture img")).to_have_attribute("src", re.compile(picture))
    expect(tab.locator("#figure rect.box")).to_have_count(answer.count(";") + 1)
    expect(tab.locator("#note")).to_contain_text("drawings only")
    assert [tab.locator("#examples button").nth(number).inner_text() for number in range(len(handlers.EXAMPLES))] == [
        one["prompt"] for one in handlers.EXAMPLES
    ]
    with tab.expect_download() as download:
        tab.click("#as-json")
    assert len(json.loads(download.value.path().read_text())) == answer.count(";") + 1

    tab.click("#zoom")
    assert tab.locator("#stage").bounding_box() == {"x": 0, "y": 0, "width": 1280, "height": 800}
    tab.keyboard.press("Escape")
    assert tab.locator("#stage").bounding_box()["width"] < 1280


def test_an_example_fills_picture_and_prompt_and_runs(open_page, page_address):
    tab = open_page(page_address)
    for example in handlers.EXAMPLES[1:3]:
        choose_example(tab, example["prompt"])
        expect(tab.locator(TEXT)).to_have_text(example["answer"], timeout=20_000)
        expect(tab.locator("#picture img")).to_have_attribute("src", re.compile(example["picture"]))
        expect(tab.locator("#speed")).to_have_text(FIRST_TOKEN, timeout=20_000)
        masks = example["prompt"].startswith("segment") * (example["answer"].count(";") + 1)
        expect(tab.locator("#figure path.mask")).to_have_count(masks)


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_a_picture_can_be_dropped_or_pasted_anywhere_and_takes_the_old_answer_away(open_page, page_address, event):
    tab = open_page(page_address)
    expect(tab.locator(TEXT)).to_be_visible()
    tab.evaluate(
        """async ([type, bytes]) => {
            const files = new DataTransfer();
            files.items.add(new File([new Uint8Array(bytes)], "given.png", {type: "image/png"}));
            const given = {bubbles: true, cancelable: true, dataTransfer: files, clipboardData: files};
            const fire = (Kind, type) => document.querySelector("#title").dispatchEvent(new Kind(type, given));
            while (!document.body.hasAttribute("data-dropping")) {  // the page listens a moment after it is drawn
                fire(DragEvent, "dragover");
                await new Promise((done) => setTimeout(done, 20));
            }
            fire(type === "drop" ? DragEvent : ClipboardEvent, type);
        }""",
        [event, list(PICTURE.read_bytes())],
    )
    expect(tab.locator("#picture img")).to_have_attribute("src", re.compile("given.png"), timeout=20_000)
    expect(tab.locator(TEXT)).to_have_count(0)
    expect(tab.locator("#figure svg")).to_have_count(0)
    expect(tab.locator("#copy")).to_be_hidden()


def test_tasks_write_their_prompts_which_are_run_by_button_or_enter(open_page, page_address, tiny):
    tab = open_page(page_address)
    upload(tab, PICTURE)
    for task in TASKS:
        tab.locator("#tasks").get_by_text(task.name, exact=True).click()
        expect(tab.locator(PROMPT)).to_have_value(task.prompt())
        expect(tab.locator("#hint")).to_contain_text(task.hint.split("`")[0])
        tab.click("#run") if task.has_language else tab.locator(PROMPT).press("Enter")
        answer = tiny.generate(PICTURE, task.prompt()) or handlers.EMPTY_ANSWER
        expect(tab.locator(TEXT)).to_have_text(answer, timeout=20_000)
        expect(tab.locator("#run")).to_be_visible()
    tab.locator(PROMPT).fill("detect cat ; dog")
    expect(tab.get_by_label("Detect")).to_be_checked()
    expect(tab.locator("#hint")).to_contain_text("several with ; between them")


def test_further_pictures_are_asked_about_with_the_first_and_come_back_with_the_answer(open_page, page_address, tiny):
    other, prompt = EXAMPLES / "music.png", "caption en"
    both, alone = tiny.generate([PICTURE, other], prompt), tiny.generate(PICTURE, prompt)
    assert both != alone
    tab = open_page(page_address)
    upload(tab, PICTURE)
    tab.get_by_role("button", name="More pictures").click()
    tab.set_input_files("#more-pictures input[type=file]", str(other))
    expect(tab.locator("#more-pictures img")).to_be_visible(timeout=20_000)
    ask(tab, prompt)
    expect(tab.locator("#speed")).to_contain_text("2 pictures, with boxes and masks on the first", timeout=20_000)
    expect(tab.locator(TEXT)).to_have_text(both, timeout=20_000)
    tab.locator("#more-pictures").get_by_label("Clear").click()
    tab.click("#run")
    expect(tab.locator(TEXT)).to_have_text(alone, timeout=20_000)
    tab.locator("#history .thumbnails button").nth(1).click()
    expect(tab.locator("#more-pictures img")).to_be_visible()
    expect(tab.locator(TEXT)).to_have_text(both)


def test_each_line_is_a_prompt_of_its_own(open_page, page_address, tiny):
    prompts = ["caption en", "answer en how many cats are there?"]
    tab = open_page(page_address)
    upload(tab, PICTURE)
    ask(tab, "\n".join(prompts))
    expect(tab.locator(TEXT)).to_have_text([tiny.generate(PICTURE, prompt) for prompt in prompts], timeout=20_000)
    assert tab.locator("#answers code").all_text_contents() == prompts


def test_objects_appear_while_the_answer_streams_and_light_up_with_their_labels(open_page, serve, with_mask_decoder):
    tab = open_page(
        serve(Answering(with_mask_decoder, f"{BOX} {'<seg005>' * 16} cat ; {OTHER_BOX}\ndog ; <loc0001> bird"))
    )
    upload(tab, PICTURE)
    expect(tab.locator("#figure")).to_be_attached()  # updates may be lost of what is put in only when it is needed
    expect(tab.locator("#figure")).to_be_hidden()
    tab.click("#run")
    expect(tab.locator("#figure g")).to_have_count(1, timeout=20_000)
    assert "dog" not in answer_in(tab), "the first is drawn before the second is there"
    expect(tab.locator("#figure g")).to_have_count(2, timeout=20_000)
    expect(tab.locator("#answers .note")).to_contain_text("a box of 1 instead of 4 locations", timeout=20_000)
    assert tab.locator("#figure path.mask").count() == 1
    assert "bird" in answer_in(tab)

    picture, box = (tab.locator(part).first.bounding_box() for part in ("#picture img", "#figure rect.box"))
    side = min(picture["width"], picture["height"])
    for start, length in (("x", "width"), ("y", "height")):
        assert box[start] - picture[start] == pytest.approx((picture[length] - side) / 2 + side / 4, abs=3)
        assert box[length] == pytest.approx(side / 2, abs=3)

    labels, marks = tab.locator("#answers .object"), tab.locator("#figure g")
    assert [labels.nth(at).get_attribute("style") for at in (0, 1)] == [
        marks.nth(at).get_attribute("style") for at in (0, 1)
    ]
    labels.nth(1).hover()
    expect(marks.nth(0)).to_have_css("opacity", "0.15")
    expect(marks.nth(1)).to_have_css("opacity", "1")
    marks.nth(0).locator("rect.box").hover()
    expect(labels.nth(0)).to_have_css("outline-style", "solid")
    expect(labels.nth(1)).to_have_css("outline-style", "none")
    tab.mouse.move(0, 0)
    labels.nth(0).focus()
    expect(marks.nth(0)).to_have_css("opacity", "1")
    expect(marks.nth(1)).to_have_css("opacity", "0.15")


def test_the_marked_picture_and_the_objects_can_be_downloaded(open_page, serve, tiny):
    tab = open_page(serve(Answering(tiny, f"{BOX} cat")))
    upload(tab, PICTURE)
    tab.click("#run")
    expect(tab.locator("#as-picture")).to_be_visible(timeout=20_000)
    with tab.expect_download() as download:
        tab.click("#as-picture")
    assert download.value.suggested_filename == "cats-marked.png"
    with Image.open(download.value.path()) as drawn, Image.open(PICTURE) as original:
        assert drawn.size == original.size
        assert drawn.convert("RGB") != original.convert("RGB")
    with tab.expect_download() as download:
        tab.click("#as-json")
    width, height = Image.open(PICTURE).size
    box = [width // 4, height // 4, 3 * width // 4, 3 * height // 4]
    assert json.loads(download.value.path().read_text()) == [{"label": "cat", "box": box, "mask": None}]

    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.click("#copy")
    wait_until(lambda: tab.evaluate("navigator.clipboard.readText()") == f"{BOX} cat", tab=tab)


def test_downloads_are_deleted_with_the_uploaded_files(tiny):
    with own_upload_folder() as folder:
        page = app.build_page(Models([None], lambda source, **_: tiny))
        shutil.copy(PICTURE, folder)
        record = {"path": str(folder / PICTURE.name), "more": [], "size": [448, 448], "checkpoint": EMBEDDED}
        record |= {"answers": [["detect cat", f"{BOX} cat"]], "tokens": []}
        for name in ("save_image", "save_objects"):
            path = next(event.fn for event in page.fns.values() if event.name == name)(record)
            assert Path(path).stat().st_size
            delete_old_files(folder, -1, page.own_files() | {record["path"]})
            assert not Path(path).exists()


def test_a_link_opens_the_page_with_prompt_and_settings(open_page, page_address):
    tab = open_page(page_address)
    tab.locator(PROMPT).fill("detect cat ; dog")
    set_max_new_tokens(tab, 77)
    tab.evaluate("document.querySelector('#seed input').focus()")
    tab.locator("#seed input").fill("5")
    tab.locator("#seed input").press("Tab")
    upload(tab, PICTURE)
    tab.click("#run")
    tab.click("#share")
    expect(tab.locator("#link textarea, #link input")).not_to_have_value("")
    link = tab.locator("#link textarea, #link input").input_value()
    other = open_page(link)
    expect(other.locator(PROMPT)).to_have_value("detect cat ; dog")
    expect(other.get_by_label("Detect")).to_be_checked()
    other.get_by_role("button", name="Settings ▼").click()
    expect(other.get_by_label("number input for Max new tokens")).to_have_value("77")
    expect(other.locator("#seed input")).to_have_value("5")


def test_of_a_link_with_wrong_settings_the_right_ones_are_taken(open_page, page_address):
    tab = open_page(f"{page_address}?seed=1e400&top_p=nan&temperature=hot&checkpoint=another&x=1&max_new_tokens=77")
    expect(tab.locator(PROMPT)).to_have_value(handlers.EXAMPLES[0]["prompt"])
    tab.get_by_role("button", name="Settings ▼").click()
    expect(tab.get_by_label("number input for Max new tokens")).to_have_value("77")
    expect(tab.locator("#seed input")).to_have_value("")


def test_an_empty_seed_is_sent_as_none_and_a_typed_one_as_it_is(open_page, page_address):
    sent = []

    def seed_after(change):
        change()
        already = len(sent)
        wait_until(lambda: tab.click("#run") or len(sent) > already, tab=tab)
        return read_settings(sent[-1][-len(SETTINGS) :])["seed"]

    def type_seed(text):
        tab.locator("#seed input").fill(text)
        tab.locator("#seed input").press("Tab")

    def open_settings():
        tab.get_by_role("button", name="Settings ▼").click()

    def open_and_record(address):
        tab = open_page(address)
        tab.on("request", lambda request: "queue/join" in request.url and sent.append(request.post_data_json["data"]))
        return tab

    tab = open_and_record(page_address)
    assert seed_after(lambda: choose_example(tab, "segment car")) is None
    assert seed_after(open_settings) is None
    assert seed_after(lambda: type_seed("5")) == 5
    assert seed_after(lambda: choose_example(tab, "segment car")) == 5
    assert seed_after(lambda: type_seed("")) is None
    for query, seed in (("temperature=1", None), ("temperature=1&seed=5", 5)):
        tab = open_and_record(f"{page_address}?{query}")
        upload(tab, PICTURE)
        assert seed_after(open_settings) == seed


def test_history_brings_an_earlier_answer_back(open_page, page_address, tiny):
    tab = open_page(page_address)
    upload(tab, PICTURE)
    for prompt in ("detect cat", "answer en how many cats are there?"):
        ask(tab, prompt)
        expect(tab.locator(TEXT)).to_have_text(tiny.generate(PICTURE, prompt), timeout=20_000)
        expect(tab.locator("#history").get_by_text(prompt)).to_be_visible(timeout=20_000)
    tab.locator("#history").get_by_text("detect cat").click()
    expect(tab.locator(TEXT)).to_have_text(tiny.generate(PICTURE, "detect cat"))
    expect(tab.locator(PROMPT)).to_have_value("detect cat")
    expect(tab.locator("#figure rect.box").first).to_be_visible()


def test_answers_stay_in_the_browser_when_the_page_is_loaded_anew_and_the_server_started_anew(
    open_page, serve, tiny, tmp_path
):
    large, prompt = tmp_path / "large.png", "detect cat"
    Image.open(PICTURE).resize((900, 900)).save(large)
    answer = tiny.generate(large, prompt)
    address = serve(tiny)
    tab = open_page(address)
    upload(tab, large)
    ask(tab, prompt)
    choice = tab.locator("#history").get_by_role("button", name=prompt)
    expect(choice).to_be_visible(timeout=20_000)
    expect(choice.locator("img")).to_have_attribute("src", re.compile("^data:image/jpeg;base64,"))
    path = json.loads(tab.evaluate("localStorage['paligemma-answers']"))[0]["path"]
    (page,) = [one for one in gc.get_objects() if isinstance(one, Page) and one.local_url == address]
    page.close()
    Path(path).unlink()
    assert serve(tiny, server_port=int(address.rstrip("/").rpartition(":")[2])) == address

    def saved(button):
        with tab.expect_download() as download:
            tab.click(button)
        return download.value.path()

    assert len(json.loads(saved("#as-json").read_text())) == answer.count(";") + 1
    tab.click("#as-picture")
    expect(tab.get_by_text("The picture large.png was deleted meanwhile")).to_be_visible(timeout=20_000)
    tab.reload()
    expect(tab.locator(TEXT)).to_have_text(handlers.EXAMPLES[0]["answer"])
    choice.click()
    expect(tab.locator(TEXT)).to_have_text(answer, timeout=20_000)
    expect(tab.locator("#picture img")).to_have_attribute("src", re.compile("large.jpg"))
    expect(tab.locator("#figure rect.box")).to_have_count(answer.count(";") + 1)
    assert Image.open(saved("#as-picture")).size == (448, 448), "a copy of the browser's own"
    tab.get_by_role("button", name="See inside").click()
    expect(tab.locator("#inside-rivals .bar span").first).to_have_text("␣cat", timeout=20_000)
    tab.get_by_role("button", name="Clear", exact=True).click()
    expect(choice).to_have_count(0)
    assert tab.evaluate("localStorage['paligemma-answers']") == "[]"


def test_of_what_was_put_into_the_browsers_storage_nothing_is_run_fetched_or_opened(open_page, page_address):
    markup = "<img src=x onerror='document.title=1'>"
    kept = {"path": f"/etc/{markup}", "more": [], "size": [448, 448], "checkpoint": "embedded", "tokens": []}
    kept |= {"answers": [[markup, markup]], "picture": "https://other.example/x.png"}
    entries = [
        kept,
        kept | {"picture": f"data:text/html,{markup}"},
        kept | {"answers": [[{}, 5]]},
        None,
        5,
        [],
        {},
        "x",
    ]
    tab = open_page(page_address)
    expect(tab.locator(TEXT)).to_be_visible()
    asked = []
    tab.on("request", lambda request: asked.append(request.url))
    for stored, count in ((json.dumps([kept] * 20), 8), ('{"length": 1}', 0), ("{", 0), (json.dumps(entries), 2)):
        tab.evaluate(
            """(text) => {
                localStorage["paligemma-answers"] = text;
                window.dispatchEvent(new StorageEvent("storage", {key: "paligemma-answers"}));
            }""",
            stored,
        )
        expect(tab.locator("#history .thumbnails button")).to_have_count(count)
    tab.reload()
    expect(tab.locator("#history .thumbnails button").first).to_have_text(markup)
    tab.locator("#history .thumbnails button").first.click()
    expect(tab.get_by_text("is not in the cache folder")).to_be_visible(timeout=20_000)
    assert tab.title() == app.TITLE
    assert not [url for url in asked if "other.example" in url]
    expect(tab.locator(TEXT)).to_have_text(handlers.EXAMPLES[0]["answer"])


def test_where_storage_is_forbidden_answers_last_as_long_as_the_page(browser, page_address, tiny):
    context = browser.new_context()
    context.add_init_script("Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no'); }})")
    tab = context.new_page()
    tab.goto(page_address)
    upload(tab, PICTURE)
    ask(tab, "caption en")
    tab.locator("#history").get_by_text("caption en").click(timeout=20_000)
    expect(tab.locator(TEXT)).to_have_text(tiny.generate(PICTURE, "caption en"))
    context.close()


def test_a_new_scene_is_drawn_and_answered(open_page, page_address):
    tab = open_page(page_address)
    sources = []
    for _ in range(2):
        tab.click("#draw")
        expect(tab.locator("#picture img")).to_be_visible(timeout=30_000)
        wait_until(lambda: tab.locator("#picture img").get_attribute("src") not in sources, tab=tab)
        sources.append(tab.locator("#picture img").get_attribute("src"))
    tab.click("#run")
    expect(tab.locator("#speed")).to_have_text(FIRST_TOKEN, timeout=20_000)
    assert answer_in(tab)


def test_the_text_grows_and_stop_ends_it_within_one_token_and_keeps_it(open_page, long_winded_address, watched):
    tab = open_page(long_winded_address)
    upload(tab, PICTURE)
    set_max_new_tokens(tab, 250)
    tab.click("#run")
    expect(tab.locator("#run")).to_be_hidden()
    lengths = set()
    wait_until(lambda: lengths.add(len(answer_in(tab))) or len(lengths) >= 4, tab=tab)
    assert tokens_after(watched, lambda: tab.click("#stop")) <= ONE_TOKEN
    expect(tab.locator("#stop")).to_be_hidden()
    expect(tab.locator("#run")).to_be_visible()
    kept = answer_in(tab)
    assert kept
    tab.wait_for_timeout(500)
    assert answer_in(tab) == kept
    expect(tab.locator("#history").get_by_text("caption en")).to_be_visible()
    expect(tab.locator("#copy")).to_be_visible()
    tab.locator("#history").get_by_text("caption en").click()
    wait_until(lambda: answer_in(tab) == kept, tab=tab)


@pytest.fixture
def one_asks_and_one_waits(open_page, serve, watched, monkeypatch):
    """Two tabs: the first is being answered, by a page that answers one at a time, and the second has asked as well."""
    monkeypatch.setitem(app.TOGETHER, "concurrency_limit", 1)
    address = serve(watched)
    first, second = open_page(address), open_page(address)
    for tab in (first, second):
        upload(tab, PICTURE)
    before = watched.tokens
    first.click("#run")
    wait_until(lambda: watched.tokens > before, tab=first)
    second.click("#run")
    return first, second


def test_who_has_to_wait_sees_a_place_in_the_queue(one_asks_and_one_waits):
    first, second = one_asks_and_one_waits
    expect(second.get_by_text("queue: 1/1")).to_be_visible(timeout=20_000)
    assert second.locator("#answers").get_by_text("queue: 1/1").bounding_box()["height"] > 10
    first.click("#stop")
    expect(second.locator(TEXT)).not_to_be_empty(timeout=20_000)
    second.click("#stop")


def test_stop_leaves_the_queue(one_asks_and_one_waits, watched):
    first, second = one_asks_and_one_waits
    place = second.get_by_text("queue: 1/1")
    expect(place).to_be_visible(timeout=20_000)
    second.click("#stop")
    expect(place).to_be_hidden(timeout=20_000)
    first.click("#stop")
    wait_until(lambda: not watched.engine._running, tab=first)
    second.wait_for_timeout(1500)
    assert not watched.engine._running


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

    tab.get_by_label("Remove Image").click()
    tab.click("#run")
    expect(tab.get_by_text("There is no picture yet")).to_be_visible(timeout=20_000)
    upload(tab, PICTURE)
    tab.click("#run")
    expect(tab.locator(TEXT)).to_have_text(tiny.generate(PICTURE, "caption en"), timeout=20_000)


def test_a_sentence_is_shown_as_it_is_written(open_page, page_address):
    tab = open_page(page_address)
    upload(tab, PICTURE)
    ask(tab, "detect <image>")
    sentence = "The prompt contains the reserved token <image>; please remove it."
    expect(tab.get_by_text(sentence)).to_be_visible(timeout=20_000)
    expect(tab.locator("#run")).to_be_focused()


def test_who_comes_while_the_model_loads_sees_how_far_it_is_and_is_answered(open_page, serve, tiny, monkeypatch):
    go_on = threading.Event()

    def load(source, progress, make_room):
        progress("Reading the weights", 0.42)
        assert go_on.wait(60)
        return tiny

    models = Models([None], load)
    models.start(EMBEDDED)
    tab = open_page(serve(models))
    expect(tab.locator("#status")).to_contain_text("Loading the model: Reading the weights 42%")
    upload(tab, PICTURE)
    tab.click("#run")
    expect(tab.locator("#speed")).to_contain_text("Reading the weights 42%", timeout=20_000)
    go_on.set()
    expect(tab.locator(TEXT)).to_have_text(tiny.generate(PICTURE, "caption en"), timeout=20_000)
    expect(tab.locator("#status")).to_contain_text("It runs in float32 on cpu")


def test_a_menu_of_checkpoints_loads_the_one_that_is_chosen(open_page, serve, tiny):
    asked = []

    def load(source, progress, make_room):
        asked.append(source)
        return tiny if source is None else Answering(tiny, "the other one")

    tab = open_page(serve(Models([None, "a/b"], load)))
    upload(tab, PICTURE)
    tab.get_by_role("button", name="Settings ▼").click()
    tab.locator("#checkpoint input").click()
    tab.get_by_role("option", name="a/b").click()
    expect(tab.locator("#about")).to_contain_text("a/b")
    expect(tab.locator("#draw")).to_be_hidden()
    expect(tab.locator("#languages")).to_be_visible()
    tab.click("#run")
    expect(tab.locator(TEXT)).to_have_text("the other one", timeout=20_000)
    assert asked == ["a/b"], "each is loaded with its first question"


def barriers(tab):
    """What axe finds wrong for people with disabilities."""
    found = Axe().run(tab, options={"runOnly": ["wcag2a", "wcag2aa"]}).response["violations"]
    return [(one["id"], [node["html"] for node in one["nodes"]]) for one in found]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_barrier(browser, serve, tiny, scheme):
    address = serve(Answering(tiny, f"{BOX} cat ; {OTHER_BOX} dog ; <loc0001> bird"))
    tab = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme=scheme)
    tab.goto(address)
    upload(tab, PICTURE)
    tab.click("#run")
    expect(tab.locator("#as-picture")).to_be_visible(timeout=20_000)
    tab.get_by_role("button", name="Settings ▼").click()
    tab.wait_for_timeout(500)
    assert barriers(tab) == []
    tab.close()


def test_a_stranger_sees_inside_the_answer_token_by_token(open_page, page_address):
    tab = open_page(page_address)
    heat, rivals = tab.locator("#heat svg image"), tab.locator("#inside-rivals .bar span")
    assert heat.count() == 0, "nothing is computed before"
    tab.get_by_role("button", name="See inside").click()
    expect(rivals.first).to_have_text("␣apple", timeout=20_000)
    expect(tab.locator("#inside img")).to_have_count(6 * 5)
    maps = [heat.get_attribute("href")]

    def chosen(button, *more):
        """Choose something, and wait until another heat map is drawn."""
        button.click(*more)
        wait_until(lambda: heat.count() and heat.get_attribute("href") not in maps, tab=tab)
        maps.append(heat.get_attribute("href"))

    words = tab.locator("#inside .words").first.get_by_role("button")
    words.last.hover()
    expect(rivals.first).to_have_text("␣banana", timeout=20_000)
    assert heat.get_attribute("href") == maps[0], "to point at a token shows its rivals alone"
    tab.mouse.move(0, 0)
    expect(rivals.first).to_have_text("␣apple", timeout=20_000)
    chosen(words.last)
    expect(words.last).to_have_attribute("aria-pressed", "true")
    expect(words.last).to_be_focused()
    chosen(tab.get_by_role("img", name="Layer 2, head 3"))

    tab.locator("#inside-rivals button").first.click()
    expect(tab.locator("#inside .line")).to_have_count(2, timeout=20_000)
    expect(tab.locator("#inside .line").last).to_contain_text("What if it were “dress”?")
    tab.mouse.move(0, 0)  # away from what has moved under the pointer
    expect(rivals.first).to_have_text("␣dress", timeout=20_000)
    tab.get_by_role("button", name="What if", exact=True).click()
    bars = tab.locator("#inside-distribution .bar")
    expect(bars.filter(has_text="cut off")).to_have_count(0)
    tab.get_by_label("Top-k").fill("2")
    expect(bars.filter(has_text="cut off")).to_have_count(24 - 2, timeout=20_000)
    tab.get_by_role("button", name="Encoder").click()
    expect(tab.locator("#heat .grid")).to_be_attached(timeout=20_000)
    maps.append(heat.get_attribute("href"))
    box = tab.locator("#heat svg image").bounding_box()
    tab.mouse.click(box["x"] + box["width"] * 2.5 / 16, box["y"] + box["height"] * 4.5 / 16)
    expect(tab.locator("#inside-section")).to_contain_text("row 5, column 3 of 16 × 16", timeout=20_000)

    for scheme, names in (("light", ("Attention", "Walk")), ("dark", ("Mask", "Cache"))):
        tab.evaluate("(scheme) => document.body.classList.toggle('dark', scheme === 'dark')", scheme)
        tab.wait_for_timeout(800)  # colors change slowly
        for name in names:
            tab.get_by_role("button", name=name, exact=True).click()
            expect(tab.get_by_role("button", name=name, exact=True)).to_have_attribute("aria-pressed", "true")
            assert barriers(tab) == []
    tab.set_viewport_size({"width": 390, "height": 844})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    tab.locator("#examples").get_by_text("ocr").click()
    expect(tab.locator("#inside")).to_be_hidden(timeout=20_000)
    assert heat.count() == 0


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_scrolls_sideways(open_page, page_address, width):
    tab = open_page(page_address, width=width)
    upload(tab, PICTURE)
    ask(tab, "detect cat")
    expect(tab.locator("#as-picture")).to_be_visible(timeout=20_000)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    if width == 1280:
        assert tab.evaluate("document.documentElement.scrollHeight") <= 800, "nor down on a laptop's screen"


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
