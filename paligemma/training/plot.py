"""Pictures of a run: curves in SVG, matrices in PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

WIDTH, HEIGHT, MARGIN = 640, 360, 48
COLORS = ("#4c6ef5", "#e8590c", "#2b8a3e")
TICKS = 4
CELL = 14  # pixels of a matrix's entry
LOW, HIGH = np.array([255, 255, 255]), np.array([24, 63, 160])


def draw_curves(curves: Mapping[str, Sequence[Mapping[str, float]]], figure: str, path: Path) -> None:
    """Draw a figure over the steps of a run, from zero on, and write it.

    Args:
        curves: by their names, rows with `step` and the figure.
        figure: the name of one, such as `loss`.
        path: of the SVG file.
    """
    points = {name: [(row["step"], row[figure]) for row in rows] for name, rows in curves.items()}
    last = max((step for curve in points.values() for step, _ in curve), default=1) or 1
    top = max((value for curve in points.values() for _, value in curve if math.isfinite(value)), default=1) or 1

    def place(step: float, value: float) -> tuple[float, float]:
        return (
            round(MARGIN + step / last * (WIDTH - 2 * MARGIN), 1),
            round(HEIGHT - MARGIN - value / top * (HEIGHT - 2 * MARGIN), 1),
        )

    parts = []
    for tick in range(TICKS + 1):
        x, y = place(last * tick / TICKS, top * tick / TICKS)
        parts += [
            f'<path d="M{MARGIN} {y}H{WIDTH - MARGIN}" stroke="#ddd"/>',
            f'<text x="{MARGIN - 6}" y="{y + 4}" text-anchor="end">{top * tick / TICKS:.3g}</text>',
            f'<text x="{x}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">{last * tick / TICKS:.0f}</text>',
        ]
    for number, (name, curve) in enumerate(points.items()):
        color = COLORS[number % len(COLORS)]
        line = " ".join(f"{x},{y}" for x, y in (place(step, value) for step, value in curve))
        parts += [
            f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>',
            f'<text x="{MARGIN + 8 + 120 * number}" y="{MARGIN - 16}" fill="{color}">{escape(name)}</text>',
        ]
    axis = f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">step</text>'
    title = f'<text x="{WIDTH - MARGIN}" y="{MARGIN - 16}" text-anchor="end">{escape(figure)}</text>'
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>{"".join(parts)}{axis}{title}</svg>\n',
        encoding="utf-8",
    )


def draw_matrices(matrices: Mapping[str, np.ndarray], path: Path) -> None:
    """Draw matrices side by side, each under its name, white where it is lowest and blue where it is highest.

    Args:
        matrices: float [rows, columns], by their names.
        path: of the PNG file.
    """
    heights, widths = zip(*(matrix.shape for matrix in matrices.values()))
    gap = 2 * CELL
    picture = Image.new(
        "RGB", (sum(widths) * CELL + (len(widths) + 1) * gap, max(heights) * CELL + 3 * gap // 2), "white"
    )
    draw, left = ImageDraw.Draw(picture), gap
    for name, matrix in matrices.items():
        low, high = matrix.min(), matrix.max()
        shares = ((matrix - low) / max(high - low, 1e-9))[..., None]
        cells = Image.fromarray((LOW + shares * (HIGH - LOW)).round().astype(np.uint8))
        picture.paste(
            cells.resize((matrix.shape[1] * CELL, matrix.shape[0] * CELL), Image.Resampling.NEAREST), (left, gap)
        )
        draw.text((left, gap // 3), f"{name}: {low:.2f} to {high:.2f}", fill="black")
        left += matrix.shape[1] * CELL + gap
    picture.save(path)
