"""Sizes and token ids of a checkpoint, read from its `config.json`, and the one error that callers can act on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeGuard

# The vocabulary of places (arXiv 2407.07726, section 3.2): a box is four locations, each in 1024ths of the image's
# height or width; a mask inside it is 16 codes out of a codebook of 128.
LOCS_PER_BOX, LOC_STEPS = 4, 1024
CODES_PER_MASK, CODEBOOK_SIZE = 16, 128
LOC_TOKENS = tuple(f"<loc{step:04d}>" for step in range(LOC_STEPS))
SEG_TOKENS = tuple(f"<seg{code:03d}>" for code in range(CODEBOOK_SIZE))

GELU, GELU_TANH = "gelu", "gelu_pytorch_tanh"
# All but the first are names of the tanh approximation. In Gemma the first is too, as older official files write it;
# in SigLIP and Gemma 2 it is the exact function. So transformers reads them.
ACTIVATIONS = (GELU, GELU_TANH, "gelu_fast", "gelu_new", "gelu_accurate")

MAX_SHOWN = 40  # characters of a setting in a sentence about it
MAX_NUMBER = 2**31  # no size is larger, and tensors could not have it


class PaliGemmaError(Exception):
    """Something that the caller can mend; its message is one sentence that says what to do."""


def is_number(value: object, whole: bool = False) -> TypeGuard[float]:
    """Whether a setting is a finite number that a float holds, or a whole one of any size (5.0 is one)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    if whole and isinstance(value, Integral):
        return True
    try:
        return math.isfinite(value) and (not whole or value == math.trunc(value))
    except OverflowError:
        return False


def shorten(value: object) -> str:
    """A setting as a sentence about it shows it: its first characters, however many there are."""
    try:
        text = str(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "too long a number"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the SigLIP encoder. The defaults are those of So400m/14 at 224 pixels."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = GELU_TANH  # or GELU
    layer_norm_eps: float = 1e-6

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.patches_per_side**2


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the Gemma or Gemma 2 decoder. The defaults are those of Gemma 2B as PaliGemma uses it.

    Of Gemma 2 only:
        query_pre_attn_scalar: the products of queries and keys are divided by its root; None: by that of head_dim.
        attn_logit_softcapping, final_logit_softcapping: bounds of the attention's scores and of the logits; None: none.
        sliding_window: of the positions before it, how many an answer's position attends to in every other layer, itself
            included; None: all.
    """

    model_type: str = "gemma"
    vocab_size: int = 257216
    hidden_size: int = 2048
    intermediate_size: int = 16384
    num_hidden_layers: int = 18
    num_attention_heads: int = 8
    num_key_value_heads: int = 1
    head_dim: int = 256
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    query_pre_attn_scalar: int | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    sliding_window: int | None = None

    @property
    def cached_numbers(self) -> int:
        """How many numbers the keys and values of a position are, in all layers."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim

    def has_window(self, layer: int) -> bool:
        """Whether this layer's answers attend to the sliding window only: layers 0, 2, 4 ... do, if there is one."""
        return self.sliding_window is not None and layer % 2 == 0


# What the sections of a config.json leave out: the defaults of transformers' classes, which write only what differs.
LEFT_OUT_VISION = VisionConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=16
)
LEFT_OUT_TEXT = {
    "gemma": TextConfig(
        vocab_size=256000,
        hidden_size=3072,
        intermediate_size=24576,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
    ),
    "gemma2": TextConfig(
        model_type="gemma2",
        vocab_size=256000,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_key_value_heads=4,
        query_pre_attn_scalar=256,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        sliding_window=4096,
    ),
}


@dataclass(frozen=True)
class PaliGemmaConfig:
    """A whole checkpoint: vision encoder, decoder, and the ids of the tokens with a special meaning.

    tie_word_embeddings: whether the output layer is the token embedding again, as in the official checkpoints.
    """

    vision: VisionConfig
    text: TextConfig
    image_token_id: int = 257152
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_ids: tuple[int, ...] = (1,)
    tie_word_embeddings: bool = True

    @classmethod
    def from_file(cls, path: str | Path) -> PaliGemmaConfig:
        """Read a `config.json` in the official layout, and the end tokens of a `generation_config.json` beside it.

        Raises:
            PaliGemmaError: a file is missing, is not JSON, or describes a model that this package does not run.
        """
        path = Path(path)
        values = _read_json(path)
        with _named(path):
            config = cls.from_dict(values)
        generation = path.with_name("generation_config.json")
        if generation.exists():
            end = _read_json(generation).get("eos_token_id")
            with _named(generation):
                # Where both files name end tokens, transformers ends answers at those of this one.
                ids = _token_ids("eos_token_id", end, config.text.vocab_size)
            config = replace(config, eos_token_ids=ids or config.eos_token_ids)
        return config

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PaliGemmaConfig:
        """Build from a parsed `config.json`; what it leaves out has the value that transformers gives it.

        Raises:
            PaliGemmaError: it is damaged, or describes a model that this package does not run.
        """
        _require(values.get("model_type"), ("paligemma",), "model_type")
        text_values = _section(values, "text_config")
        text = _text_config(text_values)

        def given(name: str) -> list[object]:
            return [values.get(name), text_values.get(name)]

        # The placeholder is never embedded: in older checkpoints its id comes right after the last row.
        image_token_ids = [values.get("image_token_index"), values.get("image_token_id")]
        eos_token_ids = (_token_ids("eos_token_id", value, text.vocab_size) for value in given("eos_token_id"))
        config = cls(
            vision=_vision_config(_section(values, "vision_config")),
            text=text,
            image_token_id=_first_token_id("image_token_index", image_token_ids, text.vocab_size + 1, default=257152),
            pad_token_id=_first_token_id("pad_token_id", given("pad_token_id"), text.vocab_size, default=0),
            bos_token_id=_first_token_id("bos_token_id", given("bos_token_id"), text.vocab_size, default=2),
            eos_token_ids=next(filter(None, eos_token_ids), (1,)),
            tie_word_embeddings=values.get("tie_word_embeddings") is not False,
        )
        config._check_sizes()
        return config

    def to_dict(self) -> dict[str, Any]:
        """The official layout of `config.json`, which `from_dict` reads."""
        vision = {"model_type": "siglip_vision_model", "vision_use_head": False, **asdict(self.vision)}
        return {
            "architectures": ["PaliGemmaForConditionalGeneration"],
            "model_type": "paligemma",
            "vision_config": {**vision, "projection_dim": self.text.hidden_size},
            "text_config": {
                **asdict(self.text),
                "hidden_activation": GELU_TANH,
                "num_image_tokens": self.vision.num_patches,
            },
            "hidden_size": self.text.hidden_size,
            "projection_dim": self.text.hidden_size,
            "image_token_index": self.image_token_id,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids),
            "tie_word_embeddings": self.tie_word_embeddings,
        }

    def _check_sizes(self) -> None:
        for name, whole, part in (
            ("vision hidden_size / num_attention_heads", self.vision.hidden_size, self.vision.num_attention_heads),
            ("image_size / patch_size", self.vision.image_size, self.vision.patch_size),
            ("num_attention_heads / num_key_value_heads", self.text.num_attention_heads, self.text.num_key_value_heads),
            ("head_dim / 2 (rotary pairs)", self.text.head_dim, 2),
        ):
            if whole % part:
                raise PaliGemmaError(f"{name} must be whole, but is {whole} / {part}; the config.json is damaged.")
        context, patches = self.text.max_position_embeddings, self.vision.num_patches
        if context <= patches:
            raise PaliGemmaError(
                f"max_position_embeddings is {context}, but a picture alone takes {patches}; the config.json is damaged."
            )


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Puts the file's name before what is wrong with it."""
    try:
        yield
    except PaliGemmaError as error:
        raise PaliGemmaError(f"{path}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PaliGemmaError(
            f"{path} cannot be read ({error.strerror}): a checkpoint needs its config.json."
        ) from error
    except (ValueError, RecursionError) as error:
        raise PaliGemmaError(f"{path} is not a PaliGemma {path.name}: {error}.") from error
    if not isinstance(values, dict):
        raise PaliGemmaError(f"{path} is not a PaliGemma {path.name}: it is no dictionary.")
    return values


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name)
    if not isinstance(section, dict):
        raise PaliGemmaError(f"{name} is {section!r}, expected a dictionary; the config.json is damaged.")
    return section


def _vision_config(values: dict[str, Any]) -> VisionConfig:
    _require(values.get("model_type", "siglip_vision_model"), ("siglip_vision_model",), "vision_config.model_type")
    _require(values.get("num_channels") or 3, (3,), "vision_config.num_channels")
    activation = values.get("hidden_act") or GELU_TANH
    _require(activation, ACTIVATIONS, "vision_config.hidden_act")
    hidden_act = GELU if activation == GELU else GELU_TANH
    return replace(LEFT_OUT_VISION, hidden_act=hidden_act, **_numbers(LEFT_OUT_VISION, values))


def _text_config(values: dict[str, Any]) -> TextConfig:
    model_type = values.get("model_type", "gemma")
    _require(model_type, tuple(LEFT_OUT_TEXT), "text_config.model_type")
    for name in ("hidden_act", "hidden_activation"):
        is_exact = model_type == "gemma2" and name == "hidden_activation"  # the key that transformers reads there
        known = [activation for activation in ACTIVATIONS if not (is_exact and activation == GELU)]
        _require(values.get(name) or GELU_TANH, known, f"text_config.{name}")
    _require(bool(values.get("attention_bias")), (False,), "text_config.attention_bias")
    left_out = LEFT_OUT_TEXT[model_type]
    text = replace(left_out, **_numbers(left_out, {**values, "rope_theta": _rope_theta(values)}))
    # Elsewhere null stands for the default, but these it switches off.
    switches = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")
    switched_off: dict[str, Any] = {name: None for name in switches if values.get(name, 0) is None}
    text = replace(text, **switched_off)
    kinds = [
        "sliding_attention" if text.has_window(layer) else "full_attention" for layer in range(text.num_hidden_layers)
    ]
    if text.sliding_window is not None and values.get("layer_types") not in (None, kinds):
        raise PaliGemmaError(
            "text_config.layer_types has its sliding windows elsewhere than in layers 0, 2, 4 ..., where this package "
            "runs them; pick another checkpoint."
        )
    return text


def _rope_theta(values: dict[str, Any]) -> object:
    """The base of the rotary positions: transformers 5 keeps it in a dictionary, which goes before the older key."""
    bases = [values.get("rope_theta")]
    for name in ("rope_parameters", "rope_scaling"):
        if values.get(name) is not None:
            rope = _section(values, name)
            _require(rope.get("rope_type", rope.get("type", "default")), ("default",), f"text_config.{name}.rope_type")
            bases.insert(0, rope.get("rope_theta"))
    return next((base for base in bases if base is not None), None)


def _numbers(defaults: VisionConfig | TextConfig, values: dict[str, Any]) -> dict[str, Any]:
    """The sizes among `values`: what the dataclass holds, but for names."""
    numbers = {}
    for name, default in asdict(defaults).items():
        value = values.get(name)
        if value is None or default is None or isinstance(default, str):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, type(default))) or not 0 < value < MAX_NUMBER:
            raise PaliGemmaError(
                f"{name} is {value!r}, expected a number above zero and below {MAX_NUMBER}; the config.json is damaged."
            )
        numbers[name] = value
    return numbers


def _token_ids(name: str, value: object, end: int) -> tuple[int, ...]:
    """A token's id below `end`, or a list of them; none at all where there is none, for which -1 stands too."""
    ids = []
    for one in value if isinstance(value, list) else [value]:
        if one is None or one == -1:
            continue
        if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < end:
            raise PaliGemmaError(
                f"{name} is {one!r}, expected a whole number below {end}, the vocab_size; the file is damaged."
            )
        ids.append(one)
    return tuple(ids)


def _first_token_id(name: str, values: Iterable[object], end: int, default: int) -> int:
    """The first of `values` that is an id, see `_token_ids`."""
    for value in values:
        if isinstance(value, list):
            raise PaliGemmaError(f"{name} is {value}, expected one whole number; the config.json is damaged.")
        if ids := _token_ids(name, value, end):
            return ids[0]
    return default


def _require(value: object, allowed: Sequence[object], name: str) -> None:
    if value not in allowed:
        expected = " or ".join(map(repr, allowed))
        raise PaliGemmaError(f"{name} is {value!r}, but this package runs only {expected}; pick another checkpoint.")
