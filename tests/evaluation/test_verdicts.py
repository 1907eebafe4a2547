"""What may be claimed: two standard errors, trained systems, and data that rewards context."""

import dataclasses

import pytest

from ttt_e2e.configuration.experiments import Claim, Experiment, Measured, Number, Trained, Yardsticks
from ttt_e2e.evaluation.experiment_report import UNKNOWN_PROCESSOR, TrainedRow, processors_note, report_text
from ttt_e2e.evaluation.results import Point
from ttt_e2e.evaluation.verdicts import (
    AGREES,
    DISAGREES,
    NOT_JUDGED,
    NOT_RESOLVED,
    Difference,
    Estimate,
    difference,
    find_estimate,
    judge_claims,
    pooled_seed_variance,
    seed_label,
)

YARDSTICKS = Yardsticks([3, 5], "twin", "off", "full", "window")
# Losses by row; each document differs by the same from the row's mean, so that differences have no error of their own.
LOSSES = {"full": 2.0, "window": 2.5, "twin": 2.4, "off": 2.6, "ours": 1.9, "3-gram": 3.0, "5-gram": 2.2, "gzip": 4.0}


def point(label, loss, documents=(-0.2, 0.0, 0.2), noise=0.0):
    losses = [loss + each + noise * (index % 2) for index, each in enumerate(documents)]
    numbers = {"loss": sum(losses) / len(losses), "loss_by_document": losses, "tokens": 100}
    if label in ("gzip", "zstd"):
        numbers["bytes"] = 250
    return Point("context-length", label, label, 64, {}, numbers, {}, {})


def points(**changes):
    losses = LOSSES | {"zstd": 3.9} | {label.replace("_", "-"): loss for label, loss in changes.items()}
    return [point(label, loss) for label, loss in losses.items()]


def experiment(*claims, seeds=1):
    fields = {"paper": "It did.", "size": "tiny", "recipes": ["pretrain-tiny"], "data": "here", "validation_every": 2}
    rows = {label: Trained("ttt-e2e", seeds=seeds) for label in ("full", "window", "twin", "off", "ours")}
    return Experiment(
        name="mine",
        description="Mine.",
        rows=rows,
        baseline="",
        measured=[Measured("context-length", [64], 3)],
        claims=list(claims),
        yardsticks=YARDSTICKS,
        **fields,
    )


def claim(smaller, larger, about_context=False):
    return Claim("it is", Number(smaller, 64, "loss"), Number(larger, 64, "loss"), about_context)


def answers(found, *claims):
    return [verdict.answer for verdict in judge_claims(experiment(*claims), found)]


def test_two_standard_errors_are_needed():
    assert Difference(0.5, 0.2).answer(1) == AGREES
    assert Difference(-0.5, 0.2).answer(1) == DISAGREES
    assert Difference(0.3, 0.2).answer(1) == Difference(-0.3, 0.2).answer(1) == NOT_RESOLVED


def test_without_errors_a_twentieth_is_told_apart():
    assert Difference(0.4, None).answer(10) == NOT_RESOLVED and Difference(0.6, None).answer(10) == AGREES


def test_errors_are_over_documents_and_seeds():
    one = Estimate([1.0], [0.9, 1.0, 1.1])
    other = Estimate([2.0], [1.8, 2.0, 2.2])
    assert difference(one, other, None).error == pytest.approx(0.1 / 3**0.5)
    assert difference(one, other, 0.08).error == pytest.approx((0.01 / 3 + 2 * 0.08) ** 0.5)
    several = Estimate([1.8, 2.2], [1.9, 2.0, 2.1])
    assert difference(several, several, None).error == pytest.approx((2 * 0.08 / 2) ** 0.5)
    assert pooled_seed_variance([one, other]) is None
    assert pooled_seed_variance([one, several]) == pytest.approx(0.08)
    assert difference(Estimate([1.0]), Estimate([2.0]), 0.08).error is None


def test_numbers_over_seeds_and_ranges():
    blocks = {"loss": 2.0, "loss_by_position": [1.0] * 64 + [3.0] * 63, "loss_by_block": [[1.0, 2.0], [1.5, 4.0]]}
    other = {"loss": 4.0, "loss_by_position": [2.0] * 64 + [6.0] * 63, "loss_by_block": [[3.0, 4.0], [1.5, 8.0]]}
    found = [
        Point("loss-by-position", seed_label("row", seed), "", 128, {}, numbers, {}, {})
        for seed, numbers in enumerate((blocks, other))
    ]
    late = find_estimate(found, "row", 128, "loss_by_position", first=64, end=127)
    assert list(late.seeds) == [3.0, 6.0] and list(late.documents) == [3.0, 6.0]
    assert list(find_estimate(found, "row", 128, "loss").documents) == [2.5, 3.75]
    with pytest.raises(KeyError, match="'nobody' has no 'loss' at length 128"):
        find_estimate(found, "nobody", 128, "loss")


def test_order_and_its_reverse():
    assert answers(points(), claim("ours", "window"), claim("window", "ours")) == [AGREES, DISAGREES]
    assert answers(points(ours=2.5), claim("ours", "window")) == [NOT_RESOLVED]


def test_what_does_not_beat_the_3_gram_is_not_judged():
    [verdict] = judge_claims(experiment(claim("ours", "window")), points(window=3.2))
    assert verdict.answer == NOT_JUDGED and "window is not better than the 3-gram" in verdict.numbers


def test_without_a_gain_of_full_attention_nothing_is_said_about_context():
    found = points(full=2.5)
    assert answers(found, claim("ours", "window", True), claim("ours", "window")) == [NOT_JUDGED, AGREES]
    assert answers(points(), claim("ours", "window", True)) == [AGREES]


def test_a_claim_about_two_lengths_is_judged_where_attention_gains_at_the_longer_one():
    """At a length of few windows it has nothing to gain."""
    short = [dataclasses.replace(own, length=32) for own in points(full=2.6)]
    gets_better = Claim("it is", Number("ours", 64, "loss"), Number("ours", 32, "loss"), about_context=True)
    found = short + points(ours=1.5)
    assert answers(found, gets_better) == [AGREES]
    assert answers(short + points(ours=1.5, full=2.6), gets_better) == [NOT_JUDGED]


def report(found):
    trained = {label: TrainedRow([label], 1000, 12.0) for label in ("full", "window", "twin", "off", "ours")}
    mine = experiment(claim("ours", "window"))
    return report_text(mine, trained, found, judge_claims(mine, found))


def test_report_marks_what_is_trained():
    lines = {line.split("|")[1].strip(): line for line in report(points(window=3.2)).splitlines() if "|" in line}
    assert "better than 3-gram and 5-gram" in lines["ours"] and "**not trained**" in lines["window"]
    assert lines["twin"].rstrip("| ").endswith("better than 3-gram")
    assert "1,000 | 12" in lines["ours"]
    # 4 nats a token, 100 tokens in 250 bytes.
    assert f"{4.0 * 100 / (0.6931 * 250):.3f}" in lines["gzip"]


def test_report_says_when_outer_training_is_not_done():
    assert "twin is better than off by 0.200" in report(points())
    assert "**The outer training is not done:** off is better than twin by 0.300" in report(points(off=2.1))


def test_report_says_whether_the_data_rewards_context():
    assert "full is better than window by 0.500" in report(points())
    assert "**No claim about context:** full gains 0.000 ± 0.000 over window" in report(points(full=2.5))


def test_what_the_report_notes_counts_the_seeds():
    """The variance over seeds is known from one of the two rows."""
    found = [*points(), point("twin, seed 1", 2.8), point("window, seed 1", 2.9)]
    assert "off by 0.000 ± 0.346" in report(found)  # (0.08 / 2 + 0.08) ** 0.5
    assert "full is better than window by 0.700 ± 0.346" in report(found)


def test_report_says_where_the_seconds_were_measured():
    trained = {
        "ours": TrainedRow(["a"], 10, 1.0, frozenset({"one"})),
        "window": TrainedRow(["b"], 10, 1.0, frozenset({"two"})),
    }
    assert processors_note(trained).endswith("within one. one: ours; two: window.")
    unknown = {"ours": TrainedRow(["a"], 10, 1.0, frozenset({UNKNOWN_PROCESSOR}))}
    assert "several machines" in processors_note(unknown)
    assert processors_note({"ours": trained["ours"], "preset": TrainedRow(["p"], 0, None)}) == "CPU seconds: one."


@pytest.mark.parametrize("missing", ["twin", "3-gram", "gzip"])
def test_no_table_without_yardsticks(missing):
    with pytest.raises(KeyError, match=r"(has|have) no 'loss' at length 64"):
        report([each for each in points() if each.label not in (missing, "zstd")])


def test_no_table_without_tokens_and_seconds():
    header = next(line for line in report(points()).splitlines() if line.startswith("| "))
    assert header.split("|")[2:4] == [" training tokens ", " CPU seconds "]
