"""What the official JAX implementation computed: inputs, outputs and gradients in `tests/golden`."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from ttt_e2e import TTTE2ECache, TTTE2EForCausalLM
from ttt_e2e.conversion.official_layout import config_from_official, convert_parameters

GOLDEN = Path(__file__).parents[1] / "golden"


class Golden:
    """One variant: the model with its parameters, and what the official code made of them."""

    def __init__(self, name: str):
        self.official = json.loads((GOLDEN / f"{name}.json").read_text())
        self.tensors = load_file(GOLDEN / f"{name}.safetensors")
        groups = self.official["config"]
        self.config = config_from_official(groups["model"], groups["training"])
        model = TTTE2EForCausalLM(self.config).train()
        keys = model.load_state_dict(self.converted("param."), strict=False)
        assert not keys.unexpected_keys and keys.missing_keys in ([], ["model.lm_head.weight"])
        model.tie_weights()
        if "inner.effective_lr" in self.tensors:
            rate = self["inner.effective_lr"].item()
            model.model.inner_learning_rate_multiplier = rate / self.config.inner_learning_rate
        self.model = model

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def converted(self, prefix: str) -> dict[str, torch.Tensor]:
        found = {name.removeprefix(prefix): t.numpy() for name, t in self.tensors.items() if name.startswith(prefix)}
        return convert_parameters(found, self.config)

    @property
    def ids(self) -> torch.Tensor:
        """[B, T + 1]: the inputs and the last target."""
        return torch.cat([self["batch.input_ids"], self["batch.target_tokens"][:, -1:]], dim=1).long()

    def loss(self, token_nll: torch.Tensor) -> torch.Tensor:
        """The official loss per sequence: the mean of the mini-batches' means over targets that are not BOS."""
        mask = self["batch.loss_masks"].float()
        shape = (*self["out.chunk_loss"].shape, -1)
        sums = (token_nll * mask).view(shape).sum(-1)
        return (sums / mask.view(shape).sum(-1).clamp_min(1)).mean(dim=1)

    def inner_weights(self, prefix: str, step: int | None = None) -> list[torch.Tensor]:
        """Per suffix block gate, up and down [B, out, in], after all mini-batches or after `step`."""
        stored = [self[f"{prefix}.{'feed_forward_prime' if self.config.use_prime_mlp else 'feed_forward'}.{w}.weight"]
                  for w in ("w1", "w3", "w2")]  # fmt: skip
        stored = stored if step is None else [tensor[:, step] for tensor in stored]
        return [tensor[:, block].mT for block in range(self.config.num_suffix_layers) for tensor in stored]

    def learned_weights(self, cache: TTTE2ECache) -> list[torch.Tensor]:
        layers = self.model.model.layers[self.config.num_prefix_layers :]
        mlps = (layer.inner_mlp for layer in layers)
        slow = [p.weight for mlp in mlps for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
        return [weight + delta for weight, delta in zip(slow, cache.context.fast.own_copies().tensors, strict=True)]
