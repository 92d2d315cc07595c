"""Logs of several kinds of plants, and the faults that people find in such logs, planted into one episode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy import ndarray
from numpy.random import Generator

from dt_ray.data import TransitionDataset
from dt_ray.data.transitions import join_episodes

Log = TransitionDataset
Fault = Callable[[Log, Generator, Log], Log]  # of an episode and the log that it is in


def _episode(observations: ndarray, actions: ndarray, rewards: ndarray, *, terminated: bool = False) -> Log:
    num = len(rewards)
    last = np.arange(num) == num - 1
    return TransitionDataset(
        observations=np.asarray(observations, np.float32).reshape(num, -1),
        actions=np.asarray(actions, np.float32).reshape(num, -1),
        rewards=np.asarray(rewards, np.float32),
        terminated=last & terminated,
        truncated=last & (not terminated),
        starts=np.zeros(1, np.int64),
    )


def linear_system(generator: Generator, num: int) -> list[TransitionDataset]:
    """Seven coupled states, two actions by a noisy feedback, 150 steps, rewards by the squares."""
    order = np.linalg.qr(generator.normal(size=(7, 7)))[0]
    passive = order @ np.diag(generator.uniform(0.9, 0.99, 7)) @ order.T
    drive, gain = generator.normal(size=(7, 2)) * 0.3, generator.normal(size=(2, 7)) * 0.15
    scales = 10.0 ** generator.integers(-1, 3, size=7)
    episodes = []
    for _ in range(num):
        state = generator.normal(size=7)
        seen, acted, paid = [], [], []
        for _ in range(150):
            action = np.clip(gain @ state + generator.normal(size=2) * 0.4, -1, 1)
            seen.append(state * scales)
            acted.append(action)
            paid.append(-(state @ state) - 0.1 * (action @ action))
            state = passive @ state + drive @ action + generator.normal(size=7) * 0.02
        episodes.append(_episode(np.array(seen), np.array(acted), np.array(paid)))
    return episodes


def point_mass(generator: Generator, num: int) -> list[TransitionDataset]:
    """A point that is driven to a goal: lengths differ, the environment ends most episodes, skill differs too."""
    episodes = []
    for _ in range(num):
        place, speed = generator.uniform(-1, 1, 2) * 4, np.zeros(2)
        skill = generator.uniform(0.3, 1.0)
        seen, acted, paid, reached = [], [], [], False
        for _ in range(200):
            action = np.clip(-skill * place - 1.2 * speed + generator.normal(size=2) * 0.3, -1, 1)
            seen.append(np.concatenate([place, speed]))
            acted.append(action)
            speed = 0.95 * speed + 0.1 * action + generator.normal(size=2) * 0.005
            place = place + 0.1 * speed
            reached = bool(np.abs(place).max() < 0.15)
            paid.append(-np.abs(place).sum() + 10.0 * reached)
            if reached:
                break
        episodes.append(_episode(np.array(seen), np.array(acted), np.array(paid), terminated=reached))
    return episodes


def heated_hall(generator: Generator, num: int) -> list[TransitionDataset]:
    """Temperatures in tenths of a degree, a heater and a fan, a day of 96 steps; a column that never changes."""
    episodes = []
    for _ in range(num):
        outside = generator.normal(5, 4)
        inside, wall, wanted = generator.normal(18, 1.5), generator.normal(14, 2), 20 + generator.normal() * 0.5
        seen, acted, paid = [], [], []
        for step in range(96):
            weather = outside + 4 * np.sin(2 * np.pi * (step / 96 - 0.3)) + generator.normal() * 0.3
            heat = np.clip(0.4 * (wanted - inside) + 0.3 + generator.normal() * 0.15, 0, 1)
            fan = np.clip(0.2 + generator.normal() * 0.2, 0, 1)
            seen.append(np.round([inside, wall, weather, 101.3], 1))
            acted.append([heat, fan])
            inside += 0.9 * heat + 0.10 * (wall - inside) - (0.02 + 0.05 * fan) * (inside - weather)
            wall += 0.05 * (inside - wall) + 0.02 * (weather - wall)
            paid.append(-abs(inside - wanted) - 0.3 * heat)
        episodes.append(_episode(np.array(seen), np.array(acted), np.array(paid)))
    return episodes


def pendulum(generator: Generator, num: int) -> list[TransitionDataset]:
    """Swinging up with more or less skill: Gymnasium's formulas, 200 steps."""
    episodes = []
    for _ in range(num):
        angle, speed, skill = generator.uniform(-np.pi, np.pi), generator.uniform(-1, 1), generator.uniform()
        seen, acted, paid = [], [], []
        for _ in range(200):
            turned = (angle + np.pi) % (2 * np.pi) - np.pi
            energy = 0.5 * speed**2 + 15 * (np.cos(angle) - 1)
            wise = -12 * turned - 3 * speed if np.cos(angle) > 0.9 else -np.sign(speed) * energy
            action = np.clip(skill * wise + (1 - skill) * generator.uniform(-2, 2) + generator.normal() * 0.2, -2, 2)
            seen.append([np.cos(angle), np.sin(angle), speed])
            acted.append([action])
            paid.append(-(turned**2 + 0.1 * speed**2 + 0.001 * action**2))
            speed = np.clip(speed + (15 * np.sin(angle) + 3 * action) * 0.05, -8, 8)
            angle = angle + speed * 0.05
        episodes.append(_episode(np.array(seen), np.array(acted), np.array(paid)))
    return episodes


def robot_arm(generator: Generator, num: int) -> list[TransitionDataset]:
    """Four joints that follow swinging targets: angles, speeds and targets, episodes of 180 to 240 steps."""
    episodes = []
    for _ in range(num):
        angle, speed = generator.normal(size=4) * 0.3, np.zeros(4)
        pace, phase = generator.uniform(0.02, 0.06, 4), generator.uniform(0, 6, 4)
        seen, acted, paid = [], [], []
        for step in range(int(generator.integers(180, 240))):
            target = np.array([1.0, 0.8, 0.6, 0.4]) * np.sin(pace * step + phase)
            action = np.clip(6 * (target - angle) - 2 * speed + generator.normal(size=4) * 0.2, -3, 3)
            seen.append(np.concatenate([angle, speed, target]))
            acted.append(action)
            paid.append(-((target - angle) ** 2).sum() - 0.01 * (action**2).sum())
            speed = 0.98 * speed + 0.05 * action + generator.normal(size=4) * 0.002
            angle = angle + 0.05 * speed
        episodes.append(_episode(np.array(seen), np.array(acted), np.array(paid)))
    return episodes


PLANTS: dict[str, Callable[[Generator, int], list[TransitionDataset]]] = {
    each.__name__: each for each in (linear_system, point_mass, heated_hall, pendulum, robot_arm)
}


def moving_columns(episode: TransitionDataset) -> ndarray:
    return np.flatnonzero(np.ptp(episode.observations, axis=0) > 0)


def stuck_sensor(episode: Log, generator: Generator, log: Log) -> Log:
    """From some step in the first half on a sensor shows the same number."""
    observations = episode.observations.copy()
    column = generator.choice(moving_columns(episode))
    begin = int(generator.integers(0, max(1, episode.num_transitions // 2)))
    observations[begin:, column] = observations[begin, column]
    return replace(episode, observations=observations)


def spike(episode: Log, generator: Generator, log: Log) -> Log:
    """One number of a sensor lies ten of its standard deviations off."""
    observations = episode.observations.copy()
    column = generator.choice(moving_columns(episode))
    step = int(generator.integers(1, episode.num_transitions - 1))
    observations[step, column] += 10 * log.observations[:, column].std() * generator.choice([-1, 1])
    return replace(episode, observations=observations)


def swapped_columns(episode: Log, generator: Generator, log: Log) -> Log:
    observations = episode.observations.copy()
    one, other = generator.choice(moving_columns(episode), 2, replace=False)
    observations[:, [one, other]] = observations[:, [other, one]]
    return replace(episode, observations=observations)


def other_units(episode: Log, generator: Generator, log: Log) -> Log:
    """A column in degrees, percent, millimetres or Fahrenheit."""
    observations = episode.observations.copy()
    column = generator.choice(moving_columns(episode))
    factor = generator.choice([180 / np.pi, 100, 1000, 0.01, np.pi / 180, 1.8, 2.54])
    observations[:, column] = observations[:, column] * factor + (32 if factor == 1.8 else 0)
    return replace(episode, observations=observations)


def shifted_rewards(episode: Log, generator: Generator, log: Log) -> Log:
    shift = generator.choice([-2, 2]) * log.rewards.std()
    return replace(episode, rewards=(episode.rewards + shift).astype(np.float32))


def scaled_rewards(episode: Log, generator: Generator, log: Log) -> Log:
    return replace(episode, rewards=episode.rewards * np.float32(generator.choice([0.1, 10, 100, -1])))


def idle_actions(episode: Log, generator: Generator, log: Log) -> Log:
    """The log has zeros where the plant was driven."""
    return replace(episode, actions=np.zeros_like(episode.actions))


def unconnected_actions(episode: Log, generator: Generator, log: Log) -> Log:
    """The logged actions are others than those that drove the plant."""
    return replace(episode, actions=generator.permutation(episode.actions))


def saturated_actions(episode: Log, generator: Generator, log: Log) -> Log:
    low, high = log.actions.min(axis=0), log.actions.max(axis=0)
    return replace(episode, actions=np.where(episode.actions > (low + high) / 2, high, low).astype(np.float32))


def cut_episode(episode: Log, generator: Generator, log: Log) -> Log:
    """The log stops in the first tenth to half of it."""
    num = max(3, int(episode.num_transitions * generator.uniform(0.1, 0.5)))
    return _rows(episode, np.arange(num), ended=False)


def repeated_rows(episode: Log, generator: Generator, log: Log) -> Log:
    """Five to twenty rows are there twice, one after the other."""
    num = episode.num_transitions
    twice = generator.choice(num - 1, min(num // 3, int(generator.integers(5, 20))), replace=False)
    return _rows(episode, np.sort(np.concatenate([np.arange(num), twice])))


def jump(episode: Log, generator: Generator, log: Log) -> Log:
    """From some step on, a sensor is four of its standard deviations off."""
    column = generator.choice(moving_columns(episode))
    observations = episode.observations.copy()
    step = int(generator.integers(episode.num_transitions // 4, 3 * episode.num_transitions // 4 + 1))
    observations[step:, column] += 4 * log.observations[:, column].std() * generator.choice([-1, 1])
    return replace(episode, observations=observations)


FAULTS: dict[str, Fault] = {
    each.__name__: each
    for each in (
        stuck_sensor, spike, swapped_columns, other_units, shifted_rewards, scaled_rewards, idle_actions,
        unconnected_actions, saturated_actions, cut_episode, repeated_rows, jump,
    )
}  # fmt: skip


def plant(data: TransitionDataset, faults: dict[int, str], generator: Generator) -> Log:
    """The same log with these faults, by episode."""
    episodes = [data.select([index]) for index in range(data.num_episodes)]
    for index, fault in faults.items():
        episodes[index] = FAULTS[fault](episodes[index], generator, data)
    return join_episodes(episodes)


def make_log(plant_name: str, seed: int, num: int) -> Log:
    return join_episodes(PLANTS[plant_name](np.random.default_rng(seed), num))


def _rows(episode: TransitionDataset, rows: ndarray, *, ended: bool = True) -> Log:
    last = np.arange(len(rows)) == len(rows) - 1
    is_terminated = ended and bool(episode.terminated[-1])
    return TransitionDataset(
        observations=episode.observations[rows],
        actions=episode.actions[rows],
        rewards=episode.rewards[rows],
        terminated=last & is_terminated,
        truncated=last & (not is_terminated),
        starts=np.zeros(1, np.int64),
    )
