"""Published returns of environments: of random actions, and of the reference whose score is 1."""

from __future__ import annotations

from typing import NamedTuple

from dt_ray.environments import pendulum


class ReferenceReturns(NamedTuple):
    """The returns at which a score is 0 and 1, and who published them."""

    random: float
    reference: float
    source: str


# D4RL's REF_MIN_SCORE and REF_MAX_SCORE (Fu et al. 2020, arXiv:2004.07219; d4rl/infos.py): a random policy and a fully
# trained SAC, measured in the -v2 environments and used since for all versions of them.
D4RL = {
    "Ant": (-325.6, 3879.7),
    "HalfCheetah": (-280.178953, 12135.0),
    "Hopper": (-20.272305, 3234.3),
    "Walker2d": (1.629008, 4592.3),
}


def reference_returns(env_id: str) -> ReferenceReturns | None:
    """The published returns of an environment; None where there are none."""
    if env_id == pendulum.ENV_ID:
        return ReferenceReturns(pendulum.RANDOM_RETURN, pendulum.REFERENCE_RETURN, "measured on seeds 0..99")
    name, _, version = env_id.partition("-v")
    known = D4RL.get(name)
    if known is None or not version.isdigit():
        return None
    return ReferenceReturns(*known, "by D4RL, whose score is 100 times this one")
