"""The training loop: AdamW over numbered batches, with a log, and saves from which an interrupted run goes on."""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..checkpoints.weights import ignore
from ..config import PaliGemmaError

WARM_UP_STEPS = 100
WEIGHT_DECAY = 0.05
BETAS = (0.9, 0.98)
MAX_GRADIENT_NORM = 1.0
SAVE_EVERY = 250
LOG_EVERY = 25
LOSS_SMOOTHING = 0.98

BatchT = TypeVar("BatchT")


class Log:
    """A CSV file of figures, each row with the step that it was written at."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, row: Mapping[str, object]) -> None:
        is_new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if is_new:
                writer.writeheader()
            writer.writerow(row)

    def rows(self) -> list[dict[str, float]]:
        """All rows, by the names of the figures; none if there is no file."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]

    def forget_after(self, step: int) -> None:
        """Remove the rows of later steps, which are about to be done again, and one that was not written to its end."""
        if self.path.exists():
            header, *rows = self.path.read_text().splitlines(keepends=True) or [""]
            kept = [row for row in rows if row.endswith("\n") and int(row.partition(",")[0]) <= step]
            self.path.write_text(header + "".join(kept)) if kept else self.path.unlink()


class Run:
    """A training run; one that was interrupted goes on from its last save when it is given the same folder.

    Only parameters that require gradients are trained, and saved.

    Args:
        name: of the log, `{name}.csv`, and the save, `{name}.pt`, in `folder`.
        steps: the number of the last step.
        peak: the learning rate after warm-up, from which half a cosine goes down to zero at the last step.
        save_every: steps between two saves.

    Raises:
        PaliGemmaError: the save is of a module with other parameters.
    """

    def __init__(
        self, name: str, module: nn.Module, folder: Path, steps: int, peak: float, save_every: int = SAVE_EVERY
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.name, self.module, self.steps, self.peak, self.save_every = name, module, steps, peak, save_every
        self.log, self.save_path = Log(folder / f"{name}.csv"), folder / f"{name}.pt"
        self.parameters = {name: value for name, value in module.named_parameters() if value.requires_grad}
        self.optimizer = torch.optim.AdamW(_groups(self.parameters.values()), lr=peak, betas=BETAS, fused=True)
        self.step = 0
        self.averages: dict[str, float] = {}
        if self.save_path.exists():
            self._resume()
        self.log.forget_after(self.step)
        self._last_log = (self.step, time.monotonic())

    def train(
        self,
        batches: Dataset[Sequence[BatchT]],
        losses: Callable[[BatchT], dict[str, Tensor]],
        workers: int = 1,
        before_save: Callable[[], None] = ignore,
    ) -> None:
        """Train until the last step.

        Args:
            batches: the batches of each step by the step's number, so that an interruption changes none. They go through
                the module one after the other, and their gradients are added up.
            losses: named losses of a batch, float scalars; the gradient is that of their sum.
            workers: processes that prepare batches ahead; 0 prepares them in this one.
            before_save: called when a save is about to be made.

        Raises:
            PaliGemmaError: a loss is not finite.
        """
        loader = DataLoader(batches, batch_size=None, sampler=range(self.step, self.steps), num_workers=workers)
        with tqdm(total=self.steps, initial=self.step, desc=self.name, mininterval=10) as bar:
            for batches_of_step in loader:
                rate = learning_rate(self.step, self.steps, self.peak)
                self._update(batches_of_step, losses, rate)
                if self.step % LOG_EVERY == 0 or self.step == self.steps:
                    self._log(rate)
                if self.step % self.save_every == 0 or self.step == self.steps:
                    before_save()
                    self._save()
                bar.update()
                bar.set_postfix({name: f"{value:.3f}" for name, value in self.averages.items()}, refresh=False)

    def _update(self, batches: Sequence[BatchT], losses: Callable[[BatchT], dict[str, Tensor]], rate: float) -> None:
        """One step down the sum of the losses of all batches."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        for batch in batches:
            parts = losses(batch)
            values = torch.stack(list(parts.values()))
            if not values.isfinite().all():
                raise PaliGemmaError(
                    f"A loss is not finite after {self.step} steps; please choose a lower learning rate."
                )
            values.sum().backward()
            for name, value in zip(parts, values.tolist()):
                sums[name] = sums.get(name, 0.0) + value
        nn.utils.clip_grad_norm_(self.parameters.values(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.step += 1
        for name, value in sums.items():
            before = self.averages.get(name, value)
            self.averages[name] = LOSS_SMOOTHING * before + (1 - LOSS_SMOOTHING) * value

    def _log(self, rate: float) -> None:
        step, then = self._last_log
        self._last_log = (self.step, time.monotonic())
        self.log.append(
            {
                "step": self.step,
                "learning_rate": f"{rate:.2e}",
                "steps_per_second": round((self.step - step) / (self._last_log[1] - then), 2),
                **{name: round(value, 4) for name, value in self.averages.items()},
            }
        )

    def _save(self) -> None:
        state = {
            "parameters": {name: value.detach() for name, value in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "averages": self.averages,
        }
        unfinished = self.save_path.with_suffix(".tmp")
        torch.save(state, unfinished)
        os.replace(unfinished, self.save_path)  # an interruption leaves the last whole save

    def _resume(self) -> None:
        state = torch.load(self.save_path, map_location="cpu")
        shapes, saved = (
            {name: value.shape for name, value in some.items()} for some in (self.parameters, state["parameters"])
        )
        if shapes != saved:
            raise PaliGemmaError(f"{self.save_path} was saved by another run; please choose another folder.")
        self.module.load_state_dict(state["parameters"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.averages = state["step"], state["averages"]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, over a tenth of a short run, then half a cosine down to zero."""
    warm_up = max(1, min(WARM_UP_STEPS, steps // 10))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def checkpoint_gradients(layers: Iterable[nn.Module], interval: int = 1) -> None:
    """Make one layer in each interval keep only its input and compute the rest again on the way back.

    Each layer: the least memory, for a third more work; every second one: half of both.
    """
    for layer in list(layers)[::interval]:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def _groups(parameters: Iterable[nn.Parameter]) -> list[dict]:
    """Parameters with their weight decay: matrices have it, gains and biases have none."""
    by_decay: dict[float, list[nn.Parameter]] = {WEIGHT_DECAY: [], 0.0: []}
    for parameter in parameters:
        by_decay[WEIGHT_DECAY if parameter.ndim >= 2 else 0.0].append(parameter)
    return [{"params": group, "weight_decay": decay} for decay, group in by_decay.items() if group]
