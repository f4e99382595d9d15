"""Models too large for one device, divided among the ranks: functions model -> model.

Fully sharded data parallelism (Rajbhandari et al. 2019, "ZeRO", arXiv 1910.02054; Zhao et al. 2023, arXiv 2304.11277):
each rank keeps an equal part of every weight, gradient and moment. A block's weights are gathered just before it
computes and dropped after it; its gradients are summed and divided among the ranks as soon as they are made. Ranks
still take micro-batches of their own.

Tensor parallelism (Shoeybi et al. 2019, "Megatron-LM", arXiv 1909.08053): the ranks of a group work on the same
micro-batch, each with some of the heads and some of the feed-forward's width. The rows of q, k, v, gate and up, and the
columns of o and down are divided, so that one sum over the group after each half of a block makes the result whole.
Embedding, head and norms are held by all. It asks for a fast connection: keep the group within one machine.

Both leave DTensors as parameters: tensors that know which part of the whole they are. The optimizers get plain tensors,
each rank's own parts, which is all they need where they work number by number. Muon needs whole matrices: see
`on_whole`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from zero2hero.config import DecoderConfig, TrainConfig
from zero2hero.errors import UserError
from zero2hero.models.decoder import Decoder
from zero2hero.train.parallel import Ranks
from zero2hero.train.precision import MasterWeights

HEAD_NORMS = ("q_norm", "k_norm")  # of every head alike: under tensor parallelism a rank sees the gradient of its heads


def parallelize(model: nn.Module, ranks: Ranks, config: TrainConfig, dtype: torch.dtype) -> nn.Module:
    """The model as `config` has it divided (`tp_size`, `fsdp`) and compiled (`torch_compile`); the same object.

    Groups of tensor-parallel ranks keep parts of the weights among them too, as under `fsdp`.

    Raises:
        UserError: it is no decoder, or settings that do not go together.
    """
    if not isinstance(model, Decoder):
        asked = [name for name in ("fsdp", "torch_compile") if getattr(config, name)]
        asked += ["tp_size"] * (config.tp_size > 1)
        if asked:
            raise UserError(f"train.{asked[0]} is for decoders, and this is {type(model).__name__}: leave it out")
        return model
    if ranks.tp_size > 1:
        tensor_parallel(model, ranks)
    if config.torch_compile:
        compile_blocks(model)
    if ranks.size > 1 and (config.fsdp or ranks.tp_size > 1):
        if config.optim in ("adafactor", "adamw_8bit") or dtype == torch.float16:
            what = "--precision fp16" if dtype == torch.float16 else f"--train.optim {config.optim}"
            raise UserError(f"{what} does not work on parts of a weight: leave out train.fsdp and train.tp_size")
        fully_sharded(model, ranks, dtype)
    return model


def tensor_parallel(model: Decoder, ranks: Ranks) -> None:
    """Divide each block's heads and inner width over the ranks of a tensor-parallel group.

    Raises:
        UserError: they cannot be divided by `ranks.tp_size`.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    c = model.config
    if c.moe.num_experts:
        raise UserError("train.tp_size does not divide a mixture of experts: leave it out, and use train.fsdp")
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(c, name) % ranks.tp_size:
            raise UserError(f"model.{name} {getattr(c, name)} cannot be divided by train.tp_size {ranks.tp_size}")
    inputs = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    for block in model.layers:
        names = {name for name, _ in block.named_modules()}
        plan: dict[str, Any] = {name: ColwiseParallel() for name in inputs if name in names}
        plan |= {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
        parallelize_module(block, ranks.mesh["tensor"], plan)


def fully_sharded(model: Decoder, ranks: Ranks, dtype: torch.dtype) -> None:
    """Keep a part of every parameter here, in fp32; blocks compute in `dtype`, gradients are summed in fp32."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.layers:
        fully_shard(block, mesh=ranks.mesh["data"], mp_policy=policy)
    # the loss takes the head's weights after the forward pass has ended: what the root holds stays whole until then
    fully_shard(model, mesh=ranks.mesh["data"], mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # gradients of sums: the loop divides
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def compile_blocks(model: Decoder, **options: Any) -> None:
    """torch.compile of each block: one small graph, compiled once for all blocks of one shape."""
    for block in model.layers:
        block.compile(**options)


def whole_model(config: DecoderConfig, weights: dict[str, Tensor]) -> Decoder:
    """An undivided model of these weights (not copied), in evaluation mode."""
    with torch.device("meta"):
        model = Decoder(config)
    for name, weight in weights.items():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, nn.Parameter(weight))
    if config.tie_word_embeddings and not model.classifies:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval()


def master_weights(model: nn.Module, dtype: torch.dtype, ranks: Ranks) -> MasterWeights:
    """The fp32 weights of a model, divided or not."""
    divided = any(hasattr(p, "placements") for p in model.parameters())
    return ShardedWeights(model, ranks) if divided else MasterWeights(model, dtype)


class ShardedWeights(MasterWeights):
    """The fp32 parameters that the optimizer owns, where they are divided: this rank's part of each, a plain tensor.

    They share memory with the model's own, which are cast to the dtype of computation when they are gathered.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        from torch.distributed.fsdp import FSDPModule

        self.ranks = ranks
        divided: dict[str, Any] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.copies = divided
        self.gatherers = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.parameters = {name: nn.Parameter(p.detach().to_local()) for name, p in divided.items()}
        self.shared, self.divided = True, True
        self.loss_scale = None
        for name, copy in self.copies.items():
            master: Any = self.parameters[name]
            master.whole = copy
            copy.register_post_accumulate_grad_hook(functools.partial(self._add, master))

    @staticmethod
    def _add(master: Tensor, copy: Tensor) -> None:
        """A micro-batch's gradient, by now summed over the data ranks."""
        gradient = copy.grad.to_local()  # type: ignore[union-attr]
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        copy.grad = None

    def sum_over(self, ranks: Ranks) -> None:
        """Over the data ranks it is done. A norm that all heads share has seen only this rank's."""
        if ranks.tp_size > 1:
            norms = [p.grad for name, p in self.parameters.items() if name.split(".")[-2] in HEAD_NORMS]
            ranks.sum_([grad for grad in norms if grad is not None], "tensor")

    def norm(self) -> float:
        """Each rank adds the squares of its parts, divided by the number of ranks that hold the same part."""
        norms = torch._foreach_norm(self.gradients)
        squares = sum(float(norm) ** 2 / self._copies(p) for p, norm in zip(self.parameters.values(), norms))
        return math.sqrt(self.ranks.sum({"": squares}, over="all")[""])

    def _copies(self, part: Any) -> int:
        """How many ranks hold this part."""
        mesh, placements = part.whole.device_mesh, part.whole.placements
        return self.ranks.size // math.prod(mesh.size(i) for i, p in enumerate(placements) if not p.is_replicate())

    def publish(self) -> None:
        """The memory is shared; but what was gathered of other values, for an evaluation, must not be used again."""
        for module in self.gatherers:
            module.reshard()

    def gathered(self) -> dict[str, Tensor]:
        """The whole weights, on the CPU; every rank must call it."""
        return {name: as_whole(p, p.detach()).full_tensor().cpu() for name, p in self.parameters.items()}


# --- parts of a whole: `part.whole` is the DTensor that the part belongs to ------------------------------------


def as_whole(part: Any, value: Tensor) -> Any:
    """A tensor that is divided as `part` is (its gradient, its moment), as a DTensor."""
    from torch.distributed.tensor import DTensor

    whole = part.whole
    return DTensor.from_local(
        value, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def as_part(part: Any, whole: Tensor) -> Tensor:
    """Of a whole tensor that every rank has, what belongs to `part`."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = part.whole.device_mesh, part.whole.placements
    everywhere = DTensor.from_local(whole.to(part.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=placements).to_local()


def whole_shape(p: Any) -> torch.Size:
    """Of the matrix that `p` is or belongs to."""
    return p.whole.shape if hasattr(p, "whole") else p.shape


def division(p: Any) -> Hashable:
    """Equal for parameters of one shape that are divided in the same way, on all ranks."""
    return (p.whole.shape, p.whole.placements) if hasattr(p, "whole") else p.shape


def on_whole(function: Callable[[Tensor], Tensor], params: list[Tensor], values: Tensor) -> Tensor:
    """`function` of a batch of matrices [n, ...], where `values` holds of each the part that `params` are of theirs.

    Returns the same parts of what it makes.
    """
    if not hasattr(params[0], "whole"):
        return function(values)
    made = function(torch.stack([as_whole(p, value).full_tensor() for p, value in zip(params, values)]))
    return torch.stack([as_part(p, whole) for p, whole in zip(params, made)])
