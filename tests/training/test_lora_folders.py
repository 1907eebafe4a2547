"""Adapters on disk: reloaded, merged, resumed; and generation with a learned context under PEFT."""

import json
import shutil

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ttt_e2e import TTTE2ECache, TTTE2EForCausalLM
from ttt_e2e.cli.main import app
from ttt_e2e.training.lora import add_lora, merge_lora

from ..modeling.tiny_tokenizer import byte_level_tokenizer
from .adapters import ALPHA, RANK, adapted, adapters, fill, saved_base
from .helpers import MINI_BATCH, meta_trainer, random_rows, repeatable, tiny_model

TARGETS = ("all-linear", "prime")
IDS = torch.tensor(random_rows(2, mini_batches=3)["input_ids"])
GREEDY = {"max_new_tokens": 2 * MINI_BATCH + 1, "do_sample": False, "return_dict_in_generate": True}


def loss(model, ids=IDS) -> float:
    with torch.no_grad():
        return model.eval()(input_ids=ids, labels=ids).loss.item()


def adapter_folder(path, targets="prime", dtype=torch.float64, **fields):
    """A base model, and an adapter of it, in two folders."""
    model = add_lora(saved_base(path / "base", dtype, **fields), targets, RANK, ALPHA)
    fill(model)
    model.save_pretrained(path / "adapter")
    return model, path / "adapter"


# --------------------------------------------------------------------------------------------------- loading, merging


@pytest.mark.parametrize("targets", TARGETS)
def test_a_trained_adapter_is_the_same_after_loading(tmp_path, targets):
    base = saved_base(tmp_path / "base")
    untrained = loss(base)
    trainer = meta_trainer(tmp_path / "run", add_lora(base, targets, RANK, ALPHA))
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert abs(loss(trainer.model) - untrained) > 1e-2
    loaded = PeftModel.from_pretrained(saved_base(tmp_path / "base"), tmp_path / "adapter")
    by_name = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert loss(loaded) == loss(by_name) == loss(trainer.model)


@pytest.mark.parametrize(("targets", "prime_mlp"), [("all-linear", True), ("prime", True), ("prime", False)])
def test_merged_is_the_same_as_unmerged(tmp_path, targets, prime_mlp):
    model, folder = adapter_folder(tmp_path, targets, use_prime_mlp=prime_mlp)
    merge_lora(folder, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged) is TTTE2EForCausalLM and not adapters(merged)
    assert merged.dtype == torch.float64 and merged.config.use_cache
    assert abs(loss(saved_base(tmp_path / "base")) - loss(model)) > 1e-2
    assert loss(merged) == pytest.approx(loss(model), rel=1e-9)
    one, other = (part.generate(IDS, output_logits=True, **GREEDY) for part in (merged, model))
    assert torch.equal(one.sequences, other.sequences)
    for step, expected in zip(one.logits, other.logits, strict=True):
        torch.testing.assert_close(step, expected, rtol=0, atol=1e-6)  # generate() returns float32
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "merged"}


@pytest.mark.parametrize("targets", TARGETS)
def test_merged_is_the_same_for_mini_batches_whose_differences_are_folded(tmp_path, targets):
    """From 32 tokens on a plain layer's fast and slow weights become one matrix, which must not lose an adapter."""
    model, folder = adapter_folder(tmp_path, targets, mini_batch_size=32, sliding_window=32)
    merge_lora(folder, tmp_path / "merged")
    ids = torch.tensor(random_rows(2, mini_batches=25)["input_ids"])
    assert abs(loss(saved_base(tmp_path / "base"), ids) - loss(model, ids)) > 1e-2
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loss(merged, ids) == pytest.approx(loss(model, ids), rel=1e-9)


@pytest.mark.parametrize("place", ["adapter", "base"])
def test_the_tokenizer_is_merged_too(tmp_path, place):
    _, folder = adapter_folder(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path / place)
    merge_lora(folder, tmp_path / "merged")
    text = "the river"
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")(text) == byte_level_tokenizer()(text)


def test_a_configuration_beside_the_adapter_holds(tmp_path):
    """A run may have changed what no weight depends on, like the mini-batch."""
    _, folder = adapter_folder(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path / "base")
    config.mini_batch_size = 2
    config.to_json_file(folder / "base_config.json", use_diff=False)
    merge_lora(folder, tmp_path / "merged")
    assert AutoConfig.from_pretrained(tmp_path / "merged").mini_batch_size == 2


def test_the_folder_of_a_run_stands_for_the_adapter_in_it(tmp_path):
    model, folder = adapter_folder(tmp_path)
    folder.rename(tmp_path / "model")
    merge_lora(tmp_path, tmp_path / "merged")
    assert loss(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) == pytest.approx(loss(model), rel=1e-9)


def test_merging_refuses_what_it_cannot_merge(tmp_path):
    _, folder = adapter_folder(tmp_path)
    output = tmp_path / "merged"
    with pytest.raises(ValueError, match=r"no adapter_config\.json in it"):
        merge_lora(tmp_path / "base", output)
    with pytest.raises(FileExistsError, match="name a new folder"):
        merge_lora(folder, tmp_path / "base")
    settings = IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    other = get_peft_model(saved_base(tmp_path / "base"), settings)
    other.save_pretrained(tmp_path / "ia3")
    with pytest.raises(ValueError, match="holds a IA3 adapter"):
        merge_lora(tmp_path / "ia3", output)
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"cannot be loaded.*write its folder.*base_model_name_or_path"):
        merge_lora(folder, output)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not say which model it belongs to"):
        merge_lora(folder, output)
    assert not output.exists()


def test_nothing_is_left_of_a_merge_that_fails(tmp_path, monkeypatch):
    _, folder = adapter_folder(tmp_path)

    def save(self, target, **others):
        (target / "config.json").write_text("{}")
        raise OSError("no space left")

    monkeypatch.setattr(TTTE2EForCausalLM, "save_pretrained", save)
    with pytest.raises(OSError, match="no space left"):
        merge_lora(folder, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_command(tmp_path):
    model, folder = adapter_folder(tmp_path)
    merged = tmp_path / "merged"
    command = ["merge", "--adapter", str(folder), "--output", str(merged)]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0 and "merged" in shown.output
    assert loss(AutoModelForCausalLM.from_pretrained(merged)) == pytest.approx(loss(model), rel=1e-9)
    refused = CliRunner().invoke(app, command, env={"COLUMNS": "400", "NO_COLOR": "1", "TERM": "dumb"})
    assert refused.exit_code == 2 and "name a new folder" in refused.output


# ------------------------------------------------------------------------------------------------------------ resuming

RESUMED = {"max_steps": 8, "logging_steps": 2, "save_strategy": "steps", "save_steps": 4}


@pytest.mark.parametrize(("targets", "dropout"), [("all-linear", 0.2), ("prime", 0.0)])
def test_a_resumed_run_has_the_same_adapter_bit_by_bit(tmp_path, targets, dropout):
    whole = meta_trainer(tmp_path, adapted(targets, dropout=dropout, random=False), **RESUMED)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-8")
    resumed = meta_trainer(tmp_path, adapted(targets, dropout=dropout, random=True), **RESUMED)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    assert repeatable(resumed.state.log_history[:-1]) == repeatable(whole.state.log_history[:-1])
    expected = adapters(whole.model)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in adapters(resumed.model).items())


def test_a_checkpoint_of_another_rank_is_refused(tmp_path):
    meta_trainer(tmp_path, adapted("prime"), **(RESUMED | {"max_steps": 4})).train()
    other = add_lora(adapted("prime").unload(), "prime", RANK + 1, ALPHA)
    before = {name: parameter.detach().clone() for name, parameter in adapters(other).items()}
    with pytest.raises(ValueError, match=r"another model: its r is 3, but this model's is 4"):
        meta_trainer(tmp_path, other, **RESUMED).train(resume_from_checkpoint=True)
    assert all(torch.equal(parameter, before[name]) for name, parameter in adapters(other).items())


# ---------------------------------------------------------------------------------------------------------- generation


def test_a_learned_context_goes_on_under_peft(tmp_path):
    model, _ = adapter_folder(tmp_path)
    model.eval()
    whole = model.generate(input_ids=IDS, **(GREEDY | {"max_new_tokens": 12}))
    first = model.generate(input_ids=IDS, **(GREEDY | {"max_new_tokens": 5}))
    first.cache.save_pretrained(tmp_path / "context")
    context = TTTE2ECache.from_pretrained(tmp_path / "context", model.get_base_model())
    assert context.has_learned
    rest = GREEDY | {"max_new_tokens": 7}
    second = model.generate(input_ids=first.sequences, cache=context, **rest)
    assert torch.equal(second.sequences, whole.sequences)
    frozen = model.generate(input_ids=IDS, learn_from="none", output_logits=True, **GREEDY).logits[-1]
    learned = model.generate(input_ids=IDS, output_logits=True, **GREEDY).logits[-1]
    assert (frozen - learned).abs().max() > 1e-2, "learn_from reaches the model within"
    with pytest.raises(ValueError, match="other adapters at work"):
        TTTE2ECache.from_pretrained(tmp_path / "context", saved_base(tmp_path / "base"))


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"alpha": 24}, "its lora_alpha is 6, but this model's is 24"),
        ({"targets": "all-linear"}, "its target_modules is"),
        ({"mini_batch_size": 2}, "its mini_batch_size is 4, but this model's is 2"),
    ],
)
def test_a_checkpoint_of_another_adapter_is_refused(tmp_path, own, message):
    arguments = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    meta_trainer(tmp_path, add_lora(tiny_model(), "prime", 3, 6), **arguments).train()
    base = tiny_model(mini_batch_size=own.get("mini_batch_size", 4))
    model = add_lora(base, own.get("targets", "prime"), 3, own.get("alpha", 6))
    with pytest.raises(ValueError, match=message):
        meta_trainer(tmp_path, model, **arguments).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_an_adapter_is_no_checkpoint_of_the_whole_model(tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    meta_trainer(tmp_path, add_lora(tiny_model(), "prime", 3, 6), **arguments).train()
    with pytest.raises(ValueError, match="its trained part is an adapter, but this model's is the whole model"):
        meta_trainer(tmp_path, tiny_model(), **arguments).train(resume_from_checkpoint=True)
