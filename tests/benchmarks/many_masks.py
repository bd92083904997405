"""What masks in a large picture cost beside the model: `/generate` against the model alone, at 12 megapixels.

    python tests/benchmarks/many_masks.py

Asks the embedded checkpoint `segment car ; bus ; tree ; dog` in 1, 2 and 4 prompts about a picture of 4000 x 3000 pixels,
as the endpoint's handler does (the file opened, each object's mask made in the picture's size, all as JSON), and the
model alone with the opened picture, in turn. Seconds are medians, of the wall clock and of all threads' computing.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from PIL import Image  # noqa: E402

from paligemma.demo import handlers  # noqa: E402
from paligemma.demo.serving import EMBEDDED, Models, load_checkpoint  # noqa: E402
from paligemma.images import open_image  # noqa: E402

PROMPT = "segment car ; bus ; tree ; dog"
ROUNDS = 7
MAX_NEW_TOKENS = 256


def measure(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the wall clock, and of computing."""
    wall, computing = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - computing


def main() -> None:
    models = Models([None], lambda source, **settings: load_checkpoint(source, settings={}, **settings))
    models.start(EMBEDDED).result()
    vlm = models.get(EMBEDDED)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        path = f"{folder}/large.jpg"
        with Image.open(ROOT / "paligemma" / "demo" / "examples" / "traffic.png") as image:
            image.convert("RGB").resize((4000, 3000)).save(path)
        opened = open_image(path)
        print("prompts   model alone      /generate          ratio (of computing)")
        for count in (1, 2, 4):
            prompts = [PROMPT] * count

            def alone(prompts: list[str] = prompts) -> None:
                vlm.engine._features.clear()
                vlm.generate_batch([opened] * len(prompts), prompts, max_new_tokens=MAX_NEW_TOKENS)

            def endpoint(prompts: list[str] = prompts) -> None:
                vlm.engine._features.clear()
                for _ in handlers.generate(models, {"path": path}, "\n".join(prompts), MAX_NEW_TOKENS):
                    pass

            alone(), endpoint()
            pairs = [(measure(alone), measure(endpoint)) for _ in range(ROUNDS)]
            (wall, computing), (wall_there, computing_there) = (
                tuple(map(statistics.median, zip(*(pair[side] for pair in pairs)))) for side in (0, 1)
            )
            print(
                f"{count:7} {wall:6.2f} s {computing:6.2f} s {wall_there:6.2f} s {computing_there:6.2f} s"
                f" {wall_there / wall:8.2f} ({computing_there / computing:.2f})"
            )


if __name__ == "__main__":
    main()
