"""RoPE on a device without float64, such as Apple's MPS: angles are exact all the same.

A stand-in for the device: tensors that say they are on it, and refuse what it cannot do.
"""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from ttt_e2e.layers import TTTE2ERotaryEmbedding
from ttt_e2e.modeling_recurrent_hybrid import RecurrentHybridRotaryEmbedding
from ttt_e2e.ttt_linear_mlp import rotate_pairs, rotation_angles

from .helpers import small_config
from .recurrent import hybrid_config

POSITIONS = torch.tensor([[0, 1, 131_071, 10_000_019]])


class OnMPS(torch.Tensor):
    """A tensor on the stand-in."""

    @property
    def device(self):
        return torch.device("mps")


class StandIn(TorchFunctionMode):
    """Moves tensors to and from the stand-in, and refuses float64 on it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.to and any(str(value) == "mps" for value in (*args[1:], *kwargs.values())):
            return args[0].as_subclass(OnMPS)
        if function is torch.Tensor.to and any(str(value) == "cpu" for value in (*args[1:], *kwargs.values())):
            return args[0].as_subclass(torch.Tensor)
        result = function(*args, **kwargs)
        if isinstance(result, OnMPS) and result.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype: the MPS framework has none.")
        return result


def rotary(positions):
    embedding = TTTE2ERotaryEmbedding(small_config())
    return embedding(positions, torch.float32)


def rotary_of_the_hybrid(positions):
    embedding = RecurrentHybridRotaryEmbedding(hybrid_config("attention-only"))
    return embedding(torch.ones(1).as_subclass(type(positions)), positions)


def rotation_of_layers(positions):
    x = torch.ones(1, 1, 1, 4, 8).as_subclass(type(positions))
    return (rotate_pairs(x, rotation_angles(positions[:, None], 8, 10000.0)),)


@pytest.mark.parametrize("compute", [rotary, rotary_of_the_hybrid, rotation_of_layers])
def test_angles_are_exact_without_float64(compute):
    expected = compute(POSITIONS)
    with StandIn():
        found = compute(POSITIONS.as_subclass(OnMPS))
        assert all(isinstance(tensor, OnMPS) and tensor.dtype == torch.float32 for tensor in found)
    for own, wanted in zip(found, expected, strict=True):
        assert torch.equal(own.as_subclass(torch.Tensor), wanted)


def test_the_stand_in_refuses_float64():
    with StandIn(), pytest.raises(TypeError, match="float64"):
        POSITIONS.as_subclass(OnMPS).double()
