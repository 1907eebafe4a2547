"""Keys that grow in place: what `torch.cat` gives, whoever else goes on from the same tensors."""

import copy
import threading

import pytest
import torch

from ttt_e2e.growing import SHARE, grown
from ttt_e2e.sinks import Past

LONG = 4 * SHARE


def states(tokens, seed=0, rows=2, dtype=torch.float64):
    return torch.randn(rows, 3, tokens, 5, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("count", [1, 3])
def test_many_steps_give_what_cat_gives(rows, count):
    got, new = states(LONG, rows=rows), [states(count, seed, rows) for seed in range(1, 40)]
    for step, own in enumerate(new, 1):
        got = grown(got, own)
        assert torch.equal(got, torch.cat([states(LONG, rows=rows), *new[:step]], dim=2))


def test_a_window_slides_through_memory_that_is_rarely_copied():
    got, whole, memories = states(LONG), states(LONG), []
    for seed in range(1, 50):
        got, whole = grown(got, states(1, seed))[:, :, 1:].detach(), torch.cat([whole, states(1, seed)], dim=2)
        assert torch.equal(got, whole[:, :, -LONG:])
        memories.append(got.data_ptr() - got.storage_offset() * got.element_size())
        assert got.untyped_storage().nbytes() <= 1.25 * got.nbytes
    assert len(set(memories)) <= 1 + 50 // (LONG // SHARE)


def test_earlier_tensors_stay_what_they_were_and_the_second_to_go_on_gets_a_copy():
    first = grown(states(LONG), states(1, 1))
    kept = first.clone()
    one, other = grown(first, states(1, 2)), grown(first, states(1, 3))
    further = grown(one, states(1, 4))
    assert torch.equal(first, kept)
    assert torch.equal(one, torch.cat([kept, states(1, 2)], dim=2)) and one.data_ptr() == first.data_ptr()
    assert torch.equal(other, torch.cat([kept, states(1, 3)], dim=2)) and other.data_ptr() != first.data_ptr()
    assert torch.equal(further, torch.cat([one, states(1, 4)], dim=2))


def test_threads_that_go_on_from_one_tensor_do_not_write_into_each_others_places():
    first, got = grown(states(64 * SHARE), states(1, 1)), {}

    def go_on(number):
        with torch.no_grad():
            mine = first
            for step in range(20):
                mine = grown(mine, states(1, 100 * number + step))
            got[number] = mine

    threads = [threading.Thread(target=go_on, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, mine in got.items():
        new = [states(1, 100 * number + step) for step in range(20)]
        assert torch.equal(mine, torch.cat([first, *new], dim=2)), number


def test_rows_heads_and_parts_of_a_tensor_are_copied():
    first = grown(states(LONG), states(1, 1))
    for part in (first[:1], first[:, 1:], first[:, :, :-1], first[..., 1:], first.transpose(0, 0)[:, :, 3:-2]):
        new = states(1, 2)[: part.shape[0], : part.shape[1], :, : part.shape[3]]
        longer = grown(part, new)
        assert torch.equal(longer, torch.cat([part, new], dim=2)) and longer.data_ptr() != part.data_ptr()


def test_gradients_reach_both_and_what_is_kept_for_them_stays_valid():
    first = grown(states(LONG), states(1, 1))
    with torch.enable_grad():
        weight = torch.ones(5, dtype=torch.float64, requires_grad=True)
        loss = (first * weight).square().sum()  # keeps `first`
        new = states(1, 2).requires_grad_()
        assert torch.autograd.grad(grown(first, new).sum(), new)[0].eq(1).all()
    grown(first, states(1, 3))
    loss.backward()
    assert weight.grad.isfinite().all()


def test_other_dtypes_inference_tensors_and_no_channels():
    first = grown(states(LONG, dtype=torch.float32), states(1, 1, dtype=torch.float32))
    assert grown(first, states(1, 2)).dtype == torch.float64
    with torch.inference_mode():
        inside = grown(first, states(1, 2, dtype=torch.float32))
        assert torch.equal(inside[:, :, :-1], first) and inside.is_inference()
    assert torch.equal(grown(inside, states(1, 3, dtype=torch.float32))[:, :, :-1], inside)
    empty = torch.zeros(2, 3, LONG, 0)
    assert grown(empty, torch.zeros(2, 3, 1, 0)).shape == (2, 3, LONG + 1, 0)


def test_what_does_not_fit_is_refused_as_by_cat():
    first = grown(states(LONG), states(1, 1))
    for new in (states(1, 2, rows=1), states(1, 2)[:, :1], states(1, 2)[..., :2]):
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            grown(first, new)
    same = first[:1].expand(2, -1, -1, -1)
    assert torch.equal(grown(same, states(1, 2)), torch.cat([same, states(1, 2)], dim=2))


def test_a_copy_of_a_tensor_has_no_places_of_the_first_one():
    first = grown(states(LONG), states(1, 1))
    second = copy.deepcopy(first)
    one, other = grown(first, states(1, 2)), grown(second, states(1, 3))
    assert torch.equal(one[:, :, :-1], other[:, :, :-1])
    assert torch.equal(one[:, :, -1:], states(1, 2)) and torch.equal(other[:, :, -1:], states(1, 3))


def test_sinks_and_window_come_apart_as_they_were_joined():
    window, sinks = (states(9), states(9, 1)), (states(4, 2), states(4, 3))
    for past in (Past(window, sinks), Past(window)):
        again = Past.of_joined(past.joined(), 0 if past.sinks is None else 4)
        assert (again.sinks is None) == (past.sinks is None) and again.length == 9
        for own, other in zip(again.joined(), past.joined(), strict=True):
            assert torch.equal(own, other)
