"""What the official PyTorch code of TTT-Linear and TTT-MLP computed: inputs, outputs and gradients."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from ttt_e2e import TTTLayersCache, TTTLayersForCausalLM
from ttt_e2e.conversion.ttt_layers_layout import ttt_layers_config_from_official, ttt_layers_from_official

FOLDER = Path(__file__).parents[1] / "golden" / "ttt_layers"
VARIANTS = sorted(path.stem for path in FOLDER.glob("*.safetensors"))


class OfficialRun:
    """One variant: the model with its parameters, and what the official code made of them."""

    def __init__(self, name: str):
        self.description = json.loads((FOLDER / f"{name}.json").read_text())
        self.tensors = load_file(FOLDER / f"{name}.safetensors")
        self.config = ttt_layers_config_from_official(self.description["config"])
        self.model = TTTLayersForCausalLM(self.config).eval()
        keys = self.model.load_state_dict(self.converted("param."), strict=False)
        assert not keys.unexpected_keys and keys.missing_keys in ([], ["lm_head.weight"])
        self.model.tie_weights()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors whose names begin with `prefix`, by the rest of their names."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def converted(self, prefix: str) -> dict[str, torch.Tensor]:
        return ttt_layers_from_official(self.under(prefix), self.config)

    @property
    def prefills(self) -> list[int]:
        return self.description["prefill_lengths"]

    def ids(self, name: str = "full") -> torch.Tensor:
        return self["input_ids"][:, : self.description["lengths"][name]]


def prefill(run: OfficialRun, length: int) -> tuple[torch.Tensor, TTTLayersCache]:
    """Logits of the first tokens, and the cache after them."""
    with torch.no_grad():
        output = run.model(run["input_ids"][:, :length], use_cache=True)
    return output.logits, output.cache
