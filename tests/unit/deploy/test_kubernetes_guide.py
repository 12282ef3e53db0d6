"""The commands of docs/kubernetes.md fit the chart and the Dockerfiles: options, values, names, keys."""

from __future__ import annotations

import itertools
import re
import shlex
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml

from deploy.helm.rendering import CHART, NAMESPACE, RELEASE, container, only, render, value_set

ROOT = Path(__file__).parents[3]
GUIDE = (ROOT / "docs/kubernetes.md").read_text()
SERVICES = ("gateway", "auth", "inference", "logging")
NO_VALUES = {"values.yaml", "ca.crt", "tls.crt", "tls.key", "registry.example.com"}


def commands() -> list[list[str]]:
    """Each command of the guide in words, one for each round of its loops."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL):
        text = block.replace("\\\n", " ")
        for line in text.splitlines():
            rounds = SERVICES if "$service" in line else ("",)
            if not line.startswith("for ") and line != "done":
                words = [
                    re.sub(r"\$\(.*?\)", "GENERATED", line.strip()).replace("$service", s) for s in rounds
                ]
                found += [shlex.split(command) for command in words]
    return found


def of(*beginning: str) -> list[list[str]]:
    """The commands that begin so; there is one at least."""
    found = [words for words in commands() if words[: len(beginning)] == list(beginning)]
    assert found, beginning
    return found


def options(words: list[str]) -> dict[str, list[str]]:
    """What follows each option, by option: `-t x` and `--t=x` alike."""
    found: dict[str, list[str]] = defaultdict(list)
    for word, following in itertools.pairwise([*words, ""]):
        if word.startswith("-"):
            name, _, value = word.partition("=")
            found[name].append(value or following)
    return found


def values_of(words: list[str]) -> dict[str, Any]:
    given = options(words)
    merged: dict[str, Any] = {}
    for file in given.get("--values", []):
        merged = {**merged, **helm_python.values_from_yaml((ROOT / file).read_text())}
    for expression in given.get("--set", []):
        merged = merge(merged, helm_python.parse_set_string(expression))
    return merged


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: merge(below[key], above[key])
        for key in below.keys() & above.keys()
        if isinstance(above[key], dict)
    }
    return {**below, **above, **both}


def test_every_command_is_of_a_known_kind() -> None:
    known = {"buildah", "helm", "kubectl", "LLMOS_GATEWAY_SERVICE_SECRET_FILE=FILE"}
    assert {words[0] for words in commands()} == known


def test_images_are_built_from_files_that_are_there_under_the_names_that_the_chart_uses() -> None:
    (install,) = of("helm", "install")
    manifests = render(values_of(install))
    built = {options(words)["-t"][0]: ROOT / options(words)["-f"][0] for words in of("buildah", "bud")}
    assert set(built) == {container(manifests, service)["image"] for service in SERVICES}
    arguments = {
        argument for file in built.values() for argument in re.findall(r"(?m)^ARG (\w+)", file.read_text())
    }
    assert set(re.findall(r"--build-arg (\w+)=", GUIDE)) == arguments


@pytest.mark.parametrize("verb", ["install", "upgrade", "template", "lint"])
def test_the_chart_renders_with_the_values_of_the_command(verb: str) -> None:
    (install,) = of("helm", "install")
    (words,) = of("helm", verb)
    assert "deploy/helm/llmos" in words
    assert (ROOT / "deploy/helm/llmos").samefile(CHART)
    if verb != "lint":
        assert words[2] == RELEASE
        assert options(words)["--namespace"] == [NAMESPACE]
    before = values_of(install) if "--reuse-values" in words else {}
    assert render(merge(before, values_of(words)))


def test_settings_are_given_as_the_guide_says() -> None:
    (install,) = of("helm", "install")
    expressions = re.findall(r"`--set ([^`]+)`", GUIDE)
    assert expressions
    for expression in expressions:
        manifests = render(merge(values_of(install), helm_python.parse_set_string(expression)))
        service, _, rest = expression.partition(".settings.")
        name, _, value = rest.partition("=")
        env = {e["name"]: e.get("value") for e in container(manifests, service)["env"]}
        assert env[f"LLMOS_{service.upper()}_{name.upper()}"] == value


def test_secrets_are_made_under_the_names_and_with_the_keys_that_the_pods_ask_for() -> None:
    made = {}
    for words in of("kubectl", "-n", NAMESPACE, "create", "secret", "generic"):
        given = options(words[3:])
        literal = [value.split("=")[0] for value in given.get("--from-literal", [])]
        file = [value.split("=")[0] for value in given.get("--from-file", [])]
        made[words[6]] = set(literal + file)
    (install,), (upgrade,) = of("helm", "install"), of("helm", "upgrade")
    manifests = render(merge(values_of(install), values_of(upgrade)))
    for service in SERVICES:
        pod = only(manifests, "StatefulSet", f"{RELEASE}-{service}")["spec"]["template"]["spec"]
        for secret in (volume["secret"] for volume in pod["volumes"] if "secret" in volume):
            asked = {item["key"] for item in secret.get("items", [])} or {"tls.crt", "tls.key", "ca.crt"}
            assert asked <= made[secret["secretName"]]


def rows() -> Iterator[tuple[str, str]]:
    """(Secret, its first SAN) of the table of certificates."""
    yield from re.findall(r"^\| `([\w-]+-tls)` \| `([^`]+)`", GUIDE, re.MULTILINE)


def test_certificates_are_for_the_names_under_which_services_are_called() -> None:
    table = dict(rows())
    (install,) = of("helm", "install")
    manifests = render(values_of(install))
    called: dict[str, str] = {f"{RELEASE}-gateway.{NAMESPACE}.svc": "gateway"}
    for service in SERVICES:
        for entry in container(manifests, service)["env"]:
            if entry["name"].endswith(("_TARGET", "_TARGETS")):
                kind = entry["name"].removeprefix(f"LLMOS_{service.upper()}_").split("_")[0].lower()
                called |= {target.rpartition(":")[0]: kind for target in entry["value"].split(",")}
    assert set(called.values()) == set(SERVICES)
    for host, service in called.items():
        pod = only(manifests, "StatefulSet", f"{RELEASE}-{service}")["spec"]["template"]["spec"]
        (secret,) = [volume["secret"]["secretName"] for volume in pod["volumes"] if volume["name"] == "tls"]
        pattern = re.escape(table[secret]).replace(r"\*", "[a-z0-9-]+")
        assert re.fullmatch(pattern, host), f"{secret} is not good for {host}"


def test_every_value_that_is_named_is_one() -> None:
    known = yaml.safe_load((CHART / "values.yaml").read_text())
    named = {
        name
        for name in re.findall(r"`([a-z]\w*(?:\.[a-z]\w*)+)(?:: [^`]*)?`", GUIDE)
        if name not in NO_VALUES
    }
    assert len(named) > 10
    for name in named:
        table = known
        for part in name.split("."):
            assert part in table, name
            table = table[part]


def test_what_is_labelled_so_are_the_claims() -> None:
    (words,) = of("kubectl", "-n", NAMESPACE, "delete", "persistentvolumeclaims")
    label, _, value = options(words)["--selector"][0].partition("=")
    for manifest in render(value_set("production")):
        for claim in (
            manifest["spec"].get("volumeClaimTemplates", []) if manifest["kind"] == "StatefulSet" else []
        ):
            assert claim["metadata"]["labels"][label] == value


def test_what_the_notes_print_is_what_the_guide_says() -> None:
    notes = (CHART / "templates/NOTES.txt").read_text()
    for beginning, target, rest in (
        ("rollout status", "gateway", ""),
        ("exec", "auth", " -- cat /var/lib/llmos/state/admin-key"),
    ):
        assert f"{beginning} statefulset/{{{{ ${target} }}}}{rest}" in notes
        assert f"kubectl -n {NAMESPACE} {beginning} statefulset/{RELEASE}-{target}{rest}" in GUIDE
