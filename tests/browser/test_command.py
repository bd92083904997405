"""`python app.py` as a deployer runs it, and what importing the package brings along."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager
from threading import Thread

import httpx
import psutil
import pytest
import torch
from conftest import EXAMPLES, ROOT, wait_until
from gradio_client import Client, handle_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_checkpoints import make_reference, save_reference

import paligemma
from paligemma.checkpoints.adapters import LoraConfig, save_adapter
from paligemma.demo.serving import load_checkpoint
from paligemma.training.lora import add_lora, lora_matrices, target_modules

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
        workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for one in (process, *workers):  # those of ZeroGPU would stay
            one.kill()
        process.wait()


def test_the_command_serves_the_page():
    with served(HF_HUB_OFFLINE="1") as (_, address):
        assert "PaliGemma" in httpx.get(address).text
        assert httpx.get(f"{address}/config").json()["analytics_enabled"] is False


def test_a_private_page_lets_in_who_knows_the_password():
    with served(PALIGEMMA_AUTH="ada:love:lace") as (_, address):
        assert httpx.get(f"{address}/config").status_code == 401
        start = time.monotonic()
        assert httpx.post(f"{address}/login", data={"username": "ada", "password": "wrong"}).status_code == 400
        assert time.monotonic() - start > 1, "guessing takes time"
        Client(address, auth=("ada", "love:lace"), verbose=False)


def test_a_page_tells_its_health_to_all_and_its_metrics_to_who_knows_the_password():
    with served("--auth", "ada:lovelace", PALIGEMMA_METRICS="1") as (_, address):
        wait_until(lambda: httpx.get(f"{address}/health").json() == {"status": "ready"})
        assert httpx.get(f"{address}/metrics").status_code == 401
        metrics = httpx.get(f"{address}/metrics", auth=("ada", "lovelace"))
        assert metrics.headers["content-type"].startswith("text/plain")
        assert 'paligemma_active_rows{checkpoint="embedded"} 0.0' in metrics.text
    with served() as (_, address):
        assert httpx.get(f"{address}/metrics").status_code == 404
        assert httpx.get(f"{address}/health").status_code in (200, 503)


def test_other_sites_cannot_use_a_private_page_in_a_visitors_name():
    with served("--auth", "ada:lovelace") as (_, address):
        visitor = httpx.Client(base_url=address)
        visitor.post("/login", data={"username": "ada", "password": "lovelace"})
        for site, mode, status in (
            ("same-origin", "cors", 200),
            ("cross-site", "cors", 403),
            ("same-site", "no-cors", 403),
            ("cross-site", "navigate", 200),
            ("none", "navigate", 200),
        ):
            headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, "Origin": "https://other.example"}
            assert visitor.get("/config", headers=headers).status_code == status, (site, mode)
        post = visitor.post(
            "/gradio_api/call/caption", json={"data": []}, headers=headers | {"Sec-Fetch-Site": "cross-site"}
        )
        assert post.status_code == 403


@pytest.mark.parametrize("pair", ["ada", "ada:", ":lovelace"])
def test_half_a_password_is_refused(pair):
    output, _ = run_app("--auth", pair).communicate(timeout=120)
    assert output.strip().endswith("--auth takes a name and a password with a colon between them: --auth ada:lovelace")


@pytest.mark.parametrize(
    ("option", "command"),
    [
        (["--mcp"], 'pip install "gradio[mcp]"'),
        (["--metrics"], "pip install prometheus_client"),
        (["--cluster", "auto"], 'pip install "ray[serve]"'),
    ],
)
def test_an_option_that_needs_one_more_package_names_it(monkeypatch, capsys, option, command):
    import app

    monkeypatch.setattr(sys, "argv", ["app.py", *option])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        app.main()
    assert command in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--port", "80000"], "The port 80000 is none; please choose one from 1024 to 65535."),
        (["--port", "http"], "argument --port: invalid int value: 'http'"),
        (["--host", "nowhere.invalid"], "The host nowhere.invalid is not known here"),
        (["--replicas", "0"], "0 is no number of replicas; please give one, such as 2, or two: 1-8"),
        (["--replicas", "3-1"], "3-1 is no number of replicas"),
        (["--auth", "ada:lovelace", "--mcp"], "--mcp cannot be protected with --auth"),
    ],
)
def test_options_that_cannot_be_are_refused_with_one_sentence(monkeypatch, capsys, arguments, sentence):
    import app

    monkeypatch.setattr(sys, "argv", ["app.py", *arguments])
    with pytest.raises(SystemExit):
        app.main()
    assert sentence in capsys.readouterr().err


def test_spaces_around_a_setting_do_not_count(monkeypatch):
    from paligemma.demo.options import parse_arguments

    monkeypatch.setattr(sys, "argv", ["app.py", "--model", " owner/name ", "--models", "embedded , a/b,"])
    monkeypatch.setenv("PALIGEMMA_DEVICE", "cpu\n")
    monkeypatch.setenv("PALIGEMMA_REPLICAS", " 1-8 ")
    monkeypatch.setenv("PALIGEMMA_REPLICA_CORES", "2")
    arguments = parse_arguments(None)
    assert (arguments.replicas, arguments.replica_cores) == ((1, 8), 2)
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


def test_an_adapter_is_for_the_checkpoint_that_is_named_first_or_names_it_itself(tmp_path):
    base = save_reference(make_reference(std=0.2), tmp_path / "base")
    config = LoraConfig(str(base), 2, 8, target_modules(["decoder"]))
    vlm = paligemma.load(base)
    add_lora(vlm.model, config)
    for _, up in lora_matrices(vlm.model).values():
        torch.nn.init.normal_(up)
    save_adapter(config, lora_matrices(vlm.model), tmp_path / "adapter")
    expected, plain = (one.generate(PICTURE, "ocr", max_new_tokens=8) for one in (vlm, paligemma.load(base)))
    assert expected != plain
    with served(PALIGEMMA_ADAPTER=str(tmp_path / "adapter")) as (_, address):
        client = Client(address, verbose=False)
        assert client.predict(handle_file(PICTURE), "ocr", 8, api_name="/generate")[0] == expected
    adapters = {str(base): str(tmp_path / "adapter")}
    assert load_checkpoint(str(base), {}, adapters).generate(PICTURE, "ocr", max_new_tokens=8) == expected
    other = shutil.copytree(base, tmp_path / "other")
    assert load_checkpoint(str(other), {}, adapters).generate(PICTURE, "ocr", max_new_tokens=8) == plain


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
    folder = save_reference(make_reference(std=0.2, layers=24), tmp_path / "long_winded")
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


def test_at_the_end_who_waits_in_the_queue_is_told_at_once(tmp_path):
    folder = save_reference(make_reference(std=0.2, layers=24), tmp_path / "long_winded")
    with served("--model", str(folder)) as (process, address):
        clients = [Client(address, verbose=False) for _ in range(18)]
        jobs = [
            client.submit(handle_file(PICTURE), "caption en", max_new_tokens=256, api_name="/generate")
            for client in clients
        ]
        for job in jobs[:2]:
            next(iter(job))
        process.send_signal(signal.SIGTERM)
        outcomes = [job.exception(timeout=120) for job in jobs]
        assert process.wait(timeout=60) == 0
        assert "Traceback" not in process.stdout.read()
    told = [str(error) for error in outcomes if error]
    assert set(told) == {"The page is about to start anew; please ask again in a minute."}
    assert len(told) <= 16
    assert outcomes[:2] == [None, None]


def test_who_interrupts_twice_does_not_wait(tmp_path):
    folder = save_reference(make_reference(std=0.2, layers=24), tmp_path / "long_winded")
    with served("--model", str(folder), GRADIO_TEMP_DIR=str(tmp_path / "uploads")) as (process, address):
        job = Client(address, verbose=False).submit(
            handle_file(PICTURE), "\n".join(["caption en"] * 8), max_new_tokens=256, api_name="/generate"
        )
        next(iter(job))
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == 1
        assert "Traceback" not in process.stdout.read()
    assert not list((tmp_path / "uploads").glob("paligemma-*"))


def test_uploads_go_when_the_page_does_and_a_full_disk_is_said(tmp_path):
    with served(GRADIO_TEMP_DIR=str(tmp_path)) as (process, address):

        def upload():
            return httpx.post(f"{address}/gradio_api/upload", files={"files": PICTURE.open("rb")}, timeout=60)

        assert upload().status_code == 200
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, 1000))
        assert upload().text == "The server cannot store the file (File too large); please try again later."
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        assert "Traceback" not in process.stdout.read()
    assert not list(tmp_path.glob("paligemma-*"))


def call_as_the_page(client, event, data, choice):
    """How a call of one of the page's functions ends, by its number in the page's configuration.

    Args:
        choice: what a click on the page's own HTML brings with it.
    """
    session = str(uuid.uuid4())
    call = {"data": data, "fn_index": event["id"], "session_hash": session, "event_data": {"choice": choice}}
    assert client.post("/queue/join", json=call).status_code == 200
    with client.stream("GET", "/queue/data", params={"session_hash": session}) as stream:
        message = next(line for line in stream.iter_lines() if "process_completed" in line)
    return json.loads(message.removeprefix("data: "))


def test_no_call_gets_an_error_without_a_sentence_or_leaves_its_values_in_the_log():
    with served() as (process, address), httpx.Client(base_url=f"{address}/gradio_api", timeout=60) as client:
        for event in httpx.get(f"{address}/config").json()["dependencies"]:
            inputs = len(event["inputs"])
            for data in (
                [],
                ["SECRET"] * 9,
                [{"SECRET": 1}] * inputs,
                [["SECRET"]] * inputs,
                [None] * inputs,
                [99] * inputs,
            ):
                end = call_as_the_page(client, event, data, data)
                assert end["success"] or end["output"]["error"], (event["api_name"], data)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        log = process.stdout.read()
    assert "SECRET" not in log
    assert "Traceback" not in log
    assert "a call failed: TypeError in " in log


@pytest.mark.slow
def test_ten_thousand_odd_calls_leave_no_traceback_and_a_page_that_answers(tmp_path):
    log = tmp_path / "log"
    with served() as (process, address), httpx.Client(base_url=f"{address}/gradio_api", timeout=120) as client:
        copying = Thread(target=lambda: log.write_text(process.stdout.read()))  # a full pipe would stop the server
        copying.start()
        events = httpx.get(f"{address}/config").json()["dependencies"]
        path = client.post("/upload", files={"files": PICTURE.open("rb")}).json()[0]
        meta = {"_type": "gradio.FileData"}
        files = [
            {"path": one, "meta": meta} for one in (path, "/etc/passwd", os.path.dirname(path), "", "http://[::1]")
        ]
        record = {"path": path, "more": [], "size": [448, 448], "checkpoint": "embedded"}
        record |= {"answers": [["ocr", "<loc0000><loc0000><loc0512><loc0512> cat"]]}
        record |= {"tokens": [{"ids": [5, 6], "probabilities": [0.5, 0.5]}]}
        prompts = ["caption en", "detect cat ; dog", "segment cat", "ocr", "caption en\nocr", "<image>", "x" * 5_000]
        numbers = (
            st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([10**400, -1, 2**64])
        )
        plain = (
            st.none() | st.booleans() | numbers | st.text() | st.sampled_from([*prompts, "embedded", *files, record])
        )
        values = st.recursive(plain, lambda one: st.lists(one) | st.dictionaries(st.text(), one), max_leaves=8)

        @settings(max_examples=10_000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.data())
        def call_oddly(data):
            event = data.draw(st.sampled_from(events))
            inputs = len(event["inputs"])
            length = data.draw(st.sampled_from([inputs, inputs, inputs, inputs - 1, inputs + 1]))
            given_values = data.draw(st.lists(values, min_size=max(0, length), max_size=max(0, length)))
            end = call_as_the_page(client, event, given_values, data.draw(values))
            assert end["success"] or end["output"]["error"]

        call_oddly()
        answer = Client(address, verbose=False).predict(handle_file(PICTURE), "caption en", api_name="/generate")
        assert answer[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        copying.join()
    assert "Traceback" not in log.read_text()


def test_an_interruption_ends_without_a_traceback():
    with served() as (process, _):
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
        assert "Traceback" not in process.stdout.read()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_while_modules_are_imported_ends_at_once_and_without_a_word(number):
    process = run_app()
    wait_until(lambda: any("numpy" in one.path for one in psutil.Process(process.pid).memory_maps()))
    process.send_signal(number)
    assert process.communicate(timeout=10)[0] == ""
    assert process.returncode == -number, "of which a shell makes 130 and 143"


def test_a_checkpoint_that_is_not_there_ends_with_one_sentence():
    for process in (run_app("--model", "/no/such/folder"), run_app(PALIGEMMA_MODEL="/no/such/folder")):
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 1
        assert output.strip().splitlines()[-1] == (
            "There is no folder /no/such/folder; please give a folder or a Hub id such as owner/name."
        )
        assert "Traceback" not in output


def test_settings_come_from_the_environment():
    for process, sentence in (
        (run_app(PALIGEMMA_DTYPE="float33"), "dtype float33 is not known"),
        (run_app(PALIGEMMA_DEVICE="abacus"), "device abacus cannot be used here"),
    ):
        output, _ = process.communicate(timeout=120)
        assert sentence in output


@pytest.mark.parametrize(
    ("variables", "count"),
    [({}, "20000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "passive"}, "None")],
)
def test_threads_of_openmp_wait_awake_for_a_moment_only_unless_who_starts_the_page_says_how(variables, count):
    script = "import app, os, sys; assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    ran = subprocess.run([sys.executable, "-c", script], env=kept | variables, capture_output=True, text=True, cwd=ROOT)
    assert ran.stdout.strip() == count, ran.stderr


def test_the_page_is_there_before_torch_and_nothing_imports_transformers():
    code = (
        "import paligemma, app, sys; assert 'torch' not in sys.modules;"
        "paligemma.load(); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
