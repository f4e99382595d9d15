"""Run by test_transformers_4.py in an environment of its own, where `transformers` is a version 4.

write FOLDER   tiny random checkpoints in FOLDER/NAME/theirs and what each answers, in FOLDER/NAME/answers.safetensors
check FOLDER   loads FOLDER/NAME/ours and prints, as JSON, how far each is from those answers
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TEXT = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 56}
DECODER = TEXT | {"num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
                  "pad_token_id": None}  # fmt: skip
ROPE = {"type": "linear", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 12}
GEMMA = DECODER | {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 5}
T5 = {"vocab_size": 61, "d_model": 32, "d_kv": 6, "d_ff": 56, "num_layers": 2, "num_heads": 4,
      "decoder_start_token_id": 0}  # fmt: skip

# name -> (class, settings)
CASES = {
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 61, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "llama": ("LlamaForCausalLM", DECODER | {"rope_theta": 5e5, "tie_word_embeddings": True}),
    "llama, linear": ("LlamaForCausalLM", DECODER | {"rope_scaling": ROPE}),
    "llama, llama3": ("LlamaForCausalLM", DECODER | {"head_dim": 32, "rope_theta": 5e3, "rope_scaling": LLAMA3}),
    "llama, yarn": ("LlamaForCausalLM", DECODER | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    "mistral": ("MistralForCausalLM", DECODER | {"sliding_window": 5}),
    "qwen2": ("Qwen2ForCausalLM", DECODER),
    "qwen2, window": ("Qwen2ForCausalLM", DECODER | QWEN_WINDOW),
    "qwen3": ("Qwen3ForCausalLM", DECODER | {"head_dim": 12, "rope_theta": 1e6}),
    "mixtral": ("MixtralForCausalLM", DECODER | {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", DECODER | QWEN_MOE),
    "gemma": ("GemmaForCausalLM", DECODER | {"head_dim": 12}),
    "gemma2": ("Gemma2ForCausalLM", GEMMA),
    "gemma3": ("Gemma3ForCausalLM", GEMMA | {"rope_theta": 5e3, "rope_local_base_freq": 100.0}),
    "arcee": ("ArceeForCausalLM", DECODER | {"head_dim": 8}),
    "t5 1.0": ("T5ForConditionalGeneration", T5),
    "t5 1.1": ("T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    **{
        kind: (kind, TEXT | {"max_position_embeddings": 40})
        for family in ("Bert", "Roberta")
        for kind in (
            f"{family}Model", f"{family}ForMaskedLM", f"{family}ForSequenceClassification",
            f"{family}ForTokenClassification", f"{family}ForQuestionAnswering",
        )
    },
}  # fmt: skip


def ids() -> torch.Tensor:
    """[3, 20]; without the ids by which an encoder there knows padding."""
    return torch.randint(4, 61, (3, 20), generator=torch.Generator().manual_seed(1))


def answer(model) -> torch.Tensor:
    """Logits, where a question's answer begins, or hidden states."""
    inputs = {"decoder_input_ids": ids()[:, :12]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        said = model.eval()(ids(), **inputs)
    name = next(n for n in ("logits", "start_logits", "last_hidden_state") if getattr(said, n, None) is not None)
    return said[name].contiguous()


def main(mode: str, folder: Path) -> None:
    import transformers

    assert transformers.__version__.startswith("4."), transformers.__version__
    distances = {}
    for name, (kind, settings) in CASES.items():
        model_class, place = getattr(transformers, kind), folder / name
        if mode == "write":
            torch.manual_seed(7)
            model = model_class._from_config(model_class.config_class(**settings), attn_implementation="eager")
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    parameter.normal_(1.0 if "norm" in key.lower() and key.endswith("weight") else 0.0, 0.2)
            model.save_pretrained(place / "theirs")
            save_file({"answer": answer(model)}, place / "answers.safetensors")
        else:
            model, report = model_class.from_pretrained(
                place / "ours", output_loading_info=True, attn_implementation="eager"
            )
            assert not any(report.values()), (name, report)
            wanted = load_file(place / "answers.safetensors")["answer"]
            distances[name] = float((answer(model) - wanted).abs().max())
    print(json.dumps(distances))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
