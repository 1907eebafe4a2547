"""Rows with facts to remember: in the words of the evaluation, as long as they were, and the same every time."""

import random

import pytest
import torch

from ttt_e2e.configuration import DataRecipe, load_recipe
from ttt_e2e.data.needle_rows import NeedleRows
from ttt_e2e.data.needles import needle_prompts
from ttt_e2e.data.run_data import DataRequest, prepare_data

LENGTH = 900


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, choose = tmp_path_factory.mktemp("texts"), random.Random(0)
    for number in range(8):
        words = ("".join(choose.choices("abcdef", k=3)) for _ in range(4000))
        (folder / f"{number}.txt").write_text(" ".join(words))
    recipe = DataRecipe(sequence_length=LENGTH, needle_share=0.5)
    request = DataRequest(str(folder), None, None, 500, recipe, tmp_path_factory.mktemp("cache"))
    return prepare_data(request, check_tokenizer=lambda tokenizer: None)


def text_of(data, row):
    return data.tokenizer.decode(row["input_ids"], skip_special_tokens=True)


def test_a_share_of_the_rows_hides_a_fact_and_asks_for_it(data):
    rows, plain = data.rows, data.rows.rows
    assert len(rows) == len(plain)
    hidden = [index for index in range(len(rows)) if "special magic" in text_of(data, rows[index])]
    assert 0.3 < len(hidden) / len(rows) < 0.7
    for index in range(len(rows)):
        if index not in hidden:
            assert torch.equal(rows[index]["input_ids"], plain[index]["input_ids"])
    for index in hidden:
        row, text = rows[index], text_of(data, rows[index])
        assert len(row["input_ids"]) == LENGTH + 1
        value = text.split("mentioned in the provided text is ")[1].split(".")[0]
        assert text.count(value) == 2, "once in the text, once in the answer"
        assert (row["labels"] == -100).sum() == (row["input_ids"] == rows.store.separator_id).sum()


def test_rows_are_the_same_every_time_and_differ_from_one_another(data):
    rows = data.rows
    again = NeedleRows(rows.rows, data.tokenizer, 0.5)
    assert all(torch.equal(rows[index]["input_ids"], again[index]["input_ids"]) for index in range(len(rows)))
    texts = [text_of(data, rows[index]) for index in range(len(rows))]
    values = [text.split("mentioned in the provided text is ")[1] for text in texts if "special magic" in text]
    assert len(set(values)) == len(values)
    assert torch.equal(rows[-1]["input_ids"], rows[len(rows) - 1]["input_ids"])


def test_the_words_are_those_of_the_evaluation(data):
    text = next(t for t in (text_of(data, data.rows[i]) for i in range(len(data.rows))) if "magic number" in t)
    [prompt] = needle_prompts(data.tokenizer, 2, 800, 1, 0, ["some words. " * 400], answer_tokens=16)
    key = text.split("special magic number for ")[1].split(" ")[0].rstrip(".")
    asked = prompt.question.split("special magic number for ")[1].split(" ")[0]
    assert prompt.question.replace(asked, text.split("What is the special magic number for ")[1].split(" ")[0]) in text
    assert text.startswith(prompt.text[:60]) and key


def test_rows_without_room_stay_as_they_are(data):
    short = [{"input_ids": torch.arange(5), "labels": torch.arange(5)}]

    class Rows:
        store = data.rows.store

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return short[index]

    assert NeedleRows(Rows(), data.tokenizer, 1.0)[0] is short[0]


def test_share_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"data.needle_share=1.5 must be between 0 and 1"):
        load_recipe("pretrain-tiny", "tiny", ["data.needle_share=1.5"])
