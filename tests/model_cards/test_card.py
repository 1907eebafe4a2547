"""The card says what it is given, in Markdown for people and in metadata that the Hub understands."""

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard

from ttt_e2e import RecurrentHybridConfig, TTTE2ECache, TTTE2EConfig, TTTLayersConfig
from ttt_e2e.evaluation import Table
from ttt_e2e.model_cards import ModelCardContents, ResultsSection, TrainingHistory, write_model_card
from ttt_e2e.model_cards.card import refresh_model_card, sequence_memory

from ..modeling.helpers import random_ids, small_model

RESULTS = Table("Loss on 3 files", ["system", "mean"], [["TTT-E2E", "1.250"]])
CONFIG = TTTE2EConfig(num_hidden_layers=4, num_suffix_layers=1, sliding_window=128, mini_batch_size=64)
WITH_FULL_ATTENTION = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]


def card(folder, config=CONFIG, **contents) -> ModelCard:
    """The card that was written, as huggingface_hub reads it."""
    config.save_pretrained(folder)
    contents = {"name": "A model", "parameters": 1234, "dtype": torch.float32} | contents
    return ModelCard.load(write_model_card(folder, ModelCardContents(config=config, **contents)))


def test_card_shows_what_it_is_given(tmp_path):
    written = card(
        tmp_path,
        training=TrainingHistory("Ten files.", {"tokens": "1,000", "time": "3 s"}),
        results=[ResultsSection("Measured here.", [RESULTS])],
        license="mit",
    )
    assert written.data.library_name == "transformers" and written.data.pipeline_tag == "text-generation"
    assert written.data.license == "mit" and "test-time-training" in written.data.tags
    for text in [
        "# A model",
        "parameters: 1,234, saved in float32",
        "blocks: 4, of them 1",
        "window: 128 tokens",
        "Ten files.",
        "- tokens: 1,000\n- time: 3 s\n",
        f"Measured here.\n\nLoss on 3 files\n\n{RESULTS.markdown()}\n## Limits",
    ]:
        assert text in written.text, text
    assert written.content.endswith(".\n") and "\n\n\n" not in written.text and "{" not in written.text


def test_a_refreshed_card_keeps_what_was_measured(tmp_path):
    card(tmp_path, training=TrainingHistory("Ten files."), results=[ResultsSection("Measured here.", [RESULTS])])
    path = tmp_path / "README.md"
    written = path.read_text()
    path.write_text(written.replace("keys, values", "keys and old values").replace("learn_from=", "learning="))
    refresh_model_card(path, ModelCardContents("", CONFIG, parameters=0, dtype=torch.float32))
    assert path.read_text() == written


def test_what_nobody_knows_is_said_to_be_unknown(tmp_path):
    written = card(tmp_path)
    assert "No record of the training came with this model." in written.text
    assert "No results came with this model." in written.text and "license" not in written.content


def test_results_are_metadata_that_can_be_read_back(tmp_path):
    entry = EvalResult("text-generation", "texts", "Texts", "loss", 1.25, metric_name="Loss at 128 tokens")
    assert card(tmp_path, eval_results=[entry]).data.eval_results == [entry]


@pytest.mark.parametrize("has_code", [True, False])
def test_the_example_needs_the_package_only_where_the_code_is_missing(tmp_path, has_code):
    text = card(tmp_path, has_code=has_code).text
    assert ("trust_remote_code=True" in text) is has_code and ("import ttt_e2e" in text) is not has_code


@pytest.mark.parametrize("config", [TTTE2EConfig(test_time_training=False), RecurrentHybridConfig()])
def test_a_baseline_is_not_said_to_learn(tmp_path, config):
    written = card(tmp_path, config)
    assert "learn_from" not in written.text and "test-time-training" not in written.data.tags
    assert "a baseline for models that" in " ".join(written.text.split())


def test_ttt_layers_are_said_to_learn_with_their_memory_per_sequence(tmp_path):
    config = TTTLayersConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, mixer_types=["ttt_linear"] * 2)
    shown = " ".join(card(tmp_path, config).text.split())
    assert f"{4 * 2 * 4 * 16 * 17:,} bytes of their weights for every sequence" in shown and "a baseline" not in shown


NO_WINDOWS = [
    TTTE2EConfig(use_attention=False),
    TTTE2EConfig(num_hidden_layers=2, layer_types=["full_attention"] * 2, test_time_training=False),
    RecurrentHybridConfig(num_hidden_layers=2, mixer_types=["mamba2", "full_attention"]),
]


@pytest.mark.parametrize("config", NO_WINDOWS, ids=["no attention", "full attention", "recurrent"])
def test_a_model_without_windows_is_said_to_have_none(tmp_path, config):
    assert config.sliding_window
    assert "attention window" not in " ".join(card(tmp_path, config).text.split())


def test_a_model_without_attention_is_said_to_have_none(tmp_path):
    shown = " ".join(card(tmp_path, TTTE2EConfig(use_attention=False)).text.split())
    assert "a decoder without attention that compresses" in shown and "What was read is remembered" in shown


def test_folder_without_a_model_is_an_error(tmp_path):
    contents = ModelCardContents("A model", CONFIG, 1, torch.float32)
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        write_model_card(tmp_path, contents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_prime_mlp": False, "num_key_value_heads": 2},
        {"prime_intermediate_size": 20, "num_suffix_layers": 1},
        {"layer_types": WITH_FULL_ATTENTION},
        {"test_time_training": False},
        {"use_attention": False},
        {"inner_projections": "down"},
    ],
)
def test_bytes_of_a_sequence_are_those_of_its_cache(dtype, changes):
    """The most that a cache ever holds while a row is read token by token."""
    model = small_model(dtype, **changes)
    ids, cache, held = random_ids(1, 60), TTTE2ECache(model.config), []
    with torch.no_grad():
        for column in ids.split(1, dim=1):
            model(column, cache=cache, use_cache=True)
            memory = sequence_memory(model.config, dtype)
            held.append(cache.nbytes - memory.per_token * cache.get_seq_length())
    assert max(held) == memory.fast_weights + memory.window
    assert (memory.per_token > 0) is ("layer_types" in changes)
