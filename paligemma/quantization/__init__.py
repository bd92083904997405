"""int8 linear layers for x86 CPUs: weights with one scale per output channel, activations with one per row.

Real activations have outliers: a few channels a hundred times larger than the others. One scale for the row then leaves
nearly nothing of the rest. So each layer first multiplies its input by an orthogonal matrix, block by block of at least
128 channels, which spreads an outlier over its whole block (as in QuaRot, arXiv 2404.00456); the weights are rotated by
the same matrix once, when they are quantized, and the product stays what it was. Of some rows the kernel also gets the
residual, what rounding lost of them, as one more row whose product is added: of those whose largest value is still many
times their root mean square; of a sequence's last position, on which the answer's first token depends more than on all
others; and of those that logits are computed from. The last two cost a hundredth of the time, and halve what activations
contribute to the error of the logits.

Relative error of the output against float32, in %, of 260 rows, by the shape of the layer [in, out]; "outliers" have
0.1 % of the channels 100 times larger, "gated" are GELU(gate) * up of Gaussians, which is what the widest layer reads:

                               [2048, 16384]                 [16384, 2048]
                        Gaussian  outliers  gated     Gaussian  outliers  gated     time of a prefill's kernels
    one scale per row     1.32     10.7      2.81       1.40      16.3     3.25     1
    rotated               1.31      1.9      1.36       1.41       1.4     1.48     1.1 to 1.2
    residual always       0.84      0.83     0.83       0.95      0.96     0.94     2.2
    only weights int8     0.83      0.83     0.83       0.95      0.95     0.95

Residuals of all rows would be more exact, but a prefill would take twice as long.
"""

from .layers import InputMemo, Int8Embedding, Int8Linear
from .packing import is_available, pack, packing
from .rounding import dequantize, quantize

__all__ = ["InputMemo", "Int8Embedding", "Int8Linear", "dequantize", "is_available", "pack", "packing", "quantize"]
