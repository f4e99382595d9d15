"""The multi-layer perceptron, a family of our own: transformers has none."""

from __future__ import annotations

from zero2hero.model_configs import MLPConfig
from zero2hero.models.families.base import Family, pairs, read_labels, spell_labels
from zero2hero.models.mlp import MLP

MLP_FAMILY = Family(
    model_type="zero2hero_mlp",
    architectures={"MLPForImageClassification": {}},
    config_class=MLPConfig,
    build=MLP,
    names={name: name for name in ("hidden_sizes", "image_size", "num_channels", "activation", "dropout")},
    constants={},
    required=("hidden_sizes", "image_size", "num_channels", "activation"),
    derive=read_labels,
    spell=spell_labels,
    rules=(*pairs("layers.{i}", "layers.{i}"), *pairs("classifier", "classifier")),
)
