"""What `ttt-e2e train` refuses, by name and before any work."""

import shutil
from collections import namedtuple

import pytest
import yaml

from ttt_e2e.storage.claims import claimed_run

from ..storage.holding import held_elsewhere
from .train_runs import SIZES, everything_below, fill_place, refusal, train


@pytest.fixture
def place(tmp_path):
    return fill_place(tmp_path)


def empty(place):
    (place / "empty.txt").write_text("")
    return place / "empty.txt"


def missing(place):
    return place / "nothing.txt"


def binary(place):
    (place / "picture.txt").write_bytes(bytes(range(256)))
    return place / "picture.txt"


def short(place):
    (place / "short.txt").write_text("a word")
    return place / "short.txt"


@pytest.mark.parametrize(
    ("data", "message"),
    [(empty, "empty"), (missing, "nothing.txt"), (binary, "picture.txt"), (short, "sequence_length=16")],
)
def test_unusable_data_is_refused(place, data, message):
    refused = refusal(train(place, "--data", data(place), data__validation_every="null"))
    assert message in refused
    assert not (place / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__sequence_length": 3}, "data.sequence_length=3 is shorter than a mini-batch (model.mini_batch_size=4)"),
        ({"training__max_stepps": 3}, "did you mean 'training.max_steps'"),
        ({"training__save_steps": 3, "training__logging_steps": 2}, "make save_steps=3 a multiple of logging_steps=2"),
        ({"training__learning_rate": -1}, "learning_rate=-1: must be finite and not negative"),
        ({"training__learning_rate": ".nan"}, "learning_rate=nan: must be finite and not negative"),
        ({"training__weight_decay": -0.1}, "weight_decay=-0.1: must be finite and not negative"),
        ({"training__adam_beta1": 1.0}, "adam_beta1=1.0: must be at least 0 and below 1"),
        ({"training__adam_beta2": 1.5}, "adam_beta2=1.5: must be at least 0 and below 1"),
        ({"training__adam_epsilon": -1}, "adam_epsilon=-1: must be finite and not negative"),
        ({"training__max_grad_norm": -1}, "max_grad_norm=-1: must be finite and not negative"),
        ({"training__warmup_steps": -2}, "warmup_steps=-2: must be finite and not negative"),
        ({"training__inner_lr_init": -0.1}, "inner_lr_init=-0.1: must be finite and not negative"),
        ({"training__label_smoothing_factor": 1.5}, "label_smoothing_factor=1.5: must be at least 0 and below 1"),
        ({"training__num_train_epochs": 0}, "num_train_epochs=0: must be finite and above 0"),
        ({"training__logging_steps": 0}, "logging_steps=0: must be finite and above 0"),
        ({"training__save_steps": -2}, "save_steps=-2: must be finite and above 0"),
        ({"training__save_total_limit": 0}, "save_total_limit=0: must be at least 1"),
        ({"training__seed": -1}, "seed=-1: must be at least 0"),
        ({"training__eval_steps": -3}, "eval_steps=-3: must be finite and above 0"),
        ({"model__inner_learning_rate": -1}, "inner_learning_rate"),
        ({"model__mini_batch_size": 0}, "mini_batch_size"),
        ({"model__rms_norm_eps": -1}, "rms_norm_eps"),
        ({"model__hidden_act": 3}, "hidden_act"),
        ({"data__sequence_length": -1}, "data.sequence_length=-1"),
        ({"data__validation_rows": 0}, "data.validation_rows=0"),
        ({"model__sliding_window": 2}, "`mini_batch_size` (4) is larger than `sliding_window` (2)"),
    ],
)
def test_settings_that_do_not_fit_are_refused(place, changes, message):
    assert message in refusal(train(place, **changes))
    assert not (place / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "tinny"), "no such model preset"),
        (("--model", "nowhere/"), "nowhere"),
        (("--recipe", "pretrain-9k"), "pretrain-8k"),
        (("--output", None), "--output is missing"),
        (("--data", None), "--data is missing"),
        (("--data", "nowhere://bucket/texts"), "source='nowhere://bucket/texts': Protocol not known: nowhere"),
        (("--data", "hf://datasets/owner/name"), "give the data set's name alone, as owner/name"),
        (("--validation-data", "memory://nothing"), "source='memory://nothing': there is no file"),
        (("--lora", "prime"), "adapters are trained on a saved model"),
        (("--tokenizer", "./nowhere"), "there is no such folder"),
    ],
)
def test_options_that_do_not_fit_are_refused(place, options, message):
    assert message in refusal(train(place, *options))
    assert not (place / "run").exists()


def test_folder_of_another_run_is_left_alone(place):
    assert train(place).exit_code == 0
    before = everything_below(place / "run")
    assert "holds another run" in refusal(train(place))
    assert "its run was begun with recipe.training.learning_rate=0.003" in refusal(
        train(place, "--resume", training__learning_rate=0.1)
    )
    (place / "texts" / "00.txt").write_text("other words")
    assert "='other texts', but now it is" in refusal(train(place, "--resume"))
    assert everything_below(place / "run") == before


@pytest.mark.slow
def test_folder_into_which_another_run_trains_is_left_alone(place):
    with held_elsewhere(claimed_run, place / "run") as other:
        assert f"process {other.pid} on " in refusal(train(place))
        assert [path.name for path in (place / "run").iterdir()] == [".run.lock"]
    assert train(place).exit_code == 0  # the claim has gone with its process
    assert not (place / "run" / ".run.lock").exists()


def test_folder_with_other_files_is_left_alone(place):
    (place / "run").mkdir()
    (place / "run" / "thesis.txt").write_text("years of work")
    assert "holds other files" in refusal(train(place))
    assert "holds no run to resume" in refusal(train(place, "--resume"))
    assert (place / "run" / "thesis.txt").read_text() == "years of work"


def test_run_of_another_model_is_not_resumed(place):
    assert train(place).exit_code == 0
    before = everything_below(place / "run")
    (place / "small.yaml").write_text("# small\n" + yaml.safe_dump(SIZES | {"intermediate_size": 24}))
    assert "model.intermediate_size=16, but now it is 24" in refusal(train(place, "--resume"))
    assert everything_below(place / "run") == before


def test_sizes_of_a_saved_model_cannot_change(place):
    assert train(place).exit_code == 0
    refused = refusal(train(place, "--model", place / "run", output="other", model__hidden_size=32))
    assert "model.hidden_size=32: the saved model has 16" in refused


def test_adapters_are_named_rightly_and_merged_before_more_training(place):
    assert train(place).exit_code == 0
    wrong = train(place, "--model", place / "run", "--lora", "all-linar", output="adapted")
    assert "did you mean 'all-linear'" in refusal(wrong) and not (place / "adapted").exists()
    assert train(place, "--model", place / "run", "--lora", "prime", output="adapted").exit_code == 0
    again = train(place, "--model", place / "adapted", output="again")
    assert "is an adapter: merge it into its model first" in refusal(again)


def test_saved_model_needs_a_recipe_and_its_own_tokenizer(place):
    assert train(place).exit_code == 0
    assert "--recipe: say what a saved model is trained for" in refusal(
        train(place, "--model", place / "run", "--recipe", None, output="other")
    )
    larger = SIZES | {"vocab_size": 400}
    (place / "larger.yaml").write_text("# larger\n" + yaml.safe_dump(larger))
    assert train(place, "--model", place / "larger.yaml", output="larger").exit_code == 0
    refused = refusal(train(place, "--model", place / "run", "--tokenizer", place / "larger" / "model", output="other"))
    assert "but the model knows only 300" in refused


def test_finished_run_is_evaluated_again_and_not_trained_further(place):
    assert train(place).exit_code == 0
    weights = (place / "run" / "model" / "model.safetensors").read_bytes()
    assert train(place, "--resume").exit_code == 0
    assert (place / "run" / "model" / "model.safetensors").read_bytes() == weights
    assert not (place / "run" / "checkpoint-7").exists()


def test_recipes_that_go_on_refuse_random_weights(place):
    assert "goes on with a saved model" in refusal(train(place, "--recipe", "extend-32k"))


def test_validation_on_the_training_data_is_refused(place):
    refused = refusal(train(place, "--validation-data", place / "texts", data__validation_every="null"))
    assert "is the training data" in refused


def test_tuning_without_validation_documents_is_refused(place):
    refused = refusal(train(place, data__tuning="true", data__validation_every="null"))
    assert "data.tuning=True keeps back training documents beside those of data.validation_every" in refused


def test_misspelt_nested_field_is_refused(place):
    assert "did you mean 'rope_theta'" in refusal(train(place, model__rope_parameters__rope_thetta=1e6))


def test_full_disk_is_noticed_before_anything_is_written(place, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 1000, 1000))
    refused = train(place)
    assert refused.exit_code != 0
    assert "has only 1000" in " ".join((refused.output + repr(refused.exception)).split())
    assert not (place / "run").exists() or not list((place / "run").glob("checkpoint-*"))
