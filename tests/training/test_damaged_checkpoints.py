"""Checkpoints that are damaged, of another model, of another run or half there are noticed, and never used."""

import os
import shutil

import pytest
import torch

from ttt_e2e.training import (
    checkpoints,
)
from ttt_e2e.training.checkpoints import is_complete

from .resuming import Begun, contents, trainer_of


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory):
    """The folder of a run of six steps with two checkpoints, and its weights."""
    folder = tmp_path_factory.mktemp("six") / "run"
    trainer = trainer_of(folder, max_steps=6)
    trainer.train()
    return folder, {name: weight.clone() for name, weight in trainer.model.state_dict().items()}


@pytest.fixture
def run_folder(six_steps, tmp_path):
    return shutil.copytree(six_steps[0], tmp_path / "run")


def truncate(name):
    return lambda folder: os.truncate(folder / name, os.path.getsize(folder / name) - 1)


def remove(name):
    return lambda folder: (folder / name).unlink()


def flip(name):
    """One bit in the middle of a file is another one."""

    def damage(folder):
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return damage


def manifest(content):
    return lambda folder: (folder / "complete.json").write_bytes(content)


DAMAGE = {
    "weights cut off": truncate("model.safetensors"),
    "one bit of the weights": flip("model.safetensors"),
    "one bit of the optimizer": flip("optimizer.pt"),
    "one bit of the manifest": flip("complete.json"),
    "optimizer cut off": truncate("optimizer.pt"),
    "optimizer gone": remove("optimizer.pt"),
    "random state gone": remove("rng_state.pth"),
    "state gone": remove("trainer_state.json"),
    "manifest gone": remove("complete.json"),
    "manifest empty": manifest(b""),
    "manifest of zeros": manifest(bytes(100)),
    "manifest of no text": manifest(b"\xff\xfe\x00garbage"),
    "manifest without files": manifest(b'{"files": {}}'),
    "manifest a list": manifest(b'["model.safetensors"]'),
    "manifest with a list": manifest(b'{"files": ["model.safetensors"]}'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_not_used(run_folder, six_steps, damage):
    DAMAGE[damage](run_folder / "checkpoint-6")
    with pytest.raises(ValueError, match=r"the checkpoint is incomplete or damaged \(.*\); give an earlier one"):
        trainer_of(run_folder, max_steps=6).train(resume_from_checkpoint=str(run_folder / "checkpoint-6"))
    begun = []
    trainer = trainer_of(run_folder, max_steps=6, callbacks=[Begun(begun)])
    trainer.train(resume_from_checkpoint=True)
    assert begun == [3, 4, 5]
    assert all(torch.equal(weight, six_steps[1][name]) for name, weight in trainer.model.state_dict().items())
    assert is_complete(run_folder / "checkpoint-6")


def test_no_complete_checkpoint_at_all(run_folder):
    for step in (3, 6):
        DAMAGE["weights cut off"](run_folder / f"checkpoint-{step}")
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        trainer_of(run_folder).train(resume_from_checkpoint=True)


def test_earlier_checkpoint_by_path(run_folder, six_steps):
    trainer = trainer_of(run_folder, max_steps=6)
    trainer.train(resume_from_checkpoint=str(run_folder / "checkpoint-3"))
    assert all(torch.equal(weight, six_steps[1][name]) for name, weight in trainer.model.state_dict().items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 32, "head_dim": 8}, "its hidden_size is 16, but this model's is 32"),
        ({"num_suffix_layers": 1}, "its num_suffix_layers is 2, but this model's is 1"),
        ({"inner_learning_rate": 0.25}, "its inner_learning_rate is 0.5, but this model's is 0.25"),
        ({"sliding_window": 12}, "its sliding_window is 8, but this model's is 12"),
        ({"mini_batch_size": 8}, "its mini_batch_size is 4, but this model's is 8"),
        ({"meta_gradient": "first_order"}, "its meta_gradient is second_order"),
        ({"test_time_training": False}, "its test_time_training is True"),
    ],
)
@pytest.mark.parametrize("asked", [True, "checkpoint-6"])
def test_checkpoint_of_another_model_is_refused(run_folder, fields, message, asked):
    trainer, before = trainer_of(run_folder, fields), contents(run_folder)
    weights = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=asked if asked is True else str(run_folder / asked))
    assert all(torch.equal(weight, weights[name]) for name, weight in trainer.model.state_dict().items())
    assert contents(run_folder) == before


@pytest.mark.parametrize("fields", [{"inner_checkpoint_every": 2}, {"inner_checkpoint_offload": True}])
def test_memory_settings_may_change_on_resumption(run_folder, fields):
    trainer = trainer_of(run_folder, fields, max_steps=7, activation_checkpointing=True)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 7


def test_weights_of_other_shapes_are_refused(run_folder):
    """Without a config.json the weights themselves tell."""
    for step in (3, 6):
        folder = run_folder / f"checkpoint-{step}"
        (folder / "config.json").unlink()
        checkpoints.complete_checkpoint(folder)
    with pytest.raises(ValueError, match=r"its shape of model\.\S+ is \(\d+.*\), but this model's is \("):
        trainer_of(run_folder, {"hidden_size": 32}).train(resume_from_checkpoint=True)


def test_another_runs_folder_is_refused_and_left_as_it_is(run_folder):
    before = contents(run_folder)
    with pytest.raises(ValueError, match=r"holds checkpoint-6 of another run.*Nothing was overwritten"):
        trainer_of(run_folder).train()
    assert contents(run_folder) == before


def test_checkpoint_from_elsewhere_does_not_overwrite_another_run(run_folder, tmp_path):
    """A run that resumes from a folder of its own must not write into the folder of a third one."""
    own = shutil.copytree(run_folder, tmp_path / "own")
    before = contents(run_folder)
    with pytest.raises(ValueError, match="another run"):
        trainer_of(run_folder).train(resume_from_checkpoint=str(own / "checkpoint-3"))
    assert contents(run_folder) == before


def test_finished_run_is_loaded_and_not_trained_further(run_folder, six_steps):
    before, trainer = contents(run_folder), trainer_of(run_folder, max_steps=6)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    assert all(torch.equal(weight, six_steps[1][name]) for name, weight in trainer.model.state_dict().items())
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [3, 6]
    assert contents(run_folder) == before


def test_checkpoint_without_its_optimizer_is_not_resumed(tmp_path):
    """It would go on with a fresh one and a schedule from the beginning."""
    trainer_of(tmp_path, max_steps=3, save_only_model=True).train()
    with pytest.raises(ValueError, match="saved without its optimizer"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)
