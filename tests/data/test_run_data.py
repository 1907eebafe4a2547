"""Which documents a run trains on, validates on and leaves alone."""

import random

import pytest

from ttt_e2e.configuration import DataRecipe
from ttt_e2e.data.run_data import DataRequest, prepare_data


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Twelve folders of two documents each."""
    folder, choose = tmp_path_factory.mktemp("texts"), random.Random(0)
    for number in range(24):
        path = folder / f"{number // 2:02}" / f"{number % 2}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(" ".join("".join(choose.choices("abcdef", k=3)) for _ in range(300 + number)))
    return folder


def names(texts, cache, **fields):
    """The names of the documents for training, and of those for validation."""
    recipe = DataRecipe(sequence_length=32, validation_every=4, whole_folders=True, **fields)
    request = DataRequest(str(texts), None, None, 300, recipe, cache)
    data = prepare_data(request, check_tokenizer=lambda tokenizer: None)
    return set(data.rows.store.names), set(data.validation.store.names)


def test_documents_for_tuning_are_neither_trained_on_nor_measured(texts, tmp_path):
    training, measured = names(texts, tmp_path)
    rest, tuned = names(texts, tmp_path, tuning=True)
    assert len(measured) == 6 and len(training) == 18 and not training & measured
    assert tuned and tuned < training and rest == training - tuned
    folders = [{name.partition("/")[0] for name in part} for part in (rest, tuned, measured)]
    assert not folders[0] & folders[1] and not folders[1] & folders[2]
