"""Units, compose files, Kubernetes manifests and Dockerfiles: what reads them accepts them, and secrets stay apart."""

import shutil
import subprocess

import kubernetes_validate
import pytest
import yaml

from deploy.command import main
from tests.support import ROOT
from tests.support.sites import PRIVATE, kit


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not here")
def test_systemd_accepts_the_units_and_finds_little_exposed(site, tmp_path):
    folder = site / "kits/ward-2"
    place = ["--programs", "/usr/bin", "--user", "daemon", "--installed"]
    assert main(["site", "kit", str(site), "ward-2", *place, str(folder), "data=/data"]) == 0
    other = tmp_path / "other"
    create = ["site", "create", str(other), "--address", "127.0.0.1", *place, str(other / "coordinator")]
    assert main(create) == 0
    units = [*folder.glob("*.service"), *(other / "coordinator").glob("*.service")]
    assert len(units) == 4
    verified = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
    assert (verified.returncode, verified.stderr) == (0, "")
    for unit in units:
        judged = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", "--threshold=30", "--no-pager", unit],
            capture_output=True,
            text=True,
        )
        assert judged.returncode == 0, judged.stdout[-400:]


def test_the_node_s_key_and_the_code_of_runs_have_users_of_their_own(site):
    folder = kit(site)
    keys, code = (
        (folder / f"bouquet-ward-1-{part}.service").read_text().splitlines() for part in ("supernode", "superexec")
    )
    assert "User=bouquet-keys" in keys
    assert "User=bouquet" in code
    assert not [line for line in code if "node.key" in line]
    assert "node.key" not in (folder / "superexec.sh").read_text()
    for unit in (keys, code):
        assert "IPAddressDeny=any" in unit
        assert "IPAddressAllow=localhost" in unit
        assert {"Restart=always", "StartLimitIntervalSec=0"} <= {*unit}, "tried again until the SuperLink lets it in"


def test_compose_files_name_buildable_images_and_keep_secrets_apart(site):
    for file in (kit(site) / "compose.yaml", site / "coordinator/compose.yaml"):
        services = yaml.safe_load(file.read_text())["services"]
        for name, service in services.items():
            image = service["image"].split(":")[0].removeprefix("bouquet-")
            dockerfile = (ROOT / f"deploy/images/{image}.Dockerfile").read_text()
            assert "--constraint constraints.txt" in dockerfile
            assert dockerfile.rstrip().endswith("USER bouquet")
            assert service["read_only"]
            assert service["cap_drop"] == ["ALL"]
            assert all(place.endswith(":ro") for place in service["volumes"] if ":/kit" in place)
            assert name == "supernode" or not [place for place in service["volumes"] if "node.key" in place]
        assert "superexec" in services


def test_a_container_has_as_many_gpus_as_the_node_names(site):
    for device, gpus in (("auto", 1), ("cuda:1", 1), ("cuda:0,cuda:1", 2), ("cuda:0+cuda:1,cuda:2+cuda:3", 4)):
        folder = kit(site, f"device={device}")
        compose = yaml.safe_load((folder / "compose.yaml").read_text())["services"]["superexec"]
        (reserved,) = compose["deploy"]["resources"]["reservations"]["devices"]
        workload = next(yaml.safe_load_all((folder / "kubernetes.yaml").read_text()))
        _, code = workload["spec"]["template"]["spec"]["containers"]
        assert reserved["count"] == code["resources"]["limits"]["nvidia.com/gpu"] == gpus


def test_the_kubernetes_manifests_fit_the_schema_and_keep_secrets_out(site):
    """Read by the published schema; not one cluster has run them."""
    image = "registry.example.org/bouquet-node@sha256:" + "0" * 64
    folders = {"ward-1": kit(site, "--port", "9123", "--image", image), "coordinator": site / "coordinator"}
    for folder in folders.values():
        text = (folder / "kubernetes.yaml").read_text()
        assert not PRIVATE.search(text.encode())
        documents = list(yaml.safe_load_all(text))
        for document in documents:
            kubernetes_validate.validate(document, "1.32", strict=True)
        (workload,) = [document for document in documents if document["kind"] == "StatefulSet"]
        assert workload["spec"]["replicas"] == 1
        pod = workload["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        claims = {claim["metadata"]["name"] for claim in workload["spec"]["volumeClaimTemplates"]}
        assert not [volume for volume in pod["volumes"] if "hostPath" in volume]
        assert volumes["kit"]["secret"]["defaultMode"] == 0o440
        for container in (*pod["containers"], *pod.get("initContainers", [])):
            assert {mount["name"] for mount in container["volumeMounts"]} <= {*volumes, *claims}
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert container["resources"]["limits"]["memory"]
        for container in pod["containers"]:
            assert (folder / container["command"][1].removeprefix("/kit/")).exists()
            ports = {port["containerPort"] for port in container["ports"]}
            assert {container[probe]["grpc"]["port"] for probe in ("startupProbe", "livenessProbe")} <= ports
    documents = list(yaml.safe_load_all((folders["ward-1"] / "kubernetes.yaml").read_text()))
    link, code = documents[0]["spec"]["template"]["spec"]["containers"]
    assert {link["image"], code["image"]} == {image}
    assert code["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert (link["livenessProbe"]["grpc"]["port"], code["livenessProbe"]["grpc"]["port"]) == (9124, 9125)
    assert [mount["mountPath"] for mount in code["volumeMounts"] if mount["name"] == "data"] == ["/data"]
    assert {mount["name"] for mount in code["volumeMounts"]}.isdisjoint({"link"}), "the key is the SuperNode's alone"
    assert documents[1]["spec"]["egress"][1]["ports"] == [{"port": 9092, "protocol": "TCP"}]


@pytest.mark.skipif(not shutil.which("hadolint"), reason="hadolint is not here")
@pytest.mark.parametrize("name", ["coordinator", "node"])
def test_hadolint_accepts_the_dockerfiles(name):
    file = ROOT / f"deploy/images/{name}.Dockerfile"
    # Versions of Debian packages are the base image's.
    linted = subprocess.run(["hadolint", "--ignore", "DL3008", file], capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout
