"""The demo: `python app.py`, then open the address that it prints."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before Gradio reads it
try:
    import spaces  # on ZeroGPU, before anything that imports torch
except ImportError:
    spaces = None
import gradio as gr
import numpy as np
from gradio.utils import get_upload_folder
from PIL import Image

import paligemma
from paligemma.annotations import Detection
from paligemma.demo import rendering
from paligemma.demo.serving import EMBEDDED, STATUS_SECONDS, Answer, Models, answer_prompts
from paligemma.prompts import ENGLISH, LANGUAGES, TASKS, Task, detect_prompt, segment_prompt, task_of

if TYPE_CHECKING:
    from paligemma.scenes.painter import Painter

TITLE = "PaliGemma"
TAGLINE = "Give it a picture and a prompt, and watch the answer arrive."
MAX_FILE_SIZE = "20mb"
MAX_PIXELS = 60_000_000
MAX_PROMPTS = 8
MAX_PROMPT_TOKENS = 512
MAX_NEW_TOKENS = 256
DEFAULT_NEW_TOKENS = 128  # six masks
MAX_LINK_CHARACTERS = 2000
MAX_QUEUE_LENGTH = 32
MAX_HISTORY = 8
SCENE_SIZE, SCENE_OBJECTS = 336, 6  # pixels, and how many at most
FILES_KEPT_SECONDS = 3600
ONE_AT_A_TIME = "model"  # first come, first served
LAST_ANSWERS_SECONDS = 60  # for what streams when the server is told to end
ZERO_GPU_SECONDS, ZERO_GPU_SECONDS_A_TOKEN = 15, 0.1  # asked of ZeroGPU for the picture, and for each token

PACKAGE = Path(__file__).parent / "paligemma"
EXAMPLES = [
    ["cats.png", "caption en"],
    ["picnic.png", "detect apple ; banana"],
    ["traffic.png", "segment car"],
    ["music.png", "answer en what is left of the guitar?"],
    ["sign.png", "ocr"],
]
TASK_BY_NAME = {task.name: task for task in TASKS}
ABOUT_EMBEDDED = (
    "This page runs the **small checkpoint that ships with it**: it knows 125 kinds of drawn objects, and no photographs. "
    "For those, start it with an official one: `PALIGEMMA_MODEL=google/paligemma-3b-mix-224`."
)
ABOUT_OTHER = "This page runs `{}`."
EMPTY_ANSWER = "An empty answer. To “detect” and “segment” it means: there is none."
SEVERAL_PROMPTS = "*Shift + Enter: one more prompt about the same picture.*"
NOTHING_YET = '<p class="nothing-yet">The answer appears here, with boxes and masks on the picture.</p>'
SETTINGS = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
LINK_FIELDS = ("prompt", "checkpoint", *SETTINGS)
# System fonts: the page asks no other host for anything.
THEME = gr.themes.Soft(
    primary_hue="blue",
    neutral_hue="slate",
    spacing_size="sm",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    # Text on these has a contrast of at least 4.5.
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    block_label_text_color="*primary_800",
    block_title_text_color="*primary_800",
    checkbox_label_background_fill_selected="*primary_700",
    body_text_color_subdued="*neutral_600",
    body_background_fill="*neutral_50",
)
LAUNCH_SETTINGS = {
    "theme": THEME,
    "css": rendering.linking_css(),
    "css_paths": PACKAGE / "demo" / "page.css",
    "max_file_size": MAX_FILE_SIZE,
    "ssr_mode": False,
}
# The browser's part: it has the clipboard, its own address, and the files that were made for it.
COPY_TEXT = """() => navigator.clipboard.writeText(
    [...document.querySelectorAll("#answers .text")].map((text) => text.textContent).join("\\n"))"""
MAKE_LINK = f"""(...values) => {{
    const link = new URL(window.location.href.split(/[?#]/)[0]);
    {json.dumps(LINK_FIELDS)}.forEach((name, index) => {{
        if (values[index] !== null && values[index] !== "") link.searchParams.set(name, values[index]);
    }});
    return link.href;
}}"""
DOWNLOAD = "() => setTimeout(() => document.querySelector('#file').click(), 200)"


def build_page(models: Models) -> gr.Blocks:
    """The page from top to bottom, what happens when its buttons are pressed, and the endpoints for programs."""
    first = models.names[0]

    # --- what happens

    @_on_zero_gpu
    def answer(checkpoint: str, picture: Image.Image, prompts: list[str], settings: Sequence) -> Iterator[list[Answer]]:
        yield from answer_prompts(models.get(checkpoint), picture, prompts, **dict(zip(SETTINGS, settings)))

    def follow(
        checkpoint: str, picture: Image.Image, prompts: str, settings: Sequence[float | None]
    ) -> Iterator[tuple[str, paligemma.VisionLanguageModel | None, list[Answer]]]:
        """Yield how far the loading is, then the answers so far, with the model that gives them."""
        lines = [line for line in map(str.strip, str(prompts or "").splitlines()) if line] or [prompts]
        with models.use(checkpoint):
            for status in models.wait(checkpoint):
                yield status, None, []
            vlm = models.get(checkpoint)
            _check_limits(vlm, lines, settings[0])
            for given in answer(checkpoint, picture, lines, settings):
                yield "", vlm, given

    def run(image: dict | None, prompts: str, checkpoint: str, visit: list[dict], *settings: float) -> Iterator[dict]:
        with _sentences():
            picture, record = _open_picture(image)
            # What was shown before goes, also if this answer is stopped.
            yield {figure: "", words: "", speed: "", takeaway: gr.update(visible=False)}
            drawn, objects, given = None, [], []
            for status, vlm, given in follow(checkpoint, picture, prompts, settings):
                if status:
                    yield {speed: status}
                    continue
                found = _detections(given)
                is_new = found != drawn
                if is_new:
                    drawn, objects = found, rendering.mark_objects(found, vlm.decode_mask)
                yield {
                    figure: _figure(record, objects) if is_new else gr.skip(),
                    words: rendering.answers_html(given, objects, EMPTY_ANSWER),
                    speed: _speed(given[-1]) if given else "Looking at the picture …",
                }
        record |= {"checkpoint": checkpoint, "answers": [(answer.prompt, answer.text) for answer in given]}
        visit = [record, *(other for other in visit if other != record)][:MAX_HISTORY]
        yield {
            current: record,
            takeaway: gr.update(visible=True),
            history: visit,
            visited: gr.Dataset(
                samples=[[one["path"], _prompts(one)] for one in visit],
                sample_labels=[_prompts(one).replace("\n", " · ") for one in visit],
                visible=True,
            ),
        }

    def go_back(index: int, visit: list[dict]) -> dict:
        record = visit[index]
        with _sentences():
            _open(record["path"])  # it may have been deleted meanwhile
            given, objects = _given(models, record)
        return {
            image: record["path"],
            prompt: _prompts(record),
            figure: _figure(record, objects),
            words: rendering.answers_html(given, objects, EMPTY_ANSWER),
            speed: "",
            current: record,
            takeaway: gr.update(visible=True),
        }

    def save_picture(record: dict) -> str:
        with _sentences():
            picture = _open(record["path"])
            path = new_file(record, "marked.png")
            rendering.draw(picture, _given(models, record)[1]).save(path)
        return str(path)

    def save_objects(record: dict) -> str:
        with _sentences():
            size = _open(record["path"]).size
            path = new_file(record, "objects.json")
            path.write_text(json.dumps(rendering.to_json(_given(models, record)[1], size)))
        return str(path)

    def new_file(record: dict, name: str) -> Path:
        """A place for a file that the visitor may download, and that is deleted with the uploaded ones."""
        path = Path(tempfile.mkdtemp(dir=get_upload_folder())) / f"{Path(record['path']).stem}-{name}"
        file.temp_files.add(str(path))
        return path

    def choose_task(name: str, language: str) -> str:
        return TASK_BY_NAME[name].prompt(language)

    def follow_prompt(text: str, name: str) -> dict:
        """Show the task that a prompt asks for, and the fields that it needs; also while it is typed."""
        task = task_of(text)
        return {
            tasks: task.name if task else None,
            hint: _hint(task),
            # The embedded checkpoint speaks English only.
            languages: gr.update(visible=bool(task and task.has_language) and name != EMBEDDED),
        }

    def open_link(request: gr.Request) -> dict:
        values = dict(request.query_params)
        update = {}
        if values.get("prompt"):
            update[prompt] = values["prompt"][:MAX_LINK_CHARACTERS]
        if values.get("checkpoint") in models.names:
            update[checkpoint] = values["checkpoint"]
        for setting in settings:
            value = _number(values.get(setting.elem_id), setting.minimum or 0, setting.maximum)
            if value is not None:
                update[setting] = value
        return update or {prompt: gr.skip()}

    def show_status(name: str) -> tuple:
        go_on = not models.is_loaded(name)  # before the status, so that the last one shown is never of the loading
        return _about(name), models.status(name), gr.Timer(active=go_on)

    # --- what programs and agents call

    def generate(
        image: dict | None,
        prompt: str,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        temperature: float = 0,
        top_k: int = 0,
        top_p: float = 1,
        seed: int | None = None,
    ) -> Iterator[tuple[str, list]]:
        """Answer a prompt about a picture; streams the text so far.

        Args:
            image: the picture
            prompt: in PaliGemma's own syntax: `caption en`, `describe en`, `answer en QUESTION`, `detect KIND ; KIND`,
                `segment KIND ; KIND` or `ocr`; one more in each further line
            max_new_tokens: the longest answer
            temperature: 0 takes the likeliest token always
            top_k: sample among so many of the likeliest tokens; 0 among all
            top_p: sample among the likeliest tokens that have this much probability together; 1 among all
            seed: a whole number; the same one gives the same text
        """
        with _sentences():
            opened, _ = _open_picture(image)
            settings = max_new_tokens, temperature, top_k, top_p, seed
            known, objects = [], []
            for status, vlm, given in follow(first, opened, prompt, settings):
                if status:
                    continue
                found = _detections(given)
                if found != known:
                    marked = rendering.mark_objects(found, vlm.decode_mask)
                    known, objects = found, rendering.to_json(marked, opened.size)
                yield "\n".join(answer.text for answer in given), objects

    def caption(image: dict | None, language: str = ENGLISH) -> str:
        """Describe a picture in a sentence.

        Args:
            image: the picture
            language: code of the language to answer in, such as `en`; the embedded checkpoint knows only that one
        """
        *_, (text, _) = generate(image, f"caption {language}")
        return text

    def detect(image: dict | None, objects: str) -> tuple[Image.Image, list]:
        """Find all objects of some kinds in a picture, with their boxes.

        Args:
            image: the picture
            objects: what to find: `cat`, or several kinds: `cat ; dog`
        """
        return find(image, detect_prompt(objects))

    def segment(image: dict | None, objects: str) -> tuple[Image.Image, list]:
        """Find all objects of some kinds in a picture, with their masks.

        Args:
            image: the picture
            objects: what to find: `cat`, or several kinds: `cat ; dog`
        """
        return find(image, segment_prompt(objects))

    def find(image: dict | None, prompt: str) -> tuple[Image.Image, list]:
        with _sentences():
            opened, _ = _open_picture(image)
            settings = MAX_NEW_TOKENS, 0, 0, 1, None
            *_, (_, vlm, given) = follow(first, opened, prompt, settings)
            objects = rendering.mark_objects(_detections(given), vlm.decode_mask)
            return rendering.draw(opened, objects), rendering.to_json(objects, opened.size)

    # --- the page

    with gr.Blocks(title=TITLE, delete_cache=(FILES_KEPT_SECONDS,) * 2) as page:
        gr.Markdown(f"# {TITLE}", elem_id="title")
        about = gr.Markdown(_about(first), elem_id="about")
        current, history = gr.State({}), gr.State([])
        with gr.Row():
            with gr.Column(scale=5, min_width=340):
                image = gr.Image(
                    label="Picture", sources=["upload", "webcam", "clipboard"], height=210, elem_id="picture"
                )
                draw = gr.Button("New scene", size="sm", visible=first == EMBEDDED, elem_id="draw")
                tasks = gr.Radio(list(TASK_BY_NAME), value=TASKS[0].name, label="Task", elem_id="tasks")
                languages = gr.Dropdown(
                    [(f"{name} ({code})", code) for code, name in LANGUAGES.items()],
                    value=ENGLISH,
                    label="Language of the answer",
                    visible=first != EMBEDDED,
                    elem_id="languages",
                )
                prompt = gr.Textbox(
                    label="Prompt",
                    value=TASKS[0].prompt(),
                    max_lines=MAX_PROMPTS,
                    elem_id="prompt",
                )
                hint = gr.Markdown(_hint(TASKS[0]), elem_id="hint")
                with gr.Row():
                    start = gr.Button("Run", variant="primary", elem_id="run")
                    stop = gr.Button("Stop", elem_id="stop")
                with gr.Accordion("Settings", open=False):
                    checkpoint = gr.Dropdown(
                        models.names,
                        value=first,
                        label="Checkpoint",
                        visible=len(models.names) > 1,
                        elem_id="checkpoint",
                    )
                    settings = [
                        gr.Slider(
                            1,
                            MAX_NEW_TOKENS,
                            value=DEFAULT_NEW_TOKENS,
                            step=1,
                            label="Max new tokens",
                            elem_id="max_new_tokens",
                        ),
                        gr.Slider(
                            0,
                            2,
                            value=0,
                            step=0.05,
                            label="Temperature (0: always the likeliest token)",
                            elem_id="temperature",
                        ),
                        gr.Slider(0, 200, value=0, step=1, label="Top-k (0: off)", elem_id="top_k"),
                        gr.Slider(0.05, 1, value=1, step=0.05, label="Top-p (1: off)", elem_id="top_p"),
                        gr.Number(label="Seed (empty: a new one each time)", precision=0, value=None, elem_id="seed"),
                    ]
                status = gr.Markdown(models.status(first), elem_id="status")
            with gr.Column(scale=6, min_width=340, elem_id="result"):
                gr.Examples(
                    [[str(PACKAGE / "demo" / "examples" / name), text] for name, text in EXAMPLES],
                    [image, prompt],
                    example_labels=[text for _, text in EXAMPLES],
                    label="Try one of these",
                    elem_id="examples",
                )
                # Always visible, though empty at first: of updates that came soon after one that made it visible, the
                # browser lost some.
                figure = gr.HTML(elem_id="figure")
                words = gr.HTML(NOTHING_YET, elem_id="answers")
                speed = gr.Markdown(elem_id="speed")
                with gr.Row(visible=False) as takeaway:
                    copy = gr.Button("Copy text", size="sm", min_width=80, elem_id="copy")
                    as_picture = gr.Button("Picture (PNG)", size="sm", min_width=80, elem_id="as-picture")
                    as_json = gr.Button("Objects (JSON)", size="sm", min_width=80, elem_id="as-json")
                    share = gr.Button("Link", size="sm", min_width=80, elem_id="share")
                link = gr.Textbox(
                    label="Opens this page with this prompt and these settings",
                    visible=False,
                    buttons=["copy"],
                    elem_id="link",
                )
                file = gr.DownloadButton(visible="hidden", elem_id="file")
                visited = gr.Dataset(
                    label="Your answers of this visit",
                    components=[gr.Image(visible=False), gr.Textbox(visible=False)],
                    samples=[],
                    type="index",
                    visible=False,
                    elem_id="history",
                )
        timer = gr.Timer(STATUS_SECONDS, active=False)

        # --- what is pressed

        running = gr.on(
            [start.click, prompt.submit],
            run,
            inputs=[image, prompt, checkpoint, history, *settings],
            outputs=[figure, words, speed, takeaway, current, history, visited],
            # Values come as they are: Gradio would open a bad picture itself, and fail without a sentence.
            preprocess=False,
            api_visibility="private",
            concurrency_id=ONE_AT_A_TIME,
            concurrency_limit=1,
            show_progress_on=words,  # the place in the queue shows where the answer will be
        )
        at_once = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        stop.click(None, cancels=[running], api_visibility="private")
        draw.click(_draw_scene, outputs=image, **at_once)
        gr.on([tasks.input, languages.input], choose_task, [tasks, languages], prompt, **at_once)
        gr.on(
            [prompt.change, checkpoint.change],
            follow_prompt,
            [prompt, checkpoint],
            [tasks, hint, languages],
            **at_once,
        )
        checkpoint.change(lambda name: gr.update(visible=name == EMBEDDED), checkpoint, draw, **at_once)
        copy.click(None, js=COPY_TEXT)
        as_picture.click(save_picture, current, file, **at_once).then(None, js=DOWNLOAD)
        as_json.click(save_objects, current, file, **at_once).then(None, js=DOWNLOAD)
        share.click(None, [prompt, checkpoint, *settings], link, js=MAKE_LINK)
        share.click(lambda: gr.update(visible=True), outputs=link, **at_once)
        visited.click(go_back, [visited, history], [image, prompt, figure, words, speed, current, takeaway], **at_once)
        # A visitor who comes while the model is being loaded sees how far it is.
        gr.on([page.load, timer.tick, checkpoint.change], show_status, checkpoint, [about, status, timer], **at_once)
        page.load(open_link, outputs=[prompt, checkpoint, *settings], **at_once)

        # --- for programs

        with gr.Row(visible=False):
            call = gr.Button()
            picture = gr.Image(label="Picture", type="filepath")
            language = gr.Dropdown(list(LANGUAGES), value=ENGLISH, label="Language code")
            kinds = gr.Textbox(label="What to find, such as “cat” or “cat ; dog”")
            text = gr.Textbox(label="The answer so far")
            marked = gr.Image(label="The picture with boxes or masks drawn on it", format="png")
            objects = gr.JSON(
                label="Objects: label, box [x_min, y_min, x_max, y_max] in pixels, mask as COCO run lengths"
            )
        for function, inputs, outputs in (
            (generate, [picture, prompt, *settings], [text, objects]),
            (caption, [picture, language], text),
            (detect, [picture, kinds], [marked, objects]),
            (segment, [picture, kinds], [marked, objects]),
        ):
            call.click(
                function,
                inputs,
                outputs,
                preprocess=False,
                api_name=function.__name__,
                concurrency_id=ONE_AT_A_TIME,
                concurrency_limit=1,
            )
    return page.queue(max_size=MAX_QUEUE_LENGTH, default_concurrency_limit=1)


@contextmanager
def _sentences() -> Iterator[None]:
    """Show what a person can act on as a sentence on the page."""
    try:
        yield
    except paligemma.PaliGemmaError as error:
        raise gr.Error(str(error), print_exception=False) from error


def _on_zero_gpu(answer: Callable) -> Callable:
    """On ZeroGPU, let a function that yields answers borrow a GPU for as long as the longest ones may take.

    It runs in a process of its own, to which its arguments travel, and its answers back.
    """
    if spaces is None:
        return answer

    def seconds(checkpoint: str, picture: Image.Image, prompts: list[str], settings: Sequence[float | None]) -> float:
        max_new_tokens = settings[0] if isinstance(settings[0], (int, float)) else 0  # refused with a sentence later
        return ZERO_GPU_SECONDS + ZERO_GPU_SECONDS_A_TOKEN * len(prompts) * max_new_tokens

    return spaces.GPU(duration=seconds)(answer)


@cache
def _painter() -> Painter:
    from paligemma.scenes.artwork import load_sheet
    from paligemma.scenes.painter import Painter

    return Painter(load_sheet())


def _draw_scene() -> Image.Image:
    """A picture that nobody has seen before, of what the embedded checkpoint knows."""
    rng = np.random.default_rng()
    return _painter().random_scene(rng, SCENE_SIZE, rng.integers(1, SCENE_OBJECTS, endpoint=True)).image


def _open_picture(image: dict | None) -> tuple[Image.Image, dict]:
    """Open what `gr.Image` sends: the fields of its `ImageData`, with the path of the uploaded file.

    Returns:
        the picture, and where it is, for the page and to go back to.
    """
    if not image or not image["path"]:
        raise paligemma.PaliGemmaError("There is no picture yet; please upload one or choose an example.")
    picture = _open(image["path"])
    url = image.get("url") or f"gradio_api/file={quote(image['path'])}"
    return picture, {"path": image["path"], "url": url, "size": picture.size}


def _open(path: str) -> Image.Image:
    from paligemma.processor import open_image  # here, since it brings torch

    # Whoever calls the endpoint may write any path there; only uploads and examples lie in this folder.
    if not Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
        raise paligemma.PaliGemmaError("The picture was not uploaded to this page; please upload it.")
    return open_image(path, MAX_PIXELS)


def _check_limits(vlm: paligemma.VisionLanguageModel, prompts: list[str], max_new_tokens: float) -> None:
    """Refuse what the model could do but a shared page should not spend its time on."""
    if len(prompts) > MAX_PROMPTS:
        raise paligemma.PaliGemmaError(f"These are {len(prompts)} prompts; please ask at most {MAX_PROMPTS} at once.")
    for prompt in prompts:
        tokens = len(vlm.processor.input_ids(prompt)) - vlm.config.vision.num_patches
        if tokens > MAX_PROMPT_TOKENS:
            raise paligemma.PaliGemmaError(
                f"The prompt has {tokens} tokens, but this page takes {MAX_PROMPT_TOKENS}; please shorten it."
            )
    if isinstance(max_new_tokens, (int, float)) and max_new_tokens > MAX_NEW_TOKENS:
        raise paligemma.PaliGemmaError(
            f"max_new_tokens is {max_new_tokens}; please give a whole number from 1 to {MAX_NEW_TOKENS}."
        )


def _detections(given: Sequence[Answer]) -> list[Detection]:
    return [found for answer in given for found in answer.annotated.detections]


def _given(models: Models, record: dict) -> tuple[list[Answer], list[rendering.MarkedObject]]:
    """The answers of a record, and what they mark."""
    given = [Answer.of(prompt, text) for prompt, text in record["answers"]]
    # One that was unloaded meanwhile is not loaded for this: its masks are drawn as boxes.
    is_loaded = models.is_loaded(record["checkpoint"])
    decode_mask = models.get(record["checkpoint"]).decode_mask if is_loaded else None
    return given, rendering.mark_objects(_detections(given), decode_mask)


def _figure(record: dict, objects: Sequence[rendering.MarkedObject]) -> str:
    return rendering.figure_html(record["url"], record["size"], objects) if objects else ""


def _prompts(record: dict) -> str:
    return "\n".join(prompt for prompt, _ in record["answers"])


def _speed(answer: Answer) -> str:
    """Time to first token, and tokens per second after it."""
    if not answer.times:
        return ""
    line = f"First token after {answer.seconds_to_first_token:.2f} s"
    if answer.tokens_per_second:
        line += f" · {answer.tokens_per_second:.1f} tokens/s · {len(answer.times)} tokens"
    return line


def _hint(task: Task | None) -> str:
    return f"{task.hint if task else 'A free question.'} {SEVERAL_PROMPTS}"


def _about(checkpoint: str) -> str:
    which = ABOUT_EMBEDDED if checkpoint == EMBEDDED else ABOUT_OTHER.format(checkpoint)
    return f"{TAGLINE} {which}"


def _number(text: str | None, low: float, high: float | None) -> float | None:
    """A setting from a link, if it is one."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    value = int(value) if value.is_integer() else value
    return value if low <= value and (high is None or value <= high) else None


def main() -> None:
    environment = os.environ.get
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=environment("PALIGEMMA_MODEL"), help="folder or Hub id[@revision]")
    parser.add_argument(
        "--models",
        default=environment("PALIGEMMA_MODELS"),
        help=f"several of them, with commas between, for a menu; `{EMBEDDED}` is the small one that ships inside",
    )
    parser.add_argument("--device", default=environment("PALIGEMMA_DEVICE"), help="cpu, cuda or mps")
    parser.add_argument(
        "--dtype", default=environment("PALIGEMMA_DTYPE"), help="auto, float32, bfloat16, float16 or int8 (x86 CPUs)"
    )
    parser.add_argument("--compile", action="store_true", help="compile the decoding step (CUDA)")
    parser.add_argument("--host", help="address to listen on, such as 0.0.0.0")
    parser.add_argument("--port", type=int)
    parser.add_argument("--share", action="store_true", help="make a public link")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="let in only who knows them")
    parser.add_argument("--mcp", action="store_true", help="serve the endpoints as tools for agents as well")
    arguments = parser.parse_args()
    user, colon, password = (arguments.auth or "").partition(":")
    if arguments.auth and not (user and colon and password):
        parser.error("--auth takes a name and a password with a colon between them: --auth ada:lovelace")
    if arguments.mcp and importlib.util.find_spec("mcp") is None:
        parser.error('--mcp needs one more package: pip install "gradio[mcp]"')

    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("paligemma").setLevel(logging.INFO)
    listed = [name.strip() for name in (arguments.models or "").split(",") if name.strip()]
    sources = dict.fromkeys([*filter(None, [arguments.model]), *listed]) or [EMBEDDED]
    models = Models(
        [None if source == EMBEDDED else source for source in sources],
        partial(
            _load,
            device=arguments.device or None,
            dtype=arguments.dtype or "auto",
            compile=arguments.compile,
        ),
    )
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    page = build_page(models)
    page.launch(
        server_name=arguments.host,
        server_port=arguments.port,
        share=arguments.share or None,
        auth=(user, password) if arguments.auth else None,
        mcp_server=arguments.mcp,
        prevent_thread_lock=True,
        **LAUNCH_SETTINGS,
    )
    loaded = models.start(models.names[0])
    while not (loaded.done() or ending.wait(STATUS_SECONDS)):
        pass
    try:
        if loaded.done():
            loaded.result()
    except paligemma.PaliGemmaError as error:
        page.close(verbose=False)
        sys.exit(str(error))
    ending.wait()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # who presses Ctrl-C again does not want to wait
    models.close()
    end = time.monotonic() + LAST_ANSWERS_SECONDS
    while models.is_busy and time.monotonic() < end:
        time.sleep(STATUS_SECONDS)
    time.sleep(STATUS_SECONDS)  # for the last words to reach whoever waits for them
    page.close(verbose=False)


def _load(source: str | None, **arguments: object) -> paligemma.VisionLanguageModel:
    """`paligemma.load`, which brings torch, looked up only now: the page is served before."""
    return paligemma.load(source, **arguments)


if __name__ == "__main__":
    main()
