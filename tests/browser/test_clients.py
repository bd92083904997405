"""The endpoints on a real server, as programs and agents call them."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import ANY

import httpx
import pytest
from conftest import EXAMPLES, ONE_TOKEN, Answering, tokens_after, wait_until, write_png_that_claims
from gradio_client import Client, handle_file
from mcp import ClientSession
from mcp.client.streamable_http import streamablehttp_client
from PIL import Image

import app
from paligemma.annotations import find_detections
from paligemma.demo import hosting, streaming
from paligemma.demo.blocks import Page
from paligemma.demo.streaming import MAX_UNREAD
from paligemma.sequence import MAX_AHEAD

PICTURE = EXAMPLES / "picnic.png"
JAVASCRIPT_CLIENT = "@gradio/client@2.7.0"


@pytest.fixture
def client(page_address):
    return Client(page_address, verbose=False)


def test_each_endpoint_has_its_documented_parameters(client):
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    parameters = {
        name: [parameter["parameter_name"] for parameter in endpoint["parameters"]]
        for name, endpoint in endpoints.items()
    }
    settings = ["max_new_tokens", "temperature", "top_k", "top_p", "seed"]
    assert parameters == {
        "/generate": ["image", "prompt", *settings, "more_images"],
        "/inspect": ["image", "prompt", "index", *settings, "heads", "more_images"],
        "/caption": ["image", "language"],
        "/detect": ["image", "objects"],
        "/segment": ["image", "objects"],
    }
    assert all(endpoint["description"] for endpoint in endpoints.values())


def test_a_caption_is_a_text(client, tiny):
    assert client.predict(handle_file(PICTURE), api_name="/caption") == tiny.generate(PICTURE, "caption en")


def test_what_is_detected_comes_as_json_beside_the_picture(client, tiny):
    drawn, objects = client.predict(handle_file(PICTURE), "apple", api_name="/detect")
    with Image.open(drawn) as picture, Image.open(PICTURE) as original:
        assert picture.size == original.size
        assert picture.convert("RGB") != original.convert("RGB")
    found = find_detections(tiny.generate(PICTURE, "detect apple"))
    assert objects == [{"label": "apple", "box": list(one.in_pixels(*original.size)), "mask": None} for one in found]
    assert objects


def test_a_step_is_seen_inside_as_json(client, tiny):
    seen = client.predict(
        handle_file(PICTURE), "detect apple", 2, temperature=0.5, top_k=3, seed=1, api_name="/inspect"
    )
    answer = tiny.stream(PICTURE, "detect apple", temperature=0.5, top_k=3, seed=1)
    assert seen["token"]["text"] in [token.text for token in answer]
    assert len(seen["attention"]) == tiny.config.text.num_hidden_layers
    assert sum(not one["is_cut_off"] for one in seen["distribution"]) == 3


def test_what_is_segmented_has_run_lengths(serve, with_mask_decoder):
    mask = "<loc0256><loc0256><loc0768><loc0768>" + "<seg005>" * 16
    client = Client(serve(Answering(with_mask_decoder, f"{mask} cat")), verbose=False)
    _, (cat,) = client.predict(handle_file(PICTURE), "cat", api_name="/segment")
    width, height = Image.open(PICTURE).size
    assert cat["mask"]["size"] == [height, width]
    assert sum(cat["mask"]["counts"]) == width * height
    assert sum(cat["mask"]["counts"][1::2]) == (width // 2) * (height // 2)


def test_several_pictures_are_taken_and_what_has_a_default_may_be_left_out(client, page_address, tiny):
    others = [EXAMPLES / "music.png", EXAMPLES / "sign.png"]
    more = {"more_images": [handle_file(other) for other in others]}
    text, _ = client.predict(handle_file(PICTURE), "caption en", api_name="/generate", **more)
    assert text == tiny.generate([PICTURE, *others], "caption en")
    for settings in ([], [128, 0, 0, 1, None]):  # as calls were before there was `more_images`
        assert end_of_call(page_address, [{"path": uploaded_path(page_address)}, "caption en", *settings]) == (
            "event: complete",
            [tiny.generate(PICTURE, "caption en"), ANY],
        )


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


def test_two_clients_are_answered_in_the_same_steps(long_winded_address, watched):
    clients = [Client(long_winded_address, verbose=False) for _ in range(2)]
    watched.engine.prefill.kept._kept.clear()  # of a question that was asked before, the first token costs nothing
    before, start = watched.tokens, time.monotonic()
    jobs = [
        client.submit(handle_file(PICTURE), "caption en", max_new_tokens=12, api_name="/generate") for client in clients
    ]
    for job in jobs:
        job.result(timeout=60)
    assert watched.tokens - before == 24
    assert time.monotonic() - start < 20 * watched.STEP_SECONDS


def run_async(coroutine):
    """Its result; in a thread of its own, since Playwright's event loop may run in this one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


def test_all_of_64_clients_at_once_are_answered(page_address, tiny):
    path = uploaded_path(page_address)

    async def caption(client):
        call = f"{page_address}gradio_api/call/caption"
        event = (await client.post(call, json={"data": [{"path": path}, "en"]})).json()["event_id"]
        return (await client.get(f"{call}/{event}")).text

    async def captions():
        # Each request has a connection of its own: the server closes idle ones.
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_keepalive_connections=0)) as client:
            return await asyncio.gather(*(caption(client) for _ in range(64)))

    answers = {answer.strip().rpartition("data: ")[2] for answer in run_async(captions())}
    assert answers == {json.dumps([tiny.generate(PICTURE, "caption en")])}


def test_beyond_the_queue_a_sentence_says_when_to_come_again(serve, watched, browser, monkeypatch):
    monkeypatch.setattr(app, "MAX_QUEUE_LENGTH", 1)
    monkeypatch.setitem(app.TOGETHER, "concurrency_limit", 1)
    address = serve(watched)
    clients = [Client(address, verbose=False) for _ in range(3)]
    before = watched.tokens
    jobs = []
    for client in clients[:2]:
        jobs.append(client.submit(handle_file(PICTURE), "caption en", max_new_tokens=50, api_name="/generate"))
        wait_until(lambda: watched.tokens > before)
    time.sleep(1)  # the second is in the queue
    sentence = "1 others are waiting; please come again in about 1 minute."
    with pytest.raises(Exception, match=f"^{sentence}$"):
        clients[2].predict(handle_file(PICTURE), "en", api_name="/caption")
    assert error_of_call(address, [{"path": uploaded_path(address)}, "caption en", 8, 0, 0, 1, None]) == sentence
    tab = browser.new_page()
    tab.goto(address)
    tab.click("#run")
    tab.get_by_text(sentence).wait_for(timeout=20_000)
    tab.close()
    for job in jobs:
        job.cancel()


def test_one_client_cannot_fill_the_queue(serve, watched, monkeypatch):
    monkeypatch.setattr(app, "MAX_CLIENT_SHARE", 2)
    monkeypatch.setattr(streaming, "UNREAD_SECONDS", 1)  # of the first answers, which nobody reads
    monkeypatch.setitem(app.TOGETHER, "concurrency_limit", 1)
    address = serve(watched)
    values = [{"path": uploaded_path(address)}, "caption en", 8, 0, 0, 1, None]
    posted = [httpx.post(f"{address}gradio_api/call/generate", json={"data": values}) for _ in range(4)]
    time.sleep(0.5)
    assert {answer.status_code for answer in posted} == {200}
    sentence = "2 questions from your address are waiting already; please ask again when they are answered."
    assert error_of_call(address, values) == sentence
    elsewhere = {"x-forwarded-for": "8.8.8.8"}
    event = httpx.post(f"{address}gradio_api/call/generate", json={"data": values}, headers=elsewhere).json()
    stream = httpx.get(f"{address}gradio_api/call/generate/{event['event_id']}", timeout=60).text
    assert "event: complete" in stream


def test_an_answer_that_nobody_reads_waits_for_its_reader(serve, watched, monkeypatch):
    monkeypatch.setattr(watched, "STEP_SECONDS", 0.02)
    address = serve(watched)
    before = watched.tokens
    values = [{"path": uploaded_path(address)}, "caption en", 100, 0, 0, 1, None]
    event = httpx.post(f"{address}gradio_api/call/generate", json={"data": values}).json()["event_id"]
    wait_until(lambda: watched.tokens > before)
    time.sleep(2)
    assert watched.tokens - before <= MAX_UNREAD + MAX_AHEAD + 1
    stream = httpx.get(f"{address}gradio_api/call/generate/{event}", timeout=60).text
    texts = [json.loads(line)[0] for line in re.findall(r"^data: (.*)$", stream, re.MULTILINE)]
    assert "event: complete" in stream
    assert texts[-1] == watched.generate(PICTURE, "caption en", max_new_tokens=100)
    assert len(set(texts)) >= 100 / (MAX_AHEAD // 2), "as it grew"


def test_an_answer_that_nobody_reads_for_long_is_given_up(serve, watched, monkeypatch):
    monkeypatch.setattr(streaming, "UNREAD_SECONDS", 1)
    address = serve(watched)
    values = [{"path": uploaded_path(address)}, "caption en", 250, 0, 0, 1, None]
    event = httpx.post(f"{address}gradio_api/call/generate", json={"data": values}).json()["event_id"]
    wait_until(lambda: watched.engine._running)
    wait_until(lambda: not watched.engine._running, seconds=5)
    stream = httpx.get(f"{address}gradio_api/call/generate/{event}", timeout=20).text
    assert stream.startswith("event: error")
    assert "please ask again" in stream


def test_images_are_gone_after_the_kept_time_also_when_a_folder_was_named_as_an_image(
    serve, tiny, monkeypatch, tmp_path
):
    monkeypatch.setattr(hosting, "CLEAN_UP_SECONDS", 0.1)
    with hosting.own_upload_folder() as folder:
        address = serve(tiny)
        (page,) = [one for one in gc.get_objects() if isinstance(one, Page) and one.local_url == address]
        examples = page.own_files()
        Image.new("RGB", (448, 448), "navy").save(tmp_path / "navy.png")
        path, meta = uploaded_path(address, tmp_path / "navy.png"), {"meta": {"_type": "gradio.FileData"}}
        assert Path(path).is_relative_to(folder)
        for named in ({"path": str(Path(path).parent)}, {"path": str(Path(path).parent)} | meta):
            assert re.match(".* is a folder|This call failed", error_of_call(address, [named, "caption en"]))
        assert end_of_call(address, [{"path": path} | meta, "caption en"])[0] == "event: complete"
        with hosting.cleaned_up(folder, 1, examples):
            wait_until(lambda: not Path(path).exists(), seconds=20)
        assert all(Path(one).exists() for one in examples)


def test_a_call_that_is_too_long_gets_one_sentence(page_address):
    sentence = "This request is longer than 128 kB; please upload files, shorten texts."
    data = json.dumps({"data": [{"path": "x"}, "a" * 200_000, 8, 0, 0, 1, None]}).encode()
    for content in (data, iter([data])):
        answer = httpx.post(
            f"{page_address}gradio_api/call/generate", content=content, headers={"content-type": "application/json"}
        )
        assert (answer.status_code, answer.json()["detail"]) == (413, sentence)


@pytest.mark.parametrize(
    ("route", "body", "status"),
    [
        ("queue/join", {"data": [], "fn_index": 9999, "session_hash": "x"}, 500),
        ("call/nothing", {"data": []}, 500),
        ("run/predict", {"data": [], "fn_index": 9999}, 500),
        ("run/caption", {"data": [{"path": "x"}, "en"]}, 404),  # which would go past the queue
    ],
)
def test_a_request_for_what_there_is_not_gets_a_sentence_and_leaves_no_traceback(
    page_address, caplog, route, body, status
):
    answer = httpx.post(f"{page_address}gradio_api/{route}", json=body)
    assert answer.status_code == status
    assert re.match(
        "This call failed; please call as|This API endpoint does not accept direct", answer.json()["detail"]
    )
    assert all(record.exc_info is None for record in caplog.records)


def test_of_a_program_s_call_nothing_stays_on_the_server(serve, tiny):
    address = serve(tiny)
    (page,) = [one for one in gc.get_objects() if isinstance(one, Page) and one.local_url == address]
    path, sessions = uploaded_path(address), page.state_holder.session_data
    for name, values in (("caption", ["en"]), ("segment", ["cat"])):
        event = httpx.post(f"{address}gradio_api/call/{name}", json={"data": [{"path": path}, *values]}).json()
        httpx.get(f"{address}gradio_api/call/{name}/{event['event_id']}", timeout=20)
    wait_until(lambda: not sessions)
    assert not page.answerings._under_way


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
        ("good", "cat " * 25_000, "The prompt has 99999 characters, but this page takes 4096; please shorten it."),
        ("good", "cat " * 600, "The prompt has 60.* tokens, but 512 fit; please shorten it."),
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


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ([{"path": "/etc/hostname"}, "caption en", 8, 0, 0, 1, None], "The picture was not uploaded to this page; "),
        ([{"path": str(PICTURE.resolve())}, "caption en", 8, 0, 0, 1, None], "The picture was not uploaded to this "),
        ([{"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}}, "", 8, 0, 0, 1, None], "A value of this "),
        (["cats.png", "caption en", 8, 0, 0, 1, None], "A value of this call cannot be used .*; please send uploaded "),
        ([{"path": "/a"}], "A value of this call cannot be used .*needed: 8, got: 1"),
    ],
)
def test_a_call_without_an_uploaded_image_or_with_too_few_values_gets_one_sentence(page_address, data, sentence):
    assert re.match(sentence, error_of_call(page_address, data))


def uploaded_path(address, picture=PICTURE):
    """Upload a picture by plain HTTP, as any program may; returns the server's path of it."""
    answer = httpx.post(f"{address}gradio_api/upload", files={"files": picture.open("rb")})
    return answer.json()[0]


def end_of_call(address, data):
    """Call the endpoint by plain HTTP; returns the last event that comes back, and its content."""
    event = httpx.post(f"{address}gradio_api/call/generate", json={"data": data}).json()["event_id"]
    stream = httpx.get(f"{address}gradio_api/call/generate/{event}", timeout=30).text
    event_name, content = stream.strip().split("\n\n")[-1].split("\n")[:2]
    return event_name, json.loads(content.removeprefix("data: "))


def error_of_call(address, data):
    """The sentence of the error that a call ends with, see `end_of_call`."""
    event_name, content = end_of_call(address, data)
    assert event_name == "event: error", content
    return content["error"]


# --- from other languages, and from agents


def test_curl_gets_a_caption(page_address, tiny, tmp_path):
    script = f"""
        path=$(curl -sf -F files=@{PICTURE} {page_address}gradio_api/upload | tr -d '[]"')
        event=$(curl -sf -H 'Content-Type: application/json' {page_address}gradio_api/call/caption \
            -d '{{"data": [{{"path": "'$path'"}}, "en"]}}' | cut -d '"' -f 4)
        curl -sfN {page_address}gradio_api/call/caption/$event
    """
    stream = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60).stdout
    assert json.loads(stream.split("data: ")[-1]) == [tiny.generate(PICTURE, "caption en")]


def test_javascript_gets_a_growing_text(page_address, tiny, tmp_path):
    subprocess.run(
        ["npm", "install", "--silent", "--prefix", tmp_path, JAVASCRIPT_CLIENT], check=True, timeout=300, cwd=tmp_path
    )
    script = tmp_path / "ask.mjs"
    script.write_text("""
        import { readFileSync } from "node:fs";
        import { Client } from "@gradio/client";

        const [address, path] = process.argv.slice(2);
        const app = await Client.connect(address);
        const image = new Blob([readFileSync(path)], { type: "image/png" });
        for await (const message of app.submit("/generate", { image, prompt: "caption en" }))
            if (message.type === "data") console.log(message.data[0]);
        process.exit();
    """)
    lines = subprocess.run(
        ["node", script, page_address, PICTURE], capture_output=True, text=True, check=True, timeout=120
    ).stdout.splitlines()
    assert lines[-1] == tiny.generate(PICTURE, "caption en")
    assert len(set(lines)) >= 3


def test_an_agent_finds_the_tools_and_calls_one(serve, tiny):
    address = serve(tiny, mcp_server=True)

    async def call():
        async with (
            streamablehttp_client(f"{address}gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            tools = (await session.list_tools()).tools
            # As bytes: an address on the server's own machine would be refused.
            image = f"data:image/png;base64,{base64.b64encode(PICTURE.read_bytes()).decode()}"
            result = await session.call_tool("caption", {"image": image, "language": "en"})
            return tools, result, await session.call_tool("caption", {"image": "http://127.0.0.1:9/x.png"})

    tools, result, refused = run_async(call())
    assert httpx.post(f"{address}gradio_api/mcp/", content=bytes(33_000_000)).status_code == 413
    by_name = {tool.name.removeprefix("app_"): tool for tool in tools}
    assert set(by_name) == {"generate", "inspect", "caption", "detect", "segment"}
    assert "boxes" in by_name["detect"].description
    assert by_name["detect"].inputSchema["properties"]["objects"]["description"]
    assert result.content[0].text == tiny.generate(PICTURE, "caption en")
    assert refused.isError
    assert re.match("A value of this call cannot be used .*; please send uploaded files", refused.content[0].text)
