"""Where weights come from: the embedded checkpoint, a folder, the Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .config import PaliGemmaConfig, PaliGemmaError
from .generation import VisionLanguageModel, explained_lack_of_memory
from .model import PaliGemma
from .processor import Processor

EMBEDDED_FOLDER = Path(__file__).parent / "tiny"
INDEX_FILE = "model.safetensors.index.json"
HUB_FILES = ["config.json", "tokenizer.json", INDEX_FILE, "model.safetensors", "model-*-of-*.safetensors"]
# How safetensors names what torch calls otherwise.
STORED_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

EMBEDDING = "language_model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
# Older files carry these tables, which the model computes for itself.
COMPUTED_SUFFIXES = (".position_ids", ".rotary_emb.inv_freq")


def load(
    source: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
) -> VisionLanguageModel:
    """Load a checkpoint and all that it takes to use it.

    Args:
        source: None for the embedded checkpoint, a folder, or a Hub id such as `google/paligemma-3b-mix-224`, which a
            revision may follow: `google/paligemma-3b-mix-224@bfloat16`.
        device: where to run; None takes a GPU if there is one.
        dtype: `float32`, `bfloat16` or `float16`; None takes bfloat16 on CUDA and float32 elsewhere.
        revision: branch, tag or commit on the Hub.

    Raises:
        PaliGemmaError: the checkpoint cannot be found, reached, read or run; the sentence says what to do.
    """
    device = choose_device(device)
    dtype = choose_dtype(dtype, device)
    folder = find_folder(source, revision)
    config = PaliGemmaConfig.from_file(folder / "config.json")
    processor = Processor.from_file(config, folder / "tokenizer.json")
    with torch.device("meta"), WithoutInitialisation():
        model = PaliGemma(config)
    with explained_lack_of_memory(device):
        load_weights(model, weight_files(folder), dtype, device)
    return VisionLanguageModel(model, processor)


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device that was asked for if it is here, the best one if none was."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise PaliGemmaError(f"The device {device} cannot be used here ({reason}); please choose cpu.") from error
    return device


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype that was asked for; bfloat16 on CUDA and float32 elsewhere if none was."""
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = DTYPES.get(dtype, dtype)
    if dtype not in DTYPES.values():
        raise PaliGemmaError(f"The dtype {dtype} is not known; please choose one of {', '.join(DTYPES)}.")
    return dtype


def find_folder(source: str | os.PathLike | None, revision: str | None = None) -> Path:
    """The folder that holds a checkpoint's files, fetched from the Hub if need be."""
    if source is None:
        return EMBEDDED_FOLDER
    folder = Path(os.path.expanduser(source))
    if folder.is_dir():
        return folder
    source = str(source)
    repository, _, revision_in_source = source.partition("@")
    if folder.is_absolute() or source.startswith((".", "~")) or repository.count("/") != 1:
        raise PaliGemmaError(f"There is no folder {source}; please give a folder or a Hub id such as owner/name.")
    return download(repository, revision or revision_in_source or None)


def download(repository: str, revision: str | None) -> Path:
    """Fetch what a checkpoint needs from the Hub, with progress bars, unless it is in the cache already."""
    from huggingface_hub import errors, get_token, snapshot_download

    page = f"https://huggingface.co/{repository}"
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=HUB_FILES))
    except errors.GatedRepoError as error:
        if get_token() is None:
            advice = f"accept its licence at {page} and set HF_TOKEN to a token of your account"
        else:
            advice = f"accept its licence at {page} with the account that your HF_TOKEN belongs to"
        raise PaliGemmaError(f"{repository} is a gated repository; please {advice}.") from error
    except errors.RevisionNotFoundError as error:
        raise PaliGemmaError(f"{repository} has no revision {revision}; please check {page}/tree/main.") from error
    except errors.RepositoryNotFoundError as error:
        if get_token() is None:
            advice = "check the name, and if it is a private one, set HF_TOKEN to a token that may read it"
        else:
            advice = "check the name, and that your HF_TOKEN may read it"
        raise PaliGemmaError(f"The Hub knows no repository {repository}; please {advice}.") from error
    except errors.HFValidationError as error:
        raise PaliGemmaError(f"{repository} is no Hub id; please give one of the form owner/name.") from error
    except errors.LocalEntryNotFoundError as error:
        # Raised too when the Hub did answer, but with an error, and the cache could not stand in for it.
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise _bad_answer(repository, error.__cause__.response.status_code) from error
        raise PaliGemmaError(
            f"{repository} is not in the local cache and the Hub cannot be reached; please check the network."
        ) from error
    except errors.HfHubHTTPError as error:
        raise _bad_answer(repository, error.response.status_code) from error
    except (errors.HTTPError, OSError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise PaliGemmaError(f"{repository} could not be downloaded ({reason}); please try again.") from error


def _bad_answer(repository: str, status: int) -> PaliGemmaError:
    if status == 401:
        return PaliGemmaError("The Hub does not accept your HF_TOKEN; please make a new one.")
    if status == 403:
        return PaliGemmaError(
            f"The Hub forbids reading {repository}; please set HF_TOKEN to a token that may read gated repositories."
        )
    return PaliGemmaError(f"The Hub answered {status} for {repository}; please try again later.")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the shards that its index lists, or the single one."""
    index = folder / INDEX_FILE
    if not index.exists():
        files = [folder / "model.safetensors"]
    else:
        try:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files = [folder / name for name in sorted(set(shards))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PaliGemmaError(f"{index} is not an index of shards; please fetch the checkpoint again.") from error
        if not files:
            raise PaliGemmaError(f"{index} lists no shards; please fetch the checkpoint again.")
    for file in files:
        if not file.exists():
            raise PaliGemmaError(f"{file} is missing; please fetch the checkpoint again.")
    return files


def load_weights(model: PaliGemma, files: list[Path], dtype: torch.dtype, device: torch.device) -> None:
    """Put the tensors of `files` into `model`, which was built on `meta`.

    On a CPU, tensors that already have the right dtype stay where they are: they are views of the mapped file. Others
    are cast or moved one by one, each through a mapping of its own, so that what has been read does not stay resident.

    Raises:
        PaliGemmaError: a tensor is missing, unexpected or of another shape, or a file is damaged.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    expected[OUTPUT] = expected[EMBEDDING]
    loaded: dict[str, Tensor] = {}
    for file in files:
        with _open(file) as mapped:
            for key in mapped.keys():
                name, stored = canonical_name(key), mapped.get_slice(key)
                shape = tuple(stored.get_shape())
                if name.endswith(COMPUTED_SUFFIXES):
                    continue
                if name not in expected:
                    raise PaliGemmaError(f"{file} holds an unexpected tensor, {key}; is this another kind of model?")
                if shape != expected[name]:
                    raise PaliGemmaError(f"{file}: {key} has the shape {list(shape)}, expected {list(expected[name])}.")
                if device.type == "cpu" and stored.get_dtype() == STORED_DTYPES[dtype]:
                    loaded[name] = mapped.get_tensor(key)
                else:
                    with _open(file) as passing:
                        loaded[name] = passing.get_tensor(key).to(device=device, dtype=dtype)

    # The output layer is the embedding again; files may hold it under either name, or under both.
    output = loaded.pop(OUTPUT, None)
    if output is not None and not torch.equal(loaded.setdefault(EMBEDDING, output), output):
        raise PaliGemmaError(f"{files[0].parent}: {OUTPUT} differs from {EMBEDDING}, expected them to be tied.")
    missing = [name for name in expected if name not in loaded and name != OUTPUT]
    if missing:
        raise PaliGemmaError(
            f"{files[0].parent} lacks {len(missing)} tensors, the first is {official_name(missing[0])} of shape "
            f"{list(expected[missing[0]])}; please fetch the checkpoint again."
        )
    for name, tensor in loaded.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=False))
    model.language_model.rotary.to(device)


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise PaliGemmaError(
            f"{file} is truncated or damaged ({error}), expected a whole safetensors file; please fetch it again."
        ) from error


class WithoutInitialisation(TorchFunctionMode):
    """Builds modules without drawing weights that are about to be replaced; drawing on `meta` alone takes seconds."""

    def __torch_function__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def canonical_name(key: str) -> str:
    """The name in `PaliGemma` of a key of any of the layouts in use.

    `model.language_model.norm.weight` and `language_model.model.norm.weight` are both `language_model.norm.weight`;
    `vision_tower.vision_model.*`, with or without `model.` before it, is `vision_tower.*`.
    """
    key = key.removeprefix("model.")
    if key in ("lm_head.weight", "language_model.lm_head.weight"):
        return OUTPUT
    for outer in ("language_model.model.", "vision_tower.vision_model."):
        if key.startswith(outer):
            return outer.split(".")[0] + "." + key.removeprefix(outer)
    return key


def official_name(name: str) -> str:
    """The key under which the official checkpoints keep a parameter of `PaliGemma`."""
    name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name.replace("language_model.", "language_model.model.", 1)


def save_checkpoint(model: PaliGemma, tokenizer: Tokenizer, folder: str | Path, dtype: torch.dtype) -> None:
    """Write `config.json`, `tokenizer.json` and `model.safetensors` in the official layout, weights as `dtype`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    weights = {official_name(name): value.detach().to(dtype) for name, value in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
