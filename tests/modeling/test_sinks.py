"""Attention sinks: the first tokens of a sequence stay visible, in a cache that does not grow."""

import pytest
import torch

from ttt_e2e import TTTE2ECache
from ttt_e2e.layers import NewStates, TTTE2EAttention, rotate

from .helpers import BATCH, WINDOW, padded, random_ids, small_config, small_model
from .reading_in_calls import CLOSE, random_sizes, read

SINKS = 3
LONG = 5 * WINDOW + 3  # read block by block


def attention_as_written(module, query, key, value, attention, past):
    """Every pair of tokens by itself: what a token sees, and from how far away."""
    assert past is None
    config, heads = module.config, (*query.shape[:-1], -1, module.head_dim)
    query, key, value = (states.view(heads).transpose(1, 2) for states in (query, key, value))
    query, key = module.q_norm(query), module.k_norm(key)
    key, value = (states.repeat_interleave(module.num_key_value_groups, dim=1) for states in (key, value))
    length, window, sinks = query.shape[2], config.sliding_window, config.num_sink_tokens
    cosines, sines = attention.position_embeddings[module.layer_type]

    def at(states, token, position):
        return rotate(states[:, :, token : token + 1], cosines[:, :, [position]], sines[:, :, [position]])[:, :, 0]

    outputs = []
    for n in range(length):
        seen = [j for j in range(n + 1) if n - j < window or j < sinks]
        places = [n if n - j < window else min(n, window + sinks - 1) for j in seen]
        pairs = zip(seen, places, strict=True)
        scores = [(at(query, n, place) * at(key, j, j)).sum(dim=-1) * module.scaling for j, place in pairs]
        weights = torch.stack(scores, dim=-1).softmax(dim=-1)  # [batch, heads, seen]
        outputs.append((weights[..., None] * value[:, :, seen]).sum(dim=2))
    output = torch.stack(outputs, dim=1).flatten(2)
    return output, NewStates((key, value)), None


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("length", [WINDOW, WINDOW + SINKS + 1, 3 * WINDOW, LONG])
def test_a_text_is_read_as_written_down(length, implementation, groups, monkeypatch):
    model = small_model(torch.float64, num_sink_tokens=SINKS, num_key_value_heads=4 // groups)
    model.set_attn_implementation(implementation)
    ids = random_ids(2, length)
    found = model(ids, test_time_training=False).logits
    monkeypatch.setattr(TTTE2EAttention, "mix", attention_as_written)
    torch.testing.assert_close(found, model(ids, test_time_training=False).logits, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("learning", [True, False])
def test_a_window_that_holds_the_text_needs_no_sinks(learning):
    ids = random_ids(2, WINDOW)
    with_sinks, without = (small_model(torch.float64, num_sink_tokens=count) for count in (SINKS, 0))
    arguments = {"test_time_training": learning}
    # Not bit for bit: the keys lie in memory otherwise, and kernels may then add in another order.
    apart = with_sinks(ids, **arguments).logits - without(ids, **arguments).logits
    assert apart.abs().max() < 1e-12
    longer = random_ids(2, WINDOW + 1)
    apart = with_sinks(longer, **arguments).logits - without(longer, **arguments).logits
    assert apart[:, -1].abs().max() > 1e-4 and apart[:, :WINDOW].abs().max() < 1e-12


def test_window_and_sinks_that_hold_the_text_are_full_attention():
    ids = random_ids(2, WINDOW + SINKS)
    model = small_model(torch.float64, num_sink_tokens=SINKS, test_time_training=False)
    full = small_model(torch.float64, layer_types=["full_attention"] * 4, test_time_training=False)
    full.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(ids).logits, full(ids).logits, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("sinks", [1, SINKS, WINDOW])
@pytest.mark.parametrize("learning", [True, False])
def test_a_text_read_in_any_calls_and_padding_in_a_cache_of_one_size(sinks, learning):
    model = small_model(torch.float64, num_sink_tokens=sinks, test_time_training=learning)
    ids = random_ids(2, LONG)
    whole, cache, _ = read(model, ids)
    sizes = {states.keys.shape[2] for states in cache.layers[:2]}
    assert sizes == {sinks + WINDOW - 1}
    for seed in range(6):
        parts, cache, _ = read(model, ids, random_sizes(LONG, seed))
        torch.testing.assert_close(parts, whole, **CLOSE)
        assert max(states.keys.shape[2] for states in cache.layers) <= sinks + WINDOW - 1 + BATCH
    for side in ("left", "right", "anywhere"):
        ids, mask, lengths = padded(side)
        for pieces in (None, random_sizes(ids.shape[1], 1)):
            together, _, _ = read(model, ids, pieces, mask=mask)
            for row in range(len(lengths)):
                real = mask[row].bool()
                alone = model(ids[row : row + 1, real]).logits[0]
                torch.testing.assert_close(together[row, real], alone, **CLOSE)


@pytest.mark.parametrize("then", ["inference", "no_grad", "grad"])
@pytest.mark.parametrize("way", ["read", "select", "join"])
def test_what_was_read_in_inference_mode_is_read_on_from_and_learned_from(way, then):
    model = small_model(torch.float64, num_sink_tokens=SINKS)
    ids = random_ids(2, 2 * LONG)

    def go_on(mode):
        with mode():
            cache = model(ids[:, :LONG], use_cache=True).cache
            if way == "select":
                cache.batch_select_indices(torch.tensor([1, 0]))
            if way == "join":
                cache = TTTE2ECache.joined([cache, cache])
        rest = {"read": ids, "select": ids.flip(0), "join": torch.cat([ids, ids])}[way]
        with {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}[then]():
            for start, end in ((LONG, LONG + 1), (LONG + 1, LONG + 2), (LONG + 2, LONG + 3 * BATCH)):
                output = model(rest[:, start:end], labels=rest[:, start:end], use_cache=True, cache=cache)
        if then == "grad":
            output.loss.backward()
            model.zero_grad()
        return output.loss

    torch.testing.assert_close(go_on(torch.inference_mode), go_on(torch.no_grad), rtol=0, atol=0)


def test_half_precision_sees_sinks_as_exactly_as_other_tokens():
    """A score is kept in two numbers of half precision: the error is no larger than that of the rest."""
    ids = random_ids(2, 3 * WINDOW)
    errors = []
    for sinks in (0, SINKS):
        model = small_model(torch.float64, num_sink_tokens=sinks, test_time_training=False)
        exact = model(ids).logits
        errors.append((model.bfloat16()(ids).logits.double() - exact).square().mean().sqrt().item())
    assert errors[1] < 1.2 * errors[0]


def test_attention_weights_of_sinks_stand_before_the_others():
    model = small_model(torch.float64, num_sink_tokens=SINKS)
    model.set_attn_implementation("eager")
    ids = random_ids(2, WINDOW + BATCH)
    for learning in (True, False):
        at_once = model(ids, output_attentions=True, test_time_training=learning).attentions
        assert at_once[0].shape == (2, 4, WINDOW + BATCH, SINKS + WINDOW + BATCH)
        for weights in at_once:
            torch.testing.assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]))
            assert weights[:, :, :WINDOW, :SINKS].abs().max() == 0 and weights[:, :, -1, :SINKS].min() > 0
        cache = TTTE2ECache(model.config)
        model(ids[:, :-2], cache=cache, test_time_training=learning)
        last = model(ids[:, -2:], cache=cache, output_attentions=True, test_time_training=learning).attentions
        for weights, whole in zip(last, at_once, strict=True):
            torch.testing.assert_close(weights[..., :SINKS], whole[:, :, -2:, :SINKS])


def test_a_flash_kernel_knows_no_sinks():
    model = small_model(num_sink_tokens=SINKS)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"'flash_attention_2'` knows no attention sinks .* 'sdpa'"):
        model(random_ids(1, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_sink_tokens": WINDOW + 1},
            r"`num_sink_tokens` is 17; it must lie between 0 and .* \(16\)",
        ),
        ({"num_sink_tokens": -1}, "`num_sink_tokens` is -1; it must lie between"),
        ({"num_sink_tokens": 4, "use_attention": False}, "`num_sink_tokens` is 4; but no block has a window"),
        ({"num_sink_tokens": 4, "layer_types": ["full_attention"] * 4}, "no block has a window .* set it to 0"),
    ],
)
def test_sinks_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)
