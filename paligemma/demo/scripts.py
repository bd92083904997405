"""The browser's part of the page: it has the clipboard, its own address, and the files that were made for it."""

from __future__ import annotations

import json
from pathlib import Path

from ..prompts import TASKS
from .handlers import EXAMPLES, LINK_FIELDS

NOTHING_YET = '<p class="nothing-yet">The answer appears here, and boxes and masks on the picture.</p>'
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
# Another picture: what was answered about the one before goes (marks, attention, line about time, text, buttons, panel), and the prompt of
# an example makes place for one that fits any picture. Here, since what the server says might come after the first token
# of the next answer.
CHANGE_PICTURE = f"""(prompt) => {{
    const isExample = {json.dumps([example["prompt"] for example in EXAMPLES])}.includes(prompt);
    const hidden = {{__type__: "update", visible: false}};
    const task = isExample ? {json.dumps(TASKS[0].prompt())} : prompt;
    return [task, "", "", "", {json.dumps(NOTHING_YET)}, hidden, hidden];
}}"""
# What is done to a `gr.HTML`, as its events, which have a `choice`. A click: on an element with `data-choice`, or on a patch
# of an image with `data-rows` and `data-columns`. A selection: such an element is pointed at, or, when the pointer leaves,
# the pressed one again. An input: the values of all sliders with `data-name`. What had the focus before the HTML was drawn
# anew has it again.
TELL_CHOICE = """
let latest, timer;
const find = (event) => event.target.closest("[data-choice]");
const point = (pointed) => {
    if (!pointed || pointed.dataset.choice === latest) return;
    latest = pointed.dataset.choice;
    clearTimeout(timer);
    timer = setTimeout(() => trigger("select", {choice: JSON.parse(pointed.dataset.choice)}), 120);
};
element.addEventListener("click", (event) => {
    const chosen = find(event), grid = event.target.closest("[data-rows]");
    if (chosen) {
        latest = chosen.dataset.choice;
        clearTimeout(timer);
        trigger("click", {choice: JSON.parse(latest)});
    } else if (grid) {
        const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(grid.getScreenCTM().inverse());
        const {width, height} = grid.viewBox.baseVal, {rows, columns} = grid.dataset;
        const row = Math.floor(at.y / height * rows), column = Math.floor(at.x / width * columns);
        if (row >= 0 && row < rows && column >= 0 && column < columns)
            trigger("click", {choice: {patch: row * columns + column}});
    }
});
for (const kind of ["pointerover", "focusin"]) element.addEventListener(kind, (event) => point(find(event)));
element.addEventListener("pointerleave", () => point(element.querySelector("[aria-pressed=true]")));
element.addEventListener("input", (event) => {
    if (event.target.nextElementSibling) event.target.nextElementSibling.value = event.target.value;
    const sliders = [...element.querySelectorAll("[data-name]")].map((one) => [one.dataset.name, Number(one.value)]);
    trigger("input", {choice: Object.fromEntries(sliders)});
});
element.addEventListener("change", (event) => {
    if (event.target.dataset.name === "patch") trigger("click", {choice: {patch: Number(event.target.value)}});
});
watch("value", () => {
    const isLost = document.activeElement === document.body && latest;
    if (isLost) element.querySelector(`[data-choice='${latest.replaceAll("'", "\\'")}']`)?.focus({preventScroll: true});
});
"""
# The answers that the browser keeps, the latest first, each with a small copy of its picture, see `records`. The value of
# this `gr.HTML` is the one that is shown; one that is not kept yet is added. A click on one has it as `choice`, after the copy
# was uploaded if the server has the picture no more. Where storage is full or forbidden, the answers last as long as the page.
# What comes out of it is shown as text, and checked by the server before it is used. (`gr.BrowserState` fails where storage is
# forbidden, as in frames of other sites. Its encryption would protect nothing, since the page comes with the key; and with
# another key at each start, all answers would be lost at each start.)
KEEP_ANSWERS = (Path(__file__).parent / "kept_answers.js").read_text()
CHOOSE_FILE = """() => document.querySelector("#picture input[type=file]").click()"""
ZOOM = """() => {
    const stage = document.querySelector("#stage"), isZoomed = stage.toggleAttribute("data-zoomed");
    document.querySelector("#zoom").textContent = isZoomed ? "Close" : "Zoom";
}"""
# Once, when the page is there: an image that is dropped or pasted anywhere becomes the picture, Escape ends the zoom, and
# while Gradio shows that an answer is under way, `data-running` puts Stop in the place of Run. (Of its events, none comes
# after an error.)
LISTEN = """() => {
    const imageOf = (files) => [...(files || [])].find((file) => file.type.startsWith("image/"));
    const isElsewhere = (event) => event.target.closest?.("#more-pictures");
    const take = (event, files) => {
        const image = imageOf(files), input = document.querySelector("#picture input[type=file]");
        if (!image || !input || isElsewhere(event)) return;
        event.preventDefault();
        event.stopPropagation();
        const chosen = new DataTransfer();
        chosen.items.add(image);
        input.files = chosen.files;
        input.dispatchEvent(new Event("change", {bubbles: true}));
    };
    const mark = (isOver) => document.body.toggleAttribute("data-dropping", isOver);
    document.addEventListener("dragover", (event) => {
        if (![...event.dataTransfer.types].includes("Files") || isElsewhere(event)) return;
        event.preventDefault();
        mark(true);
    }, true);
    document.addEventListener("dragleave", (event) => event.relatedTarget || mark(false), true);
    document.addEventListener("drop", (event) => { mark(false); take(event, event.dataTransfer.files); }, true);
    document.addEventListener("paste", (event) => take(event, event.clipboardData.files), true);
    document.addEventListener("keydown", (event) => {
        const stage = document.querySelector("#stage");
        if (event.key === "Escape" && stage.hasAttribute("data-zoomed")) document.querySelector("#zoom").click();
    });
    const answers = document.querySelector("#answers"), page = document.body;
    new MutationObserver(() => {
        const progress = answers.querySelector("[data-testid=status-tracker]");
        const isRunning = progress.matches(".translucent, .generating") && !progress.querySelector(".error");
        if (isRunning === page.hasAttribute("data-running")) return;
        const hadFocus = ["run", "stop"].includes(document.activeElement?.id);
        page.toggleAttribute("data-running", isRunning);
        if (hadFocus) document.querySelector(isRunning ? "#stop" : "#run").focus();
    }).observe(answers, {attributes: true, childList: true, subtree: true});
}"""
