"""The training loop: one stage's module and optimiser, with its step count, log and saves in a folder."""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from ..hardware import multiplies_bfloat16
from .batches import InBackground

WARM_UP_STEPS = 100
WEIGHT_DECAY = 0.05
MAX_GRADIENT_NORM = 1.0
SAVE_EVERY = 250
LOG_EVERY = 25
LOSS_SMOOTHING = 0.98


class Run:
    """Steps that go on from the last save when the same folder is given again, of AdamW or, for some matrices, of Muon.

    Args:
        name: of the stage, and so of its log `{name}.csv` and its save `{name}.pt`.
        peak: the learning rate after warm-up, from which half a cosine goes down to nothing at the last step.
        factors: parts of `module` that learn at another rate, as times the rate; of a part in a part, the later counts.
        matrices: of its parameters, those that Muon moves: each step is made orthogonal, so that no direction of a
            matrix waits for the others (Keller Jordan, 2024), and scaled so that AdamW's rate fits (arXiv 2502.16982).
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        folder: Path,
        steps: int,
        peak: float,
        factors: Mapping[nn.Module, float] | None = None,
        matrices: Collection[nn.Parameter] = (),
    ):
        self.name, self.module, self.steps, self.peak = name, module, steps, peak
        self.log_path, self.save_path = folder / f"{name}.csv", folder / f"{name}.pt"
        of_muon = set(matrices)
        by_parameter = {
            parameter: factor for part, factor in (factors or {}).items() for parameter in part.parameters()
        }
        others = [parameter for parameter in module.parameters() if parameter not in of_muon]
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(_groups(others, by_parameter), betas=(0.9, 0.98), fused=True)
        ]
        if matrices:
            groups = _groups(matrices, by_parameter)
            self.optimisers.append(torch.optim.Muon(groups, adjust_lr_fn="match_rms_adamw"))
        self.step = 0
        self.averages: dict[str, float] = {}
        if self.save_path.exists():
            self._resume()
        else:
            self.log_path.unlink(missing_ok=True)  # of a run that ended before its first save
        self._last_log = (self.step, time.monotonic())

    def train(self, batches: InBackground, losses: Callable[[Any], dict[str, Tensor]]) -> None:
        """Until the last step: `losses` takes a batch and returns its losses by name, whose sum is descended."""
        device = next(self.module.parameters()).device
        bar = tqdm(total=self.steps, initial=self.step, desc=self.name, mininterval=10)
        while self.step < self.steps:
            with torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bfloat16(device)):
                parts = losses(next(batches))
            rate = learning_rate(self.step, self.steps, self.peak)
            self._update(parts, rate)
            if self.step % LOG_EVERY == 0:
                self._log(rate, batches.rate)
            if self.step % SAVE_EVERY == 0 or self.step >= self.steps:
                self._save()
            bar.update()
            bar.set_postfix({name: f"{value:.3f}" for name, value in self.averages.items()}, refresh=False)
        bar.close()

    def _update(self, parts: dict[str, Tensor], rate: float) -> None:
        """One step down the sum of the losses."""
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate * group["factor"]
            optimiser.zero_grad(set_to_none=True)
        sum(parts.values()).backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), MAX_GRADIENT_NORM)
        for optimiser in self.optimisers:
            optimiser.step()
        self.step += 1
        for name, value in zip(parts, torch.stack([part.detach() for part in parts.values()]).tolist()):
            before = self.averages.get(name, value)
            self.averages[name] = LOSS_SMOOTHING * before + (1 - LOSS_SMOOTHING) * value

    def _log(self, rate: float, drawn_per_second: float) -> None:
        step, then = self._last_log
        self._last_log = (self.step, time.monotonic())
        row = {
            "step": self.step,
            "learning_rate": f"{rate:.2e}",
            "steps_per_second": round((self.step - step) / (self._last_log[1] - then), 2),
            "drawn_per_second": round(drawn_per_second, 2),
            **{name: round(value, 4) for name, value in self.averages.items()},
        }
        new = not self.log_path.exists()
        with self.log_path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)

    def _save(self) -> None:
        state = {
            "module": self.module.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "step": self.step,
            "averages": self.averages,
        }
        unfinished = self.save_path.with_suffix(".tmp")
        torch.save(state, unfinished)
        os.replace(unfinished, self.save_path)  # an interruption leaves the last whole save

    def _resume(self) -> None:
        state = torch.load(self.save_path)
        self.module.load_state_dict(state["module"])
        for optimiser, kept in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
        self.step, self.averages = state["step"], state["averages"]
        # What was logged after the save is about to be done, and logged, again.
        if self.log_path.exists():
            header, *rows = self.log_path.read_text().splitlines(keepends=True)
            kept = [row for row in rows if int(row.partition(",")[0]) <= self.step]
            self.log_path.write_text(header + "".join(kept))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then half a cosine down to nothing."""
    if step < WARM_UP_STEPS:
        return peak * (step + 1) / WARM_UP_STEPS
    progress = (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def checkpoint_gradients(layers: nn.ModuleList) -> None:
    """Let each layer keep only its input and compute the rest again on the way back: less memory, a third more work."""
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def _groups(parameters: Iterable[nn.Parameter], factors: Mapping[nn.Parameter, float]) -> list[dict]:
    """Parameters by how fast they learn and by whether they decay, as matrices do and gains and biases do not."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            factor = factors.get(parameter, 1.0)
            decay = WEIGHT_DECAY if parameter.ndim >= 2 else 0.0
            groups.setdefault((factor, decay), []).append(parameter)
    return [
        {"params": parameters, "factor": factor, "weight_decay": decay}
        for (factor, decay), parameters in groups.items()
    ]
