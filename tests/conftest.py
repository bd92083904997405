"""What several tests need: loaded checkpoints, a served page, a browser."""

from __future__ import annotations

import copy
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from filelock import FileLock
from hub_server import HubServer
from huggingface_hub.utils import _http
from random_checkpoints import make_reference, save_reference
from tokenizers import Tokenizer

import paligemma
from paligemma.checkpoints import EMBEDDED_FOLDER, save_checkpoint
from paligemma.config import PaliGemmaConfig, TextConfig, VisionConfig
from paligemma.demo.serving import EMBEDDED, Models
from paligemma.kv_cache import KeptCaches
from paligemma.mask_decoder import MaskDecoder
from paligemma.model import PaliGemma

# Small models gain nothing from a second thread, and two that wait for each other on busy cores lose minutes.
torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "paligemma" / "demo" / "examples"
ONE_TOKEN = 1  # of a stopped answer: the one under way
BROWSER_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep int8 weights out of the user's cache, whose lock another program may hold for minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache") / "hub"))
        yield


@pytest.fixture
def int8_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where int8 and int4 weights are kept, for one test alone."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "paligemma-int8"


@pytest.fixture(scope="session")
def tiny() -> paligemma.VisionLanguageModel:
    """The embedded checkpoint."""
    return paligemma.load()


@pytest.fixture
def models(tiny: paligemma.VisionLanguageModel) -> Models:
    """What a page offers that has the embedded checkpoint alone."""
    return Models([None], lambda source, **_: tiny)


@pytest.fixture
def nothing_kept(tiny: paligemma.VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is computed by `tiny`, also what was asked before."""
    monkeypatch.setattr(tiny.engine.prefill, "kept", KeptCaches(0))


@pytest.fixture(scope="session")
def with_mask_decoder(tiny: paligemma.VisionLanguageModel) -> paligemma.VisionLanguageModel:
    """The embedded checkpoint beside a mask decoder whose masks are the whole box."""
    decoder = MaskDecoder(codes=128, code_width=8, width=16)
    decoder.decoder[-1].bias.data.fill_(100)
    return paligemma.VisionLanguageModel(tiny.model, tiny.processor, decoder)


@pytest.fixture(scope="session")
def long_winded(tmp_path_factory: pytest.TempPathFactory) -> paligemma.VisionLanguageModel:
    """A random checkpoint, which never comes to an end by itself."""
    return paligemma.load(save_reference(make_reference(std=0.2), tmp_path_factory.mktemp("long_winded")))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with no repositories; the library asks it, and keeps its cache and token in `tmp_path`."""
    server = HubServer()
    # The library reads its environment once, when it is first imported.
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    # It knows the Hub's routes, and so a repository that it may not see, by https only.
    pattern = _http.REPO_API_REGEX
    monkeypatch.setattr(
        _http, "REPO_API_REGEX", re.compile(pattern.pattern.replace("https:", "https?:"), pattern.flags)
    )
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # It waits up to half a minute between its attempts.
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()
    server.close()


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A checkpoint that loads at once and is none other, with files beside it that no loader needs."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = Tokenizer.from_file(str(EMBEDDED_FOLDER / "tokenizer.json"))
    vision = VisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = TextConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
    )
    config = PaliGemmaConfig(vision, text, image_token_id=tokenizer.token_to_id("<image>"))
    save_checkpoint(PaliGemma(config), tokenizer, folder, torch.float32)
    return folder


@pytest.fixture
def load_both(tmp_path: Path) -> Callable[..., tuple[object, paligemma.VisionLanguageModel]]:
    """A function that makes a reference with the given sizes and loads it with ours as well."""

    def load(**sizes):
        reference = make_reference(**sizes)
        return reference, paligemma.load(save_reference(reference, tmp_path / "checkpoint"))

    return load


class Watched(paligemma.VisionLanguageModel):
    """A model that counts the tokens that are computed, and takes as long for each step as a large one would."""

    STEP_SECONDS = 0.4

    def __init__(self, vlm: paligemma.VisionLanguageModel):
        super().__init__(copy.copy(vlm.model), vlm.processor, vlm.mask_decoder)
        self.tokens = 0
        logits = self.model.logits

        def count(hidden_states: torch.Tensor) -> torch.Tensor:
            time.sleep(self.STEP_SECONDS)
            self.tokens += len(hidden_states)
            return logits(hidden_states)

        self.model.logits = count


class Answering(paligemma.VisionLanguageModel):
    """Answers every prompt with the same text, word by word."""

    def __init__(self, vlm: paligemma.VisionLanguageModel, text: str):
        super().__init__(vlm.model, vlm.processor, vlm.mask_decoder)
        self._pieces = re.findall(r"(?:<\w+>)+| ?[^ <]+| ", text)

    def stream_batch(self, images: list, prompts: list, **settings: object) -> Pieces:
        return Pieces((number, piece) for number in range(len(prompts)) for piece in (*self._pieces, None))


class Pieces:
    """An `AnswerBatch` of texts that are known, a token each."""

    def __init__(self, pieces: Iterator[tuple[int, str | None]]):
        self._pieces, self._start = pieces, time.monotonic()

    def take(self) -> list[tuple[int, object]]:
        for number, piece in self._pieces:
            time.sleep(0.3 * (piece is not None))
            seconds = time.monotonic() - self._start
            return [(number, None if piece is None else paligemma.Token(0, piece, 1.0, seconds))]
        return []

    def close(self) -> None:
        self._pieces = iter(())


def wait_until(condition, seconds=60, tab=None):
    """Poll; a browser's tab must be given, if there is one, for it to go on meanwhile."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        tab.wait_for_timeout(50) if tab else time.sleep(0.05)


def tokens_after(watched, end_it):
    """How many more tokens are computed once `end_it` has returned, the one under way included."""
    before = watched.tokens
    wait_until(lambda: watched.tokens > before)  # a step begins, during which the news travels
    end_it()  # which takes a browser longer than a step, where cores are busy
    before = watched.tokens
    time.sleep(2)
    return watched.tokens - before


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[[object], str]]:
    """Start the page for a model, or for `Models`, on a free port and return its address."""
    import app

    pages = []

    def start(model: object, **settings: object) -> str:
        if not isinstance(model, Models):
            loaded, model = model, Models([None], lambda source, **_: loaded)
            model.get(EMBEDDED)
        page = app.build_page(model)
        settings |= app.LAUNCH_SETTINGS
        settings["app_kwargs"] = dict(settings["app_kwargs"])  # Gradio writes into it, for tools of agents
        _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, **settings)
        pages.append(page)
        return address

    yield start
    for page in pages:
        page.close()


@pytest.fixture(scope="session")
def page_address(serve: Callable[[object], str], tiny: paligemma.VisionLanguageModel) -> str:
    """The page with the embedded checkpoint."""
    return serve(tiny)


@pytest.fixture(scope="session")
def watched(long_winded: paligemma.VisionLanguageModel) -> Watched:
    return Watched(long_winded)


@pytest.fixture(scope="session")
def long_winded_address(serve: Callable[[object], str], watched: Watched) -> str:
    """The page with the long-winded checkpoint."""
    return serve(watched)


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    """Headless Chromium or Chrome: one that is here, else Playwright's own download, else Debian's package."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-background-networking", "--disable-component-update"]
        chromium = playwright.chromium.launch(executable_path=find_browser(playwright), args=arguments)
        yield chromium
        chromium.close()


def write_png_that_claims(path: Path, width: int, height: int) -> None:
    """A small file whose header promises any number of pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)  # one bit a pixel, grey
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def find_browser(playwright: object) -> str:
    with FileLock(Path(tempfile.gettempdir(), "paligemma-tests-browser.lock")):  # one process installs it for all
        return _find_browser(playwright)


def _find_browser(playwright: object) -> str:
    found = next(filter(None, map(shutil.which, BROWSER_NAMES)), None)
    if found:
        return found
    own, install = playwright.chromium.executable_path, (sys.executable, "-m", "playwright")
    if Path(own).exists():
        return own
    if _succeeds(*install, "install", "chromium"):
        _succeeds(*install, "install-deps", "chromium")  # needs root; where it fails, the libraries may be there
        return own
    if _succeeds("apt-get", "update") and _succeeds("apt-get", "install", "-y", "chromium"):
        return shutil.which("chromium")
    pytest.fail("The browser tests need Chromium or Chrome, and neither could be installed; please install one.")


def _succeeds(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=600).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
