"""Every family in every mode is known to the Auto classes, and is the same after saving and loading."""

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    pipeline,
    set_seed,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .families import IDS, KINDS, LENGTH, write
from .generating import left_padded
from .helpers import VOCAB, random_ids
from .tiny_tokenizer import SENTENCES, byte_level_tokenizer


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
