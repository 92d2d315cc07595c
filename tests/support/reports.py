"""Evaluation reports of a given mean."""

from dt_ray.runs.evaluation_report import EvaluationReport, TargetResult
from dt_ray.runs.offline_report import Diagnostics, OfflineReport, OfflineTarget


def make_report(step: int, *means: float, env_id: str | None = "Pendulum-v1") -> EvaluationReport:
    """A report with a target return for each mean: -100, 0, 100 and so on."""
    targets = tuple(
        TargetResult(
            target_return=100.0 * (place - 1),
            return_mean=mean,
            return_std=0.0,
            return_ci95=(mean, mean),
            normalized_score=None,
            episode_returns=(mean,),
            episode_lengths=(20,),
        )
        for place, mean in enumerate(means)
    )
    return EvaluationReport(
        step=step, env_id=env_id, num_episodes=1, seed=0, wall_s=0.5, env_steps_per_s=40.0, targets=targets
    )


def make_offline_report(
    *, step: int, best_target: float | None, supported: tuple[float, float], estimate: float = 0.0
) -> OfflineReport:
    """Estimates that recommend a target return, where `estimate` is reached."""
    target = OfflineTarget(
        target_return=0.0 if best_target is None else best_target,
        estimated_return=None if best_target is None else estimate,
        interval90=None if best_target is None else (estimate - 1.0, estimate + 1.0),
        supported_share=1.0,
        nearest_episodes=(),
        nearest_returns=(),
        doubts=("nothing is known",) if best_target is None else (),
        diagnostics=Diagnostics(
            estimate=estimate, half_width=1.0, disagreement=1.0, fragility=0.0, share_cut=0.0, mean_length=9.0
        ),
    )
    return OfflineReport(
        step=step,
        log=("log",),
        world_model="world",
        num_starts=1,
        logged_returns=supported,
        supported=supported,
        best_target=best_target,
        targets=(target,),
        wall_s=0.5,
    )
