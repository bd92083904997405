"""LoRA adapters (arXiv 2106.09685) in peft's files: read and merged into a model's weights, and written.

An adapter is a folder with `adapter_config.json` and `adapter_model.safetensors`. The stored tensors tell which modules
it changes, and by which rank; the config has the scaling.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save_file
from torch import Tensor

from ..config import PaliGemmaConfig, PaliGemmaError, is_number
from .formats import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from .weights import COMPUTED_SUFFIXES, EMBEDDING, OUTPUT, LowRankUpdate, Place, Tensors, canonical_name, open_file

EMBEDDED = "embedded"  # the embedded checkpoint, as an adapter's config names it
PREFIX = "base_model.model."  # before the names of the model's modules
MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?")
# Parts of keys that only say how peft holds a parameter of the model itself, which is trained whole.
WRAPPERS = re.compile(r"\.(base_layer|original_module|modules_to_save(\.default)?)(?=\.)")
# Settings under which a model with an adapter computes something else than the sum of its weights and scaling * B @ A.
VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "repeated layers",
    "lora_bias": "LoRA with biases of its own (lora_bias)",
    "trainable_token_indices": "single trained tokens (trainable_token_indices)",
    "target_parameters": "adapted parameters of unusual modules (target_parameters)",
    "ensure_weight_tying": "an adapted output layer that is the token embedding (ensure_weight_tying)",
}
# Ways to begin a training that leave the model's own weights as they are; the others change them.
INITIALIZATIONS = ("gaussian", "eva", "orthogonal")
VARIANT_TENSORS = {"lora_magnitude_vector": "DoRA", "trainable_tokens": VARIANTS["trainable_token_indices"]}
MERGE = "please merge it into its model with peft's merge_and_unload, and load the folder that save_pretrained writes"

T = TypeVar("T")


@dataclass(frozen=True)
class LoraConfig:
    """Which modules an adapter changes, and how much: what `adapter_config.json` says of it.

    target_modules: the ends of their names, or a regular expression of whole ones.
    rank_pattern, alpha_pattern: by regular expressions of the ends of names, what differs from `r` and `lora_alpha`.
    """

    base_model_name_or_path: str | None
    r: int
    lora_alpha: float
    target_modules: str | list[str]
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    revision: str | None = None

    @classmethod
    def from_file(cls, path: Path) -> LoraConfig:
        """Read an `adapter_config.json`.

        Raises:
            PaliGemmaError: it is damaged, or of an adapter that cannot be merged here.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise PaliGemmaError(f"{path} cannot be read ({error}); please fetch the adapter again.") from error
        if not isinstance(values, dict):
            raise PaliGemmaError(f"{path} is no dictionary; please fetch the adapter again.")
        if variant := _variant(values):
            raise PaliGemmaError(f"{path} describes {variant}, which cannot be merged here; {MERGE}.")
        alpha_pattern = _dictionary(values.get("alpha_pattern"))
        alphas = {"lora_alpha": values.get("lora_alpha", 8), **alpha_pattern}
        for name, alpha in alphas.items():
            if not is_number(alpha):
                raise PaliGemmaError(f"{path}: {name} is {alpha!r}, expected a number; please fetch the adapter again.")
        return cls(
            base_model_name_or_path=values.get("base_model_name_or_path") or None,
            r=values.get("r", 8),
            lora_alpha=alphas["lora_alpha"],
            target_modules=values.get("target_modules") or [],
            use_rslora=bool(values.get("use_rslora")),
            rank_pattern=_dictionary(values.get("rank_pattern")),
            alpha_pattern=alpha_pattern,
            modules_to_save=values.get("modules_to_save"),
            revision=values.get("revision"),
        )

    def rank(self, module: str) -> int:
        """The rank for a module of this name."""
        return _of_pattern(self.rank_pattern, module, self.r)

    def scaling(self, module: str, rank: int) -> float:
        """What B @ A is multiplied by: alpha / rank, or with rsLoRA (arXiv 2312.03732) alpha / sqrt(rank)."""
        alpha = _of_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def to_dict(self) -> dict[str, Any]:
        """The content of `adapter_config.json`."""
        return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none", **vars(self)}


class Adapter:
    """An adapter that is about to be merged into a model.

    Args:
        folder: with peft's two files.

    Raises:
        PaliGemmaError: a file is missing or damaged, or it is an adapter of another kind than LoRA.
    """

    def __init__(self, folder: Path):
        self.file = folder / ADAPTER_FILE
        for name in (ADAPTER_CONFIG_FILE, ADAPTER_FILE):
            if not (folder / name).exists():
                raise PaliGemmaError(f"{folder} has no {name}; please give the folder or Hub id of a LoRA adapter.")
        self.config = LoraConfig.from_file(folder / ADAPTER_CONFIG_FILE)

    @property
    def base(self) -> str | None:
        """The model that it was trained on, as `load` takes it."""
        name, revision = self.config.base_model_name_or_path, self.config.revision
        if name is None:
            raise PaliGemmaError(
                f"{self.file.parent / ADAPTER_CONFIG_FILE} names no model; please give the model, and this as the adapter."
            )
        if name == EMBEDDED:
            return None
        return f"{name}@{revision}" if revision and "@" not in name else name

    def apply(self, config: PaliGemmaConfig, tensors: Tensors) -> tuple[PaliGemmaConfig, Tensors]:
        """A model's tensors with what the adapter changes of them.

        As in peft, an adapter for the token embedding changes what tokens are embedded as, and one for the output layer
        the logits, each without the other: where they were the same, they are two from then on.

        Raises:
            PaliGemmaError: it changes what the model does not have, or has in another shape.
        """
        updates, whole, own = self._read()
        if config.tie_word_embeddings and {EMBEDDING, OUTPUT} & {*updates, *whole}:
            tensors = {OUTPUT: tensors[EMBEDDING], **tensors}
            config = replace(config, tie_word_embeddings=False)
        for name in (*updates, *whole):
            if name not in tensors:
                raise PaliGemmaError(
                    f"{self.file} changes {name}, which the model does not have; please give the model that it was "
                    f"trained on, {self.config.base_model_name_or_path}."
                )
        shapes = _shapes({name: tensors[name] for name in own})
        for name, shape in own.items():
            if shape != shapes[name]:
                raise PaliGemmaError(
                    f"{self.file} changes {name} in the shape {shape}, but the model has {shapes[name]}; please give the "
                    f"model that it was trained on, {self.config.base_model_name_or_path}."
                )
        merged = tensors | whole
        return config, merged | {name: merged[name]._replace(update=update) for name, update in updates.items()}

    def _read(self) -> tuple[dict[str, LowRankUpdate], Tensors, dict[str, list[int]]]:
        """By the names of the model's parameters, what is added to some, where others are that are trained whole; all shapes."""
        sides: dict[str, dict[str, str]] = {}
        modules: dict[str, tuple[str, bool]] = {}
        whole: Tensors = {}
        with open_file(self.file) as mapped:
            for key in mapped.keys():
                if variant := next((name for part, name in VARIANT_TENSORS.items() if part in key), None):
                    raise PaliGemmaError(f"{self.file} holds {variant}, which cannot be merged here; {MERGE}.")
                inner = key.removeprefix(PREFIX)
                if found := MATRIX.fullmatch(inner):
                    name = canonical_name(f"{found['module']}.weight")
                    modules[name] = found["module"], bool(found["embedding"])
                    sides.setdefault(name, {})[found["side"]] = key
                elif not key.endswith(COMPUTED_SUFFIXES):
                    whole[canonical_name(WRAPPERS.sub("", inner))] = Place(self.file, key)
            updates, shapes = {}, {name: mapped.get_slice(place.key).get_shape() for name, place in whole.items()}
            for name, pair in sides.items():
                if pair.keys() != {"A", "B"}:
                    raise PaliGemmaError(
                        f"{self.file} has one of the two matrices of {name} only; please fetch it again."
                    )
                module, is_embedding = modules[name]
                down, up = (mapped.get_slice(pair[side]).get_shape() for side in "AB")
                if min(len(down), len(up)) < 2 or down[0] != up[1] or not down[0]:
                    raise PaliGemmaError(
                        f"{self.file} has matrices of the shapes {down} and {up} for {name}, which are none of LoRA; please "
                        "fetch it again."
                    )
                updates[name] = LowRankUpdate(
                    self.file, pair["A"], pair["B"], self.config.scaling(module, down[0]), is_embedding
                )
                shapes[name] = [*down[1:], up[0]] if is_embedding else [up[0], *down[1:]]
        if not updates and not whole:
            raise PaliGemmaError(f"{self.file} holds no tensors; please fetch the adapter again.")
        return updates, whole, shapes


def save_adapter(config: LoraConfig, matrices: Mapping[str, tuple[Tensor, Tensor]], folder: str | Path) -> None:
    """Write an adapter as peft does.

    Args:
        config: as it is to be stored.
        matrices: A, float [rank, in], and B, float [out, rank], by the names of modules in `PaliGemma`.
        folder: made if it is not there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
    # The names of transformers 5; peft reads them into older ones as well.
    tensors = {
        f"{PREFIX}model.{module}.lora_{side}.weight": matrix.detach().contiguous()
        for module, pair in matrices.items()
        for side, matrix in zip("AB", pair)
    }
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})


def _variant(values: Mapping[str, Any]) -> str | None:
    """What an adapter is whose weights cannot simply be added, by its config; None for one of plain LoRA."""
    kind = values.get("peft_type", "LORA")
    if kind != "LORA":
        return f"an adapter of the kind {kind}"
    if found := next((name for setting, name in VARIANTS.items() if values.get(setting)), None):
        return found
    beginning = values.get("init_lora_weights")
    if isinstance(beginning, str) and beginning not in INITIALIZATIONS:
        return f"LoRA that changes the model's own weights ({beginning})"
    return None


def _dictionary(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def _of_pattern(patterns: Mapping[str, T], module: str, default: T) -> T:
    """The value of the first pattern that a module's name ends with, as peft looks it up."""
    found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(found, default)


def _shapes(tensors: Tensors) -> dict[str, list[int]]:
    """Of stored tensors, by the names of the parameters."""
    shapes: dict[str, list[int]] = {}
    for file in {place.file for place in tensors.values()}:
        with open_file(file) as mapped:
            inside = {name: place.key for name, place in tensors.items() if place.file == file}
            shapes |= {name: list(mapped.get_slice(key).get_shape()) for name, key in inside.items()}
    return shapes
