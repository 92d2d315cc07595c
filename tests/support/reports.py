"""Evaluation reports of a given mean."""

from dt_ray.runs.evaluation_report import EvaluationReport, TargetResult


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
