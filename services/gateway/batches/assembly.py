"""Puts files and batches together for the composition root: it only constructs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from starlette.routing import BaseRoute

from services.gateway.batches.batches import Batches
from services.gateway.batches.http import BatchRoutes
from services.gateway.batches.request import LineParser
from services.gateway.batches.runner import BatchRunner, RunnerLimits
from services.gateway.files.folder import FolderBlobs
from services.gateway.files.http import FileRoutes
from services.gateway.files.nowhere import NoBlobs
from services.gateway.files.ports import Blobs
from services.gateway.files.s3 import S3Blobs
from services.gateway.files.store import FileLimits, FileStore
from services.gateway.files.sweeper import FileSweeper
from services.gateway.jobs.assembly import Jobs
from services.gateway.jobs.ports import JobSpool
from services.gateway.request import RequestParser
from services.gateway.settings import GatewaySettings
from services.mesh.app import Component, StartError
from services.mesh.clock import Clock
from services.mesh.interceptors import Chain
from services.mesh.source_address import TrustedProxies


@dataclass(frozen=True, slots=True)
class BatchParts:
    """What the composition root needs of them."""

    runner: BatchRunner
    routes: Sequence[BaseRoute]
    components: Sequence[Component]


def build_batches(
    settings: GatewaySettings,
    clock: Clock,
    jobs: Jobs,
    *,
    chain: Chain,
    proxies: TrustedProxies,
    spool: JobSpool,
    parser: RequestParser,
    blobs: Blobs | None = None,
) -> BatchParts:
    """Nothing runs yet. `blobs` instead of what the settings name. Raises StartError where a file of the
    settings cannot be read."""
    blobs, schedule, seals = blobs or _blobs(settings), jobs.schedule, jobs.seals
    limits = FileLimits(
        max_file_bytes=settings.files_max_bytes,
        max_tenant_bytes=settings.files_max_tenant_bytes,
        max_tenant_files=settings.files_max_per_tenant,
        ttl_s=settings.files_ttl_s,
    )
    files = FileStore(blobs, seals, clock, limits)
    runner = BatchRunner(
        schedule=schedule,
        spool=spool,
        seals=seals,
        files=files,
        parser=LineParser(parser, jobs.parser),
        clock=clock,
        limits=RunnerLimits(settings.batch_max_requests, settings.max_jobs_per_tenant),
    )
    batches = Batches(schedule=schedule, spool=spool, seals=seals, files=files, runner=runner, clock=clock)
    file_routes = FileRoutes(
        chain=chain,
        files=files,
        clock=clock,
        upload_timeout_s=settings.files_upload_timeout_s,
        proxies=proxies,
    )
    batch_routes = BatchRoutes(chain=chain, batches=batches, clock=clock, proxies=proxies)
    return BatchParts(
        runner, [*file_routes.routes(), *batch_routes.routes()], (blobs, FileSweeper(files, clock))
    )


def _blobs(settings: GatewaySettings) -> Blobs:
    if settings.files_s3_endpoint:
        file = settings.files_s3_secret_key_file
        try:
            secret = "" if file is None else file.read_text().strip()
        except OSError as error:
            raise StartError(
                f"the secret key of the store of files {file} cannot be read: {error.strerror}"
            ) from None
        return S3Blobs(
            endpoint=settings.files_s3_endpoint,
            bucket=settings.files_s3_bucket,
            region=settings.files_s3_region,
            access_key_id=settings.files_s3_access_key_id,
            secret_access_key=secret,
            prefix=settings.files_s3_prefix,
            ca_file=settings.files_s3_ca_file,
        )
    if settings.files_dir is not None or settings.replicas == 1:
        return FolderBlobs(settings.files_dir or settings.state_dir / "files")
    return NoBlobs()
