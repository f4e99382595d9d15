"""A contrastive loss sees the batches of all ranks: two ranks with half the pairs each are one with all of them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from ranks import together

from zero2hero.model_configs import CLIP_TOWER, SIGLIP_TOWER, text_tower
from zero2hero.models import VisionConfig, VisionText, VisionTextConfig
from zero2hero.train.objectives import sigmoid_contrastive, softmax_contrastive
from zero2hero.train.parallel import Ranks

OBJECTIVES = {"softmax": softmax_contrastive, "sigmoid": sigmoid_contrastive}


def gradients(loss: str, rows: slice) -> tuple[list[torch.Tensor], float]:
    """The summed loss's gradients by these rows of a batch of six pairs, and its weight."""
    vision = VisionConfig(16, 1, 2, image_size=4, **(CLIP_TOWER if loss == "softmax" else SIGLIP_TOWER))
    text = text_tower(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                      max_position_embeddings=6, eos_token_id=19)  # fmt: skip
    model = VisionText(VisionTextConfig(text, vision, loss, 16))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    ids = torch.randint(18, (6, 6), generator=generator)
    ids[:, 5] = 19
    pixels = torch.randn(6, 3, 4, 4, generator=generator)
    result = OBJECTIVES[loss](model, SimpleNamespace(ids_BT=ids[rows], pixels_BCHW=pixels[rows]))
    result.sum.backward()
    return [p.grad for p in model.parameters()], float(result.weight)


def of_half(ranks: Ranks) -> dict[str, tuple[list[torch.Tensor], float]]:
    return {loss: gradients(loss, slice(3 * ranks.rank, 3 * ranks.rank + 3)) for loss in OBJECTIVES}


def test_two_ranks_equal_one():
    halves = together(2, of_half)
    for loss in OBJECTIVES:
        expected, weight = gradients(loss, slice(6))
        assert sum(half[loss][1] for half in halves) == weight == 6
        parts = zip(*(half[loss][0] for half in halves), strict=True)
        for name, (one, both) in enumerate(zip(expected, parts, strict=True)):
            assert torch.allclose(one, sum(map(torch.as_tensor, both)), atol=1e-5), name
        assert max(g.abs().max() for g in expected) > 0.01
