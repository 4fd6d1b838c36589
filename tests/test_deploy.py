"""`deployments/deploy` against a server of the test's own, as compose and Kubernetes run it: at every start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import WorkPool
from prefect.events.schemas.automations import AutomationCore
from pydantic import TypeAdapter

from wan_core.config import PipelineConfig

ROOT = Path(__file__).parents[1]
NAME = yaml.safe_load((ROOT / "deployments" / "automations.yaml").read_text())["name"]


def test_a_run_that_waits_for_the_server_is_not_crashed_when_it_comes_back() -> None:
    """A heartbeat waits, too, and with Prefect's backoff: 2 s, 4 s, 8 s ..., each up to a fifth longer."""
    environment = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())
    environment = environment["definitions"]["pool"]["job_variables"]["env"]
    retries, heartbeat = (
        int(environment[name]) for name in ("PREFECT_CLIENT_MAX_RETRIES", "PREFECT_FLOWS_HEARTBEAT_FREQUENCY")
    )
    waited = 1.2 * sum(2**attempt for attempt in range(1, retries + 1))
    automation = yaml.safe_load((ROOT / "deployments" / "automations.yaml").read_text())
    assert automation["trigger"]["within"] > waited + heartbeat > 8 * 60


def test_the_own_models_deployments_encode_and_train_on_gpus() -> None:
    items = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]
    configs = [item["parameters"]["config"] for item in items if item["name"] == "default"]
    assert len(configs) == 6
    for config in map(TypeAdapter(PipelineConfig).validate_python, configs):
        assert config.ray.gpus_per_actor == 1 and config.ray.actors == config.launch.gpus_per_node
        assert config.launch.processes_per_node == config.launch.gpus_per_node > 1


def kubernetes(file: str, kind: str) -> dict[str, Any]:
    documents = yaml.safe_load_all((ROOT / "infra" / "kubernetes" / file).read_text())
    (found,) = [document for document in documents if document["kind"] == kind]
    return found


@pytest.fixture
def parameters(tmp_path: Path) -> Path:
    """The file that prefect-worker.yaml's ConfigMap mounts."""
    path = tmp_path / "parameters.yaml"
    path.write_text(kubernetes("prefect-worker.yaml", "ConfigMap")["data"]["parameters.yaml"])
    return path


def test_on_kubernetes_the_own_models_deployments_fill_the_ray_cluster(parameters: Path) -> None:
    cluster = kubernetes("raycluster.yaml", "RayCluster")
    (group,) = cluster["spec"]["workerGroupSpecs"]
    gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    items = yaml.safe_load(program(sys.executable, "deployments/overlay.py", str(parameters)))["deployments"]
    configs = [item["parameters"]["config"] for item in items if item["name"] == "default"]
    assert len(configs) == 6
    for config in map(TypeAdapter(PipelineConfig).validate_python, configs):
        assert config.ray.address == f"ray://{cluster['metadata']['name']}-head-svc:10001"
        assert config.ray.actors * config.ray.gpus_per_actor == group["replicas"] * gpus
        assert (config.launch.launcher, config.launch.nodes) == ("ray", group["replicas"])
        assert config.launch.processes_per_node == config.launch.gpus_per_node == gpus
        assert config.train.recipe == "wan_1_3b"  # the rest is prefect.yaml's


def test_a_site_has_its_own_schedule_of_the_nightly_run(tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text('schedule: {active: true, cron: "30 4 * * *"}')
    (theirs,) = scheduled(ROOT / "deployments" / "prefect.yaml")
    overlaid = tmp_path / "prefect.yaml"
    overlaid.write_text(program(sys.executable, "deployments/overlay.py", str(site)))
    assert scheduled(overlaid) == [theirs | {"active": True, "cron": "30 4 * * *"}]


def scheduled(file: Path) -> list[dict[str, Any]]:
    """The schedules of all deployments."""
    return [one for item in yaml.safe_load(file.read_text())["deployments"] for one in item.get("schedules", [])]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyncPrefectClient]:
    from flows.server import prefect_api

    with prefect_api(tmp_path_factory.mktemp("prefect")), get_client(sync_client=True) as client:
        yield client


def program(*command: str, **environment: str) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environment}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_automation_is_made_once_left_alone_and_brought_up_to_date(client: SyncPrefectClient) -> None:
    for _ in range(2):  # what deploying twice by the guide of an earlier version left
        program("prefect", "automation", "create", "--from-file", "deployments/automations.yaml")
    (first, _) = client.read_automations_by_name(NAME)
    for _ in range(2):
        program(sys.executable, "deployments/automate.py")
        assert client.read_automations_by_name(NAME) == [first]
    older = first.model_dump(exclude={"id", "owner_resource"}) | {"description": "an older version's"}
    client.update_automation(first.id, AutomationCore.model_validate(older))
    program(sys.executable, "deployments/automate.py")
    (one,) = client.read_automations_by_name(NAME)
    assert one.description == first.description


@pytest.mark.slow
def test_deploying_again_keeps_the_pool_and_puts_the_schedule_as_the_files_have_it(
    client: SyncPrefectClient, parameters: Path
) -> None:
    template = json.loads((ROOT / "deployments" / "pools" / "docker.json").read_text())
    client.create_work_pool(WorkPoolCreate(name="wan", type="docker", base_job_template=template))
    program("deployments/deploy")
    nightly = client.read_deployment_by_name("nightly-finetune/default")
    (schedule,) = nightly.schedules
    assert schedule.active is False
    client.update_deployment_schedule(nightly.id, schedule.id, active=True)
    program("deployments/deploy", WAN_PARAMETERS=str(parameters))
    assert client.read_deployment_by_name("finetune/default").parameters["config"]["launch"]["launcher"] == "ray"
    assert [one.active for one in client.read_deployment_by_name("nightly-finetune/default").schedules] == [False]
    pool: WorkPool = client.read_work_pool("wan")
    assert pool.type == "docker" and "shm_size" in pool.base_job_template["variables"]["properties"]
    assert len(client.read_automations_by_name(NAME)) == 1
