"""Training rows with facts to remember: what a model must see to find needles in a haystack (RULER's S-NIAH).

Some of the rows lose the end of their text to a needle, a question and its answer:

    instruction, text, needle, text, question, value

in the words of the evaluation, with other keys and values than it asks for.
"""

import random

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from .needles import SampledNeedle, sampled_needle
from .rows import DocumentRows, PackedRows, labelled_row
from .tokenizer import encode_texts

SEED = "training"  # the evaluation's seeds are numbers


class NeedleRows(Dataset):
    """Rows of which a share hides a needle; as long as they were, and the same in every process and every epoch.

    Args:
        rows: what the needles are hidden in.
        tokenizer: of the rows.
        share: of the rows, 0 to 1. Rows too short for question and needle stay as they are.
    """

    def __init__(self, rows: PackedRows | DocumentRows, tokenizer: PreTrainedTokenizerBase, share: float):
        self.rows, self.tokenizer, self.share, self.store = rows, tokenizer, share, rows.store

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index = range(len(self))[index]
        generator, row = random.Random(f"row {SEED} {index}"), self.rows[index]
        if generator.random() >= self.share:
            return row
        needle = sampled_needle(generator.choice(("number", "uuid")), generator)
        ids = self._with_needle(row["input_ids"], needle, generator)
        return row if ids is None else labelled_row(ids, self.store.separator_id)

    def _with_needle(self, ids: torch.Tensor, needle: SampledNeedle, generator: random.Random) -> torch.Tensor | None:
        """[tokens] -> the same length; None where there is no room."""
        separator = torch.tensor([self.store.separator_id])
        before, hidden, after, value = (
            torch.tensor(encoded)
            for encoded in encode_texts(
                [needle.before, f"\n{needle.sentence}\n", needle.after, f" {needle.values[0]}."], self.tokenizer
            )
        )
        room = len(ids) - sum(map(len, (separator, before, hidden, after, value)))
        if room < 1:
            return None
        text = ids[ids != self.store.separator_id][:room]  # one text, although parts of documents meet in it
        place = generator.randint(0, len(text))
        whole = torch.cat([separator, before, text[:place], hidden, text[place:], after, value])
        # Where separators were left out the row is shorter by as many tokens: more of the text follows.
        return torch.cat([whole, ids[len(whole) :]])
