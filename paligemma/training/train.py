"""Make the embedded checkpoint: `python -m paligemma.training.train --output FOLDER`.

Four stages, the first two on pictures of a quarter of the size, which are learnt from several times faster. First the
eye alone learns to name crops of single objects. Then the voice learns the tasks on what this eye sees of one object.
The eye goes on to pictures of full size and learns to say what is under each patch. Last, all of it learns together, at
first on one object a picture and on more as the loss falls; the eye, which knows its part by then, changes slowly.
A run that was interrupted goes on from its last save when the same command is given again.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import os
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints import save_checkpoint
from ..config import PaliGemmaConfig, TextConfig, VisionConfig
from ..model import PaliGemma
from ..processor import Processor
from ..siglip import SiglipVisionModel
from .artwork import KINDS, load_sprites
from .batches import CropBatches, PatchBatches, Rows, SceneBatches, in_background
from .losses import answer_loss, cosine_classification_loss
from .scenes import MAX_OBJECTS
from .tokenizer import IMAGE_TOKEN, LOC_TOKENS, build_tokenizer

SPRITE_SIZE = 128
SMALL_SIZE = 56  # pixels, where full size is 112
CROPS_A_BATCH = 128
SMALL_PICTURES_A_BATCH = 64
SCENES_A_BATCH = 64
PICTURES_A_BATCH = 24
PEAK_LEARNING_RATE = 1e-3
EYE_SLOWNESS = 0.1  # in the last stage the eye learns at this part of the rate
WARM_UP_STEPS = 100
WEIGHT_DECAY = 0.05
MAX_GRADIENT_NORM = 1.0
SAVE_EVERY = 250
LOG_EVERY = 25
# One object more is allowed once the smoothed loss is below this many nats a token: the kinds are known by then, and
# coordinates, the larger part of it, go on improving for long.
LOSS_TO_ADD_AN_OBJECT = 1.5
LOSS_SMOOTHING = 0.98


def tiny_config(vocab_size: int, image_token_id: int) -> PaliGemmaConfig:
    """Sizes of the embedded checkpoint: 4.8 million parameters."""
    return PaliGemmaConfig(
        vision=VisionConfig(
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=4,
            image_size=112,
            patch_size=14,
        ),
        text=TextConfig(
            vocab_size=vocab_size,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=48,
            max_position_embeddings=1024,
        ),
        image_token_id=image_token_id,
    )


def initialise(model: PaliGemma, loc_ids: list[int]) -> None:
    """Draw the token embedding so that it has unit variance once scaled, and logits begin near zero."""
    embedding = model.language_model.embed_tokens.weight
    width = embedding.shape[1]
    nn.init.normal_(embedding, std=width**-0.5)
    # Coordinates begin as smooth functions of where they are, so that what is learnt of one holds for its neighbours.
    coordinates = torch.linspace(0, 1, len(loc_ids))[:, None]
    frequencies, phases = torch.randn(width) * 2 * math.pi * 4, torch.rand(width) * 2 * math.pi
    with torch.no_grad():
        embedding[loc_ids] = torch.cos(coordinates * frequencies + phases) * (2 / width) ** 0.5


def resize_positions(positions: Tensor, patches: int) -> Tensor:
    """Interpolate learned positions, float [old, width], of one square grid of patches to another, [patches, width]."""
    old_side, side = math.isqrt(positions.shape[0]), math.isqrt(patches)
    grid = positions.T.reshape(1, -1, old_side, old_side)
    grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    return grid.flatten(2)[0].T.contiguous()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then half a cosine down to nothing."""
    if step < WARM_UP_STEPS:
        return peak * (step + 1) / WARM_UP_STEPS
    progress = (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


class Run:
    """One stage's module and optimiser, with its step count, log and saves in a folder."""

    def __init__(self, name: str, module: nn.Module, folder: Path, steps: int, eye: nn.Module | None = None):
        """`eye` is the part of `module` that learns at `EYE_SLOWNESS`, if any."""
        self.name, self.module, self.steps = name, module, steps
        self.log_path, self.save_path = folder / f"{name}.csv", folder / f"{name}.pt"
        slow = set(eye.parameters()) if eye is not None else set()
        groups = []
        for factor, matrices in itertools.product((1.0, EYE_SLOWNESS), (True, False)):
            members = [
                parameter
                for parameter in module.parameters()
                if parameter.requires_grad
                and (parameter.ndim >= 2) == matrices
                and (parameter in slow) == (factor == EYE_SLOWNESS)
            ]
            if members:
                groups.append({"params": members, "weight_decay": WEIGHT_DECAY * matrices, "factor": factor})
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        self.step = 0
        self.smooth_loss = math.nan
        self.notes: dict[str, int] = {}
        if self.save_path.exists():
            self._resume()
        self._last_log = (self.step, time.monotonic())

    @property
    def finished(self) -> bool:
        return self.step >= self.steps

    def update(self, loss: Tensor) -> None:
        """One step of the optimiser on `loss`; logs and saves when it is time."""
        rate = learning_rate(self.step, self.steps, PEAK_LEARNING_RATE)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), MAX_GRADIENT_NORM)
        self.optimiser.step()
        self.step += 1
        value = loss.item()
        if math.isnan(self.smooth_loss):
            self.smooth_loss = value
        self.smooth_loss = LOSS_SMOOTHING * self.smooth_loss + (1 - LOSS_SMOOTHING) * value
        if self.step % LOG_EVERY == 0:
            self._log(rate)
        if self.step % SAVE_EVERY == 0 or self.finished:
            self._save()

    def _log(self, rate: float) -> None:
        step, then = self._last_log
        self._last_log = (self.step, time.monotonic())
        row = {
            "step": self.step,
            "loss": round(self.smooth_loss, 4),
            "learning_rate": f"{rate:.2e}",
            "steps_per_second": round((self.step - step) / (self._last_log[1] - then), 2),
            **self.notes,
        }
        new = not self.log_path.exists()
        with self.log_path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(self.name, *(f"{key} {value}" for key, value in row.items()), flush=True)

    def _save(self) -> None:
        state = {
            "module": self.module.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "smooth_loss": self.smooth_loss,
            "notes": self.notes,
        }
        unfinished = self.save_path.with_suffix(".tmp")
        torch.save(state, unfinished)
        os.replace(unfinished, self.save_path)  # an interruption leaves the last whole save

    def _resume(self) -> None:
        state = torch.load(self.save_path)
        self.module.load_state_dict(state["module"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.smooth_loss, self.notes = state["step"], state["smooth_loss"], state["notes"]
        # What was logged after the save is about to be done, and logged, again.
        if self.log_path.exists():
            header, *rows = self.log_path.read_text().splitlines(keepends=True)
            kept = [row for row in rows if int(row.partition(",")[0]) <= self.step]
            self.log_path.write_text(header + "".join(kept))


class EyeClassifier(nn.Module):
    """The eye on small crops, and one vector for each kind to compare the mean feature with."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.vision_tower = SiglipVisionModel(replace(config, image_size=SMALL_SIZE))
        nn.init.normal_(self.vision_tower.embeddings.position_embedding.weight, std=0.02)
        self.kinds = nn.Parameter(torch.randn(len(KINDS), config.hidden_size))
        self.scale = nn.Parameter(torch.tensor(10.0).log())

    def loss(self, pixel_values: Tensor, kinds: Tensor) -> Tensor:
        features = self.vision_tower(pixel_values).mean(1)
        return cosine_classification_loss(features, self.kinds, self.scale, kinds)


def train_eye(processor: Processor, folder: Path, steps: int) -> EyeClassifier:
    """Stage one: name crops of single objects."""
    classifier = EyeClassifier(processor.config.vision)
    run = Run("eye", classifier, folder, steps)
    if not run.finished:
        batches = in_background(
            CropBatches(processor, load_sprites(SPRITE_SIZE), CROPS_A_BATCH, SMALL_SIZE, seed=run.step)
        )
        while not run.finished:
            run.update(classifier.loss(*next(batches)))
    return classifier


def rows_loss(model: PaliGemma, rows: Rows) -> Tensor:
    """The answers' loss; each picture goes through the eye once, however many rows ask about it."""
    features = model.image_features(rows.pixel_values)
    features = features.repeat_interleave(len(rows.input_ids) // len(features), dim=0)
    hidden_states = model.hidden_states(features, rows.input_ids, rows.prefix_lengths, rows.attention_mask)
    return answer_loss(hidden_states, rows.labels, model.language_model.logits)


def at_image_size(config: PaliGemmaConfig, image_size: int) -> PaliGemmaConfig:
    """The same model for pictures of another size."""
    return replace(config, vision=replace(config.vision, image_size=image_size))


def train_voice(processor: Processor, eye: SiglipVisionModel, folder: Path, steps: int) -> PaliGemma:
    """Stage two: projector and voice learn the tasks on small pictures of one object; the eye stays as it is."""
    small = Processor(at_image_size(processor.config, SMALL_SIZE), processor.tokenizer)
    model = PaliGemma(small.config)
    initialise(model, [processor.tokenizer.token_to_id(token) for token in LOC_TOKENS])
    model.vision_tower.load_state_dict(eye.state_dict())
    # While the voice is still random, its gradients would undo what the eye has learnt.
    model.vision_tower.requires_grad_(False)
    run = Run("voice", model, folder, steps)
    if not run.finished:
        one_object = torch.tensor(1)
        batches = in_background(
            SceneBatches(
                small, load_sprites(SPRITE_SIZE), SMALL_PICTURES_A_BATCH, one_object, seed=1_000_000 + run.step
            )
        )
        while not run.finished:
            run.update(rows_loss(model, next(batches)))
    return model


class PatchClassifier(nn.Module):
    """The eye at full size, and the vectors of the kinds and of the background to compare each patch with."""

    def __init__(self, config: VisionConfig, small: EyeClassifier):
        super().__init__()
        weights = small.vision_tower.state_dict()
        positions = "embeddings.position_embedding.weight"
        weights[positions] = resize_positions(weights[positions], config.num_patches)
        self.vision_tower = SiglipVisionModel(config)
        self.vision_tower.load_state_dict(weights)
        self.kinds = nn.Parameter(torch.cat([small.kinds.detach(), torch.randn(1, config.hidden_size)]))
        self.scale = nn.Parameter(small.scale.detach().clone())

    def loss(self, pixel_values: Tensor, kinds: Tensor) -> Tensor:
        features = self.vision_tower(pixel_values).flatten(0, 1)
        return cosine_classification_loss(features, self.kinds, self.scale, kinds.flatten())


def train_patches(processor: Processor, eye: EyeClassifier, folder: Path, steps: int) -> SiglipVisionModel:
    """Stage three: say what is under each patch of a scene."""
    classifier = PatchClassifier(processor.config.vision, eye)
    run = Run("patches", classifier, folder, steps)
    if not run.finished:
        batches = in_background(
            PatchBatches(processor, load_sprites(SPRITE_SIZE), SCENES_A_BATCH, seed=2_000_000 + run.step)
        )
        while not run.finished:
            run.update(classifier.loss(*next(batches)))
    return classifier.vision_tower


def train_together(
    processor: Processor, eye: SiglipVisionModel, small: PaliGemma, folder: Path, steps: int
) -> PaliGemma:
    """Stage four: everything, every task, on scenes that become fuller."""
    model = PaliGemma(processor.config)
    model.vision_tower.load_state_dict(eye.state_dict())
    model.multi_modal_projector.load_state_dict(small.multi_modal_projector.state_dict())
    model.language_model.load_state_dict(small.language_model.state_dict())
    run = Run("together", model, folder, steps, eye=model.vision_tower)
    run.notes.setdefault("max_objects", 1)
    run.notes.setdefault("raised_at", 0)
    max_objects = torch.tensor(run.notes["max_objects"]).share_memory_()
    batches = in_background(
        SceneBatches(processor, load_sprites(SPRITE_SIZE), PICTURES_A_BATCH, max_objects, seed=3_000_000 + run.step)
    )
    while not run.finished:
        run.update(rows_loss(model, next(batches)))
        # The smoothed loss needs some steps to forget the easier scenes before.
        settled = run.step - run.notes["raised_at"] > 3 / (1 - LOSS_SMOOTHING)
        if settled and run.smooth_loss < LOSS_TO_ADD_AN_OBJECT and max_objects < MAX_OBJECTS:
            max_objects += 1
            run.notes.update(max_objects=max_objects.item(), raised_at=run.step)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint, its log and its saves")
    parser.add_argument("--eye-steps", type=int, default=1500)
    parser.add_argument("--voice-steps", type=int, default=750)
    parser.add_argument("--patch-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=1200)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    tokenizer = build_tokenizer()
    config = tiny_config(tokenizer.get_vocab_size(), tokenizer.token_to_id(IMAGE_TOKEN))
    processor = Processor(config, tokenizer)
    eye = train_eye(processor, arguments.output, arguments.eye_steps)
    small = train_voice(processor, eye.vision_tower, arguments.output, arguments.voice_steps)
    full_eye = train_patches(processor, eye, arguments.output, arguments.patch_steps)
    model = train_together(processor, full_eye, small, arguments.output, arguments.steps)
    save_checkpoint(model, tokenizer, arguments.output, torch.bfloat16)


if __name__ == "__main__":
    main()
