"""Speed of a TTT-Linear or TTT-MLP layer: the dual form against the primal one, and time per token by length.

Times are medians of `speed.in_turns`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from .. import TTTLayersConfig
from ..modeling_ttt_layers import TTTLayersDecoderLayer
from ..tokens import MiniBatchGrid
from ..ttt_linear_mlp import dual_step, primal_step
from ..ttt_mixers import MixerCall, TTTMixer, TTTState
from .speed import elapsed, in_turns

FORMS = {"dual": dual_step, "primal": primal_step}


@dataclass
class TTTLayerSizes:
    """Sizes of the measured layer and of its input.

    The primal form holds one copy of the inner weights per token, of TTT-MLP's 8 x as many as of TTT-Linear's; so
    TTT-MLP trains on fewer tokens here.
    """

    hidden_size: int = 512
    num_attention_heads: int = 8
    mini_batch_size: int = 16
    linear_tokens: int = 2048
    mlp_tokens: int = 256
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    written_tokens: int = 128

    def tokens(self, mixer: str) -> int:
        """Tokens of a training step."""
        return self.linear_tokens if mixer == "ttt_linear" else self.mlp_tokens

    def build(self, mixer: str, device: str) -> TTTMixer:
        """A layer of these sizes with random weights, float32."""
        torch.manual_seed(0)
        config = TTTLayersConfig(
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            mini_batch_size=self.mini_batch_size,
            num_hidden_layers=1,
            mixer_types=[mixer],
        )
        layer = TTTLayersDecoderLayer(config, 0).mixer
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        return layer.to(device)

    def inputs(self, tokens: int, device: str) -> torch.Tensor:
        """Random hidden states [1, tokens, hidden_size]."""
        return torch.randn(1, tokens, self.hidden_size, generator=torch.Generator().manual_seed(0)).to(device)


def measure_forms(sizes: TTTLayerSizes, rounds: int, device: str = "cpu") -> dict[str, float]:
    """Seconds of a training step (forward and backward) of one layer, in both forms.

    Returns:
        Median seconds by the name of the variant.
    """
    variants = {}
    for mixer in ("ttt_linear", "ttt_mlp"):
        x = sizes.inputs(sizes.tokens(mixer), device)
        for name, form in FORMS.items():
            layer = sizes.build(mixer, device)
            layer.form = form
            variants[f"{mixer}, {x.shape[1]} tokens, {name} form"] = partial(layer_training_step, layer, x)
    return median_seconds(variants, rounds, device)


def measure_lengths(sizes: TTTLayerSizes, rounds: int, device: str = "cpu") -> dict[str, float]:
    """Seconds per token of one TTT-Linear layer: reading a text of some length, and writing after it.

    Returns:
        Median seconds per token by the name of the variant.
    """
    layer, variants, tokens = sizes.build("ttt_linear", device), {}, {}
    for length in sizes.lengths:
        x, name = sizes.inputs(length, device), f"reading {length} tokens"
        variants[name], tokens[name] = partial(read_with_layer, layer, x), length
    for length in (sizes.lengths[0], sizes.lengths[-1]):
        name = f"writing after {length} tokens"
        state = read_with_layer(layer, sizes.inputs(length, device))
        variants[name], tokens[name] = partial(write_with_layer, layer, state, length, sizes), sizes.written_tokens
    seconds = median_seconds(variants, rounds, device)
    return {name: value / tokens[name] for name, value in seconds.items()}


def median_seconds(variants: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median time of each variant over rounds of all of them."""
    seconds = in_turns({name: partial(elapsed, run, device) for name, run in variants.items()}, rounds, "Measuring")
    return {name: median(values) for name, values in seconds.items()}


def layer_training_step(layer: TTTMixer, x: torch.Tensor) -> None:
    """Forward and backward."""
    layer.zero_grad()
    layer(x, _call(layer, 0, x), None)[0].sum().backward()


@torch.no_grad()
def read_with_layer(layer: TTTMixer, x: torch.Tensor) -> TTTState:
    """What a layer has learned from x [1, T, hidden_size]."""
    return layer(x, _call(layer, 0, x), None)[1]


@torch.no_grad()
def write_with_layer(layer: TTTMixer, state: TTTState, length: int, sizes: TTTLayerSizes) -> None:
    """Tokens one by one, after `length` others."""
    x = sizes.inputs(1, str(state.inner.weights[0].device))
    for token in range(sizes.written_tokens):
        x, state, _ = layer(x, _call(layer, length + token, x), state)


def _call(layer: TTTMixer, before: int, x: torch.Tensor) -> MixerCall:
    counts = (x.shape[1],)
    grid = MiniBatchGrid.of((before,), counts, x.shape[1], layer.config.mini_batch_size, x.device)
    return MixerCall((before,), counts, grid, attention=None, checkpointing=False)
