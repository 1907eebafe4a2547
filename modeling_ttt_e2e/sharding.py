"""Sharded weights and the inner loop: what may be split over processes, and what must be whole on each of them.

An inner gradient passes through the suffix blocks, the final norm and the head many times within one forward pass.
FSDP2 takes the first such pass through a unit for the end of the whole backward pass; the communication of tensor
parallelism has no second derivative. Prefix blocks are outside the inner loop and may be sharded in any way.
"""

import torch


def check_sharding(model: torch.nn.Module, second_order: bool) -> None:
    """Check that every process holds whole what the inner loop of a [`TTTE2EModel`] computes with.

    Args:
        second_order: the inner gradients are going to be differentiated.

    Raises:
        ValueError: naming the sharded module or weight and the remedy.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    first = model.config.num_prefix_layers
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in inner_modules(model):
        if any(isinstance(part, FSDPModule) for part in module.modules()):
            raise ValueError(
                f"FSDP shards a {type(module).__name__} as a unit of its own, which cuts the inner loop: give "
                f"fully_shard only the prefix blocks (model.layers[:{first}], of class TTTE2EDecoderLayer) and then "
                "the whole model."
            )
        sharded = [names[id(parameter)] for parameter in module.parameters() if isinstance(parameter.data, DTensor)]
        if sharded and second_order:
            raise ValueError(
                f"`meta_gradient='second_order'` would be wrong with the tensor-parallel weight {sharded[0]!r}, whose "
                "communication has no second derivative: use `meta_gradient='first_order'` or no tensor parallelism."
            )


def inner_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules of a [`TTTE2EModel`] through which inner gradients pass."""
    modules = [*model.layers[model.config.num_prefix_layers :], model.norm, model.lm_head]
    tied = getattr(model.lm_head, "weight", None) is model.embed_tokens.weight
    return [*modules, model.embed_tokens] if tied else modules
