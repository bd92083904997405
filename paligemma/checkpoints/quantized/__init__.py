"""int8 weights of checkpoints: made once, kept on the disk, put into a model, or written as a checkpoint to be shared."""

from .loading import load_int8_weights

__all__ = ["load_int8_weights"]
