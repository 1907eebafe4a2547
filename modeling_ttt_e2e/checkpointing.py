"""Checkpointing through time: meta-train on long sequences without keeping the graph of every inner step.

A group of inner steps is one `torch.autograd.Function`. Its forward pass runs without a graph and stores only the state
at the group's beginning: fast weights, and the chunks of keys and values within the window, which neighbouring groups
share. Its backward pass runs the group again, this time with the graph, and differentiates it.

`torch.utils.checkpoint` is no substitute: every inner gradient inside its region triggers a recomputation of the
region so far, which costs up to twelve executions per step and keeps more memory than no checkpointing at all.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from .inner_loop import InnerState, MiniBatch, StepOutput, UpdateRule, run_inner_loop
from .twice_differentiable import autocast_type


def run_checkpointed(
    suffix: Callable,
    state: InnerState,
    batches: Sequence[MiniBatch],
    rule: UpdateRule,
    parameters: Sequence[torch.Tensor],
    every: int | None,
    offload: bool = False,
) -> tuple[InnerState, list[StepOutput]]:
    """`run_inner_loop` with the same values and gradients, and one stored state per group.

    Args:
        parameters: every slow weight that `suffix` uses and that takes a gradient.
        every: inner steps per group; None for the square root of their number.
        offload: keep the stored fast weights in CPU memory.
    """
    every = every or max(1, round(math.sqrt(len(batches))))
    outputs = []
    for first in range(0, len(batches), every):
        group = _Group(suffix, state, batches[first : first + every], rule, offload)
        flat = _CheckpointedGroup.apply(group, *group.tensors(), *parameters)
        state, new_outputs = group.unflatten(flat)
        outputs.extend(new_outputs)
    return state, outputs


@dataclass
class _Group:
    """A group of inner steps as a function from tensors to tensors."""

    suffix: Callable
    state: InnerState
    batches: Sequence[MiniBatch]
    rule: UpdateRule
    offload: bool
    final: InnerState | None = None
    outputs: list[StepOutput] | None = None

    def tensors(self) -> list[torch.Tensor]:
        return [*(batch.inputs for batch in self.batches), *self.state.tensors()]

    def to_store(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors that wait for the backward pass, the fast weights among them on the CPU when offloading."""
        if not self.offload or self.state.fast is None:
            return list(tensors)
        first = len(self.batches)
        end = first + len(self.state.fast.tensors)
        return [*tensors[:first], *map(_on_cpu, tensors[first:end]), *tensors[end:]]

    def run(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        inputs, state = tensors[: len(self.batches)], self.state.with_tensors(tensors[len(self.batches) :])
        batches = [replace(batch, inputs=own) for batch, own in zip(self.batches, inputs, strict=True)]
        self.final, self.outputs = run_inner_loop(self.suffix, state, batches, self.rule)
        flat = [*self.final.tensors(), *(tensor for output in self.outputs for tensor in output.differentiable())]
        # An output that is itself an input must be a new tensor, or autograd takes it for an in-place result.
        return tuple(tensor.view_as(tensor) for tensor in flat)

    def unflatten(self, flat: Sequence[torch.Tensor]) -> tuple[InnerState, list[StepOutput]]:
        count = len(self.final.tensors())
        state, rest, outputs = self.final.with_tensors(flat[:count]), list(flat[count:]), []
        for output in self.outputs:
            count = len(output.differentiable())
            outputs.append(output.with_differentiable(rest[:count]))
            rest = rest[count:]
        self.final = self.outputs = None  # the tensors live in the graph now; do not hold them twice
        return state, outputs


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in CPU memory, pinned where that makes the way back faster; the tensor itself if it is there already."""
    if tensor.device.type == "cpu":
        return tensor
    copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
    return copy.copy_(tensor)


class _CheckpointedGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, *tensors):
        count = len(group.tensors())
        ctx.group, ctx.devices_of_tensors = group, [tensor.device for tensor in tensors[:count]]
        ctx.save_for_backward(*group.to_store(tensors[:count]))
        # Not saved: a hook on saved tensors would give back copies, and the parameters would take no gradient.
        ctx.parameters = tensors[count:]
        device = autocast_type(tensors[0].device)
        ctx.autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
        }
        ctx.random_state = torch.get_rng_state()
        ctx.devices, ctx.device_states = get_device_states(*tensors)
        # Casts made without a graph must not be reused by later operations that need one.
        with torch.autocast(**ctx.autocast, cache_enabled=False):
            return group.run([tensor.detach() for tensor in tensors[:count]])

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        group, parameters = ctx.group, ctx.parameters
        tensors = [t.to(device) for t, device in zip(ctx.saved_tensors, ctx.devices_of_tensors, strict=True)]
        needs_grad = ctx.needs_input_grad[1 : 1 + len(tensors)]
        with torch.random.fork_rng(ctx.devices), torch.enable_grad(), torch.autocast(**ctx.autocast):
            torch.set_rng_state(ctx.random_state)
            set_device_states(ctx.devices, ctx.device_states)
            copies = [t.detach().requires_grad_(needed) for t, needed in zip(tensors, needs_grad, strict=True)]
            outputs = group.run(copies)
        wanted = [copy for copy in copies if copy.requires_grad] + [p for p in parameters if p.requires_grad]
        pairs = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if o.requires_grad and g is not None]
        found = iter(
            torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
            if pairs
            else [None] * len(wanted)
        )
        group.final = group.outputs = None
        return None, *(next(found) if tensor.requires_grad else None for tensor in [*copies, *parameters])
