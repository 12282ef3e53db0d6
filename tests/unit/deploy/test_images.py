"""The Dockerfiles: no root, locked packages, no torch where it does not belong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from deploy.helm.rendering import container, only, render, value_set
from services.inference.engine.native import build

ROOT = Path(__file__).parents[3]
SERVICES = ("gateway", "auth", "inference", "logging")


def instructions(service: str) -> list[tuple[str, str]]:
    """(instruction, arguments) in order, continued lines joined and comments left out."""
    text = (ROOT / f"deploy/images/{service}.Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word.upper(), rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def last_stage(service: str) -> list[tuple[str, str]]:
    found = instructions(service)
    starts = [index for index, (word, _) in enumerate(found) if word == "FROM"]
    return found[starts[-1] :]


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_runs_its_service_and_not_as_root(service: str) -> None:
    stage = last_stage(service)
    (user,) = [rest for word, rest in stage if word == "USER"]
    (entrypoint,) = [rest for word, rest in stage if word == "ENTRYPOINT"]
    assert json.loads(entrypoint) == ["python", "-m", f"services.{service}"]
    manifests = render(value_set("production"))
    pod = only(manifests, "StatefulSet", f"llmos-{service}")["spec"]["template"]["spec"]
    context = pod["securityContext"]
    assert user == f"{context['runAsUser']}:{context['runAsGroup']}"
    assert context["runAsUser"] > 0
    it = container(manifests, service)
    assert it["command"] == json.loads(entrypoint), "the chart and the image start the same"
    assert it["image"].split("/")[-1].startswith(f"llmos-{service}:")


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_installs_its_lock_and_nothing_else(service: str) -> None:
    found = instructions(service)
    installs = [rest for word, rest in found if word == "RUN" and "install" in rest]
    locks = [re.findall(r"-r requirements/(\w+)\.txt", rest) for rest in installs]
    assert locks == [["proto"], [service]]
    assert all("--require-hashes" in rest and "--no-deps" in rest for rest in installs)
    assert not [rest for word, rest in found if word == "ADD"]
    assert not [
        rest for word, rest in found if word == "RUN" and re.search(r"\b(curl|wget|apt|apt-get)\b", rest)
    ]
    locked = (ROOT / f"requirements/{service}.txt").read_text()
    assert "--hash=sha256:" in locked
    if service != "inference":
        assert not re.search(r"(?m)^(torch|transformers|numpy|safetensors)==", locked)


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_holds_only_its_own_service(service: str) -> None:
    copied = [rest.split()[:-1] for word, rest in last_stage(service) if word == "COPY"]
    sources = [source for group in copied for source in group if not source.startswith("--")]
    compiled = ["/build/native"] if service == "inference" else []
    assert sorted(sources) == sorted(
        [
            "/opt/llmos",
            "/build/protos/gen",
            "services/__init__.py",
            "services/mesh",
            f"services/{service}",
            *compiled,
        ]
    )


@pytest.mark.parametrize("service", SERVICES)
def test_the_base_image_is_an_argument(service: str) -> None:
    found = instructions(service)
    assert found[0] == ("ARG", "BASE_IMAGE=python:3.11-slim")
    stages = [rest.split()[0] for word, rest in found if word == "FROM"]
    if service == "inference":  # its native step is compiled
        assert found[1] == ("ARG", "BUILD_IMAGE=python:3.11")
        assert stages == ["${BUILD_IMAGE}", "${BASE_IMAGE}"]
    else:
        assert stages == ["${BASE_IMAGE}", "${BASE_IMAGE}"]


def test_the_build_sees_no_state_and_no_secret() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*", "all is left out that is not named"
    assert set(lines[1:]) == {
        "!requirements",
        "!protos/generate.py",
        "!protos/llmos",
        "!services",
        "**/__pycache__",
    }


def test_the_native_step_is_put_where_it_is_looked_for() -> None:
    stage = last_stage("inference")
    (target,) = [rest.split()[-1] for word, rest in stage if word == "COPY" and "/build/native" in rest]
    assert Path(target) == Path("/app") / build.PREBUILT.relative_to(ROOT)
    builds = [rest for word, rest in instructions("inference") if word == "RUN" and build.__name__ in rest]
    assert builds == [f"/opt/llmos/bin/python -m {build.__name__} /build/native"]
