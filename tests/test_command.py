"""`python app.py` as a deployer runs it, and what importing the package brings along."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_app(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "app.py"), *arguments],
        env={**os.environ, **environment},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_command_serves_the_page():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = run_app("--port", str(port), "--host", "127.0.0.1", HF_HUB_OFFLINE="1")
    try:
        end = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5) as answer:
                    assert answer.status == 200
                    assert "PaliGemma" in answer.read().decode()
                    break
            except OSError:
                assert process.poll() is None, process.stdout.read()
                assert time.monotonic() < end, "the page does not come up"
                time.sleep(0.2)
    finally:
        process.kill()
        process.wait()


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


def test_the_package_never_imports_transformers():
    code = "import paligemma, app, sys; paligemma.load(); assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
