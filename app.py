"""The demo: `python app.py`, then open the address that it prints."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import signal
import sys
import threading
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before Gradio reads it
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "100")  # else it keeps 10,000, and sums them up after each
import gradio as gr
from gradio.blocks import Block
from gradio.components import Component
from starlette.middleware import Middleware

import paligemma
from paligemma.demo import handlers, hosting, rendering
from paligemma.demo.blocks import BodyLimit, Page
from paligemma.demo.handlers import SETTINGS
from paligemma.demo.scripts import COPY_TEXT, DOWNLOAD, MAKE_LINK
from paligemma.demo.serving import EMBEDDED, STATUS_SECONDS, Models, load_checkpoint
from paligemma.demo.theme import THEME
from paligemma.demo.zero_gpu import IS_ZERO_GPU, borrow_gpu  # before anything that imports torch
from paligemma.prompts import ENGLISH, LANGUAGES, TASKS

TITLE = "PaliGemma"
MAX_FILE_SIZE = "20mb"
MAX_QUEUE_LENGTH = 128
MAX_CLIENT_SHARE = 64  # of the queue, for one address
MAX_SESSIONS = 500  # whose answers can be chosen again; each takes about 0.1 MB
MAX_BODY_LENGTH = 128_000  # bytes
FILES_KEPT_SECONDS = 3600

DEMO_FOLDER = Path(handlers.__file__).parent
EXAMPLES = [
    ["cats.png", "caption en"],
    ["picnic.png", "detect apple ; banana"],
    ["traffic.png", "segment car"],
    ["music.png", "answer en what is left of the guitar?"],
    ["sign.png", "ocr"],
]
NOTHING_YET = '<p class="nothing-yet">The answer appears here, with boxes and masks on the picture.</p>'
MORE_PICTURES = "For checkpoints trained on several pictures at once. Boxes and masks are drawn on the one above."
LAUNCH_SETTINGS: dict[str, Any] = {
    "theme": THEME,
    "css": rendering.linking_css(),
    "css_paths": DEMO_FOLDER / "page.css",
    "max_file_size": MAX_FILE_SIZE,
    "state_session_capacity": MAX_SESSIONS,
    "ssr_mode": False,
    "app_kwargs": {
        "middleware": [Middleware(BodyLimit, length=MAX_BODY_LENGTH)],
        "exception_handlers": {OSError: hosting.explain_full_disk},
    },
}
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
TOGETHER: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 16}  # who comes later waits in a queue

log = logging.getLogger(__name__)


def build_page(models: Models) -> Page:
    """The page from top to bottom, and what happens when something on it is pressed."""
    first = models.names[0]
    with Page(title=TITLE) as page:
        gr.Markdown(f"# {TITLE}", elem_id="title")
        about = gr.Markdown(handlers.about(first), elem_id="about")
        record, history = gr.State({}), gr.State([])
        with gr.Row():
            with gr.Column(scale=5, min_width=340):
                image = gr.Image(
                    label="Picture", sources=["upload", "webcam", "clipboard"], height=170, elem_id="picture"
                )
                more_images = _more_pictures()
                draw = gr.Button("New scene", size="sm", visible=first == EMBEDDED, elem_id="draw")
                task = gr.Radio([task.name for task in TASKS], value=TASKS[0].name, label="Task", elem_id="tasks")
                language = gr.Dropdown(
                    [(f"{name} ({code})", code) for code, name in LANGUAGES.items()],
                    value=ENGLISH,
                    label="Language of the answer",
                    visible=first != EMBEDDED,
                    elem_id="languages",
                )
                prompt = gr.Textbox(
                    label="Prompt", value=TASKS[0].prompt(), max_lines=handlers.MAX_PROMPTS, elem_id="prompt"
                )
                hint = gr.Markdown(handlers.hint(TASKS[0]), elem_id="hint")
                with gr.Row():
                    start = gr.Button("Run", variant="primary", elem_id="run")
                    stop = gr.Button("Stop", elem_id="stop")
                checkpoint, settings = _settings(models.names)
                status = gr.Markdown(models.status(first), elem_id="status")
            with gr.Column(scale=6, min_width=340, elem_id="result"):
                gr.Examples(
                    [[str(DEMO_FOLDER / "examples" / name), text] for name, text in EXAMPLES],
                    [image, prompt],
                    example_labels=[text for _, text in EXAMPLES],
                    label="Try one of these",
                    elem_id="examples",
                )
                # Always visible, though empty at first: of updates that came soon after one that made it visible, the
                # browser lost some.
                figure = gr.HTML(elem_id="figure")
                answers = gr.HTML(NOTHING_YET, elem_id="answers")
                speed = gr.Markdown(elem_id="speed")
                with gr.Row(visible=False) as actions:
                    copy = gr.Button("Copy text", size="sm", min_width=80, elem_id="copy")
                    save_image = gr.Button("Picture (PNG)", size="sm", min_width=80, elem_id="as-picture")
                    save_objects = gr.Button("Objects (JSON)", size="sm", min_width=80, elem_id="as-json")
                    share = gr.Button("Link", size="sm", min_width=80, elem_id="share")
                link = gr.Textbox(
                    label="Opens this page with this prompt and these settings",
                    visible=False,
                    buttons=["copy"],
                    elem_id="link",
                )
                file = gr.DownloadButton(visible="hidden", elem_id="file")
                past_answers = gr.Dataset(
                    label="Your answers of this visit",
                    components=[gr.Image(visible=False), gr.Textbox(visible=False)],
                    samples=[],
                    type="index",
                    visible=False,
                    elem_id="history",
                )
        timer = gr.Timer(STATUS_SECONDS, active=False)

        # What the handlers change, by the names that they give it.
        parts: dict[str, Component] = {"about": about, "status": status, "image": image, "more_images": more_images}
        parts |= {"task": task, "prompt": prompt, "hint": hint, "checkpoint": checkpoint}
        parts |= {"figure": figure, "answers": answers, "speed": speed}
        parts |= {"record": record, "history": history} | dict(zip((one.name for one in SETTINGS), settings))
        optional = {"is_answered": actions, "has_language": language, "can_draw": draw}

        def show(values: dict[str, Any]) -> dict[Block, Any]:
            shown: dict[Block, Any] = {parts[name]: value for name, value in values.items() if name in parts}
            shown |= {optional[name]: gr.update(visible=value) for name, value in values.items() if name in optional}
            if "is_loading" in values:
                shown[timer] = gr.Timer(active=values["is_loading"])
            if "history" in values:
                samples = [[one["path"], handlers.prompts_of(one)] for one in values["history"]]
                labels = [prompts.replace("\n", " · ") for _, prompts in samples]
                shown[past_answers] = gr.Dataset(samples=samples, sample_labels=labels, visible=True)
            return shown or {prompt: gr.skip()}

        def open_link(request: gr.Request) -> dict[Block, Any]:
            return show(handlers.read_link(request.query_params, models.names))

        async def stop_answers(request: gr.Request) -> None:
            page.stop(str(request.session_hash))

        on_page = partial(page.event, show=show, write=escape)
        to_file = partial(page.event, write=escape)

        # --- what is pressed

        gr.on(
            [start.click, prompt.submit],
            on_page(handlers.run, models),
            [image, more_images, prompt, checkpoint, history, *settings],
            [figure, answers, speed, actions, record, history, past_answers],
            # Values come as they are: Gradio would open a bad image itself, and fail without a sentence.
            preprocess=False,
            api_visibility="private",
            show_progress_on=answers,  # the place in the queue shows where the answer will be
            **TOGETHER,
        )
        stop.click(stop_answers, **AT_ONCE)
        draw.click(handlers.draw_scene, None, image, **AT_ONCE)
        gr.on([task.input, language.input], handlers.choose_task, [task, language], prompt, **AT_ONCE)
        gr.on(
            [prompt.change, checkpoint.change],
            on_page(handlers.describe_prompt),
            [prompt, checkpoint],
            [task, hint, language],
            **AT_ONCE,
        )
        copy.click(None, js=COPY_TEXT)
        save_image.click(to_file(handlers.save_image, models), record, file, **AT_ONCE).then(None, js=DOWNLOAD)
        save_objects.click(to_file(handlers.save_objects, models), record, file, **AT_ONCE).then(None, js=DOWNLOAD)
        share.click(None, [prompt, checkpoint, *settings], link, js=MAKE_LINK)
        share.click(lambda: gr.update(visible=True), None, link, **AT_ONCE)
        past_answers.click(
            on_page(handlers.show_again, models),
            [past_answers, history],
            [image, more_images, prompt, figure, answers, speed, record, actions],
            **AT_ONCE,
        )
        # A visitor who comes while the model is being loaded sees how far it is.
        gr.on(
            [page.load, timer.tick, checkpoint.change],
            on_page(handlers.show_status, models),
            checkpoint,
            [about, status, timer, draw],
            **AT_ONCE,
        )
        page.load(open_link, None, [prompt, checkpoint, *settings], **AT_ONCE)
        _add_endpoints(page, models, prompt, settings)
        page.limit_queue(MAX_QUEUE_LENGTH, MAX_CLIENT_SHARE)
    return page


def _more_pictures() -> gr.Gallery:
    """A place for further pictures, folded away."""
    with gr.Accordion("More pictures", open=False):
        gr.Markdown(MORE_PICTURES)
        sources: list[Any] = ["upload", "clipboard"]
        return gr.Gallery(label="Further pictures", sources=sources, columns=4, height=160, elem_id="more-pictures")


def _settings(checkpoints: list[str]) -> tuple[gr.Dropdown, list[Component]]:
    """The checkpoint and the numbers of `SETTINGS`."""
    with gr.Accordion("Settings", open=False):
        checkpoint = gr.Dropdown(checkpoints, label="Checkpoint", visible=len(checkpoints) > 1, elem_id="checkpoint")
        *ranges, seed = SETTINGS
        sliders: list[Component] = [
            gr.Slider(one.minimum, one.maximum, one.default, step=one.step, label=one.label, elem_id=one.name)
            for one in ranges
        ]
        # A text, since an empty `gr.Number` shows and sends 0.
        return checkpoint, [*sliders, gr.Textbox(label=seed.label, max_lines=1, max_length=19, elem_id=seed.name)]


def _add_endpoints(page: Page, models: Models, prompt: gr.Textbox, settings: list[Component]) -> None:
    """The endpoints for programs and agents, each named and described as its handler is."""
    with gr.Row(visible=False):
        call = gr.Button()
        image = gr.Image(label="Picture", type="filepath")
        more_images = gr.File(label="Further pictures", file_count="multiple")
        language = gr.Dropdown(list(LANGUAGES), value=ENGLISH, label="Language code")
        kinds = gr.Textbox(label="What to find, such as “cat” or “cat ; dog”")
        seed = gr.Number(label=settings[-1].label, precision=0)
        text = gr.Textbox(label="The answer so far")
        marked = gr.Image(label="The picture with boxes or masks drawn on it", format="png")
        objects = gr.JSON(label="Objects: label, box [x_min, y_min, x_max, y_max] in pixels, mask as COCO run lengths")
    for handler, inputs, outputs in (
        (handlers.generate, [image, prompt, *settings[:-1], seed, more_images], [text, objects]),
        (handlers.caption, [image, language], text),
        (handlers.detect, [image, kinds], [marked, objects]),
        (handlers.segment, [image, kinds], [marked, objects]),
    ):
        call.click(
            page.event(handler, models), inputs, outputs, preprocess=False, api_name=handler.__name__, **TOGETHER
        )


def main() -> None:
    arguments = _parse_arguments()
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("paligemma").setLevel(logging.INFO)
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    with hosting.own_upload_folder() as uploads:
        try:
            problem = _serve(arguments, uploads, ending)
        except Exception:
            log.exception("the page has ended")
            problem = "The page has ended, see the error above."
    sys.stdout.flush()  # what Gradio printed comes before
    if problem:
        print(problem, file=sys.stderr, flush=True)
    os._exit(bool(problem))  # at once: what threads still do, such as loading, is for nobody


def _serve(arguments: argparse.Namespace, uploads: Path, ending: threading.Event) -> str | None:
    """Serve the page until `ending` is set; returns the sentence of an error that ends it before."""
    loading = {"device": arguments.device or None, "dtype": arguments.dtype or "auto", "compile": arguments.compile}
    loading["tokenizer"] = arguments.tokenizer or None
    sources = [None if source == EMBEDDED else source for source in arguments.sources]
    adapters = {sources[0]: arguments.adapter} if arguments.adapter else {}
    models = Models(sources, partial(load_checkpoint, settings=loading, adapters=adapters), borrow_gpu=borrow_gpu)
    if IS_ZERO_GPU:
        models.load_all()
    page = build_page(models)
    examples = page.own_files()
    settings = dict(LAUNCH_SETTINGS)
    if arguments.auth:
        settings["auth"] = hosting.Password(*arguments.auth).check
        middleware = [*settings["app_kwargs"]["middleware"], Middleware(hosting.OwnPagesOnly)]
        settings["app_kwargs"] = {**settings["app_kwargs"], "middleware": middleware}
    try:
        page.launch(
            server_name=arguments.host,
            server_port=arguments.port,
            share=arguments.share or None,
            mcp_server=arguments.mcp,
            prevent_thread_lock=True,
            **settings,
        )
    except OSError as error:  # somebody else was faster
        return str(error)
    with hosting.cleaned_up(uploads, FILES_KEPT_SECONDS, examples):
        return hosting.run_until(ending, page, models, uploads)


def _parse_arguments() -> argparse.Namespace:
    """Options and environment variables, as the README lists them; `sources` are the checkpoints to offer."""
    parser = argparse.ArgumentParser(description=__doc__)

    def add(name: str, help: str) -> None:
        """An option that an environment variable sets as well."""
        default = os.environ.get(f"PALIGEMMA_{name.upper()}")
        parser.add_argument(f"--{name}", type=str.strip, default=default, help=help)

    add("model", "folder or Hub id[@revision]")
    add("models", f"several of them, with commas between, for a menu; `{EMBEDDED}` is the small one that ships inside")
    add("adapter", "a LoRA adapter for --model, a folder or Hub id; it can be given as --model as well")
    add("device", "cpu, cuda or mps")
    add("dtype", "auto, float32, bfloat16, float16 or int8 (x86 CPUs)")
    add("tokenizer", "a tokenizer.json, or a folder that holds one, for all checkpoints but the embedded one")
    parser.add_argument("--compile", action="store_true", help="compile the decoding step (CUDA)")
    host, port = (os.environ.get(f"GRADIO_SERVER_{name}") or None for name in ("NAME", "PORT"))
    parser.add_argument("--host", default=host, help="address to listen on, such as 0.0.0.0")
    parser.add_argument("--port", type=int, default=port)
    parser.add_argument("--share", action="store_true", help="make a public link")
    add("auth", "USER:PASSWORD: let in only who knows them; the environment variable is seen by fewer")
    parser.add_argument("--mcp", action="store_true", help="serve the endpoints as tools for agents as well")
    arguments = parser.parse_args()
    if arguments.auth:
        user, _, password = arguments.auth.partition(":")
        if not (user and password):
            parser.error("--auth takes a name and a password with a colon between them: --auth ada:lovelace")
        if arguments.mcp:
            parser.error("--mcp cannot be protected with --auth, since agents have no login; please choose one of them")
        arguments.auth = user, password
    if arguments.mcp and importlib.util.find_spec("mcp") is None:
        parser.error('--mcp needs one more package: pip install "gradio[mcp]"')
    try:
        hosting.check_address(arguments.host, arguments.port)
    except paligemma.PaliGemmaError as error:
        parser.error(str(error))
    if not arguments.model and arguments.adapter:  # its config names the model
        arguments.model, arguments.adapter = arguments.adapter, None
    names = [arguments.model or "", *(arguments.models or "").split(",")]
    arguments.sources = list(dict.fromkeys(filter(None, map(str.strip, names)))) or [EMBEDDED]
    return arguments


if __name__ == "__main__":
    main()
