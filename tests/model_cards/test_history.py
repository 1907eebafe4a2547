"""How a model was trained is read from its run's record and log, and from nothing else."""

import json

import pytest

from ttt_e2e.configuration import load_recipe
from ttt_e2e.data.run_data import TrainingData
from ttt_e2e.loading import find_model
from ttt_e2e.model_cards.history import training_history
from ttt_e2e.storage.record import write_record
from ttt_e2e.training.run import Adapter, TrainingRequest, run_record

from .saved import model_of

LOG = [
    {"loss": 5.0, "step": 10},
    {"eval_loss": 4.0, "eval_loss_learning_off": 4.5, "step": 20},
    {"train_loss": 4.8, "step": 25},
    {"eval_loss": 3.25, "eval_loss_learning_off": 3.75, "step": 25},
]


@pytest.fixture(scope="module")
def config():
    return model_of("ttt_e2e").config


def run(folder, config, data="standard-library", model="tiny", log=LOG, **changes):
    """The folder of a finished run; returns that of its model."""
    recipe = load_recipe(
        "pretrain-tiny", "tiny", ["batch_size=3", "training.per_device_train_batch_size=3", "data.sequence_length=100"]
    )
    request = TrainingRequest(model, recipe, data, folder, folder, **changes)
    record = run_record(request, find_model("tiny"), config, TrainingData(None, None, None, {}))
    folder.mkdir(exist_ok=True)
    write_record(folder, record, {"model": model, "data": data, "validation_data": None, "tokenizer": None})
    (folder / "training_log.json").write_text(json.dumps(log))
    return folder / "model"


def test_facts_are_those_of_the_recipe_and_the_log(tmp_path, config):
    history = training_history(run(tmp_path, config), config)
    assert history.text == "From random weights (`tiny`), with the recipe `pretrain-tiny` on `standard-library`."
    assert history.row_length == 100
    expected = {
        "rows in a step": "3",
        "tokens in a row": "100",
        "steps": "25",
        "tokens": "7,500",
        "outer optimizer": "muon",
        "learning rate": "0.003",
        "learning rate of the matrices that Muon trains": "0.01",
        "validation loss after step 25": "3.250 nats per token",
        "validation loss, learning off after step 25": "3.750 nats per token",
    }
    assert expected.items() <= history.facts.items()


def test_a_checkpoint_has_only_the_steps_that_it_was_trained_for(tmp_path, config):
    checkpoint = run(tmp_path, config).with_name("checkpoint-20")
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": LOG[:2]}))
    facts = training_history(checkpoint, config).facts
    assert facts["steps"] == "20" and facts["validation loss after step 20"] == "4.000 nats per token"


def test_places_on_the_machine_that_trained_are_not_told(tmp_path, config):
    (tmp_path / "texts").mkdir()
    folder = run(tmp_path / "run", config, data=str(tmp_path / "texts"))
    assert str(tmp_path) not in training_history(folder, config).text
    assert "`texts`" in training_history(folder, config).text
    assert "`owner/name`" in training_history(run(tmp_path / "other", config, data="owner/name"), config).text


def test_a_run_that_went_on_and_its_adapter_are_named(tmp_path, config):
    folder = run(tmp_path / "run", config, adapter=Adapter("prime", 4, 8.0))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["start"], record["asked"]["model"] = "/somewhere/first/model", "/somewhere/first/model"
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    text = training_history(folder, config).text
    assert text.startswith("From the saved model `first`, as adapters of rank 4 on `prime`, with the recipe")


def test_a_model_without_a_run_has_no_history(tmp_path, config):
    folder = run(tmp_path, config)
    assert training_history(tmp_path / "another", config) is None, "beside a run's model, but not of the run"
    (tmp_path / "run.json").unlink()
    assert training_history(folder, config) is None


def test_the_record_of_another_model_is_not_used(tmp_path, config, caplog):
    folder = run(tmp_path, model_of("ttt_e2e", num_suffix_layers=1).config)
    assert training_history(folder, config) is None
    assert "the record of another model (num_suffix_layers is 1 there, not 2)" in caplog.text


@pytest.mark.parametrize("name", ["run.json", "training_log.json"])
def test_a_damaged_record_is_an_error(tmp_path, config, name):
    folder = run(tmp_path, config)
    (tmp_path / name).write_text("{")
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        training_history(folder, config)
