"""How the embedded checkpoint is made: artwork, scenes, tasks, losses, and the loop.

Needs npm, and `resvg-py` from `tests/requirements.txt`; nothing here is imported when the demo runs.
"""
