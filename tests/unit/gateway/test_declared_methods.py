"""Nothing is left out: public methods are declared for policy, routes stand in the access matrix."""

from __future__ import annotations

import re
from pathlib import Path

from starlette.routing import Match, Route

from services.gateway.batches.assembly import build_batches
from services.gateway.http import HttpEdge
from services.gateway.oauth.http import OAuthRoutes
from services.gateway.request import RequestParser
from services.mesh.actions import ACTIONS, OPEN_METHODS
from services.mesh.clock import SystemClock
from services.mesh.health import Health
from services.mesh.policy import SCOPES
from services.mesh.source_address import NO_PROXIES
from tests.framework.access_matrix import ROUTES, descriptor_of
from tests.framework.gateway_fakes import Bench, FakeReplica
from tests.framework.gateway_http import chain_of
from tests.framework.gateway_jobs import JobBench

PROTOS = Path(__file__).parents[3] / "protos" / "llmos"
INTERNAL = {
    f"/llmos.auth.v1.TokenService/{name}"
    for name in ("VerifyApiKey", "RenewIdentity", "WatchRevocations", "WatchPolicy")
}
"""For the mesh's own services: no action stands for them, so the gateway refuses them to everybody."""


def public_services() -> list[str]:
    """By the protos: all of the gateway's, and those that it forwards."""
    found = ["llmos.logging.v1.AuditService"]
    for package in ("gateway", "auth"):
        for file in sorted((PROTOS / package / "v1").glob("*_service.proto")):
            names = re.findall(r"^service (\w+)", file.read_text(), re.MULTILINE)
            found += [f"llmos.{package}.v1.{name}" for name in names]
    return found


def test_r26_each_public_method_is_declared_and_no_other() -> None:
    methods = {
        f"/{service}/{method.name}"
        for service in public_services()
        for method in descriptor_of(service).methods
    }
    assert methods == ACTIONS.keys() | OPEN_METHODS | INTERNAL
    assert not ACTIONS.keys() & OPEN_METHODS


def test_r26_each_action_names_scopes_that_exist() -> None:
    assert {scope for action in ACTIONS.values() for scope in action.scopes} <= SCOPES.keys()


async def test_r26_each_route_stands_in_the_access_matrix() -> None:
    bench, clock = Bench([FakeReplica()]), SystemClock()
    chain = chain_of(bench)
    oauth = OAuthRoutes(chain=chain, tokens=None, outcomes=None, clock=clock, issuer="https://i")  # type: ignore[arg-type]
    jobs = JobBench(bench)
    built, parser = jobs.jobs, RequestParser(max_tokens_limit=1)
    batches = build_batches(
        jobs.settings, clock, built, chain=chain, proxies=NO_PROXIES, spool=jobs.spool, parser=parser
    )
    app = HttpEdge(
        chain=chain,
        parser=parser,
        completions=bench.completions,
        models=bench.models,
        jobs=built.parser,
        retries=built.retries,
        health=Health(),
        clock=clock,
        max_body_bytes=1,
        routes=[*oauth.routes(), *batches.routes],
    ).app()
    served = [route for route in app.routes if isinstance(route, Route)]
    assert len(served) == len(app.routes)
    reached = []
    for method, path in ROUTES:
        scope = {"type": "http", "method": method, "path": path}
        reached += [route for route in served if route.matches(scope)[0] is Match.FULL]
    assert len(reached) == len(ROUTES)
    assert {id(route) for route in reached} == {id(route) for route in served}
    assert sum(len((route.methods or set()) - {"HEAD"}) for route in served) == len(ROUTES)
