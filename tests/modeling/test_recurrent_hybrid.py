"""The recurrent baselines: every mix of mixers computes the same whichever way it is read, and trains."""

import logging

import pytest
import torch
from torch.nn.functional import cross_entropy

from ttt_e2e import RecurrentHybridConfig, RecurrentHybridForCausalLM

from .helpers import loss_and_gradients, random_ids
from .recurrent import (
    LENGTH,
    MIXES,
    SMALL,
    VOCAB,
    WINDOW,
    assert_initial_decays_and_steps,
    hybrid,
    hybrid_config,
    tolerance,
)

IDS = random_ids(3, LENGTH)
PADDING = 9


@pytest.fixture(scope="module", params=MIXES)
def mix(request):
    return request.param


@pytest.fixture(scope="module")
def model(mix):
    return hybrid(mix)


@pytest.fixture(scope="module")
def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def read(model, ids, sizes, mask=None):
    """Logits of a text that is read in pieces of the given sizes."""
    cache, logits, end = None, [], 0
    for piece in ids.split(sizes, dim=1):
        end += piece.shape[1]
        part = None if mask is None else mask[:, :end]
        with torch.no_grad():
            output = model(piece, attention_mask=part, cache=cache, use_cache=True)
        cache = output.cache
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def left_padded(ids=IDS):
    """Ids with padding on the left, and their mask; the padding holds ids of real words."""
    padding = random_ids(ids.shape[0], PADDING, seed=1)
    ids = torch.cat([padding, ids], dim=1)
    return ids, (torch.arange(ids.shape[1]) >= PADDING).long().expand_as(ids)


# ------------------------------------------------------------------------------------------------------- reading


def test_a_token_depends_on_all_before_it_and_on_none_after(model, logits, mix):
    changed = IDS.clone()
    changed[:, 2] = (changed[:, 2] + 1) % VOCAB
    with torch.no_grad():
        other = model(changed).logits
    torch.testing.assert_close(other[:, :2], logits[:, :2], **tolerance(mix))
    far = 2 + 2 * WINDOW  # no mix reaches this far by its sliding windows alone
    assert (other[:, far:] - logits[:, far:]).abs().max() > 1e-2


@pytest.mark.parametrize("sizes", [1, [7, 1, 13, 24], [40, 5]], ids=["tokens", "pieces", "long-first"])
def test_pieces_are_read_as_the_whole(model, logits, mix, sizes):
    torch.testing.assert_close(read(model, IDS, sizes), logits, **tolerance(mix))


def test_a_row_of_a_batch_is_the_row_alone(model, logits):
    with torch.no_grad():
        torch.testing.assert_close(model(IDS[1:2]).logits, logits[1:2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", [PADDING + LENGTH, 1, [4, 20, 30]], ids=["whole", "tokens", "pieces"])
def test_padding_on_the_left_changes_nothing(model, logits, mix, sizes):
    ids, mask = left_padded()
    torch.testing.assert_close(read(model, ids, sizes, mask)[:, PADDING:], logits, **tolerance(mix))


def test_padding_on_the_right_changes_nothing_before_it(model, logits, mix):
    mask = (torch.arange(LENGTH) < 30).long().expand_as(IDS)
    with torch.no_grad():
        padded = model(IDS, attention_mask=mask).logits
    torch.testing.assert_close(padded[:, :30], logits[:, :30], **tolerance(mix))


def test_logits_to_keep_and_hidden_states(model, logits, mix):
    with torch.no_grad():
        output = model(IDS, logits_to_keep=2, output_hidden_states=True, use_cache=False)
        embedded = model(inputs_embeds=model.get_input_embeddings()(IDS)).logits
    torch.testing.assert_close(output.logits, logits[:, -2:], rtol=0, atol=1e-12)
    torch.testing.assert_close(embedded, logits, rtol=0, atol=1e-12)
    assert output.cache is None
    assert [list(state.shape) for state in output.hidden_states] == [[3, LENGTH, 32]] * (len(MIXES[mix]) + 1)


def test_attention_weights_come_from_the_attention_blocks(mix):
    model = hybrid(mix, attn_implementation="eager")
    attentions = model(IDS, output_attentions=True).attentions
    blocks = sum(name == "linear_attention" for name in model.config.layer_types)
    assert [list(weights.shape) for weights in attentions] == [[3, 4, LENGTH, LENGTH]] * (len(MIXES[mix]) - blocks)


@pytest.mark.parametrize("sizes", [LENGTH + PADDING, 1, [4, 20, 30]], ids=["whole", "tokens", "pieces"])
def test_padding_anywhere_changes_nothing(mix, sizes):
    """Rows of unequal length with padding between their tokens; a window as wide as the columns, which it counts."""
    model = hybrid(mix, sliding_window=LENGTH + PADDING)
    generator = torch.Generator().manual_seed(1)
    ids, mask = random_ids(4, LENGTH + PADDING, seed=3), torch.zeros(4, LENGTH + PADDING, dtype=torch.long)
    for row, length in enumerate((LENGTH, LENGTH, LENGTH - 20, 2)):
        mask[row, torch.randperm(LENGTH + PADDING, generator=generator)[:length]] = 1
    logits = read(model, ids, sizes, mask)
    for row in range(4):
        real = mask[row].bool()
        with torch.no_grad():
            alone = model(ids[row, real][None]).logits[0]
        torch.testing.assert_close(logits[row, real], alone, **tolerance(mix))


@pytest.mark.parametrize("mix", ["mamba2", "everything"])
def test_padding_anywhere_changes_no_gradient(mix):
    """Rows alone give the same gradients."""
    model, ids = hybrid(mix, sliding_window=LENGTH).train(), IDS[:2]
    mask = torch.ones_like(ids)
    mask[0, 5:9], mask[1, :3], mask[1, 40:] = 0, 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 9] = labels[1, 3] = -100  # what padding would predict
    model.zero_grad()
    model(ids, attention_mask=mask, labels=labels, num_items_in_batch=100).loss.backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for row in range(2):
        real = mask[row].bool()
        model(ids[row, real][None], labels=labels[row, real][None], num_items_in_batch=100).loss.backward()
    alone = {name: p.grad for name, p in model.named_parameters()}
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_gets_a_gradient(mix, tied):
    model = hybrid(mix, torch.float32, tie_word_embeddings=tied, attention_bias=True).train()
    output = model(IDS, labels=IDS)
    assert output.cache is None, "a cache would only cost memory while training"
    output.loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_loss_is_the_mean_over_labelled_tokens(model, logits):
    labels = IDS.clone()
    labels[0, :30] = -100
    expected = cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1), reduction="sum")
    count = (labels[:, 1:] != -100).sum()
    with torch.no_grad():
        mean, scaled = model(IDS, labels=labels).loss, model(IDS, labels=labels, num_items_in_batch=count * 2).loss
    # Transformers' loss is float32.
    torch.testing.assert_close(mean.double(), expected / count, rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled.double(), expected / count / 2, rtol=1e-6, atol=0)


def test_loss_without_logits(model, logits, monkeypatch):
    monkeypatch.setattr("ttt_e2e.causal_lm_loss.LOSS_SEGMENT", 20)
    labels = IDS.clone()
    labels[0, :30] = -100
    expected = cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")
    count = (labels[:, 1:] != -100).sum()
    with torch.no_grad():
        output = model(IDS, labels=labels, skip_logits=True)
        scaled = model(IDS, labels=labels, skip_logits=True, num_items_in_batch=2 * count).loss
        shifted = model(IDS[:, :-1], shift_labels=labels[:, 1:], skip_logits=True).token_nll
        nothing = model(IDS[:, :1], labels=IDS[:, :1], skip_logits=True)
    assert output.logits is None
    torch.testing.assert_close(output.token_nll, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(output.loss, expected.sum() / count)
    torch.testing.assert_close(scaled, expected.sum() / count / 2)
    torch.testing.assert_close(shifted, expected, rtol=0, atol=1e-4)
    assert (nothing.loss, list(nothing.token_nll.shape)) == (0.0, [3, 0])


@pytest.mark.parametrize("skip_logits", [False, True])
def test_activation_checkpointing_changes_no_gradient(mix, skip_logits):
    model = hybrid(mix).train()
    loss, expected = loss_and_gradients(model, IDS, skip_logits=skip_logits)
    calls = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    model.activation_checkpointing_enable()
    again, gradients = loss_and_gradients(model, IDS, skip_logits=skip_logits)
    assert len(calls) == 2, "the block is computed once more in the backward pass"
    assert again == loss
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-12)


def test_bfloat16_autocast(mix):
    model = hybrid(mix, torch.float32).train()
    expected, exact = loss_and_gradients(model, IDS)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(model, IDS)
        written = model.eval().generate(IDS, max_new_tokens=3, do_sample=False)
    assert loss == pytest.approx(expected.item(), rel=0.02)
    assert gradients.keys() == exact.keys() and all(g.isfinite().all() for g in gradients.values())
    assert written.shape == (3, LENGTH + 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision(mix, dtype):
    model = hybrid(mix, dtype)
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (3, LENGTH + 3)
    with torch.no_grad():
        assert model(IDS, labels=IDS).loss == pytest.approx(hybrid(mix)(IDS, labels=IDS).loss.item(), rel=0.03)


def test_fallbacks_are_named_at_most_once(caplog):
    """Without the fused kernels transformers computes in plain PyTorch, which the user must know, but once will do."""
    root = logging.getLogger("transformers")
    root.addHandler(caplog.handler)
    try:
        for _ in range(2):
            hybrid("everything", torch.float32).train()(IDS)
    finally:
        root.removeHandler(caplog.handler)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(set(messages))


# ------------------------------------------------------------------------------------------------ initial weights


def test_initial_decays_and_time_steps(mix):
    """Of a model that is built directly, and of one that `from_pretrained` builds on the meta device."""
    assert_initial_decays_and_steps(hybrid(mix, torch.float32))
    loaded = RecurrentHybridForCausalLM.from_pretrained(None, config=hybrid_config(mix), state_dict={})
    assert_initial_decays_and_steps(loaded)


# -------------------------------------------------------------------------------------------- settings and refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer_types": ["mamba"] * 3}, r"`mixer_types` has \['mamba'\]; the known types are .*'mamba2'"),
        ({"mixer_types": ["mamba2"] * 3}, r"`mixer_types` has no attention block.*sliding_attention"),
        ({"mixer_types": ["full_attention"]}, r"`mixer_types` has 1 entries, but `num_hidden_layers` is 3"),
        ({"layer_types": ["full_attention"] * 3}, r"`layer_types` follows from `mixer_types`"),
        ({"sliding_window": None}, r"`sliding_window` is None"),
        ({"sliding_window": 0}, r"`sliding_window` must be at least 1, or None, got 0"),
        ({"mamba_state_size": 0}, r"`mamba_state_size` must be at least 1, got 0"),
        ({"mamba_head_dim": 24}, r"`mamba_head_dim` \(24\) must divide `mamba_expand \* hidden_size` \(64\)"),
        ({"mamba_num_groups": 3}, r"`mamba_num_groups` \(3\) must divide the number of Mamba 2 heads \(4\)"),
        ({"num_key_value_heads": 3}, r"`num_attention_heads` \(4\) must be a multiple of `num_key_value_heads` \(3\)"),
        ({"head_dim": 7}, r"`head_dim` must be even.*got 7"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, r"rope_type 'dynamic'"),
    ],
)
def test_settings_that_contradict_one_another(changes, message):
    with pytest.raises(ValueError, match=message):
        hybrid_config("mamba2", **changes)


def test_value_heads_must_share_key_heads():
    with pytest.raises(ValueError, match=r"`linear_num_value_heads` \(3\) must be a multiple of"):
        hybrid_config("gated-delta-net", linear_num_value_heads=3)


def test_default_mixers_end_in_attention():
    pattern = ["gated_delta_net"] * 3 + ["sliding_attention"]
    assert RecurrentHybridConfig(**SMALL, num_hidden_layers=8).mixer_types == pattern * 2
    assert RecurrentHybridConfig(**SMALL, num_hidden_layers=2).mixer_types == pattern[-2:]


def test_negative_eigenvalues_are_a_choice():
    usual, negative = hybrid("gated-delta-net"), hybrid("gated-delta-net", linear_allow_neg_eigval=True)
    assert not usual.config.linear_allow_neg_eigval
    assert (usual(IDS).logits - negative(IDS).logits).abs().max() > 1e-2


@pytest.mark.parametrize("mix", ["mamba2", "gated-delta-net"])
class TestRefusals:
    def test_packed_documents(self, mix):
        positions = torch.cat([torch.arange(20), torch.arange(LENGTH - 20)])[None]
        with pytest.raises(ValueError, match=r"`position_ids` start again.*give each document a row"):
            hybrid(mix)(IDS[:1], position_ids=positions)

    def test_positions_of_padding_do_not_matter(self, mix):
        ids, mask = left_padded()
        positions = torch.cat([torch.ones(PADDING, dtype=torch.long), torch.arange(LENGTH)])[None].expand_as(ids)
        model = hybrid(mix)
        with torch.no_grad():
            padded = model(ids, attention_mask=mask, position_ids=positions).logits
            torch.testing.assert_close(padded[:, PADDING:], model(IDS).logits, **tolerance(mix))

    def test_cache_without_recurrent_states(self, mix):
        cache = hybrid("attention-only")(IDS, use_cache=True).cache
        with pytest.raises(ValueError, match=r"`cache` .*DynamicCache\(config=model.config\)"):
            hybrid(mix)(IDS, cache=cache)


def test_neither_ids_nor_embeddings():
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        hybrid("mamba2")()
