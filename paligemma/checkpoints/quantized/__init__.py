"""int8 and int4 weights of checkpoints: made once, kept on the disk, put into a model, or written as a checkpoint to be shared."""

from .int4 import load_int4_weights
from .loading import load_int8_weights

__all__ = ["load_int4_weights", "load_int8_weights"]
