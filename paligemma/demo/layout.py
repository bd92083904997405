"""Pieces of the page that `app.py` puts together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
from gradio.components import Component
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder

from ..prompts import ENGLISH, LANGUAGES
from .handlers import EXAMPLES, EXAMPLES_FOLDER, SEE_INSIDE, SETTINGS, official_checkpoints
from .records import MAX_PROMPTS, Record
from .scripts import CHOOSE_FILE, KEEP_ANSWERS, TELL_CHOICE, ZOOM

PANEL = ("words", "rivals", "section", "distribution")  # parts of the panel “See inside”, from top to bottom
MORE_PICTURES = "For checkpoints trained on several pictures at once. Boxes and masks are drawn on the large one."


def stage(path: str, figure: str, has_scenes: bool) -> tuple[gr.Image, gr.HTML, gr.HTML, gr.Button]:
    """The one large image: the image itself, two layers over it (marks, attention), and the ways to another one."""
    with gr.Column(elem_id="stage", min_width=0):
        image = gr.Image(
            path,
            label="Picture",
            show_label=False,
            sources=["upload", "webcam", "clipboard"],
            buttons=[],
            elem_id="picture",
        )
        heat = gr.HTML(js_on_load=TELL_CHOICE, elem_id="heat")
        # Always there, though empty at first: of updates that came soon after one that made it visible, the browser
        # lost some.
        marks = gr.HTML(figure, elem_id="figure")
        with gr.Row(elem_id="picture-actions"):
            gr.Button("Change picture", size="sm", min_width=0, elem_id="change").click(None, js=CHOOSE_FILE)
            draw = gr.Button("New scene", size="sm", min_width=0, visible=has_scenes, elem_id="draw")
            gr.Button("Zoom", size="sm", min_width=0, elem_id="zoom").click(None, js=ZOOM)
    return image, heat, marks, draw


def example_files() -> list[str]:
    """Put the images of `EXAMPLES` among the uploads and return their paths."""
    return [save_file_to_cache(EXAMPLES_FOLDER / one["picture"], get_upload_folder()) for one in EXAMPLES]


def thumbnails(html: str, elem_id: str, files: Sequence[str] = ()) -> gr.HTML:
    """Images to choose from, see `rendering.thumbnails_html`; a click has the number of the chosen one as `choice`.

    Args:
        files: uploads that belong to the page, and stay as long as it does.
    """
    images = gr.HTML(html, js_on_load=TELL_CHOICE, elem_id=elem_id)
    images.keep_in_cache.update(files)
    return images


def kept_answers(record: Record) -> gr.HTML:
    """The answers that the browser keeps; its value is the record of the one that is shown, and a click has one as `choice`."""
    return gr.HTML(record, html_template="<div></div>", js_on_load=KEEP_ANSWERS, elem_id="history")


def prompt_row(prompt: str) -> tuple[gr.Textbox, gr.Button, gr.Button]:
    """The prompt with Run, in whose place is Stop while an answer is made."""
    with gr.Row(elem_id="ask"):
        text = gr.Textbox(
            prompt, label="Prompt", show_label=False, container=False, max_lines=MAX_PROMPTS, scale=5, elem_id="prompt"
        )
        run = gr.Button("Run", variant="primary", min_width=88, scale=0, elem_id="run")
        stop = gr.Button("Stop", min_width=88, scale=0, elem_id="stop")
    return text, run, stop


def language_menu(is_visible: bool) -> gr.Dropdown:
    """The languages in which official checkpoints answer."""
    return gr.Dropdown(
        [(f"{name} ({code})", code) for code, name in LANGUAGES.items()],
        value=ENGLISH,
        label="Language of the answer",
        visible=is_visible,
        elem_id="languages",
    )


def more_pictures() -> gr.Gallery:
    """A place for further pictures, folded away."""
    with gr.Accordion("More pictures", open=False):
        gr.Markdown(MORE_PICTURES)
        sources: list[Any] = ["upload", "clipboard"]
        return gr.Gallery(label="Further pictures", sources=sources, columns=4, height=160, elem_id="more-pictures")


def settings_menu(checkpoints: Sequence[str]) -> tuple[gr.Dropdown, list[Component]]:
    """The checkpoint and the numbers of `SETTINGS`, folded away."""
    with gr.Accordion("Settings", open=False):
        checkpoint = gr.Dropdown(checkpoints, label="Checkpoint", visible=len(checkpoints) > 1, elem_id="checkpoint")
        *ranges, seed = SETTINGS
        sliders: list[Component] = [
            gr.Slider(one.minimum, one.maximum, one.default, step=one.step, label=one.label, elem_id=one.name)
            for one in ranges
        ]
        # A text, since an empty `gr.Number` shows and sends 0.
        typed = gr.Textbox(label=seed.label, max_lines=1, max_length=19, elem_id=seed.name)
        with gr.Accordion("Official checkpoints, and where they run", open=False) as official:
            table = gr.Markdown(elem_id="official")
        # Not at once, since it takes a second to compute.
        official.expand(official_checkpoints, None, table, api_visibility="private")
        return checkpoint, [*sliders, typed]


def actions() -> tuple[gr.Column, gr.Button, gr.Button, gr.Button, gr.Button, gr.Button]:
    """What can be done with an answer: all of it, and its buttons to look inside, copy, save as image and as JSON, and share."""
    names = {"copy": "Copy text", "as-picture": "Picture (PNG)", "as-json": "Objects (JSON)", "share": "Link"}
    with gr.Column(elem_id="actions") as column:
        look = gr.Button(SEE_INSIDE, elem_id="see-inside")
        with gr.Row():
            copy, picture, objects, share = (
                gr.Button(text, size="sm", min_width=80, elem_id=name) for name, text in names.items()
            )
    return column, look, copy, picture, objects, share


def inside_panel() -> tuple[gr.Column, gr.HTML, gr.HTML, gr.HTML, gr.HTML]:
    """The panel in which an answer is looked into, closed at first, and the parts of `PANEL`."""
    with gr.Column(visible=False, elem_id="inside") as panel:
        words, rivals, section, distribution = (
            gr.HTML(js_on_load=TELL_CHOICE, elem_id=f"inside-{name}") for name in PANEL
        )
    return panel, words, rivals, section, distribution
