"""Validate what no ready-made validator knows: KubeRay's RayCluster, the jobs of the work pools, compose's references.

    uv run --group infra python infra/validate.py

A RayCluster's own fields are checked against the few that KubeRay v1 has; its pod templates, and the job manifest of
the Kubernetes work pool with its defaults filled in, go to kubernetes-validate as the objects that they become.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

HERE = Path(__file__).parent
TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
# `ray start` takes text: a number or a boolean here is the usual mistake, which the operator refuses.
PARAMETERS = {"type": "object", "additionalProperties": TEXT}


def fields(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


RAY_CLUSTER = fields(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayCluster"},
    metadata={"type": "object", "required": ["name"]},
    spec=fields(
        ["headGroupSpec"],
        rayVersion=TEXT,
        suspend=FLAG,
        enableInTreeAutoscaling=FLAG,
        autoscalerOptions={"type": "object"},
        headServiceAnnotations=PARAMETERS,
        gcsFaultToleranceOptions={"type": "object"},
        headGroupSpec=fields(
            ["template"], serviceType=TEXT, headService={"type": "object"}, enableIngress=FLAG,
            rayStartParams=PARAMETERS, template={"type": "object"},
        ),
        workerGroupSpecs={
            "type": "array",
            "items": fields(
                ["groupName", "minReplicas", "maxReplicas", "template"], groupName=TEXT, replicas=NUMBER,
                minReplicas=NUMBER, maxReplicas=NUMBER, numOfHosts=NUMBER, idleTimeoutSeconds=NUMBER,
                rayStartParams=PARAMETERS, template={"type": "object"}, scaleStrategy={"type": "object"}, suspend=FLAG,
            ),
        },
    ),
)  # fmt: skip


def check_ray_cluster(cluster: dict[str, Any]) -> int:
    """Raise if it is none; the number of pod templates in it."""
    jsonschema.validate(cluster, RAY_CLUSTER)
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"].get("workerGroupSpecs", [])]
    for number, group in enumerate(groups):
        template = group["template"]
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"pod-{number}"}, "spec": template["spec"]}
        kubernetes_validate.validate(pod, "1.31", strict=True)
        if "maxReplicas" in group:
            assert group["minReplicas"] <= group.get("replicas", 0) <= group["maxReplicas"], group["groupName"]
    return len(groups)


def filled(value: Any, variables: dict[str, Any]) -> Any:
    """A job configuration with the variables' defaults in place of `{{ name }}`; what has no default is left out."""
    if isinstance(value, dict):
        kept = {key: filled(item, variables) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item is not None}
    if isinstance(value, list):
        return [filled(item, variables) for item in value]
    if isinstance(value, str) and (match := re.fullmatch(r"\{\{ (\w+) \}\}", value)):
        return variables[match[1]].get("default")  # a KeyError names a placeholder without a variable
    if isinstance(value, str):
        return re.sub(r"\{\{ (\w+) \}\}", lambda match: str(variables[match[1]].get("default", match[1])), value)
    return value


def check_pool(path: Path) -> None:
    """Every placeholder has a variable, every variable a title, and a Kubernetes job is one."""
    template = json.loads(path.read_text(encoding="utf-8"))
    variables = template["variables"]["properties"]
    job = filled(template["job_configuration"], variables)
    assert all("title" in variable for variable in variables.values()), path
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    assert used == set(variables), f"{path}: {used ^ set(variables)}"
    if "job_manifest" in job:
        manifest = job["job_manifest"]
        container = manifest["spec"]["template"]["spec"]["containers"][0]
        # As the worker hands it over: the command as a list, the run's environment before the template's own.
        container["env"] = [{"name": "A", "value": "b"}, *container["env"]]
        container["args"] = ["prefect", "flow-run", "execute"]
        manifest["metadata"] = {"namespace": manifest["metadata"]["namespace"], "generateName": "flow-"}
        kubernetes_validate.validate(manifest, "1.31", strict=True)


def check_compose(compose: dict[str, Any], pool: dict[str, Any]) -> None:
    """Services wait for what can happen, and what Docker's work pool names is there."""
    services = compose["services"]
    for name, service in services.items():
        for other, condition in service.get("depends_on", {}).items():
            match condition["condition"]:
                case "service_healthy":
                    assert "healthcheck" in services[other], f"{name} waits for ever for {other}"
                case "service_completed_successfully":
                    assert "restart" not in services[other], f"{name} waits for {other}, which is started again"
    defaults = {name: variable.get("default") for name, variable in pool["variables"]["properties"].items()}
    volumes = {f"{compose['name']}_{volume}" for volume in compose["volumes"]}
    assert {volume.split(":")[0] for volume in defaults["volumes"]} <= volumes, defaults["volumes"]
    for key, value in defaults["env"].items():
        if key.startswith("WAN_"):
            assert services["worker"]["environment"][key] in (value, f"${{{key}:-{value}}}"), f"{key} is not compose's"
    # compose publishes the server on the loopback interface, where a container of its own network does not reach it.
    assert defaults["networks"] == []


def main() -> None:
    clusters = 0
    for path in sorted((HERE / "kubernetes").glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            if document["apiVersion"].startswith("ray.io/"):
                check_ray_cluster(document)
                clusters += 1
    assert clusters, "no RayCluster found"
    pools = sorted((HERE.parent / "deployments" / "pools").glob("*.json"))
    assert pools, "no work pools found"
    for path in pools:
        check_pool(path)
    compose = yaml.safe_load((HERE / "compose.yaml").read_text(encoding="utf-8"))
    check_compose(compose, json.loads((HERE.parent / "deployments/pools/docker.json").read_text(encoding="utf-8")))
    print(f"{clusters} RayCluster, {len(pools)} work pools and compose.yaml are valid")


if __name__ == "__main__":
    sys.exit(main())
