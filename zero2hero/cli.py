"""The command line: one verb per rung of the road.

Thin on purpose: a table. What a verb can be told is a dataclass, what it does a function that takes it; both are
imported when the verb is used. Bad input of any kind is one clear line on the error stream and exit code 2; being
stopped by Ctrl-C or SIGTERM is 130 or 143, after saving; a run that did not do what it is for is 1.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence

from zero2hero.command_line import Verb, named, parse
from zero2hero.errors import FellShort, Stopped, UserError, did_you_mean

VERBS = {
    "quickstart": Verb(
        "Take raw text to a model that writes stories, in a few minutes, and show what to type next.",
        "zero2hero.options:QuickstartConfig",
        "zero2hero.quickstart:run",
        ("zero2hero quickstart", "zero2hero quickstart --seed 7"),
    ),
    "pretrain": Verb(
        "Train a language model from scratch on your own text.",
        "zero2hero.config:PretrainConfig",
        "zero2hero.train.pretrain:pretrain",
        (
            "zero2hero pretrain --data book.txt --output_dir runs/book --train.max_steps 500",
            "zero2hero pretrain --data '[stories, notes/]' --model.hidden_size 256 --model.num_attention_heads 8",
            "zero2hero pretrain --data crawl/ --streaming --train.max_steps 20000 --output_dir runs/crawl",
            "zero2hero pretrain --config recipes/tiny_stories_cpu.yaml --train.learning_rate 1e-3",
            "zero2hero pretrain --data book.txt --output_dir runs/book --train.max_steps 500 --resume",
        ),
    ),
    "train fill-mask": Verb(
        "Pretrain an encoder (BERT): it guesses masked words from both sides.",
        "zero2hero.task_configs:FillMaskConfig",
        "zero2hero.train.fill_mask:train",
        (
            "zero2hero train fill-mask --data book.txt --output_dir runs/bert --train.max_steps 500",
            "zero2hero train fill-mask --whole_words --model.hidden_size 256 --model.num_attention_heads 8",
        ),
    ),
    "train text-classification": Verb(
        "Train an encoder to label texts, or to rate them with a number.",
        "zero2hero.task_configs:TextClassificationConfig",
        "zero2hero.train.text_classification:train",
        (
            "zero2hero train text-classification --train.max_steps 600",
            "zero2hero train text-classification --data reviews.tsv --base_model runs/bert --output_dir runs/reviews",
            "zero2hero train text-classification --data train.tsv --validation_data dev.tsv "
            "--text_column 1 --label_column 2",
            "zero2hero train text-classification --data sts.csv --text_column 1 --text_pair_column 2 "
            "--label_column 3 --num_labels 1",
        ),
    ),
    "train token-classification": Verb(
        "Train an encoder to label words: to find names.",
        "zero2hero.task_configs:TokenClassificationConfig",
        "zero2hero.train.token_classification:train",
        (
            "zero2hero train token-classification --train.max_steps 300",
            "zero2hero train token-classification --data conll.jsonl --base_model runs/bert --output_dir runs/ner",
        ),
    ),
    "train question-answering": Verb(
        "Train an encoder to find the answer to a question in a text.",
        "zero2hero.task_configs:QuestionAnsweringConfig",
        "zero2hero.train.question_answering:train",
        (
            "zero2hero train question-answering --base_model runs/bert --train.max_steps 600",
            "zero2hero train question-answering --data squad.parquet --base_model runs/bert --output_dir runs/qa",
        ),
    ),
    "train text2text-generation": Verb(
        "Train an encoder-decoder (T5) to turn a text into another: translate, summarize, answer.",
        "zero2hero.task_configs:Text2TextConfig",
        "zero2hero.train.text2text_generation:train",
        (
            "zero2hero train text2text-generation --data reversal --train.max_steps 600",
            "zero2hero train text2text-generation --data '[train.en, train.de]' "
            "--validation_data '[val.en, val.de]' --metric bleu",
            "zero2hero train text2text-generation --data book.txt --span_corruption --output_dir runs/t5",
            "zero2hero train text2text-generation --data pairs.jsonl --base_model runs/t5",
        ),
    ),
    "train image-classification": Verb(
        "Train a vision Transformer or a multi-layer perceptron to label images.",
        "zero2hero.task_configs:ImageClassificationConfig",
        "zero2hero.train.image_classification:train",
        (
            "zero2hero train image-classification --data photos/ --output_dir runs/photos",
            "zero2hero train image-classification --data digits --architecture mlp --mlp.dropout 0.2",
            "zero2hero train image-classification --data photos/ --base_model google/vit-base-patch16-224",
        ),
    ),
    "train zero-shot-image-classification": Verb(
        "Train a CLIP or SigLIP on images and captions, to tell which of any texts belongs to an image.",
        "zero2hero.task_configs:ZeroShotImageConfig",
        "zero2hero.train.zero_shot_image_classification:train",
        (
            "zero2hero train zero-shot-image-classification --data captions.jsonl --output_dir runs/clip",
            "zero2hero train zero-shot-image-classification --data shapes:20000 --train.max_steps 500",
        ),
    ),
    "train image-text-to-text": Verb(
        "Train a LLaVA: a language model that answers questions about images.",
        "zero2hero.task_configs:ImageTextConfig",
        "zero2hero.train.image_text_to_text:train",
        (
            "zero2hero train image-text-to-text --data scenes:20000 --output_dir runs/vlm",
            "zero2hero train image-text-to-text --data questions.jsonl --vision_model runs/clip "
            "--language_model runs/quickstart --trained projector",
        ),
    ),
    "sft": Verb(
        "Teach a model by demonstrations: conversations, completions, texts. LoRA, QLoRA, or every weight.",
        "zero2hero.tuning_configs:SftConfig",
        "zero2hero.train.sft:sft",
        (
            "zero2hero sft --model runs/quickstart --data chats.jsonl --output_dir runs/mine",
            "zero2hero sft --model Qwen/Qwen3-0.6B --data chats.jsonl --lora.r 32 --train.learning_rate 1e-4",
            "zero2hero sft --model meta-llama/Llama-3.1-8B --data chats.jsonl --method qlora "
            "--train.gradient_checkpointing",
            "zero2hero sft --model runs/quickstart --data dialogues:6000 --method full --train.learning_rate 1e-3",
        ),
    ),
    "reward": Verb(
        "Learn from people's preferences how good an answer is: a reward model, which gives each answer a number.",
        "zero2hero.alignment_configs:RewardConfig",
        "zero2hero.align.reward:reward",
        (
            "zero2hero reward --model runs/quickstart --data votes.jsonl --output_dir runs/reward",
            "zero2hero reward --model runs/quickstart --method full --train.learning_rate 1e-5 "
            "--center_rewards_coefficient 0.01",
            'zero2hero run-pipeline text-classification "An answer to be scored." --model runs/reward',
        ),
    ),
    "distill": Verb(
        "Let a small model learn what a large one predicts at each token, on given answers or on its own.",
        "zero2hero.alignment_configs:DistillConfig",
        "zero2hero.align.distill:distill",
        (
            "zero2hero distill --model runs/small --teacher runs/large --data chats.jsonl",
            "zero2hero distill --model runs/small --teacher runs/large --beta 1 --lmbda 0.5 --method full",
        ),
    ),
    "best-of-n": Verb(
        "Write n answers to each prompt and keep the best, or all that are good enough, as data for sft.",
        "zero2hero.alignment_configs:BestOfNConfig",
        "zero2hero.align.best_of_n:best_of_n",
        (
            "zero2hero best-of-n --model runs/mine --data prompts.jsonl --reward_funcs '[runs/reward]' --n 16",
            "zero2hero best-of-n --model runs/mine --data sums:500 --reward_funcs '[number]' --threshold 1 "
            "--output right.jsonl",
        ),
    ),
    "dpo": Verb(
        "Tune a model by preferences, without a reward model: DPO and its kin, IPO, KTO, ORPO, SimPO, ...",
        "zero2hero.alignment_configs:DpoConfig",
        "zero2hero.align.dpo:dpo",
        (
            "zero2hero dpo --model runs/quickstart --data preferences:2000 --output_dir runs/livelier",
            "zero2hero dpo --model runs/mine --data votes.jsonl --beta 0.3 --method full --train.learning_rate 5e-6",
            "zero2hero dpo --model Qwen/Qwen3-0.6B --data votes.jsonl --loss_type '[sigmoid, sft]' "
            "--loss_weights '[1, 0.2]'",
            "zero2hero dpo --model runs/mine --data thumbs.jsonl --loss_type kto",
        ),
    ),
    "ppo": Verb(
        "Let a model earn rewards, with a critic that says what was to be expected, near to what it was (PPO).",
        "zero2hero.alignment_configs:PpoConfig",
        "zero2hero.align.ppo:ppo",
        (
            "zero2hero ppo --model runs/mine --data prompts.jsonl --reward_funcs '[runs/reward]'",
            "zero2hero ppo --model runs/mine --data sums --reward_funcs '[number]' --max_completion_length 64 "
            "--target_kl 6",
            "zero2hero ppo --model runs/mine --data prompts.jsonl --reward_funcs '[runs/reward, rewards.py:truth]' "
            "--reward_weights '[1, 0]' --kl_coef 0.01",
        ),
    ),
    "grpo": Verb(
        "Let a model practise: it answers, rewards say how well, and better answers become likelier (GRPO, RLOO, ...).",
        "zero2hero.alignment_configs:GrpoConfig",
        "zero2hero.align.grpo:grpo",
        (
            "zero2hero grpo --model runs/quickstart_chat --method full --data sums:2000 --max_completion_length 64",
            "zero2hero grpo --model runs/mine --data prompts.jsonl --reward_funcs '[number, rewards.py:short]' "
            "--reward_weights '[1, 0.1]' --beta 0.04",
            "zero2hero grpo --model runs/mine --data prompts.jsonl --reward_funcs '[runs/reward]' "
            "--importance_sampling_level sequence --epsilon 3e-4 --epsilon_high 4e-4",
            "zero2hero grpo --model runs/mine --data sums --environment calculator --method full "
            "--train.learning_rate 1e-5",
        ),
    ),
    "reason": Verb(
        "Teach a model to think before it answers: worked examples, then practice with a verifier; measured by pass@k.",
        "zero2hero.alignment_configs:ReasonConfig",
        "zero2hero.reason:reason",
        (
            "zero2hero reason",
            "zero2hero reason --data gsm8k.jsonl --model Qwen/Qwen3-0.6B --method lora --output_dir runs/thinker "
            "--cold_start.learning_rate 2e-4",
            "zero2hero reason --eval_samples 64 --train.max_steps 1000",
        ),
    ),
    "generate": Verb(
        "Let a model continue a text.",
        "zero2hero.options:GenerateConfig",
        "zero2hero.generate.command:run",
        (
            'zero2hero generate runs/quickstart "Once upon a time"',
            'zero2hero generate runs/quickstart "Tom was sad because" --temperature 0 --max_new_tokens 60',
            'zero2hero generate runs/quickstart "One day" --num_return_sequences 3 --top_p 0.9 --seed 1',
        ),
        ("model", "prompt"),
    ),
    "chat": Verb(
        "Talk with a model on the terminal.",
        "zero2hero.options:ChatConfig",
        "zero2hero.generate.chat:run",
        (
            "zero2hero chat runs/quickstart_chat",
            'zero2hero chat runs/assistant --system "You answer in one sentence." --temperature 0.3',
            "zero2hero chat Qwen/Qwen3-0.6B --adapter runs/adapter",
        ),
        ("model",),
    ),
    "run-pipeline": Verb(
        "Let a model do a task: classify, fill in, find names, answer, translate, ...",
        "zero2hero.options:RunPipelineConfig",
        "zero2hero.pipelines.command:run",
        (
            'zero2hero run-pipeline fill-mask --model runs/bert "The capital of France is [MASK]."',
            "zero2hero run-pipeline ner --model runs/ner 'Ada came to London' "
            "--settings '{aggregation_strategy: simple}'",
            "zero2hero run-pipeline question-answering --model runs/qa "
            '\'{"question": "Who?", "context": "Tom fell."}\'',
            "zero2hero run-pipeline sentiment-analysis --model runs/sst2 --file reviews.txt > labels.jsonl",
        ),
        ("task", "text"),
    ),
    "serve": Verb(
        "Serve a model to clients of the OpenAI API.",
        "zero2hero.options:ServeConfig",
        "zero2hero.serve.command:run",
        (
            "zero2hero serve runs/quickstart",
            "zero2hero serve runs/quickstart --port 9000 --metrics",
            "zero2hero serve runs/quickstart --adapters '{chat: runs/quickstart_chat}'",
            "zero2hero serve Qwen/Qwen3-0.6B --host 0.0.0.0 --dtype bf16",
        ),
        ("model",),
    ),
    "convert": Verb(
        "Turn old weights (pytorch_model.bin, llama2.c) into an ordinary model directory.",
        "zero2hero.options:ConvertConfig",
        "zero2hero.models.convert:convert",
        ("zero2hero convert old_model/ new_model/", "zero2hero convert stories15M.bin runs/stories15M"),
        ("source", "output_dir"),
    ),
    "merge": Verb(
        "Merge an adapter (LoRA, DoRA) into its base model: an ordinary model directory again.",
        "zero2hero.options:MergeConfig",
        "zero2hero.tune.command:merge_adapter",
        (
            "zero2hero merge runs/adapter --output_dir runs/merged",
            "zero2hero merge runs/adapter --output_dir runs/merged --base_model Qwen/Qwen3-0.6B",
        ),
        ("adapter",),
    ),
    "data inspect": Verb(
        "Say what a file of training data holds, what of it would be trained, and what looks wrong.",
        "zero2hero.options:DataInspectConfig",
        "zero2hero.data.inspect:inspect",
        (
            "zero2hero data inspect chats.jsonl",
            "zero2hero data inspect chats.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --max_length 2048",
            "zero2hero data inspect alpaca.json --model runs/quickstart --chat_template chatml --samples 10",
        ),
        ("data",),
    ),
    "tokenizer train": Verb(
        "Train a tokenizer on text and save it.",
        "zero2hero.options:TokenizerTrainConfig",
        "zero2hero.tokenizer.command:train",
        (
            "zero2hero tokenizer train --data book.txt --output_dir runs/tokenizer --vocab_size 8000",
            "zero2hero tokenizer train --data notes/ --kind char --output_dir runs/characters",
        ),
    ),
    "tokenizer encode": Verb(
        "Show how a tokenizer cuts a text.",
        "zero2hero.options:TokenizerEncodeConfig",
        "zero2hero.tokenizer.command:encode",
        ('zero2hero tokenizer encode runs/quickstart "The unhappiest fox"',),
        ("tokenizer", "text"),
    ),
    "plan lr": Verb(
        "Find a learning rate for a pretraining run by trying them all in a short one.",
        "zero2hero.options:PlanLearningRateConfig",
        "zero2hero.plan.learning_rate:run",
        (
            "zero2hero plan lr --data book.txt",
            "zero2hero plan lr --data notes/ --train.optim lion --model.hidden_size 256 --model.num_attention_heads 8",
        ),
    ),
    "plan memory": Verb(
        "Predict the memory that a pretraining run needs, and say what would fit if it does not.",
        "zero2hero.config:PretrainConfig",
        "zero2hero.plan.memory:run",
        (
            "zero2hero plan memory --train.per_device_train_batch_size 64 --train.max_length 1024",
            "zero2hero plan memory --config recipes/tiny_stories_cpu.yaml --train.gradient_checkpointing true",
        ),
    ),
    "plan finetune": Verb(
        "Show which ways of fine-tuning a model fit this machine, how long they take, and what to type.",
        "zero2hero.tuning_configs:PlanFinetuneConfig",
        "zero2hero.plan.finetune:run",
        (
            "zero2hero plan finetune runs/quickstart",
            "zero2hero plan finetune meta-llama/Llama-3.1-8B --train.per_device_train_batch_size 1 "
            "--train.max_length 2048",
        ),
        ("model",),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `zero2hero ARGUMENTS`; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            print(_overview())
            return 0
        if words[0] in ("-V", "--version"):
            from zero2hero import __version__

            print(f"zero2hero {__version__}")
            return 0
        name = _find_verb(words)
        verb = VERBS[name]
        config = parse(name, verb, words[len(name.split()) :])
        named(verb.run)(config)
        return 0
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(2)  # torchrun ends all processes when one ends: let the first one speak
        print("zero2hero" + f", rank {rank}" * (rank != "0") + f": {error}", file=sys.stderr)
        return 2
    except FellShort as error:
        print(f"zero2hero: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print("stopped and saved; the same command with --resume continues it", file=sys.stderr)
        return 128 + stopped.signal_number
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `zero2hero ... | head`
        with contextlib.suppress(Exception):
            sys.stdout.close()
        return 0


def _find_verb(words: list[str]) -> str:
    for name in VERBS:
        if words[: len(name.split())] == name.split():
            return name
    inner = [name for name in VERBS if name.split()[0] == words[0]]
    if inner:
        near = did_you_mean(" ".join(words[:2]), inner)
        raise UserError(f"say what to do: {', '.join(f'zero2hero {name}' for name in inner)}.{near}")
    raise UserError(f"there is no verb '{words[0]}'.{did_you_mean(words[0], VERBS)} `zero2hero --help` lists them all.")


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [
        "zero2hero: from the first neural network to an aligned, deployed language model.",
        "",
        "usage: zero2hero VERB [options]     (zero2hero VERB --help shows a verb's options and examples)",
        "",
        *(f"  {name:<{width}}  {verb.what}" for name, verb in VERBS.items()),
        "",
        "Begin with:  zero2hero quickstart",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
