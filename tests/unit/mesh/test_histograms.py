"""Our histograms beside OpenTelemetry's: the same numbers, read by the same readers."""

from __future__ import annotations

from typing import Any

import prometheus_client
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource

from services.mesh.histograms import MAX_SERIES, Histogram, Histograms

BOUNDS = (0.1, 1.0, 10.0)


def points(reader: InMemoryMetricReader) -> dict[str, Any]:
    data = reader.get_metrics_data()
    assert data is not None
    return {
        metric.name: {tuple(sorted(point.attributes.items())): point for point in metric.data.data_points}
        for scope in data.resource_metrics[0].scope_metrics
        for metric in scope.metrics
    }


@given(
    st.lists(
        st.tuples(
            st.one_of(st.sampled_from(BOUNDS), st.floats(0, 100)),
            st.sampled_from(["a", "b"]),
            st.sampled_from(["", "x"]),
        ),
        min_size=1,
        max_size=50,
    )
)
def test_they_say_what_opentelemetrys_own_say(recorded: list[tuple[float, str, str]]) -> None:
    ours, reader = Histograms(), InMemoryMetricReader()
    meter = MeterProvider(metric_readers=[reader]).get_meter("test")
    ours.join(reader, Resource.create())
    made = ours.make("ours", unit="s", description="d", bounds=BOUNDS, labels=("kind", "error"))
    theirs = meter.create_histogram("theirs", unit="s", explicit_bucket_boundaries_advisory=list(BOUNDS))
    for value, kind, error in recorded:
        made.record(value, (kind, error))
        theirs.record(value, {"kind": kind} | ({"error": error} if error else {}))
    found = points(reader)
    assert found["ours"].keys() == found["theirs"].keys()
    for labels, mine in found["ours"].items():
        other = found["theirs"][labels]
        assert (mine.count, list(mine.bucket_counts)) == (other.count, list(other.bucket_counts))
        assert (mine.min, mine.max, tuple(mine.explicit_bounds)) == (other.min, other.max, BOUNDS)
        assert abs(mine.sum - other.sum) < 1e-9


def test_prometheus_reads_them_and_those_of_opentelemetry() -> None:
    ours, reader = Histograms(), PrometheusMetricReader()
    meters = MeterProvider(metric_readers=[reader])
    ours.join(reader, Resource.create())
    ours.make("our.time", unit="s", description="d", bounds=BOUNDS, labels=("kind",)).record(0.5, ("a",))
    meters.get_meter("test").create_counter("their.count").add(3)
    try:
        text = prometheus_client.generate_latest().decode()
    finally:
        meters.shutdown()
    buckets = [line for line in text.splitlines() if "our_time_seconds_bucket{" in line]
    assert len(buckets) == len(BOUNDS) + 1
    assert all('kind="a"' in line for line in buckets)
    assert "their_count_total" in text


def test_more_series_than_the_bound_are_counted_together() -> None:
    histogram = Histogram("h", unit="s", description="d", bounds=BOUNDS, labels=("kind",))
    for number in range(MAX_SERIES + 10):
        histogram.record(0.5, (str(number),))
    metric = histogram.collect()
    assert metric is not None
    found = {tuple(point.attributes.values()): point.count for point in metric.data.data_points}
    assert len(found) == MAX_SERIES + 1
    assert found[()] == 10
