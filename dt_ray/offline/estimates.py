"""Estimates of the returns that a policy will reach, by rollouts in a world model of the log, with its own history.

Legend: M members, N episodes, E starts, Q quantiles, S observation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from dt_ray.config.schema import EvaluationConfig
from dt_ray.data.held_out import HeldOutEpisodes
from dt_ray.data.normalizer import Normalizer
from dt_ray.learners.base import Policy
from dt_ray.models.world_model import WorldModel
from dt_ray.offline.calibration import Calibration, calibrate
from dt_ray.offline.learned_environments import LearnedEnvironments
from dt_ray.play.rollout import play_in
from dt_ray.runs.offline_report import MOSTLY, Diagnostics, OfflineReport, OfflineTarget

NUM_STARTS = 50, 300  # at least, if the log has them, and at most
NUM_STEPS = 100_000  # of rollouts: long episodes get fewer starts
NUM_MEMBER_STARTS = 20  # of those, for each member alone and for the others without it
NUM_NEAREST = 3
NUM_CANDIDATES = 5  # target returns that `auto` chooses among, beside those asked for
NUM_EPISODES = 100  # real ones, whose mean an interval is about
LEVEL = 1.645  # standard deviations of a 90% interval
MARGIN = 0.02  # of the range of the logged returns
LEAST_ABOVE = 0.05  # of that range: what an estimate counts as above the worst logged return, at least
LIMIT = 10.0  # times the disagreement that one held-out step of a thousand has: there a rollout ends
# An estimate is not believed where the members disagree so many times as much as on held-out episodes, where so many
# rollouts were ended, where errors in each step change so large a share of it, above the lowest logged return, or where
# its interval is so wide, as a share of the range of the logged returns.
MAX_DISAGREEMENT, MAX_CUT, MAX_FRAGILITY, MAX_HALF_WIDTH = 3.0, 0.1, 0.6, 0.25


@dataclass(frozen=True, kw_only=True)
class World:
    """A world model with what it does on held-out episodes."""

    model: WorldModel
    normalizer: Normalizer
    held_out: HeldOutEpisodes
    calibration: Calibration
    place: str  # its checkpoint
    log: tuple[str, ...]

    @classmethod
    def of(
        cls, model: WorldModel, normalizer: Normalizer, held_out: HeldOutEpisodes, *, place: str, log: tuple[str, ...]
    ) -> World:
        calibration = calibrate(model, normalizer, held_out)
        return cls(model=model, normalizer=normalizer, held_out=held_out, calibration=calibration, place=place, log=log)


def estimate_returns(
    policy: Policy, world: World, config: EvaluationConfig, *, step: int, explores: bool = True
) -> OfflineReport:
    """What a policy will reach at the target returns of `config`, and, if it `explores`, at some that the log supports.

    Of a policy that looks at no target return there is one estimate.
    """
    began = time.perf_counter()
    is_asked = getattr(policy, "return_scale", 1.0) != 0.0
    starts = choose_starts(world.held_out.starts.observations, config)
    quantiles = return_quantiles(world, starts)
    supported = supported_targets(quantiles)
    targets = list(dict.fromkeys([*config.target_returns, *(candidates(supported) if is_asked and explores else ())]))
    if not is_asked:
        targets = targets[:1] or [0.0]
    found = [
        estimate_return(policy, world, starts, quantiles, config, target_return=target, is_asked=is_asked)
        for target in targets
    ]
    returns = world.held_out.starts.returns
    return OfflineReport(
        step=step,
        log=world.log,
        world_model=world.place,
        num_starts=len(starts),
        logged_returns=(float(returns.min()), float(returns.max())),
        supported=supported,
        best_target=best_target(found),
        targets=tuple(found),
        wall_s=round(time.perf_counter() - began, 3),
    )


def estimate_return(
    policy: Policy,
    world: World,
    starts: Float[ndarray, "E S"],
    quantiles: Float[ndarray, "E Q"],
    config: EvaluationConfig,
    *,
    target_return: float,
    is_asked: bool,
) -> OfflineTarget:
    """The estimate for one target return, its interval and the reasons to doubt it."""
    logged = world.held_out.starts
    found = diagnose(roll_out(policy, world, starts, config, target_return=target_return), world)
    doubts = tuple(reasons_to_doubt(found, float(np.ptp(logged.returns))))
    nearest = logged.nearest(target_return, NUM_NEAREST) if is_asked else np.zeros(0, np.int64)
    return OfflineTarget(
        target_return=target_return,
        estimated_return=None if doubts else found.estimate,
        interval90=None if doubts else (found.estimate - found.half_width, found.estimate + found.half_width),
        supported_share=supported_share(target_return, quantiles) if is_asked else None,
        nearest_episodes=tuple(logged.episode_ids[nearest].tolist()),
        nearest_returns=tuple(logged.returns[nearest].tolist()),
        doubts=doubts,
        diagnostics=found,
    )


@dataclass(frozen=True, kw_only=True)
class ModelRollouts:
    """Returns of rollouts in a world model: from E starts, and from the first K of them in other ways."""

    returns: Float[ndarray, "E"]  # in the mean of all members
    single: Float[ndarray, "M K"]  # in one member
    without: Float[ndarray, "M K"]  # in the mean of the others
    noisy: Float[ndarray, "K"]  # in the mean of all, with errors as large as their own in each step
    lengths: Int[ndarray, "E"]
    disagreements: Float[ndarray, "E"]  # of the members, summed over the steps
    is_cut: Bool[ndarray, "E"]
    cut_ranges: Float[ndarray, "E"]


def roll_out(
    policy: Policy, world: World, starts: Float[ndarray, "E S"], config: EvaluationConfig, *, target_return: float
) -> ModelRollouts:
    """Rolls a policy out in all these ways, as one batch."""
    num, few, members = len(starts), min(len(starts), NUM_MEMBER_STARTS), world.model.num_members
    begins = np.concatenate([starts, *[starts[:few]] * (2 * members + 1)])
    envs = LearnedEnvironments(
        world.model,
        world.normalizer,
        begins,
        member_weights(num, few, members),
        disagreement_limit=LIMIT * world.calibration.high_disagreement,
        noise=(torch.arange(len(begins)) >= len(begins) - few).float(),
    )
    asked = [target_return] * len(begins)
    steps, name = config.max_timesteps, "the log's world model"
    played = play_in(envs, policy, range(len(begins)), asked, max_timesteps=steps, name=name)
    single, without = played.returns[num:-few].reshape(2, members, few)
    return ModelRollouts(
        returns=played.returns[:num],
        single=single,
        without=without,
        noisy=played.returns[-few:],
        lengths=played.lengths[:num],
        disagreements=envs.disagreements[:num],
        is_cut=envs.is_cut[:num],
        cut_ranges=envs.cut_ranges[:num],
    )


def diagnose(rollouts: ModelRollouts, world: World) -> Diagnostics:
    """The estimate, the half width of its interval, and what it is judged by.

    The interval is one of the mean of `NUM_EPISODES` real episodes, and has these parts. Starts: the standard error of
    the mean over them, and over those episodes. Members: the standard deviation of their single estimates over the root
    of their number, or the jackknife's where it is larger. Extrapolation: the mean of all members has 1/M of a member's
    squared error, so that what changes from one to all of them, over M - 1, is what would change from there to none
    (Cook and Stefanski 1994). Replays: the systematic error of rewards on held-out episodes, for every step. Cuts: half
    of the range of the returns that the log has where rollouts ended early.
    """
    calibration, logged = world.calibration, world.held_out.starts.returns
    num, (members, few) = len(rollouts.returns), rollouts.single.shape
    estimate, of_few = float(rollouts.returns.mean()), rollouts.returns[:few].mean()
    single, without = rollouts.single.mean(axis=1), rollouts.without.mean(axis=1)
    spread = single.std(ddof=1) / math.sqrt(members)
    jackknife = math.sqrt((members - 1) / members * np.square(without - without.mean()).sum())
    parts = (
        LEVEL * rollouts.returns.std() * math.sqrt(1 / max(1, num - 1) + 1 / NUM_EPISODES),
        _student(members - 1) * max(spread, jackknife),
        LEVEL * (of_few - single.mean()) / (members - 1),
        LEVEL * calibration.reward_error * rollouts.lengths.mean(),
        rollouts.cut_ranges.mean() / 2,
    )
    above_worst = max(estimate - logged.min(), LEAST_ABOVE * np.ptp(logged), 1e-9)
    return Diagnostics(
        estimate=estimate,
        half_width=float(np.sqrt(np.square(parts).sum())),
        disagreement=float(rollouts.disagreements.sum() / rollouts.lengths.sum() / calibration.disagreement),
        fragility=float(abs(rollouts.noisy.mean() - of_few) / above_worst),
        share_cut=float(rollouts.is_cut.mean()),
        mean_length=float(rollouts.lengths.mean()),
    )


def reasons_to_doubt(found: Diagnostics, width: float) -> list[str]:
    """Why an estimate should not be believed, in words; `width` is the range of the logged returns."""
    reasons: list[str] = []
    if not (math.isfinite(found.estimate) and math.isfinite(found.half_width)):
        return ["the rollouts in the world model did not stay finite"]
    if found.share_cut > MAX_CUT:
        reasons.append(f"{found.share_cut:.0%} of the rollouts left what the log has")
    if found.disagreement > MAX_DISAGREEMENT:
        reasons.append(
            f"along the rollouts the world models disagree {found.disagreement:.1f} times as much as on held-out "
            f"episodes: the policy goes where the log has little"
        )
    if found.fragility > MAX_FRAGILITY:
        reasons.append(
            f"with errors as large as the world model's own, the rollouts earn {found.fragility:.0%} less or more: the "
            f"policy may not bear what the model does not know"
        )
    share = found.half_width / max(width, 1e-9)
    if share > MAX_HALF_WIDTH:
        reasons.append(f"the interval is ± {share:.0%} of the range of the logged returns")
    return reasons


def best_target(found: Sequence[OfflineTarget]) -> float | None:
    """The target return with the highest estimate, of those that the log supports and whose estimates are believed."""
    backed = [(each.estimated_return, each.target_return) for each in found if each.is_backed]
    return max(backed)[1] if backed else None


def member_weights(num: int, few: int, members: int) -> Float[Tensor, "N M"]:
    """Of all members for `num` episodes and for the last `few`.

    Between them, for `few` episodes each: of every member alone, and of all but it.
    """
    alone = torch.eye(members)
    others = (1 - alone) / (members - 1)
    every = torch.full((num + few, members), 1 / members)
    parts = every[:num], alone.repeat_interleave(few, dim=0), others.repeat_interleave(few, dim=0), every[num:]
    return torch.cat(parts)


@torch.inference_mode()
def return_quantiles(world: World, starts: Float[ndarray, "E S"]) -> Float[ndarray, "E Q"]:
    """`QUANTILES` of the returns that the log has from these starts, in the environment's units.

    The outermost ones are moved outwards by `MARGIN`, since few episodes tell where they are.
    """
    observations = torch.as_tensor(world.normalizer.normalize_observations(starts))
    quantiles = world.model.return_quantiles(observations, torch.zeros(len(starts), dtype=torch.int64))
    found = np.sort(quantiles.double().numpy(), axis=1) / world.normalizer.return_scale
    margin = MARGIN * float(np.ptp(world.held_out.starts.asked))
    found[:, 0] -= margin
    found[:, -1] += margin
    return found


def supported_targets(quantiles: Float[ndarray, "E Q"]) -> tuple[float, float]:
    """The lowest and the highest target return that at least half of the starts support."""
    low, high = np.quantile(quantiles[:, 0], MOSTLY), np.quantile(quantiles[:, -1], 1 - MOSTLY)
    return float(low), float(high)


def supported_share(target_return: float, quantiles: Float[ndarray, "E Q"]) -> float:
    """The share of starts from which the log has returns on either side of a target return; any start supports max."""
    if target_return == math.inf:
        return 1.0
    return float(((quantiles[:, 0] <= target_return) & (target_return <= quantiles[:, -1])).mean())


def candidates(supported: tuple[float, float]) -> list[float]:
    """Target returns among which the best one is looked for: the upper half of what is supported."""
    low, high = supported
    return [float(f"{value:.4g}") for value in np.linspace(high, (low + high) / 2, NUM_CANDIDATES)]


def choose_starts(observations: Float[ndarray, "E S"], config: EvaluationConfig) -> Float[ndarray, "E S"]:
    """As many of the log's starts, at random, as there are steps for."""
    num = int(np.clip(NUM_STEPS // config.max_timesteps, *NUM_STARTS))
    return observations[np.random.default_rng(0).permutation(len(observations))[:num]]


def _student(degrees: int) -> float:
    """Standard deviations of a 90% interval of a mean, by Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.95))
