"""The demo: `python app.py`, then open the address that it prints."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable
from functools import partial
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules are imported, Ctrl-C ends this without a traceback
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before Gradio reads it
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "100")  # else it keeps 10,000, and sums them up after each
if "OMP_WAIT_POLICY" not in os.environ:
    # Before torch reads it: how often its threads look for work before they sleep, a fifteenth of the usual 3 ms. Alone they
    # are as fast; with another busy process on each core a token of 3B in int8 takes 0.30 s instead of 0.53.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
import gradio as gr
from gradio.blocks import Block
from gradio.components import Component
from starlette.middleware import Middleware

import paligemma
from paligemma.demo import handlers, hosting, inside, layout, monitoring, rendering
from paligemma.demo.blocks import BodyLimit, LastResort, Page
from paligemma.demo.handlers import SETTINGS
from paligemma.demo.options import parse_arguments
from paligemma.demo.scripts import CHANGE_PICTURE, COPY_TEXT, DOWNLOAD, LISTEN, MAKE_LINK
from paligemma.demo.serving import EMBEDDED, STATUS_SECONDS, Models, load_checkpoint
from paligemma.demo.theme import THEME
from paligemma.demo.zero_gpu import IS_ZERO_GPU, borrow_gpu  # before anything that imports torch
from paligemma.prompts import ENGLISH, LANGUAGES, TASKS, task_of

if TYPE_CHECKING:
    from paligemma.demo.cluster import Cluster

TITLE = "PaliGemma"
MAX_FILE_SIZE = "20mb"
MAX_QUEUE_LENGTH = 128
MAX_CLIENT_SHARE = 64  # of the queue, for one address
MAX_SESSIONS = 500  # of which the server knows what they see inside; each takes about 0.1 MB
MAX_BODY_LENGTH = 128_000  # bytes
MAX_AGENTS_BODY_LENGTH = 32_000_000  # bytes, of a call over MCP: a file of `MAX_FILE_SIZE` in base64, and more
MAX_UPLOADS_PER_HOUR = 500_000_000  # bytes, of one address
FILES_KEPT_SECONDS = 3600

DEMO_FOLDER = Path(handlers.__file__).parent
LAUNCH_SETTINGS: dict[str, Any] = {
    "theme": THEME,
    "css": rendering.linking_css(),
    "css_paths": DEMO_FOLDER / "page.css",
    "max_file_size": MAX_FILE_SIZE,
    "state_session_capacity": MAX_SESSIONS,
    "ssr_mode": False,
    "app_kwargs": {
        "middleware": [
            Middleware(LastResort),
            Middleware(BodyLimit, length=MAX_BODY_LENGTH, agents_length=MAX_AGENTS_BODY_LENGTH),
            Middleware(hosting.UploadLimit, length=MAX_UPLOADS_PER_HOUR),
        ],
        "exception_handlers": {OSError: hosting.explain_full_disk},
    },
}
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
# Few at a time, since images are read and drawn; and queued, since browsers show no sentence of an error else.
BRIEFLY: dict[str, Any] = {"concurrency_id": "brief", "concurrency_limit": 4, "trigger_mode": "multiple"}
BRIEFLY |= {"show_progress": "hidden", "api_visibility": "private"}
TOGETHER: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 16}  # who comes later waits in a queue
# (With `always_last`, Gradio would give the last of several events the choice of the first.)
LOOKING: dict[str, Any] = {"concurrency_id": "inside", "concurrency_limit": 8, "trigger_mode": "multiple"}
LOOKING |= {"api_visibility": "private", "show_progress": "hidden"}

log = logging.getLogger(__name__)


def build_page(models: Models) -> Page:
    """The page from top to bottom, and what happens when something on it is pressed."""
    with Page(title=TITLE) as page:
        files = layout.example_files()
        examples = handlers.example_records(files)
        ui = _lay_out(models, files, examples)
        on_page = partial(page.event, show=partial(_show, ui), write=escape)
        _answer_when_asked(page, models, ui, on_page, examples)
        _look_inside_when_asked(models, ui, on_page)
        _add_endpoints(page, models, ui.prompt, ui.settings)
        page.limit_queue(MAX_QUEUE_LENGTH, MAX_CLIENT_SHARE)
    return page


def _lay_out(models: Models, files: list[str], examples: list[handlers.Record]) -> SimpleNamespace:
    """The page's components from top to bottom, by the names under which handlers change them."""
    first, ui = models.names[0], SimpleNamespace()
    with gr.Row(elem_id="head"):
        gr.Markdown(f"# {TITLE}\n{handlers.TAGLINE}", elem_id="title")
        ui.about = gr.Markdown(handlers.about(first), elem_id="about")
    shown = handlers.show_again(models, examples[0])
    first_task = task_of(shown["prompt"]) or TASKS[0]
    ui.view = gr.State({})
    with gr.Row(elem_id="page"):
        with gr.Column(scale=6, min_width=340, elem_id="question"):
            ui.image, ui.heat, ui.figure, ui.draw = layout.stage(shown["image"], shown["figure"], first == EMBEDDED)
            ui.task = gr.Radio(
                [task.name for task in TASKS],
                value=first_task.name,
                label="Task",
                show_label=False,
                container=False,
                elem_id="tasks",
            )
            ui.prompt, ui.start, ui.stop = layout.prompt_row(shown["prompt"])
            ui.hint = gr.Markdown(handlers.hint(first_task), elem_id="hint")
            ui.language = layout.language_menu(first != EMBEDDED)
            with gr.Row(elem_id="folded"):
                ui.checkpoint, ui.settings = layout.settings_menu(models.names)
                ui.more_images = layout.more_pictures()
        with gr.Column(scale=5, min_width=340, elem_id="result"):
            with gr.Column(elem_id="card"):
                ui.answers = gr.HTML(shown["answers"], elem_id="answers")
                ui.speed = gr.Markdown(handlers.STORED, elem_id="speed")
                ui.actions, ui.see_inside, ui.copy, ui.save_image, ui.save_objects, ui.share = layout.actions()
                ui.link = gr.Textbox(
                    label="Opens this page with this prompt and these settings",
                    visible=False,
                    buttons=["copy"],
                    elem_id="link",
                )
                ui.file = gr.DownloadButton(visible="hidden", elem_id="file")
                ui.note = gr.Markdown(handlers.ABOUT_PHOTOGRAPHS, visible=first == EMBEDDED, elem_id="note")
            ui.panel, *ui.panel_parts = layout.inside_panel()
            ui.example = layout.thumbnails(handlers.thumbnails("Try one of these", examples), "examples", files)
            ui.record = layout.kept_answers(shown["record"])
            ui.status = gr.Markdown(models.status(first), elem_id="status")
    ui.timer = gr.Timer(STATUS_SECONDS, active=False)
    vars(ui).update(zip((one.name for one in SETTINGS), ui.settings))
    vars(ui).update(zip(layout.PANEL, ui.panel_parts))
    ui.closing = [ui.panel, ui.view, ui.heat, ui.see_inside]  # what changes when the panel closes
    return ui


def _show(ui: SimpleNamespace, values: dict[str, Any]) -> dict[Block, Any]:
    """What Gradio changes on the page, from what a handler returns."""
    optional = {"is_answered": [ui.actions], "has_language": [ui.language]}
    optional |= {"is_embedded": [ui.draw, ui.note], "is_open": [ui.panel]}
    shown: dict[Block, Any] = {getattr(ui, name): value for name, value in values.items() if hasattr(ui, name)}
    for name in optional.keys() & values:
        shown |= {part: gr.update(visible=values[name]) for part in optional[name]}
    if "is_loading" in values:
        shown[ui.timer] = gr.Timer(active=values["is_loading"])
    return shown or {ui.prompt: gr.skip()}


def _answer_when_asked(
    page: Page, models: Models, ui: SimpleNamespace, on_page: Callable[..., Callable], examples: list[handlers.Record]
) -> None:
    """Wire what asks, and what is done with an answer; `on_page` makes a handler one that changes the page."""
    to_file = partial(page.event, write=escape)
    choose_example = on_page(handlers.choose_example, examples)
    show_again = on_page(handlers.show_again, models)

    def open_link(request: gr.Request) -> dict[Block, Any]:
        return _show(ui, handlers.read_link(request.query_params, models.names))

    async def stop_answers(request: gr.Request) -> None:
        page.stop(str(request.session_hash))

    async def take_example(event: gr.EventData, request: gr.Request) -> dict[Block, Any]:
        await stop_answers(request)  # that of another picture
        return choose_example(event.choice)

    def take_past_answer(event: gr.EventData) -> dict[Block, Any]:
        return show_again(event.choice)

    def run_after(listen: Callable) -> None:
        """Answer what is asked then."""
        listen(
            on_page(handlers.run, models),
            [ui.image, ui.more_images, ui.prompt, ui.checkpoint, *ui.settings],
            [ui.figure, ui.answers, ui.speed, ui.actions, ui.record, *ui.closing],
            # Values come as they are: Gradio would open a bad image itself, and fail without a sentence.
            preprocess=False,
            api_visibility="private",
            show_progress_on=ui.answers,  # the place in the queue shows where the answer will be
            **TOGETHER,
        )

    run_after(partial(gr.on, [ui.start.click, ui.prompt.submit]))
    run_after(ui.example.click(take_example, None, [ui.image, ui.more_images, ui.prompt], **AT_ONCE).success)
    ui.stop.click(stop_answers, **AT_ONCE)
    ui.draw.click(handlers.draw_scene, None, ui.image, **BRIEFLY)
    gone = [ui.figure, ui.heat, ui.speed, ui.answers, ui.actions, ui.panel]
    gr.on([ui.image.input, ui.draw.click], None, ui.prompt, [ui.prompt, *gone], js=CHANGE_PICTURE)
    gr.on([ui.task.input, ui.language.input], handlers.choose_task, [ui.task, ui.language], ui.prompt, **AT_ONCE)
    gr.on(
        [ui.prompt.change, ui.checkpoint.change],
        on_page(handlers.describe_prompt),
        [ui.prompt, ui.checkpoint],
        [ui.task, ui.hint, ui.language],
        **AT_ONCE,
    )
    ui.copy.click(None, js=COPY_TEXT)
    for button, save in ((ui.save_image, handlers.save_image), (ui.save_objects, handlers.save_objects)):
        button.click(to_file(save, models), ui.record, ui.file, **BRIEFLY).success(None, js=DOWNLOAD)
    ui.share.click(None, [ui.prompt, ui.checkpoint, *ui.settings], ui.link, js=MAKE_LINK)
    ui.share.click(lambda: gr.update(visible=True), None, ui.link, **AT_ONCE)
    ui.record.click(
        take_past_answer,
        None,
        [ui.image, ui.more_images, ui.prompt, ui.figure, ui.answers, ui.speed, ui.record, ui.actions, *ui.closing],
        **BRIEFLY,
    )
    # A visitor who comes while the model is being loaded sees how far it is.
    gr.on(
        [page.load, ui.timer.tick, ui.checkpoint.change],
        on_page(handlers.show_status, models),
        ui.checkpoint,
        [ui.about, ui.status, ui.timer, ui.draw, ui.note],
        **AT_ONCE,
    )
    page.load(None, js=LISTEN)
    page.load(open_link, None, [ui.prompt, ui.checkpoint, *ui.settings], **AT_ONCE)


def _look_inside_when_asked(models: Models, ui: SimpleNamespace, on_page: Callable[..., Callable]) -> None:
    """Wire the panel “See inside”."""
    look_inside, peek_inside, redraw_inside = (
        on_page(handler, models) for handler in (inside.look, inside.peek, inside.redraw)
    )

    async def look(record: object, view: inside.View, event: gr.EventData) -> AsyncIterator[dict]:
        async for shown in look_inside(record, view, event.choice):
            yield shown

    def peek(record: object, view: inside.View, event: gr.EventData) -> dict[Block, Any]:
        return peek_inside(record, view, event.choice)

    def redraw(record: object, view: inside.View, event: gr.EventData) -> dict[Block, Any]:
        return redraw_inside(record, view, event.choice)

    once = LOOKING | {"trigger_mode": "once"}
    ui.see_inside.click(on_page(inside.toggle, models), [ui.record, ui.view], [*ui.closing, *ui.panel_parts], **once)
    gr.on(
        [part.click for part in (ui.heat, *ui.panel_parts)],
        look,
        [ui.record, ui.view],
        [ui.view, ui.heat, *ui.panel_parts],
        **LOOKING,
    )
    if not IS_ZERO_GPU:  # each look would ask for a GPU
        ui.words.select(peek, [ui.record, ui.view], ui.rivals, **LOOKING)
    ui.section.input(redraw, [ui.record, ui.view], ui.distribution, **LOOKING)


def _add_endpoints(page: Page, models: Models, prompt: gr.Textbox, settings: list[Component]) -> None:
    """The endpoints for programs and agents, each named and described as its handler is."""
    with gr.Row(visible=False):
        call = gr.Button()
        image = gr.Image(label="Picture", type="filepath")
        more_images = gr.File(label="Further pictures", file_count="multiple")
        language = gr.Dropdown(list(LANGUAGES), value=ENGLISH, label="Language code")
        kinds = gr.Textbox(label="What to find, such as “cat” or “cat ; dog”")
        seed = gr.Number(label=settings[-1].label, precision=0)
        index = gr.Number(label="Which token of the answer, from 0", precision=0)
        heads = gr.Checkbox(label="Attention of every head")
        inside = gr.JSON(label="What the step of this token was like inside")
        text = gr.Textbox(label="The answer so far")
        marked = gr.Image(label="The picture with boxes or masks drawn on it", format="png")
        objects = gr.JSON(label="Objects: label, box [x_min, y_min, x_max, y_max] in pixels, mask as COCO run lengths")
    for handler, inputs, outputs in (
        (handlers.generate, [image, prompt, *settings[:-1], seed, more_images], [text, objects]),
        (handlers.inspect, [image, prompt, index, *settings[:-1], seed, heads, more_images], inside),
        (handlers.caption, [image, language], text),
        (handlers.detect, [image, kinds], [marked, objects]),
        (handlers.segment, [image, kinds], [marked, objects]),
    ):
        call.click(
            page.event(handler, models), inputs, outputs, preprocess=False, api_name=handler.__name__, **TOGETHER
        )


def main() -> None:
    arguments = parse_arguments(__doc__)
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("paligemma").setLevel(logging.INFO)
    with hosting.own_upload_folder() as uploads:
        ending = hosting.ending_by_signals(uploads)
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
    try:
        cluster = _join_cluster(arguments) if arguments.cluster else None
    except paligemma.PaliGemmaError as error:
        return str(error)
    load = cluster.load if cluster else load_checkpoint
    adapters = {sources[0]: arguments.adapter} if arguments.adapter else {}
    models = Models(sources, partial(load, settings=loading, adapters=adapters), borrow_gpu=borrow_gpu)
    if IS_ZERO_GPU:
        models.load_all()
    page = build_page(models)
    if cluster:
        page.answer_together(cluster.rows)
    examples = page.own_files()
    settings, of_app = dict(LAUNCH_SETTINGS), dict(LAUNCH_SETTINGS["app_kwargs"])
    settings["app_kwargs"] = of_app
    if arguments.auth:
        settings["auth"] = hosting.Password(*arguments.auth).check
        of_app["middleware"] = [*of_app["middleware"], Middleware(hosting.OwnPagesOnly)]
    of_app["routes"] = [monitoring.health_route(models)]
    if arguments.metrics:
        of_app["routes"].append(monitoring.Metrics(models, page).route(settings.get("auth")))
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
        try:
            return hosting.run_until(ending, page, models)
        finally:
            if cluster:
                cluster.close()


def _join_cluster(arguments: argparse.Namespace) -> Cluster:
    """The cluster that answers; at `SIGHUP` it loads its checkpoints anew."""
    from paligemma.demo.cluster import Cluster

    cluster = Cluster(arguments.cluster, arguments.replicas, arguments.replica_cores, arguments.device or None)
    signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=cluster.update, daemon=True).start())
    return cluster


if __name__ == "__main__":
    main()
