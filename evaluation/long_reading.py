"""Reading a long text once into a learned context."""

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .. import TTTE2ECache


@torch.no_grad()
def read_tokens(
    model: PreTrainedModel, input_ids: torch.Tensor, cache: TTTE2ECache, step: int, description: str = "Reading"
) -> list[float]:
    """Let the model read tokens, with a progress bar; what it learns from them is in the cache afterwards.

    Args:
        input_ids: int64 [batch, tokens], what follows after all that the cache has seen.
        cache: changed in place.
        step: tokens given to the model in one call. It changes memory and the pace of the progress bar, not the result.

    Returns:
        The loss on each mini-batch before it was learned, nats per token, mean over the rows that completed one.
    """
    losses: list[float] = []
    with tqdm(total=input_ids.shape[1], desc=description, unit=" tokens", unit_scale=True) as progress:
        for piece in input_ids.split(step, dim=1):
            found = getattr(model(piece, cache=cache, use_cache=True, logits_to_keep=1), "inner_loss", None)
            if found is not None and found.numel():
                losses += found.nanmean(dim=0).tolist()
                progress.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
            progress.update(piece.shape[1])
    return losses
