"""Bad input is refused before any work, by an error that names the argument and the value, and nothing is changed."""

import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import DynamicCache, StaticCache, Trainer, TrainingArguments

from ttt_e2e import TTTE2ECache, TTTE2EConfig, TTTE2EForCausalLM

from .helpers import BATCH, VOCAB, WINDOW, random_ids, small_config, small_model

LENGTH = 2 * BATCH + 3


# ------------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mini_batch_size": 17}, r"`mini_batch_size` \(17\).*`sliding_window` \(16\)"),
        ({"num_suffix_layers": 5}, r"`num_suffix_layers`.*\(4\).*got 5"),
        ({"num_suffix_layers": -1}, r"`num_suffix_layers`.*got -1"),
        ({"num_suffix_layers": 0}, r"`num_suffix_layers` is 0"),
        ({"mini_batch_size": 0}, r"`mini_batch_size`.*got 0"),
        ({"vocab_size": 0}, r"`vocab_size`.*got 0"),
        ({"prime_intermediate_size": -3}, r"`prime_intermediate_size`.*got -3"),
        ({"sliding_window": 0}, r"`sliding_window`.*got 0"),
        ({"sliding_window": None}, r"`sliding_window` is None.*`layer_types`"),
        ({"layer_types": ["chunked_attention"] * 4}, r"`layer_types` has \['chunked_attention'\]"),
        ({"layer_types": ["sliding_attention"] * 3}, r"`layer_types` has 3.*`num_hidden_layers` is 4"),
        ({"num_key_value_heads": 3}, r"`num_attention_heads` \(4\).*`num_key_value_heads` \(3\)"),
        ({"head_dim": 7}, r"`head_dim`.*got 7"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, r"rope_type 'dynamic'"),
        ({"meta_gradient": "third_order"}, r"`meta_gradient`.*'third_order'"),
        ({"meta_gradient_horizon": 0}, r"`meta_gradient_horizon`.*got 0"),
        ({"inner_checkpoint_every": 0}, r"`inner_checkpoint_every`.*got 0"),
        ({"inner_learning_rate": -0.5}, r"`inner_learning_rate`.*got -0.5"),
        ({"inner_learning_rate": float("nan")}, r"`inner_learning_rate`.*got nan"),
        ({"inner_max_grad_norm": float("inf")}, r"`inner_max_grad_norm`.*got inf"),
    ],
    ids=lambda value: ", ".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_a_configuration_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [("hidden_size", "32"), ("mini_batch_size", 8.0), ("use_prime_mlp", "yes"), ("num_suffix_layers", 1.5)],
)
def test_a_setting_of_another_type_is_refused(name, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=name):
        small_config(**{name: value})


def test_settings_that_only_learning_forbids_are_valid_without_it():
    plain = {"test_time_training": False}
    assert small_config(num_suffix_layers=0, **plain).num_prefix_layers == 4
    assert small_config(mini_batch_size=WINDOW + 1, **plain).mini_batch_size == WINDOW + 1
    full = small_config(mini_batch_size=WINDOW + 1, layer_types=["sliding_attention"] * 2 + ["full_attention"] * 2)
    assert full.test_time_training, "a mini-batch larger than the window is forgotten only by sliding suffix blocks"
    assert small_config(mini_batch_size=WINDOW).mini_batch_size == WINDOW
    assert small_config(inner_max_grad_norm=None).inner_max_grad_norm is None


def test_a_configuration_that_was_changed_is_checked_again_when_a_model_is_made_of_it():
    config = small_config()
    config.mini_batch_size = WINDOW + 1
    with pytest.raises(ValueError, match=rf"`mini_batch_size` \({WINDOW + 1}\)"):
        TTTE2EForCausalLM(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"num_suffix_layers": 0}, "num_suffix_layers"), ({"mini_batch_size": WINDOW + 1}, "mini_batch_size")],
)
def test_learning_is_refused_by_a_model_that_cannot(changes, message):
    model = small_model(test_time_training=False, **changes)
    ids = random_ids(1, LENGTH)
    assert model(ids).logits.isfinite().all()
    with pytest.raises(ValueError, match=message):
        model(ids, test_time_training=True)


# ------------------------------------------------------------------------------------------------------ forward

IDS = random_ids(2, LENGTH)
RESTARTING = torch.cat([torch.arange(7), torch.arange(LENGTH - 7)]).expand(2, -1)


def with_value(row: int, column: int, value: int) -> torch.Tensor:
    ids = IDS.clone()
    ids[row, column] = value
    return ids


FORWARD = {
    "id too large": ({"input_ids": with_value(1, 3, VOCAB)}, rf"`input_ids`.*{VOCAB}.*vocabulary"),
    "negative id": ({"input_ids": with_value(1, 3, -1)}, r"`input_ids`.*-1.*vocabulary"),
    "label as id": ({"input_ids": with_value(0, 0, -100)}, r"`input_ids`.*-100.*vocabulary"),
    "no token": ({"input_ids": IDS[:, :0]}, r"`input_ids` is empty.*\(2, 0\)"),
    "no row": ({"input_ids": IDS[:0]}, rf"`input_ids` is empty.*\(0, {LENGTH}\)"),
    "one dimension": ({"input_ids": IDS[0]}, rf"`input_ids`.*\({LENGTH},\)"),
    "floating ids": ({"input_ids": IDS.float()}, r"`input_ids`.*float32"),
    "nothing": ({}, r"`input_ids` and `inputs_embeds`"),
    "embeddings to learn from": ({"inputs_embeds": torch.zeros(2, LENGTH, 32)}, r"`inputs_embeds`.*`input_ids`"),
    "empty embeddings": ({"inputs_embeds": torch.zeros(2, 0, 32)}, r"`inputs_embeds`.*\(2, 0, 32\)"),
    "embeddings of other tokens": (
        {"input_ids": IDS, "inputs_embeds": torch.zeros(2, LENGTH + 1, 32)},
        rf"`inputs_embeds` \(2, {LENGTH + 1}, 32\).*`input_ids` \(2, {LENGTH}\)",
    ),
    "mask of another length": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, LENGTH - 1)},
        rf"`attention_mask`.*\(2, {LENGTH - 1}\)",
    ),
    "mask of four dimensions": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 1, LENGTH, LENGTH)},
        rf"`attention_mask`.*\(2, 1, {LENGTH}, {LENGTH}\)",
    ),
    "positions start again": (
        {"input_ids": IDS, "position_ids": RESTARTING},
        r"`position_ids` start again.*row 0, column 7: 0 after 6",
    ),
    "positions of another shape": (
        {"input_ids": IDS, "position_ids": RESTARTING[:, 1:]},
        rf"`position_ids`.*\(2, {LENGTH - 1}\)",
    ),
    "packed documents": ({"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 7])}, r"cu_seq_lens_q"),
    "labels of another length": ({"input_ids": IDS, "labels": IDS[:, 1:]}, rf"`labels`.*\(2, {LENGTH - 1}\)"),
    "label too large": ({"input_ids": IDS, "labels": with_value(0, 1, VOCAB)}, rf"`labels`.*{VOCAB}"),
    "negative label": ({"input_ids": IDS, "labels": with_value(0, 1, -1)}, r"`labels`.*-1"),
    "unknown argument": ({"input_ids": IDS, "learn_form": "prompt"}, r"learn_form"),
    "foreign cache": ({"input_ids": IDS, "cache": DynamicCache()}, r"`cache`.*DynamicCache"),
    "static cache": (
        {"input_ids": IDS, "cache": StaticCache(config=small_config(), max_cache_len=64)},
        r"`cache`.*StaticCache",
    ),
    "cache of the old kind": ({"input_ids": IDS, "cache": ((IDS, IDS),)}, r"`cache`.*tuple"),
}


@pytest.mark.parametrize(("arguments", "message"), FORWARD.values(), ids=FORWARD.keys())
def test_forward_names_what_it_refuses(arguments, message, monkeypatch):
    model = small_model()

    def work(*args, **kwargs):
        raise AssertionError("work was done before the check")

    monkeypatch.setattr(model.model.layers[0], "forward", work)
    with pytest.raises((ValueError, TypeError), match=message):
        model(**arguments)


def contents(cache: TTTE2ECache) -> list:
    """Everything in a cache: its counters and copies of its tensors."""
    context = cache.context
    tensors = [tensor for history in context.past_key_values for tensor in history.joined()] + [*context.fast.tensors]
    pending = context.pending
    tensors += [pending.inputs, pending.ids, pending.positions]
    counters = (context.tokens, context.next_positions, pending.counts, cache.columns, cache.finished)
    return [counters, *(tensor.clone() for tensor in tensors)]


def test_an_error_leaves_the_given_cache_as_it_was():
    model = small_model()
    cache = TTTE2ECache(model.config)
    with torch.no_grad():
        model(IDS, cache=cache)
    assert cache.has_learned
    before = contents(cache)
    later = torch.arange(LENGTH).expand(2, -1) + LENGTH
    refused = [
        *(arguments for arguments, _ in FORWARD.values() if "cache" not in arguments),
        {"input_ids": IDS[:1]},
        {"input_ids": IDS, "test_time_training": False},
        {"input_ids": IDS, "position_ids": later - 1},
        {"input_ids": IDS, "attention_mask": torch.ones(2, 2 * LENGTH + 1)},
    ]
    for arguments in refused:
        with pytest.raises((ValueError, TypeError)):
            model(cache=cache, **arguments)
        counters, *tensors = contents(cache)
        assert counters == before[0]
        assert all(torch.equal(now, then) for now, then in zip(tensors, before[1:], strict=True))
    assert model(IDS, cache=cache, position_ids=later).logits.isfinite().all()


def learned_cache(model) -> TTTE2ECache:
    cache = TTTE2ECache(model.config)
    with torch.no_grad():
        model(IDS, cache=cache)
    return cache


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": IDS[:1]}, r"`cache` holds 2 rows.*1"),
        ({"input_ids": IDS, "test_time_training": False}, r"`test_time_training=False`.*learned"),
        (
            {"input_ids": IDS[:, :1], "position_ids": torch.zeros(2, 1, dtype=torch.long)},
            rf"`position_ids` start again.*row 0, column 0: 0 after {LENGTH - 1}",
        ),
        (
            {"input_ids": IDS, "attention_mask": torch.ones(2, LENGTH + 1)},
            rf"`attention_mask`.*\(2, {LENGTH + 1}\).*\(2, {2 * LENGTH}\)",
        ),
        (
            {"input_ids": IDS, "attention_mask": (torch.arange(2 * LENGTH) == 3).long().expand(2, -1) * -2 + 1},
            r"`attention_mask` holds -1 \(row 0, column 3\)",
        ),
    ],
    ids=["rows", "plain", "positions", "mask", "values of the mask over earlier columns"],
)
def test_what_does_not_go_with_a_learned_context_is_named(arguments, message):
    model = small_model()
    with pytest.raises(ValueError, match=message):
        model(cache=learned_cache(model), **arguments)


@pytest.mark.parametrize("changes", [{"mini_batch_size": 4}, {"num_suffix_layers": 1}, {"sliding_window": 12}])
def test_a_context_of_another_configuration_is_refused(changes):
    cache = learned_cache(small_model())
    with pytest.raises(ValueError, match=r"`cache`.*another configuration"):
        small_model(**changes)(IDS, cache=cache)


def test_ids_are_checked_against_the_embeddings_that_are_there():
    model = small_model()
    model.resize_token_embeddings(VOCAB + 5)
    assert model(with_value(0, 0, VOCAB + 4)).logits.isfinite().all()
    with pytest.raises(ValueError, match=rf"`input_ids`.*{VOCAB + 5}"):
        model(with_value(0, 0, VOCAB + 5))


# ----------------------------------------------------------------------------------------------------- training


def test_reentrant_checkpointing_is_refused():
    model = small_model()
    with pytest.raises(ValueError, match="`use_reentrant=True`"):
        model.activation_checkpointing_enable({"use_reentrant": True})
    assert not model.model.gradient_checkpointing
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert model.model.gradient_checkpointing


def test_reentrant_checkpointing_is_refused_by_the_trainer(tmp_path):
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": True},
        max_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model=small_model(), args=arguments, train_dataset=[{"input_ids": IDS[0], "labels": IDS[0]}])
    with pytest.raises(ValueError, match="`use_reentrant=True`"):
        trainer.train()


def test_second_order_is_refused_where_a_weight_is_tensor_parallel():
    """Its communication has no second derivative: the gradient would silently be of first order."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    model, first_order = small_model().train(), small_model(meta_gradient="first_order")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        projection = model.model.layers[3].prime_mlp.up_proj
        projection.weight = torch.nn.Parameter(distribute_tensor(projection.weight.data, mesh))
        with pytest.raises(ValueError, match=r"meta_gradient='second_order'.*layers\.3\.prime_mlp\.up_proj\.weight"):
            model(IDS, labels=IDS)
    finally:
        torch.distributed.destroy_process_group()
    assert first_order(IDS, labels=IDS).loss.isfinite()


def test_a_refused_configuration_is_not_half_made():
    """`TTTE2EConfig` itself is checked, also when read from a file that someone edited."""
    fields = copy.deepcopy(small_config().to_dict())
    fields["num_suffix_layers"] = 9
    with pytest.raises(ValueError, match=r"`num_suffix_layers`.*got 9"):
        TTTE2EConfig.from_dict(fields)
