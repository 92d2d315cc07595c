"""What lies in cluster/, against the schemas of those who read it, and the commands in it against our own."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from support.examples import ROOT, tiny_overrides

from dt_ray.config.loading import load_config
from dt_ray.sweeps.loading import load_sweep

CLUSTER = ROOT / "cluster"
MANIFESTS = sorted((CLUSTER / "kuberay").glob("ray*.yaml"))
SCHEMA = json.loads((ROOT / "tests/golden/kuberay.schema.json").read_text())
TEXTS = sorted(file for file in CLUSTER.rglob("*") if file.is_file())


def pod_templates(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    return [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


@pytest.mark.ray
@pytest.mark.parametrize("name", ["aws", "gcp", "on-premises"])
def test_the_launcher_takes_its_files(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    validate_config(prepare_config(config))
    commands = " ".join(config["head_start_ray_commands"] + config["worker_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in commands
    assert commands.count("RAY_AUTH_MODE=token") == 2


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.stem)
def test_manifests_are_of_their_schemas(file: Path) -> None:
    manifest = yaml.safe_load(file.read_text())
    jsonschema.validate(manifest, SCHEMA)
    for template in pod_templates(manifest):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "node"}, "template": template}
        kubernetes_validate.validate(pod, "1.32", strict=True)


def test_the_volume_is_of_its_schema_and_is_the_one_that_pods_mount() -> None:
    claim = yaml.safe_load((CLUSTER / "kuberay/storage.yaml").read_text())
    kubernetes_validate.validate(claim, "1.32", strict=True)
    for file in MANIFESTS:
        for template in pod_templates(yaml.safe_load(file.read_text())):
            volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
            assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.stem)
def test_pods_are_unprivileged_healthy_and_bounded(file: Path) -> None:
    manifest = yaml.safe_load(file.read_text())
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    assert spec["authOptions"] == {"mode": "token"}
    for template in pod_templates(manifest):
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        (container,) = template["spec"]["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert "livenessProbe" in container
    assert any("nvidia.com/gpu" in str(template) for template in pod_templates(manifest))


def test_versions_are_the_pinned_one() -> None:
    pinned = re.search(r"^ray\[?.*?==([\d.]+)", (CLUSTER.parent / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pinned is not None
    for file in MANIFESTS:
        manifest = yaml.safe_load(file.read_text())
        assert manifest["spec"].get("rayClusterSpec", manifest["spec"])["rayVersion"] == pinned[1]


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: file.name)
def test_no_file_carries_a_credential(file: Path) -> None:
    text = file.read_text()
    assert not re.search(r"AKIA[0-9A-Z]{16}|secret_access_key|BEGIN [A-Z ]*PRIVATE KEY|password", text, re.IGNORECASE)
    assert not re.search(r"RAY_AUTH_TOKEN=[0-9a-f]{8}", text)


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: file.name)
def test_commands_in_the_files_are_ones_that_we_have(file: Path) -> None:
    text = file.read_text().replace("\\\n", " ").replace('"', "").replace("\n    ", " ")
    for line in re.findall(r"dt_ray\.(?:train|sweep) ([^\n;']*)", text):
        arguments = [each for each in shlex.split(line) if "$" not in each and "…" not in each]
        overrides = [each for each in arguments if re.match(r"[a-z_.]+=", each)]
        if "num_seeds" in line:
            load_sweep("target_return_context_length", "decision_transformer/pendulum", overrides, default_name="x")
        else:
            load_config("decision_transformer/pendulum", overrides)
        options = {each for each in arguments if each.startswith("--")}
        assert options <= {"--config", "--resume", "--overwrite", "--plan"}, line


@pytest.mark.slow
def test_the_slurm_script_trains_on_its_allocation(pendulum_data: Path, tmp_path: Path) -> None:
    """With stand-ins for Slurm's commands, and process ids of its own: Ray's command ends what else runs on a node."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs process namespaces: what it starts ends all of Ray that it sees")
    stand_ins = {"scontrol": "echo 127.0.0.1", "srun": 'shift; exec "$@"'}
    for name, does in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "ENVIRONMENT": sys.prefix,
        "SLURM_JOB_NODELIST": "here",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_PER_TASK": "2",
        "OMP_NUM_THREADS": "1",
    }
    alone = ["unshare", "--pid", "--net", "--mount", "--fork", "--mount-proc", "sh", "-c"]
    script = 'mount -t tmpfs tmpfs /tmp/ray 2>/dev/null; ip link set lo up && exec "$@"'
    command = ["bash", str(CLUSTER / "slurm.sbatch"), "dt_ray.train", *tiny_overrides(pendulum_data, tmp_path)]
    done = subprocess.run(
        [*alone, script, "sh", *command, "scaling.num_workers=1"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "runs/tiny/summary.json").read_text())
    assert (summary["status"], summary["step"]) == ("finished", 20)
