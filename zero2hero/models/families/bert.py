"""BERT and RoBERTa. The architecture's name in config.json says which head the file holds.

A model without a task's head (`BertModel`) is stored without the prefix that the others have. Heads that a loaded task
does not use (a pooler, next-sentence prediction) are left aside.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from zero2hero.model_configs import PLAIN_ACTIVATIONS, EncoderConfig
from zero2hero.models.encoder import Encoder
from zero2hero.models.families.base import Family, Rule

_KINDS = ("weight", "bias")


def _pairs(theirs: str, ours: str) -> tuple[Rule, ...]:
    return tuple(Rule(f"{theirs}.{kind}", f"{ours}.{kind}") for kind in _KINDS)


def _body(prefix: str) -> tuple[Rule, ...]:
    layer, ours = f"{prefix}.encoder.layer.{{i}}", "layers.{i}"
    return (
        *(
            Rule(f"{prefix}.embeddings.{theirs}_embeddings.weight", f"embed_{name}.weight")
            for theirs, name in (("word", "tokens"), ("position", "positions"), ("token_type", "types"))
        ),
        *_pairs(f"{prefix}.embeddings.LayerNorm", "embed_norm"),
        *_pairs(f"{layer}.attention.self.query", f"{ours}.self_attn.q_proj"),
        *_pairs(f"{layer}.attention.self.key", f"{ours}.self_attn.k_proj"),
        *_pairs(f"{layer}.attention.self.value", f"{ours}.self_attn.v_proj"),
        *_pairs(f"{layer}.attention.output.dense", f"{ours}.self_attn.o_proj"),
        *_pairs(f"{layer}.attention.output.LayerNorm", f"{ours}.attention_norm"),
        *_pairs(f"{layer}.intermediate.dense", f"{ours}.mlp.up_proj"),
        *_pairs(f"{layer}.output.dense", f"{ours}.mlp.down_proj"),
        *_pairs(f"{layer}.output.LayerNorm", f"{ours}.mlp_norm"),
    )


def _labels(theirs: dict[str, Any]) -> dict[str, Any]:
    names = theirs.get("id2label")
    if names is None:
        names = {i: f"LABEL_{i}" for i in range(theirs.get("num_labels", 2))}
    return {"id2label": {int(i): name for i, name in names.items()}}


def _spell_labels(config: EncoderConfig) -> dict[str, Any]:
    return {
        "id2label": {str(i): name for i, name in config.id2label.items()},
        "label2id": {name: i for i, name in config.id2label.items()},
    }


def _tasks(prefix: str) -> dict[str, dict[str, str]]:
    names = {
        "Model": "features",
        "ForMaskedLM": "masked_lm",
        "ForSequenceClassification": "sequence_classification",
        "ForTokenClassification": "token_classification",
        "ForQuestionAnswering": "question_answering",
        "ForPreTraining": "masked_lm",
    }
    return {prefix + name: {"task": task} for name, task in names.items()}


_UNUSED = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")
_OLDER = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))


@dataclass(frozen=True)
class EncoderFamily(Family):
    """A family whose files leave out the prefix when there is no head beside the pooler."""

    def rules_for(self, names: Collection[str]) -> list[Rule]:
        rules, prefix = super().rules_for(names), f"{self.model_type}."
        heads = {name for name in names if name.startswith("head.")}
        bare = heads <= {"head.pooler.weight", "head.pooler.bias"}
        return [replace(r, theirs=r.theirs.removeprefix(prefix)) for r in rules] if bare else rules


BERT = EncoderFamily(
    model_type="bert",
    architectures=_tasks("Bert"),
    config_class=EncoderConfig,
    build=Encoder,
    names={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_hidden_layers": "num_hidden_layers",
        "num_attention_heads": "num_attention_heads",
        "intermediate_size": "intermediate_size",
        "max_position_embeddings": "max_position_embeddings",
        "type_vocab_size": "type_vocab_size",
        "norm_eps": "layer_norm_eps",
        "feedforward": "hidden_act",
        "hidden_dropout_prob": "hidden_dropout_prob",
        "attention_probs_dropout_prob": "attention_probs_dropout_prob",
        "classifier_dropout": "classifier_dropout",
        "initializer_range": "initializer_range",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "pad_token_id",
    },  # fmt: skip
    constants={"position_offset": 0},
    defaults={"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
              "intermediate_size": 3072, "pad_token_id": 0},
    fixed={
        "hidden_act": PLAIN_ACTIVATIONS,
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    },  # fmt: skip
    written={"tie_word_embeddings": True},
    derive=_labels,
    spell=_spell_labels,
    rules=(
        *_body("bert"),
        *_pairs("bert.pooler.dense", "head.pooler"),
        *_pairs("cls.predictions.transform.dense", "head.transform"),
        *_pairs("cls.predictions.transform.LayerNorm", "head.norm"),
        Rule("cls.predictions.bias", "head.decoder.bias"),
        *_pairs("bert.pooler.dense", "head.dense"),
        *_pairs("classifier", "head.out_proj"),
        *_pairs("classifier", "head.classifier"),
        *_pairs("qa_outputs", "head.ends"),
    ),
    ignored=_UNUSED + tuple(f"cls.seq_relationship.{kind}" for kind in _KINDS),
    older=(
        *_OLDER,
        (r"^cls\.predictions\.decoder\.weight$", "bert.embeddings.word_embeddings.weight"),
        (r"^cls\.predictions\.decoder\.bias$", "cls.predictions.bias"),
    ),
)  # fmt: skip

ROBERTA = replace(
    BERT,
    model_type="roberta",
    architectures=_tasks("Roberta"),
    constants={},
    defaults={**BERT.defaults, "vocab_size": 50265, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    fixed={**BERT.fixed, "hidden_act": ("gelu",)},
    # the row of a padding token is never learned, and the first token stands behind it
    derive=lambda theirs: _labels(theirs) | {"position_offset": theirs["pad_token_id"] + 1},
    matches=lambda c: c.pad_token_id is not None and c.position_offset == c.pad_token_id + 1,
    rules=(
        *_body("roberta"),
        *_pairs("roberta.pooler.dense", "head.pooler"),
        *_pairs("lm_head.dense", "head.transform"),
        *_pairs("lm_head.layer_norm", "head.norm"),
        Rule("lm_head.bias", "head.decoder.bias"),
        *_pairs("classifier.dense", "head.dense"),
        *_pairs("classifier.out_proj", "head.out_proj"),
        *_pairs("classifier", "head.classifier"),
        *_pairs("qa_outputs", "head.ends"),
    ),
    ignored=_UNUSED,
    older=(
        *_OLDER,
        (r"^lm_head\.decoder\.weight$", "roberta.embeddings.word_embeddings.weight"),
        (r"^lm_head\.decoder\.bias$", "lm_head.bias"),
    ),
)
