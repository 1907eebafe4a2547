"""Every family in every mode is a transformers model like any other: generate, caches, folders, pipeline, Trainer."""

import copy
import warnings

import pytest
import torch
import transformers
from accelerate import disk_offload
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    StaticCache,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ttt_e2e.training import MetaTrainer, MetaTrainingArguments

from .families import FAMILIES, KINDS, LENGTH
from .generating import left_padded
from .helpers import VOCAB, random_ids
from .tiny_tokenizer import SENTENCES, byte_level_tokenizer

IDS = random_ids(3, LENGTH)
NEW = 11
WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "several-beams": {"num_beams": 4, "num_return_sequences": 2},
    "several-samples": {"do_sample": True, "num_return_sequences": 2},
}
EARLIER_NAMES = ("past_key_values", "cache_params")
TRAINING = {
    "max_steps": 12,
    "per_device_train_batch_size": 3,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture(scope="module")
def model(kind):
    return kind.model()


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def one_of(family):
    """One model of each family, in float64."""
    return next(kind for kind in KINDS.values() if kind.family is family and kind.mode == family.some_mode).model()


def write(model, ids, **arguments):
    """New ids only; the padding id is never written."""
    set_seed(0)
    settings = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": [0]}
    return model.generate(ids, **settings | arguments)[:, ids.shape[1] :]


def rows() -> Dataset:
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in IDS.tolist()])


# ------------------------------------------------------------------------------------------------------ generate


@pytest.mark.parametrize("way", WAYS)
def test_the_cache_changes_nothing_that_is_written(model, way):
    written = write(model, IDS, **WAYS[way])
    assert torch.equal(written, write(model, IDS, use_cache=False, **WAYS[way]))
    assert len(set(written[0].tolist())) > 2


def test_prompts_of_several_lengths(model):
    """Left-padded in one batch, each is continued as alone, also when the prompt is read in pieces."""
    ids, mask, rows = left_padded()
    alone = torch.cat([write(model, row) for row in rows])
    assert torch.equal(write(model, ids, attention_mask=mask), alone)
    for size in (1, 7):
        assert torch.equal(write(model, ids, attention_mask=mask, prefill_chunk_size=size), alone)


@pytest.mark.parametrize("only_new", [False, True])
def test_going_on_from_a_returned_cache(kind, model, only_new):
    ids, mask, _ = left_padded()
    settings = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [0], "return_dict_in_generate": True}
    first = model.generate(ids, attention_mask=mask, **settings)
    cache = first.cache
    assert type(cache) is kind.family.cache_class and cache.get_seq_length() == ids.shape[1] + 4
    longer = torch.cat([mask, mask.new_ones(3, 5)], dim=1)
    given = first.sequences[:, -1:] if only_new else first.sequences
    more = write(model, given, attention_mask=longer, cache=copy.deepcopy(cache), max_new_tokens=NEW - 5)
    expected = write(model, ids, attention_mask=mask)
    assert torch.equal(torch.cat([first.sequences[:, ids.shape[1] :], more], dim=1), expected)


@pytest.mark.parametrize("columns_read", [12, 17])
def test_what_a_cache_holds_is_not_read_again(model, columns_read):
    """`generate` cuts a continued sequence only where the cache's `is_linear` says so."""
    with torch.no_grad():
        cache = model(IDS[:, :columns_read], use_cache=True).cache
    assert len(cache.is_linear) == model.config.num_hidden_layers and not all(cache.is_linear)
    settings = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "suppress_tokens": [0]}
    output = model.generate(IDS[:, :18], cache=cache, **settings)
    assert output.cache.get_seq_length() == 18
    assert torch.equal(output.sequences[:, 18:], write(model, IDS[:, :18], max_new_tokens=1))


@pytest.mark.parametrize("only_new", [False, True])
@pytest.mark.parametrize("chunk", [None, 4])
def test_a_second_turn_of_a_padded_batch(kind, only_new, chunk):
    """Turns of unequal length, padded on the left, after answers to prompts of unequal length: as each row alone."""
    # A sliding window of transformers' cache counts padding.
    model = kind.model(sliding_window=64) if kind.family.cache_class is DynamicCache else kind.model()
    settings = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [0], "return_dict_in_generate": True}
    ids, mask, prompts = left_padded((5, 14))
    turns = left_padded((9, 2))
    first = model.generate(ids, attention_mask=mask, **settings)
    whole = torch.cat([first.sequences, turns[0]], dim=1)
    longer = torch.cat([mask, mask.new_ones(2, 4), turns[1]], dim=1)
    # The last token of an answer is not read yet.
    given = whole[:, first.cache.get_seq_length() :] if only_new else whole
    written = write(model, given, attention_mask=longer, cache=first.cache, prefill_chunk_size=chunk)
    for row, (prompt, turn) in enumerate(zip(prompts, turns[2], strict=True)):
        answer = first.sequences[row : row + 1, ids.shape[1] :]
        assert torch.equal(answer, write(model, prompt, max_new_tokens=4))
        alone = torch.cat([prompt, answer, turn], dim=1)
        assert torch.equal(written[row : row + 1], write(model, alone))


def test_several_answers_from_one_cache(model):
    with torch.no_grad():
        cache = model(IDS[:, :-1], use_cache=True).cache
    beams = copy.deepcopy(cache)
    beams.reorder_cache(torch.arange(3).repeat_interleave(3))  # transformers' recurrent states know no other way
    assert torch.equal(write(model, IDS, cache=beams, num_beams=3), write(model, IDS, num_beams=3))
    assert cache.get_seq_length() == LENGTH - 1


def test_rows_of_beams_follow_their_states(kind, model):
    """A reordered cache continues the rows in their new order."""
    order = torch.tensor([2, 0, 0])
    with torch.no_grad():
        cache = model(IDS[:, :-1], use_cache=True).cache
        cache.reorder_cache(order)
        after = model(IDS[order, -1:], cache=cache).logits
        torch.testing.assert_close(after, model(IDS[order]).logits[:, -1:], **kind.tolerance)


def test_embeddings_as_a_prompt(model):
    embeddings = {"inputs_embeds": model.get_input_embeddings()(IDS)}
    if getattr(model.config, "test_time_training", False):
        embeddings["input_ids"] = IDS  # what is learned from
    settings = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": [0]}
    assert torch.equal(model.generate(**embeddings, **settings)[:, -NEW:], write(model, IDS))


def test_stop_strings_bring_their_tokenizer(family):
    tokenizer = byte_level_tokenizer()
    model = next(kind for kind in KINDS.values() if kind.family is family).model(vocab_size=len(tokenizer))
    ids = tokenizer(SENTENCES[0], return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=5, stop_strings=["§"], tokenizer=tokenizer)
    assert written.shape[1] <= ids.shape[1] + 5


# ------------------------------------------------------------------------------------------- arguments of a call


@pytest.mark.parametrize("name", EARLIER_NAMES)
def test_earlier_names_of_the_cache(one_of, name):
    """forward, the base model and `generate` take them with one warning; outputs answer to them."""

    @torch.no_grad()
    def once(function, **arguments):
        cache = one_of(IDS[:, :12], use_cache=True).cache
        expected = function(cache=copy.deepcopy(cache), **arguments)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = function(**{name: cache}, **arguments)
        messages = [str(warning.message) for warning in caught if warning.category is FutureWarning]
        assert len(messages) == 1 and f"`{name}` is deprecated" in messages[0] and "`cache`" in messages[0]
        assert cache.get_seq_length() >= 18
        return expected, found

    expected, found = once(one_of, input_ids=IDS[:, 12:18])
    assert torch.equal(found.logits, expected.logits)
    assert getattr(found, name) is found[name] is found.cache is found["cache"]
    assert name in found and type(found)(**{name: found.cache}).cache is found.cache
    expected, found = once(one_of.model, input_ids=IDS[:, 12:18])
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert getattr(found, name) is found.cache
    settings = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [0], "return_dict_in_generate": True}
    expected, found = once(one_of.generate, inputs=IDS[:, :18], **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert found.cache.get_seq_length() == expected.cache.get_seq_length() == 20
    assert getattr(found, name) is found.cache


def test_unknown_arguments_are_refused(one_of):
    for call in (one_of, one_of.model):
        with pytest.raises(TypeError, match=r"does not know the arguments \['attention_masks', 'labls'\]"):
            call(IDS, labls=IDS, attention_masks=torch.ones_like(IDS), head_mask=None)
        with pytest.raises(TypeError, match=r"does not know the arguments \['is_causal'\]"):
            call(IDS, is_causal=False)
    with pytest.raises(ValueError, match=r"`model_kwargs` are not used by the model: \['cach'\]"):
        one_of.generate(IDS, max_new_tokens=2, cach=1)


def test_arguments_that_transformers_hands_to_any_model(one_of):
    expected = one_of(IDS, labels=IDS)
    given = one_of(
        input_ids=IDS,
        labels=IDS,
        num_items_in_batch=torch.tensor(2 * IDS[:, 1:].numel()),
        output_router_logits=False,
        is_causal=True,
        seq_idx=None,
        cu_seq_lens_q=None,
        max_length_q=None,
        output_hidden_states=False,
        return_dict=False,
    )
    assert isinstance(given, tuple)
    torch.testing.assert_close(given[0], expected.loss / 2)
    assert torch.equal(given[1], expected.logits)
    assert write(one_of, IDS, output_router_logits=False, output_hidden_states=False).shape == (3, NEW)
    shifted = one_of(IDS[:, :-1], labels=IDS[:, :-1], shift_labels=IDS[:, 1:])
    torch.testing.assert_close(shifted.loss, expected.loss)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt_lookup_num_tokens": 2}, ValueError, "stateful|takes back tokens"),
        ({"cache_implementation": "static"}, ValueError, "`cache_implementation='static'` is not possible"),
        ({"attention_mask": (torch.arange(LENGTH) < 5).long()[None]}, ValueError, "padded on the right"),
        ({"cache": "static"}, TypeError, "this model needs a TTT"),
    ],
)
def test_what_generate_refuses(family, one_of, arguments, error, message):
    if family.cache_class is DynamicCache and "prompt_lookup_num_tokens" not in arguments:
        pytest.skip("transformers' caches are those of this family")
    if arguments.get("cache") == "static":
        arguments = {"cache": StaticCache(config=one_of.config, max_cache_len=40)}
    with pytest.raises(error, match=message):
        one_of.generate(IDS[:1], max_new_tokens=5, **arguments)


# -------------------------------------------------------------------------------------------- classes and folders


def test_auto_classes_know_the_model(family, one_of):
    assert one_of.config.model_type == family.model_type
    config = AutoConfig.for_model(**one_of.config.to_dict())
    assert type(config) is family.config_class
    assert type(AutoModel.from_config(config)) is family.base_class
    assert type(AutoModelForCausalLM.from_config(config)) is family.causal_lm_class
    name = family.causal_lm_class.__name__
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type] == name
    assert getattr(transformers, name) is family.causal_lm_class


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_is_the_same_after_loading(kind, tied, tmp_path):
    model = kind.model(torch.float32, tie_word_embeddings=tied)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is kind.family.causal_lm_class and not loaded.training
    assert {**loaded.config.to_dict(), "_name_or_path": ""} == {**model.config.to_dict(), "_name_or_path": ""}
    assert torch.equal(loaded(IDS).logits, expected)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is kind.family.base_class
    assert torch.equal(loaded.lm_head(base(IDS).last_hidden_state), expected)
    ids, mask, _ = left_padded()
    assert torch.equal(write(loaded, ids, attention_mask=mask), write(model, ids, attention_mask=mask))


def test_missing_weights_are_initialised_after_a_load_on_the_meta_device(kind):
    """`from_pretrained` builds on the meta device, so that what no file holds must come from `_init_weights`."""
    fresh = kind.fresh()
    set_seed(1)
    model = type(fresh).from_pretrained(None, config=fresh.config, state_dict={})
    expected = dict(fresh.named_parameters())
    for name, parameter in model.named_parameters():
        parameter = parameter.detach()
        assert not parameter.is_meta and parameter.isfinite().all(), name
        if name.endswith(("A_log", "dt_bias")):
            continue  # two or four numbers, which a test of the hybrids looks at
        # As spread out as in a model that was built directly.
        spread = 0.5 if parameter.numel() < 100 else 0.3
        assert parameter.std() == pytest.approx(expected[name].std().item(), rel=spread, abs=1e-6), name
        assert parameter.mean() == pytest.approx(expected[name].mean().item(), abs=0.2), name
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, dict(fresh.named_buffers())[name]), name
    assert model(IDS).logits.isfinite().all()


def test_saved_weights_survive_initialisation(family, one_of):
    """Only what is missing is initialised: here one parameter."""
    saved = one_of.float().state_dict()
    state = {name: tensor for name, tensor in saved.items() if name != family.a_weight}
    loaded = family.causal_lm_class.from_pretrained(None, config=one_of.config, state_dict=state)
    changed = [name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, saved[name])]
    assert changed == [family.a_weight]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [VOCAB + 7, VOCAB - 10])
def test_the_vocabulary_can_be_resized(family, tied, size):
    kind = next(kind for kind in KINDS.values() if kind.family is family and kind.mode == family.some_mode)
    model = kind.model(tie_word_embeddings=tied)
    first = 4  # the tokens of a first mini-batch: what is learned afterwards depends on the whole vocabulary
    ids = random_ids(2, LENGTH, high=VOCAB - 10)
    with torch.no_grad():
        before = model(ids).logits
    model.resize_token_embeddings(size)
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    assert outputs.logits.shape[-1] == model.config.vocab_size == model.lm_head.out_features == size
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    kept = min(size, VOCAB)
    torch.testing.assert_close(outputs.logits[:, :first, :kept], before[:, :first, :kept])
    new = torch.full((2, LENGTH), size - 1)
    assert model(new, labels=new).loss.isfinite()


def test_text_generation_pipeline(kind, tmp_path):
    tokenizer = byte_level_tokenizer()
    model = kind.model(torch.float32, vocab_size=len(tokenizer))
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


# ------------------------------------------------------------------------------------------------------- training


def trained(folder, model, **arguments):
    """A stock trainer after training, and the losses that it logged."""
    arguments = TrainingArguments(str(folder), **TRAINING | arguments)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(), eval_dataset=rows())
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_lowers_the_loss_and_evaluates(kind, tmp_path):
    model = kind.fresh(initializer_range=0.02)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer, losses = trained(tmp_path, model)
    assert losses[-1] < losses[0] - 0.5
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []
    loss = trainer.evaluate()["eval_loss"]
    assert loss < losses[0] - 0.5
    predictions = trainer.predict(rows()).predictions
    assert predictions.shape == (3, LENGTH, VOCAB), "logits alone: the other outputs are left out"
    meta = MetaTrainer(model=model, args=MetaTrainingArguments(str(tmp_path), **TRAINING), eval_dataset=rows())
    assert meta.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "apart"),
    [
        ({"bf16": True}, 0.1),
        ({"activation_checkpointing": True}, 1e-4),
        ({"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1}, 1e-4),
        ({"label_smoothing_factor": 0.1}, None),
    ],
    ids=["bf16", "checkpointing", "accumulation", "label-smoothing"],
)
def test_trainer_in_other_ways(family, arguments, apart, tmp_path):
    """Each lowers the loss and evaluates; all but label smoothing log the same losses."""
    kind = next(kind for kind in KINDS.values() if kind.family is family and kind.mode == family.some_mode)
    (_, plain), (trainer, losses) = (
        trained(
            tmp_path, kind.fresh(initializer_range=0.02), eval_strategy="steps", eval_steps=3, max_steps=6, **changes
        )
        for changes in ({}, arguments)
    )
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 6 and len(evaluations) == 2 and evaluations[1] < evaluations[0]
    assert losses[-1] < losses[0] - 0.1
    assert apart is None or losses == pytest.approx(plain, abs=apart)


def test_low_rank_adapters_learn(kind):
    model = kind.model(torch.float32)
    before = model(IDS).logits
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapted(IDS, labels=IDS).loss.backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all(p.grad.any() for p in trained.values())
    with torch.no_grad():
        expected = adapted.eval()(IDS).logits
        merged = adapted.merge_and_unload()(IDS).logits
    torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-3)
    assert (expected - before).abs().max() > 1e-2


def test_weights_on_disk(family, one_of, tmp_path):
    """Offloading loads parameters when their module is called: none may be read beside a call."""
    expected = write(one_of, IDS)
    offloaded = disk_offload(one_of, tmp_path, execution_device="cpu")
    assert all(p.is_meta for p in offloaded.model.layers.parameters())
    assert torch.equal(write(offloaded, IDS), expected)
