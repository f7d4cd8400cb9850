"""The chart through the real helm: it renders, what it renders is valid, and wrong values are refused."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest

from tests.deploy.chart import (
    CHART,
    PROFILES,
    ROOT,
    Manifest,
    helm,
    load_generate,
    objects,
    pods,
    template,
    values_file,
)

KUBERNETES = "1.34"
CRDS: dict[str, Manifest] = json.loads((Path(__file__).parent / "schemas" / "crds.json").read_text())


@pytest.mark.parametrize("profile", PROFILES)
def test_helm_lints_every_profile_strictly(profile: str) -> None:
    result = helm("lint", "--strict", str(CHART), "--values", str(values_file(profile)))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("profile", PROFILES)
def test_every_object_is_valid(profile: str) -> None:
    for each in objects(profile):
        group_version, kind = each["apiVersion"], each["kind"]
        if (schema := CRDS.get(f"{group_version}/{kind}")) is not None:
            jsonschema.Draft202012Validator(schema).validate(each)
        else:
            kubernetes_validate.validate(each, KUBERNETES, strict=True)
    for pod in pods(profile):
        whole = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}}
        kept = {name: pod.template[name] for name in ("metadata", "spec")}
        kubernetes_validate.validate({**whole, "template": kept}, KUBERNETES, strict=True)


def test_the_schemas_of_custom_resources_refuse_what_is_unknown() -> None:
    (service,) = objects("cpu-trial", "RayService")
    with pytest.raises(jsonschema.ValidationError, match="rayClusterConf"):
        jsonschema.validate(
            {**service, "spec": {**service["spec"], "rayClusterConf": {}}}, CRDS["ray.io/v1/RayService"]
        )


def test_objects_have_names_of_their_own() -> None:
    for profile in PROFILES:
        names = [(each["kind"], each["metadata"]["name"]) for each in objects(profile)]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("gateway.replica=3", "additional properties 'replica' not allowed"),
        ("gateway.replicas=0", "minimum: got 0, want 1"),
        ("gateway.service.nodePort=80", "minimum: got 80, want 30,000"),
        ("gateway.image.tag=latest", "at '/gateway/image/tag'"),
        ("gateway.image.digest=sha256:12", "at '/gateway/image/digest'"),
        ("config.gateway.port=1", "additional properties 'port' not allowed"),
        ("config.gateway.grace=1", "additional properties 'grace' not allowed"),
        ("config.telemetry.metrics_host=::", "additional properties 'metrics_host' not allowed"),
        ("config.log_level=loud", "at '/config/log_level'"),
        ("redis.kv.maxmemory=lots", "'lots' does not match pattern"),
        ("redis.kv.persistence=true", "additional properties 'persistence' not allowed"),
        ("models[0].deployment.name=Small", "'Small' does not match pattern"),
        ("models[0].deployment.worker.kv_byte=3", "additional properties 'kv_byte' not allowed"),
        ("models[0].source.type=torrent", "at '/models/0/source'"),
        ("networkPolicies.enabled=false", "additional properties 'networkPolicies' not allowed"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(value: str, says: str) -> None:
    model = ("--set", "models[0].deployment.name=small", "--set", "models[0].source.type=fetch")
    result = helm("template", "kv", str(CHART), *model, "--set", value)
    assert result.returncode != 0
    assert says in result.stderr


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (["gateway.hpa.enabled=true", "gateway.keda.enabled=true"], "two scalers would fight"),
        (["redis.state.enabled=false"], "name redis.state.external.existingSecret"),
        (["internalTls.gatewaySecret=mine"], "name both gatewaySecret and workerSecret"),
        (["gateway.route.enabled=true"], "name in gateway.route.parentRefs"),
        (["gateway.tls.clientCa=true"], "name gateway.tls.existingSecret"),
        (["models=null"], "models: name at least one"),
        (["models[0].deployment.num_gpus=1"], "device cuda and deployment.num_gpus go together"),
        (["models[0].image=cuda"], "image cuda doesn't fit deployment.worker.device cpu"),
        (["models[0].source.type=volume", "models[0].source.claimName=c"], "a folder below /models/"),
        (["ray.externalScaler=true", "models[0].deployment.autoscaling.max_replicas=2"], "no `autoscaling` with"),
        (["ray.objectStoreBytes=999999999"], "doesn't fit into ray.shmSize"),
        (["models[1].deployment.name=small", "models[1].source.type=fetch"], '"small" is there twice'),
    ],
)
def test_values_that_do_not_fit_together_are_refused_with_a_sentence(values: list[str], says: str) -> None:
    model = ("--set", "models[0].deployment.name=small", "--set", "models[0].source.type=fetch")
    settings = [argument for value in values for argument in ("--set", value)]
    result = helm("template", "kv", str(CHART), *model, *settings)
    assert result.returncode != 0
    assert says in result.stderr


def test_the_plain_install_is_complete_and_makes_its_secrets() -> None:
    made = template()
    secrets = {each["metadata"]["name"]: each["data"] for each in made if each["kind"] == "Secret"}
    assert {name: sorted(data) for name, data in secrets.items()} == {
        "kv-kvservice-api-keys": ["api-keys.json", "operator-key"],
        "kv-kvservice-internal-tls": ["ca.crt", "gateway.crt", "gateway.key", "worker.crt", "worker.key"],
        "kv-kvservice-redis": ["gcs", "kv", "state"],
        "kv-kvservice-secret": ["secret"],
    }
    assert {each["kind"] for each in made} >= {"Deployment", "RayService", "StatefulSet", "NetworkPolicy", "ConfigMap"}


def test_with_everything_off_nothing_optional_is_left() -> None:
    assert sorted({each["kind"] for each in objects("all-off")}) == [
        "ConfigMap",
        "Deployment",
        "Service",
        "ServiceAccount",
    ]


def test_what_is_made_from_something_else_is_current() -> None:
    made = load_generate().files()
    stale = [str(path.relative_to(ROOT)) for path, text in made.items() if path.read_text() != text]
    assert stale == [], "run `make charts` and commit what it changes"
    folders = {path.parent for path in made if path.parent != CHART}
    assert {path for folder in folders for path in folder.iterdir()} <= set(made)


def test_every_value_is_documented() -> None:
    def undocumented(schema: Manifest, path: str) -> list[str]:
        if "properties" not in schema:
            return [] if "description" in schema or "$ref" in schema else [path]
        return [
            missing for name, each in schema["properties"].items() for missing in undocumented(each, f"{path}.{name}")
        ]

    schema = json.loads((CHART / "values.schema.json").read_text())
    del schema["properties"]["global"]
    assert undocumented(schema, "") == []


def test_extra_objects_are_templates_too(tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(
        "extraObjects:\n"
        "  - {apiVersion: v1, kind: ConfigMap, metadata: {name: plain}}\n"
        "  - |\n    apiVersion: v1\n    kind: ConfigMap\n    metadata: {name: '{{ .Release.Name }}-text'}\n"
    )
    names = {each["metadata"]["name"] for each in template("--values", str(values)) if each["kind"] == "ConfigMap"}
    assert {"plain", "kv-text"} <= names


PLACED = """
gateway: {service: {type: NodePort, nodePort: 30051}}
models:
  - deployment: {name: small, num_gpus: 1, worker: {device: cuda, model: /models/small}}
    image: cuda
    source: {type: volume, claimName: models}
    extraResources: {nvidia.com/gpumem: 3000, rdma/hca: "1"}
    schedulerName: volcano
    extraEnv: [{name: NCCL_DEBUG, value: WARN}]
    envFrom: [{secretRef: {name: proxy}}]
    initContainers:
      - {name: warm, image: "busybox:1.37", command: ["true"], resources: {requests: {cpu: 10m, memory: 8Mi}}}
"""


def test_pods_of_workers_take_what_a_cluster_asks_for(tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(PLACED)
    made = template("--values", str(values))
    (service,) = (each for each in made if each["kind"] == "RayService")
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    pod = group["template"]
    whole = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": pod}
    kubernetes_validate.validate(whole, KUBERNETES, strict=True)
    (container,) = pod["spec"]["containers"]
    for which in ("requests", "limits"):
        assert container["resources"][which].items() >= {"nvidia.com/gpumem": "3000", "rdma/hca": "1"}.items()
    assert pod["spec"]["schedulerName"] == "volcano"
    assert {"name": "NCCL_DEBUG", "value": "WARN"} in container["env"]
    assert container["envFrom"] == [{"secretRef": {"name": "proxy"}}]
    (init,) = pod["spec"]["initContainers"]
    assert init["securityContext"] == container["securityContext"]
    ports = [port for each in made if each["kind"] == "Service" for port in each["spec"].get("ports", ())]
    assert [port["nodePort"] for port in ports if "nodePort" in port] == [30051]
