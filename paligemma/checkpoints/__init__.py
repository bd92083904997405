"""Where weights come from: the embedded checkpoint, a folder, the Hub."""

from .load import EMBEDDED_FOLDER, load
from .weights import INDEX_FILE, canonical_name, save_checkpoint

__all__ = ["EMBEDDED_FOLDER", "INDEX_FILE", "canonical_name", "load", "save_checkpoint"]
