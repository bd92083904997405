"""Fine-tune a checkpoint on your own images: `python -m paligemma.training.finetune --data train.jsonl --output FOLDER`.

Writes a LoRA adapter in peft's files, or with `--full` a whole checkpoint, with a log, a plot, and how well rows that were
held back are answered before and after. The same command goes on from the last save of an interrupted run.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import paligemma

from ..checkpoints import save_checkpoint
from ..checkpoints.adapters import EMBEDDED, LoraConfig, save_adapter
from ..checkpoints.load import find_folder, holds_adapter
from ..config import PaliGemmaError
from ..generation import VisionLanguageModel
from ..hardware import LARGE, choose_device, explained_lack_of_memory
from ..mask_decoder import FILE_NAMES as MASK_DECODER_FILES
from ..model import PaliGemma
from .data import Batch, Example, ExampleSteps, batches, hold_back, read_examples
from .evaluate import answer_figures
from .loop import SAVE_EVERY, Log, Run, checkpoint_gradients
from .lora import PARTS, add_lora, lora_matrices, target_modules
from .losses import NO_LABEL, answer_loss
from .plot import draw_curves
from .publish import push, write_card

NAME = "finetune"  # of the log, the save and the plot
OPTIONS_FILE, FIGURES_FILE, HELD_BACK_FILE = "options.json", "figures.json", "held_back.csv"
LORA_RATE, FULL_RATE = 2e-4, 2e-5
ALPHA = 2  # times the rank
EVALUATIONS = 5  # of the loss of what is held back, over a run
MODULES = {
    "encoder": ("vision_tower",),
    "projector": ("multi_modal_projector",),
    "decoder": ("language_model", "lm_head"),
}
# Beside a checkpoint's weights, what other programs want as well.
COMPANIONS = (
    *MASK_DECODER_FILES,
    *("generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
)


class Rounded(nn.Module):
    """What a layer sees of a float32 parameter: its value in the dtype of the model."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, master: Tensor) -> Tensor:
        return master.to(self.dtype)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        finetune(options)
        if options.push:
            print(f"Pushed to {push(options.push, options.output)}")
    except PaliGemmaError as error:
        raise SystemExit(str(error)) from error


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", metavar="SOURCE", help="a folder or a Hub id[@revision] (default: the embedded checkpoint)")
    add("--data", type=Path, required=True, help="a JSON object a line: image (a path or several), prefix, suffix")
    add("--output", type=Path, required=True, help="folder for the adapter or checkpoint, the log and the saves")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--lora", type=_positive, metavar="RANK", default=8, help="learn an adapter (default: rank 8)")
    kind.add_argument("--full", action="store_true", help="learn the weights themselves")
    add("--freeze", nargs="*", choices=list(PARTS), default=["encoder"], help="parts that stay as they are")
    add(
        "--held-back",
        type=_share_or_file,
        default="0.1",
        help="a share of the rows, or another such file, to measure on (default: 0.1)",
    )
    add("--epochs", type=_positive, default=3, help="how often each row is seen (default: 3)")
    add("--batch-size", type=_positive, default=8, help="rows a step learns from (default: 8)")
    add("--rows-at-once", type=_positive, help="of them, what goes through the model at once (default: all)")
    add("--checkpoint-every", type=_positive, metavar="LAYERS", help="keep only the input of one layer in so many")
    add("--learning-rate", type=float, help=f"after warm-up (default: {LORA_RATE}, with --full {FULL_RATE})")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of what is not trained")
    add("--device", help="cpu, cuda or mps (default: a GPU if there is one)")
    add("--seed", type=int, default=0)
    add("--push", metavar="OWNER/NAME", help="upload the result to the Hub")
    options = parser.parse_args(arguments)
    if set(options.freeze) == set(PARTS):
        parser.error("--freeze leaves nothing to train; please name fewer parts")
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above zero")
    return int(text)


def _share_or_file(text: str) -> float | Path:
    try:
        return float(text)
    except ValueError:
        return Path(text)


def finetune(options: argparse.Namespace) -> None:
    """Train, and write to `options.output`; the options are those of the command line."""
    _check_options(options)
    base = find_folder(options.model)
    if holds_adapter(base) and not options.full:
        raise PaliGemmaError(f"{options.model} is an adapter; please give the model that it was made for, or --full.")
    vlm = load_to_train(options)
    train, held_back = split_examples(options, vlm)
    config = prepare(vlm.model, options)
    steps = max(1, options.epochs * len(train) // options.batch_size)
    rate = options.learning_rate or (FULL_RATE if options.full else LORA_RATE)
    run = Run(NAME, vlm.model, options.output, steps, rate, min(SAVE_EVERY, max(1, steps // EVALUATIONS)))
    log = Log(options.output / HELD_BACK_FILE)
    log.forget_after(run.step if run.step else -1)
    rows_at_once = min(options.rows_at_once or options.batch_size, options.batch_size)
    print(f"{len(train)} rows to learn from, {len(held_back)} held back; {trained(vlm.model):,} numbers are trained.")

    def measure() -> None:
        log.append({"step": run.step, "loss": round(mean_loss(vlm, held_back, rows_at_once), 4)})

    figures_file = options.output / FIGURES_FILE
    with explained_lack_of_memory(vlm.device):
        if run.step == 0:
            figures_file.write_text(json.dumps({"before": evaluate(vlm, held_back, rows_at_once)}))
            measure()
        data = ExampleSteps(vlm.processor, train, options.batch_size, rows_at_once, options.seed)
        run.train(data, partial(losses, vlm.model), before_save=measure)
        figures = json.loads(figures_file.read_text())
        figures["after"] = evaluate(vlm, held_back, rows_at_once)
    figures_file.write_text(json.dumps(figures, indent=2) + "\n")
    write_result(vlm, config, options, base)
    curves = {"training": run.log.rows(), "held back": log.rows()}
    draw_curves(curves, "loss", options.output / f"{NAME}.svg")
    write_card(options.output, options.model, options.data.name, (len(train), len(held_back)), figures, config)
    for name, before in figures["before"].items():
        print(f"{name}: {before:.3f} before, {figures['after'][name]:.3f} after")


def load_to_train(options: argparse.Namespace) -> VisionLanguageModel:
    """The checkpoint with floating-point weights: bfloat16 where it is large or on a GPU, unless another dtype is asked for."""
    device = choose_device(options.device)
    dtype = options.dtype
    if dtype == "auto":
        vlm = paligemma.load(options.model, device=device, dtype="bfloat16")
        if device.type != "cpu" or sum(one.numel() for one in vlm.model.parameters()) >= LARGE:
            return vlm
        dtype = "float32"
    return paligemma.load(options.model, device=device, dtype=dtype)


def split_examples(options: argparse.Namespace, vlm: VisionLanguageModel) -> tuple[list[Example], list[Example]]:
    """The rows to learn from, and those to measure on: of another file, or a share that the seed chooses."""
    examples = read_examples(options.data, vlm.processor)
    if isinstance(options.held_back, Path):
        return examples, read_examples(options.held_back, vlm.processor)
    return hold_back(examples, options.held_back, options.seed)


def _check_options(options: argparse.Namespace) -> None:
    """Note the options in the output folder; raise PaliGemmaError if a run with others has a save there."""
    file = options.output / OPTIONS_FILE
    values = {name: str(value) for name, value in vars(options).items() if name not in ("push", "device", "output")}
    has_save = (options.output / f"{NAME}.pt").exists() and file.exists()
    if has_save and (before := json.loads(file.read_text())) != values:
        name = next(name for name in values if before.get(name) != values[name])
        raise PaliGemmaError(
            f"{options.output} has a run with --{name.replace('_', '-')} {before.get(name)}, and this one has {values[name]}; "
            "please choose another folder, or remove it."
        )
    options.output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=2) + "\n")


def prepare(model: PaliGemma, options: argparse.Namespace) -> LoraConfig | None:
    """Say what is trained: an adapter, whose config is returned, or the parameters of all parts that are not frozen.

    What is trained is float32, whatever the dtype of the model.
    """
    parts = [part for part in PARTS if part not in options.freeze]
    config = None
    model.requires_grad_(False)
    torch.manual_seed(options.seed)
    if options.full:
        train_parameters(model, parts)
    else:
        base, _, revision = (options.model or EMBEDDED).partition("@")
        base = str(Path(base).resolve()) if Path(base).exists() else base
        config = LoraConfig(base, options.lora, ALPHA * options.lora, target_modules(parts), revision=revision or None)
        add_lora(model, config)
    if options.checkpoint_every:
        for layers in (model.vision_tower.encoder["layers"].children(), model.language_model.layers):
            checkpoint_gradients(layers, options.checkpoint_every)
    return config


def train_parameters(model: PaliGemma, parts: Sequence[str]) -> None:
    """Let all parameters of some `PARTS` require gradients; where the model is not float32, as masters behind `Rounded`."""
    prefixes = tuple(module for part in parts for module in MODULES[part])
    for name, module in list(model.named_modules()):
        if not name.startswith(prefixes):
            continue
        for own, parameter in list(module.named_parameters(recurse=False)):
            # A copy in any case: the parameter may be a view of the checkpoint's file.
            setattr(module, own, nn.Parameter(parameter.detach().to(torch.float32, copy=True)))
            if parameter.dtype != torch.float32:
                parametrize.register_parametrization(module, own, Rounded(parameter.dtype), unsafe=True)


def trained(model: nn.Module) -> int:
    """How many numbers require gradients."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def losses(model: PaliGemma, part: tuple[Batch, float]) -> dict[str, Tensor]:
    """Of a batch, its share of the step's mean over answer tokens."""
    batch, share = part
    return {"loss": answer_loss(model, batch.to(model.device)) * share}


@torch.no_grad()
def mean_loss(vlm: VisionLanguageModel, examples: Sequence[Example], rows_at_once: int) -> float:
    """Over all answer tokens of the examples, in nats."""
    total, count = 0.0, 0
    for batch in batches(vlm.processor, examples, rows_at_once):
        tokens = int((batch.labels != NO_LABEL).sum())
        total += tokens * float(answer_loss(vlm.model, batch.to(vlm.device)))
        count += tokens
    return total / count


def evaluate(vlm: VisionLanguageModel, examples: Sequence[Example], rows_at_once: int) -> dict[str, float]:
    """The loss, and what `answer_figures` says of the greedy answers, by name."""
    tokenizer = vlm.processor.tokenizer
    longest = max(len(tokenizer.encode(example.answer, add_special_tokens=False).ids) for example in examples)
    answers: list[str] = []
    for first in range(0, len(examples), rows_at_once):
        rows = [example.read() for example in examples[first : first + rows_at_once]]
        images, prompts = [images for images, _, _ in rows], [prompt for _, prompt, _ in rows]
        answers += vlm.generate_batch(images, prompts, max_new_tokens=longest + 1)
    loss = mean_loss(vlm, examples, rows_at_once)
    return {"loss": loss, **answer_figures(answers, [example.answer for example in examples])}


def write_result(vlm: VisionLanguageModel, config: LoraConfig | None, options: argparse.Namespace, base: Path) -> None:
    """Write the adapter; or the whole checkpoint, in the dtype of the model, with the files that lie beside its base."""
    if config is not None:
        save_adapter(config, lora_matrices(vlm.model), options.output)
        return
    dtype = vlm.dtype
    for module in list(vlm.model.modules()):
        for name in list(getattr(module, "parametrizations", {})):
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    save_checkpoint(vlm.model, vlm.processor.tokenizer, options.output, dtype)
    for name in COMPANIONS:
        if (base / name).exists():
            shutil.copy(base / name, options.output / name)


if __name__ == "__main__":
    main()
