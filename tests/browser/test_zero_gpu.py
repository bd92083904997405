"""The page on ZeroGPU: the real `spaces` package, with its device API played and a CPU in the GPU's place."""

from __future__ import annotations

import http.server
import json
import threading
from urllib.parse import parse_qs, urlsplit

import pytest
from conftest import EXAMPLES, ROOT
from gradio_client import Client, handle_file
from playwright.sync_api import expect
from random_checkpoints import make_reference, save_reference
from test_command import served

import paligemma
from paligemma.demo.handlers import EMPTY_ANSWER

PICTURE = EXAMPLES / "cats.png"
GPU = {"idle": True, "nvidiaIndex": 0, "nvidiaUUID": "GPU-0", "allowToken": "token"}


class DeviceApi(http.server.ThreadingHTTPServer):
    """The routes that `spaces` calls: it lends a GPU, unless `refusals` has a status and a body for the next call."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.calls = []
        self.refusals = []
        self.seconds = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            path = urlsplit(self.path)
            self.server.calls.append(path.path)
            status, body = 200, {}
            if path.path == "/schedule":
                self.server.seconds.append(int(parse_qs(path.query)["durationSeconds"][0]))
                status, body = self.server.refusals.pop() if self.server.refusals else (200, GPU)
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass


@pytest.fixture(scope="module")
def device_api():
    with DeviceApi() as api:
        threading.Thread(target=api.serve_forever, daemon=True).start()
        yield api
        api.shutdown()


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory):
    return save_reference(make_reference(std=0.2), tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """The folder that `spaces` packs tensors into."""
    return tmp_path_factory.mktemp("packs")


@pytest.fixture(scope="module")
def zero_gpu(device_api, other_checkpoint, packs, tmp_path_factory):
    """The page, with two checkpoints."""
    environment = {
        "SPACES_ZERO_GPU": "1",
        "SPACES_ZERO_DEVICE_API_URL": f"http://127.0.0.1:{device_api.server_port}",
        "ZEROGPU_OFFLOAD_DIR": str(packs),
        "HOME": str(tmp_path_factory.mktemp("home")),
    }
    script = str(ROOT / "tests" / "zero_gpu.py")
    with served("--models", f"embedded,{other_checkpoint}", under=[script], **environment) as (_, address):
        yield address


@pytest.fixture(scope="module")
def in_bfloat16():
    """What a GPU runs the embedded checkpoint in."""
    return paligemma.load(dtype="bfloat16")


def test_the_models_are_packed_and_the_worker_answers_with_them(zero_gpu, device_api, packs, in_bfloat16):
    assert "/startup-report" in device_api.calls
    parameters = sum(parameter.numel() for parameter in in_bfloat16.model.parameters())
    assert sum(file.stat().st_size for file in packs.iterdir()) > 2 * parameters
    client = Client(zero_gpu, verbose=False)
    for prompt in ("caption en", "detect cat"):
        text, _ = client.predict(handle_file(PICTURE), prompt, api_name="/generate")
        assert text == in_bfloat16.generate(PICTURE, prompt)
    seen = client.predict(handle_file(PICTURE), "detect cat", 1, api_name="/inspect")
    assert seen["token"]["text"] == list(in_bfloat16.stream(PICTURE, "detect cat"))[1].text
    _, objects = client.predict(handle_file(PICTURE), "cat", api_name="/segment")
    assert objects
    assert all(one["mask"] for one in objects), "masks are decoded where there is no GPU"


def test_the_page_says_what_runs_and_answers_with_another_checkpoint(zero_gpu, browser, other_checkpoint):
    tab = browser.new_page()
    tab.goto(f"{zero_gpu}?checkpoint={other_checkpoint}&max_new_tokens=5")
    expect(tab.locator("#status")).to_contain_text("It runs in bfloat16 on cuda:0.")
    tab.locator("#examples").get_by_text("caption en").click()
    expect(tab.locator("#figure svg")).to_have_count(0, timeout=30_000)
    expect(tab.locator("#copy")).to_be_visible(timeout=30_000)
    text = paligemma.load(other_checkpoint, dtype="bfloat16").generate(PICTURE, "caption en", max_new_tokens=5)
    expect(tab.locator("#answers .text")).to_have_text(text or EMPTY_ANSWER, timeout=60_000)
    tab.click("#see-inside")
    expect(tab.locator("#inside img").first).to_be_visible(timeout=30_000)
    tab.close()


# In the page itself, since the answer may be over before Playwright has clicked.
STOP_SOON = """() => new Promise((done) => {
    const looking = setInterval(() => {
        if (document.querySelector("#speed").innerText.includes("tokens/s")) {
            clearInterval(looking);
            document.querySelector("#stop").click();
            done();
        }
    }, 5);
})"""


def test_stop_ends_the_worker_s_answer_and_keeps_its_text(zero_gpu, browser, other_checkpoint):
    tab = browser.new_page()
    tab.goto(f"{zero_gpu}?checkpoint={other_checkpoint}&max_new_tokens=256")
    tab.locator("#prompt textarea").fill("\n".join(f"caption en {number}" for number in range(8)))
    tab.click("#run")
    tab.evaluate(STOP_SOON)
    expect(tab.locator("#copy")).to_be_visible(timeout=10_000)
    tokens = int(tab.locator("#speed").inner_text().split(" tokens")[-2].split()[-1])
    assert tokens < 8 * 256
    tab.close()


def test_a_gpu_is_asked_for_as_long_as_the_answer_may_take(zero_gpu, device_api):
    client = Client(zero_gpu, verbose=False)
    for prompt, tokens in (("caption en", 10), ("caption en", 200), ("caption en\nocr", 200)):
        client.predict(handle_file(PICTURE), prompt, max_new_tokens=tokens, api_name="/generate")
    few, many, of_two = device_api.seconds[-3:]
    assert few < many < of_two <= 120


@pytest.mark.parametrize(
    ("refusal", "sentence"),
    [
        ((429, {"left": 3, "wait": 60}), "Space app has reached its GPU limit. .*"),
        ((503, {}), "No GPU was available"),
    ],
)
def test_what_zero_gpu_says_reaches_clients_and_the_page(zero_gpu, device_api, browser, refusal, sentence):
    device_api.refusals += [refusal] * 2
    with pytest.raises(Exception, match=f"^{sentence}"):
        Client(zero_gpu, verbose=False).predict(handle_file(PICTURE), "en", api_name="/caption")
    tab = browser.new_page()
    tab.goto(zero_gpu)
    tab.locator("#examples").get_by_text("caption en").click()
    tab.get_by_text(sentence.partition(".")[0]).wait_for(timeout=20_000)
    tab.close()


def test_an_error_in_the_worker_comes_back_as_its_sentence(zero_gpu):
    with pytest.raises(Exception, match="^temperature is -1; .*please give"):
        Client(zero_gpu, verbose=False).predict(
            handle_file(PICTURE), "caption en", temperature=-1, api_name="/generate"
        )
