"""TTT-Linear and TTT-MLP models inside transformers: generate, Auto classes, folders, pipeline, Trainer."""

import copy

import pytest
import torch
import transformers
from accelerate import disk_offload
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    StaticCache,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ttt_e2e import TTTLayersCache, TTTLayersConfig, TTTLayersForCausalLM, TTTLayersModel

from .helpers import random_ids
from .tiny_tokenizer import SENTENCES, byte_level_tokenizer
from .ttt_layers import CLOSE, LENGTH, MIXES, SIZE, SMALL, layers_config, layers_model

IDS = random_ids(3, LENGTH)
NEW = 2 * SIZE + 3
WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "several-beams": {"num_beams": 4, "num_return_sequences": 2},
    "several-samples": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.fixture(scope="module", params=MIXES)
def mix(request):
    return request.param


@pytest.fixture(scope="module")
def model(mix):
    return layers_model(mix)


def write(model, ids, **arguments):
    """New ids only; the padding id is never written."""
    set_seed(0)
    settings = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": [0]}
    return model.generate(ids, **settings | arguments)[:, ids.shape[1] :]


def left_padded():
    """Ids of rows of several lengths, their mask, and the rows without padding."""
    lengths = (3, 2 * SIZE, LENGTH)
    rows = [random_ids(1, length, seed=length) for length in lengths]
    ids, mask = random_ids(3, LENGTH, seed=9), torch.zeros(3, LENGTH, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, -row.shape[1] :], mask[index, -row.shape[1] :] = row, 1
    return ids, mask, rows


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
def test_going_on_from_a_returned_cache(model, only_new):
    ids, mask, _ = left_padded()
    settings = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [0], "return_dict_in_generate": True}
    first = model.generate(ids, attention_mask=mask, **settings)
    cache = first.cache
    assert type(cache) is TTTLayersCache and cache.get_seq_length() == LENGTH + 4
    longer = torch.cat([mask, mask.new_ones(3, 5)], dim=1)
    given = first.sequences[:, -1:] if only_new else first.sequences
    more = write(model, given, attention_mask=longer, cache=copy.deepcopy(cache), max_new_tokens=NEW - 5)
    expected = write(model, ids, attention_mask=mask)
    assert torch.equal(torch.cat([first.sequences[:, LENGTH:], more], dim=1), expected)


def test_several_answers_from_one_cache(model):
    cache = TTTLayersCache(model.config)
    with torch.no_grad():
        model(IDS[:, :-1], cache=cache)
    beams = cache.fork()
    beams.batch_repeat_interleave(3)
    assert torch.equal(write(model, IDS, cache=beams, num_beams=3), write(model, IDS, num_beams=3))
    assert cache.get_seq_length() == LENGTH - 1 and cache.batch_size == 3


def test_embeddings_as_a_prompt(model):
    embeddings = model.get_input_embeddings()(IDS)
    written = model.generate(inputs_embeds=embeddings, max_new_tokens=NEW, do_sample=False, suppress_tokens=[0])
    assert torch.equal(written, write(model, IDS))


def test_stop_strings_bring_their_tokenizer():
    tokenizer = byte_level_tokenizer()
    model = layers_model("linear", vocab_size=len(tokenizer))
    ids = tokenizer(SENTENCES[0], return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=5, stop_strings=["§"], tokenizer=tokenizer)
    assert written.shape[1] <= ids.shape[1] + 5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt_lookup_num_tokens": 2}, ValueError, "stateful"),
        ({"cache_implementation": "static"}, ValueError, "`cache_implementation='static'` is not possible"),
        ({"attention_mask": (torch.arange(LENGTH) < 5).long()[None]}, ValueError, "padded on the right"),
        ({"cache": "static"}, TypeError, "this model needs a TTTLayersCache"),
    ],
)
def test_what_generate_refuses(arguments, error, message):
    model = layers_model("linear")
    if arguments.get("cache") == "static":
        arguments = {"cache": StaticCache(config=model.config, max_cache_len=40)}
    with pytest.raises(error, match=message):
        model.generate(IDS[:1], max_new_tokens=5, **arguments)


# -------------------------------------------------------------------------------------------- classes and folders


def test_auto_classes_know_the_model():
    config = AutoConfig.for_model("ttt_layers", num_hidden_layers=2, **SMALL)
    assert type(config) is TTTLayersConfig
    assert type(AutoModel.from_config(config)) is TTTLayersModel
    assert type(AutoModelForCausalLM.from_config(config)) is TTTLayersForCausalLM
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["ttt_layers"] == "TTTLayersForCausalLM"
    assert transformers.TTTLayersForCausalLM is TTTLayersForCausalLM


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_is_the_same_after_loading(mix, tied, tmp_path):
    model = layers_model(mix, torch.float32, tie_word_embeddings=tied)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is TTTLayersForCausalLM
    assert {**loaded.config.to_dict(), "_name_or_path": ""} == {**model.config.to_dict(), "_name_or_path": ""}
    assert torch.equal(loaded(IDS).logits, expected)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head(base(IDS).last_hidden_state), expected)


def test_a_loaded_model_writes_what_it_wrote_before(mix, tmp_path):
    model = layers_model(mix, torch.float32)
    model.save_pretrained(tmp_path)
    ids, mask, _ = left_padded()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(write(loaded, ids, attention_mask=mask), write(model, ids, attention_mask=mask))


def test_missing_weights_are_initialised_after_a_load_on_the_meta_device(mix):
    """`from_pretrained` builds on the meta device, so that what no file holds must come from `_init_weights`."""
    config = layers_config(mix)
    model = TTTLayersForCausalLM.from_pretrained(None, config=config, state_dict={})
    set_seed(0)
    expected = dict(TTTLayersForCausalLM(config).named_parameters())
    for name, parameter in model.named_parameters():
        parameter = parameter.detach()
        assert not parameter.is_meta and parameter.isfinite().all(), name
        spread = 0.5 if parameter.numel() < 100 else 0.3
        assert parameter.std() == pytest.approx(expected[name].std().item(), rel=spread, abs=1e-6), name
        assert parameter.mean() == pytest.approx(expected[name].mean().item(), abs=0.2), name
    assert model(IDS).logits.isfinite().all()


def test_saved_weights_survive_initialisation():
    """Only what is missing is initialised: here the initial weights of one inner learner."""
    model = layers_model("mamba-backbone", torch.float32)
    missing = "model.layers.0.ttt.initial_weight_1"
    state = {name: tensor for name, tensor in model.state_dict().items() if name != missing}
    loaded = TTTLayersForCausalLM.from_pretrained(None, config=model.config, state_dict=state)
    saved = model.state_dict()
    changed = [name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, saved[name])]
    assert changed == [missing]


@pytest.mark.parametrize("size", [110, 90])
def test_the_vocabulary_can_be_resized(size):
    model = layers_model("everything")
    ids = IDS % 90
    before = model(ids).logits
    model.resize_token_embeddings(size)
    after = model(ids).logits
    assert after.shape[-1] == model.config.vocab_size == size
    torch.testing.assert_close(after[..., :90], before[..., :90], **CLOSE)


def test_text_generation_pipeline(tmp_path):
    tokenizer = byte_level_tokenizer()
    model = layers_model("mamba-backbone", torch.float32, vocab_size=len(tokenizer))
    model.generation_config.suppress_tokens = [0, 1, 2]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    answer = pipeline("text-generation", model=str(tmp_path))
    settings = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    alone = [answer(text, **settings) for text in SENTENCES]
    assert answer(list(SENTENCES), batch_size=3, **settings) == alone


def test_trainer_lowers_the_loss(mix, tmp_path):
    set_seed(0)
    model = TTTLayersForCausalLM(layers_config(mix, initializer_range=0.02))
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


def test_low_rank_adapters_learn(tmp_path):
    peft = pytest.importorskip("peft")
    model = layers_model("everything", torch.float32)
    before = model(IDS).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapted(IDS, labels=IDS).loss.backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert any("ttt.q_proj" in name for name in trained) and all(p.grad.any() for p in trained.values())
    with torch.no_grad():
        expected = adapted.eval()(IDS).logits
        merged = adapted.merge_and_unload()(IDS).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    assert (expected - before).abs().max() > 1e-2


def test_weights_on_disk(tmp_path):
    """Offloading loads parameters when their module is called: none may be read beside a call."""
    model = layers_model("everything")
    expected = write(model, IDS)
    offloaded = disk_offload(model, tmp_path, execution_device="cpu")
    assert all(p.is_meta for p in offloaded.model.layers.parameters())
    assert torch.equal(write(offloaded, IDS), expected)
