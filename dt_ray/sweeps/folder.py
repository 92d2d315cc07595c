"""A sweep on disk: `sweeps/NAME/` with its settings, a run for each trial, their results and the best of them."""

from __future__ import annotations

from collections.abc import Sequence

from dt_ray.config.loading import parse_yaml
from dt_ray.config.schema import EvaluationConfig
from dt_ray.data.spaces import needed_environment
from dt_ray.errors import ConfigError, RunError
from dt_ray.play.evaluation import evaluate
from dt_ray.runs.checkpoint import checkpoint_name, load_policy
from dt_ray.runs.evaluation_report import EvaluationReport
from dt_ray.runs.folder import RunFolder
from dt_ray.runs.lease import Lease, check_new, clear
from dt_ray.runs.storage import Folder
from dt_ray.sweeps.config import SweepConfig
from dt_ray.sweeps.loading import decode_sweep

# Where things are and how many may run: nothing that a trial's results depend on.
KEYS_CHANGED_ON_RESUME = ("data.path", "data.values", "data.mix", "evaluation.max_envs", "max_concurrent")


class SweepFolder:
    """The files of one sweep, by name."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.trials = folder / "trials"

    @classmethod
    def of(cls, sweep: SweepConfig) -> SweepFolder:
        assert sweep.base.name is not None, "a sweep is named before it starts"
        return cls(Folder.at(sweep.base.storage_path) / sweep.base.name)

    def __str__(self) -> str:
        return str(self.folder)

    def check_free(self) -> None:
        """Raises:
        RunError: a sweep of this name exists, or another process makes it.
        """
        Lease(self.folder).check_free()
        check_new(self.folder)

    def create(self, sweep: SweepConfig, *, overwrite: bool = False) -> None:
        """Makes the folder with `sweep.yaml` in it.

        Raises:
            RunError: something of this name exists and may not be replaced.
        """
        if overwrite:
            clear(self.folder, kind="sweep", known_by="sweep.yaml")
        else:
            check_new(self.folder)
        self.write(sweep)

    def is_sweep(self) -> bool:
        return (self.folder / "sweep.yaml").exists()

    def write(self, sweep: SweepConfig) -> None:
        """Writes `sweep.yaml`."""
        (self.folder / "sweep.yaml").write_text(sweep.to_yaml())

    def read(self, overrides: Sequence[str] = ()) -> SweepConfig:
        """The sweep as it was started, at its present folder; `overrides` may give new places of its data.

        Raises:
            RunError: the folder is no sweep.
            ConfigError: an override is wrong, or changes what its trials have in common.
        """
        if not self.is_sweep():
            raise RunError(f"{self} is no sweep: there is no sweep.yaml in it")
        tree = parse_yaml((self.folder / "sweep.yaml").read_text(), source=f"{self}/sweep.yaml")
        config = tree.pop("config") | {"storage_path": self.folder.parent.uri, "name": self.folder.name}
        changed = [override.partition("=")[0] for override in overrides]
        if fixed := [key for key in changed if key not in KEYS_CHANGED_ON_RESUME]:
            raise ConfigError(
                f"a resumed sweep keeps its {', '.join(fixed)}; it takes {', '.join(KEYS_CHANGED_ON_RESUME)}; start a "
                f"new sweep to change the rest"
            )
        return decode_sweep(tree, config, overrides, default_name=self.folder.name)

    def trial_names(self) -> list[str]:
        return [name for name in self.trials.names() if not name.startswith(".")]

    def trial(self, name: str) -> RunFolder:
        return RunFolder(self.trials / name)

    def further_evaluation(self, name: str, number: int, step: int) -> Folder:
        """The file of a trial's evaluation under other settings than those it was trained with."""
        return self.folder / "evaluations" / name / f"{number}-{checkpoint_name(step)}.json"


def result_of(run: RunFolder) -> tuple[str, EvaluationReport | None]:
    """A trial's status, and its newest evaluation."""
    if (run.folder / "error.txt").exists():
        return "failed", None
    reports = run.read_evaluations()
    summary = run.read_summary()
    return (summary["status"] if summary else "unfinished"), (reports[-1] if reports else None)


def further_evaluations(sweep: SweepConfig, folder: SweepFolder) -> list[tuple[str, EvaluationConfig, Folder]]:
    """The missing evaluations: checkpoint, settings, and the file for the report."""
    missing = []
    for name in folder.trial_names():
        run = folder.trial(name)
        _, report = result_of(run)
        if report is None:
            continue
        for number, evaluation in enumerate(sweep.evaluations(run.read_config())[1:], start=1):
            file = folder.further_evaluation(name, number, report.step)
            if not file.exists():
                missing.append((run.checkpoint(report.step).uri, evaluation, file))
    return missing


def evaluate_checkpoint(checkpoint: str, evaluation: EvaluationConfig) -> EvaluationReport:
    """The report on a checkpoint under these settings, played in this process."""
    policy, facts = load_policy(Folder(checkpoint), evaluation)
    env_id = needed_environment(facts.env_id, "an evaluation of another kind")
    return evaluate(policy, env_id, evaluation, step=facts.step, env_kwargs=facts.env_kwargs)
