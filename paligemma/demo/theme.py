"""Gradio's theme of the page; `page.css` says what a theme cannot."""

from __future__ import annotations

import gradio as gr

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
