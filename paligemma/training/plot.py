"""Draw the curves of a training run from its logs: `python -m paligemma.training.plot FOLDER`."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

# Columns of a log that are no losses.
NO_LOSSES = ("step", "learning_rate", "steps_per_second", "drawn_per_second")


def plot(folder: Path) -> Path:
    """One panel a stage, one curve a loss, in the order in which the stages were trained; returns `losses.svg`."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    logs = sorted(folder.glob("*.csv"), key=lambda path: path.stat().st_mtime)
    if not logs:
        raise SystemExit(f"{folder} holds no logs: give the folder that training wrote to.")
    figure = Figure(figsize=(4 * len(logs), 3.5), layout="constrained")
    for path, axes in zip(logs, figure.subplots(1, len(logs), squeeze=False)[0]):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        steps = [int(row["step"]) for row in rows]
        axes.set_prop_cycle(color=colormaps["tab20"].colors)  # more than the default ten, and than any stage has losses
        for name in (name for name in rows[0] if name not in NO_LOSSES):
            axes.plot(steps, [float(row[name]) for row in rows], label=name)
        axes.set(title=path.stem, xlabel="step", yscale="log")
        axes.legend(fontsize="x-small")
    figure.supylabel("loss, smoothed")
    figure.savefig(folder / "losses.svg")
    return folder / "losses.svg"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    print(plot(parser.parse_args().folder))


if __name__ == "__main__":
    main()
