"""Runs without Ray: the loop, its files, checkpoints and resuming."""

import json
import pickle
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.examples import make_episodes, write_episodes

from dt_ray.api import DecisionTransformer
from dt_ray.config.loading import load_config
from dt_ray.config.schema import RunConfig
from dt_ray.data import read_dataset, slice_windows
from dt_ray.errors import ConfigError, DataError, DivergedError, RunError, StorageError
from dt_ray.jobs.training import resume_run, resumed_config, start_run
from dt_ray.runs.checkpoint import (
    checkpoint_fault,
    load_learner,
    load_policy,
    pack_checkpoint,
    save_checkpoint,
    write_checkpoint,
)
from dt_ray.runs.folder import RunFolder, checkpoint_at
from dt_ray.runs.metrics import MetricsLog
from dt_ray.runs.storage import Folder
from dt_ray.training.context import LocalContext, StopRequest
from dt_ray.training.loop import run_training
from dt_ray.training.resident import ResidentData, ResidentSource


def metrics_of(config: RunConfig) -> list[dict]:
    lines = [json.loads(line) for line in RunFolder.of(config).metrics_file.read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


def weights_of(config: RunConfig) -> bytes:
    return (RunFolder.of(config).checkpoint(config.total_timesteps) / "policy/model.safetensors").read_bytes()


def test_a_run_has_the_published_files(tiny_config: RunConfig) -> None:
    result = start_run(tiny_config)
    run = Path(result.run)
    files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    expected = {"config.yaml", "environment.json", "metrics.jsonl", "summary.json", "checkpoints/latest"}
    expected |= {f"evaluations/step-{step:08d}.json" for step in (10, 20)}
    names = (
        "policy/model.safetensors",
        "policy/policy.json",
        "training/optimizer.pt",
        "training/state.json",
        "MANIFEST.json",
    )
    steps = {15, 20, result.summary["best"]["step"]}  # the two newest, and the best
    expected |= {f"checkpoints/step-{step:08d}/{name}" for step in steps for name in names}
    assert files == expected
    assert (run / "checkpoints/latest").read_text() == "step-00000020\n"
    assert [line["step"] for line in metrics_of(tiny_config)] == [5, 10, 15, 20]
    assert {"train/loss", "validation/loss"} <= set(metrics_of(tiny_config)[-1])
    summary = json.loads((run / "summary.json").read_text())
    keys = [
        "status",
        "step",
        "algorithm",
        "num_parameters",
        "train_wall_s",
        "updates_per_s",
        "last",
        "best",
    ]
    assert list(summary) == keys
    assert summary["last"]["step"] == 20
    assert load_config(str(run / "config.yaml")) == tiny_config


def test_feeding_the_configuration_back_reproduces_the_run(tiny_config: RunConfig) -> None:
    start_run(tiny_config)
    again = replace(load_config(f"{RunFolder.of(tiny_config)}/config.yaml"), name="again")
    start_run(again)
    assert metrics_of(again) == metrics_of(tiny_config)
    assert weights_of(again) == weights_of(tiny_config)


@pytest.mark.parametrize("stop", [5, 12])
def test_a_resumed_run_equals_an_unbroken_one(
    tiny_config: RunConfig, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_run(tiny_config)
    broken = replace(tiny_config, name="broken")

    class StoppedError(Exception):
        pass

    batch = ResidentSource.batch

    def batch_until(source: ResidentSource, step: int):
        if step == stop:
            raise StoppedError
        return batch(source, step)

    with monkeypatch.context() as patch:
        patch.setattr(ResidentSource, "batch", batch_until)
        with pytest.raises(StoppedError):
            start_run(broken)
    resume_run(resumed_config(str(RunFolder.of(broken))))
    assert metrics_of(broken) == metrics_of(tiny_config)
    assert weights_of(broken) == weights_of(tiny_config)
    for step in (10, 20):
        name = f"evaluations/step-{step:08d}.json"
        one, other = (json.loads((RunFolder.of(each).folder / name).read_text()) for each in (broken, tiny_config))
        assert one["targets"] == other["targets"]


class StoppingContext(LocalContext):
    """Asked to stop during update `stop`."""

    stop_at = 0

    def stop_request(self) -> StopRequest:
        self.calls = getattr(self, "calls", 0) + 1
        return StopRequest.STOP if self.calls == self.stop_at else StopRequest.NONE


@pytest.mark.parametrize("stop", [1, 7, 10, 19, 20])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_run_that_is_asked_to_stop_anywhere_goes_on_as_if_it_had_not(
    tiny_config: RunConfig, stop: int, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replace(tiny_config, model=replace(tiny_config.model, dropout=dropout))
    start_run(whole)
    broken = replace(whole, name="broken")
    monkeypatch.setattr(StoppingContext, "stop_at", stop)
    with monkeypatch.context() as patch:
        patch.setattr("dt_ray.jobs.execution.LocalContext", StoppingContext)
        summary = start_run(broken).summary
    assert (summary["status"], summary["step"]) == ("stopped" if stop < 20 else "finished", stop)
    resume_run(resumed_config(str(RunFolder.of(broken))))
    assert metrics_of(broken) == metrics_of(whole)
    assert weights_of(broken) == weights_of(whole)


def test_evaluations_that_were_not_written_are_made_up_for(tiny_config: RunConfig) -> None:
    """Also that of an earlier checkpoint than the one gone on from, as when the run ended while it was played."""
    config = replace(tiny_config, checkpoint=replace(tiny_config.checkpoint, keep=4), total_timesteps=15)
    start_run(config)
    file = Path(str(RunFolder.of(config).evaluation(10)))
    expected = json.loads(file.read_text())["targets"]
    file.unlink()
    resume_run(resumed_config(str(RunFolder.of(config)), ["total_timesteps=18"]))
    assert json.loads(file.read_text())["targets"] == expected


def test_resuming_passes_over_a_damaged_checkpoint(tiny_config: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    start_run(tiny_config)
    run = RunFolder.of(tiny_config)
    weights = Path(str(run.checkpoint(20))) / "policy/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert "policy/model.safetensors is not what MANIFEST.json says" in (checkpoint_fault(run.checkpoint(20)) or "")
    before = metrics_of(tiny_config)
    resume_run(resumed_config(str(run)))
    assert "skipped a checkpoint" in caplog.text
    assert metrics_of(tiny_config) == before
    assert checkpoint_fault(run.checkpoint(20)) is None


@pytest.fixture
def saved(tiny_config: RunConfig) -> dict[str, bytes]:
    """The files of a checkpoint."""
    return pack_checkpoint(DecisionTransformer(tiny_config).learner, config=tiny_config, state={})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(data=st.data())
def test_any_flipped_bit_or_lost_end_of_a_checkpoint_is_found(
    saved: dict[str, bytes], tmp_path: Path, data: st.DataObject
) -> None:
    folder = Folder.at(tmp_path / "step-00000000")
    write_checkpoint(folder, saved)
    assert checkpoint_fault(folder) is None
    name = data.draw(st.sampled_from(sorted(saved)))
    place = data.draw(st.integers(0, len(saved[name]) - 1))
    damaged = bytearray(saved[name])
    damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    for content in (bytes(damaged), saved[name][:place]):
        (folder / name).write_bytes(content)
        assert checkpoint_fault(folder) == f"the checkpoint {folder} is damaged: {name} is not what MANIFEST.json says"
    Path(str(folder / name)).unlink()
    assert checkpoint_fault(folder) == f"the checkpoint {folder} is damaged: {name} is missing"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(data=st.data())
def test_a_damaged_manifest_is_found_or_says_the_same(
    saved: dict[str, bytes], tmp_path: Path, data: st.DataObject
) -> None:
    folder = Folder.at(tmp_path / "step-00000000")
    write_checkpoint(folder, saved)
    content = bytearray((folder / "MANIFEST.json").read_bytes())
    before = json.loads(content)
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "MANIFEST.json").write_bytes(bytes(content))
    assert checkpoint_fault(folder) is not None or json.loads(content) == before


def test_a_resumed_run_keeps_what_its_checkpoint_fixes(tiny_config: RunConfig) -> None:
    start_run(tiny_config)
    with pytest.raises(ConfigError, match="a resumed run keeps its model"):
        resumed_config(str(RunFolder.of(tiny_config)), ["model.width=32"])
    longer = resumed_config(str(RunFolder.of(tiny_config)), ["total_timesteps=25"])
    assert resume_run(longer).summary["step"] == 25


def test_a_run_is_not_resumed_on_other_data(tiny_config: RunConfig, tmp_path: Path) -> None:
    start_run(tiny_config)
    write_episodes(make_episodes([30] * 8), tmp_path / "other" / "part.parquet")
    config = resumed_config(str(RunFolder.of(tiny_config)), [f"data.path={tmp_path}/other", "total_timesteps=30"])
    with pytest.raises(RunError, match="was trained on other data than this"):
        resume_run(config)


def test_the_managed_object_has_the_units_and_settings_of_a_run(tiny_config: RunConfig, tmp_path: Path) -> None:
    """Also where the files hold the episodes in another order than their ids."""
    write_episodes(make_episodes([9, 30, 12, 5, 7]).select([3, 0, 4, 2, 1]), tmp_path / "data" / "part.parquet")
    model = DecisionTransformer(tiny_config, overrides=[f"data.path={tmp_path}/data", "seed=3"])
    assert model.config.seed == 3
    fitted = model.learner.normalizer
    model.train()
    np.testing.assert_array_equal(model.learner.normalizer.observation_mean, fitted.observation_mean)
    assert model.learner.normalizer.return_scale == fitted.return_scale


def test_there_must_be_a_run_to_resume(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is no run: there is no config.yaml in it"):
        resumed_config(str(tmp_path))


def test_names_are_unique_unless_asked(tiny_config: RunConfig) -> None:
    start_run(tiny_config)
    with pytest.raises(RunError, match="exists already; choose another name"):
        start_run(tiny_config)
    start_run(tiny_config, overwrite=True)
    other = Path(RunFolder.of(tiny_config).folder.uri).with_name("precious")
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="is no run; --overwrite replaces runs only"):
        start_run(replace(tiny_config, name="precious"), overwrite=True)


def test_bad_data_leaves_no_run_behind(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = replace(tiny_config, data=replace(tiny_config.data, path=str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match="no dataset at"):
        start_run(config)
    assert not RunFolder.of(config).folder.exists()


def test_a_corrupt_file_among_many_stops_the_run_or_is_left_out_and_counted(
    tiny_config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "data"
    data = make_episodes([20] * 9)
    for i in range(3):
        write_episodes(data.select(list(range(3 * i, 3 * i + 3))), folder / f"{i}.parquet")
    (folder / "1.parquet").write_bytes((folder / "1.parquet").read_bytes()[:-50])
    config = replace(tiny_config, data=replace(tiny_config.data, path=str(folder)))
    with pytest.raises(DataError, match=r"1\.parquet is not a readable Parquet file"):
        start_run(config)
    assert not Path(str(RunFolder.of(config))).exists()
    skipping = replace(config, data=replace(config.data, on_corrupt="skip"))
    result = start_run(skipping)
    assert result.summary["skipped_files"] == 1
    fitted, trained = DecisionTransformer(skipping).learner, DecisionTransformer.load(result.run).learner
    np.testing.assert_allclose(fitted.normalizer.observation_mean, trained.normalizer.observation_mean)
    assert "1.parquet is not a readable Parquet file" in caplog.text


def test_an_unwritable_storage_is_one_message(tiny_config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="can't write "):
        start_run(replace(tiny_config, storage_path=str(tmp_path / "file")))


def test_a_full_disk_leaves_no_half_written_checkpoint(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model = DecisionTransformer(tiny_config)
    folder = Folder.at(tiny_config.storage_path) / "saved"
    write = Folder.write_bytes

    def full(place: Folder, content: bytes) -> None:
        if place.name == "state.json":
            raise StorageError("can't write state.json: [Errno 28] No space left on device")
        write(place, content)

    monkeypatch.setattr(Folder, "write_bytes", full)
    with pytest.raises(StorageError, match="No space left on device"):
        save_checkpoint(folder, model.learner, config=tiny_config)
    assert Folder.at(tiny_config.storage_path).names() == []


def test_a_loss_that_is_no_number_stops_the_run(
    tiny_config: RunConfig, pendulum_spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ResidentData.build(read_dataset(tiny_config.data, pendulum_spec), pendulum_spec, tiny_config)
    source = ResidentSource(data, tiny_config)
    run = RunFolder.of(tiny_config)
    run.create(tiny_config)
    batch = source.batch

    def poisoned(step: int):
        clean = batch(step)
        return replace(clean, actions=clean.actions * torch.nan) if step == 12 else clean

    monkeypatch.setattr(source, "batch", poisoned)
    with pytest.raises(DivergedError, match=r"became nan at update 13; the last good checkpoint is .*step-00000010"):
        run_training(tiny_config, source, LocalContext(tiny_config))
    assert run.checkpoint_steps()[-1] == 10
    assert json.loads((run.folder / "summary.json").read_text())["status"] == "diverged"


def test_loading_a_checkpoint_runs_no_code(tiny_config: RunConfig, tmp_path: Path) -> None:
    start_run(tiny_config)
    folder = RunFolder.of(tiny_config).checkpoint(20)
    planted = tmp_path / "planted"

    class Malicious:
        def __reduce__(self):
            return (Path.touch, (planted,))

    content = pickle.dumps(Malicious(), protocol=2)
    Path(str(folder), "training/optimizer.pt").write_bytes(content)
    import hashlib

    manifest_file = Path(str(folder), "MANIFEST.json")
    manifest = json.loads(manifest_file.read_text())
    manifest["training/optimizer.pt"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest_file.write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=r"training/optimizer.pt"):
        DecisionTransformer.load(str(folder))
    assert not planted.exists()


def test_checkpoints_of_another_kind_are_refused(tmp_path: Path, tiny_config: RunConfig) -> None:
    with pytest.raises(RunError, match="no run or checkpoint at"):
        checkpoint_at(Folder.at(tmp_path / "nowhere"))
    with pytest.raises(RunError, match="has no complete checkpoint"):
        checkpoint_at(Folder.at(tmp_path))
    start_run(tiny_config)
    folder = RunFolder.of(tiny_config).checkpoint(20)
    (folder / "MANIFEST.json").write_text("{")
    with pytest.raises(RunError, match=r"is no complete checkpoint: it has no readable MANIFEST.json"):
        load_policy(folder)


def test_a_policy_needs_the_policy_folder_only(tiny_config: RunConfig) -> None:
    start_run(tiny_config)
    folder = RunFolder.of(tiny_config).checkpoint(20)
    (folder / "training").delete()
    policy, facts = load_policy(folder)
    policy.start(np.zeros((1, 3), np.float32), np.array([-100.0]))
    assert policy.act().shape == (1, 1)
    assert facts.env_id == "Pendulum-v1"


@pytest.mark.parametrize("algorithm", ["decision_transformer", "iql"])
def test_loading_leaves_the_random_state_of_the_process(tiny_config: RunConfig, algorithm: str) -> None:
    start_run(replace(tiny_config, algorithm=algorithm))
    folder = RunFolder.of(tiny_config).checkpoint(20)
    drawn = []
    for load in (lambda _: None, load_policy, load_learner):
        random.seed(7)
        np.random.seed(7)
        torch.manual_seed(7)
        load(folder)
        drawn.append((random.random(), np.random.random(), float(torch.rand(()))))
    assert drawn[0] == drawn[1] == drawn[2]


def test_replayed_metrics_replace_what_was_there(tmp_path: Path) -> None:
    file = Folder.at(tmp_path / "metrics.jsonl")
    log = MetricsLog(file, resumed_at=0)
    for step in (5, 10, 15):
        log.write(step, {"train/loss": float(step)})
    with open(file.uri, "a") as stream:
        stream.write('{"step": 20, "train/l')  # cut short by a crash
    log = MetricsLog(file, resumed_at=10)
    log.write(15, {"train/loss": -1.0})
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in lines] == [(5, 5), (10, 10), (15, -1)]


def test_the_managed_object_trains_saves_loads_and_acts(tiny_config: RunConfig, tmp_path: Path, pendulum_spec) -> None:
    model = DecisionTransformer(replace(tiny_config, optim=replace(tiny_config.optim, schedule="constant")))
    result = model.train()
    assert result.summary["step"] == 20
    model.save(tmp_path / "saved")
    loaded = DecisionTransformer.load(tmp_path / "saved")
    windows = slice_windows(read_dataset(tiny_config.data, pendulum_spec), np.array([0, 48, 49, 60]), length=4)
    np.testing.assert_array_equal(loaded.predict(windows), model.predict(windows))
    observations = np.stack([windows.observations[i, 0] for i in (0, 3)])
    policy = model.policy()
    policy.start(observations, np.array([-100.0, -300.0]))
    first = policy.act()
    np.testing.assert_array_equal(model.predict(observations, target_return=np.array([-100.0, -300.0])), first)
    np.testing.assert_allclose(model.predict(observations[1], target_return=-300.0), first[1], rtol=1e-5)
    policy.observe(first, np.array([-1.0, -2.0]), observations[::-1].copy())
    seen = np.stack([observations, observations[::-1]], axis=1)
    steps = {"actions": first[:, None], "rewards": np.array([[-1.0], [-2.0]])}
    predicted = model.predict(seen, target_return=np.array([-100.0, -300.0]), **steps)
    np.testing.assert_array_equal(predicted, policy.act())
    with pytest.raises(ConfigError, match="observations are"):
        model.predict(seen, target_return=-100.0)
    report = loaded.evaluate(target_returns=[-100, -300])
    assert report["targets"] == result.summary["last"]["targets"]
    before = loaded.predict(windows)
    assert loaded.update(windows)["loss"] > 0
    assert (loaded.predict(windows) != before).any()
    with pytest.raises(RunError, match="exists and is no checkpoint"):
        model.save(tmp_path)
    assert DecisionTransformer.resume(result.run, overrides=["total_timesteps=22"]).learner.step == 22
