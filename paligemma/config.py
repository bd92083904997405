"""What a checkpoint says about itself, read from its `config.json`, and the one error that callers can act on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

# Two names of one function, the tanh approximation of GELU; older official configs say plain "gelu" and mean it too.
GELU_TANH_NAMES = {"gelu_pytorch_tanh", "gelu_fast", "gelu"}


class PaliGemmaError(Exception):
    """Something that the caller can mend; its message is one sentence that says what to do."""


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
    layer_norm_eps: float = 1e-6

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the Gemma decoder. The defaults are those of Gemma 2B as PaliGemma uses it."""

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
        """Read a `config.json` in the official layout.

        Raises:
            PaliGemmaError: the file is missing, is not JSON, or describes a model that this package does not run.
        """
        path = Path(path)
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise PaliGemmaError(
                f"{path} cannot be read ({error.strerror}): a checkpoint needs its config.json."
            ) from error
        except (ValueError, TypeError, AttributeError) as error:
            raise PaliGemmaError(f"{path} is not a PaliGemma config.json: {error}.") from error
        except PaliGemmaError as error:
            raise PaliGemmaError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, values: dict) -> PaliGemmaConfig:
        """Build from the parsed `config.json`; what it leaves out has the official default."""
        vision, text = values.get("vision_config") or {}, values.get("text_config") or {}
        _require(values.get("model_type"), {"paligemma"}, "model_type")
        _require(text.get("model_type", "gemma"), {"gemma"}, "text_config.model_type")
        _require(vision.get("model_type", "siglip_vision_model"), {"siglip_vision_model"}, "vision_config.model_type")
        _require(vision.get("hidden_act", "gelu_pytorch_tanh"), GELU_TANH_NAMES, "vision_config.hidden_act")
        activation = text.get("hidden_activation") or text.get("hidden_act") or "gelu_pytorch_tanh"
        _require(activation, GELU_TANH_NAMES, "text_config.hidden_act")
        _require(bool(text.get("attention_bias")), {False}, "text_config.attention_bias")

        # transformers 5 moved the rotary base into a dictionary of its own.
        rope = text.get("rope_parameters") or {}
        _require(rope.get("rope_type", "default"), {"default"}, "text_config.rope_parameters.rope_type")
        text = {"rope_theta": rope.get("rope_theta", 10000.0), **text}

        eos = values.get("eos_token_id") or text.get("eos_token_id") or 1
        config = cls(
            vision=VisionConfig(**_known_fields(VisionConfig, vision)),
            text=TextConfig(**_known_fields(TextConfig, text)),
            image_token_id=values.get("image_token_index", values.get("image_token_id", 257152)),
            pad_token_id=_first_given(values.get("pad_token_id"), text.get("pad_token_id"), 0),
            bos_token_id=_first_given(values.get("bos_token_id"), text.get("bos_token_id"), 2),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else (eos,),
            tie_word_embeddings=values.get("tie_word_embeddings") is not False,
        )
        config._check_sizes()
        return config

    def to_dict(self) -> dict:
        """The official layout of `config.json`, which `from_dict` reads."""
        text = {"model_type": "gemma", "hidden_activation": "gelu_pytorch_tanh", **asdict(self.text)}
        vision = {"model_type": "siglip_vision_model", "vision_use_head": False, **asdict(self.vision)}
        return {
            "architectures": ["PaliGemmaForConditionalGeneration"],
            "model_type": "paligemma",
            "vision_config": {**vision, "projection_dim": self.text.hidden_size},
            "text_config": {**text, "num_image_tokens": self.vision.num_patches},
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


def _known_fields(cls: type, values: dict) -> dict:
    known = {name: values[name] for name in cls.__dataclass_fields__ if values.get(name) is not None}
    for name, value in known.items():
        kind = type(cls.__dataclass_fields__[name].default)
        if kind in (int, float) and not (isinstance(value, (int, kind)) and value > 0):
            raise PaliGemmaError(f"{name} is {value!r}, expected a number above zero; the config.json is damaged.")
    return known


def _first_given(*values: int | None) -> int:
    return next(value for value in values if value is not None)


def _require(value: object, allowed: set, name: str) -> None:
    if value not in allowed:
        expected = " or ".join(repr(choice) for choice in sorted(allowed))
        raise PaliGemmaError(f"{name} is {value!r}, but this package runs only {expected}; pick another checkpoint.")
