"""How much memory a training run needs at its highest, computed from its settings before it starts.

Several moments compete for the highest:

    loss                   the forward pass is done, the head is at work        every block's activations
    backward, last block   the way back begins                                  the same, and a block's gradients
    backward, first block  the way back ends                                    nearly all gradients
    update                 the optimizer's step                                 its temporaries
    evaluation             twice the rows, but nothing is kept for a way back   one block's activations
    sampling               the model writes                                     weights laid out anew (generate/fast.py)

Below stands what is alive at each, as the code has it: a formula names the function that it counts, and changes with
it. Nothing is fitted to measurements. Tensors are counted, which on a GPU is `torch.cuda.max_memory_allocated`; with
glibc on a CPU also the holes that its malloc leaves between them. What Python and the libraries take for themselves is
not counted. This module imports no torch.

N tokens of a micro-batch (rows x T), D width, H heads, G key/value heads, K head width, F feed-forward, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from zero2hero.config import DecoderConfig, TrainConfig

PARTS = ("weights", "gradients", "optimizer", "activations", "attention weights", "loss", "workspace", "holes")
FP32, INT64 = 4, 8  # bytes
CHUNK, ROWS = 1 << 21, 512  # logits made at a time, and at least of how many tokens (nn/logprobs.py)
SMALLEST = 4096  # numbers of a weight whose moments are in 8 bits (train/eight_bit.py)
NF4 = 0.5 + 1 / 64 + FP32 / (64 * 256)  # bytes of a weight: its code, its block's scale, and that scale's (nn/nf4.py)
METHODS = ("full", "lora", "qlora")  # everything learns; an adapter beside a base that does not; that base in NF4

Moment = dict[str, float]  # part -> bytes


@dataclass(frozen=True)
class Plan:
    """Bytes by moment and part."""

    moments: dict[str, Moment]

    @property
    def highest(self) -> str:
        """The moment at which most is needed."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak(self) -> float:
        """Bytes at that moment."""
        return sum(self.moments[self.highest].values())


@dataclass(frozen=True)
class Run:
    """What decides the memory of a run.

    Args:
        shape: derived, with its vocabulary.
        train: the loop's settings.
        precision: fp32, bf16 or fp16.
        device: cpu, cuda or mps.
        native: the kernels of native/fused.c are there.
        glibc: its malloc gives the memory (Linux).
        method: one of METHODS.
        lora_r: the rank of an adapter, which stands beside each of the layers' matrices.
    """

    shape: DecoderConfig
    train: TrainConfig
    precision: str = "fp32"
    device: str = "cpu"
    native: bool = True
    glibc: bool = True
    method: str = "full"
    lora_r: int = 16

    @property
    def frozen(self) -> bool:
        """Whether only an adapter learns."""
        return self.method != "full"

    @property
    def number(self) -> int:
        """Bytes of a number that the model computes with."""
        return FP32 if self.precision == "fp32" else 2

    @property
    def tokens(self) -> int:
        return self.train.per_device_train_batch_size * self.train.max_length

    @property
    def kernels(self) -> bool:
        return self.native and self.device == "cpu" and self.precision != "fp16"

    def attention(self, dropout: bool) -> str:
        """The form that `attend` (nn/attention.py) takes: explicit, fused, or plain (torch's with dropout on a CPU)."""
        if self.device == "cpu" and dropout:
            return "plain"
        short = 1 < self.train.max_length <= 512
        return "explicit" if self.device == "cpu" and self.precision == "bf16" and short else "fused"


def predict(run: Run) -> Plan:
    """The bytes that are alive at each moment."""
    c, N, b = run.shape, run.tokens, run.number
    L, inputs, head = c.num_hidden_layers, N * c.hidden_size * b, c.vocab_size * c.hidden_size
    learning = sum(learning_counts(run).values())
    separate = run.precision != "fp32"  # fp32 masters and gradients beside the model's copies (train/precision.py)
    averages = FP32 * learning * (run.train.ema_decay > 0)  # the moving average (train/ema.py)
    always: Moment = {
        "weights": weight_bytes(run) + FP32 * learning * separate + averages,
        "optimizer": optimizer_bytes(run),
        "workspace": dequantized_bytes(run),
    }
    complete = learning * FP32  # gradients after the way back; they stay until the next one begins
    before = complete if separate else 0

    block, shared = block_bytes(run), shared_bytes(run)
    if run.train.gradient_checkpointing:  # blocks keep their inputs; one at a time has its activations, and no holes
        kept = {"activations": shared + L * inputs * (not offloaded(run)), "attention weights": 0}
        again = {"activations": block["activations"] - inputs, "attention weights": block["attention weights"]}
    else:
        kept = {"activations": shared + L * block["activations"], "attention weights": L * block["attention weights"],
                "holes": holes_bytes(run)}  # fmt: skip
        again = {}
    # the head's gradient; a tied one waits for the embedding's and is added to it
    waiting = head * b * (not run.frozen)
    laid_out = head * b if run.frozen else sum(weight_counts(c).values()) * b  # what is no nn.Linear is called as it is
    moments = {
        "loss": _sum(always, kept, {"gradients": before, "loss": loss_bytes(run)}),
        "backward, last block": _sum(
            always, kept, again, {"gradients": before + waiting, "workspace": backward_bytes(run)}
        ),
        "backward, first block": _sum(
            always, {"activations": shared}, block,
            {"gradients": complete + waiting * (1 + separate), "workspace": inputs},
        ),
        "update": _sum(always, {"gradients": complete, "workspace": update_bytes(run)}),
        "evaluation": _sum(always, {"gradients": complete, "workspace": averages}, evaluation_bytes(run)),
        "sampling": _sum(always, {"gradients": complete, "workspace": averages + laid_out}),
    }  # fmt: skip
    return Plan(moments)


def _sum(*moments: Moment) -> Moment:
    return {part: sum(m.get(part, 0) for m in moments) for part in PARTS}


# --- weights and optimizer ------------------------------------------------------------------------------------


def matrices(c: DecoderConfig) -> Counter[tuple[int, int]]:
    """The layers' matrices: how many there are of each shape."""
    D, F, L = c.hidden_size, c.intermediate_size, c.num_hidden_layers
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    found: Counter[tuple[int, int]] = Counter()
    for shape, count in (((queries, D), 1), ((keys, D), 2), ((D, queries), 1), ((D, F), 1),
                         ((F, D), 2 if c.gated else 1)):  # fmt: skip
        found[shape] += count * L
    return found


def weight_counts(c: DecoderConfig) -> dict[str, int]:
    """Weights by kind, as train/optim.py sorts them."""
    D, F, L = c.hidden_size, c.intermediate_size, c.num_hidden_layers
    norm = D * (2 if c.norm == "layernorm" else 1)
    qkv = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    biases = c.attention_bias * qkv + c.output_bias * D + c.mlp_bias * (D + F * (2 if c.gated else 1))
    learned = c.max_position_embeddings * D * (c.position == "learned")
    return {
        "embeddings": c.vocab_size * D + learned,
        "heads": 0 if c.tie_word_embeddings else c.vocab_size * D,
        "matrices": sum(rows * columns * count for (rows, columns), count in matrices(c).items()),
        "vectors": L * (2 * norm + 2 * c.head_dim * c.qk_norm + biases) + norm,
    }


def adapter_matrices(run: Run) -> Counter[tuple[int, int]]:
    """A [r, in] and B [out, r] beside each of the layers' matrices."""
    found: Counter[tuple[int, int]] = Counter()
    for (rows, columns), count in matrices(run.shape).items():
        found[run.lora_r, columns] += count
        found[rows, run.lora_r] += count
    return found


def learning_matrices(run: Run) -> Counter[tuple[int, int]]:
    return adapter_matrices(run) if run.frozen else matrices(run.shape)


def learning_counts(run: Run) -> dict[str, int]:
    """The weights that learn, by kind."""
    if not run.frozen:
        return weight_counts(run.shape)
    every = sum(rows * columns * count for (rows, columns), count in adapter_matrices(run).items())
    return {"embeddings": 0, "heads": 0, "matrices": every, "vectors": 0}


def weight_bytes(run: Run) -> float:
    """What the model computes with: in its precision, but for quantized matrices; an adapter's copies too."""
    counts = weight_counts(run.shape)
    every, inner = sum(counts.values()), counts["matrices"]
    adapter = sum(learning_counts(run).values()) * run.frozen
    quantized = inner * (run.number - NF4) * (run.method == "qlora")
    return (every + adapter) * run.number - quantized


def optimizer_bytes(run: Run) -> float:
    """The optimizers' states (train/optim.py)."""
    c, counts, shapes = run.shape, learning_counts(run), learning_matrices(run)
    every, inner, moment = sum(counts.values()), counts["matrices"], FP32
    tables: Counter[tuple[int, int]] = Counter()
    if not run.frozen:
        tables[c.vocab_size, c.hidden_size] = 1 if c.tie_word_embeddings else 2
        tables[c.max_position_embeddings, c.hidden_size] += c.position == "learned"
    if run.train.optim == "muon":  # a momentum for matrices, AdamW's two moments for the rest
        return moment * inner + 2 * moment * (every - inner)
    if run.train.optim == "adamw_8bit":  # two bytes, and two scales in 256, for matrices (no tiny ones) and heads
        short = counts["heads"] + sum(n * rows * columns for (rows, columns), n in shapes.items()
                                      if rows * columns >= SMALLEST)  # fmt: skip
        return short * (2 + 2 * FP32 / 256) + 2 * moment * (every - short)
    if run.train.optim == "adafactor":  # a row and a column of each matrix, all of a vector
        edges = sum((rows + columns) * count for (rows, columns), count in (tables + shapes).items())
        return moment * (edges + counts["vectors"])
    moments = {"sgd": int(run.train.momentum > 0), "lion": 1}.get(run.train.optim, 2)
    return moments * moment * every


def update_bytes(run: Run) -> float:
    """Temporaries of the optimizer's step. Those of Adam and AdamW are fused and have none."""
    c, shapes = run.shape, learning_matrices(run)
    table = 0 if run.frozen else c.vocab_size * c.hidden_size
    largest = FP32 * max(table, *(rows * columns for rows, columns in shapes))
    if run.train.optim == "muon":
        b = run.number if run.precision == "bf16" else FP32
        return max(count * _orthogonalize_bytes(*shape, b) for shape, count in shapes.items())
    if run.train.optim == "lion":  # the directions of all weights
        return FP32 * sum(learning_counts(run).values())
    # one weight after another: decoded moments and their codes; a squared update, a gradient with momentum
    return largest * {"adamw_8bit": 6, "adafactor": 3, "sgd": 2}.get(run.train.optim, 0)


def _orthogonalize_bytes(rows: int, columns: int, b: int) -> float:
    """Of one matrix (train/muon.py): the momentum that looks ahead, one or two iterates, and four small squares."""
    oblong = max(rows, columns) >= 1.5 * min(rows, columns)
    return ((2 if oblong else 3) * rows * columns + 4 * min(rows, columns) ** 2) * b


# --- activations ----------------------------------------------------------------------------------------------


def block_bytes(run: Run) -> Moment:
    """What the autograd functions of one block save for the way back."""
    c, N, T, b = run.shape, run.tokens, run.train.max_length, run.number
    D, H, G, K, F = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.intermediate_size
    projected, form = (H + 2 * G) * K, run.attention(c.dropout > 0)
    # both norms save their input, the residual stream; _JointLinear saves their output
    numbers = 4 * D
    # attention saves queries, keys and values; the fused form alone can do with fewer heads of the latter
    attended = {"fused": projected * b, "explicit": 3 * H * K * b, "plain": 3 * H * K * FP32}[form]
    # QK-norm saves its inputs, which are parts of the projections' one output
    numbers += projected * c.qk_norm
    # the output projection saves its input; the fused form its output, the same memory unless heads lie apart in it
    numbers += H * K * (2 if form == "fused" and c.position == "rotary" else 1)
    # _SiluProduct saves gate and up (GELU's form also what it multiplies), down_proj its input; relu's output is that
    numbers += F * {"swiglu": 3, "geglu": 4, "relu": 1}.get(c.feedforward, 2)
    # each norm keeps one fp32 number a row (layernorm two), the fused form one a head
    statistics = 2 * (2 if c.norm == "layernorm" else 1) + (H + G) * c.qk_norm + H * (form == "fused")
    dropped = 2 * dropout_bytes(run)
    adapters = 0.0  # each saves x A^T; those of plain matrices also A and B in the model's precision (tune/lora.py)
    if run.frozen:
        sides = sum((rows + columns) * count for (rows, columns), count in matrices(c).items()) // c.num_hidden_layers
        count = sum(matrices(c).values()) // c.num_hidden_layers
        adapters = run.lora_r * b * (N * count + (0 if run.method == "qlora" else sides))
    return {
        "activations": N * (numbers * b + attended + statistics * FP32) + dropped + adapters,
        "attention weights": N * T * pair_bytes(run, form),
    }


def pair_bytes(run: Run, form: str) -> int:
    """What a block saves for each pair of a query and a key."""
    heads = run.shape.num_attention_heads
    if form == "explicit":  # softmax's output
        return heads * run.number
    if form == "plain":  # softmax's output, what was dropped, and their product
        return 3 * heads * FP32
    # only the mask, if it is not the plain triangle: torch turns it from bools to numbers in every block
    return run.number * (run.train.document_mask or run.shape.sliding_window is not None)


def dropout_bytes(run: Run) -> float:
    """What was dropped from one [N, D]: a bool each, on a CPU a number."""
    each = run.number if run.device == "cpu" else 1
    return run.tokens * run.shape.hidden_size * each * (run.shape.dropout > 0)


def shared_bytes(run: Run) -> float:
    """Outside the blocks: the batch, the mask, the rotation's angles, and the last norm's input."""
    c, N, T = run.shape, run.tokens, run.train.max_length
    documents = run.train.document_mask
    mask = (N if documents else T) * T
    angles = (N if documents else T) * c.head_dim * run.number * (c.position == "rotary")
    return 4 * INT64 * N + mask + angles + N * c.hidden_size * run.number + dropout_bytes(run)


def holes_bytes(run: Run) -> float:
    """What is free between the blocks' saved tensors on a CPU and too small for others (`keep_memory` of machine.py).

    torch asks for memory that is aligned to 64 bytes, and glibc then looks for a hole 96 bytes larger than what is
    asked for. So the hole that a freed temporary leaves is too small for the next block's. In fp32 the gradients of
    the step before were freed as well, and each is smaller than activations.
    """
    c, N, b = run.shape, run.tokens, run.number
    if run.device != "cpu" or not run.glibc:
        return 0
    D, H, G, K, F = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.intermediate_size
    projected, gated = (H + 2 * G) * K, c.gated
    numbers = 2 * D  # what attention and feed-forward add to the residual stream
    if c.qk_norm:  # laid out for the norm, then what it returns
        numbers += 2 * (H + G) * K
    elif c.position == "rotary":  # queries, keys and values as they were projected
        numbers += projected
    if run.attention(c.dropout > 0) != "fused":  # attention's output, before heads stand side by side
        numbers += H * K
    stacked = projected * D + 2 * F * D * gated  # weights of projections that are made together
    gradients = FP32 * sum(learning_counts(run).values()) * (run.precision == "fp32")
    return c.num_hidden_layers * (N * numbers + stacked) * b + gradients


def offloaded(run: Run) -> bool:
    return run.train.activation_offload and run.device != "cpu"


def loss_bytes(run: Run) -> float:
    """`nll_sum` at work on its last chunk."""
    c, N, b = run.shape, run.tokens, run.number
    head, rows = c.vocab_size * c.hidden_size, min(N, max(ROWS, CHUNK // c.vocab_size))
    hidden = 3 * N * c.hidden_size * b  # all hidden states, those with a target, and their gradient
    logits = rows * c.vocab_size * (b if run.kernels else b + FP32)
    learned = head * (not run.frozen)
    part = learned * b * (b != FP32)  # a chunk's gradient of the head, before it is added to the sum in fp32
    smoothing = 2 * N * c.hidden_size * FP32 * (run.train.label_smoothing_factor > 0)  # targets' rows of the head
    return hidden + learned * FP32 + max(logits + part, smoothing)


def backward_bytes(run: Run) -> float:
    """Gradients of activations within the last block, beyond the saved ones, which are freed one after another."""
    c, N, b = run.shape, run.tokens, run.number
    D, F, attended = c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim
    gated = c.gated
    # the residual stream's; gate's and up's, which without native kernels are made of parts
    feedforward = D + F * ((2 if run.kernels else 4) if gated else 1)
    # then the feed-forward's own are free; attention weights' gradient, and those of queries, keys, values and output
    scores = c.num_attention_heads * run.train.max_length * (run.attention(c.dropout > 0) != "fused")
    attention = D + scores + 5 * attended - F * (3 if gated else 2) - 2 * D
    if run.method == "full":  # and down_proj's
        return N * b * max(feedforward, attention) + D * F * b * (1 if b == FP32 else 2)
    if run.method == "lora":  # no gradient of a weight, but of the projections that are computed together the stack
        return N * b * max(feedforward, attention) + (2 if gated else 1) * D * F * b
    # the adapter's own way back: the gradient times its scale, and its part of the input's
    return N * b * (max(feedforward, attention) + F + D)


def dequantized_bytes(run: Run) -> float:
    """The largest quantized matrix in full, for one product after another."""
    return run.number * max(rows * columns for rows, columns in matrices(run.shape)) * (run.method == "qlora")


def evaluation_bytes(run: Run) -> Moment:
    """The largest moment of a block on twice the rows, where nothing is saved (train/pretrain.py, `evaluation`)."""
    c, N, T, b = run.shape, 2 * run.tokens, run.train.max_length, run.number
    D, attended, F = c.hidden_size, c.num_attention_heads * c.head_dim, c.intermediate_size
    projected = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    feedforward: Moment = {"activations": N * b * (2 * D + F * (3 if c.gated else 2))}
    attention: Moment = {
        "activations": N * b * (2 * D + projected + 2 * attended),
        "attention weights": N * T * pair_bytes(run, run.attention(dropout=False)),
    }
    return max(feedforward, attention, key=lambda parts: sum(parts.values()))
