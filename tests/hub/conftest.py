"""A Hub on this machine."""

from __future__ import annotations

import re
import time

import huggingface_hub
import pytest
import torch
from hub_server import HubServer
from huggingface_hub.utils import _http
from tokenizers import Tokenizer

from paligemma.checkpoints import EMBEDDED_FOLDER, save_checkpoint
from paligemma.config import PaliGemmaConfig, TextConfig, VisionConfig
from paligemma.model import PaliGemma


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with no repositories; the library asks it, and keeps its cache and token in `tmp_path`."""
    server = HubServer()
    # The library reads its environment once, when it is first imported.
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    # It knows the Hub's routes, and so a repository that it may not see, by https only.
    pattern = _http.REPO_API_REGEX
    monkeypatch.setattr(
        _http, "REPO_API_REGEX", re.compile(pattern.pattern.replace("https:", "https?:"), pattern.flags)
    )
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # It waits up to half a minute between its attempts.
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()
    server.close()


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A checkpoint that loads at once and is none other, with files beside it that no loader needs."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = Tokenizer.from_file(str(EMBEDDED_FOLDER / "tokenizer.json"))
    vision = VisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = TextConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
    )
    config = PaliGemmaConfig(vision, text, image_token_id=tokenizer.token_to_id("<image>"))
    save_checkpoint(PaliGemma(config), tokenizer, folder, torch.float32)
    return folder
