"""What it costs to look inside an answer, what it costs those who do not, and whether the heat map is true.

    python tests/benchmarks/inspection.py                                   # the embedded checkpoint, some ten minutes
    python tests/benchmarks/inspection.py --scenes 0 --before FOLDER        # against another tree of this project
    python tests/benchmarks/inspection.py --scenes 0 --model FOLDER --dtype int8     # such as full_size.py makes

Prints the seconds of a first view, and of one whose keys and values were dropped; the CPU time of answers that nobody
looks into, here and in the other tree, which take turns; and, for steps that write an object's name or one of its four
coordinates, how often the most attended patch (mean of heads) lies in the object's box: by layer, and of the mean of layers.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

TREE = Path(__file__).resolve().parents[2]
PICTURE = TREE / "paligemma" / "demo" / "examples" / "cats.png"
ROUNDS, ANSWERS = 6, 12
SCENE_SIZE, SEED = 336, 27_000_000
IOU_TO_MATCH = 0.5
COORDINATES = ("y_min", "x_min", "y_max", "x_max")
# CPU seconds of an answer, measured in a process of its own, so that each tree can be asked.
MEASURE = """
import sys, time, torch
torch.set_num_threads(1)
import paligemma
vlm, image = paligemma.load(), sys.argv[1]
prompts = ["caption en", "detect cat", "answer en how many cats are there?"]
ask = lambda: [vlm.generate(image, prompt) for prompt in prompts]
ask()
start = time.process_time()
for _ in range(int(sys.argv[2])):
    ask()
print((time.process_time() - start) / (int(sys.argv[2]) * len(prompts)))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="folder of another tree")
    parser.add_argument("--model", help="checkpoint folder; the embedded one if left out")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--scenes", type=int, default=200)
    arguments = parser.parse_args()
    if arguments.before:
        compare_trees(arguments.before)
    sys.path.insert(0, str(TREE))
    time_views(arguments.model, arguments.dtype)
    if arguments.scenes:
        print_truth(arguments.scenes)


def compare_trees(before: Path) -> None:
    """Print the CPU time of an answer in this tree and in another, and the median ratio of the two."""
    pairs = []
    for number in range(ROUNDS):
        trees = (TREE, before) if number % 2 else (before, TREE)
        seconds = {tree: _measured(tree) for tree in trees}
        pairs.append((seconds[TREE], seconds[before]))
    now, then = (statistics.median(one) for one in zip(*pairs))
    ratio = statistics.median(one / other for one, other in pairs)
    print(
        f"An answer takes {1000 * now:.2f} ms of CPU time, {1000 * then:.2f} ms in {before}; median ratio {ratio:.3f}."
    )


def _measured(tree: Path) -> float:
    command = [sys.executable, "-c", MEASURE, str(PICTURE), str(ANSWERS)]
    return float(subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True).stdout)


def time_views(model: str | None, dtype: str) -> None:
    """Print how long a view takes, from the image file on: kept, and after it was dropped."""
    import paligemma
    from paligemma.kv_cache import KeptCaches

    vlm = paligemma.load(model, dtype=dtype)
    prompt = "detect cat"
    answer = vlm.stream(PICTURE, prompt, max_new_tokens=16)
    if not list(answer):
        raise SystemExit("This checkpoint has no answer to look into.")
    kept, size = vlm.engine.prefill.kept, vlm.engine.call(lambda: vlm.engine.prefill.kept.nbytes)
    seconds = defaultdict(list)
    for _ in range(ROUNDS):
        for name in ("kept", "dropped"):
            if name == "dropped":
                vlm.engine.prefill.kept = KeptCaches(kept.max_bytes)
            start = time.perf_counter()
            vlm.resume(PICTURE, prompt, answer.token_ids).inspect(len(answer.token_ids) // 2).heat_map()
            seconds[name].append(time.perf_counter() - start)
            if model is not None and name == "dropped" and len(seconds[name]) == 2:
                del seconds[name][0]
    for name, times in seconds.items():
        print(f"A view takes {statistics.median(times):.3f} s, keys and values {name} ({size / 1e6:.1f} MB).")


def print_truth(count: int) -> None:
    """Print how often the most attended patch lies in the box of the object that is written about, on fresh scenes."""
    rows = defaultdict(list)
    for name, hits in _views(count):
        rows[name].append(hits)
        rows["all"].append(hits)
    columns = len(rows["all"][0][0]) - 2
    print(f"\nThe most attended patch, in {count} scenes, touches the box / has its center in the box:")
    print(
        f"| step | views | {' | '.join(f'layer {number + 1}' for number in range(columns))} | all layers | any patch |"
    )
    print(f"| --- |{' ---: |' * (columns + 3)}")
    for name in (*COORDINATES, "name", "all"):
        cells = [f"{touches:.3f} / {inside:.3f}" for touches, inside in np.mean(rows[name], axis=0).T]
        print(f"| {name} | {len(rows[name])} | {' | '.join(cells)} |")


def _views(count: int) -> Iterator[tuple[str, np.ndarray]]:
    """For each step that writes a name or coordinate of an object that is there, the word for it and what it hits.

    Those are float [2, layers + 2]: whether the most attended patch touches the box, and whether its center lies in it,
    of each layer and of the mean of all; then how many of all patches do.
    """
    import paligemma
    from paligemma.scenes.artwork import KINDS, load_sheet
    from paligemma.scenes.painter import MAX_OBJECTS, Painter

    vlm, painter, rng = paligemma.load(dtype="float32"), Painter(load_sheet()), np.random.default_rng(SEED)
    for number in range(count):
        scene = painter.random_scene(rng, SCENE_SIZE, number % MAX_OBJECTS + 1)
        for kind in sorted({thing.kind for thing in scene.objects}):
            answer = vlm.stream(scene.image, f"detect {KINDS[kind].name}", max_new_tokens=80)
            texts = [token.text for token in answer]
            boxes = [thing.box for thing in scene.objects if thing.kind == kind]
            for steps in _found(texts):
                said = [int(texts[step][4:8]) / 1024 for step in steps[:4]]
                box = max(boxes, key=lambda box: _iou(box, said))
                if _iou(box, said) < IOU_TO_MATCH:
                    continue
                for place, step in enumerate(steps):
                    seen = answer.inspect(step)
                    maps = [seen.heat_map(layer) for layer in (*range(len(seen.attention)), None)]
                    patches = _patches_in(box, seen.grid)
                    hits = patches.reshape(2, -1)[:, [int(one.argmax()) for one in maps]]
                    yield (
                        (*COORDINATES, "name")[min(place, 4)],
                        np.concatenate((hits, patches.mean(axis=(1, 2))[:, None]), axis=1),
                    )


def _found(texts: list[str]) -> Iterator[list[int]]:
    """Of each object in an answer of `detect` the steps that wrote its four coordinates and then its name."""
    steps: list[int] = []
    for step, text in enumerate((*texts, ";")):
        if text.strip() == ";":
            if len(steps) > 4 and all(texts[one].startswith("<loc") for one in steps[:4]):
                yield steps
            steps = []
        elif text.strip():
            steps.append(step)


def _patches_in(box: tuple[float, ...], grid: tuple[int, int]) -> np.ndarray:
    """Bool [2, rows, columns]: which patches touch a box, and the centers of which lie in it."""
    y_min, x_min, y_max, x_max = box
    tops, lefts = (np.arange(count) / count for count in grid)
    height, width = (1 / count for count in grid)
    both = []
    for margin in (0.0, 0.5):
        rows = (tops + (1 - margin) * height > y_min) & (tops + margin * height < y_max)
        columns = (lefts + (1 - margin) * width > x_min) & (lefts + margin * width < x_max)
        both.append(rows[:, None] & columns)
    return np.stack(both)


def _iou(one: tuple[float, ...] | list[float], other: tuple[float, ...] | list[float]) -> float:
    """Intersection over union of two boxes."""
    from paligemma.scenes.painter import area, intersection

    shared = intersection(one, other)
    return shared / (area(one) + area(other) - shared)


if __name__ == "__main__":
    main()
