"""What a run has made, for others: its card, and its repository on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..checkpoints.adapters import EMBEDDED, LoraConfig
from ..config import PaliGemmaError

CARD_FILE = "README.md"
# Of a run's folder: not its saves, which are for going on.
PUBLISHED = ("*.safetensors", "*.json", "*.csv", "*.svg", "tokenizer.model", "vae-oid.npz", CARD_FILE)
PRIVATE = ("options.json",)  # has paths of this machine


def write_card(
    folder: Path,
    base: str | None,
    data: str,
    rows: tuple[int, int],
    figures: Mapping[str, Mapping[str, float]],
    config: LoraConfig | None,
) -> None:
    """Write the README.md of a model repository.

    Args:
        folder: of the run.
        base: the checkpoint that was fine-tuned, None for the embedded one.
        data: the name of the file of examples.
        rows: how many of them were learned from, and held back.
        figures: by name, `before` and `after`.
        config: of the adapter; None for a whole checkpoint.
    """
    name, _, revision = (base or EMBEDDED).partition("@")
    is_on_hub = name.count("/") == 1 and not Path(name).exists()
    shown = f"[{name}](https://huggingface.co/{name})" if is_on_hub else f"`{Path(name).name}`"
    kind = "A whole checkpoint" if config is None else f"A LoRA adapter of rank {config.r}"
    is_alone = config is None or base is None or is_on_hub
    opened = "--model OWNER/NAME" if is_alone else f"--model {Path(name).name} --adapter OWNER/NAME"
    header = [
        *([f"base_model: {name}"] if is_on_hub else []),
        f"library_name: {'transformers' if config is None else 'peft'}",
        "pipeline_tag: image-text-to-text",
        f"tags: [paligemma{'' if config is None else ', lora'}]",
    ]
    table = [f"| {key} | {value:.3f} | {figures['after'][key]:.3f} |" for key, value in figures["before"].items()]
    lines = [
        "---",
        *header,
        "---",
        "",
        f"# {folder.resolve().name}",
        "",
        f"{kind}, fine-tuned from {shown}{f' (revision {revision})' if revision else ''} on {rows[0]} rows of `{data}`. On "
        f"{rows[1]} rows that were held back:",
        "",
        "| | before | after |",
        "| --- | ---: | ---: |",
        *table,
        "",
        "![The loss over the steps](finetune.svg)",
        "",
        f"`python app.py {opened}` opens it in the PaliGemma demo.",
        "",
    ]
    (folder / CARD_FILE).write_text("\n".join(lines), encoding="utf-8")


def push(repository: str, folder: Path) -> str:
    """Upload what a run has made to a model repository of the Hub, which is made if there is none.

    Returns:
        the address of its page.

    Raises:
        PaliGemmaError: the Hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi, errors, get_token

    try:
        api = HfApi()
        page = api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=list(PUBLISHED), ignore_patterns=list(PRIVATE)
        )
        return str(page)
    except (errors.HfHubHTTPError, errors.HTTPError, errors.HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        advice = "check the name and the network" if get_token() else "set HF_TOKEN to a token that may write"
        raise PaliGemmaError(f"{repository} could not be pushed ({reason}); please {advice}.") from error
