"""Supervised fine-tuning against TRL: the same first adapter, tokens, order and settings end in the same adapter.

bench/sft_trl.py does it at length, each side with first weights of its own.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zero2hero.data.conversations import read_records
from zero2hero.data.examples import encode_records
from zero2hero.data.packed import PackedBatches
from zero2hero.models import from_pretrained
from zero2hero.tokenizer import Tokenizer
from zero2hero.train.sft import sft
from zero2hero.tune import add_lora, save_adapter
from zero2hero.tune.config import LoraConfig
from zero2hero.tuning_configs import SftConfig, tuning_defaults

STEPS, ROWS = 8, 4


def test_the_same_run_of_a_real_model_ends_in_the_same_adapter(tmp_path, shared_data, one_thread):
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    import transformers
    from datasets import Dataset
    from torch.utils.data import SequentialSampler

    model = shared_data / "tinystories656k"
    rows = json.loads((shared_data / "rasbt_instruct" / "instruction-data.json").read_text())[: STEPS * ROWS + 4]
    data = tmp_path / "data.jsonl"
    pairs = [{"prompt": f"{row['instruction']}\n{row['input']}", "completion": f" {row['output']}"} for row in rows]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    lora = LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM")
    train = dataclasses.replace(
        tuning_defaults(), learning_rate=2e-3, max_steps=STEPS, warmup_steps=0.0, per_device_train_batch_size=ROWS
    )
    config = SftConfig(
        model=str(model), data=str(data), eval_data=str(data), output_dir=str(tmp_path / "ours"), train=train,
        lora=lora, precision="fp32", packing=False, chat_template="alpaca", report_to=[],
    )  # fmt: skip
    sft(config)

    save_adapter(add_lora(from_pretrained(model), lora, seed=train.seed), tmp_path / "first")
    examples = encode_records(read_records(str(data)), Tokenizer.from_pretrained(model), max_length=512).examples
    batches = PackedBatches(examples, 512, ROWS, train.seed, packing=False)
    order = [examples[i] for (i,) in batches._rows(0)]

    class InOrder(trl.SFTTrainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    base = transformers.LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    trainer = InOrder(
        peft.PeftModel.from_pretrained(base, tmp_path / "first", is_trainable=True),
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "theirs"), per_device_train_batch_size=ROWS, max_steps=STEPS, learning_rate=2e-3,
            lr_scheduler_type="linear", report_to=[], save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
            gradient_checkpointing=False, completion_only_loss=True, max_length=512, dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list(
            [{"input_ids": e.ids.tolist(), "completion_mask": (e.weights > 0).astype(int).tolist()} for e in order]
        ),
        processing_class=transformers.AutoTokenizer.from_pretrained(model),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "theirs"))
    first, ours, theirs = (load_adapter_file(tmp_path / name) for name in ("first", "ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        moved = (ours[name] - first[name]).norm()
        assert (ours[name] - theirs[name]).norm() < 0.02 * moved, name


def load_adapter_file(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")
