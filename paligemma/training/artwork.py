"""The objects that scenes are made of: openly licensed emoji artwork, fetched with npm and turned into pixels once.

`KINDS` says which drawings are used and what they are called; `STYLES` says whose drawings they are.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

CACHE_FOLDER = Path.home() / ".cache" / "paligemma-training"

# npm package and version: name, licence. The README credits them.
STYLES = {
    "@iconify-json/noto@1.2.9": "Apache-2.0",
    "@iconify-json/twemoji@1.2.5": "CC-BY-4.0",
    "@iconify-json/fluent-emoji-flat@1.2.6": "MIT",
    "@iconify-json/emojione@1.2.3": "CC-BY-4.0",
    "@iconify-json/noto-v1@1.2.5": "Apache-2.0",
}


@dataclass(frozen=True)
class Kind:
    """A kind of object: what it is called, and the name of its drawing, the same in every style."""

    name: str
    icon: str
    irregular_plural: str | None = None

    @property
    def plural(self) -> str:
        if self.irregular_plural:
            return self.irregular_plural
        if self.name.endswith(("s", "x", "ch", "sh")):
            return self.name + "es"
        if self.name.endswith("y") and self.name[-2] not in "aeiou":
            return self.name[:-1] + "ies"
        return self.name + "s"

    @property
    def with_article(self) -> str:
        vowel_sound = self.name[0] in "aeiou" and not self.name.startswith("uni")
        return f"{'an' if vowel_sound else 'a'} {self.name}"


_ICON_IS_THE_NAME = """
    fox bear panda koala lion frog penguin duck owl butterfly snail spider turtle snake octopus crab dolphin shark
    elephant banana watermelon lemon pineapple strawberry peach pear carrot mushroom hamburger pizza taco cookie avocado
    croissant lollipop eggplant bus tractor bicycle airplane helicopter rocket sailboat ambulance guitar violin trumpet
    drum house key umbrella balloon basketball watch pencil camera laptop television bell crown hammer bed door cactus
    sunflower rose star cloud snowman ghost candle trophy
"""
_ICON_HAS_ANOTHER_NAME = {
    "cat": "cat-face",
    "dog": "dog-face",
    "rabbit": "rabbit-face",
    "tiger": "tiger-face",
    "cow": "cow-face",
    "pig": "pig-face",
    "monkey": "monkey-face",
    "horse": "horse-face",
    "bee": "honeybee",
    "ladybug": "lady-beetle",
    "whale": "spouting-whale",
    "apple": "red-apple",
    "donut": "doughnut",
    "cake": "birthday-cake",
    "hot dog": "hot-dog",
    "car": "automobile",
    "truck": "delivery-truck",
    "fire truck": "fire-engine",
    "light bulb": "light-bulb",
    "soccer ball": "soccer-ball",
    "clock": "alarm-clock",
    "book": "closed-book",
    "tree": "deciduous-tree",
    "gift": "wrapped-gift",
}
KINDS = (
    *(Kind(name, name) for name in _ICON_IS_THE_NAME.split() if name != "snowman"),
    *(Kind(name, icon) for name, icon in _ICON_HAS_ANOTHER_NAME.items()),
    Kind("mouse", "mouse-face", irregular_plural="mice"),
    Kind("fish", "tropical-fish", irregular_plural="fish"),
    Kind("snowman", "snowman", irregular_plural="snowmen"),
    Kind("tomato", "tomato", irregular_plural="tomatoes"),
)


def load_sprites(size: int, cache_folder: Path = CACHE_FOLDER) -> np.ndarray:
    """Every kind in every style, cropped to what is drawn and scaled so that its longer side fills the square.

    Returns:
        uint8 [kinds, styles, size, size, 4], RGBA, transparent around the object.
    """
    cache_folder.mkdir(parents=True, exist_ok=True)
    contents = hashlib.sha256(repr((KINDS, tuple(STYLES))).encode()).hexdigest()[:12]
    cached = cache_folder / f"sprites-{contents}-{size}.npy"
    if not cached.exists():
        styles = [_rasterise_style(package, size) for package in STYLES]
        unfinished = cached.with_suffix(".tmp.npy")
        np.save(unfinished, np.stack(styles, axis=1))
        os.replace(unfinished, cached)
    return np.load(cached)


def _rasterise_style(package: str, size: int) -> np.ndarray:
    icons = _fetch_icons(package)
    return np.stack([_rasterise(_svg(icons, kind.icon), size) for kind in KINDS])


def _fetch_icons(package: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        archive = next(Path(folder).glob("*.tgz"))
        with tarfile.open(archive) as tar:
            return json.load(tar.extractfile("package/icons.json"))


def _svg(icons: dict, name: str) -> str:
    while name in icons.get("aliases", {}):
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'


def _rasterise(svg: str, size: int) -> np.ndarray:
    import resvg_py  # only here: the sprites are usually in the cache already

    # Twice the size, so that cropping and shrinking leave no blur.
    png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * size, height=2 * size)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    picture = picture.crop(picture.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox())
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    picture = picture.resize(
        [round(side * size / max(picture.size)) for side in picture.size], Image.Resampling.LANCZOS
    )
    square = Image.new("RGBA", (size, size))
    square.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return np.asarray(square)
