"""llama.cpp's decoder in the shapes of a checkpoint, for `full_size.py`: `pip install llama-cpp-python gguf`.

It has no vision encoder: the image's positions are tokens like any others. Weights are random, and those of a shape are
the same in all layers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from paligemma.config import PaliGemmaConfig, TextConfig
from paligemma.processor import Processor

ROWS = 1024  # of a matrix that are drawn and quantized; the others repeat them


class LlamaCpp:
    """The decoder alone, as llama-cpp-python runs it; it has the interface of `full_size.Ours`."""

    def __init__(self, folder: Path, dtype: str):
        from llama_cpp import Llama

        config = PaliGemmaConfig.from_file(folder / "config.json")
        file = write_gguf(config.text, folder.with_name(f"{folder.name}-{dtype}.gguf"), dtype)
        self.processor = Processor.from_file(config, folder / "tokenizer.json")
        started = time.perf_counter()
        threads = torch.get_num_threads()
        self.llama = Llama(str(file), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
        self.load_seconds = time.perf_counter() - started
        self.model = nn.Module()  # its weights are none of torch's

    def answer(self, image: Image.Image, prompt: str, count: int) -> Iterator[int]:
        """The ids of the first `count` tokens of the greedy answer; of the image only the number of its patches counts."""
        self.llama.reset()
        ids = self.processor.input_ids(prompt)
        for _ in range(count):
            self.llama.eval(ids)
            ids = [self.llama.sample(temp=0.0, top_k=1, repeat_penalty=1.0)]
            yield ids[0]


def write_gguf(config: TextConfig, file: Path, dtype: str) -> Path:
    """Write random weights for llama.cpp's `gemma`, all matrices in `dtype`, unless the file is there."""
    if file.exists():
        return file
    import gguf

    kind = gguf.GGMLQuantizationType[dtype]
    unfinished = file.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(unfinished, "gemma")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{number}>" for number in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)

    generator, matrices = np.random.default_rng(0), {}

    def add(name: str, rows: int, columns: int) -> None:
        if (rows, columns) not in matrices:
            drawn = generator.standard_normal((min(rows, ROWS), columns), dtype=np.float32) * columns**-0.5
            matrices[rows, columns] = _repeat(gguf.quants.quantize(drawn, kind), rows)
        writer.add_tensor(name, matrices[rows, columns], raw_dtype=kind)

    width, queries = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    add("token_embd.weight", config.vocab_size, width)
    for layer in range(config.num_hidden_layers):
        add(f"blk.{layer}.attn_q.weight", queries, width)
        add(f"blk.{layer}.attn_k.weight", keys, width)
        add(f"blk.{layer}.attn_v.weight", keys, width)
        add(f"blk.{layer}.attn_output.weight", width, queries)
        add(f"blk.{layer}.ffn_gate.weight", config.intermediate_size, width)
        add(f"blk.{layer}.ffn_up.weight", config.intermediate_size, width)
        add(f"blk.{layer}.ffn_down.weight", width, config.intermediate_size)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(width, dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.ones(width, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return unfinished.rename(file)


def _repeat(rows: np.ndarray, count: int) -> np.ndarray:
    """The first `count` of the rows, again and again."""
    return np.tile(rows, (-(-count // len(rows)), 1))[:count]
