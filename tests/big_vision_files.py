"""Writes a model as big_vision does, by its documented layout: the inverse of reading it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

VISION, TEXT = "params/img/Transformer/encoderblock/", "params/llm/layers/"
ATTENTION = VISION + "MultiHeadDotProductAttention_0/"


def big_vision_arrays(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The arrays that big_vision saves of a model: layers stacked, heads apart, matrices [in, out]."""
    weights = {name: value.detach() for name, value in model.named_parameters()}
    text, vision_heads = model.config.text, (model.config.vision.num_attention_heads, -1)

    def stack(prefix, names, arrange):
        layers = [name.removesuffix(names) for name in weights if name.startswith(prefix) and name.endswith(names)]
        return torch.stack([arrange(weights[layer + names]) for layer in layers])

    def vision(name, arrange=lambda weight: weight):
        return stack("vision_tower.", name, arrange)

    def language(name, arrange=lambda weight: weight):
        return stack("language_model.", name, arrange)

    def by_head(heads):  # [heads * head_dim, in] to [heads, in, head_dim]
        return lambda weight: weight.unflatten(0, (heads, -1)).transpose(1, 2)

    arrays = {
        "params/img/embedding/kernel": weights["vision_tower.embeddings.patch_embedding.weight"].permute(2, 3, 1, 0),
        "params/img/embedding/bias": weights["vision_tower.embeddings.patch_embedding.bias"],
        "params/img/pos_embedding": weights["vision_tower.embeddings.position_embedding.weight"][None],
        "params/img/Transformer/encoder_norm/scale": weights["vision_tower.post_layernorm.weight"],
        "params/img/Transformer/encoder_norm/bias": weights["vision_tower.post_layernorm.bias"],
        "params/img/head/kernel": weights["multi_modal_projector.linear.weight"].T,
        "params/img/head/bias": weights["multi_modal_projector.linear.bias"],
        VISION + "LayerNorm_0/scale": vision("layer_norm1.weight"),
        VISION + "LayerNorm_0/bias": vision("layer_norm1.bias"),
        VISION + "LayerNorm_1/scale": vision("layer_norm2.weight"),
        VISION + "LayerNorm_1/bias": vision("layer_norm2.bias"),
        VISION + "MlpBlock_0/Dense_0/kernel": vision("mlp.fc1.weight", torch.t),
        VISION + "MlpBlock_0/Dense_0/bias": vision("mlp.fc1.bias"),
        VISION + "MlpBlock_0/Dense_1/kernel": vision("mlp.fc2.weight", torch.t),
        VISION + "MlpBlock_0/Dense_1/bias": vision("mlp.fc2.bias"),
        ATTENTION + "out/kernel": vision("out_proj.weight", lambda weight: weight.T.unflatten(0, vision_heads)),
        ATTENTION + "out/bias": vision("out_proj.bias"),
        "params/llm/embedder/input_embedding": weights["language_model.embed_tokens.weight"],
        "params/llm/final_norm/scale": weights["language_model.norm.weight"],
        TEXT + "attn/q_einsum/w": language("q_proj.weight", by_head(text.num_attention_heads)),
        TEXT + "attn/kv_einsum/w": torch.stack(
            [language(f"{one}_proj.weight", by_head(text.num_key_value_heads)) for one in "kv"], dim=1
        ),
        TEXT + "attn/attn_vec_einsum/w": language(
            "o_proj.weight", lambda weight: weight.T.unflatten(0, (text.num_attention_heads, -1))
        ),
        TEXT + "mlp/gating_einsum": torch.stack(
            [language("gate_proj.weight", torch.t), language("up_proj.weight", torch.t)], dim=1
        ),
        TEXT + "mlp/linear": language("down_proj.weight", torch.t),
        TEXT + "pre_attention_norm/scale": language("input_layernorm.weight"),
        TEXT + "pre_ffw_norm/scale": language("post_attention_layernorm.weight"),
    }
    for array, layer in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        arrays[f"{ATTENTION}{array}/kernel"] = vision(
            f"{layer}.weight", lambda weight: weight.T.unflatten(1, vision_heads)
        )
        arrays[f"{ATTENTION}{array}/bias"] = vision(f"{layer}.bias", lambda bias: bias.unflatten(0, vision_heads))
    if "language_model.layers.0.post_feedforward_layernorm.weight" in weights:
        arrays[TEXT + "post_attention_norm/scale"] = language("post_attention_layernorm.weight")
        arrays[TEXT + "pre_ffw_norm/scale"] = language("pre_feedforward_layernorm.weight")
        arrays[TEXT + "post_ffw_norm/scale"] = language("post_feedforward_layernorm.weight")
    return arrays


def save_npz(path: Path, arrays: dict[str, torch.Tensor], save=np.savez) -> Path:
    """Write the arrays as numpy does; bfloat16, which it does not know, as two bytes of anything."""
    path.parent.mkdir(exist_ok=True)
    save(
        path,
        **{
            name: array.contiguous().view(torch.int16).numpy().view("V2")
            if array.dtype == torch.bfloat16
            else array.contiguous().numpy()
            for name, array in arrays.items()
        },
    )
    return path
