"""From 16 `<seg>` codes to a mask: the decoder of PaliGemma's small VQ-VAE (big_vision; arXiv 2407.07726, section 3).

The same class reads the official `vae-oid.npz` and the embedded checkpoint's own, smaller weights; module names are those
of the official file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .config import CODEBOOK_SIZE, PaliGemmaError

GRID_SIDE = 4  # of the 16 codes
FILE_NAMES = ("mask_decoder.safetensors", "vae-oid.npz")  # beside a checkpoint


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and a 1×1 one, added to what they read."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.net(hidden_states)


class MaskDecoder(nn.Module):
    """A codebook, and the convolutions that make a mask of a 4×4 grid of its vectors.

    Args:
        codes: how many vectors there are (officially 128), of `code_width` numbers each (512).
        width: of the first convolutions (128), which halves as the mask grows.
    """

    def __init__(self, codes: int, code_width: int, width: int):
        super().__init__()
        self._vq_vae = nn.ParameterDict({"_embedding": torch.randn(codes, code_width)})
        layers = [nn.Conv2d(code_width, width, 1), nn.ReLU(), ResidualBlock(width), ResidualBlock(width)]
        incoming = width
        for outgoing in (width, width // 2, width // 4, width // 8):
            layers += [nn.ConvTranspose2d(incoming, outgoing, 4, stride=2, padding=1), nn.ReLU()]
            incoming = outgoing
        self.decoder = nn.Sequential(*layers, nn.Conv2d(incoming, 1, 1))

    @classmethod
    def load(cls, path: Path) -> MaskDecoder:
        """Read a safetensors file or an official npz; sizes follow from its arrays.

        Raises:
            PaliGemmaError: the file cannot be read, or lacks a tensor.
        """
        try:
            if path.suffix == ".npz":
                with np.load(path) as arrays:
                    state = {name: torch.from_numpy(arrays[name]) for name in arrays}
            else:
                state = load_file(path)
            codebook, first = state["_vq_vae._embedding"], state["decoder.0.weight"]
            if len(codebook) < CODEBOOK_SIZE:
                raise ValueError(f"_vq_vae._embedding has {len(codebook)} rows, expected {CODEBOOK_SIZE}")
            decoder = cls(codebook.shape[0], codebook.shape[1], width=first.shape[0])
            # The official file may hold the encoder's weights as well.
            wanted = decoder.state_dict().keys()
            decoder.load_state_dict({name: value.float() for name, value in state.items() if name in wanted})
        except Exception as error:  # archives report damage in a dozen ways, zlib.error and TokenError among them
            raise PaliGemmaError(
                f"{path} does not hold a mask decoder: give the official vae-oid.npz, or remove the file. ({error})"
            ) from error
        return decoder.eval()

    def forward(self, codes: Tensor) -> Tensor:
        """Int64 [N, 16], row by row of the grid, to float [N, 64, 64]: above zero where the object is."""
        vectors = self._vq_vae["_embedding"][codes]  # [N, 16, code_width]
        grid = vectors.transpose(1, 2).unflatten(2, (GRID_SIDE, GRID_SIDE))
        return self.decoder(grid)[:, 0]
