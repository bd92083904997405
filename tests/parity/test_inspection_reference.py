"""What `inspect` shows of a step equals what transformers hands out with eager attention, on random checkpoints."""

from __future__ import annotations

import pytest
import torch
from random_checkpoints import reference_inputs
from test_parity import FAMILIES, random_image

PROMPT = "answer en how many cats are there?"
BOUND = 1e-5


@torch.no_grad()
def reference_of(reference, vlm, images, answer_ids):
    """The reference's outputs over a whole answer, with attention and hidden states, and the length of its prefix."""
    prefix = vlm.processor.input_ids(PROMPT, len(images))
    input_ids = torch.tensor([prefix + answer_ids])
    pixel_values = torch.cat([vlm.processor.pixel_values(image) for image in images])
    inputs = reference_inputs(pixel_values, input_ids, torch.tensor([len(prefix)]))
    return reference(**inputs, output_attentions=True, output_hidden_states=True), len(prefix)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kv_heads", "count", "sliding_window"), [(1, 1, 24), (2, 2, 24), (4, 1, 5)])
@torch.no_grad()
def test_attention_and_lens_equal_the_reference(load_both, family, kv_heads, count, sliding_window):
    reference, vlm = load_both(family=family, kv_heads=kv_heads, std=0.2, sliding_window=sliding_window)
    images = [random_image(seed) for seed in range(count)]
    answer = vlm.stream(images, PROMPT, max_new_tokens=12)
    assert len(list(answer)) > 8
    outputs, prefix = reference_of(reference, vlm, images, answer.token_ids)
    decoder, cap = reference.model.language_model, vlm.config.text.final_logit_softcapping
    for index in range(len(answer.token_ids)):
        seen = answer.inspect(index)
        row = prefix + index - 1
        expected = torch.cat(outputs.attentions)[:, :, row]  # [layers, heads, T]
        assert not expected[..., row + 1 :].any()
        assert seen.position == row
        assert (torch.from_numpy(seen.attention) - expected[..., : row + 1]).abs().max() <= BOUND
        # The last of the reference's hidden states is after the last norm, the others are not.
        states = [
            *(decoder.norm(one[0, row]) for one in outputs.hidden_states[1:-1]),
            outputs.hidden_states[-1][0, row],
        ]
        logits = reference.lm_head(torch.stack(states))
        probabilities = (logits if cap is None else cap * (logits / cap).tanh()).softmax(-1)
        for entry, after_layer in zip(seen.lens, probabilities, strict=True):
            assert entry.probability == pytest.approx(after_layer.max().item(), abs=BOUND)
            assert after_layer[entry.id] == pytest.approx(entry.probability, abs=BOUND)
        assert seen.token.probability == pytest.approx(probabilities[-1, answer.token_ids[index]].item(), abs=BOUND)


@torch.no_grad()
def test_what_a_patch_attends_to_equals_the_reference(load_both):
    reference, vlm = load_both(std=0.2)
    image = random_image(0)
    tower = reference.model.vision_tower
    expected = torch.cat(tower(vlm.processor.pixel_values(image), output_attentions=True).attentions)
    for patch in (0, 9, 15):
        seen = vlm.inspect_encoder(image, patch)
        assert seen.grid == (4, 4)
        assert (seen.heat_map(1, 2) == seen.attention[1, 2].reshape(4, 4)).all()
        assert (torch.from_numpy(seen.attention) - expected[:, :, patch]).abs().max() <= BOUND
