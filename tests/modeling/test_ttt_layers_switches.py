"""The switches of TTT-Linear and TTT-MLP: what the layer is without them, and settings that contradict one another."""

import pytest
import torch

from ttt_e2e import TTTLayersConfig, TTTLayersForCausalLM
from ttt_e2e.tokens import MiniBatchGrid
from ttt_e2e.ttt_mixers import MixerCall

from .helpers import loss_and_gradients, random_ids
from .ttt_layers import CLOSE, LENGTH, SIZE, SMALL, layers_config, layers_model, read

IDS = random_ids(3, LENGTH)


def mixer_output(mixer, x):
    """Output of a mixer for x [1, T, D], and its inner loop's output before norm and projection."""
    length = x.shape[1]
    grid = MiniBatchGrid.of((0,), (length,), length, mixer.config.mini_batch_size, x.device)
    call = MixerCall((0,), (length,), grid, None, checkpointing=False)
    with torch.no_grad():
        return mixer(x, call, None)[0]


def test_without_learning_rate_it_is_a_linear_layer():
    x = torch.randn(1, LENGTH, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for switch in (True, False):
        model = layers_model("linear", ttt_base_learning_rate=0, ttt_layer_norm_residual=switch, ttt_rope_theta=None)
        mixer = model.model.layers[0].ttt
        q = mixer.q_proj(x).view(1, LENGTH, 3, 8)
        z = torch.einsum("bthi,hio->btho", q, mixer.initial_weight_1) + mixer.initial_bias_1[:, 0]
        if switch:
            z = torch.nn.functional.layer_norm(z, (8,), eps=1e-6)
            z = q + z * mixer.inner_norm.weight + mixer.inner_norm.bias
        expected = mixer.o_proj(mixer.post_norm(z.flatten(2)))
        torch.testing.assert_close(mixer_output(mixer, x), expected.detach(), **CLOSE)


@pytest.mark.parametrize("theta", [None, 10000.0])
def test_the_switches_at_which_it_is_linear_attention(theta):
    """One mini-batch, f without LayerNorm and residual, W_0 = 0, no bias, and every token at rate 1."""
    model = layers_model(
        "bare", mini_batch_size=2 * LENGTH, ttt_base_learning_rate=24 // 3, ttt_rope_theta=theta, num_hidden_layers=2
    )
    mixer = model.model.layers[0].ttt
    x = torch.randn(1, LENGTH, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, k, v = (proj(x).view(LENGTH, 3, 4, 2).transpose(0, 1) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    if theta is not None:
        angles = torch.arange(LENGTH).double()[:, None] * theta ** (-torch.arange(4).double() / 4)
        turn = torch.polar(torch.ones_like(angles), angles)
        q, k = (torch.view_as_real(torch.view_as_complex(part.contiguous()) * turn) for part in (q, k))
    q, k, v = (part.flatten(2) for part in (q, k, v))
    z = (q @ k.mT).tril() @ v
    expected = mixer.o_proj(mixer.post_norm(z.transpose(0, 1).flatten(1)[None]))
    torch.testing.assert_close(mixer_output(mixer, x), expected.detach(), rtol=0, atol=1e-10)


SWITCHES = [
    {"ttt_learn_initial_weights": False},
    {"ttt_layer_norm_residual": False},
    {"mini_batch_size": 2 * SIZE},
    {"ttt_learn_learning_rate": False},
    {"ttt_token_scale": False},
    {"ttt_use_bias": False},
    {"ttt_rope_theta": None},
    {"ttt_use_gate": True},
    {"ttt_share_qk": True},
    {"ttt_pre_conv": True},
    {"ttt_conv_kernel": 2, "ttt_pre_conv": True},
]


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_every_switch_alone_works_and_matters(switch):
    """Parameters come and go with their switch, and a text is read the same in pieces."""
    plain, changed = layers_model("linear"), layers_model("linear", **switch)
    shared = {n: p for n, p in plain.state_dict().items() if changed.state_dict().get(n, p[:0]).shape == p.shape}
    changed.load_state_dict(shared, strict=False)
    with torch.no_grad():
        logits = changed(IDS).logits
        assert (logits - plain(IDS).logits).abs().max() > 1e-3
    torch.testing.assert_close(read(changed, IDS, [5, 1, LENGTH - 6])[0], logits, **CLOSE)
    _, gradients = loss_and_gradients(changed, IDS)
    assert all(gradient.any() for gradient in gradients.values())
    assert gradients.keys() == dict(changed.named_parameters()).keys()


def test_base_learning_rates_by_mixer():
    config = layers_config("everything")
    assert [config.base_learning_rate(name) for name in ("ttt_linear", "ttt_mlp")] == [1.0, 0.1]
    assert layers_config("mlp", ttt_base_learning_rate=2).base_learning_rate("ttt_mlp") == 2.0


def test_layer_types_are_names_that_transformers_knows():
    expected = ["linear_attention", "sliding_attention", "linear_attention", "full_attention"]
    assert layers_config("everything").layer_types == expected


def test_initial_parameters():
    torch.manual_seed(0)
    mixer = TTTLayersForCausalLM(layers_config("mamba-backbone", num_attention_heads=2)).model.layers[1].ttt
    for weight in (mixer.initial_weight_1, mixer.initial_weight_2):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert mixer.learning_rate_gate.weight.std().item() == pytest.approx(0.02, rel=0.3)
    for zero in (mixer.initial_bias_1, mixer.token_scale_offset, mixer.inner_norm.bias, mixer.learning_rate_gate.bias):
        assert not zero.any()
    assert 0.4 < mixer.conv_q.weight.abs().max() <= 0.5, "1 / sqrt(kernel of 4)"


# -------------------------------------------------------------------------------------------- settings and refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer_types": ["ttt"] * 2}, r"`mixer_types` has \['ttt'\]; the known types are .*'ttt_mlp'"),
        ({"mixer_types": ["full_attention"], "num_hidden_layers": 2}, r"`mixer_types` has 1 entries.* is 2"),
        ({"layer_types": ["full_attention"] * 2}, r"`layer_types` follows from `mixer_types`"),
        ({"mixer_types": ["sliding_attention"], "sliding_window": None}, r"`sliding_window` is None"),
        ({"sliding_window": 0}, r"`sliding_window` must be at least 1, or None, got 0"),
        ({"mini_batch_size": 0}, r"`mini_batch_size` must be at least 1, got 0"),
        ({"inner_checkpoint_every": 0}, r"`inner_checkpoint_every` must be at least 1, or None, got 0"),
        ({"num_attention_heads": 5}, r"`hidden_size` \(24\) divided by `num_attention_heads` \(5\)"),
        ({"num_attention_heads": 8}, r"must be an even number"),
        ({"ttt_base_learning_rate": -1.0}, r"`ttt_base_learning_rate` must be finite and not negative.*got -1"),
        ({"ttt_rope_theta": 0.0}, r"`ttt_rope_theta` must be finite and positive, or None, got 0"),
        ({"mixer_types": ["ttt_mlp"], "ttt_learn_initial_weights": False}, r"weights of an MLP that starts from zero"),
        ({"mixer_types": ["full_attention"], "num_key_value_heads": 2}, r"multiple of `num_key_value_heads` \(2\)"),
        ({"mixer_types": ["full_attention"], "head_dim": 7}, r"`head_dim` must be even.*got 7"),
    ],
)
def test_settings_that_contradict_one_another(changes, message):
    with pytest.raises(ValueError, match=message):
        layers_config("linear", **changes)


def test_default_configuration_is_ttt_linear():
    config = TTTLayersConfig(**SMALL, num_hidden_layers=3)
    assert config.mixer_types == ["ttt_linear"] * 3 and config.head_dim == 8
