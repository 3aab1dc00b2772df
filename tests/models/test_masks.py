"""The masks that tests make in less time (``conftest.broadcast_masks``) are those that transformers makes."""

from __future__ import annotations

import pytest
import torch
from transformers import masking_utils

from conftest import broadcast_masks

pytestmark = pytest.mark.skipif(
    not hasattr(masking_utils, "_vmap_for_bhqkv"), reason="transformers 5 makes its masks so by itself"
)
PATTERNS = {
    "causal": masking_utils.causal_mask_function,
    "sliding": masking_utils.sliding_window_causal_mask_function(3),
    "chunked": masking_utils.chunked_causal_mask_function(4, torch.tensor([0, 2])),
    "packed": masking_utils.packed_sequence_mask_function(torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 2]])),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("padded", [False, True])
def test_masks_are_those_of_the_library(monkeypatch, pattern: str, padded: bool) -> None:
    def vmapped(mask, bh_indices: bool = True):
        axes = [(None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)]
        for dimensions in axes:
            mask = torch.vmap(mask, in_dims=dimensions, out_dims=0)
        return mask

    attention = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]], dtype=torch.bool) if padded else None
    found = []
    for own in (False, True):
        monkeypatch.setattr(masking_utils, "_vmap_for_bhqkv", vmapped)
        if own:
            broadcast_masks()
        found.append(
            masking_utils.sdpa_mask(
                batch_size=2, cache_position=torch.arange(7), kv_length=7, mask_function=PATTERNS[pattern],
                attention_mask=attention, allow_is_causal_skip=False,
            )
        )  # fmt: skip
    assert found[0].shape == found[1].shape == (2, 1, 7, 7)
    assert torch.equal(*found)
