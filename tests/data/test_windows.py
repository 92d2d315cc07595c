from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.examples import make_episodes

from dt_ray.data import returns_to_go, slice_windows
from dt_ray.data.windows import (
    RETURN_BINS,
    UPDATES_A_DRAW,
    WindowTable,
    balanced_shares,
    draw_anchors,
    draw_shared_anchors,
    write_part,
)
from dt_ray.training.cutting import WindowCutter, one_run

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@given(lengths, st.integers(1, 6))
def test_a_window_is_its_episode_from_the_anchor_on(lengths: list[int], length: int) -> None:
    data = make_episodes(lengths)
    to_go = returns_to_go(data.rewards, data.starts)
    windows = slice_windows(data, np.arange(data.num_transitions), length=length)
    for anchor in range(data.num_transitions):
        episode = np.searchsorted(data.starts, anchor, side="right") - 1
        num = min(length, data.ends[episode] - anchor)
        rows = slice(anchor, anchor + num)
        assert windows.mask[anchor].tolist() == [True] * num + [False] * (length - num)
        np.testing.assert_array_equal(windows.observations[anchor, :num], data.observations[rows])
        np.testing.assert_array_equal(windows.actions[anchor, :num], data.actions[rows])
        np.testing.assert_array_equal(windows.returns_to_go[anchor, :num], to_go[rows])
        np.testing.assert_array_equal(windows.timesteps[anchor, :num], np.arange(num) + anchor - data.starts[episode])
        for column in (windows.observations, windows.actions, windows.previous_actions, windows.returns_to_go):
            assert not column[anchor, num:].any()


@given(lengths, st.integers(1, 6))
def test_the_previous_action_is_the_logged_one_also_at_the_anchor(lengths: list[int], length: int) -> None:
    data = make_episodes(lengths)
    windows = slice_windows(data, np.arange(data.num_transitions), length=length)
    for anchor in range(data.num_transitions):
        expected = np.zeros(1) if anchor in data.starts else data.actions[anchor - 1]
        np.testing.assert_array_equal(windows.previous_actions[anchor, 0], expected)
    inside = windows.mask[:, 1:]
    np.testing.assert_array_equal(windows.previous_actions[:, 1:][inside], windows.actions[:, :-1][inside])


@given(lengths, st.integers(1, 6), st.floats(0.1, 1))
def test_the_window_table_holds_the_same_windows(lengths: list[int], length: int, discount: float) -> None:
    data = make_episodes(lengths, observation_dim=2, action_dim=3)
    anchors = np.arange(data.num_transitions)
    expected = slice_windows(data, anchors, length=length, discount=discount)
    table = WindowTable.build(data, length=length, discount=discount)
    cutter = WindowCutter(table, "cpu", seed=0, batch_size=1, share=slice(None))
    batch = cutter.cut(cutter.find(anchors[None]), 0)
    for name in ("observations", "actions", "previous_actions", "returns_to_go", "timesteps", "mask"):
        values = getattr(batch, name).numpy()
        real = values[expected.mask]
        np.testing.assert_array_equal(real, getattr(expected, name)[expected.mask], err_msg=name)
    np.testing.assert_array_equal(batch.mask.numpy(), expected.mask)
    assert not batch.timesteps.numpy()[~expected.mask].any()  # padding looks up a row that every timestep table has


def test_anchors_are_a_function_of_seed_and_draw() -> None:
    first = draw_anchors(1000, batch_size=64, seed=3, draw=7)
    np.testing.assert_array_equal(first, draw_anchors(1000, batch_size=64, seed=3, draw=7))
    assert (first != draw_anchors(1000, batch_size=64, seed=3, draw=8)).any()
    assert (first != draw_anchors(1000, batch_size=64, seed=4, draw=7)).any()


def test_a_batch_is_the_same_whatever_was_cut_before_it() -> None:
    table = WindowTable.build(make_episodes([30, 40]), length=4)
    straight, jumping = (WindowCutter(table, "cpu", seed=1, batch_size=8, share=slice(2, 7)) for _ in range(2))
    steps = [0, 1, UPDATES_A_DRAW - 1, UPDATES_A_DRAW, 3 * UPDATES_A_DRAW + 5]
    batches = [straight.batch(step) for step in steps]
    for step, batch in reversed(list(zip(steps, batches, strict=True))):
        np.testing.assert_array_equal(jumping.batch(step).observations, batch.observations)
        assert len(batch.mask) == 5
    assert not np.array_equal(batches[0].observations, batches[1].observations)


def test_anchors_are_uniform_over_transitions() -> None:
    counts = np.bincount(np.concatenate([draw_anchors(50, batch_size=1000, seed=0, draw=k).ravel() for k in range(2)]))
    assert abs(counts - 2560).max() < 5 * np.sqrt(2560)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_balanced_windows_give_every_part_of_the_returns_its_share(lengths: list[int], seed: int) -> None:
    returns = np.random.default_rng(seed).normal(size=len(lengths)).astype(np.float32)
    as_logged = balanced_shares(returns, np.array(lengths), balance=0.0)
    np.testing.assert_allclose(as_logged, np.array(lengths) / sum(lengths))
    even = balanced_shares(returns, np.array(lengths), balance=1.0)
    counts, edges = np.histogram(returns, RETURN_BINS)
    shares, _ = np.histogram(returns, edges, weights=even)
    np.testing.assert_allclose(shares[counts > 0], 1 / np.count_nonzero(counts))


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20), seed=st.integers(0, 99), draw=st.integers(0, 9))
def test_balanced_anchors_are_a_function_of_seed_and_draw(lengths: list[int], seed: int, draw: int) -> None:
    table = WindowTable.build(make_episodes(lengths), length=4)
    shares = table.balanced_shares(0.5)
    anchors = draw_shared_anchors(table.lengths, shares, batch_size=50, seed=seed, draw=draw)
    np.testing.assert_array_equal(
        anchors, draw_shared_anchors(table.lengths, shares, batch_size=50, seed=seed, draw=draw)
    )
    assert anchors.min() >= 0
    assert anchors.max() < table.num_transitions


def test_an_episode_gets_its_share_of_the_windows_and_each_of_its_steps_as_many() -> None:
    table, shares = WindowTable.build(make_episodes([4, 8]), length=4), np.array([0.75, 0.25])
    drawn = [draw_shared_anchors(table.lengths, shares, batch_size=500, seed=0, draw=draw) for draw in range(5)]
    found = np.bincount(np.concatenate(drawn).ravel(), minlength=12) / np.concatenate(drawn).size
    np.testing.assert_allclose(found, [0.75 / 4] * 4 + [0.25 / 8] * 8, atol=0.005)


def test_windows_outside_the_data_are_refused() -> None:
    data = make_episodes([3])
    with pytest.raises(IndexError, match=r"anchors must be in 0\.\.2, got 0\.\.3"):
        slice_windows(data, np.array([0, 3]), length=2)
    with pytest.raises(ValueError, match="at least one step"):
        slice_windows(data, np.array([0]), length=0)


@given(lengths, st.integers(1, 6), st.integers(0, 99))
def test_a_table_in_parts_holds_the_rows_and_the_windows_of_one_in_one_piece(
    lengths: list[int], length: int, seed: int
) -> None:
    """Wherever in memory the parts lie."""
    chance = np.random.default_rng(seed)
    finals = chance.normal(size=(len(lengths), 3)).astype(np.float32)
    data = replace(make_episodes(lengths), final_observations=finals)
    data = replace(data, returns_to_go=data.to_go())
    whole = WindowTable.build(data, length=length)
    edges = np.unique([0, *chance.integers(0, len(lengths), size=3), len(lengths)])
    parts = [data.select(range(begin, end)) for begin, end in zip(edges, edges[1:], strict=False)]
    written = {
        number: write_part([parts[number]], parts[number].num_transitions, parts[number].num_episodes,
                           length=length, discount=1.0)
        for number in chance.permutation(len(parts))
    }  # fmt: skip
    table = replace(whole, parts=tuple(written[i] for i in range(len(parts))), part_episodes=edges[:-1])
    np.testing.assert_array_equal(table.rows, whole.rows)
    np.testing.assert_array_equal(table.returns, data.to_go()[data.starts])
    shorter = int(chance.integers(1, length + 1))
    for pair in ((whole, table), (whole.shortened(shorter), table.shortened(shorter))):
        cutters = [WindowCutter(each, "cpu", seed=seed, batch_size=9, share=slice(2, 8)) for each in pair]
        for step in (0, UPDATES_A_DRAW + 1):
            expected, found = (cutter.batch(step) for cutter in cutters)
            assert expected.terminated is not None
            assert found.followed is not None
            for name, values in vars(expected).items():
                seen = expected.mask if values.shape[:2] == expected.mask.shape else ...  # not what stands at padding
                torch.testing.assert_close(getattr(found, name)[seen], values[seen], rtol=0, atol=0)
            last = expected.mask.sum(dim=1)
            ends = torch.nonzero(found.followed & (last < pair[0].length)).flatten()  # what came next stands behind
            behind = [batch.observations[ends, last[ends]] for batch in (expected, found)]
            torch.testing.assert_close(*behind, rtol=0, atol=0)


def test_parts_of_a_table_lie_behind_one_another_where_they_are_copied_to() -> None:
    parts = tuple(np.full((rows, 3), rows, np.float32) for rows in (2, 5, 1))
    floats, begins = one_run(parts, "meta")
    assert len(floats) == 24
    assert begins.tolist() == [0, 6, 21]
