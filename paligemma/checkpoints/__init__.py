"""Where weights come from: the embedded checkpoint, a folder, the Hub."""

from .formats import INDEX_FILE
from .load import EMBEDDED_FOLDER, load
from .weights import canonical_name, save_checkpoint

__all__ = ["EMBEDDED_FOLDER", "INDEX_FILE", "canonical_name", "load", "save_checkpoint"]
