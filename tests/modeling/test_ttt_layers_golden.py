"""TTT-Linear and TTT-MLP against the official PyTorch code, every variant."""

import pytest
import torch

from ttt_e2e.ttt_linear_mlp import Views

from .helpers import gradients
from .ttt_layers_golden import VARIANTS, OfficialRun, prefill

LENGTHS = ("full", "part")


@pytest.fixture(scope="module", params=VARIANTS)
def run(request):
    return OfficialRun(request.param)


def close(tolerance):
    return {"rtol": 0.0, "atol": tolerance}


@pytest.mark.parametrize("length", LENGTHS)
def test_logits_hidden_states_and_loss(run, length):
    with torch.no_grad():
        output = run.model(run.ids(length), labels=run[f"labels.{length}"], output_hidden_states=True)
    torch.testing.assert_close(output.logits, run[f"logits.{length}"], **close(5e-5))
    torch.testing.assert_close(output.loss, run[f"loss.{length}"][0], **close(1e-5))
    if length == "part":
        # The official list lacks the embeddings, and has the last block's output before and after the final norm.
        *blocks, before_norm, after_norm = (run[name] for name in sorted(run.tensors) if name.startswith("hidden.part"))
        torch.testing.assert_close(list(output.hidden_states[1:]), [*blocks, after_norm], **close(2e-5))
        torch.testing.assert_close(run.model.model.norm(before_norm), after_norm, **close(2e-5))


def test_gradients(run):
    recorded = [length for length in LENGTHS if run.under(f"grad.{length}.")]
    assert "full" in recorded
    for length in recorded:
        expected = run.converted(f"grad.{length}.")
        run.model.zero_grad()
        run.model(run.ids(length), labels=run[f"labels.{length}"]).loss.backward()
        found = gradients(run.model)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_inside_of_the_first_layer(run):
    seen = {}

    class Spy(torch.nn.Module):
        """Stands in for a mixer, and keeps what it was given and what it made of it."""

        def __init__(self, mixer):
            super().__init__()
            self.mixer = mixer

        def forward(self, x, call, state):
            seen["x"], seen["views"] = x, self.mixer.views(x, call, None)[0]
            hook = self.mixer.post_norm.register_forward_pre_hook(lambda _, given: seen.update(z=given[0]))
            seen["out"], state, weights = self.mixer(x, call, state)
            hook.remove()
            return seen["out"], state, weights

    layer = run.model.model.layers[0]
    mixer = layer.ttt
    layer.ttt = Spy(mixer)
    try:
        with torch.no_grad():
            run.model(run.ids("part"))
    finally:
        layer.ttt = mixer
    views: Views = seen["views"]
    length = run.description["lengths"]["part"]
    flat = {"XQ": views.query, "XK": views.key, "XV": views.value, "lr": views.rate}
    found = {name: tensor.flatten(2, 3)[:, :, :length] for name, tensor in flat.items()}
    found |= {"tok": views.scale.flatten()[:length], **{name: seen[name] for name in ("x", "z", "out")}}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, run[f"ttt0.part.{name}"], **close(1e-5), msg=lambda m, n=name: f"{n}: {m}")


def test_decoding_after_a_prefill(run):
    ids = run["input_ids"]
    for length in run.prefills:
        first, cache = prefill(run, length)
        expected = run[f"decode.n{length}.logits"]
        logits = [first]
        for column in range(length, expected.shape[1]):
            with torch.no_grad():
                logits.append(run.model(ids[:, column : column + 1], cache=cache).logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, **close(5e-5))


def test_greedy_continuation(run):
    recorded = [length for length in run.prefills if f"greedy.n{length}.ids" in run.tensors]
    assert recorded
    for length in recorded:
        expected = run[f"greedy.n{length}.ids"]
        settings = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False, "eos_token_id": None}
        written = run.model.generate(run["input_ids"][:, :length], max_new_tokens=expected.shape[1], **settings)
        assert torch.equal(written.sequences[:, length:], expected)
        logits = torch.stack(written.logits, dim=1)
        torch.testing.assert_close(logits, run[f"greedy.n{length}.logits"], **close(5e-5))


def test_states_after_a_prefill(run):
    lengths = run.description["cache_snapshots"]
    assert lengths
    for length in lengths:
        _, cache = prefill(run, length)
        for index, (conv, (inner, shared)) in enumerate(cache.states):
            expected = run.under(f"cache.n{length}.layer{index}.")
            names = ["W1", "b1", "W2", "b2"][: len(inner.weights)]
            found = {f"{name}_states": weight for name, weight in zip(names, inner.weights, strict=True)}
            if inner.sums is not None:
                found |= {f"{name}_grad": total for name, total in zip(names, inner.sums, strict=True)}
            # The official cache keeps one input more than a convolution needs.
            for name, last in {"pre_conv": conv, "ttt_conv_q": shared, "ttt_conv_k": shared}.items():
                if name in expected:
                    found[name], expected[name] = last.mT, expected[name][..., 1:]
            assert found.keys() == expected.keys()
            torch.testing.assert_close(found, expected, **close(5e-6))
