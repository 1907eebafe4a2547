"""The recurrent baselines inside transformers: generate, Auto classes, folders, pipeline, Trainer."""

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments, pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ttt_e2e import RecurrentHybridConfig, RecurrentHybridForCausalLM, RecurrentHybridModel

from .generating import left_padded
from .helpers import random_ids
from .recurrent import (
    LENGTH,
    MIXES,
    SMALL,
    assert_initial_decays_and_steps,
    hybrid,
    hybrid_config,
    tolerance,
)
from .tiny_tokenizer import SENTENCES, byte_level_tokenizer

IDS = random_ids(3, LENGTH)


@pytest.fixture(scope="module", params=MIXES)
def mix(request):
    return request.param


@pytest.fixture(scope="module")
def model(mix):
    return hybrid(mix)


def write(model, ids, **arguments):
    """New ids only; the padding id is never written."""
    settings = {"max_new_tokens": 20, "do_sample": False, "suppress_tokens": [0]}
    return model.generate(ids, **settings | arguments)[:, ids.shape[1] :]


# ------------------------------------------------------------------------------------------------------ generate


@pytest.mark.parametrize("ways", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_the_cache_changes_nothing_that_is_written(model, ways):
    written = write(model, IDS, **ways)
    assert torch.equal(written, write(model, IDS, use_cache=False, **ways))
    assert len(set(written[0].tolist())) > 3


def test_prompts_of_several_lengths(model):
    """Left-padded in one batch, each is continued as alone, also when the prompt is read in pieces."""
    ids, mask, rows = left_padded()
    alone = torch.cat([write(model, row) for row in rows])
    assert torch.equal(write(model, ids, attention_mask=mask), alone)
    for size in (1, 7):
        assert torch.equal(write(model, ids, attention_mask=mask, prefill_chunk_size=size), alone)


def test_going_on_from_a_returned_cache(model):
    settings = {"max_new_tokens": 10, "do_sample": False, "suppress_tokens": [0]}
    first = model.generate(IDS, return_dict_in_generate=True, **settings)
    more = write(model, first.sequences, cache=first.cache, max_new_tokens=10)
    assert torch.equal(torch.cat([first.sequences[:, LENGTH:], more], dim=1), write(model, IDS))


def test_assisted_decoding_is_refused():
    """A recurrent state cannot be rolled back to before a rejected token."""
    with pytest.raises(ValueError, match="stateful"):
        hybrid("mamba2").generate(IDS[:1], prompt_lookup_num_tokens=2, max_new_tokens=5)


# -------------------------------------------------------------------------------------------- classes and folders


def test_auto_classes_know_the_model():
    config = AutoConfig.for_model("recurrent_hybrid", **SMALL)
    assert type(config) is RecurrentHybridConfig
    assert type(AutoModel.from_config(config)) is RecurrentHybridModel
    assert type(AutoModelForCausalLM.from_config(config)) is RecurrentHybridForCausalLM
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["recurrent_hybrid"] == "RecurrentHybridForCausalLM"
    assert transformers.RecurrentHybridForCausalLM is RecurrentHybridForCausalLM


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_is_the_same_after_loading(mix, tied, tmp_path):
    model = hybrid(mix, torch.float32, tie_word_embeddings=tied)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is RecurrentHybridForCausalLM
    assert {**loaded.config.to_dict(), "_name_or_path": ""} == {**model.config.to_dict(), "_name_or_path": ""}
    assert torch.equal(loaded(IDS).logits, expected)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head(base(IDS).last_hidden_state), expected)


def test_missing_weights_are_initialised_after_a_load_on_the_meta_device(mix):
    """`from_pretrained` builds on the meta device, so that what no file holds must come from `_init_weights`."""
    config = hybrid_config(mix)
    model = RecurrentHybridForCausalLM.from_pretrained(None, config=config, state_dict={})
    expected = dict(hybrid(mix, torch.float32).named_parameters())
    for name, parameter in model.named_parameters():
        parameter = parameter.detach()
        assert not parameter.is_meta and parameter.isfinite().all(), name
        if name.endswith(("A_log", "dt_bias")):
            continue  # two or four numbers, checked below
        # As spread out as in a model that was built directly.
        assert parameter.std() == pytest.approx(expected[name].std().item(), rel=0.3, abs=1e-6), name
        assert parameter.mean() == pytest.approx(expected[name].mean().item(), abs=0.2), name
    assert_initial_decays_and_steps(model)
    assert torch.equal(model.model.rotary_emb.inv_freq, hybrid(mix, torch.float32).model.rotary_emb.inv_freq)


def test_saved_weights_survive_initialisation(tmp_path):
    """Only what is missing is initialised: here one time-step bias."""
    model = hybrid("everything", torch.float32)
    missing = "model.layers.0.linear_attn.dt_bias"
    state = {name: tensor for name, tensor in model.state_dict().items() if name != missing}
    loaded = RecurrentHybridForCausalLM.from_pretrained(None, config=model.config, state_dict=state)
    saved = model.state_dict()
    changed = [name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, saved[name])]
    assert changed == [missing]


@pytest.mark.parametrize("size", [110, 90])
def test_the_vocabulary_can_be_resized(size):
    model = hybrid("everything")
    ids = IDS % 90
    before = model(ids).logits
    model.resize_token_embeddings(size)
    after = model(ids).logits
    assert after.shape[-1] == model.config.vocab_size == size
    torch.testing.assert_close(after[..., :90], before[..., :90], rtol=0, atol=1e-12)


def test_text_generation_pipeline(mix, tmp_path):
    tokenizer = byte_level_tokenizer()
    model = hybrid(mix, torch.float32, vocab_size=len(tokenizer))
    model.generation_config.suppress_tokens = [0, 1, 2]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    answer = pipeline("text-generation", model=str(tmp_path))
    settings = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    alone = [answer(text, **settings) for text in SENTENCES]
    assert answer(list(SENTENCES), batch_size=3, **settings) == alone
    ids = tokenizer(SENTENCES[0], return_tensors="pt").input_ids
    written = write(model, ids, max_new_tokens=12, suppress_tokens=[0, 1, 2])
    assert alone[0][0]["generated_text"] == tokenizer.decode(written[0])


def test_trainer_lowers_the_loss(mix, tmp_path):
    model = hybrid(mix, torch.float32, initializer_range=0.02)
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in IDS.tolist()])
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5


def test_rows_of_beams_follow_their_states(mix):
    """A reordered cache continues the rows in their new order."""
    model = hybrid(mix)
    order = torch.tensor([2, 0, 0])
    with torch.no_grad():
        cache = model(IDS[:, :-1], use_cache=True).cache
        cache.reorder_cache(order)
        after = model(IDS[order, -1:], cache=cache).logits
        torch.testing.assert_close(after, model(IDS[order]).logits[:, -1:], **tolerance(mix))
