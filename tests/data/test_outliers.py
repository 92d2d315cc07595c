"""Faults planted into logs of several plants are found, episodes without one are left alone, and reasons name them."""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import pytest
from support.planted import FAULTS, PLANTS, make_log, plant

from dt_ray.data import TransitionDataset
from dt_ray.data.description.column_facts import column_names_of
from dt_ray.data.description.episode_features import EpisodeFeatures, FeatureCollector, join_features
from dt_ray.data.description.outliers import Outlier, Signal, rank_outliers, robust_scores
from dt_ray.data.description.signals import find_outliers
from dt_ray.data.transitions import join_episodes

SEEDS = (201, 202, 203)
NUM_EPISODES = 150
KINDS = {  # what people call them: the faults that are planted
    "a stuck sensor": ("stuck_sensor",),
    "a spike": ("spike",),
    "swapped or scaled columns": ("swapped_columns", "other_units"),
    "a reward that is shifted or scaled": ("shifted_rewards", "scaled_rewards"),
    "actions that do nothing or are saturated": ("idle_actions", "unconnected_actions", "saturated_actions"),
    "a cut episode": ("cut_episode",),
    "repeated rows": ("repeated_rows",),
    "a jump between steps": ("jump",),
}


def outliers_of(data: TransitionDataset) -> dict[int, Outlier]:
    found = find_outliers(EpisodeFeatures.of(data), column_names_of(data, {}))
    return {each.episode: each for each in found}


@pytest.fixture(scope="module")
def counts() -> tuple[Mapping[str, list[bool]], list[float]]:
    """For each fault whether it was found, and of each log the share of sound episodes that were called outliers."""
    found_of: dict[str, list[bool]] = defaultdict(list)
    false_alarms: list[float] = []
    for name in PLANTS:
        for seed in SEEDS:
            generator = np.random.default_rng(seed)
            sound = make_log(name, seed, NUM_EPISODES)
            places = generator.choice(NUM_EPISODES, len(FAULTS), replace=False)
            faults = dict(zip(places.tolist(), FAULTS, strict=True))
            found = outliers_of(plant(sound, faults, generator))
            for place, fault in faults.items():
                found_of[fault].append(place in found)
            false_alarms.append(len(set(found) - set(faults)) / (NUM_EPISODES - len(faults)))
            false_alarms.append(len(outliers_of(sound)) / NUM_EPISODES)
    return found_of, false_alarms


@pytest.mark.parametrize("kind", KINDS)
def test_nine_of_ten_planted_episodes_of_each_kind_are_found(
    kind: str, counts: tuple[Mapping[str, list[bool]], list[float]]
) -> None:
    found = [each for fault in KINDS[kind] for each in counts[0][fault]]
    assert np.mean(found) >= 0.9, f"{sum(found)} of {len(found)}"


def test_at_most_one_in_twenty_sound_episodes_is_called_an_outlier(
    counts: tuple[Mapping[str, list[bool]], list[float]],
) -> None:
    assert np.mean(counts[1]) <= 0.05
    assert max(counts[1]) <= 0.1  # of any one log


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("stuck_sensor", "stuck sensor", "has the same value for"),
        ("spike", "spike", "and back at the next one"),
        ("shifted_rewards", "other rewards", "its rewards are not those of the others"),
        ("idle_actions", "constant action", "has the same value for"),
        ("saturated_actions", "saturated actions", "100% of its actions"),
        ("cut_episode", "cut episode", "it stops after"),
        ("repeated_rows", "repeated rows", "rows are there twice"),
        ("jump", "jump", "from the step before to step"),
    ],
)
def test_an_outlier_says_what_was_planted(fault: str, kind: str, words: str) -> None:
    data = plant(make_log("robot_arm", 7, 40), {11: fault}, np.random.default_rng(7))
    outlier = outliers_of(data)[11]
    assert outlier.kinds[0] == kind
    assert words in outlier.reasons[0]


def test_swapped_columns_are_named() -> None:
    data = make_log("robot_arm", 7, 40)
    episodes = [data.select([index]) for index in range(40)]
    episodes[5].observations[:, [0, 4]] = episodes[5].observations[:, [4, 0]]
    reasons = " ".join(outliers_of(join_episodes(episodes))[5].reasons)
    assert "observation dimension 0 and observation dimension 4 look swapped" in reasons


def test_what_many_episodes_have_is_no_outlier() -> None:
    data = make_log("robot_arm", 3, 60)
    episodes = [data.select([index]) for index in range(60)]
    for episode in episodes[::5]:
        episode.observations[40:, 2] = episode.observations[40, 2]
    assert len(outliers_of(join_episodes(episodes))) <= 3


def test_few_episodes_have_no_outliers() -> None:
    data = plant(make_log("pendulum", 0, 9), {2: "spike"}, np.random.default_rng(0))
    assert not outliers_of(data)


def test_scores_are_deviations_from_the_median_by_robust_spreads() -> None:
    values = np.append(np.random.default_rng(0).normal(3, 2, size=2000), [3 + 2 * 8, np.nan])[:, None]
    scores = robust_scores(values, floor=0.0)
    assert scores[2000, 0] == pytest.approx(8, rel=0.1)
    assert scores[2001, 0] == 0
    np.testing.assert_array_equal(robust_scores(np.full((20, 1), 4.0), floor=0.1), 0)


def test_the_strongest_signal_ranks_and_the_first_explains() -> None:
    weak, strong = np.zeros((30, 1)), np.zeros((30, 1))
    weak[[3, 4]], strong[4] = 7.0, 50.0
    signals = [
        Signal(kind=name, values=values, floor=1.0, say=lambda e, _, name=name: f"{name} of {e}")
        for name, values in (("first", weak), ("second", strong))
    ]
    ranked = rank_outliers(signals)
    assert [each.episode for each in ranked] == [4, 3]
    assert ranked[0].kinds == ("first", "second")
    assert ranked[0].reasons == ("first of 4", "second of 4")


def test_features_do_not_depend_on_how_a_log_is_cut_into_parts() -> None:
    data = make_log("point_mass", 1, 12)
    whole = EpisodeFeatures.of(data)
    parts = [EpisodeFeatures.of(data.select(episodes)) for episodes in ([7, 8, 9, 10, 11], [0, 1], [2, 3, 4, 5, 6])]
    joined = join_features(parts)
    for name in whole.__dataclass_fields__:
        np.testing.assert_allclose(getattr(joined, name), getattr(whole, name), rtol=1e-12, err_msg=name)


def test_a_large_part_is_looked_at_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_log("point_mass", 1, 12)
    collector = FeatureCollector()
    monkeypatch.setattr("dt_ray.data.description.episode_features.MAX_STEPS", 100)
    collector.add(data)
    np.testing.assert_array_equal(collector.joined().digests, EpisodeFeatures.of(data).digests)


def test_the_samples_of_many_episodes_stay_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dt_ray.data.description.episode_features.MAX_SAMPLED", 20_000)
    collector = FeatureCollector()
    data = make_log("point_mass", 2, 10)
    for _ in range(12):
        collector.add(data)
    features = collector.joined()
    assert features.num_episodes == 120
    assert features.rows.size + features.next_observations.size <= 20_000
