"""Sharded and quantised weights and the inner loop: what may be split over processes, and what must stay as it is.

An inner gradient passes through the suffix blocks, the final norm and the head many times within one forward pass.
FSDP2 takes the first such pass through a unit for the end of the whole backward pass; the communication of tensor
parallelism has no second derivative; the quantised layers of torch.ao have no derivative at all. Prefix blocks are
outside the inner loop: they may be sharded and quantised in any way.
"""

import sys

import torch


def check_units(model: torch.nn.Module) -> None:
    """Check that FSDP2 makes no units within the inner loop of a [`TTTE2EModel`].

    Raises:
        ValueError: naming the unit and the remedy.
    """
    if not _is_distributed():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in inner_modules(model):
        units = [type(part).__name__.removeprefix("FSDP") for part in module.modules() if isinstance(part, FSDPModule)]
        if units:
            raise ValueError(
                f"FSDP shards a {units[0]} as a unit of its own, which cuts the inner loop: give fully_shard only the "
                f"prefix blocks (model.layers[:{model.config.num_prefix_layers}], of class TTTE2EDecoderLayer) and "
                "then the whole model."
            )


def check_tensor_parallelism(model: torch.nn.Module) -> None:
    """Check that no weight within the inner loop of a [`TTTE2EModel`] is tensor-parallel, for second order.

    Under FSDP2 this must be called within the forward pass, where the weights of a unit are whole.

    Raises:
        ValueError: naming the weight and the remedy.
    """
    if not _is_distributed():
        return
    from torch.distributed.tensor import DTensor

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in inner_modules(model):
        sharded = [names[id(parameter)] for parameter in module.parameters() if isinstance(parameter.data, DTensor)]
        if sharded:
            raise ValueError(
                f"`meta_gradient='second_order'` would be wrong with the tensor-parallel weight {sharded[0]!r}, whose "
                "communication has no second derivative: use `meta_gradient='first_order'` or no tensor parallelism."
            )


def check_quantisation(model: torch.nn.Module) -> None:
    """Check that no layer within the inner loop of a [`TTTE2EModel`] is one of torch.ao's quantised layers.

    Raises:
        ValueError: naming a layer, and what to leave out.
    """
    utils = sys.modules.get("torch.ao.nn.quantized.modules.utils")
    if utils is None:  # then nobody has made such a layer
        return
    parts = (part for module in inner_modules(model) for part in module.modules())
    found = {id(part) for part in parts if isinstance(part, utils.WeightedQuantizedModule)}
    if found:
        names = [name for name, part in model.named_modules() if id(part) in found]
        blocks = [f"layers.{index}" for index in range(model.config.num_prefix_layers, len(model.layers))]
        raise ValueError(
            f"{names[0]!r} (and {len(names) - 1} others) is quantised by torch.ao, which passes no gradient on, so "
            f"that the inner loop cannot learn through it: leave {blocks} and 'lm_head' out of the quantisation, or "
            "read with `test_time_training=False`."
        )


def inner_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules of a [`TTTE2EModel`] through which inner gradients pass."""
    modules = [*model.layers[model.config.num_prefix_layers :], model.norm, model.lm_head]
    return [*modules, model.embed_tokens] if model.config.tie_word_embeddings else modules


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
