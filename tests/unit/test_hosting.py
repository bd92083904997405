"""What it takes to serve a page to others, without a page."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import wait_until
from gradio.utils import get_upload_folder
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

import app
from paligemma import PaliGemmaError
from paligemma.demo import hosting
from paligemma.demo.handlers import EXAMPLES
from paligemma.demo.serving import Models


def test_uploads_old_enough_are_deleted_whole_or_not_and_examples_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(hosting, "CLEAN_UP_SECONDS", 0.1)
    (tmp_path / "hash").mkdir()
    (tmp_path / "empty").mkdir()
    whole, cut_off, example = tmp_path / "hash" / "cats.png", tmp_path / "tmpx7", tmp_path / "example.png"
    for path in (whole, cut_off, example):
        path.write_text("x")
    with hosting.cleaned_up(tmp_path, seconds=3, kept={str(example)}):
        time.sleep(1)
        assert whole.exists()
        assert cut_off.exists()
        wait_until(lambda: os.listdir(tmp_path) == ["example.png"])


def test_the_examples_of_the_page_are_not_deleted(tiny):
    with hosting.own_upload_folder() as folder:
        examples = app.build_page(Models([None], lambda source, **_: tiny)).own_files()
        (folder / "upload.png").touch()
        hosting.delete_old_files(folder, -1, examples)
        assert sorted(Path(path).name for path in examples) == sorted(example["picture"] for example in EXAMPLES)
        assert all(os.path.exists(path) for path in examples)
        assert not (folder / "upload.png").exists()


def test_the_clean_up_goes_on_after_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(hosting, "CLEAN_UP_SECONDS", 0.1)
    delete, calls = hosting.delete_old_files, []

    def fail_first(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise IsADirectoryError
        delete(*arguments)

    monkeypatch.setattr(hosting, "delete_old_files", fail_first)
    (tmp_path / "old.png").write_text("x")
    with hosting.cleaned_up(tmp_path, seconds=0):
        wait_until(lambda: not os.listdir(tmp_path))


def test_a_server_has_an_upload_folder_of_its_own_which_goes_with_it(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with hosting.own_upload_folder() as folder:
        assert Path(get_upload_folder()) == folder
        (folder / "cut off").write_text("x")
    assert get_upload_folder() == str(tmp_path)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("host", "port", "sentence"),
    [
        (None, 0, "The port 0 is none"),
        (None, -1, "The port -1 is none"),
        ("0.0.0.0", 80000, "The port 80000 is none; please choose one from 1024 to 65535."),
        ("nowhere.invalid", None, "The host nowhere.invalid is not known here"),
        ("x" * 100, 7860, "The host xxx.* is not known here"),
        ("192.0.2.1", 7860, "A page cannot listen on 192.0.2.1, port 7860 .*; please choose another"),
    ],
)
def test_an_address_where_no_page_can_be_is_refused(host, port, sentence):
    with pytest.raises(PaliGemmaError, match=sentence):
        hosting.check_address(host, port)


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(PaliGemmaError, match=f"cannot listen on 127.0.0.1, port {port} .*; please choose another"):
            hosting.check_address(None, port)
    hosting.check_address("localhost", port)


def test_after_a_wrong_password_the_next_is_looked_at_later(monkeypatch):
    monkeypatch.setattr(hosting, "WRONG_PASSWORD_SECONDS", 0.2)
    password = hosting.Password("ada", "lovelace")

    async def tries():
        start = time.monotonic()
        assert await password.check("ada", "lovelace")
        assert time.monotonic() - start < 0.2
        words = ["love", "ace", "", "ä", "lovelace"]
        assert await asyncio.gather(*(password.check("ada", word) for word in words)) == [False] * 4 + [True]
        assert time.monotonic() - start > 0.8
        assert not await password.check("bob", "lovelace")

    with ThreadPoolExecutor(1) as thread:  # since Playwright's event loop may run in this one
        thread.submit(asyncio.run, tries()).result()


def test_an_address_may_upload_so_much_within_an_hour(monkeypatch):
    async def count(scope, receive, send):
        await PlainTextResponse(str(len(await Request(scope, receive).body())))(scope, receive, send)

    limited = hosting.UploadLimit(count, length=1_000_000)
    one, other = (TestClient(limited, client=(address, 5000)) for address in ("8.8.8.8", "9.9.9.9"))
    start, file = time.monotonic(), bytes(600_000)
    assert [one.post("/gradio_api/upload", content=file).text for _ in range(2)] == ["600000", "600000"]
    refused = one.post("/gradio_api/upload", content=file)
    assert refused.status_code == 429
    assert refused.text.startswith(
        "More than 1 MB were uploaded from your address within an hour; please try again later"
    )
    assert one.post("/gradio_api/call/caption", content=file).status_code == 200
    assert other.post("/gradio_api/upload", content=file).status_code == 200
    monkeypatch.setattr(time, "monotonic", lambda: start + 3700)
    assert one.post("/gradio_api/upload", content=file).status_code == 200
