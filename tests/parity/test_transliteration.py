"""Real weights of an encoder-decoder: CTranslate2's transliteration of Arabic names, 6 + 6 layers of width 32.

How its tensors map to ours (the file's names on the left):

    encoder, decoder/embeddings       times sqrt(32) -> embed_source, embed_tokens
    layer_N/self_attention/linear_0   rows of q, k, v -> self_attn.{q,k,v}_proj;  linear_1 -> o_proj
    layer_N/attention/linear_0, 1, 2  q; rows of k, v; output -> cross_attn.{q,k,v,o}_proj
    layer_N/ffn/linear_0, 1           mlp.{up,down}_proj
    .../layer_norm/gamma, beta        the norm before that part
    decoder/projection                lm_head, which gets a bias

Positions count from 1; a row of their table has all sines, then all cosines.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from zero2hero.generate.beam import beam_search
from zero2hero.models import EncoderDecoder, EncoderDecoderConfig

pytestmark = pytest.mark.usefixtures("one_thread")

START, END = 1, 2


@pytest.fixture(scope="module")
def tensors(shared_data: Path) -> dict[str, np.ndarray]:
    return load_file(shared_data / "ct2_aren" / "aren_f32.safetensors")


def position_table(length: int) -> np.ndarray:
    angle = np.arange(1, length + 1)[:, None] * np.exp(np.arange(16) * -(math.log(10_000) / 15))
    return np.concatenate([np.sin(angle), np.cos(angle)], 1).astype(np.float32)


@pytest.fixture(scope="module")
def model(tensors) -> EncoderDecoder:
    model = EncoderDecoder(
        EncoderDecoderConfig(
            vocab_size=43, source_vocab_size=51, hidden_size=32, num_hidden_layers=6, num_attention_heads=8,
            intermediate_size=128, position="sinusoidal", max_position_embeddings=64, norm="layernorm", norm_eps=1e-5,
            feedforward="relu", scale_attention=True, bias=True, decoder_start_token_id=START, eos_token_id=END,
        )
    ).eval()  # fmt: skip
    model.lm_head.bias = nn.Parameter(torch.zeros(43))
    state = {
        "embed_source.weight": tensors["encoder/embeddings/weight"] * math.sqrt(32),
        "embed_tokens.weight": tensors["decoder/embeddings/weight"] * math.sqrt(32),
    }

    def put(theirs: str, *ours: str) -> None:
        """One of their parts as one or several of ours, rows split evenly."""
        norm = theirs.endswith("layer_norm")
        for kind, stored in zip(("weight", "bias"), ("gamma", "beta") if norm else ("weight", "bias")):
            for name, part in zip(ours, np.split(tensors[f"{theirs}/{stored}"], len(ours))):
                state[f"{name}.{kind}"] = part

    for side in ("encoder", "decoder"):
        put(f"{side}/layer_norm", f"{side}.norm")
        for i in range(6):
            theirs, ours = f"{side}/layer_{i}", f"{side}.layers.{i}"
            put(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_norm")
            put(f"{theirs}/self_attention/linear_0", *(f"{ours}.self_attn.{p}_proj" for p in "qkv"))
            put(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.o_proj")
            put(f"{theirs}/ffn/layer_norm", f"{ours}.mlp_norm")
            put(f"{theirs}/ffn/linear_0", f"{ours}.mlp.up_proj")
            put(f"{theirs}/ffn/linear_1", f"{ours}.mlp.down_proj")
            if side == "decoder":
                put(f"{theirs}/attention/layer_norm", f"{ours}.cross_attn_norm")
                put(f"{theirs}/attention/linear_0", f"{ours}.cross_attn.q_proj")
                put(f"{theirs}/attention/linear_1", *(f"{ours}.cross_attn.{p}_proj" for p in "kv"))
                put(f"{theirs}/attention/linear_2", f"{ours}.cross_attn.o_proj")
    put("decoder/projection", "lm_head")
    model.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    model.position_table = torch.tensor(position_table(64))
    return model


@pytest.fixture(scope="module")
def alphabets(shared_data: Path) -> tuple[list[str], list[str]]:
    folder = shared_data / "ct2_aren"
    return tuple((folder / f"{side}_vocabulary.txt").read_text().split("\n")[:-1] for side in ("source", "target"))


class Plain:
    """The same model in double precision, straight from the file's names and the description of its parts."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self.t = {name: value.astype(np.float64) for name, value in tensors.items()}

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.t[f"{name}/weight"].T + self.t[f"{name}/bias"]

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * self.t[f"{name}/layer_norm/gamma"] + self.t[f"{name}/layer_norm/beta"]

    def attention(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> np.ndarray:
        heads = []
        for h in range(8):
            part = slice(4 * h, 4 * h + 4)
            scores = q[:, part] @ k[:, part].T / 2.0
            if causal:
                scores[np.triu_indices(len(scores), 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, part])
        return np.concatenate(heads, 1)

    def side(self, side: str, ids: list[int], memory: np.ndarray | None = None) -> np.ndarray:
        x = self.t[f"{side}/embeddings/weight"][ids] * math.sqrt(32) + position_table(len(ids))
        for i in range(6):
            name = f"{side}/layer_{i}"
            q, k, v = np.split(
                self.linear(f"{name}/self_attention/linear_0", self.norm(f"{name}/self_attention", x)), 3, 1
            )
            x = x + self.linear(f"{name}/self_attention/linear_1", self.attention(q, k, v, memory is not None))
            if memory is not None:
                q = self.linear(f"{name}/attention/linear_0", self.norm(f"{name}/attention", x))
                k, v = np.split(self.linear(f"{name}/attention/linear_1", memory), 2, 1)
                x = x + self.linear(f"{name}/attention/linear_2", self.attention(q, k, v, False))
            inner = np.maximum(self.linear(f"{name}/ffn/linear_0", self.norm(f"{name}/ffn", x)), 0)
            x = x + self.linear(f"{name}/ffn/linear_1", inner)
        return self.norm(side, x)

    def logprobs(self, source: list[int], target: list[int]) -> np.ndarray:
        logits = self.linear("decoder/projection", self.side("decoder", target, self.side("encoder", source)))
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_logprobs_equal_the_plain_computation(model, tensors):
    plain, generator = Plain(tensors), np.random.default_rng(0)
    for length in (1, 4, 9, 20):
        source = generator.integers(3, 51, size=length).tolist()
        target = [START, *generator.integers(3, 43, size=length + 2).tolist()]
        with torch.no_grad():
            got = model.logits(model(torch.tensor([source]), torch.tensor([target])))[0].log_softmax(-1)
        want = plain.logprobs(source, target)
        assert want.std() > 1
        assert np.abs(got.numpy() - want).max() < 1e-4


@pytest.mark.parametrize("num_beams", [1, 2, 4])
def test_names_are_transliterated(model, alphabets, num_beams):
    """The examples of CTranslate2's own tests, in one batch."""
    letters, latin = alphabets
    names = {"آتزمون": "atzmon", "آتشيسون": "achison"}
    found = beam_search(model, [[letters.index(c) for c in name] for name in names], num_beams=num_beams,
                        max_new_tokens=20, eos_ids=[END])  # fmt: skip
    assert [text[0].ids[-1] for text in found] == [END, END]
    assert ["".join(latin[i] for i in text[0].ids[:-1]) for text in found] == list(names.values())
