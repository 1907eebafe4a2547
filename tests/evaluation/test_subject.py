"""Any causal language model can be loaded and gives the loss of each token."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from ttt_e2e.data.tokenizer import train_tokenizer
from ttt_e2e.evaluation import Subject, load_subject, token_losses
from ttt_e2e.evaluation import subject as module

from .subjects import MODELS, VOCAB, learner, losses_by_hand, mistral, random_documents, subject


@pytest.mark.parametrize("kind", MODELS)
def test_equals_the_log_probabilities_of_one_pass(kind):
    tested, ids = subject(kind), random_documents(3, 45)
    losses = token_losses(tested, ids)
    assert losses.shape == (3, 44) and losses.dtype == torch.float32 and not losses.requires_grad
    torch.testing.assert_close(losses.double(), losses_by_hand(tested.model, ids), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 7, 16])
@pytest.mark.parametrize("kind", ["hybrid", "mistral"])
def test_a_long_text_is_read_in_segments_as_in_one_pass(kind, size, monkeypatch):
    monkeypatch.setattr(module, "SEGMENT_TOKENS", 2 * size)
    tested, ids, widths = subject(kind), random_documents(2, 45), []
    tested.model.lm_head.register_forward_hook(lambda _, __, logits: widths.append(logits.shape[1]))
    losses = token_losses(tested, ids)
    assert max(widths) == size and sum(widths) == 44
    torch.testing.assert_close(losses.double(), losses_by_hand(tested.model, ids), atol=1e-5, rtol=1e-4)


def test_a_large_vocabulary_makes_segments_shorter(monkeypatch):
    monkeypatch.setattr(module, "SEGMENT_LOGITS", 10 * VOCAB)
    tested, widths = subject("mistral"), []
    tested.model.lm_head.register_forward_hook(lambda _, __, logits: widths.append(logits.shape[1]))
    token_losses(tested, random_documents(2, 45))
    assert max(widths) == 5, "10 positions over both rows"


@pytest.mark.parametrize("kind", ["mamba2", "mistral"])
def test_without_a_usable_cache_the_text_is_read_in_one_pass(kind, monkeypatch):
    monkeypatch.setattr(module, "SEGMENT_TOKENS", 7)
    tested, ids = subject(kind), random_documents(1, 30)
    expected = losses_by_hand(tested.model, ids)
    if kind == "mistral":

        def forget(_, __, output):
            output.cache = None

        tested.model.register_forward_hook(forget)
    torch.testing.assert_close(token_losses(tested, ids).double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["ours", "hybrid", "mistral"])
def test_adapters_may_stand_around_the_embeddings(kind):
    adapters = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 7], task_type="CAUSAL_LM")
    tested, ids = Subject(kind, get_peft_model(subject(kind).model, adapters)), random_documents(2, 21)
    assert tested.vocabulary_size == VOCAB
    expected = losses_by_hand(tested.model.get_base_model(), ids)
    torch.testing.assert_close(token_losses(tested, ids).double(), expected, atol=1e-5, rtol=1e-4)


def test_arguments_reach_the_model():
    ids = random_documents(2, 21)
    on, off = subject("ours"), subject("ours", test_time_training=False)
    expected = losses_by_hand(off.model, ids, test_time_training=False)
    torch.testing.assert_close(token_losses(off, ids).double(), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(token_losses(on, ids), token_losses(off, ids))


def test_half_precision_models_are_scored_in_float32():
    tested, ids = subject("mistral"), random_documents(2, 21)
    tested.model.bfloat16()
    losses = token_losses(tested, ids)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), losses_by_hand(tested.model, ids), atol=1e-5, rtol=1e-5)


def test_a_subject_is_in_evaluation_mode():
    model = mistral(attention_dropout=0.5).train()
    assert not Subject("label", model).model.training


@pytest.mark.parametrize("ids", [torch.zeros(5), torch.zeros(2, 1), torch.zeros(0, 5)], ids=["1d", "single", "none"])
def test_nothing_to_predict_is_an_error(ids):
    with pytest.raises(ValueError, match=r"ids: shape \["):
        token_losses(subject("mistral"), ids.long())


@pytest.mark.parametrize("wrong", [-1, VOCAB])
def test_an_id_outside_the_vocabulary_is_an_error(wrong):
    ids = random_documents(1, 5)
    ids[0, 3] = wrong
    with pytest.raises(ValueError, match="tokenizer"):
        token_losses(subject("mistral"), ids)


def test_learned_positions_that_run_out_are_an_error():
    config = GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    tested = Subject("gpt2", GPT2LMHeadModel(config))
    assert token_losses(tested, random_documents(1, 16)).shape == (1, 15)
    with pytest.raises(ValueError, match=r"length=17.*only 16"):
        token_losses(tested, random_documents(1, 17))


@pytest.fixture
def run_folder(tmp_path):
    """As `ttt-e2e train` leaves it."""
    folder = tmp_path / "mine"
    learner().save_pretrained(folder / "model")
    train_tokenizer(["some text"], 300).save_pretrained(folder / "model")
    return folder


@pytest.mark.parametrize("inside", ["", "model"])
def test_load_the_folder_of_a_run(run_folder, inside):
    loaded = load_subject(str(run_folder / inside))
    assert loaded.label == "mine" and loaded.arguments == {}
    assert loaded.tokenizer.decode(loaded.tokenizer("some text").input_ids, skip_special_tokens=True) == "some text"
    saved = type(loaded.model).from_pretrained(run_folder / "model")
    ids = random_documents(1, 20)
    assert torch.equal(token_losses(loaded, ids), token_losses(Subject("saved", saved), ids))


def test_load_a_folder_without_a_tokenizer(tmp_path):
    mistral().save_pretrained(tmp_path / "mistral")
    loaded = load_subject(str(tmp_path / "mistral"), label="A Mistral", dtype=torch.bfloat16)
    assert (loaded.label, loaded.tokenizer, loaded.model.dtype) == ("A Mistral", None, torch.bfloat16)


def test_a_damaged_tokenizer_is_an_error(run_folder):
    (run_folder / "model" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="the tokenizer cannot be loaded"):
        load_subject(str(run_folder))


@pytest.mark.parametrize(("suffix", "learning"), [("on", True), ("off", False)])
def test_suffix_switches_learning(run_folder, suffix, learning):
    loaded = load_subject(f"{run_folder}@learning-{suffix}")
    assert loaded.arguments == {"test_time_training": learning}
    assert loaded.label == f"mine, learning {suffix}"


def test_an_at_sign_in_a_path_is_no_suffix(tmp_path):
    mistral().save_pretrained(tmp_path / "model@step5")
    assert load_subject(str(tmp_path / "model@step5")).label == "model@step5"


@pytest.mark.parametrize("preset", ["tiny", "tiny-mamba2"])
def test_load_a_preset(preset):
    loaded = load_subject(preset)
    assert (loaded.label, loaded.tokenizer, loaded.model.dtype) == (preset, None, torch.float32)
    assert loaded.vocabulary_size == 1024


@pytest.mark.parametrize("preset", ["tiny-mamba2", "tiny-full-attention"])
def test_learning_suffix_of_a_model_that_cannot_learn_is_an_error(preset):
    with pytest.raises(ValueError, match=rf"{preset}@learning-on.*no test-time training.*leave the suffix out"):
        load_subject(f"{preset}@learning-on")


def test_suffix_of_a_foreign_model_is_an_error_before_its_weights_are_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(mistral().config.to_dict()))
    with pytest.raises(ValueError, match="a mistral model has no test-time training"):
        load_subject(f"{tmp_path}@learning-off")


def test_a_misspelt_suffix_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean '@learning-off'"):
        load_subject("tiny@learning-of")
