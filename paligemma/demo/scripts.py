"""The browser's part of the page: it has the clipboard, its own address, and the files that were made for it."""

from __future__ import annotations

import json

from .handlers import LINK_FIELDS

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
