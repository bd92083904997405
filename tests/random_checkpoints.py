"""Checkpoints of any shape with random weights, written by transformers: the reference that ours is compared with."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

TOKENIZER = Path(__file__).parent.parent / "paligemma" / "tiny" / "tokenizer.json"
VOCABULARY = Tokenizer.from_file(str(TOKENIZER))


def make_reference(
    *,
    family: str = "gemma",
    image_size: int = 56,
    patch_size: int = 14,
    hidden_size: int = 64,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 1,
    head_dim: int = 32,
    intermediate_size: int = 128,
    sliding_window: int = 24,
    epsilon: float = 1e-6,
    std: float = 0.02,
    seed: int = 0,
) -> PaliGemmaForConditionalGeneration:
    """A reference model over the embedded checkpoint's vocabulary; every matrix is drawn with deviation `std`.

    All but the token embedding: were it as large, each token would predict itself, the output layer being the same.
    What only `gemma2` has is so that it shows: low caps, a query scale of its own, a short window.
    """
    gemma2 = {
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 20,
        "sliding_window": sliding_window,
    }
    vocab_size = VOCABULARY.get_vocab_size()
    config = PaliGemmaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": image_size,
            "patch_size": patch_size,
            "vision_use_head": False,
            "layer_norm_eps": epsilon,
        },
        text_config={
            "model_type": family,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "vocab_size": vocab_size,
            "rms_norm_eps": epsilon,
            "max_position_embeddings": (image_size // patch_size) ** 2 + 1024,
            **(gemma2 if family == "gemma2" else {}),
        },
        projection_dim=hidden_size,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        image_token_index=VOCABULARY.token_to_id("<image>"),
    )
    torch.manual_seed(seed)
    model = PaliGemmaForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed_tokens" not in name:
            torch.nn.init.normal_(parameter, std=std)
        elif "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def reference_inputs(
    pixel_values: Tensor, input_ids: Tensor, prefix_lengths: Tensor | None = None, attention_mask: Tensor | None = None
) -> dict[str, Tensor]:
    """What the reference takes for the arguments of ours: token types are 0 in the prefix, 1 from its end on."""
    ends = torch.tensor([input_ids.shape[1]]) if prefix_lengths is None else prefix_lengths
    return {
        "pixel_values": pixel_values,
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids) if attention_mask is None else attention_mask,
        "token_type_ids": (torch.arange(input_ids.shape[1]) >= ends[:, None]).long().expand_as(input_ids),
    }


def save_reference(model: PaliGemmaForConditionalGeneration, folder: Path, max_shard_size: str = "5GB") -> Path:
    """Write the model and its tokenizer as a checkpoint folder."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    shutil.copy(TOKENIZER, folder / "tokenizer.json")
    return folder
