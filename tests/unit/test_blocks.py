"""Who calls a page, in which order the calls are answered, and what is kept of them."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import gradio as gr
import pytest
from gradio.state_holder import SessionState

from paligemma.demo.blocks import Page, client_address, take_turns


def call(address, **headers):
    request = SimpleNamespace(client=SimpleNamespace(host=address), headers=headers)
    return SimpleNamespace(request=request)


@pytest.mark.parametrize(
    ("host", "forwarded", "address"),
    [
        ("8.8.8.8", None, "8.8.8.8"),
        ("10.0.0.3", None, "10.0.0.3"),
        ("10.0.0.3", "8.8.8.8, 10.0.0.2", "8.8.8.8"),
        ("8.8.8.8", "1.1.1.1", "8.8.8.8"),
        ("testclient", "1.1.1.1", "testclient"),
    ],
)
def test_an_address_that_is_passed_on_counts_only_from_a_proxy(host, forwarded, address):
    headers = {"x-forwarded-for": forwarded} if forwarded else {}
    assert client_address(call(host, **headers).request) == address


def test_nobody_s_second_call_comes_before_everybody_s_first():
    (one, two, three), other, latest = [call("a") for _ in range(3)], call("b"), call("c")
    assert take_turns([one, two, three, other, latest], []) == [one, other, latest, two, three]
    assert take_turns([one, two, other], [call("a"), call("c")]) == [other, one, two]
    assert take_turns([other, latest, one], [call("b"), call("c")]) == [one, other, latest]


@pytest.fixture
def page():
    with Page("A page") as page:
        page.shown, page.hidden = gr.Textbox("first"), gr.HTML("other")
        page.button = gr.Button()
    return page


def test_a_session_keeps_nothing_of_what_it_asks_and_is_answered(page):
    session = SessionState(page)
    session._update_value_in_config(page.shown._id, "a question")
    assert list(session.components) == []
    assert session[page.shown._id] is page.shown
    (config,) = [one for one in page.get_config_file()["components"] if one["id"] == page.shown._id]
    assert config["props"]["value"] == "first", "the page itself has all"


@pytest.mark.parametrize("postprocess", [True, False])
def test_components_that_a_handler_does_not_name_are_not_made_anew(page, monkeypatch, postprocess):
    with page:
        page.button.click(lambda: None, None, [page.shown, page.hidden, page.button], postprocess=postprocess)
    (event,) = page.fns.values()
    made, session = [], SessionState(page)
    monkeypatch.setattr(gr.HTML, "__init__", lambda *_, **__: made.append("HTML"))

    def processed(values):
        with ThreadPoolExecutor(1) as thread:  # Playwright has a loop in this one
            return thread.submit(lambda: asyncio.run(page.postprocess_data(event, values, session))).result()

    assert processed({page.shown: "new", page.button: gr.update(visible=False)}) == [
        "new",
        gr.skip(),
        {"visible": False, "__type__": "update"},
    ]
    assert not made
    assert len(processed(gr.skip())) == 3
