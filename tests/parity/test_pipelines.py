"""Each pipeline gives what transformers' gives for the same tiny model: texts, keys, order, and scores within 1e-4.

For the tasks that version 5 of transformers has no more, the answer is computed here from the reference's model.
"""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from tokenizers import AddedToken

import zero2hero as z2h
from zero2hero.errors import UserError
from zero2hero.tokenizer import Tokenizer
from zero2hero.tokenizer.build import surround, train_bpe

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

SENTENCES = [
    "The capital of France is Paris, and the capital of England is London.",
    "Ada Lovelace lived in London with her friend Charles Babbage.",
    "A little fox jumps over the unhappiest dog of the village.",
    "What a wonderful film! I have never been so bored in my life.",
]
LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 56}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def roberta_tokenizer() -> Tokenizer:
    roles = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "cls_token": "<s>",
             "sep_token": "</s>", "mask_token": "<mask>"}  # fmt: skip
    raw = train_bpe(SENTENCES, 330, "gpt2", list(dict.fromkeys(roles.values())))
    raw.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    surround(raw, ["<s>", "$A", "</s>"], ["</s>", "$B", "</s>"])
    return Tokenizer(raw, roles | {"model_input_names": ["input_ids", "attention_mask"]})


def t5_tokenizer() -> Tokenizer:
    """T5's roles, with byte-level pieces."""
    roles = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    raw = train_bpe(SENTENCES, 330, "gpt2", list(roles.values()))
    raw.add_special_tokens(list(roles.values()))
    surround(raw, ["$A", "</s>"], ["$B", "</s>"])
    return Tokenizer(raw, roles)


def randomized(model, spread: float = 0.3):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name.lower() and name.endswith("weight")
            parameter.normal_(1.0 if norm else 0.0, spread, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """(architecture, settings) -> the folder of such a model, made by transformers, with a tokenizer beside it."""
    tokenizers = {
        "Bert": Tokenizer.train(SENTENCES, 120, kind="wordpiece"),
        "Roberta": roberta_tokenizer(),
        "T5": t5_tokenizer(),
        "Llama": Tokenizer.train(SENTENCES, vocab_size=320),
    }
    tokenizers["Llama"].chat_template = CHATML

    def make(architecture: str, **settings):
        family = next(name for name in tokenizers if architecture.startswith(name))
        tokenizer = tokenizers[family]
        ids = {role: i for role in ("bos_token_id", "eos_token_id", "pad_token_id")
               if (i := tokenizer.special_token_id(role.removesuffix("_id"))) is not None}  # fmt: skip
        shape = (
            {"d_model": 32, "d_kv": 8, "d_ff": 56, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
            if family == "T5"
            else SHAPE
        )
        if family == "Roberta":
            shape = shape | {"type_vocab_size": 1}
        config = getattr(transformers, f"{family}Config")(
            vocab_size=tokenizer.vocab_size, max_position_embeddings=100, **shape | ids | settings
        )
        folder = tmp_path_factory.mktemp(architecture)
        model = randomized(getattr(transformers, architecture)(config), 0.5 if family == "T5" else 0.3)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder, model_max_length=98 if family == "Roberta" else 100)
        return folder

    return make


def same(ours, theirs, where: str = "") -> None:
    """Equal to the last key and type, but for the kinds of floats that numpy has."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs), where
        for key in theirs:
            same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(theirs, list):
        assert isinstance(ours, list)
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs)):
            same(a, b, f"{where}[{i}]")
    elif type(theirs) in (str, int):
        assert type(ours) is type(theirs), where
        assert ours == theirs, where
    else:
        assert type(ours) is float, where
        assert abs(ours - float(theirs)) < 1e-4, where


def compare(task: str, folder, calls, **defaults):
    """The same calls here and there."""
    results = []
    theirs = transformers.pipeline(task, model=str(folder), device="cpu", **defaults)
    ours = z2h.pipeline(task, model=folder, device="cpu", **defaults)
    for inputs, settings in calls:
        results.append(ours(inputs, **settings))
        json.dumps(results[-1])  # plain Python throughout
        same(results[-1], theirs(inputs, **settings), f"{inputs} {settings}")
    assert any(results), "a test of nothing proves nothing"


# --- labels for texts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_text_classification(folder_of, family):
    folder = folder_of(f"{family}ForSequenceClassification", id2label={0: "bad", 1: "dull", 2: "good"})
    pair = {"text": SENTENCES[0], "text_pair": SENTENCES[1]}
    inputs = [SENTENCES[3], "", [SENTENCES[3]], SENTENCES, pair, {"text": "A film"}, [pair, {"text": "Paris"}]]
    settings = [{}, {"top_k": 1}, {"top_k": 2}, {"top_k": None}, {"function_to_apply": "none", "top_k": None},
                {"function_to_apply": "sigmoid"}]  # fmt: skip
    compare("text-classification", folder, itertools.product(inputs, settings))
    compare("sentiment-analysis", folder, [(SENTENCES[0], {}), (SENTENCES, {})], top_k=None)
    long = " ".join(SENTENCES * 9)
    compare("text-classification", folder, [(long, {"truncation": True}), ([long, "Hi"], {"truncation": True})])


@pytest.mark.parametrize("settings", [{"problem_type": "regression"}, {"num_labels": 1},
                                      {"problem_type": "multi_label_classification", "num_labels": 4}])  # fmt: skip
def test_text_classification_of_other_problems(folder_of, settings):
    compare("text-classification", folder_of("BertForSequenceClassification", **settings),
            [(SENTENCES[3], {"top_k": None}), (SENTENCES, {})])  # fmt: skip


@pytest.mark.parametrize("names", [["contradiction", "neutral", "ENTAILMENT"], ["entailment", "neutral", "not"]])
@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_zero_shot_classification(folder_of, family, names):
    folder = folder_of(f"{family}ForSequenceClassification", id2label=dict(enumerate(names)),
                       label2id={name: i for i, name in enumerate(names)})  # fmt: skip
    labels = ["a film", "dogs", "Paris and London"]
    settings = [{}, {"multi_label": True}, {"hypothesis_template": "It is about {}!"}, {"candidate_labels": ["dogs"]},
                {"candidate_labels": "dogs, Paris"}]  # fmt: skip
    calls = [
        (inputs, {"candidate_labels": labels} | s)
        for s in settings
        for inputs in (SENTENCES[1], SENTENCES[:1], SENTENCES)
    ]
    compare("zero-shot-classification", folder, [*calls, (" ".join(SENTENCES * 9), {"candidate_labels": labels})])
    ours = z2h.pipeline("zero-shot-classification", folder, device="cpu")
    assert ours(SENTENCES, labels) == ours(SENTENCES, candidate_labels=labels)


def test_zero_shot_by_likelihood(folder_of):
    folder = folder_of("LlamaForCausalLM")
    labels = ["good", "long", "about a fox"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    scores = []
    for label in labels:
        before, after = (
            tokenizer(SENTENCES[2]).input_ids,
            tokenizer(f" It is {label}.", add_special_tokens=False).input_ids,
        )
        with torch.no_grad():
            logprobs = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].log_softmax(-1)
        scores.append(float(logprobs.gather(-1, torch.tensor(after)[:, None]).double().sum()))
    scores = torch.tensor(scores).softmax(-1).tolist()
    best = sorted(range(3), key=lambda i: -scores[i])
    ours = z2h.pipeline("zero-shot-classification", folder, device="cpu")(
        SENTENCES[2], labels, hypothesis_template="It is {}."
    )
    same(ours, {"sequence": SENTENCES[2], "labels": [labels[i] for i in best], "scores": [scores[i] for i in best]})


# --- tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_fill_mask(folder_of, family):
    folder = folder_of(f"{family}ForMaskedLM")
    mask = {"Bert": "[MASK]", "Roberta": "<mask>"}[family]
    one, two = f"The {mask} of France is Paris.", f"The {mask} of {mask} is Paris."
    inputs = [one, [one], two, [two], [one, two], [one, f"A {mask}"], [two, two]]
    known = ["the", "fox"] if family == "Bert" else ["The", "o"]
    settings = [{}, {"top_k": 1}, {"top_k": 40}, {"targets": known}, {"targets": known[0]}, {"targets": "unhappiestly"},
                {"targets": [*known, "villages"], "top_k": 2}]  # fmt: skip
    compare("fill-mask", folder, itertools.product(inputs, settings))


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
def test_token_classification(folder_of, family, strategy):
    folder = folder_of(f"{family}ForTokenClassification", id2label=dict(enumerate(LABELS)))
    odd = "Ada\tLovelace's  naïve Zürich, 東京 unhappiest-dog."
    inputs = [SENTENCES[1], SENTENCES, [SENTENCES[1]], odd, [odd, "Ada"]]
    settings = [{}, {"ignore_labels": []}, {"ignore_labels": ["O", "LOC", "I-PER"]}]
    compare("token-classification", folder, itertools.product(inputs, settings), aggregation_strategy=strategy)
    compare("ner", folder, [(SENTENCES[0], {"aggregation_strategy": strategy})])


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
def test_token_classification_of_long_texts(folder_of, family):
    folder = folder_of(f"{family}ForTokenClassification", id2label=dict(enumerate(LABELS)))
    long, short = " ".join(SENTENCES * 3), SENTENCES[1]
    for strategy in ("simple", "first", "average", "max"):
        calls = [(inputs, {"stride": n}) for n in (0, 7, 40) for inputs in (long, [short, long], short)]
        compare("ner", folder, calls, aggregation_strategy=strategy)
    ours, theirs = z2h.pipeline("ner", folder, device="cpu"), transformers.pipeline("ner", str(folder), device="cpu")
    same(ours([long, short], truncation=True), theirs([long, short]))
    with pytest.raises(UserError, match="the model reads"):
        ours(long)
    with pytest.raises(UserError, match="stride needs another aggregation_strategy"):
        ours(long, stride=4)
    with pytest.raises(UserError, match="stride is from 0 to"):
        ours(long, stride=98, aggregation_strategy="simple")


@pytest.mark.parametrize("architecture", ["BertModel", "RobertaForMaskedLM", "LlamaForCausalLM"])
def test_feature_extraction(folder_of, architecture):
    folder = folder_of(architecture)
    long = " ".join(SENTENCES * 9)
    calls = [(SENTENCES[0], {}), ([SENTENCES[0]], {}), (SENTENCES, {}), (long, {"truncation": True})]
    compare("feature-extraction", folder, calls)
    ours = z2h.pipeline("feature-extraction", folder, device="cpu")
    for text, vector in zip(SENTENCES, ours(SENTENCES, pooling="mean")):
        mean = torch.tensor(ours(text)[0]).mean(0)
        assert torch.allclose(torch.tensor(vector), mean / mean.norm(), atol=1e-5)


# --- spans ----------------------------------------------------------------------------------------------------


def best_spans(folder, question: str, context: str, longest: int = 15) -> list[tuple[str, float]]:
    """(text, probability) of every span of whole words, best first: all pairs, one by one."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    given = tokenizer(question, context, return_offsets_mapping=True, return_tensors="pt")
    offsets, owners, words = given.pop("offset_mapping")[0].tolist(), given.sequence_ids(), given.word_ids()
    with torch.no_grad():
        said = model(**given)
    readable = [i for i, owner in enumerate(owners) if owner == 1 or i == 0]
    begin, end = (logits[0, readable].softmax(-1).tolist() for logits in (said.start_logits, said.end_logits))
    found: dict[str, list] = {}
    place = {}
    for i, owner in enumerate(owners):
        if owner == 1:
            low, high = place.get(words[i], offsets[i])
            place[words[i]] = (min(low, offsets[i][0]), max(high, offsets[i][1]))
    pairs = []
    for (i, a), (j, b) in itertools.product(zip(readable, begin), zip(readable, end)):
        if owners[i] == owners[j] == 1 and 0 <= j - i < longest:
            pairs.append((a * b, context[place[words[i]][0] : place[words[j]][1]]))
    for score, text in sorted(pairs, reverse=True)[:16]:  # twice as many as are asked for, and ten
        found.setdefault(text.lower(), [text, 0.0])[1] += score
    return sorted(((text, score) for text, score in found.values()), key=lambda pair: -pair[1])


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_question_answering(folder_of, family):
    folder = folder_of(f"{family}ForQuestionAnswering")
    ours = z2h.pipeline("question-answering", folder, device="cpu")
    question, context = "Who lived in London?", SENTENCES[1]
    want = best_spans(folder, question, context)[:3]
    got = ours(question=question, context=context, top_k=3)
    assert [list(answer) for answer in got] == [["score", "start", "end", "answer"]] * 3
    assert [answer["answer"] for answer in got] == [text for text, _ in want]
    for answer, (_, score) in zip(got, want):
        assert type(answer["score"]) is float
        assert abs(answer["score"] - score) < 1e-4
        assert context[answer["start"] : answer["end"]] == answer["answer"]
    one = {"question": question, "context": context}
    alone = ours(one)
    assert ours([one]) == alone
    assert [a["answer"] for a in ours([one, one])] == [alone["answer"]] * 2
    assert ours(question=[question, "Who?"], context=context)[0]["answer"] == alone["answer"]
    shorter = ours(one, max_answer_len=1)
    assert len(shorter["answer"].split()) == 1
    assert "" in [a["answer"] for a in ours(one, top_k=200, handle_impossible_answer=True)]


def test_question_answering_in_windows(folder_of):
    """A long context gives the best answer of its windows, as if each had been asked alone."""
    folder = folder_of("BertForQuestionAnswering")
    ours = z2h.pipeline("question-answering", folder, device="cpu")
    context = " ".join(SENTENCES * 6)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    windows = tokenizer("Who?", context, truncation="only_second", max_length=100, stride=20, padding=True,
                        return_overflowing_tokens=True, return_offsets_mapping=True, return_tensors="pt")  # fmt: skip
    assert len(windows.input_ids) > 2
    best = 0.0
    for i in range(len(windows.input_ids)):
        kept = windows.attention_mask[i].bool()
        with torch.no_grad():
            said = model(windows.input_ids[i : i + 1, kept], token_type_ids=windows.token_type_ids[i : i + 1, kept])
        owners = [owner for owner, keep in zip(windows.sequence_ids(i), kept) if keep]
        readable = [n for n, owner in enumerate(owners) if owner == 1 or n == 0]
        a, b = (logits[0, readable].softmax(-1) for logits in (said.start_logits, said.end_logits))
        best = max(best, float((a[1:, None] * b[None, 1:]).triu().tril(14).max()))
    answers = ours(question="Who?", context=context, doc_stride=20, top_k=1)
    assert answers["score"] >= best - 1e-4  # spellings that come twice are added up
    assert ours(question="Who?", context=context, doc_stride=0)["answer"]


# --- writing --------------------------------------------------------------------------------------------------


def test_text_generation(folder_of):
    folder = folder_of("LlamaForCausalLM")
    greedy = {"do_sample": False, "max_new_tokens": 9}
    chat = [{"role": "user", "content": "Who are you?"}]
    begun = [*chat, {"role": "assistant", "content": "I am"}]
    system = [{"role": "system", "content": "Be brief."}, *chat]
    inputs = [SENTENCES[0], [SENTENCES[0]], SENTENCES, chat, [chat], [chat, system], begun, [begun, chat]]
    settings = [greedy, greedy | {"return_full_text": False}]
    compare("text-generation", folder, itertools.product(inputs, settings))
    ours = z2h.pipeline(model=folder, device="cpu")
    assert ours.task == "text-generation"
    several = ours(SENTENCES, num_return_sequences=3, seed=1, max_new_tokens=5)
    assert [[list(record) for record in records] for records in several] == [[["generated_text"]] * 3] * 4
    assert several == ours(SENTENCES, num_return_sequences=3, seed=1, max_new_tokens=5, batch_size=1)
    lm = z2h.load(folder, device="cpu")
    answer = ours(chat, **greedy)[0]["generated_text"][-1]
    assert answer == {"role": "assistant", "content": lm.chat(chat, **greedy)}
    assert z2h.pipeline("text-generation", lm)(chat, **greedy)[0]["generated_text"] == [*chat, answer]


@pytest.mark.parametrize("task", ["text2text-generation", "summarization", "translation", "translation_en_to_de"])
def test_text_to_text(folder_of, task):
    params = {
        "summarization": {"prefix": "The capital: ", "num_beams": 3, "length_penalty": 2.0},
        "translation_en_to_de": {"prefix": "A fox: ", "early_stopping": True, "num_beams": 2},
    }
    folder = folder_of("T5ForConditionalGeneration", task_specific_params=params)
    used = params.get("translation_en_to_de" if "translation" in task else task, {})
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    key = {"summarization": "summary_text", "text2text-generation": "generated_text"}.get(task, "translation_text")

    def wanted(text: str, copies: int, **settings) -> list[dict[str, str]]:
        ids = tokenizer(used.get("prefix", "") + text, return_tensors="pt").input_ids
        written = model.generate(ids, do_sample=False, num_return_sequences=copies, max_length=None, **settings)
        return [{key: tokenizer.decode(row, skip_special_tokens=True)} for row in written]

    ours = z2h.pipeline(task, folder, device="cpu")
    own = {"max_new_tokens": 12, "num_beams": 3, "length_penalty": 0.6, "early_stopping": False}
    defaults = {"num_beams": 4, "max_new_tokens": 256} | {k: v for k, v in used.items() if k != "prefix"}
    assert ours(SENTENCES[0]) == wanted(SENTENCES[0], 1, **defaults)
    assert ours(SENTENCES[0], **own) == wanted(SENTENCES[0], 1, **own)
    assert ours(SENTENCES, **own) == [wanted(text, 1, **own)[0] for text in SENTENCES]
    assert ours(SENTENCES, num_return_sequences=2, **own) == [wanted(text, 2, **own) for text in SENTENCES]
    assert ours(SENTENCES[:1], num_return_sequences=2, **own) == [wanted(SENTENCES[0], 2, **own)]
    assert len({record[key] for record in ours(SENTENCES, **own)}) > 1
    for more in ({"min_length": 11}, {"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 2, "min_length": 5}):
        assert ours(SENTENCES, **own | more) == [wanted(text, 1, **own | more)[0] for text in SENTENCES]


def test_translation_asks_which(folder_of):
    params = {"translation_en_to_de": {"prefix": "a"}, "translation_en_to_fr": {"prefix": "b"}}
    folder = folder_of("T5ForConditionalGeneration", task_specific_params=params)
    with pytest.raises(UserError, match="Name the task: translation_en_to_de, translation_en_to_fr"):
        z2h.pipeline("translation", folder)("Hi")
