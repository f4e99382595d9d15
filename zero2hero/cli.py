"""The command line: one verb per rung of the road.

Thin on purpose. A verb's options are the fields of its configuration (zero2hero/config.py), read by jsonargparse from
YAML (`--config`) and from the command line, which overrides; what a verb does lives in the module it imports.
Bad input of any kind is one clear line on the error stream and exit code 2; being stopped by Ctrl-C or SIGTERM is 130
or 143, after saving.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from zero2hero.config import Option, describe, from_dict
from zero2hero.errors import UserError, did_you_mean


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
        verb = _find_verb(words)
        return VERBS[verb][1](verb, words[len(verb.split()) :]) or 0
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(2)  # torchrun ends all processes when one ends: let the first one speak
        print("zero2hero" + f", rank {rank}" * (rank != "0") + f": {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `zero2hero ... | head`
        with contextlib.suppress(Exception):
            sys.stdout.close()
        return 0


# --- verbs ---------------------------------------------------------------------------------------------------


def quickstart(verb: str, words: list[str]) -> int:
    """Take raw text to a model that writes stories, in a few minutes, and show what to type next."""
    from zero2hero.config import QuickstartConfig

    config = parse(verb, QuickstartConfig, words, ["zero2hero quickstart", "zero2hero quickstart --seed 7"])
    from zero2hero.quickstart import run

    return _stoppable(lambda: run(config))


def pretrain(verb: str, words: list[str]) -> int:
    """Train a language model from scratch on your own text."""
    from zero2hero.config import PretrainConfig

    examples = [
        "zero2hero pretrain --data book.txt --output_dir runs/book --train.max_steps 500",
        "zero2hero pretrain --data '[stories, notes/]' --model.hidden_size 256 --model.num_attention_heads 8",
        "zero2hero pretrain --data crawl/ --streaming --train.max_steps 20000 --output_dir runs/crawl",
        "zero2hero pretrain --config recipes/tiny_stories_cpu.yaml --train.learning_rate 1e-3",
        "zero2hero pretrain --data book.txt --output_dir runs/book --train.max_steps 500 --resume",
    ]
    config = parse(verb, PretrainConfig, words, examples)
    from zero2hero.train.pretrain import pretrain as run

    return _stoppable(lambda: run(config))


def generate(verb: str, words: list[str]) -> int:
    """Let a model continue a text."""
    from zero2hero.config import GenerateConfig

    examples = [
        'zero2hero generate runs/quickstart "Once upon a time"',
        'zero2hero generate runs/quickstart "Tom was sad because" --temperature 0 --max_new_tokens 60',
        'zero2hero generate runs/quickstart "One day" --num_return_sequences 3 --top_p 0.9 --seed 1',
    ]
    config = parse(verb, GenerateConfig, words, examples, positional=("model", "prompt"))
    from zero2hero.generate.command import run

    run(config)
    return 0


def convert(verb: str, words: list[str]) -> int:
    """Turn old weights (pytorch_model.bin, llama2.c) into an ordinary model directory."""
    from zero2hero.config import ConvertConfig

    examples = ["zero2hero convert old_model/ new_model/", "zero2hero convert stories15M.bin runs/stories15M"]
    config = parse(verb, ConvertConfig, words, examples, positional=("source", "output_dir"))
    from zero2hero.models.convert import convert as run

    run(config)
    return 0


def run_pipeline(verb: str, words: list[str]) -> int:
    """Let a model do a task: classify, fill in, find names, answer, translate, ..."""
    from zero2hero.config import RunPipelineConfig

    examples = [
        'zero2hero run-pipeline fill-mask --model runs/bert "The capital of France is [MASK]."',
        "zero2hero run-pipeline ner --model runs/ner 'Ada came to London' --settings '{aggregation_strategy: simple}'",
        'zero2hero run-pipeline question-answering --model runs/qa \'{"question": "Who?", "context": "Tom fell."}\'',
        "zero2hero run-pipeline sentiment-analysis --model runs/sst2 --file reviews.txt > labels.jsonl",
    ]
    config = parse(verb, RunPipelineConfig, words, examples, positional=("task", "text"))
    from zero2hero.pipelines.command import run

    run(config)
    return 0


def tokenizer_train(verb: str, words: list[str]) -> int:
    """Train a tokenizer on text and save it."""
    from zero2hero.config import TokenizerTrainConfig

    examples = [
        "zero2hero tokenizer train --data book.txt --output_dir runs/tokenizer --vocab_size 8000",
        "zero2hero tokenizer train --data notes/ --kind char --output_dir runs/characters",
    ]
    config = parse(verb, TokenizerTrainConfig, words, examples)
    from zero2hero.tokenizer.command import train

    train(config)
    return 0


def tokenizer_encode(verb: str, words: list[str]) -> int:
    """Show how a tokenizer cuts a text."""
    from zero2hero.config import TokenizerEncodeConfig

    examples = ['zero2hero tokenizer encode runs/quickstart "The unhappiest fox"']
    config = parse(verb, TokenizerEncodeConfig, words, examples, positional=("tokenizer", "text"))
    from zero2hero.tokenizer.command import encode

    encode(config)
    return 0


def plan_lr(verb: str, words: list[str]) -> int:
    """Find a learning rate for a pretraining run by trying them all in a short one."""
    from zero2hero.config import PlanLearningRateConfig

    examples = [
        "zero2hero plan lr --data book.txt",
        "zero2hero plan lr --data notes/ --train.optim lion --model.hidden_size 256 --model.num_attention_heads 8",
    ]
    config = parse(verb, PlanLearningRateConfig, words, examples)
    from zero2hero.plan.learning_rate import run

    run(config)
    return 0


def plan_memory(verb: str, words: list[str]) -> int:
    """Predict the memory that a pretraining run needs, and say what would fit if it does not."""
    from zero2hero.config import PretrainConfig

    examples = [
        "zero2hero plan memory --train.per_device_train_batch_size 64 --train.max_length 1024",
        "zero2hero plan memory --config recipes/tiny_stories_cpu.yaml --train.gradient_checkpointing true",
    ]
    config = parse(verb, PretrainConfig, words, examples)
    from zero2hero.plan.memory import run

    run(config)
    return 0


# verb -> (what it is for, function)
VERBS: dict[str, tuple[str, Callable[[str, list[str]], int]]] = {
    name: ((function.__doc__ or "").strip(), function)
    for name, function in {
        "quickstart": quickstart,
        "pretrain": pretrain,
        "generate": generate,
        "run-pipeline": run_pipeline,
        "convert": convert,
        "tokenizer train": tokenizer_train,
        "tokenizer encode": tokenizer_encode,
        "plan lr": plan_lr,
        "plan memory": plan_memory,
    }.items()
}


def _find_verb(words: list[str]) -> str:
    for name in VERBS:
        if words[: len(name.split())] == name.split():
            return name
    inner = [name for name in VERBS if name.split()[0] == words[0]]
    if inner:
        raise UserError(f"say what to do: {', '.join(f'zero2hero {name}' for name in inner)}")
    raise UserError(f"there is no verb '{words[0]}'.{did_you_mean(words[0], VERBS)} `zero2hero --help` lists them all.")


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [
        "zero2hero: from the first neural network to an aligned, deployed language model.",
        "",
        "usage: zero2hero VERB [options]     (zero2hero VERB --help shows a verb's options and examples)",
        "",
        *(f"  {name:<{width}}  {what}" for name, (what, _) in VERBS.items()),
        "",
        "Begin with:  zero2hero quickstart",
    ]
    return "\n".join(lines)


def _stoppable(work: Callable[[], Any]) -> int:
    """Run long work; when a signal stops it (it has saved by then), say so and exit as shells expect."""
    from zero2hero.train.loop import Stopped

    try:
        work()
        return 0
    except Stopped as stopped:
        print("stopped and saved; the same command with --resume continues it", file=sys.stderr)
        return 128 + stopped.signal_number


# --- options -------------------------------------------------------------------------------------------------


def parse(verb: str, kind: type, words: list[str], examples: list[str], positional: tuple[str, ...] = ()) -> Any:
    """The configuration `kind` from a verb's words. Prints help and exits when asked for it.

    Raises:
        UserError: an unknown option (with the nearest known one), a missing or wrong value, a broken YAML file.
    """
    options = {o.name: o for o in describe(kind)}
    if "-h" in words or "--help" in words:
        print(_help(verb, list(options.values()), examples, positional))
        raise SystemExit(0)
    words = _as_options(verb, words, options, positional)
    given = {word.partition("=")[0].removeprefix("--") for word in words}
    missing = [n.upper() for n in positional if options[n].default == "required" and not given & {n, "config"}]
    if missing:
        raise UserError(f"{verb} needs {' and '.join(missing)}, as in: {examples[0]}")
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False, add_help=False, default_env=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(kind, as_group=False)
    try:
        values = parser.parse_args(words, defaults=False).as_dict()
    except (jsonargparse.ArgumentError, TypeError, ValueError, OSError) as error:
        raise UserError(_explain(str(error))) from None
    values.pop("config", None)
    return from_dict(kind, values)


def _as_options(verb: str, words: list[str], options: dict[str, Option], positional: tuple[str, ...]) -> list[str]:
    """Every word as `--name=value`: positional words named, bare flags (`--resume`) true, names checked."""
    out: list[str] = []
    waiting = list(positional)
    i = 0
    while i < len(words):
        word = words[i]
        if not word.startswith("--"):
            if not waiting:
                raise UserError(f"'{word}' is one word too many. Quote a text of several words.")
            out.append(f"--{waiting.pop(0)}={word}")
            i += 1
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        if name not in options and name != "config":
            near = did_you_mean(f"--{name}", [f"--{known}" for known in options])
            raise UserError(f"{verb} has no option --{name}.{near} `zero2hero {verb} --help` lists them.")
        following = words[i + 1] if i + 1 < len(words) else None
        if not equals and name in options and options[name].flag and following not in ("true", "false"):
            value = "true"
        elif not equals:
            if following is None:
                raise UserError(f"the option --{name} needs a value")
            value = following
            i += 1
        out.append(f"--{name}={value}")
        i += 1
    return out


def _explain(message: str) -> str:
    """jsonargparse's message in our words: the option, what it takes, what was given."""
    found = re.search(r'key "([^"]+)".*?Expected an? (.+?)\. Got value: ([^\n]*)', message, re.S)
    if found:
        expected = found[2].replace("<class '", "").replace("'>", "")
        given = found[3].strip()
        hint = f". As a list of one: --{found[1]} '[{given}]'" if expected == "list" else ""
        return f"--{found[1]} takes {expected}, not {given!r}{hint}"
    if message.startswith("Unexpected config"):  # and then all that is in the file
        return "--config takes a YAML file of options, `name: value` on each line; this one holds something else"
    return " ".join(line.strip() for line in message.splitlines()[:3] if line.strip())


def _help(verb: str, options: list[Option], examples: list[str], positional: tuple[str, ...]) -> str:
    """What a verb does, examples, then its options by group."""
    import textwrap

    usage = " ".join(["zero2hero", verb, *(name.upper() for name in positional), "[--option value ...]"])
    lines = [VERBS[verb][0], "", f"usage: {usage}", "", "examples:", *(f"  {e}" for e in examples)]
    group = None
    for option in options:
        prefix = option.name.rpartition(".")[0]
        if prefix != group:
            lines += ["", f"{prefix or 'options'}:"]
            group = prefix
        head = f"  --{option.name} {option.kind}"
        text = f"{option.help} " * bool(option.help) + f"({option.default})"
        wrapped = textwrap.wrap(text, 70)
        lines.append(f"{head:<46}  {wrapped[0]}" if len(head) <= 46 else head)
        lines += [" " * 48 + line for line in (wrapped[1:] if len(head) <= 46 else wrapped)]
    lines += [
        "",
        "  --config FILE                                 a YAML file with any of these; the command line overrides it",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
