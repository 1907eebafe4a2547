"""The classes that judge a text: scores of a row, of its tokens, and of the columns of an answer."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    pipeline,
    set_seed,
)
from transformers.loss.loss_utils import LOSS_MAPPING

from ttt_e2e import (
    TTTE2ECache,
    TTTE2EForQuestionAnswering,
    TTTE2EForSequenceClassification,
    TTTE2EForTokenClassification,
)

from .helpers import BATCH, LENGTH, VOCAB, padded, random_ids, small_config, small_model
from .tiny_tokenizer import SENTENCES, byte_level_tokenizer

HEADS = {
    "sequence": (TTTE2EForSequenceClassification, AutoModelForSequenceClassification, {"score.weight"}),
    "token": (TTTE2EForTokenClassification, AutoModelForTokenClassification, {"score.weight", "score.bias"}),
    "answer": (TTTE2EForQuestionAnswering, AutoModelForQuestionAnswering, {"qa_outputs.weight", "qa_outputs.bias"}),
}
every_head = pytest.mark.parametrize("kind", HEADS)
LABELS = 3


def head(kind, dtype=torch.float64, **changes):
    """A random model in evaluation mode, in which padding and the end of a text have the same id."""
    set_seed(0)
    config = small_config(**{"num_labels": LABELS, "eos_token_id": 2, "pad_token_id": 2} | changes)
    return HEADS[kind][0](config).to(dtype).eval()


def scores(outputs) -> torch.Tensor:
    """[batch, ...] with one row per column where there are columns."""
    if "logits" in outputs:
        return outputs.logits
    return torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)


def targets(kind, rows=2, length=LENGTH) -> dict[str, torch.Tensor]:
    """Labels of a batch without padding."""
    if kind == "sequence":
        return {"labels": torch.arange(rows) % LABELS}
    if kind == "token":
        return {"labels": torch.arange(rows * length).view(rows, length) % LABELS}
    return {"start_positions": torch.arange(rows) + 3, "end_positions": torch.arange(rows) + 5}


@every_head
@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_lends_its_weights_and_a_saved_head_is_kept(kind, tied, tmp_path):
    language_model = small_model(tie_word_embeddings=tied)
    language_model.save_pretrained(tmp_path / "language")
    own_class, auto_class, new = HEADS[kind]
    labels = {} if kind == "answer" else {"num_labels": LABELS}
    model, report = auto_class.from_pretrained(tmp_path / "language", output_loading_info=True, **labels)
    assert type(model) is own_class and report["missing_keys"] == new and not report["unexpected_keys"]
    ids = random_ids(2, LENGTH)
    torch.testing.assert_close(model.model(ids).last_hidden_state, language_model.model(ids).last_hidden_state)
    model.save_pretrained(tmp_path / "head")
    again, report = auto_class.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not (report["missing_keys"] | report["unexpected_keys"])
    torch.testing.assert_close(scores(again(ids)), scores(model(ids)), rtol=0, atol=0)
    assert scores(model(ids)).shape[-1] == (2 if kind == "answer" else LABELS)
    model.resize_token_embeddings(VOCAB + 3)
    assert model.model.lm_head.weight.shape[0] == VOCAB + 3 and model(ids + 3) is not None


@every_head
@pytest.mark.parametrize("side", ["left", "right", "scattered"])
def test_a_padded_row_is_judged_as_if_it_were_alone(kind, side):
    """Where the id of padding also ends every text, the mask alone tells which is which."""
    model = head(kind)
    ids, mask, lengths = padded(side)
    ids = ids.masked_fill(mask == 0, 2)
    for row in range(len(ids)):
        ids[row, int(mask[row].nonzero()[-1])] = 2
    answer = {"start_positions": mask.argmax(1), "end_positions": mask.argmax(1)} if kind == "answer" else {}
    together = model(ids, attention_mask=mask, **answer)
    losses = []
    for row, real in enumerate(mask.bool()):
        answer = {name: torch.zeros(1, dtype=torch.long) for name in answer}
        alone = model(ids[None, row, real], **answer)
        own = scores(together)[row] if kind == "sequence" else scores(together)[row, real]
        torch.testing.assert_close(own, scores(alone)[0], rtol=1e-9, atol=1e-9)
        losses.append(alone.loss)
    assert lengths == mask.sum(1).tolist()
    if kind == "answer":  # what stands in padding has no share in the probabilities
        torch.testing.assert_close(together.loss, torch.stack(losses).mean(), rtol=1e-9, atol=1e-9)


@every_head
def test_reading_on_from_a_cache_is_reading_at_once(kind):
    model, ids = head(kind), random_ids(2, LENGTH)
    ids[0, :4] = 2
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    whole = scores(model(ids, attention_mask=mask))
    cache, parts = TTTE2ECache(model.config), []
    for start, end in ((0, BATCH + 1), (BATCH + 1, LENGTH)):
        parts.append(scores(model(ids[:, start:end], attention_mask=mask[:, :end], cache=cache)))
    assert cache.columns == LENGTH and cache.has_learned
    found = parts[-1] if kind == "sequence" else torch.cat(parts, dim=1)
    real = torch.ones(2, dtype=torch.bool) if kind == "sequence" else mask.bool()
    torch.testing.assert_close(found[real], whole[real], rtol=1e-9, atol=1e-9)


@every_head
@pytest.mark.parametrize("name", ["past_key_values", "cache_params"])
def test_earlier_names_of_the_cache(kind, name):
    model, ids = head(kind), random_ids(1, LENGTH)
    caches = [TTTE2ECache(model.config) for _ in range(2)]
    expected = scores(model(ids, cache=caches[0]))
    with pytest.warns(FutureWarning, match=f"`{name}` is deprecated"):
        found = scores(model(ids, **{name: caches[1]}))
    assert torch.equal(found, expected) and caches[1].columns == LENGTH


def test_the_learned_context_is_returned_as_by_the_base_model():
    model, ids = head("sequence"), random_ids(1, LENGTH)
    assert model(ids).cache.columns == LENGTH and model(ids, use_cache=False).cache is None
    assert model(ids, labels=torch.tensor([1])).cache is None
    assert model(ids, labels=torch.tensor([1]), use_cache=True).cache.columns == LENGTH
    plain = model(ids, test_time_training=False, output_hidden_states=True, output_attentions=True)
    assert len(plain.hidden_states) == 5 and len(plain.attentions) == 4 and not plain.cache.has_learned
    assert not torch.allclose(plain.logits, model(ids).logits)
    assert isinstance(model(ids, return_dict=False), tuple)


PROBLEMS = {
    "regression": (1, torch.tensor([0.5, -2.0, 1.0])),
    "regression of several": (LABELS, torch.tensor([[0.5, -2.0, 1.0], [0.0, 0.1, 3.0], [1.0, 1.0, 1.5]])),
    "single_label_classification": (LABELS, torch.tensor([2, 0, 1])),
    "multi_label_classification": (LABELS, torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]])),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_problem_types_are_those_of_transformers(problem):
    """Inferred where the configuration names none, with transformers' loss, and the same over parts of a batch."""
    number, labels = PROBLEMS[problem]
    named = "regression" if problem == "regression of several" else None
    model = head("sequence", num_labels=number, problem_type=named)
    ids = random_ids(3, LENGTH)
    outputs = model(ids, labels=labels)
    assert model.config.problem_type == problem.removesuffix(" of several")
    stock = LOSS_MAPPING["ForSequenceClassification"]
    expected = labels if labels.dtype == torch.long else labels.double()
    torch.testing.assert_close(outputs.loss, stock(expected, outputs.logits, model.config), rtol=1e-9, atol=0)
    items = labels.numel()
    parts = [
        model(ids[rows], labels=labels[rows], num_items_in_batch=torch.tensor(items)).loss for rows in ([0], [1, 2])
    ]
    torch.testing.assert_close(sum(parts), outputs.loss, rtol=1e-9, atol=0)


def test_what_has_no_label_has_no_share_in_the_loss():
    ids = random_ids(2, LENGTH)
    sequence, token, answer = (head(kind) for kind in HEADS)
    labels = torch.tensor([1, -100])
    torch.testing.assert_close(sequence(ids, labels=labels).loss, sequence(ids[:1], labels=labels[:1]).loss)
    assert sequence(ids, labels=torch.full_like(labels, -100)).loss == 0
    labels = targets("token")["labels"].clone()
    labels[:, 5:] = -100
    logits = token(ids).logits
    torch.testing.assert_close(
        token(ids, labels=labels).loss, F.cross_entropy(logits[:, :5].reshape(-1, LABELS), labels[:, :5].reshape(-1))
    )
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0  # labels of padding count as none
    torch.testing.assert_close(
        token(ids, attention_mask=mask, labels=targets("token")["labels"]).loss, token(ids, labels=labels).loss
    )
    assert token(ids, labels=torch.full_like(labels, -100)).loss == 0
    whole = answer(ids, **targets("answer"))
    expected = LOSS_MAPPING["ForQuestionAnswering"](whole.start_logits, whole.end_logits, *targets("answer").values())
    torch.testing.assert_close(whole.loss, expected)
    outside = {name: torch.tensor([int(columns[0]), LENGTH + 9]) for name, columns in targets("answer").items()}
    one = {name: columns[:1] for name, columns in targets("answer").items()}
    torch.testing.assert_close(answer(ids, **outside).loss, answer(ids[:1], **one).loss)


@every_head
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_pass_through_the_inner_loop(kind, checkpointing):
    """The slope of the loss along a random direction; a gradient of first order misses it."""
    model, ids = head(kind, classifier_dropout=0.0).train(), random_ids(2, LENGTH)
    if checkpointing:
        model.activation_checkpointing_enable()

    def loss():
        return model(ids, **targets(kind)).loss

    found = {}
    for order in ("second_order", "first_order"):
        model.config.meta_gradient = order
        model.zero_grad()
        loss().backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())
        found[order] = [parameter.grad.clone() for parameter in model.parameters()]
    generator, step, values = torch.Generator().manual_seed(0), 1e-6, []
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, move in zip(model.parameters(), direction, strict=True):
                parameter += sign * step * move
            values.append(loss().item())
    slope = (values[0] - values[1]) / (2 * step)
    along = {
        order: sum((gradient * move).sum().item() for gradient, move in zip(gradients, direction, strict=True))
        for order, gradients in found.items()
    }
    assert along["second_order"] == pytest.approx(slope, rel=1e-5)
    assert abs(along["first_order"] - slope) > 1e-4 * abs(slope)


@every_head
def test_peft_trains_a_head_beside_its_adapters(kind):
    task = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS", "answer": "QUESTION_ANS"}[kind]
    targets_of_lora = ["q_proj", "up_proj", "down_proj"]
    model = get_peft_model(head(kind), LoraConfig(task_type=task, r=2, target_modules=targets_of_lora)).double()
    model(input_ids=random_ids(2, LENGTH), **targets(kind)).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any("modules_to_save" in name for name in trained) and any("prime_mlp" in name for name in trained)


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_pipelines_use_the_heads(task, caplog):
    tokenizer = byte_level_tokenizer()
    kind = "sequence" if task == "text-classification" else "token"
    model = head(kind, torch.float32, vocab_size=len(tokenizer))
    judge = pipeline(task, model=model, tokenizer=tokenizer)
    alone = [judge(text) for text in SENTENCES[:2]]
    assert alone and "is not supported" not in caplog.text
    if kind == "sequence":
        tokenizer.padding_side = "left"
        together = judge(list(SENTENCES[:2]), batch_size=2)
        assert [row["score"] for row in together] == pytest.approx([row["score"] for (row,) in alone], abs=1e-5)


IDS = random_ids(2, LENGTH)
PADDED = torch.cat([torch.zeros(2, 3), torch.ones(2, LENGTH - 3)], dim=1).long()
REFUSED = {
    "no input": ("sequence", {"input_ids": None}, ValueError, "`input_ids` and `inputs_embeds` are both None"),
    "a row of padding": (
        "sequence",
        {"attention_mask": torch.stack([torch.ones(LENGTH), torch.zeros(LENGTH)]).long()},
        ValueError,
        "`attention_mask`",
    ),
    "label outside": (
        "sequence",
        {"labels": torch.tensor([0, LABELS])},
        ValueError,
        r"`labels` holds 3.*\(0..2\).*num_labels",
    ),
    "labels of tokens": (
        "sequence",
        {"labels": IDS % LABELS},
        ValueError,
        r"`labels` must be integers of shape \(2,\)",
    ),
    "labels of another shape": (
        "sequence",
        {"labels": torch.rand(2, 2)},
        ValueError,
        r"`labels` has shape \(2, 2\).*\(2, 3\)",
    ),
    "token label outside": ("token", {"labels": IDS}, ValueError, "`labels` holds"),
    "numbers for tokens": ("token", {"labels": IDS / 7}, ValueError, "`labels` must be integers"),
    "half an answer": ("answer", {"start_positions": torch.tensor([1, 2])}, ValueError, "`end_positions` is None"),
    "negative position": (
        "answer",
        {"start_positions": torch.tensor([1, -1]), "end_positions": torch.tensor([1, 2])},
        ValueError,
        "`start_positions` must be 2 positions",
    ),
    "answer in padding": (
        "answer",
        {"start_positions": torch.tensor([3, 2]), "end_positions": torch.tensor([4, 5]), "attention_mask": PADDED},
        ValueError,
        "`start_positions` of row 1 is 2, padding",
    ),
    "unknown": ("token", {"tokens": IDS}, TypeError, r"does not know the arguments \['tokens'\]"),
    "labels of a language model": ("answer", {"labels": IDS}, TypeError, r"does not know the arguments \['labels'\]"),
    "shifted labels": ("sequence", {"shift_labels": IDS}, TypeError, r"does not know .*\['shift_labels'\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_head_cannot_use_is_refused_by_name(case):
    kind, arguments, error, message = REFUSED[case]
    cache = TTTE2ECache(small_config())
    with pytest.raises(error, match=message):
        head(kind)(**{"input_ids": IDS, "cache": cache} | arguments)
    assert not cache.is_initialized


def test_an_unknown_problem_type_is_refused():
    with pytest.raises(ValueError, match="problem_type"):
        head("sequence", problem_type="ranking")(IDS, labels=torch.tensor([0, 1]))
