"""The benchmark of TTT layers runs every variant; its numbers are not judged here."""

from ttt_e2e.benchmarks import TTTLayerSizes, measure_forms, measure_lengths

SMALL = TTTLayerSizes(
    hidden_size=16,
    num_attention_heads=2,
    mini_batch_size=4,
    linear_tokens=12,
    mlp_tokens=8,
    lengths=(8, 16),
    written_tokens=5,
)


def test_all_variants_are_timed():
    forms, lengths = measure_forms(SMALL, rounds=1), measure_lengths(SMALL, rounds=1)
    assert list(forms) == [
        f"{mixer}, {tokens} tokens, {form} form"
        for mixer, tokens in (("ttt_linear", 12), ("ttt_mlp", 8))
        for form in ("dual", "primal")
    ]
    assert list(lengths) == [f"{work} {n} tokens" for work in ("reading", "writing after") for n in (8, 16)]
    assert all(seconds > 0 for seconds in [*forms.values(), *lengths.values()])
