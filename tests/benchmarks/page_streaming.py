"""What an answer keeps of its speed while the page streams it to headless Chromium on the same cores.

    python tests/benchmarks/page_streaming.py                                  # the embedded checkpoint
    python tests/benchmarks/page_streaming.py --folder FOLDER --dtype int8     # such as full_size.py leaves with --folder

Prints tokens per second of the bare loop and of the page, as the page itself says them, in turn; and the ratio of medians.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from conftest import find_browser

from paligemma.demo.handlers import SETTINGS

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "paligemma" / "demo" / "examples" / "cats.png"
PROMPT = "caption en"
TOKENS = next(int(setting.default) for setting in SETTINGS if setting.name == "max_new_tokens")  # of each answer
SPEED = re.compile(r"([\d.]+) tokens/s · (\d+) tokens")
LONGEST = 20 * 60 * 1000  # milliseconds for an answer, or for a checkpoint to be loaded
BARE = """
import sys, time, paligemma
folder, dtype, picture, prompt, count, rounds = sys.argv[1:]
vlm = paligemma.load(folder or None, dtype=dtype)
vlm.model.config = type(vlm.model.config)(**{**vars(vlm.model.config), "eos_token_ids": ()})
for _ in range(int(rounds)):
    times = [time.perf_counter() for _ in vlm.stream(picture, prompt, max_new_tokens=int(count))]
    print((len(times) - 1) / (times[-1] - times[0]))
"""
# The page's own program, in which no token ends an answer either: those of random weights may end at once.
PAGE = """
import dataclasses, sys
from paligemma.config import PaliGemmaConfig
read = PaliGemmaConfig.from_file
PaliGemmaConfig.from_file = staticmethod(lambda file: dataclasses.replace(read(file), eos_token_ids=()))
import app
app.main()
"""


def bare(folder: str, dtype: str, rounds: int) -> list[float]:
    """Tokens per second of the package's own loop, in a process of its own."""
    command = [sys.executable, "-c", BARE, folder, dtype, str(PICTURE), PROMPT, str(TOKENS), str(rounds)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    return [float(line) for line in done.stdout.split()]


@contextmanager
def running_page(folder: str, dtype: str) -> Iterator[str]:
    """The address of a page with the checkpoint."""
    command = [sys.executable, "-c", PAGE, "--dtype", dtype, *(["--model", folder] if folder else [])]
    server = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    try:
        assert server.stdout is not None
        yield next(found[0] for line in server.stdout if (found := re.search(r"http://\S+", line)))
    finally:
        server.terminate()
        server.wait()


def streamed(page: Page) -> float:
    """Tokens per second of one answer, as the page says them when it is there."""
    whole = re.compile(rf"· {TOKENS} tokens")
    page.click("#run")
    expect(page.locator("#speed")).not_to_contain_text(whole)  # of the answer before
    expect(page.locator("#speed")).to_contain_text(whole, timeout=LONGEST)
    found = SPEED.search(page.locator("#speed").inner_text())
    assert found is not None
    return float(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="", help="the checkpoint; the embedded one if not given")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rates = {"bare": bare(options.folder, options.dtype, 1 + options.rounds)[1:], "page": []}
    with sync_playwright() as playwright, running_page(options.folder, options.dtype) as address:
        browser = playwright.chromium.launch(executable_path=find_browser(playwright), args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(address)
        page.locator("#prompt textarea, #prompt input").fill(PROMPT)
        page.set_input_files("#picture input[type=file]", str(PICTURE))
        page.wait_for_timeout(3000)
        for _ in range(1 + options.rounds):
            rates["page"].append(streamed(page))
        browser.close()
    del rates["page"][0]  # which also reads the picture
    rates["bare"] += bare(options.folder, options.dtype, 1 + options.rounds)[1:]
    for name, measured in rates.items():
        print(f"{name}: {statistics.median(measured):.2f} tokens/s ({min(measured):.2f}–{max(measured):.2f})")
    print(f"page / bare: {statistics.median(rates['page']) / statistics.median(rates['bare']):.2f}")


if __name__ == "__main__":
    main()
