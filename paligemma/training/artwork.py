"""What scenes are made of: openly licensed emoji artwork and fonts, fetched with npm, the drawings made pixels once.

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

CACHE_FOLDER = Path.home() / ".cache" / "paligemma-training"
# What the page draws new scenes from.
SHEET, SHEET_COLUMNS = Path(__file__).parent.parent / "demo" / "examples" / "artwork" / "sprites.webp", 25
SHEET_FONT = SHEET.parent / "DejaVuSans-Bold.ttf"

# npm package and version: name, licence. The README credits them.
STYLES = {
    "@iconify-json/noto@1.2.9": "Apache-2.0",
    "@iconify-json/twemoji@1.2.5": "CC-BY-4.0",
    "@iconify-json/fluent-emoji-flat@1.2.6": "MIT",
    "@iconify-json/emojione@1.2.3": "CC-BY-4.0",
    "@iconify-json/noto-v1@1.2.5": "Apache-2.0",
}

HELD_OUT_STYLE = 3  # left out while the recipe is judged: an index into `STYLES`
FONTS = "dejavu-fonts-ttf@2.37.3"  # Bitstream Vera and Arev licences, public domain changes
FONT_NAMES = ("DejaVuSans-Bold", "DejaVuSans", "DejaVuSansMono-Bold", "DejaVuSerif-Bold", "DejaVuSans-BoldOblique")


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


_ICON_IS_THE_NAME = """
    fox bear panda koala lion frog penguin duck owl butterfly snail spider turtle snake octopus crab dolphin shark
    elephant banana watermelon lemon pineapple strawberry peach pear carrot mushroom hamburger pizza taco cookie avocado
    croissant lollipop eggplant bus tractor bicycle airplane helicopter rocket sailboat ambulance guitar violin trumpet
    drum house key umbrella balloon basketball watch pencil camera laptop television bell crown hammer bed door cactus
    sunflower rose star cloud snowman ghost candle trophy camel crocodile eagle gorilla lizard scorpion squid unicorn goat
    egg motorcycle anchor saxophone telephone envelope backpack ring castle tent shield tulip skull necktie dress
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
    "pumpkin": "jack-o-lantern",
    "hourglass": "hourglass-done",
}
KINDS = (
    *(Kind(name, name) for name in _ICON_IS_THE_NAME.split() if name != "snowman"),
    *(Kind(name, icon) for name, icon in _ICON_HAS_ANOTHER_NAME.items()),
    Kind("mouse", "mouse-face", irregular_plural="mice"),
    Kind("fish", "tropical-fish", irregular_plural="fish"),
    Kind("snowman", "snowman", irregular_plural="snowmen"),
    Kind("tomato", "tomato", irregular_plural="tomatoes"),
)


class Sprites:
    """Every kind in some styles, at halving sizes, so that one is drawn small from a small one.

    levels: uint8 [kinds, styles, size, size, 4], RGBA, each half the size of the one before.
    """

    VISIBLE_ALPHA = 64  # from here on a pixel counts as part of the object

    def __init__(self, pixels: np.ndarray):
        self.kinds, self.styles = pixels.shape[:2]
        self.levels = [pixels]
        while self.levels[-1].shape[2] > 24:
            self.levels.append(_halve(self.levels[-1]))
        self._outlines: dict[tuple[int, int], np.ndarray] = {}

    def __getitem__(self, styles: list[int]) -> Sprites:
        """The same kinds in fewer styles."""
        chosen = object.__new__(Sprites)
        chosen.kinds, chosen.styles = self.kinds, len(styles)
        chosen.levels = [level[:, styles] for level in self.levels]
        chosen._outlines = {}
        return chosen

    def outline(self, kind: int, style: int) -> np.ndarray:
        """Float32 [32, 2], the outermost visible points (x, y) in as many directions, in parts of the square and from its
        centre: what a turned drawing's box is computed from.
        """
        if (kind, style) not in self._outlines:
            sprite = self.levels[0][kind, style]
            rows, columns = np.nonzero(sprite[..., 3] >= self.VISIBLE_ALPHA)
            points = (np.stack([columns, rows], axis=-1) + 0.5) / len(sprite) - 0.5
            angles = np.arange(32) * (2 * np.pi / 32)
            furthest = (points @ np.stack([np.cos(angles), np.sin(angles)])).argmax(axis=0)
            self._outlines[kind, style] = points[furthest].astype(np.float32)
        return self._outlines[kind, style]


def load_sprites(size: int, packages: Sequence[str] = tuple(STYLES), cache_folder: Path = CACHE_FOLDER) -> Sprites:
    """Every kind in the style of each package, cropped to what is drawn and scaled so that its longer side fills the square.

    Other packages than those of `STYLES` do if they are of Iconify's sort and name their drawings as these do.

    Raises:
        ValueError: a package lacks a kind.
    """
    cache_folder.mkdir(parents=True, exist_ok=True)
    contents = hashlib.sha256(repr((KINDS, tuple(packages))).encode()).hexdigest()[:12]
    cached = cache_folder / f"sprites-{contents}-{size}.npy"
    if not cached.exists():
        styles = [_rasterise_style(package, size) for package in packages]
        _write_whole(cached, lambda path: np.save(path, np.stack(styles, axis=1)))
    return Sprites(np.load(cached))


def pack_sheet(sprites: Sprites) -> Image.Image:
    """All sprites on one sheet, `SHEET_COLUMNS` in a row; `load_sheet` reads it."""
    pixels = sprites.levels[0]
    size = pixels.shape[2]
    flat = pixels.reshape(-1, SHEET_COLUMNS, size, size, 4)
    return Image.fromarray(flat.transpose(0, 2, 1, 3, 4).reshape(len(flat) * size, SHEET_COLUMNS * size, 4))


def load_sheet(path: Path = SHEET) -> Sprites:
    """The sprites that ship with the package: every kind in every style."""
    pixels = np.asarray(Image.open(path).convert("RGBA"))
    size = pixels.shape[1] // SHEET_COLUMNS
    tiles = pixels.reshape(-1, size, SHEET_COLUMNS, size, 4).transpose(0, 2, 1, 3, 4)
    return Sprites(tiles.reshape(len(KINDS), len(STYLES), size, size, 4))


def load_folder(folder: Path, size: int) -> tuple[Sprites, list[int]]:
    """Drawings in one style that nobody has trained on: `cat.png` or `cat.svg`, named after the kinds.

    Returns:
        the sprites, blank where there is no drawing, and the indices of the kinds that there are.
    """
    pixels, present = np.zeros((len(KINDS), 1, size, size, 4), np.uint8), []
    for index, kind in enumerate(KINDS):
        for path in (folder / f"{kind.name}.svg", folder / f"{kind.name}.png"):
            if path.exists():
                is_svg = path.suffix == ".svg"
                picture = _draw_svg(path.read_text(), 2 * size) if is_svg else Image.open(path).convert("RGBA")
                pixels[index, 0] = _fill_square(picture, size)
                present.append(index)
                break
    if not present:
        raise FileNotFoundError(f"{folder} holds no drawings: name them after the kinds, such as {KINDS[0].name}.png.")
    pixels[[index for index in range(len(KINDS)) if index not in present]] = 255
    return Sprites(pixels), present


def load_fonts(cache_folder: Path = CACHE_FOLDER) -> list[Path]:
    """The files of the fonts that words are painted in."""
    folder = cache_folder / FONTS
    paths = [folder / f"{name}.ttf" for name in FONT_NAMES]
    if not all(path.exists() for path in paths):
        folder.mkdir(parents=True, exist_ok=True)
        with _npm_package(FONTS) as tar:
            for path in paths:
                font = tar.extractfile(f"package/ttf/{path.name}").read()
                _write_whole(path, lambda unfinished, font=font: unfinished.write_bytes(font))
    return paths


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Through a file of another name, so that an interruption leaves no half of one."""
    unfinished = path.with_name(f"unfinished-{path.name}")
    write(unfinished)
    os.replace(unfinished, path)


def _halve(pixels: np.ndarray) -> np.ndarray:
    """uint8 [..., size, size, 4] to half the size; transparent pixels lend no colour to their neighbours."""
    size = pixels.shape[-2] // 2
    alpha = pixels[..., 3:].astype(np.float32)
    weighted = np.concatenate([pixels[..., :3] * alpha, alpha], axis=-1)
    means = weighted.reshape(*pixels.shape[:-3], size, 2, size, 2, 4).mean((-4, -2))
    means[..., :3] /= np.maximum(means[..., 3:], 1e-3)
    return np.clip(np.round(means), 0, 255).astype(np.uint8)


def _rasterise_style(package: str, size: int) -> np.ndarray:
    with _npm_package(package) as tar:
        icons = json.load(tar.extractfile("package/icons.json"))
    names = icons["icons"].keys() | icons.get("aliases", {}).keys()
    if missing := [kind.icon for kind in KINDS if kind.icon not in names]:
        raise ValueError(f"{package} has no drawings of {', '.join(missing)}: put those that it has into a folder.")
    # Twice the size, so that cropping and shrinking leave no blur.
    return np.stack([_fill_square(_draw_svg(_svg(icons, kind.icon), 2 * size), size) for kind in KINDS])


@contextmanager
def _npm_package(package: str) -> Iterator[tarfile.TarFile]:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as tar:
            yield tar


def _svg(icons: dict, name: str) -> str:
    while name in icons.get("aliases", {}):
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'


def _draw_svg(svg: str, size: int) -> Image.Image:
    import resvg_py  # only here: the sprites are usually in the cache already

    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)))).convert("RGBA")


def _fill_square(picture: Image.Image, size: int) -> np.ndarray:
    """uint8 [size, size, 4]: what is drawn, its longer side as long as the square's, in the middle."""
    picture = picture.crop(picture.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox())
    picture = picture.resize(
        [max(1, round(side * size / max(picture.size))) for side in picture.size], Image.Resampling.LANCZOS
    )
    square = Image.new("RGBA", (size, size))
    square.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return np.asarray(square)
