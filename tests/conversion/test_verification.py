"""Reference numbers are compared token by token, and a file that holds none is refused before any work."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from ttt_e2e.conversion.verification import largest_difference, load_reference

from ..modeling.helpers import random_ids, small_model
from .official import REFERENCE, VOCABULARY

IDS, TARGETS, LOSSES = "batch.input_ids", "batch.target_tokens", "out.token_nll"


def saved(folder, **changes):
    """A file of reference numbers: the golden ones with other tensors; None leaves one out."""
    tensors = {name: tensor for name, tensor in load_file(REFERENCE).items() if name in (IDS, TARGETS, LOSSES)}
    tensors |= {name.replace("_", ".", 1): tensor for name, tensor in changes.items()}
    path = folder / "reference.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    return path


def test_the_last_column_counts_where_its_target_is_known(tmp_path):
    golden = load_file(REFERENCE)
    whole = load_reference(REFERENCE, VOCABULARY)
    assert whole.ids.shape == (2, 33) and whole.ids.dtype == torch.int64
    assert torch.equal(whole.token_nll, golden[LOSSES])
    assert torch.equal(whole.ids[:, 1:].int(), golden[TARGETS])
    without = load_reference(saved(tmp_path, batch_target_tokens=None), VOCABULARY)
    assert torch.equal(without.ids, whole.ids[:, :-1]) and torch.equal(without.token_nll, whole.token_nll[:, :-1])


def test_the_largest_difference_is_found_in_every_column_and_row(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "model")
    ids = random_ids(2, 26)
    with torch.no_grad():
        losses = model(ids, labels=ids).token_nll
    for row, column in ((0, 0), (1, 24)):
        changed = losses.clone()
        changed[row, column] -= 0.25
        tensors = {IDS: ids[:, :-1].contiguous(), TARGETS: ids[:, 1:].contiguous(), LOSSES: changed}
        save_file(tensors, tmp_path / "reference")
        difference = largest_difference(tmp_path / "model", load_reference(tmp_path / "reference", 97))
        assert difference == pytest.approx(0.25, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_token_nll": None}, r"`out\.token_nll` is missing"),
        ({"batch_input_ids": None}, r"`batch\.input_ids` is missing"),
        ({"out_token_nll": torch.ones(2, 31)}, r"\[rows, T\].*\[2, 31\]"),
        ({"batch_input_ids": torch.full((2, 32), 61, dtype=torch.int32)}, "between .* and 61, but .* 0 to 60"),
        ({"batch_target_tokens": torch.full((2, 32), -1, dtype=torch.int32)}, "between -1 and"),
    ],
)
def test_a_file_without_usable_numbers_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_reference(saved(tmp_path, **changes), VOCABULARY)


def test_a_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_reference(tmp_path / "none", VOCABULARY)
    (tmp_path / "text").write_text("0.1 0.2")
    with pytest.raises(ValueError, match="no safetensors file"):
        load_reference(tmp_path / "text", VOCABULARY)
