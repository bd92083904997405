"""Codes become masks as the official decoder makes them, from its own file or from ours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import paligemma
from paligemma import PaliGemmaError, hardware
from paligemma.checkpoints import EMBEDDED_FOLDER
from paligemma.mask_decoder import MaskDecoder


def official_arrays(rng, width=128, code_width=512):
    """The keys and shapes of vae-oid.npz, with random values."""

    def convolution(name, *shape):
        outputs = shape[1] if len(shape) == 4 and name in ("4", "6", "8", "10") else shape[0]
        scale = 1 / np.sqrt(np.prod(shape[1:]))
        return {
            f"decoder.{name}.weight": rng.normal(0, scale, shape).astype(np.float32),
            f"decoder.{name}.bias": rng.normal(0, 0.1, outputs).astype(np.float32),
        }

    arrays = {"_vq_vae._embedding": rng.normal(size=(128, code_width)).astype(np.float32)}
    arrays |= convolution("0", width, code_width, 1, 1)
    for block in ("2", "3"):
        arrays |= convolution(f"{block}.net.0", width, width, 3, 3)
        arrays |= convolution(f"{block}.net.2", width, width, 3, 3)
        arrays |= convolution(f"{block}.net.4", width, width, 1, 1)
    incoming = width
    for place, outgoing in zip(("4", "6", "8", "10"), (width, width // 2, width // 4, width // 8)):
        arrays |= convolution(place, incoming, outgoing, 4, 4)
        incoming = outgoing
    return arrays | convolution("12", 1, incoming, 1, 1)


def decode_step_by_step(arrays, codes):
    """What the official decoder computes, written without modules."""
    weights = {name: torch.from_numpy(value) for name, value in arrays.items()}

    def convolve(name, x, padding=0):
        return F.conv2d(x, weights[f"decoder.{name}.weight"], weights[f"decoder.{name}.bias"], padding=padding)

    x = weights["_vq_vae._embedding"][codes].reshape(4, 4, -1).permute(2, 0, 1)[None]
    x = convolve("0", x).relu()
    for block in ("2", "3"):
        y = convolve(f"{block}.net.0", x, padding=1).relu()
        y = convolve(f"{block}.net.2", y, padding=1).relu()
        x = x + convolve(f"{block}.net.4", y)
    for place in ("4", "6", "8", "10"):
        weight, bias = weights[f"decoder.{place}.weight"], weights[f"decoder.{place}.bias"]
        x = F.conv_transpose2d(x, weight, bias, stride=2, padding=1).relu()
    return convolve("12", x)[0, 0]


def test_the_official_file_is_read_and_computed(tmp_path):
    rng = np.random.default_rng(0)
    arrays = official_arrays(rng)
    # The official file may hold what only training needs.
    np.savez(tmp_path / "vae-oid.npz", **arrays, **{"encoder.0.weight": np.zeros((3, 3), np.float32)})
    decoder = MaskDecoder.load(tmp_path / "vae-oid.npz")
    codes = torch.from_numpy(rng.integers(0, 128, 16))
    masks = decoder(torch.stack([codes, codes.flip(0)]))
    assert masks.shape == (2, 64, 64)
    torch.testing.assert_close(masks[0], decode_step_by_step(arrays, codes), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(masks[0], masks[1])


def test_sizes_of_smaller_decoders_follow_from_their_arrays(tmp_path):
    arrays = official_arrays(np.random.default_rng(0), width=32, code_width=8)
    path = tmp_path / "mask_decoder.safetensors"
    save_file({name: torch.from_numpy(value).bfloat16() for name, value in arrays.items()}, path)
    decoder = MaskDecoder.load(path)
    assert decoder.decoder[0].weight.shape == (32, 8, 1, 1)
    assert decoder(torch.zeros(1, 16, dtype=torch.int64)).dtype == torch.float32


@pytest.mark.parametrize("name", ["vae-oid.npz", "mask_decoder.safetensors"])
def test_a_damaged_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"not what it should be")
    with pytest.raises(PaliGemmaError, match=name):
        MaskDecoder.load(tmp_path / name)


def test_a_file_that_lacks_a_tensor_or_codes_is_named(tmp_path):
    arrays = official_arrays(np.random.default_rng(0), width=32, code_width=8)
    lacking = {name: value for name, value in arrays.items() if name != "decoder.12.bias"}
    few_codes = {**arrays, "_vq_vae._embedding": arrays["_vq_vae._embedding"][:100]}
    for changed, problem in ((lacking, r"decoder\.12\.bias"), (few_codes, "has 100 rows, expected 128")):
        np.savez(tmp_path / "vae-oid.npz", **changed)
        with pytest.raises(PaliGemmaError, match=problem):
            MaskDecoder.load(tmp_path / "vae-oid.npz")


def test_damage_anywhere_in_a_file_is_a_sentence(tmp_path):
    path = tmp_path / "vae-oid.npz"
    np.savez_compressed(path, **official_arrays(np.random.default_rng(0), width=16, code_width=8))
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[rng.integers(0, 2000, 20)] = rng.integers(0, 256, 20)
        path.write_bytes(damaged.tobytes())
        with pytest.raises(PaliGemmaError, match=r"vae-oid\.npz"):
            MaskDecoder.load(path)


def test_a_checkpoint_decodes_masks_with_the_file_beside_it(long_winded, tmp_path):
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).symlink_to(EMBEDDED_FOLDER / name)
    np.savez(tmp_path / "vae-oid.npz", **official_arrays(np.random.default_rng(0)))
    vlm, codes = paligemma.load(tmp_path), list(range(16))
    with torch.inference_mode(), hardware.threads(vlm.engine.call(torch.get_num_threads)):
        expected = vlm.mask_decoder(torch.tensor([codes]))[0]
    assert torch.equal(torch.from_numpy(vlm.decode_mask(codes)), expected)
    assert long_winded.decode_mask(codes) is None, "no file there"


def test_a_truncated_official_file_is_named(tmp_path):
    path = tmp_path / "vae-oid.npz"
    np.savez(path, **official_arrays(np.random.default_rng(0), width=32, code_width=8))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(PaliGemmaError, match=r"vae-oid\.npz"):
        MaskDecoder.load(path)
