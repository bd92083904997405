"""`python app.py` as a deployer runs it, and what importing the package brings along."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import pytest
from conftest import EXAMPLES, ROOT
from gradio_client import Client, handle_file
from random_checkpoints import make_reference, save_reference

import paligemma
from paligemma.demo.serving import load_checkpoint

PICTURE = EXAMPLES / "cats.png"


def run_app(*arguments, under=(), **environment):
    return subprocess.Popen(
        [sys.executable, *under, str(ROOT / "app.py"), *arguments],
        env={**os.environ, **environment},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextmanager
def served(*arguments, **environment):
    """The command with a page that answers, and its address; see `run_app`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    process = run_app("--port", address.rpartition(":")[2], "--host", "127.0.0.1", *arguments, **environment)
    try:
        end = time.monotonic() + 120
        while True:
            try:
                if httpx.get(address, timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < end, "the page does not come up"
            time.sleep(0.2)
        yield process, address
    finally:
        process.kill()
        process.wait()


def test_the_command_serves_the_page():
    with served(HF_HUB_OFFLINE="1") as (_, address):
        assert "PaliGemma" in httpx.get(address).text
        assert httpx.get(f"{address}/config").json()["analytics_enabled"] is False


def test_a_private_page_lets_in_who_knows_the_password():
    with served("--auth", "ada:love:lace") as (_, address):
        assert httpx.get(f"{address}/config").status_code == 401
        assert httpx.post(f"{address}/login", data={"username": "ada", "password": "wrong"}).status_code == 400
        Client(address, auth=("ada", "love:lace"), verbose=False)


@pytest.mark.parametrize("pair", ["ada", "ada:", ":lovelace"])
def test_half_a_password_is_refused(pair):
    output, _ = run_app("--auth", pair).communicate(timeout=120)
    assert output.strip().endswith("--auth takes a name and a password with a colon between them: --auth ada:lovelace")


def test_agents_need_one_more_package_which_is_named(monkeypatch, capsys):
    import app

    monkeypatch.setattr(sys, "argv", ["app.py", "--mcp"])
    monkeypatch.setattr(app.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        app.main()
    assert 'pip install "gradio[mcp]"' in capsys.readouterr().err


def test_spaces_around_a_setting_do_not_count(monkeypatch):
    import app

    monkeypatch.setattr(sys, "argv", ["app.py", "--model", " owner/name ", "--models", "embedded , a/b,"])
    monkeypatch.setenv("PALIGEMMA_DEVICE", "cpu\n")
    arguments = app._parse_arguments()
    assert arguments.sources == ["owner/name", "embedded", "a/b"]
    assert arguments.device == "cpu"


def test_several_checkpoints_are_offered(tmp_path):
    folder = save_reference(make_reference(std=0.2), tmp_path / "other")
    with served(PALIGEMMA_MODELS=f"embedded, {folder}") as (_, address):
        (menu,) = [
            component["props"]
            for component in httpx.get(f"{address}/config").json()["components"]
            if component["props"].get("elem_id") == "checkpoint"
        ]
    assert [name for name, _ in menu["choices"]] == ["embedded", str(folder)]
    assert menu["visible"]


def test_a_checkpoint_without_a_tokenizer_takes_the_one_that_is_named(tmp_path, tiny):
    folder = save_reference(make_reference(std=0.2), tmp_path / "other")
    tokenizer = (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    arguments = ("--model", str(folder), "--models", "embedded")
    with served(*arguments, PALIGEMMA_TOKENIZER=str(tokenizer)) as (process, address):
        client = Client(address, verbose=False)
        answer, _ = client.predict(handle_file(PICTURE), "caption en", max_new_tokens=8, api_name="/generate")
    vlm = paligemma.load(folder, tokenizer=tmp_path)
    assert answer == vlm.generate(PICTURE, "caption en", max_new_tokens=8)
    assert load_checkpoint(None, {"tokenizer": "/no/such/file"}).generate(PICTURE, "ocr") == tiny.generate(
        PICTURE, "ocr"
    )


def test_the_end_waits_for_the_answer_under_way(tmp_path):
    folder = save_reference(make_reference(std=0.2), tmp_path / "long_winded")
    with served("--model", str(folder)) as (process, address):
        client = Client(address, verbose=False)
        job = client.submit(handle_file(PICTURE), "caption en", max_new_tokens=256, api_name="/generate")
        next(iter(job))
        assert not job.done()
        process.send_signal(signal.SIGTERM)
        job.result(timeout=60)
        assert process.wait(timeout=60) == 0
        log = process.stdout.read()
    assert "tokens=256" in log
    assert "outcome=finished" in log


def test_an_interruption_ends_without_a_traceback():
    with served() as (process, _):
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
        assert "Traceback" not in process.stdout.read()


def test_a_checkpoint_that_is_not_there_ends_with_one_sentence():
    for process in (run_app("--model", "/no/such/folder"), run_app(PALIGEMMA_MODEL="/no/such/folder")):
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 1
        assert output.strip().splitlines()[-1] == (
            "There is no folder /no/such/folder; please give a folder or a Hub id such as owner/name."
        )
        assert "Traceback" not in output


def test_settings_come_from_the_environment():
    process = run_app(PALIGEMMA_DTYPE="float33")
    output, _ = process.communicate(timeout=120)
    assert "dtype float33 is not known" in output
    process = run_app(PALIGEMMA_DEVICE="abacus")
    output, _ = process.communicate(timeout=120)
    assert "device abacus cannot be used here" in output


def test_the_page_is_there_before_torch_and_nothing_imports_transformers():
    code = (
        "import paligemma, app, sys; assert 'torch' not in sys.modules;"
        "paligemma.load(); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
