"""Hidden states and attention weights of every block: their gradients, and the columns in which they stand."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from ttt_e2e import TTTLayersConfig, TTTLayersForCausalLM

from .helpers import BATCH, LENGTH, VOCAB, WINDOW, padded, random_ids, small_model


def layers_model(*mixers):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = TTTLayersConfig(
        **sizes,
        num_hidden_layers=len(mixers),
        mixer_types=list(mixers),
        sliding_window=WINDOW,
        mini_batch_size=BATCH,
        bos_token_id=1,
        eos_token_id=2,
    )
    return TTTLayersForCausalLM(config).double().eval()


MODELS = {
    "learning on": lambda: small_model(torch.float64),
    "learning off": lambda: small_model(torch.float64, test_time_training=False),
    "TTT layers": lambda: layers_model("ttt_linear", "sliding_attention", "ttt_mlp"),
}


@pytest.mark.parametrize("side", ["nowhere", "left", "any"])
@pytest.mark.parametrize("name", MODELS)
def test_every_hidden_state_shows_the_gradient_that_flows_through_it(name, side):
    """As `retain_grad` does in any model: the slope of the loss along a change of that state."""
    model = MODELS[name]()
    ids, mask, _ = padded(side) if side != "nowhere" else (random_ids(4, LENGTH), None, None)
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    output = model(ids, attention_mask=mask, labels=labels, output_hidden_states=True)
    states = output.hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    for state in states:
        state.retain_grad()
    output.loss.backward()
    assert all(state.grad is not None and state.grad.shape == state.shape for state in states)
    assert all(state.grad.abs().max() > 0 for state in states)
    if mask is not None:
        assert all(state.grad[mask == 0].abs().max() == 0 for state in states)
    # The embedding's gradient is that of its row, summed over where its id was read.
    embedding = model.get_input_embeddings().weight
    summed = torch.zeros_like(embedding).index_add(0, ids.flatten(), states[0].grad.flatten(0, 1))
    unread = torch.ones(VOCAB, dtype=torch.bool).index_fill(0, ids.flatten(), False)
    if embedding is not model.get_output_embeddings().weight:
        torch.testing.assert_close(embedding.grad, summed)
    assert summed[unread].abs().max() == 0


@pytest.mark.parametrize("name", MODELS)
def test_a_loss_of_hidden_states_reaches_the_weights(name):
    """Distillation: states are functions of the weights, not only shown."""
    model = MODELS[name]()
    states = model(random_ids(2, LENGTH), output_hidden_states=True).hidden_states
    sum(state.square().mean() for state in states).backward()
    assert all(p.grad is not None for key, p in model.named_parameters() if "layers.0" in key and "norm" not in key)


def test_attention_weights_show_their_gradient():
    model = small_model(torch.float64, test_time_training=False, attn_implementation="eager")
    output = model(random_ids(2, LENGTH), output_attentions=True)
    for weights in output.attentions:
        weights.retain_grad()
    output.logits.square().sum().backward()
    assert all(weights.grad.abs().max() > 0 for weights in output.attentions)


@pytest.mark.parametrize("full_mask", [True, False], ids=["mask over all columns", "no mask"])
@pytest.mark.parametrize("name", MODELS)
def test_attention_weights_stand_in_the_columns_of_stock_models(name, full_mask):
    """Also for tokens that were cached behind padding: the last columns of the window, then the new ones."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    stock = MistralForCausalLM(
        MistralConfig(
            vocab_size=VOCAB, num_key_value_heads=4, sliding_window=WINDOW, attn_implementation="eager", **sizes
        )
    ).eval()
    model = MODELS[name]()
    ids, mask = random_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    for before in (8, 10):
        shapes, kept = [], []
        for each in (stock, model):
            with torch.no_grad():
                cache = each(ids[:, :before], attention_mask=mask[:, :before], use_cache=True).cache
                given = {"attention_mask": mask} if full_mask or each is stock else {}
                output = each(ids[:, before:], cache=cache, use_cache=True, output_attentions=True, **given)
            shapes.append(output.attentions[0].shape)
            kept.append([(weights[1].sum(dim=0) > 0) for weights in output.attentions])
        assert shapes[0] == shapes[1] == (2, 4, 12 - before, 12)
        for seen in kept[1]:
            assert torch.equal(seen, kept[0][0]), "a weight in a column of padding"


def test_reentrant_checkpointing_serves_a_model_that_does_not_learn():
    ids = random_ids(2, LENGTH)
    plain = small_model(torch.float64, test_time_training=False).train()
    plain(ids, labels=ids).loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    model = small_model(torch.float64, test_time_training=False).train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None or name in expected:
            torch.testing.assert_close(parameter.grad, expected[name])
    with pytest.raises(ValueError, match=r"`use_reentrant=True`.*`test_time_training=False`"):
        model(ids, labels=ids, test_time_training=True)
