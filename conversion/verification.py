"""A saved model against reference numbers: the loss of every token, as another implementation computed it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

IDS, TARGETS, LOSSES = "batch.input_ids", "batch.target_tokens", "out.token_nll"


@dataclass(frozen=True)
class Reference:
    """What a model is compared with.

    Attributes:
        ids: int64 [rows, T + 1].
        token_nll: float32 [rows, T], nats; column t is the loss of token t + 1.
    """

    ids: torch.Tensor
    token_nll: torch.Tensor


def load_reference(path: str | Path, vocabulary_size: int) -> Reference:
    """Reference numbers out of a safetensors file.

    It holds `batch.input_ids` [rows, T], integers, and `out.token_nll` [rows, T], the negative log-likelihood of the
    token that follows each one. Where it holds `batch.target_tokens` [rows, T] as well, the last column's target is
    taken from there; otherwise the last column is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, a tensor is missing or has another shape, or an id is not known to the
            model.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"reference={str(path)!r}: there is no such file")
    try:
        with safe_open(path, framework="pt") as stored:
            names = set(stored.keys())
            tensors = {name: stored.get_tensor(name) for name in (IDS, TARGETS, LOSSES) if name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"reference={str(path)!r}: no safetensors file ({error})") from error
    missing = [name for name in (IDS, LOSSES) if name not in tensors]
    if missing:
        raise ValueError(f"reference={str(path)!r}: `{missing[0]}` is missing; it needs {IDS} and {LOSSES}")
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    shape = shapes[IDS]
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 2 or any(other != shape for other in shapes.values()):
        raise ValueError(f"reference={str(path)!r}: all tensors must be [rows, T], T at least 2, but have {shapes}")
    ids, losses = tensors[IDS].long(), tensors[LOSSES].float()
    if TARGETS in tensors:
        ids = torch.cat([ids, tensors[TARGETS][:, -1:].long()], dim=1)
    else:
        losses = losses[:, :-1]
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary_size:
        raise ValueError(
            f"reference={str(path)!r}: ids between {low} and {high}, but the model knows 0 to {vocabulary_size - 1}; "
            "give the reference of this checkpoint"
        )
    return Reference(ids, losses)


@torch.no_grad()
def largest_difference(folder: str | Path, reference: Reference) -> float:
    """The largest difference, in nats, between the reference and a saved model that computes in float32.

    The model learns while it reads if its configuration says so. NaN where it, or the reference, has one.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = tqdm(reference.ids.split(1), desc="Verifying", unit=" rows")
    losses = [model(row, labels=row, use_cache=False, skip_logits=True).token_nll for row in rows]
    return (torch.cat(losses) - reference.token_nll).abs().max().item()
