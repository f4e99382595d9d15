"""BERT and RoBERTa. The architecture's name in config.json says which head the file holds.

A model without a task's head (`BertModel`) is stored without the prefix that the others have. Heads that a loaded task
does not use (a pooler, next-sentence prediction) are left aside.
"""

from __future__ import annotations

from dataclasses import replace

from zero2hero.model_configs import PLAIN_ACTIVATIONS, EncoderConfig
from zero2hero.models.encoder import Encoder
from zero2hero.models.families.base import HeadedFamily, Rule, pairs, read_labels, spell_labels


def _body(prefix: str) -> tuple[Rule, ...]:
    layer, ours = f"{prefix}.encoder.layer.{{i}}", "layers.{i}"
    return (
        *(
            Rule(f"{prefix}.embeddings.{theirs}_embeddings.weight", f"embed_{name}.weight")
            for theirs, name in (("word", "tokens"), ("position", "positions"), ("token_type", "types"))
        ),
        *pairs(f"{prefix}.embeddings.LayerNorm", "embed_norm"),
        *pairs(f"{layer}.attention.self.query", f"{ours}.self_attn.q_proj"),
        *pairs(f"{layer}.attention.self.key", f"{ours}.self_attn.k_proj"),
        *pairs(f"{layer}.attention.self.value", f"{ours}.self_attn.v_proj"),
        *pairs(f"{layer}.attention.output.dense", f"{ours}.self_attn.o_proj"),
        *pairs(f"{layer}.attention.output.LayerNorm", f"{ours}.attention_norm"),
        *pairs(f"{layer}.intermediate.dense", f"{ours}.mlp.up_proj"),
        *pairs(f"{layer}.output.dense", f"{ours}.mlp.down_proj"),
        *pairs(f"{layer}.output.LayerNorm", f"{ours}.mlp_norm"),
    )


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


BERT = HeadedFamily(
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
    derive=read_labels,
    spell=spell_labels,
    rules=(
        *_body("bert"),
        *pairs("bert.pooler.dense", "head.pooler"),
        *pairs("cls.predictions.transform.dense", "head.transform"),
        *pairs("cls.predictions.transform.LayerNorm", "head.norm"),
        Rule("cls.predictions.bias", "head.decoder.bias"),
        *pairs("bert.pooler.dense", "head.dense"),
        *pairs("classifier", "head.out_proj"),
        *pairs("classifier", "head.classifier"),
        *pairs("qa_outputs", "head.ends"),
    ),
    ignored=(*_UNUSED, "cls.seq_relationship.weight", "cls.seq_relationship.bias"),
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
    derive=lambda theirs: read_labels(theirs) | {"position_offset": theirs["pad_token_id"] + 1},
    matches=lambda c: c.pad_token_id is not None and c.position_offset == c.pad_token_id + 1,
    rules=(
        *_body("roberta"),
        *pairs("roberta.pooler.dense", "head.pooler"),
        *pairs("lm_head.dense", "head.transform"),
        *pairs("lm_head.layer_norm", "head.norm"),
        Rule("lm_head.bias", "head.decoder.bias"),
        *pairs("classifier.dense", "head.dense"),
        *pairs("classifier.out_proj", "head.out_proj"),
        *pairs("classifier", "head.classifier"),
        *pairs("qa_outputs", "head.ends"),
    ),
    ignored=_UNUSED,
    older=(
        *_OLDER,
        (r"^lm_head\.decoder\.weight$", "roberta.embeddings.word_embeddings.weight"),
        (r"^lm_head\.decoder\.bias$", "lm_head.bias"),
    ),
)
