"""A warm-started model computes what its source computes, until it takes a step; and it can take steps."""

import copy

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

from ttt_e2e.conversion.transformer_layout import (
    WarmStartSettings,
    config_from_transformer,
    plan_tensors,
    warm_started_model,
)

from ..modeling.helpers import BATCH, VOCAB, random_ids
from .pretrained import LINEAR, LLAMA3, SETTINGS, SIZES, SOURCES, THETA, YARN, assert_same, random_source

LENGTH = 5 * BATCH + 3


@pytest.fixture(params=SOURCES.values(), ids=SOURCES.keys())
def source(request):
    return random_source(*request.param)


@torch.no_grad()
def test_logits_are_the_sources_until_a_step_is_taken(source):
    model = warm_started_model(source, SETTINGS)
    ids = random_ids(2, LENGTH)
    theirs = source(ids).logits
    assert_same(model(ids, test_time_training=False).logits, theirs)
    learned = model(ids, test_time_training=True).logits
    # The weights of the first step serve from the second mini-batch on.
    assert_same(learned[:, :BATCH], theirs[:, :BATCH])
    assert (learned - theirs)[:, BATCH:].abs().max() > 1e-3 * theirs.abs().max()
    model.config.inner_learning_rate = 0.0
    assert_same(model(ids, test_time_training=True).logits, theirs)


def test_greedy_generation_is_the_sources(source):
    model = warm_started_model(source, SETTINGS)
    ids = random_ids(1, 11)
    arguments = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}
    expected = source.generate(ids, **arguments)
    assert model.generate(ids, learn_from="none", **arguments).tolist() == expected.tolist()


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(side):
    source = random_source(*SOURCES["qwen2"])
    model = warm_started_model(source, SETTINGS)
    ids, mask = random_ids(1, 20), torch.ones(1, 20, dtype=torch.long)
    padding = torch.zeros(1, 5, dtype=torch.long)
    parts = [(padding, padding), (ids, mask)] if side == "left" else [(ids, mask), (padding, padding)]
    padded, padded_mask = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
    logits = model(padded, attention_mask=padded_mask, test_time_training=False).logits
    assert_same(logits[padded_mask.bool()][None], source(ids).logits)


@torch.no_grad()
def test_a_narrow_source_is_the_same_beyond_its_window():
    source = random_source(MistralConfig, {"sliding_window": 9})
    model = warm_started_model(source, WarmStartSettings(num_suffix_layers=1, mini_batch_size=4))
    assert model.config.sliding_window == 9
    ids = random_ids(2, LENGTH)
    assert_same(model(ids, test_time_training=False).logits, source(ids).logits)


@torch.no_grad()
def test_a_narrower_window_changes_only_what_lies_beyond_it():
    source = random_source(LlamaConfig, {})
    model = warm_started_model(source, WarmStartSettings(sliding_window=16, mini_batch_size=8))
    ids = random_ids(1, LENGTH)
    ours, theirs = model(ids, test_time_training=False).logits, source(ids).logits
    assert_same(ours[:, :16], theirs[:, :16])
    assert (ours - theirs)[:, 16:].abs().max() > 1e-3 * theirs.abs().max()


@torch.no_grad()
def test_a_window_and_sinks_that_hold_the_text_change_nothing():
    """Sources that see everything get four sinks unless told otherwise; those that slide get none."""
    source = random_source(LlamaConfig, {})
    model = warm_started_model(source, WarmStartSettings(sliding_window=16, mini_batch_size=8))
    assert model.config.num_sink_tokens == 4
    ids = random_ids(1, 16 + 4)
    theirs = source(ids).logits
    assert_same(model(ids, test_time_training=False).logits, theirs)
    other = warm_started_model(source, WarmStartSettings(sliding_window=16, mini_batch_size=8, num_sink_tokens=0))
    assert (other(ids, test_time_training=False).logits - theirs)[:, 16:].abs().max() > 1e-3 * theirs.abs().max()
    sliding = random_source(MistralConfig, {"sliding_window": 9})
    assert warm_started_model(sliding, WarmStartSettings(mini_batch_size=4)).config.num_sink_tokens == 0
    with pytest.raises(ValueError, match="`num_sink_tokens` is 17; it must lie between"):
        warm_started_model(source, WarmStartSettings(sliding_window=16, mini_batch_size=8, num_sink_tokens=17))


@torch.no_grad()
def test_blocks_that_keep_full_attention_see_what_those_of_the_source_see():
    """A source that is such a hybrid already is the same at any length; of others every second block slides."""
    kinds = ["sliding_attention", "full_attention"] * 2
    mixed = random_source(Qwen2Config, {"use_sliding_window": True, "sliding_window": 16, "layer_types": kinds})
    settings = WarmStartSettings(16, mini_batch_size=8, num_sink_tokens=0, full_attention_every=2)
    ids = random_ids(2, LENGTH)
    model = warm_started_model(mixed, settings)
    assert_same(model(ids, test_time_training=False).logits, mixed(ids).logits)
    assert warm_started_model(random_source(LlamaConfig, {}), settings).config.layer_types == kinds
    named = WarmStartSettings(16, mini_batch_size=8, num_sink_tokens=0, full_attention_layers=[3, 1])
    assert warm_started_model(random_source(LlamaConfig, {}), named).config.layer_types == kinds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({"full_attention_every": every}, f"`full_attention_every`={every}: must be between 2 and 4, the blocks")
            for every in (0, 1, 5)
        ),
        ({"full_attention_layers": [1, 4]}, r"`full_attention_layers`=\[1, 4\]: must be some of .* 0 to 3"),
        ({"full_attention_layers": [-1]}, r"`full_attention_layers`=\[-1\]: must be some of .* 0 to 3"),
        ({"full_attention_layers": range(4)}, r"`full_attention_layers`=\[0, 1, 2, 3\]: .* not all of them"),
        ({"full_attention_layers": [1], "full_attention_every": 2}, "give one or the other"),
    ],
)
def test_a_hybrid_has_blocks_of_both_kinds(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_transformer(LlamaConfig(**SIZES), WarmStartSettings(16, 1, 8, **changes))


@torch.no_grad()
def test_full_attention_can_be_stretched_while_windows_stay_as_they_are():
    """The first block of such a hybrid is that of the source, or of the source with YaRN in all layers."""
    ids = random_ids(2, LENGTH)
    plain = random_source(LlamaConfig, {"max_position_embeddings": 16, "rope_parameters": dict(THETA)})
    for kept in (0, 1):
        settings = {"sliding_window": LENGTH, "mini_batch_size": 8, "num_suffix_layers": 1, "full_attention_yarn": 4}
        model = warm_started_model(plain, WarmStartSettings(**settings, full_attention_layers=[kept]))
        assert model.config.max_position_embeddings == 64
        source = copy.deepcopy(plain)
        if kept == 0:
            source.config.rope_parameters = dict(YARN)
            source.model.rotary_emb = type(plain.model.rotary_emb)(source.config)
        ours, theirs = (
            own(ids, output_hidden_states=True, **extra).hidden_states
            for own, extra in ((model, {"test_time_training": False}), (source, {}))
        )
        assert_same(ours[1], theirs[1])
        assert (ours[2] - theirs[2]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("fields", "changes", "message"),
    [
        ({}, {"full_attention_yarn": 4.0}, "none keeps it: choose some with `full_attention_every`"),
        ({}, {"full_attention_yarn": 1.0, "full_attention_layers": [1]}, "must be greater than 1"),
        ({}, {"full_attention_yarn": float("nan"), "full_attention_layers": [1]}, "must be greater than 1"),
        (
            {"rope_parameters": dict(LINEAR)},
            {"full_attention_yarn": 2.0, "full_attention_layers": [1]},
            "scaled already \\(rope_type 'linear'\\)",
        ),
    ],
)
def test_what_cannot_be_stretched_is_refused(fields, changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_transformer(LlamaConfig(**SIZES | fields), WarmStartSettings(16, 1, 8, **changes))


@pytest.mark.parametrize("changes", [{"full_attention_every": 2}, {"full_attention_layers": [1]}])
def test_layers_that_never_saw_the_whole_text_cannot_begin_to(changes):
    source = MistralConfig(**SIZES, sliding_window=16)
    with pytest.raises(ValueError, match="no layer of the source sees its whole text"):
        config_from_transformer(source, WarmStartSettings(16, 1, 8, **changes))


@torch.no_grad()
def test_without_prime_mlps_the_ordinary_ones_learn():
    source = random_source(*SOURCES["llama"])
    model = warm_started_model(source, WarmStartSettings(64, 2, BATCH, use_prime_mlp=False))
    assert model.num_parameters() == source.num_parameters()
    ids = random_ids(1, LENGTH)
    theirs = source(ids).logits
    assert_same(model(ids, test_time_training=False).logits, theirs)
    assert (model(ids).logits - theirs).abs().max() > 1e-3


def test_inner_and_outer_gradients_start_at_the_down_projection():
    model = warm_started_model(random_source(*SOURCES["llama"]), SETTINGS).train()
    ids = random_ids(2, LENGTH)
    prime = model.model.layers[-1].prime_mlp
    model.config.inner_learning_rate = 0.0
    model(ids, labels=ids).loss.backward()
    assert prime.down_proj.weight.grad.norm() > 1e-4
    assert prime.gate_proj.weight.grad.norm() == prime.up_proj.weight.grad.norm() == 0
    model.zero_grad()
    model.config.inner_learning_rate = 0.5
    output = model(ids, labels=ids)
    output.loss.backward()
    # The first inner step moves down_proj, after which the others matter.
    assert all(projection.weight.grad.norm() > 1e-5 for projection in prime.projections)
    assert (output.inner_grad_norm > 1e-4).all()


def test_training_takes_the_prime_mlps_along():
    model = warm_started_model(random_source(*SOURCES["qwen3"]), SETTINGS).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "prime" in name}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = random_ids(2, LENGTH)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all((p - before[name]).abs().max() > 0 for name, p in model.named_parameters() if name in before)


def test_new_weights_depend_on_the_seed_only():
    source = random_source(*SOURCES["llama"])
    one, same, other = (warm_started_model(source, SETTINGS, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed == {f"model.layers.{n}.prime_mlp.{kind}_proj.weight" for n in (2, 3) for kind in ("gate", "up")}
    gates = [one[f"model.layers.{n}.prime_mlp.gate_proj.weight"] for n in (2, 3)]
    assert not torch.equal(*gates) and abs(gates[0].std().item() - 32**-0.5) < 0.02


@torch.no_grad()
def test_a_bfloat16_source_keeps_its_bits_and_exact_angles():
    source = random_source(*SOURCES["qwen2"]).to(torch.bfloat16)
    model = warm_started_model(source, SETTINGS)
    assert model.dtype == torch.bfloat16 and model.model.rotary_emb["sliding_attention"].inv_freq.dtype == torch.float32
    assert torch.equal(model.model.layers[3].mlp.up_proj.weight, source.model.layers[3].mlp.up_proj.weight)
    wide = warm_started_model(random_source(*SOURCES["qwen2"]).to(torch.bfloat16).float(), SETTINGS)
    ids = random_ids(1, LENGTH)
    exact = wide(ids, test_time_training=False).logits
    assert (model(ids, test_time_training=False).logits - exact).abs().max() < 0.05 * exact.abs().max()


@torch.no_grad()
def test_a_tied_source_with_a_head_of_its_own_keeps_it():
    source = random_source(*SOURCES["llama, tied"])
    source.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, 32))
    model = warm_started_model(source, SETTINGS)
    assert not model.config.tie_word_embeddings
    ids = random_ids(1, LENGTH)
    assert_same(model(ids, test_time_training=False).logits, source(ids).logits)


def test_settings_of_the_source_are_carried_over():
    source = LlamaConfig(**(SIZES | {"eos_token_id": [2, 5], "rope_parameters": LLAMA3, "tie_word_embeddings": True}))
    config = config_from_transformer(source, SETTINGS)
    for name in SIZES.keys() - {"eos_token_id"}:
        assert getattr(config, name) == SIZES[name]
    assert config.eos_token_id == [2, 5] and config.tie_word_embeddings
    assert config.rope_parameters == LLAMA3
    assert (config.num_suffix_layers, config.prime_intermediate_size) == (2, 24)
    assert not config.post_norm and config.test_time_training


def test_defaults_fit_the_source():
    config = config_from_transformer(LlamaConfig(**SIZES), WarmStartSettings(sliding_window=32))
    assert (config.num_suffix_layers, config.mini_batch_size, config.prime_intermediate_size) == (1, 32, 48)
    config = config_from_transformer(LlamaConfig(**SIZES), WarmStartSettings(sliding_window=4096))
    assert config.mini_batch_size == 1024


def test_a_window_of_the_source_is_never_widened():
    halves = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=16, max_window_layers=2)
    assert config_from_transformer(halves, WarmStartSettings(sliding_window=16)).sliding_window == 16
    for source in (halves, MistralConfig(**SIZES, sliding_window=16)):
        with pytest.raises(ValueError, match="`sliding_window`=17 is wider than the source's own"):
            config_from_transformer(source, WarmStartSettings(sliding_window=17))
    for source in (halves, LlamaConfig(**SIZES)):
        with pytest.raises(ValueError, match=r"`sliding_window` is missing.*--window 8192"):
            config_from_transformer(source, WarmStartSettings())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_suffix_layers": 0}, "`num_suffix_layers`=0: must be between 1 and 4"),
        ({"num_suffix_layers": 5}, "`num_suffix_layers`=5: must be between 1 and 4"),
        ({"mini_batch_size": 33}, r"`mini_batch_size` \(33\) is larger than `sliding_window` \(32\)"),
        ({"mini_batch_size": 0}, "`mini_batch_size` must be at least 1"),
        ({"sliding_window": 0}, "`sliding_window`=0: must be at least 1"),
        ({"prime_intermediate_size": 0}, "`prime_intermediate_size` must be at least 1"),
        ({"prime_intermediate_size": 8, "use_prime_mlp": False}, "give one or the other"),
        ({"inner_learning_rate": -1.0}, "`inner_learning_rate` must be finite and not negative"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config_from_transformer(LlamaConfig(**SIZES), WarmStartSettings(**({"sliding_window": 32} | settings)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (GPT2Config(), "model_type='gpt2' cannot be converted; supported are llama, mistral, qwen2, qwen3"),
        (LlamaConfig(**SIZES, mlp_bias=True), "`mlp_bias` is True"),
        (
            LlamaConfig(**SIZES, rope_parameters=THETA | {"rope_type": "dynamic", "factor": 2.0}),
            "rope_type 'dynamic', whose frequencies change",
        ),
        (
            LlamaConfig(**SIZES, rope_parameters=LINEAR | {"partial_rotary_factor": 0.5}),
            "partial_rotary_factor 0.5",
        ),
        (LlamaConfig(**SIZES, quantization_config={"quant_method": "gptq"}), r"quantised \(gptq\)"),
    ],
    ids=["architecture", "mlp bias", "dynamic rope", "partial rope", "quantised"],
)
def test_sources_that_cannot_be_converted_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        config_from_transformer(source, SETTINGS)


def test_tensors_that_do_not_fit_are_named():
    config = config_from_transformer(LlamaConfig(**SIZES), SETTINGS)
    names = {name: tuple(t.shape) for name, t in random_source(*SOURCES["llama"]).state_dict().items()}
    old = names | {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}
    assert len(plan_tensors(config, "llama", old)) == len(names) + 2 * 4
    with pytest.raises(ValueError, match=r"lacks lm_head.weight"):
        plan_tensors(config, "llama", {name: shape for name, shape in names.items() if name != "lm_head.weight"})
    with pytest.raises(ValueError, match=r"holds model.extra, which a llama model does not have"):
        plan_tensors(config, "llama", names | {"model.extra": (1,)})
    with pytest.raises(ValueError, match=r"`model.norm.weight` has shape \(31,\)"):
        plan_tensors(config, "llama", names | {"model.norm.weight": (31,)})
