"""Linear layers in int8 for x86 CPUs: weights with one scale per output channel, activations with one per row.

Real activations have outliers: a few channels a hundred times larger than the others. One scale for the row then leaves
nearly nothing of the rest. So each layer first turns its input by an orthogonal matrix, block by block of at least 128
channels, which spreads an outlier over its whole block (as in QuaRot, arXiv 2404.00456); the weights are turned the same
way once, when they are quantised, and the product stays what it was. Some rows give what rounding lost of them to the
kernel as a second row, and the two results are added: those whose largest value is still many times their root mean
square; the last of several, on which the answer's first token depends more than on all others; and that of which logits
are computed. The last two cost a hundredth of the time, and halve what activations contribute to the error of the logits.

Relative error of the output against float32, in %, of 260 rows, by the shape of the layer [in, out]; "outliers" have
0.1 % of the channels 100 times larger, "gated" are GELU(gate) * up of Gaussians, which is what the widest layer sees:

                               [2048, 16384]                 [16384, 2048]
                        Gaussian  outliers  gated     Gaussian  outliers  gated     time of a prefill's kernels
    one scale per row     1.32     10.7      2.81       1.40      16.3     3.25     1
    turned                1.31      1.9      1.36       1.41       1.4     1.48     1.1 to 1.2
    second row always     0.84      0.83     0.83       0.95      0.96     0.94     2.2
    only weights int8     0.83      0.83     0.83       0.95      0.95     0.95

A second row for all would be more exact, but reading a picture would take twice as long.

Two kernels of torch's compute the product. Where the CPU has VNNI instructions, oneDNN's is the faster one. Elsewhere
FBGEMM's is: it reads weights four times as fast for one row. Without VNNI both add pairs of products in 16 bits, which
overflow where large weights meet large activations. Fewer levels for the activations keep nearly all sums below that, and
cost less than the overflow would.
"""

from .layers import Int8Embedding, Int8Linear, prepare_for
from .packing import OneDnnWeight, is_available, pack, packing
from .rounding import quantize, rotation, turn, turn_back

__all__ = [
    "Int8Embedding",
    "Int8Linear",
    "OneDnnWeight",
    "is_available",
    "pack",
    "packing",
    "prepare_for",
    "quantize",
    "rotation",
    "turn",
    "turn_back",
]
