"""The demo: `python app.py`, then open the address that it prints."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import gradio as gr
import numpy as np
from gradio.utils import get_upload_folder
from PIL import Image

import paligemma
from paligemma.annotations import Detection, find_detections, place_mask

TITLE = "PaliGemma"
MAX_FILE_SIZE = "20mb"
MAX_PIXELS = 60_000_000
MAX_PROMPT_TOKENS = 512
MAX_NEW_TOKENS = 256
MAX_QUEUE_LENGTH = 32
MAX_ANNOTATED_SIDE = 1024  # pixels; drawing marks takes time and memory with the area
FILES_KEPT_SECONDS = 3600
STATUS_SECONDS = 0.5  # between two looks at how far the loading is

EXAMPLES_FOLDER = Path(__file__).parent / "paligemma" / "examples"
EXAMPLES = [
    ["cats.png", "caption en"],
    ["picnic.png", "detect apple"],
    ["traffic.png", "answer en how many cars are there?"],
    ["music.png", "caption en"],
]
ABOUT_EMBEDDED = (
    "This page runs the small checkpoint that ships with it: it knows about 100 kinds of drawn objects and answers "
    "`caption en`, `answer en how many cats are there?` and `detect cat`. "
    "For photographs, start it with an official checkpoint: `PALIGEMMA_MODEL=google/paligemma-3b-mix-224`."
)
ABOUT_OTHER = "This page runs `{}`. Try `caption en`, `describe en`, `answer en what is on the table?`, `detect cat ; dog`, `ocr`."
EMPTY_ANSWER = "The model gave an empty answer. To `detect` it means that nothing of the kind is there."
# System fonts: the page asks no other host for anything.
THEME = gr.themes.Soft(
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
LAUNCH_SETTINGS = {"theme": THEME, "max_file_size": MAX_FILE_SIZE, "ssr_mode": False}


class Model:
    """The model behind the page, which is served while it is still being loaded."""

    def __init__(self, vlm: paligemma.VisionLanguageModel | None = None):
        self._loaded: Future[paligemma.VisionLanguageModel] = Future()
        self._doing, self._fraction = "Starting", None
        if vlm is not None:
            self._loaded.set_result(vlm)

    def load(self, **arguments: object) -> None:
        """Call `paligemma.load`, for whoever waits."""
        self._loaded.set_result(paligemma.load(**arguments, progress=self._report))

    def _report(self, doing: str, fraction: float | None) -> None:
        self._doing, self._fraction = doing, fraction

    @property
    def is_loaded(self) -> bool:
        return self._loaded.done()

    @property
    def status(self) -> str:
        """What the model runs as, or how far its loading is."""
        if self.is_loaded:
            vlm = self.get()
            dtype = str(vlm.weight_dtype).removeprefix("torch.")
            return f"The model runs in `{dtype}` on `{vlm.device}`."
        done = "" if self._fraction is None else f" {self._fraction:.0%}"
        return f"Loading the model: {self._doing}{done} … You can already ask; the answer comes when it is ready."

    def wait(self) -> Iterator[str]:
        """Yield the status again and again until the model is loaded."""
        while not self.is_loaded:
            yield self.status
            time.sleep(STATUS_SECONDS)

    def get(self) -> paligemma.VisionLanguageModel:
        """The model, once it is loaded."""
        return self._loaded.result()


def build_page(model: Model, about: str) -> gr.Blocks:
    """The whole page, top to bottom, and what happens when its buttons are pressed."""

    def generate(
        image: dict | None,
        prompt: str,
        max_new_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int | None = None,
    ) -> Iterator[tuple]:
        text, times = "", []
        try:
            picture = _open_picture(image)
            for waiting in model.wait():
                yield text, waiting, gr.update(value=None, visible=False)
            vlm, start = model.get(), time.perf_counter()
            tokens = vlm.stream(picture, prompt, max_new_tokens, temperature, top_k, top_p, seed)
            _check_limits(vlm, prompt, max_new_tokens)
            # The boxes of the answer before go, also if this one is stopped.
            yield text, "Looking at the picture …", gr.update(value=None, visible=False)
            for token in tokens:
                times.append(time.perf_counter() - start)
                text += token.text
                yield text, _speed(times), gr.skip()
        except paligemma.PaliGemmaError as error:
            raise gr.Error(str(error), print_exception=False) from error
        yield text, _speed(times) or EMPTY_ANSWER, _annotate(vlm, picture, text)

    def show_status() -> tuple:
        go_on = not model.is_loaded  # before the status, so that the last one shown is never of the loading
        return model.status, gr.Timer(active=go_on)

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(FILES_KEPT_SECONDS,) * 2) as page:
        gr.Markdown(f"# {TITLE}\n\nGive it a picture and a prompt, and watch the answer arrive.\n\n{about}")
        status = gr.Markdown(model.status, elem_id="status")
        timer = gr.Timer(STATUS_SECONDS, active=False)
        with gr.Row():
            with gr.Column():
                image = gr.Image(
                    label="Picture",
                    sources=["upload", "webcam", "clipboard"],
                    height=320,
                    elem_id="picture",
                )
                prompt = gr.Textbox(label="Prompt", value="caption en", max_lines=1, elem_id="prompt")
                with gr.Row():
                    run = gr.Button("Run", variant="primary", elem_id="run")
                    stop = gr.Button("Stop", elem_id="stop")
                with gr.Accordion("Settings", open=False):
                    settings = [
                        gr.Slider(1, MAX_NEW_TOKENS, value=64, step=1, label="Max new tokens"),
                        gr.Slider(0, 2, value=0, step=0.05, label="Temperature (0: always the likeliest token)"),
                        gr.Slider(0, 200, value=0, step=1, label="Top-k (0: off)"),
                        gr.Slider(0.05, 1, value=1, step=0.05, label="Top-p (1: off)"),
                        gr.Number(label="Seed (empty: a new one each time)", precision=0, value=None),
                    ]
            with gr.Column():
                answer = gr.Textbox(label="Answer", lines=4, buttons=["copy"], elem_id="answer")
                speed = gr.Markdown(elem_id="speed")
                boxes = gr.AnnotatedImage(label="Where it is", visible=False, height=320, elem_id="boxes")
        gr.Examples(
            [[str(EXAMPLES_FOLDER / name), text] for name, text in EXAMPLES], [image, prompt], label="Try one of these"
        )

        running = gr.on(
            [run.click, prompt.submit],
            generate,
            inputs=[image, prompt, *settings],
            outputs=[answer, speed, boxes],
            # Values come as they are: Gradio would open a bad picture itself, and fail without a sentence.
            preprocess=False,
            api_name="generate",
            api_description="Answer a prompt about a picture; streams the text so far.",
            show_progress_on=answer,  # the place in the queue shows where the answer will be
        )
        # A visitor who comes while the model is being loaded sees how far it is.
        gr.on(
            [page.load, timer.tick],
            show_status,
            outputs=[status, timer],
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
        stop.click(None, cancels=[running], api_visibility="private")
    # One answer at a time, first come, first served.
    return page.queue(max_size=MAX_QUEUE_LENGTH, default_concurrency_limit=1)


def _open_picture(image: dict | None) -> Image.Image:
    """Open what `gr.Image` sends: the fields of its `ImageData`, with the path of the uploaded file."""
    if not image or not image["path"]:
        raise paligemma.PaliGemmaError("There is no picture yet; please upload one or choose an example.")
    from paligemma.processor import open_image  # here, since it brings torch

    path = Path(image["path"]).resolve()
    # Whoever calls the endpoint may write any path there; only uploads and examples lie in this folder.
    if not path.is_relative_to(Path(get_upload_folder()).resolve()):
        raise paligemma.PaliGemmaError("The picture was not uploaded to this page; please upload it.")
    return open_image(path, MAX_PIXELS)


def _check_limits(vlm: paligemma.VisionLanguageModel, prompt: str, max_new_tokens: float) -> None:
    """Refuse what the model could do but a shared page should not spend its time on."""
    tokens = len(vlm.processor.input_ids(prompt)) - vlm.config.vision.num_patches
    if tokens > MAX_PROMPT_TOKENS:
        raise paligemma.PaliGemmaError(
            f"The prompt has {tokens} tokens, but this page takes {MAX_PROMPT_TOKENS}; please shorten it."
        )
    if max_new_tokens > MAX_NEW_TOKENS:
        raise paligemma.PaliGemmaError(
            f"max_new_tokens is {max_new_tokens}; please give a whole number from 1 to {MAX_NEW_TOKENS}."
        )


def _speed(times: list[float]) -> str:
    """Time to first token and tokens per second after it, from each token's seconds since the request began."""
    if not times:
        return ""
    line = f"First token after {times[0]:.2f} s"
    if len(times) > 1:
        line += f" · {(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s · {len(times)} tokens"
    return line


def _annotate(vlm: paligemma.VisionLanguageModel, picture: Image.Image, text: str) -> dict:
    """The picture with the answer's masks and boxes, shown only if there are any."""
    picture = picture.copy()
    picture.thumbnail((MAX_ANNOTATED_SIDE, MAX_ANNOTATED_SIDE))
    marks = [(_mark(vlm, found, picture.size), found.label or "object") for found in find_detections(text)]
    return gr.update(value=(picture, marks) if marks else None, visible=bool(marks))


def _mark(
    vlm: paligemma.VisionLanguageModel, found: Detection, size: tuple[int, int]
) -> np.ndarray | tuple[int, int, int, int]:
    """What `gr.AnnotatedImage` draws of a detection: its mask if it can be decoded, its box otherwise."""
    mask = vlm.decode_mask(found.codes) if found.codes else None
    return found.in_pixels(*size) if mask is None else place_mask(mask, found, *size).astype(float)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    environment = os.environ.get
    parser.add_argument("--model", default=environment("PALIGEMMA_MODEL"), help="folder or Hub id[@revision]")
    parser.add_argument("--device", default=environment("PALIGEMMA_DEVICE"), help="cpu, cuda or mps")
    parser.add_argument(
        "--dtype", default=environment("PALIGEMMA_DTYPE"), help="auto, float32, bfloat16, float16 or int8 (x86 CPUs)"
    )
    parser.add_argument("--compile", action="store_true", help="compile the decoding step (CUDA)")
    parser.add_argument("--host", help="address to listen on, such as 0.0.0.0")
    parser.add_argument("--port", type=int)
    parser.add_argument("--share", action="store_true", help="make a public link")
    arguments = parser.parse_args()

    about = ABOUT_OTHER.format(arguments.model) if arguments.model else ABOUT_EMBEDDED
    model = Model()
    page = build_page(model, about)
    page.launch(
        server_name=arguments.host,
        server_port=arguments.port,
        share=arguments.share or None,
        prevent_thread_lock=True,
        **LAUNCH_SETTINGS,
    )
    try:
        model.load(
            source=arguments.model or None,
            device=arguments.device or None,
            dtype=arguments.dtype or "auto",
            compile=arguments.compile,
        )
    except paligemma.PaliGemmaError as error:
        page.close(verbose=False)
        sys.exit(str(error))
    page.block_thread()


if __name__ == "__main__":
    main()
