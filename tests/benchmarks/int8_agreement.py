"""How often the embedded checkpoint answers in int8, and in int4, as it does in float32, on fresh scenes.

python tests/benchmarks/int8_agreement.py --scenes 500     # takes minutes

It also tells what the rounding of the weights alone changes, which no kernel can make better: the answers of a float32
model whose weights are those that the int8 layers stand for.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scene_figures import draw_scenes

import paligemma
from paligemma.quantization import dequantize, quantize
from paligemma.scenes.artwork import load_sheet
from paligemma.scenes.painter import Painter
from paligemma.scenes.questions import CAPTION_PROMPT, count_prompt, detect_prompt, segment_prompt


def rounded(weight: Tensor) -> Tensor:
    """The weight, float32 [out, in], that the int8 one stands for."""
    return dequantize(*quantize(weight))


def with_rounded_weights() -> paligemma.VisionLanguageModel:
    """The embedded checkpoint in float32, after a rounding of its weights to int8."""
    vlm = paligemma.load(device="cpu", dtype="float32")
    for module in vlm.model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = rounded(module.weight.data)
    embedding = vlm.model.language_model.embed_tokens
    embedding.weight.data = rounded(embedding.weight.data)
    return vlm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=500)
    arguments = parser.parse_args()
    exact = paligemma.load(device="cpu", dtype="float32")
    others = {dtype: paligemma.load(device="cpu", dtype=dtype) for dtype in ("int8", "int4")}
    others["only weights rounded"] = with_rounded_weights()
    same: dict[str, Counter] = {name: Counter() for name in others}
    for scene in draw_scenes(Painter(load_sheet()), arguments.scenes):
        kind = scene.objects[0].kind
        prompts = {
            "caption": CAPTION_PROMPT,
            "answer": count_prompt(kind),
            "detect": detect_prompt(kind),
            "segment": segment_prompt(kind),
        }
        for task, prompt in prompts.items():
            expected = exact.generate(scene.image, prompt)
            for name, vlm in others.items():
                same[name][task] += vlm.generate(scene.image, prompt) == expected

    print(f"{arguments.scenes} scenes, {torch.backends.cpu.get_cpu_capability()}; the same answer as in float32:")
    tasks = ("caption", "answer", "detect", "segment")
    print(f"| | {' | '.join(tasks)} |")
    print(f"| --- |{' ---: |' * len(tasks)}")
    for name, counts in same.items():
        cells = (f"{counts[task] / arguments.scenes:.3f}" for task in tasks)
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
