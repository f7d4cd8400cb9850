"""One configuration: what the chart renders is what the program, Ray Serve and Ray's autoscaler take."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from kvservice.config.ray import Autoscaling, RayDeployment
from tests.deploy.chart import PROFILES, Manifest, objects, only
from tests.unit.cli.conftest import Ran, kvservice

__all__ = ["kvservice"]

SCALER = "kvservice_scaler"
WITH_RAY = [profile for profile in PROFILES if objects(profile, "RayService")]

# In a process of its own, since Ray warns when it is imported. For each profile: what the program itself would tell Ray
# Serve; what Ray Serve and Ray's autoscaler make of what the chart tells them.
ASK_RAY = """
import json, sys
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.schema import ServeDeploySchema
from kvservice.cli.ray_workers import serve_config
from kvservice.config.service import ServiceConfig

def seen(config):
    # Arguments are the program's own matter: see `arguments`.
    apps = [{**app, "args": {}} for app in config["applications"]]
    schema = ServeDeploySchema.model_validate({**config, "applications": apps})
    return schema.model_dump(mode="json", exclude_unset=True)

found = {}
for profile, (config, chart, cluster) in json.load(sys.stdin).items():
    ours = yaml.safe_load(serve_config(ServiceConfig.model_validate(config)))
    nodes = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    ServeDeploySchema.model_validate(chart)
    args = {app["name"]: app["args"] for app in ours["applications"]}
    found[profile] = {"program": seen(ours), "chart": seen(chart), "args": args, "nodes": nodes}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def ray_sees() -> Manifest:
    """By profile: see ASK_RAY."""
    told = {}
    for profile in WITH_RAY:
        (service,) = objects(profile, "RayService")
        cluster = {"metadata": {"name": "kv", "namespace": "kvservice"}, "spec": service["spec"]["rayClusterConfig"]}
        config = {**config_of(profile), "gateway": None}
        told[profile] = (config, serve_config(profile), cluster)
    asked = subprocess.run(
        [sys.executable, "-c", ASK_RAY], input=json.dumps(told), capture_output=True, text=True, check=False
    )
    assert asked.returncode == 0, asked.stderr
    return json.loads(asked.stdout)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_program_accepts_the_rendered_configuration(
    kvservice: Callable[..., Ran], profile: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_of(profile)))
    ran = kvservice("config", "check", str(path))
    assert (ran.code, ran.err) == (0, "")
    assert "fine" in ran.out


@pytest.mark.parametrize("profile", WITH_RAY)
def test_ray_serve_is_told_what_the_program_itself_would_tell_it(ray_sees: Manifest, profile: str) -> None:
    assert ray_sees[profile]["chart"] == ray_sees[profile]["program"]
    told = {app["name"]: arguments(app["name"], app["args"]) for app in serve_config(profile)["applications"]}
    assert told == {name: arguments(name, args) for name, args in ray_sees[profile]["args"].items()}
    # Tokens never pass through Ray's proxies, which have no TLS.
    assert ray_sees[profile]["chart"]["proxy_location"] == "Disabled"


@pytest.mark.parametrize("profile", WITH_RAY)
def test_rays_autoscaler_sees_a_kind_of_node_for_each_model_that_alone_has_its_resource(
    ray_sees: Manifest, profile: str
) -> None:
    nodes = ray_sees[profile]["nodes"]
    assert nodes["headgroup"]["resources"]["CPU"] == 0
    applications = [app for app in serve_config(profile)["applications"] if app["name"] != SCALER]
    deployments = [deployment for app in applications for deployment in app["deployments"]]
    assert len(nodes) == len(deployments) + 1
    for deployment in deployments:
        actor = deployment["ray_actor_options"]
        (resource,) = actor["resources"]
        (name,) = (name for name, node in nodes.items() if resource in node["resources"])
        node = nodes[name]["resources"]
        assert f"kvservice-{name}" == resource
        assert node[resource] == actor["resources"][resource], "one worker to a node"
        assert node["CPU"] >= actor["num_cpus"]
        assert node["GPU"] >= actor["num_gpus"]
        most = deployment.get("autoscaling_config", {}).get("max_replicas", deployment.get("num_replicas"))
        assert nodes[name]["max_workers"] == most


@pytest.mark.parametrize("profile", WITH_RAY)
def test_where_workers_are_scaled_somebody_takes_them_away_and_nowhere_else(profile: str) -> None:
    deployments = {each["name"]: each.get("autoscaling") for each in config_of(profile)["ray"]["deployments"]}
    scaled = {name for name, each in deployments.items() if each}
    scalers = [app for app in serve_config(profile)["applications"] if app["name"] == SCALER]
    assert [set(app["args"]) for app in scalers] == ([scaled] if scaled else [])
    for app in scalers:
        # On a worker's node it would keep the node from being given back; no CPU of the head's is for sale.
        (deployment,) = app["deployments"]
        assert deployment["ray_actor_options"]["num_cpus"] == 0
        assert set(deployment["ray_actor_options"]["resources"]) == {"node:__internal_head__"}


def test_a_part_of_the_configuration_that_is_wrong_is_refused_with_its_place(
    kvservice: Callable[..., Ran], tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"gateway": {"port": "many"}}))
    ran = kvservice("config", "check", str(path))
    assert ran.code == 2
    assert "gateway.port" in ran.flat_err


def test_the_schema_of_the_configuration_is_told(kvservice: Callable[..., Ran]) -> None:
    ran = kvservice("config", "schema")
    assert set(json.loads(ran.out)["properties"]) >= {"gateway", "worker", "ray", "telemetry"}


def config_of(profile: str) -> Manifest:
    return json.loads(only(profile, "ConfigMap", "kv-kvservice")["data"]["config.json"])


def serve_config(profile: str) -> Manifest:
    (service,) = objects(profile, "RayService")
    return yaml.safe_load(service["spec"]["serveConfigV2"])


def arguments(application: str, args: Manifest) -> Manifest:
    """As the program reads them: names that are left out have their defaults."""
    if application == SCALER:
        return {name: Autoscaling.model_validate(each).model_dump() for name, each in args.items()}
    return RayDeployment.model_validate(args).model_dump(mode="json", exclude={"worker": {"worker_id"}})
