"""The README's way from a folder of pictures to a tuned Space, run as it is written there."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import wait_until
from gradio_client import Client, handle_file

import paligemma
from paligemma.checkpoints import EMBEDDED_FOLDER
from paligemma.scenes.artwork import KINDS, load_sheet
from paligemma.scenes.painter import Painter

ROOT = Path(__file__).parents[2]
WRITER = "hf_writer"


def commands():
    """The first block of the README's section, without and with the line that starts the page."""
    section = (ROOT / "README.md").read_text().partition("\n## Fine-tune your own\n")[2]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1]
    before, page, after = re.split(r"^(python app\.py .*)\n", block, flags=re.MULTILINE)
    return before, page, after


def draw_pictures(folder):
    painter, rng = Painter(load_sheet()), np.random.default_rng(0)
    for kind in (0, 1, 2):
        (folder / KINDS[kind].name).mkdir(parents=True)
        for number in range(8):
            painter.scene(rng, 112, [kind]).image.save(folder / KINDS[kind].name / f"{number}.png")


@contextmanager
def page_of(command, folder, environment):
    """The address of a page that a command of the shell starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        f"exec {command}", shell=True, cwd=folder, env={**environment, "GRADIO_SERVER_PORT": str(port)}
    )
    try:
        wait_until(lambda: process.poll() is not None or answers(f"http://127.0.0.1:{port}"), seconds=300)
        assert process.poll() is None
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def answers(address):
    try:
        return httpx.get(address).is_success
    except httpx.HTTPError:
        return False


def answer_of(address, picture):
    settings = {"prompt": "answer en what is it?", "max_new_tokens": 16, "api_name": "/generate"}
    return Client(address, verbose=False).predict(handle_file(picture), **settings)[0]


@pytest.mark.slow
def test_a_folder_of_pictures_becomes_a_tuned_space(hub, tmp_path, monkeypatch):
    hub.uploads, hub.writers = tmp_path / "hub", {WRITER}
    hub.add("google/paligemma2-3b-pt-224", EMBEDDED_FOLDER)
    work = shutil.copytree(ROOT, tmp_path / "work", ignore=shutil.ignore_patterns(".*", "__pycache__", "tests"))
    draw_pictures(work / "pictures")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": WRITER,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    before, page, after = commands()
    for script in (before, after):
        subprocess.run(["bash", "-ec", script], cwd=work, env=environment, check=True)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    picture = next((work / "pictures").glob("*/*"))
    expected = paligemma.load(work / "tuned").generate(picture, "answer en what is it?", max_new_tokens=16)
    assert expected
    with page_of(page, work, environment) as address:
        assert answer_of(address, picture) == expected

    space = hub.uploads / "spaces" / "YOU" / "demo"
    assert {"app.py", "README.md", "requirements.txt", "paligemma"} <= {file.name for file in space.iterdir()}
    assert not {"pictures", "tuned", "train.jsonl"} & {file.name for file in space.iterdir()}
    assert hub.variables["spaces/YOU/demo"] == {"PALIGEMMA_MODEL": "YOU/tuned"}
    with page_of("python app.py", space, {**environment, **hub.variables["spaces/YOU/demo"]}) as address:
        assert answer_of(address, picture) == expected
