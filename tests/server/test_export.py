"""Deployment files: they parse, they say what they must, and their command is one that `openbook serve` takes."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from openbook.cli.serve import command as serve_command
from openbook.core.errors import UserError
from openbook.server.export import KINDS, Deployment, Kind, container_path, memory_need

ODD = 'o\'dd "name" \\ $(HOME) ${HOME} $HOME %n %% {{ x }} é \U0001f600 # : ,'
PLAIN = Deployment(
    arguments=["nano", "--workers", "2", "--profile", "exact", "--drain-seconds", "40"],
    host="127.0.0.1",
    port=8123,
    drain_s=40.0,
    workers=2,
    program=(sys.executable, "-m", "openbook.cli.main"),
)
FULL = replace(
    PLAIN,
    arguments=["/mounted/0/a model", "--served-name", ODD, "--adapter", "x=/mounted/1/x", "--workers", "2"],
    host="0.0.0.0",
    mounts=[("/models/a model", "/mounted/0/a model"), ("/models/$x", "/mounted/1/x")],
    key_file="/etc/openbook/keys",
    memory_bytes=(3 << 30) + 1,
)


def parsed(command: list[str]) -> click.Context:
    """A whole command line, as `openbook serve` understands it."""
    start = command.index("serve") + 1
    return serve_command.make_context("serve", command[start:], resilient_parsing=False)


def compose(deployment: Deployment) -> dict[str, Any]:
    return yaml.safe_load(deployment.render("compose"))


def k8s(deployment: Deployment) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The deployment, its one container, and the service."""
    workload, service = yaml.safe_load_all(deployment.render("k8s"))
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    return workload, container, service


def unit(deployment: Deployment) -> dict[str, list[str]]:
    """The settings of the systemd unit, by name."""
    found: dict[str, list[str]] = {}
    for line in deployment.render("systemd").splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def command_of(kind: Kind, deployment: Deployment) -> list[str]:
    """The command that runs in the end, when systemd, Kubernetes or Compose has put its variables in."""
    if kind == "systemd":
        (line,) = unit(deployment)["ExecStart"]
        line = line.replace("${CREDENTIALS_DIRECTORY}", "/run/credentials")
        assert not re.search(r"(?<!\$)(\$\$)*\$(?!\$)", line) and not re.search(r"(?<!%)(%%)*%(?!%)", line)
        return shlex.split(line.replace("$$", "$").replace("%%", "%"))
    if kind == "compose":
        words = compose(deployment)["services"]["openbook"]["command"]
        return [word.replace("$$", "$") for word in words]
    return [word.replace("$$(", "$(") for word in k8s(deployment)[1]["command"]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_is_the_one_that_was_given(kind: Kind) -> None:
    params = parsed(command_of(kind, PLAIN)).params
    assert (params["models"], params["workers"], params["profile"]) == (("nano",), 2, "exact")
    assert (params["port"], params["drain_seconds"]) == (8123, 40.0)
    assert params["host"] == ("127.0.0.1" if kind == "systemd" else "0.0.0.0")
    assert params["api_key_file"] is None

    params = parsed(command_of(kind, FULL)).params
    assert params["served_names"] == (ODD,)
    assert params["models"] == ("/mounted/0/a model",)
    assert params["adapters"] == ("x=/mounted/1/x",)
    expected = "/run/credentials/keys" if kind == "systemd" else "/run/secrets/openbook-keys"
    assert params["api_key_file"] == Path(expected)


def test_kubernetes_probes_secrets_and_rights() -> None:
    workload, container, service = k8s(PLAIN)
    pod = workload["spec"]["template"]
    assert (workload["apiVersion"], workload["kind"]) == ("apps/v1", "Deployment")
    assert workload["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"] == service["spec"]["selector"]
    assert container["ports"] == [{"name": "http", "containerPort": 8123}]
    assert service["spec"]["ports"] == [{"name": "http", "port": 8123, "targetPort": "http"}]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    key = {"name": "OPENBOOK_API_KEY", "valueFrom": {"secretKeyRef": {"name": "openbook", "key": "api-key"}}}
    assert key in container["env"]
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"] == {
        "requests": {"cpu": "2", "memory": "8192Mi"},
        "limits": {"memory": "8192Mi"},
    }
    pause_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["spec"]["terminationGracePeriodSeconds"] >= 40 + pause_s + 10
    # Whatever is written to is writable although the root is not.
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert {entry["value"] for entry in container["env"] if "value" in entry} <= writable == {"/cache", "/tmp"}


def test_kubernetes_mounts_models_and_the_file_of_keys() -> None:
    workload, container, _ = k8s(FULL)
    volumes = {volume["name"]: volume for volume in workload["spec"]["template"]["spec"]["volumes"]}
    mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounted["/mounted/0/a model"]["hostPath"] == {"path": "/models/a model"}
    assert mounted["/mounted/1/x"]["hostPath"] == {"path": "/models/$x"}
    assert mounted["/run/secrets/openbook-keys"]["secret"] == {"secretName": "openbook"}
    assert "OPENBOOK_API_KEY" not in str(container["env"])
    assert container["resources"]["limits"]["memory"] == "3073Mi"


def test_compose_health_secrets_and_rights() -> None:
    service = compose(PLAIN)["services"]["openbook"]
    assert service["ports"] == ["127.0.0.1:8123:8123"]
    assert service["environment"]["OPENBOOK_API_KEY"] == "${OPENBOOK_API_KEY:?give the API key}"
    assert (service["read_only"], service["cap_drop"], service["user"]) == (True, ["ALL"], "65534:65534")
    assert service["stop_grace_period"] == "55s"
    assert "pip wheel" in service["build"]["dockerfile_inline"]
    assert service["healthcheck"]["test"][:3] == ["CMD", "python", "-c"]
    compile(service["healthcheck"]["test"][3], "health", "exec")
    assert "http://127.0.0.1:8123/health" in service["healthcheck"]["test"][3]

    file = compose(replace(FULL, image="registry.example/openbook:1"))
    service = file["services"]["openbook"]
    assert (service["image"], "build" in service) == ("registry.example/openbook:1", False)
    assert "OPENBOOK_API_KEY" not in service["environment"]
    assert service["secrets"] == ["openbook-keys"]
    assert file["secrets"] == {"openbook-keys": {"file": "/etc/openbook/keys"}}
    assert service["volumes"] == [
        "openbook-cache:/cache",
        {"type": "bind", "source": "/models/a model", "target": "/mounted/0/a model", "read_only": True},
        {"type": "bind", "source": "/models/$$x", "target": "/mounted/1/x", "read_only": True},
    ]


@pytest.mark.parametrize(
    ("host", "published"),
    [("localhost", "127.0.0.1:8123:8123"), ("0.0.0.0", "0.0.0.0:8123:8123"), ("::1", "[::1]:8123:8123")],
)
def test_compose_publishes_the_port_where_it_was_asked_for(host: str, published: str) -> None:
    assert compose(replace(PLAIN, host=host))["services"]["openbook"]["ports"] == [published]


def test_systemd_stops_late_and_grants_little() -> None:
    settings = unit(PLAIN)
    assert settings["TimeoutStopSec"] == ["55"]
    assert settings["KillMode"] == ["mixed"]  # engine processes are closed by the server, not by the signal
    assert settings["EnvironmentFile"] == ["-/etc/openbook.env"] and "LoadCredential" not in settings
    assert settings["CapabilityBoundingSet"] == [""]
    for name in ("NoNewPrivileges", "PrivateTmp", "PrivateDevices", "DynamicUser", "ProtectHome"):
        assert settings[name] == ["yes"]
    assert settings["ProtectSystem"] == ["strict"]

    settings = unit(replace(FULL, port=443))
    assert settings["LoadCredential"] == ["keys:/etc/openbook/keys"] and "EnvironmentFile" not in settings
    assert settings["CapabilityBoundingSet"] == settings["AmbientCapabilities"] == ["CAP_NET_BIND_SERVICE"]


@pytest.mark.parametrize("arguments", [["/home/ann/model"], ["nano", "--adapter", "x=/home/ann/x"]])
def test_systemd_runs_what_lies_in_a_home_as_its_owner(arguments: list[str]) -> None:
    settings = unit(replace(PLAIN, arguments=arguments, user="ann"))
    assert (settings["User"], settings["ProtectHome"]) == (["ann"], ["read-only"])
    assert "DynamicUser" not in settings


def test_a_gpu_is_asked_for_where_one_is_used() -> None:
    on_gpu = replace(PLAIN, arguments=["nano", "--device", "cuda:0"])
    assert k8s(on_gpu)[1]["resources"]["limits"]["nvidia.com/gpu"] == 1
    devices = compose(on_gpu)["services"]["openbook"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]
    assert "PrivateDevices" not in unit(on_gpu) and unit(on_gpu)["ProtectClock"] == ["no"]
    assert "nvidia" not in PLAIN.render("k8s") + PLAIN.render("compose")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("deployment", [PLAIN, FULL, replace(PLAIN, arguments=["nano", "--device", "cuda"], port=80)])
def test_systemd_takes_the_unit(deployment: Deployment, tmp_path: Path) -> None:
    file = tmp_path / "openbook.service"
    file.write_text(deployment.render("systemd"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(file)], capture_output=True, text=True)
    ours = [line for line in done.stderr.splitlines() if "openbook" in line]  # it verifies what others it finds too
    assert (done.returncode, ours) == (0, [])


def test_paths_of_one_name_stay_apart() -> None:
    assert container_path("/a/model", 0) == "/mounted/0/model"
    assert container_path("/b/model", 1) == "/mounted/1/model"


def test_memory_is_worked_out_for_models_that_are_here(tiny_folder: Path, tmp_path: Path) -> None:
    one = memory_need([str(tiny_folder)], 1, 1 << 20)
    assert one is not None and (1 << 30) < one < (2 << 30)
    assert memory_need([str(tiny_folder)] * 2, 3, 1 << 20) == 6 * one
    assert memory_need([str(tiny_folder)], 1, 2 << 20) == one + (1 << 20)
    assert memory_need(["somebody/model"], 1, 1 << 20) is None
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError):
        memory_need([str(tmp_path / "model.gguf")], 1, 1 << 20)
