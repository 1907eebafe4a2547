"""The card holds the numbers that it is given, and metadata that the Hub understands."""

import pytest
from huggingface_hub import ModelCard

from ttt_e2e import TTTE2EConfig
from ttt_e2e.evaluation import Table
from ttt_e2e.model_cards import write_model_card

RESULTS = Table("Loss on 3 files", ["system", "mean"], [["TTT-E2E", "1.250"]])


def test_card_shows_facts_and_table(tmp_path):
    config = TTTE2EConfig(num_hidden_layers=4, num_suffix_layers=1, sliding_window=128, mini_batch_size=64)
    config.save_pretrained(tmp_path)
    path = write_model_card(tmp_path, config, "A model", "Ten files.", {"tokens": "1,000", "time": "3 s"}, RESULTS)
    card = ModelCard.load(path)
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    for text in [
        "# A model",
        "blocks: 4, of them 1",
        "window: 128 tokens",
        "Ten files.",
        "- tokens: 1,000\n- time: 3 s\n",
    ]:
        assert text in card.text
    assert f"Loss on 3 files\n\n{RESULTS.markdown()}\n## Limits" in card.text


def test_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        write_model_card(tmp_path, TTTE2EConfig(), "A model", "", {}, RESULTS)
