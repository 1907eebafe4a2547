"""The outer optimizer Muon: orthogonal steps for matrices, AdamW for everything else, as one optimizer.

For a matrix W of [rows, columns] with gradient g, momentum m and learning rate a (torch.optim.Muon, arXiv 2502.16982):

    m <- 0.95 m + 0.05 g,   W <- W - a weight_decay W - a 0.2 sqrt(max(rows, columns)) orthogonal(0.05 g + 0.95 m)

so that a step changes an entry by about 0.2 a, as one of AdamW does, whatever the gradient's size. `orthogonal` is a
polynomial in X = update / norm that brings the singular values near 1: five times X <- a X + (b XX' + c XX'XX') X.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedModel

# Matrices by name, of which every row is a token's own.
BY_TOKEN = ("embed_tokens", "lm_head")


class PortableMuon(Muon):
    """`torch.optim.Muon` with steps as large as AdamW's, in the precision that a device multiplies fast.

    torch's own iterates in bfloat16, which a CPU without instructions for it does eighteen times slower than float32.
    """

    def __init__(self, params: Sequence[dict], lr: float):
        super().__init__(params, lr=lr, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure=None):
        """As `torch.optim.Muon.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._step_of(matrix, group)
        return loss

    def _step_of(self, matrix: torch.Tensor, group: dict) -> None:
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix.grad, memory_format=torch.preserve_format)
        momentum = state["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])
        update = matrix.grad.lerp(momentum, group["momentum"])
        precision = torch.promote_types(matrix.dtype, torch.float32) if matrix.device.type == "cpu" else torch.bfloat16
        update = orthogonal(update.to(precision), group["ns_coefficients"], group["ns_steps"], group["eps"])
        matrix.mul_(1 - group["lr"] * group["weight_decay"])
        matrix.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(matrix.shape)))


def orthogonal(
    update: torch.Tensor, coefficients: tuple[float, float, float], iterations: int, eps: float
) -> torch.Tensor:
    """A matrix of nearly the same singular vectors, whose singular values are near 1 (0.7 to 1.2).

    Args:
        update: float [rows, columns]; it is computed in its precision.
        coefficients: a, b and c of the polynomial.
        eps: the least norm that `update` is divided by.

    Returns:
        Float [rows, columns].
    """
    a, b, c = coefficients
    tall = update.shape[0] > update.shape[1]
    found = update.T if tall else update  # [fewer, more]: the smaller product of the two
    found = found / found.norm().clamp(min=eps)
    for _ in range(iterations):
        square = found @ found.T
        polynomial = torch.addmm(square, square, square, beta=b, alpha=c)
        found = torch.addmm(found, polynomial, found, beta=a)
    return found.T if tall else found


class MuonWithAdamW(Optimizer):
    """Muon for some parameters and AdamW for others, with one state and one list of groups, AdamW's first.

    Args:
        matrices: groups for `PortableMuon`, each with its parameters, all [rows, columns], and its own options.
        others: groups for `torch.optim.AdamW`; there may be none (adapters are matrices alone).
        lr: of groups without one of their own; schedules take their floor from it.
    """

    def __init__(self, matrices: Sequence[dict], others: Sequence[dict], lr: float):
        self.parts: list[Optimizer] = [AdamW(others, lr=lr)] if others else []
        self.parts.append(PortableMuon(matrices, lr=lr))
        super().__init__([group for part in self.parts for group in part.param_groups], {"lr": lr})
        self._share()

    def _share(self) -> None:
        """Let the parts work on the groups and the state of the whole."""
        first = 0
        for part in self.parts:
            count = len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first : first + count], self.state
            first += count

    def step(self, closure=None):
        """One step of both; as `torch.optim.Optimizer.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """As `torch.optim.Optimizer.load_state_dict`."""
        super().load_state_dict(state_dict)
        self._share()


def muon_matrices(model: nn.Module, excluded: Sequence[str] = ()) -> list[str]:
    """Names of the trained parameters that Muon trains: matrices of linear layers that are not by token.

    What is a matrix only by its shape (convolutions, the initial weights of TTT layers, tables of decays) is not.

    Args:
        excluded: regular expressions; a matrix whose name one of them fits is left out.
    """
    linear = set(_linear_weights(model))
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter in linear
        and parameter.requires_grad
        and parameter.dim() == 2
        and not any(part in BY_TOKEN for part in name.split("."))
        and not any(re.search(pattern, name) for pattern in excluded)
    ]


def muon_of_model(model: nn.Module, args, decayed: Iterable[str]) -> MuonWithAdamW:
    """The optimizer of a model's trained parameters.

    Args:
        args: `MetaTrainingArguments`.
        decayed: names of the parameters that take weight decay.

    Raises:
        ValueError: a pattern of `args.muon_excludes` fits no matrix, or Muon would have nothing to train.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = muon_matrices(model)
    for pattern in args.muon_excludes:
        if not any(re.search(pattern, name) for name in matrices):
            raise ValueError(f"muon_excludes={args.muon_excludes}: no matrix has a name with {pattern!r}; leave it out")
    chosen = set(muon_matrices(model, args.muon_excludes))
    if not chosen:
        raise ValueError(
            f"optimizer='muon', but a {type(model).__name__} has no matrix for it to train; use optimizer='adamw'"
        )
    decayed = set(decayed)

    def groups(names: Iterable[str], **options) -> list[dict]:
        names = list(names)
        parts = (([n for n in names if n in decayed], args.weight_decay), ([n for n in names if n not in decayed], 0.0))
        return [
            {"params": [trained[name] for name in part], "weight_decay": decay, **options}
            for part, decay in parts
            if part
        ]

    matrix_rate = args.learning_rate if args.muon_learning_rate is None else args.muon_learning_rate
    return MuonWithAdamW(
        groups((name for name in trained if name in chosen), lr=matrix_rate),
        groups(
            (name for name in trained if name not in chosen),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
        ),
        lr=args.learning_rate,
    )


def _linear_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    """Matrices of linear layers, but for those of heads, which are by token whatever their name is."""
    heads = {part.get_output_embeddings() for part in model.modules() if isinstance(part, PreTrainedModel)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module not in heads:
            yield module.weight
