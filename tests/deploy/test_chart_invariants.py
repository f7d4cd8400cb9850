"""What must hold for every object of every profile, whatever its values."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from kvservice.cli.main import SPIN_COUNT
from kvservice.config.service import ServiceConfig
from kvservice.gateway.health import ALIVE
from kvservice.gateway.server import STOP_GRACE_S
from tests.deploy.chart import PROFILES, Manifest, PodTemplate, matches, objects, only, pods

SCALABLE = {("apps/v1", "Deployment"), ("apps/v1", "StatefulSet"), ("apps/v1", "ReplicaSet")}
"""Kinds of this chart's that have a scale subresource. RayService and RayCluster have none."""
RESTRICTED_VOLUMES = {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}
# Named by the values of the profiles: what the operator makes.
OPERATORS = {
    "Secret": {
        *("kvservice-secret", "kvservice-api-keys", "kvservice-gateway-tls", "kvservice-worker-tls", "kvservice-tls"),
        *("kvservice-redis", "redis-ca", "redis-state", "redis-kv", "redis-gcs", "models-s3", "registry"),
    },
    "PersistentVolumeClaim": {"models"},
}

every_profile = pytest.mark.parametrize("profile", PROFILES)


def config_of(profile: str) -> ServiceConfig:
    settings = json.loads(only(profile, "ConfigMap", "kv-kvservice")["data"]["config.json"])
    settings["gateway"]["secret"] = "x" * 32
    return ServiceConfig.model_validate(settings)


@every_profile
def test_pods_fit_the_restricted_security_standard(profile: str) -> None:
    for pod in pods(profile):
        assert pod.spec["securityContext"]["runAsNonRoot"], pod.owner
        assert pod.spec["securityContext"]["runAsUser"] > 0
        assert pod.spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod.spec)
        for volume in pod.spec.get("volumes", ()):
            assert set(volume) - {"name"} <= RESTRICTED_VOLUMES, volume
        contexts = [each["securityContext"] for each in pod.containers]
        if (options := autoscaler_of(profile)) and pod.component == "ray-head":
            contexts.append(options["securityContext"])
        for context in contexts:
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}


def autoscaler_of(profile: str) -> Manifest:
    services = objects(profile, "RayService")
    return services[0]["spec"]["rayClusterConfig"].get("autoscalerOptions", {}) if services else {}


@every_profile
def test_containers_say_what_they_need(profile: str) -> None:
    for pod in pods(profile):
        for each in pod.containers:
            resources = each["resources"]
            assert {"cpu", "memory"} <= set(resources["requests"]), pod.owner
            assert resources["limits"]["memory"] == resources["requests"]["memory"] or pod.component in (
                "gateway",
                "test",
            ), f"{pod.owner}: KV can't be given back, so its memory is requested whole"


@every_profile
def test_containers_that_stay_have_three_probes(profile: str) -> None:
    for pod in pods(profile):
        if pod.component == "test":
            continue
        for each in pod.spec["containers"]:
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(each), pod.owner
            for name in ("startupProbe", "readinessProbe", "livenessProbe"):
                port = next(iter(each[name].values())).get("port") if "exec" not in each[name] else None
                if port is not None:
                    assert port in pod.ports or port in pod.ports.values(), (pod.owner, name)


@every_profile
def test_ray_pods_are_not_asked_for_the_proxy_that_is_off(profile: str) -> None:
    # KubeRay gives them its own probes where they have none: a worker's would ask Ray Serve's HTTP proxy.
    for pod in pods(profile):
        if pod.component == "ray-head" or pod.component.startswith("worker-"):
            probe = pod.spec["containers"][0]["readinessProbe"]["httpGet"]
            assert probe["path"] in ("/api/gcs_healthz", "/api/local_raylet_healthz")
            assert pod.spec["containers"][0]["name"].startswith("ray-")


@every_profile
def test_a_gateway_without_workers_is_not_ready_but_lives(profile: str) -> None:
    (pod,) = (pod for pod in pods(profile) if pod.component == "gateway")
    (container,) = pod.spec["containers"]
    config = config_of(profile)
    assert config.gateway is not None
    assert container["readinessProbe"]["grpc"] == {"port": config.gateway.health_port}
    assert container["livenessProbe"]["grpc"] == {"port": config.gateway.health_port, "service": ALIVE}
    http = {"http": config.gateway.http_port} if config.gateway.http_port is not None else {}
    assert pod.ports == {
        **http,
        "grpc": config.gateway.port,
        "health": config.gateway.health_port,
        "metrics": config.telemetry.metrics_port,
    }


@every_profile
def test_pods_get_longer_to_end_than_they_take_to_drain(profile: str) -> None:
    config = config_of(profile)
    assert config.gateway is not None
    deployments = {f"worker-{each.name}": each for each in config.ray_deployments()}
    for pod in pods(profile):
        grace_s = pod.spec.get("terminationGracePeriodSeconds", 30)
        if pod.component == "gateway":
            (hook,) = pod.spec["containers"]
            (_, waited_s) = hook["lifecycle"]["preStop"]["exec"]["command"]
            assert grace_s > int(waited_s) + config.gateway.grace_s + STOP_GRACE_S
        elif (deployment := deployments.get(pod.component)) is not None:
            # It drains by a hook, and Ray Serve may drain it once more at its end.
            assert pod.spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] == ["kvservice", "drain-worker"]
            assert grace_s > deployment.stop_timeout_s + 30
            (service,) = objects(profile, "RayService")
            assert service["spec"]["rayClusterDeletionDelaySeconds"] > grace_s


@every_profile
def test_images_are_named_by_version_or_digest(profile: str) -> None:
    for pod in pods(profile):
        for each in pod.containers:
            _, _, tag = each["image"].rpartition("@" if "@" in each["image"] else ":")
            assert tag not in ("", "latest"), each["image"]


def test_digests_win() -> None:
    images = {each["image"] for pod in pods("many-gpus") for each in pod.containers}
    assert f"registry.example.com/kvservice/kvservice-gateway@sha256:{1:064}" in images


@every_profile
def test_every_selector_takes_pods_and_every_port_is_theirs(profile: str) -> None:
    templates = pods(profile)
    for service in objects(profile, "Service"):
        chosen = [pod for pod in templates if matches({"matchLabels": service["spec"]["selector"]}, pod.labels)]
        assert chosen, service["metadata"]["name"]
        for port in service["spec"]["ports"]:
            assert all(port["targetPort"] in pod.ports for pod in chosen)
    for kind in ("PodDisruptionBudget", "Deployment", "StatefulSet"):
        for each in objects(profile, kind):
            chosen = [pod for pod in templates if matches(each["spec"]["selector"], pod.labels)]
            assert len(chosen) == 1, (kind, each["metadata"]["name"], [pod.owner for pod in chosen])
    for each in objects(profile, "NetworkPolicy"):
        assert any(matches(each["spec"]["podSelector"], pod.labels) for pod in templates), each["metadata"]["name"]
    for each in objects(profile, "PodMonitor"):
        chosen = [pod for pod in templates if matches(each["spec"]["selector"], pod.labels)]
        assert chosen
        assert all(end["port"] in pod.ports for pod in chosen for end in each["spec"]["podMetricsEndpoints"])
    for each in objects(profile, "ServiceMonitor"):
        chosen = [s for s in objects(profile, "Service") if matches(each["spec"]["selector"], s["metadata"]["labels"])]
        assert len(chosen) == 1
        names = {port["name"] for port in chosen[0]["spec"]["ports"]}
        assert {end["port"] for end in each["spec"]["endpoints"]} <= names


@every_profile
def test_every_reference_leads_somewhere(profile: str) -> None:
    made = {(each["kind"], each["metadata"]["name"]): each for each in objects(profile)}
    for pod in pods(profile):
        for kind, name, keys in references(pod):
            if name not in OPERATORS.get(kind, ()):
                assert (kind, name) in made, pod.owner
                assert keys <= set(made[kind, name].get("data", keys)), pod.owner


def references(pod: PodTemplate) -> Iterator[tuple[str, str, set[str]]]:
    """Kind and name of each object that a pod names, and the keys that it takes of it."""
    if account := pod.spec.get("serviceAccountName"):
        yield "ServiceAccount", account, set()
    for volume in pod.spec.get("volumes", ()):
        if source := volume.get("secret"):
            yield "Secret", source["secretName"], {item["key"] for item in source.get("items", ())}
        if source := volume.get("configMap"):
            yield "ConfigMap", source["name"], set()
        if source := volume.get("persistentVolumeClaim"):
            yield "PersistentVolumeClaim", source["claimName"], set()
    for each in pod.containers:
        for variable in each.get("env", ()):
            if ref := variable.get("valueFrom", {}).get("secretKeyRef"):
                yield "Secret", ref["name"], {ref["key"]}
        for source in each.get("envFrom", ()):
            yield "Secret", source["secretRef"]["name"], set()


@every_profile
def test_volumes_are_there_and_used(profile: str) -> None:
    for pod in pods(profile):
        claims = {claim["metadata"]["name"] for claim in claims_of(profile, pod)}
        volumes = {volume["name"] for volume in pod.spec.get("volumes", ())} | claims
        used = {mount["name"] for each in pod.containers for mount in each.get("volumeMounts", ())}
        assert used == volumes, pod.owner


def claims_of(profile: str, pod: PodTemplate) -> list[Manifest]:
    for each in objects(profile, "StatefulSet"):
        if pod.owner == f"StatefulSet/{each['metadata']['name']}":
            return each["spec"].get("volumeClaimTemplates", [])
    return []


@every_profile
def test_variables_are_set_before_they_are_used(profile: str) -> None:
    for pod in pods(profile):
        for each in pod.containers:
            known: set[str] = set()
            for variable in each.get("env", ()):
                for name in ("STATE_PASSWORD", "KV_PASSWORD", "REDIS_PASSWORD"):
                    if f"$({name})" in variable.get("value", ""):
                        assert name in known
                known.add(variable["name"])
            assert len(known) == len(each.get("env", ())), f"{pod.owner}: a variable is there twice"


@every_profile
def test_scalers_aim_at_kinds_that_can_be_scaled(profile: str) -> None:
    for kind in ("HorizontalPodAutoscaler", "ScaledObject"):
        for each in objects(profile, kind):
            target = each["spec"]["scaleTargetRef"]
            assert (target["apiVersion"], target["kind"]) in SCALABLE
            scaled = only(profile, target["kind"], target["name"])
            assert "replicas" not in scaled["spec"], "an upgrade would set back what the scaler has set"


@every_profile
def test_disruption_budgets_of_ray_pods_are_numbers_that_stay(profile: str) -> None:
    for each in objects(profile, "PodDisruptionBudget"):
        if each["metadata"]["labels"]["app.kubernetes.io/component"].startswith("worker-"):
            # The disruption controller can count no share of pods whose owner has no scale subresource.
            assert set(each["spec"]) == {"minAvailable", "selector"}
            assert isinstance(each["spec"]["minAvailable"], int)


def test_gateways_workers_and_redis_have_disruption_budgets() -> None:
    components = {
        each["metadata"]["labels"]["app.kubernetes.io/component"]
        for each in objects("many-gpus", "PodDisruptionBudget")
    }
    assert components >= {"gateway", "worker-llama", "state", "kv", "gcs"}


@every_profile
def test_host_memory_covers_what_the_worker_may_fill(profile: str) -> None:
    deployments = {f"worker-{each.name}": each for each in config_of(profile).ray_deployments()}
    for pod in pods(profile):
        if (deployment := deployments.get(pod.component)) is None:
            continue
        worker = deployment.worker
        (container,) = pod.spec["containers"]
        (shm,) = (int(v["emptyDir"]["sizeLimit"]) for v in pod.spec["volumes"] if v["name"] == "shared-mem")
        kv_bytes = worker.host_bytes + (worker.kv_bytes if worker.device == "cpu" else 0)
        assert int(container["resources"]["requests"]["memory"]) >= kv_bytes + shm + 2**30
        assert deployment.num_cpus <= float(container["resources"]["requests"]["cpu"])
        assert worker.threads is not None
        gpus = {name: count for name, count in container["resources"]["limits"].items() if "/" in name}
        assert sum(map(int, gpus.values())) == deployment.num_gpus


@every_profile
def test_root_is_read_only_and_what_ray_writes_to_is_not(profile: str) -> None:
    for pod in pods(profile):
        if pod.component == "ray-head" or pod.component.startswith("worker-"):
            mounts = {mount["mountPath"]: mount["name"] for mount in pod.spec["containers"][0]["volumeMounts"]}
            volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
            assert {"/tmp", "/tmp/ray", "/dev/shm", "/var/lib/kvservice"} <= set(mounts)
            assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
            # KubeRay's own names: else it would add volumes beside them, and the autoscaler would see no logs.
            assert (mounts["/tmp/ray"], mounts["/dev/shm"]) == ("ray-logs", "shared-mem")
            (home,) = {each["value"] for each in pod.spec["containers"][0]["env"] if each["name"] == "HOME"}
            assert home in mounts


@every_profile
def test_only_rays_head_may_ask_kubernetes_and_only_where_it_scales(profile: str) -> None:
    for pod in pods(profile):
        may = pod.component == "ray-head" and bool(autoscaler_of(profile))
        assert pod.spec["automountServiceAccountToken"] is may, pod.owner


@every_profile
def test_no_secret_is_in_what_anybody_may_read(profile: str) -> None:
    for each in objects(profile):
        if each["kind"] == "Secret":
            continue
        text = json.dumps(each)
        assert "PRIVATE KEY" not in text
        assert "redis://:$(" in text or "redis://:" not in text


@every_profile
def test_a_new_chart_version_is_no_new_ray_cluster(profile: str) -> None:
    for pod in pods(profile):
        assert not {"helm.sh/chart", "app.kubernetes.io/version"} & set(pod.labels)


def test_workers_spin_as_the_commands_do() -> None:
    (pod,) = (pod for pod in pods("cpu-trial") if pod.component == "worker-small")
    assert {"name": "GOMP_SPINCOUNT", "value": SPIN_COUNT} in pod.spec["containers"][0]["env"]


def test_a_gpu_may_be_a_slice_of_one() -> None:
    (pod,) = (pod for pod in pods("many-gpus") if pod.component == "worker-qwen")
    assert pod.spec["containers"][0]["resources"]["limits"]["nvidia.com/mig-1g.10gb"] == "1"


def test_state_is_on_disk_and_kv_is_not() -> None:
    sets = {each["metadata"]["name"]: each["spec"] for each in objects("cpu-trial", "StatefulSet")}
    claims = {name: bool(spec.get("volumeClaimTemplates")) for name, spec in sets.items()}
    assert claims == {"kv-kvservice-state": True, "kv-kvservice-kv": False, "kv-kvservice-gcs": True}
