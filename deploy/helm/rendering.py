"""Renders the chart without a cluster, as an installation would."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import helm_python
import yaml

CHART = Path(__file__).parent / "llmos"
VALUE_SETS = ("dev", "production")
RELEASE, NAMESPACE = "llmos", "serving"

Values = Mapping[str, Any]
Manifest = dict[str, Any]


def value_set(name: str) -> dict[str, Any]:
    """One of the value sets in ci/."""
    return helm_python.values_from_yaml((CHART / "ci" / f"{name}-values.yaml").read_text())


def render_text(values: Values, *, release: str = RELEASE) -> dict[str, str]:
    """The rendered templates by their path.

    Raises:
        HelmError: a value is not one that the schema knows, or a combination cannot work.
    """
    with helm_python.Chart.load(CHART) as chart:
        # render() takes values as they are; an installation merges and checks them first.
        merged = chart.merge_values(dict(values))
        chart.validate_schema(merged)
        return chart.render(merged, name=release, namespace=NAMESPACE)


def render(values: Values, *, release: str = RELEASE) -> list[Manifest]:
    """The manifests, in order of their templates' names."""
    texts = render_text(values, release=release)
    documents = [yaml.safe_load_all(text) for path, text in sorted(texts.items()) if path.endswith(".yaml")]
    return [manifest for parsed in documents for manifest in parsed if manifest]


def only(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    """The one manifest of this kind and name."""
    (found,) = [m for m in manifests if m["kind"] == kind and m["metadata"]["name"] == name]
    return found


def container(manifests: list[Manifest], service: str, *, release: str = RELEASE) -> Manifest:
    """The container of a service."""
    pods = only(manifests, "StatefulSet", f"{release}-{service}")["spec"]["template"]["spec"]
    (found,) = pods["containers"]
    return dict(found)
