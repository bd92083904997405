"""int8 and int4 weights of checkpoints: made once, kept on the disk, put into a model, or written as a checkpoint to be shared."""

from .loading import load_quantized_weights

__all__ = ["load_quantized_weights"]
