"""What the tests of models that see share: small random models of transformers, and both ways between the formats."""

from __future__ import annotations

import pytest
import torch

from zero2hero.models import (
    from_pretrained,
    save_pretrained,
)

transformers = pytest.importorskip("transformers")


VISION = {
    "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 12,
    "patch_size": 4,
}  # fmt: skip


def randomize(model, seed: int = 7):
    """Every weight of it random: biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = parameter.dim() == 1 and "norm" in name.lower() and name.endswith("weight")
            parameter.normal_(1.0 if norm else 0.0, 0.3, generator=generator)
    return model.eval()


def there_and_back(theirs, folder):
    """(their model, our model, folder with their file, folder with ours)."""
    theirs.save_pretrained(folder / "theirs")
    ours = from_pretrained(folder / "theirs")
    save_pretrained(ours, folder / "ours")
    return theirs, ours, folder / "theirs", folder / "ours"


def reread(theirs, folder):
    """Loaded by transformers, which must find every tensor and no other, byte for byte the same."""
    again, report = type(theirs).from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(report.values()), report
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    return again.eval()


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert want.std() > 0.01, "a test of numbers that hardly differ proves nothing"
    assert (got - want).abs().max() < 1e-4


def same_config(theirs_folder, ours_folder, left_out=()) -> None:
    before, after = (transformers.AutoConfig.from_pretrained(f).to_dict() for f in (theirs_folder, ours_folder))
    for config in (before, after):
        for key in ("_name_or_path", "label2id", *left_out):
            config.pop(key, None)
        for nested in (config, config.get("text_config", {}), config.get("vision_config", {})):
            for key in ("dtype", "_name_or_path", "head_dim"):  # null and its meaning are two spellings of one thing
                nested.pop(key, None)
    for key in ("text_config", "vision_config"):
        assert before.pop(key, None) == after.pop(key, None)
    assert before == after


def pixels(config, count: int = 3) -> torch.Tensor:
    shape = (count, config.num_channels, config.image_size, config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return ids, (torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]).long()
