"""A small tokenizer in the form of Gemma's: BPE with byte fallback, spaces as `▁`, loc, seg and image tokens last."""

from __future__ import annotations

import json
import string

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ..config import LOC_TOKENS, SEG_TOKENS
from .tasks import every_text

CONTROL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>"]
IMAGE_TOKEN = "<image>"
NUM_PIECES = 1500  # words and pieces of words: more than the tasks' words need to be one token each


def build_tokenizer() -> Tokenizer:
    """Learn the words of the tasks; other texts fall apart into letters and bytes, but none is refused."""
    learned = _learn_pieces()
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    pieces = [piece for piece, _ in sorted(learned["vocab"].items(), key=lambda item: item[1])]
    pieces += [letter for letter in "\n▁" + string.printable[:95] if letter != " " and letter not in learned["vocab"]]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(CONTROL_TOKENS + bytes_ + pieces))}
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    _split_like_gemma(tokenizer)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in LOC_TOKENS + SEG_TOKENS])
    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, normalized=False)])
    return tokenizer


def _learn_pieces() -> dict:
    """Vocabulary and merges of a BPE trained on the texts of the tasks."""
    tokenizer = Tokenizer(models.BPE())
    _split_like_gemma(tokenizer)
    tokenizer.train_from_iterator(every_text(), trainers.BpeTrainer(vocab_size=NUM_PIECES, show_progress=False))
    return json.loads(tokenizer.to_str())["model"]


def _split_like_gemma(tokenizer: Tokenizer) -> None:
    """A word owns the space before it; punctuation and line ends stand alone."""
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("▁", "merged_with_next"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
