"""int8 linear layers for x86 CPUs: weights with one scale per output channel, activations with one per row.

Real activations have outliers: a few channels a hundred times larger than the others. One scale for the row then leaves
nearly nothing of the rest. So each layer first multiplies its input by an orthogonal matrix, which spreads an outlier
over up to 16 blocks of at least 128 channels (as in QuaRot, arXiv 2404.00456); the weights are rotated by the same matrix
once, when they are quantized, and the product stays what it was. Of some rows the kernel also gets the residual, what
rounding lost of them, as one more row whose product is added: of a sequence's last position, on which the answer's first
token depends more than on all others, and of those that logits are computed from. They cost a hundredth of the time.

Relative error of the output against float32, in %, of 260 rows, by the shape of the layer [in, out]; "outliers" have
0.1 % of the channels 100 times larger, "gated" are GELU(gate) * up of Gaussians, which is what the widest layer reads:

                               [2048, 16384]                 [16384, 2048]
                        Gaussian  outliers  gated     Gaussian  outliers  gated
    one scale per row     1.32     10.7      2.81       1.40      16.3     3.25
    rotated in float32    1.17      0.99     1.17       1.34       1.43    1.34
    rotated in bfloat16   1.22      1.05     1.22       1.38       1.47    1.38
    only weights int8     0.83      0.81     0.83       0.94       0.94    0.94

Residuals of all rows would be more exact, but a prefill would take twice as long. On the activations of a real Gemma
(Gemma 3 270M, 1,024 tokens of English) the KL divergence from float32 is 0.0029, rotated in bfloat16 0.0030, and
0.0019 by the rounding of the weights alone; a search of each channel's scale leaves it there, since the largest of a
thousand Gaussian weights already is where 255 levels are used best.

In int4 (see `int4`), MLPs and output layer, it is 0.12, and 0.08 with the output layer in float32.
"""

from .int4 import INT4, Int4Linear, quantize_int4
from .layers import InputMemo, Int8Embedding, Int8Linear
from .packing import is_available, pack, packing
from .rounding import dequantize, quantize

__all__ = [
    "INT4",
    "InputMemo",
    "Int4Linear",
    "Int8Embedding",
    "Int8Linear",
    "dequantize",
    "is_available",
    "pack",
    "packing",
    "quantize",
    "quantize_int4",
]
