"""What `paligemma.inspection` finds, as HTML and SVG; what can be chosen has a `data-choice`, see `scripts.TELL_CHOICE`."""

from __future__ import annotations

import base64
import inspect
import io
import json
import textwrap
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from ..inspection import CacheFacts, Candidate, EncoderInspection, Inspection, LensEntry, Span, WalkStep


# From the patches that are attended to least to the one that is most: color and opacity, 0 to 255.
COLD, WARM = np.array([11, 18, 48, 205.0]), np.array([255, 205, 60, 45.0])
GAMMA = 0.75  # of the share in the largest, so that small ones can be told apart
HEAT_PIXELS, THUMBNAIL_PIXELS = 256, 24  # on a side
MAX_BARS = 24  # of tokens that are listed
WORDS_TIP = '<p class="tip">Click a word. The more orange, the less sure the model was.</p>'
NAMES = {"image": "Picture", "prompt": "Prompt", "answer": "Answer so far"}
# Units of the drawing: an image's side, a position of text, space for names.
MASK_IMAGE, MASK_STEP, MASK_MARGIN = 96, 9, 12
SPACE = "␣"  # for a token that is a space, or begins with one


def choice(**values: object) -> str:
    """The attribute of what can be chosen."""
    return f'data-choice="{escape(json.dumps(values))}"'


def token_name(text: str) -> str:
    """A token's text with what cannot be seen in it."""
    return escape(text.replace(" ", SPACE).replace("\n", "⏎") or "∅")


def percent(share: float) -> str:
    if 0 < share < 0.0005:
        return "< 0.1 %"
    return f"{100 * share:.1f} %" if 0 < share < 0.995 else f"{100 * share:.0f} %"


def bar(name: str, share: float, note: str = "", color: str = "", attributes: str = "") -> str:
    """A name with a bar as long as its share; a button if it has attributes."""
    tag = "button" if attributes else "div"
    kind = ' type="button"' if attributes else ""
    return (
        f'<{tag}{kind} class="bar {color}" {attributes}><span>{name}</span>'
        f'<i style="--share: {share:.4f}"></i><small>{note or escape(percent(share))}</small></{tag}>'
    )


def tabs_html(names: Iterable[str], chosen: str) -> str:
    """The sections to choose from."""
    buttons = "".join(
        f'<button type="button" {choice(tab=name)} aria-pressed="{str(name == chosen).lower()}">{name}</button>'
        for name in names
    )
    return f'<div class="tabs" role="group" aria-label="What to see">{buttons}</div>'


def sliders_html(sliders: Iterable[tuple[str, str, float, float, float, float]]) -> str:
    """Settings whose change redraws the distribution: name, label, minimum, maximum, step and value of each."""
    rows = "".join(
        f'<label>{label}<input type="range" data-name="{name}" min="{low}" max="{high}" step="{step}" value="{value}">'
        f"<output>{value}</output></label>"
        for name, label, low, high, step, value in sliders
    )
    return (
        '<p class="tip">Pick a rival above, and the answer goes on from there, beside the other. Or move the settings: from '
        f'these likeliest tokens the sampler draws, and not from what is cut off.</p><div class="sliders">{rows}</div>'
    )


# --- words


def words_html(title: str, line: int, tokens: Sequence[tuple[str, float]], chosen: int | None) -> str:
    """A row of an answer's tokens, tinted by how unsure the model was; the chosen one is pressed.

    Args:
        line: which answer of those that are shown.
        tokens: text and probability of each.
    """
    buttons = "".join(
        f'<button type="button" {choice(line=line, index=index)} aria-pressed="{str(index == chosen).lower()}" '
        f'style="--unsure: {1 - probability:.2f}" title="{escape(percent(probability))}">{token_name(text)}</button>'
        for index, (text, probability) in enumerate(tokens)
    )
    return f'<div class="line"><small>{escape(title)}</small><div class="words">{buttons}</div></div>'


def rivals_html(seen: Inspection, line: int) -> str:
    """The token of a step with its rivals, each a button that lets the answer go on from it."""
    rivals = "".join(
        bar(token_name(one.text), one.probability, attributes=choice(line=line, index=seen.index, rival=one.id))
        for one in seen.rivals
    )
    return (
        f'<div class="bars">{bar(token_name(seen.token.text), seen.token.probability, color="chosen")}{rivals}</div>'
        '<p class="tip">Click a rival: the answer goes on from there.</p>'
    )


# --- attention


def heat_svg(shares: np.ndarray, size: tuple[int, int], patch: int | None = None, has_grid: bool = False) -> str:
    """A layer over the image that is dark where nothing is attended to.

    Args:
        shares: of the attention, float [rows, columns].
        size: width and height of the image.
        patch: one that is framed.
        has_grid: whether the patches are drawn, to click at one.
    """
    width, height = size
    rows, columns = shares.shape
    warm = Image.fromarray((_warmth(shares) * 255).astype(np.uint8)).resize(
        (HEAT_PIXELS,) * 2, Image.Resampling.BICUBIC
    )
    parts = [
        f'<image href="{_png(_colored(np.asarray(warm) / 255))}" width="{width}" height="{height}" preserveAspectRatio="none"/>'
    ]
    if has_grid:
        lines = [f"M{width * at / columns:.1f} 0v{height}" for at in range(1, columns)]
        lines += [f"M0 {height * at / rows:.1f}h{width}" for at in range(1, rows)]
        parts.append(f'<path class="grid" d="{"".join(lines)}"/>')
    if patch is not None:
        row, column = divmod(patch, columns)
        parts.append(
            f'<rect class="patch" x="{width * column / columns:.1f}" y="{height * row / rows:.1f}" '
            f'width="{width / columns:.1f}" height="{height / rows:.1f}"/>'
        )
    grid = f' data-rows="{rows}" data-columns="{columns}"' if has_grid else ""
    return (
        f'<svg class="heat" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="Attention to the picture, brightest where it is most"{grid}>{"".join(parts)}</svg>'
    )


def attention_html(seen: Inspection, layer: int | None, head: int | None, line: int) -> str:
    """Shares of image, prompt and answer, a heat map of each layer and head to choose, and the words attended to."""
    shares = seen.shares_of(layer, head)
    bars = "".join(bar(NAMES[kind], share, color=f"of-{kind}") for kind, share in shares.items())
    of_words = seen.mean(layer, head)[-len(seen.texts) :]
    words = "".join(
        f'<span style="--share: {share / max(of_words.max(), 1e-9):.3f}" title="{escape(percent(share))}">{token_name(text)}</span>'
        for text, share in zip(seen.texts, of_words.tolist())
    )
    layers, heads = seen.attention.shape[:2]
    columns: list[int | None] = [None, *range(heads)]
    grid = "".join(
        f'<div class="maps" role="group" aria-label="Layer {row + 1}"><small>{row + 1}</small>'
        + "".join(_map_button(seen, row, column, (row, column) == (layer, head), line) for column in columns)
        + "</div>"
        for row in range(layers)
    )
    is_all = str(layer is None and head is None).lower()
    return (
        f'<div class="bars">{bars}</div>'
        f'<p class="tip">The picture is bright where {_what(layer, head)} attended most: one patch has '
        f"{percent(float(seen.heat_map(layer, head).max()))}. At first it is the layer that finds the most in one patch. "
        "Choose others:</p>"
        f'<button type="button" class="chip" {choice(line=line, layer=None, head=None)} aria-pressed="{is_all}">'
        "All layers and heads</button>"
        f'<div class="scroll" role="group" aria-label="Layers and heads" tabindex="0">'
        f'<div class="maps head" aria-hidden="true"><small>layer</small><small>mean</small>'
        f"{''.join(f'<small>head {at + 1}</small>' for at in range(heads))}</div>{grid}</div>"
        f'<p class="tip">And the words that it attended to:</p><p class="attended">{words}</p>'
    )


def _what(layer: int | None, head: int | None) -> str:
    if layer is None:
        return "all layers and heads"
    return f"the heads of layer {layer + 1}" if head is None else f"head {head + 1} of layer {layer + 1}"


def _map_button(seen: Inspection, layer: int, head: int | None, is_chosen: bool, line: int) -> str:
    name = f"Layer {layer + 1}, {'mean' if head is None else f'head {head + 1}'}"
    return (
        f'<button type="button" {choice(line=line, layer=layer, head=head)} aria-pressed="{str(is_chosen).lower()}">'
        f'<img src="{_thumbnail(seen.heat_map(layer, head))}" alt="{name}"></button>'
    )


def _thumbnail(shares: np.ndarray) -> str:
    """A small heat map, as the address of an image."""
    warmth = _warmth(shares)
    if len(warmth) > THUMBNAIL_PIXELS:
        small = Image.fromarray(warmth.astype(np.float32)).resize((THUMBNAIL_PIXELS,) * 2, Image.Resampling.BOX)
        warmth = np.asarray(small)
    return _png(_colored(warmth)[..., :3])


def _warmth(shares: np.ndarray) -> np.ndarray:
    """Shares as parts of the largest, from 0 to 1."""
    return (shares / max(float(shares.max()), 1e-9)) ** GAMMA


def _colored(warmth: np.ndarray) -> np.ndarray:
    """Red, green, blue, opacity, uint8 [rows, columns, 4]."""
    return (COLD + (WARM - COLD) * warmth[..., None]).round().astype(np.uint8)


def _png(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


# --- the other sections


def lens_html(lens: Sequence[LensEntry], token: Candidate) -> str:
    """The likeliest token after each layer, the last one on top, as a ladder that leads to the chosen token."""
    rows = "".join(
        bar(
            f"<b>{one.layer + 1}</b> {token_name(one.text)}",
            one.probability,
            color="chosen" if one.id == token.id else "",
        )
        for one in reversed(lens)
    )
    return (
        '<p class="tip">The token that would be likeliest if the decoder ended after that layer. Colored where it is '
        f"already {token_name(token.text)}.</p>"
        f'<div class="bars lens">{rows}</div>'
    )


def distribution_html(candidates: Iterable[Candidate]) -> str:
    """The likeliest tokens under some settings; what is cut off is crossed out."""
    return (
        '<div class="bars">'
        + "".join(
            bar(
                token_name(one.text),
                one.probability,
                note="cut off" if one.is_cut_off else "",
                color="cut" if one.is_cut_off else "",
            )
            for one in candidates
        )
        + "</div>"
    )


def mask_html(seen: Inspection, texts: Sequence[str]) -> str:
    """The prefix-LM mask of a whole answer as blocks; rows that came after the chosen token are pale.

    Args:
        texts: of the whole answer's tokens.
    """
    rows = list(dict.fromkeys(block.rows for block in seen.mask))
    at = _mask_places(rows)
    size = max(end for _, end in at.values())
    parts = []
    for block in seen.mask:
        (top, bottom), (left, right) = at[block.rows], at[block.columns]
        if block.kind == "full":
            title = f"{NAMES[block.rows.kind]} sees all of {NAMES[block.columns.kind].lower()}"
            parts.append(_mask_rect(left, top, right - left, bottom - top, block.columns.kind, title))
        elif block.kind == "causal":
            parts += [
                _mask_rect(left, top + MASK_STEP * number, MASK_STEP * (number + 1), MASK_STEP, "answer", title)
                for number, title in enumerate(_answer_titles(block.rows, texts))
            ]
    answer = next((row for row in rows if row.kind == "answer"), None)
    if answer and seen.position >= answer.start - 1:
        top = at[answer][0] + MASK_STEP * (seen.position - answer.start + 1)
        parts.append(f'<rect class="later" x="0" y="{top}" width="{size}" height="{max(0, size - top)}"/>')
    names = "".join(
        f'<text x="{(start + end) / 2}" y="-3" text-anchor="middle">{NAMES[row.kind].split()[0].lower()}</text>'
        for row, (start, end) in at.items()
        if end - start > 4 * MASK_STEP
    )
    return (
        '<p class="tip">A row is a position, its colored part what it attends to: picture and prompt see each other both '
        "ways, each token of the answer what came before. The pale rows did not exist yet. Point at a part.</p>"
        f'<svg class="mask-drawing" viewBox="0 {-MASK_MARGIN} {size} {size + MASK_MARGIN}" role="img" aria-label="The prefix-LM mask of '
        f'{rows[-1].end} positions">{names}{"".join(parts)}</svg>'
    )


def _mask_places(rows: Sequence[Span]) -> dict[Span, tuple[float, float]]:
    """Where each span begins and ends; images are drawn as if they had fewer positions."""
    places, start = {}, 0.0
    for row in rows:
        end = start + (MASK_IMAGE if row.kind == "image" else MASK_STEP * (row.end - row.start))
        places[row] = start, end
        start = end
    return places


def _mask_rect(x: float, y: float, width: float, height: float, kind: str, title: str) -> str:
    return f'<rect class="of-{kind}" x="{x}" y="{y}" width="{width}" height="{height}"><title>{escape(title)}</title></rect>'


def _answer_titles(span: Span, texts: Sequence[str]) -> Iterable[str]:
    for number in range(span.end - span.start):
        text = texts[number] if number < len(texts) else ""
        yield f"Position {span.start + number}, {token_name(text)}: sees positions 0 to {span.start + number}"


def cache_html(cache: CacheFacts, line: int, can_measure: bool, seconds: Sequence[float] = ()) -> str:
    """What the cache holds, what it and grouped-query attention save, and the times of prefill and steps.

    Args:
        seconds: of each token without a cache, once they were measured.
    """
    facts = [
        ("Positions", f"{cache.positions}"),
        ("Keys and values", _bytes(cache.bytes)),
        ("With a key and value head for each query head", _bytes(cache.bytes_without_groups)),
        ("Multiply-adds so far", _count(cache.operations)),
        (
            "Without a cache",
            f"{_count(cache.operations_without_cache)}, {cache.operations_without_cache / cache.operations:.1f} times as many",
        ),
    ]
    rows = "".join(f"<tr><th scope='row'>{name}</th><td>{value}</td></tr>" for name, value in facts)
    times = [("prefill", cache.prefill_seconds)]
    times += [(f"token {number + 2}", one) for number, one in enumerate(cache.step_seconds[: MAX_BARS - 1])]
    longest = max(*(one for _, one in times), *seconds, 1e-9)
    bars = "".join(bar(name, one / longest, f"{1000 * one:.1f} ms") for name, one in times)
    if seconds:
        mean, total = sum(seconds) / len(seconds), cache.prefill_seconds + sum(cache.step_seconds)
        bars += bar("a token without a cache", mean / longest, f"{1000 * mean:.1f} ms", color="cut")
        bars += f'<p class="tip">All {len(seconds)} tokens without a cache: {sum(seconds):.2f} s, with it {total:.2f} s.</p>'
    measure = (
        f'<button type="button" class="chip" {choice(line=line, measure=True)}>Measure it without a cache</button>'
        if can_measure and not seconds
        else ""
    )
    drawn = f'<div class="bars times" role="group" aria-label="Milliseconds of each step" tabindex="0">{bars}</div>'
    return f'<table class="facts">{rows}</table>{drawn}{measure}'


def _bytes(number: int) -> str:
    return f"{number / 2**20:.2f} MB" if number >= 2**20 else f"{number / 2**10:.0f} kB"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.0f} million"


def encoder_html(seen: EncoderInspection, layer: int | None) -> str:
    """The layers of the vision encoder, each with a heat map of what a patch attends to, to choose one."""
    rows, columns = seen.grid
    row, column = divmod(seen.patch, columns)
    maps = "".join(
        f'<button type="button" {choice(patch=seen.patch, encoder_layer=number)} aria-pressed="{str(number == layer).lower()}">'
        f'<img src="{_thumbnail(seen.heat_map(number))}" alt="Layer {number + 1}"><small>{number + 1}</small></button>'
        for number in range(len(seen.attention))
    )
    return (
        f'<p class="tip">Click a patch of the picture: here row {row + 1}, column {column + 1} of {rows} × {columns}. The '
        f"picture is bright where it attends to in {'all layers' if layer is None else f'layer {layer + 1}'} of the encoder. "
        "Choose a layer:</p>"
        f'<label class="tip">Patch <input type="range" data-name="patch" min="0" max="{rows * columns - 1}" value="{seen.patch}"></label>'
        f'<div class="maps wide" role="group" aria-label="Layers">'
        f'<button type="button" class="chip" {choice(patch=seen.patch, encoder_layer=None)} aria-pressed="{str(layer is None).lower()}">All</button>'
        f"{maps}</div>"
    )


def walk_html(steps: Iterable[WalkStep], root: Path, address: str | None) -> str:
    """The seven steps from pixels to words, each with its numbers and the lines of code that make them.

    Args:
        root: the folder in which the steps' files are.
        address: where the files of the project can be read, or None.
    """
    html = []
    for step in steps:
        shape = " × ".join(f"{one:,}" for one in step.shape)
        values = ", ".join(f"{one:.3g}" for one in step.values)
        where = f"{step.file}, line {step.line}"
        link = f' · <a href="{address}/{step.file}#L{step.line}" target="_blank">{where}</a>' if address else ""
        lines = (root / step.file).read_text().splitlines(keepends=True)[step.line - 1 :]
        code = "".join(inspect.getblock(lines))
        html.append(
            f"<li><b>{escape(step.name.capitalize())}</b><p>{escape(step.text)}</p><small>{shape} numbers: {values} …{link}</small>"
            f"<details><summary>{escape(where)}</summary><pre tabindex='0'>{escape(textwrap.dedent(code))}</pre></details></li>"
        )
    return f'<ol class="walk">{"".join(html)}</ol>'
