"""Puts the jobs' part of the gateway together for the composition root: it only constructs."""

from __future__ import annotations

from dataclasses import dataclass

from services.gateway.authorisation import Authorisation
from services.gateway.jobs import seals as payload_seals
from services.gateway.jobs.clients import GrpcSchedule
from services.gateway.jobs.dead_letters import DeadLetters
from services.gateway.jobs.ports import JobSpool, SchedulePort, Seals
from services.gateway.jobs.request import JobParser
from services.gateway.jobs.retries import Retries
from services.gateway.jobs.servicer import JobServicer
from services.gateway.jobs.submission import Submissions
from services.gateway.request import RequestParser
from services.gateway.settings import GatewaySettings
from services.mesh.app import Component
from services.mesh.channel import Channel
from services.mesh.clock import Clock


@dataclass(frozen=True, slots=True)
class Jobs:
    """What the composition root needs of them."""

    servicer: JobServicer
    retries: Retries
    parser: JobParser
    submissions: Submissions
    schedule: SchedulePort
    seals: Seals
    components: tuple[Component, ...] = ()
    """Started after all others, and stopped before them."""


def build_jobs(
    settings: GatewaySettings,
    clock: Clock,
    *,
    log: Channel,
    spool: JobSpool,
    parser: RequestParser,
    authorisation: Authorisation,
) -> Jobs:
    """The jobs' part; nothing runs yet. Raises StartError where the payload key file is not right."""
    return assembled(
        settings,
        clock,
        schedule=GrpcSchedule(log),
        spool=spool,
        seals=payload_seals.load(settings.payload_key_file),
        parser=parser,
        authorisation=authorisation,
    )


def assembled(
    settings: GatewaySettings,
    clock: Clock,
    *,
    schedule: SchedulePort,
    spool: JobSpool,
    seals: Seals,
    parser: RequestParser,
    authorisation: Authorisation,
) -> Jobs:
    """The same over any ports."""
    job_parser = JobParser(
        parser,
        clock,
        max_tokens_limit=settings.max_tokens_limit,
        webhook_allow_http=settings.webhook_allow_http,
    )
    submissions = Submissions(
        schedule=schedule,
        spool=spool,
        seals=seals,
        authorisation=authorisation,
        clock=clock,
        max_jobs_per_tenant=settings.max_jobs_per_tenant,
    )
    servicer = JobServicer(
        parser=job_parser,
        submissions=submissions,
        dead_letters=DeadLetters(schedule=schedule, seals=seals, submissions=submissions, changes=job_parser),
        schedule=schedule,
        seals=seals,
    )
    retries = Retries(submissions, spool, seals)
    return Jobs(servicer, retries, job_parser, submissions, schedule, seals)
