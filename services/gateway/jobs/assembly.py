"""Puts the jobs' part of the gateway together for the composition root: it only constructs."""

from __future__ import annotations

from dataclasses import dataclass

from services.gateway.settings import GatewaySettings
from services.mesh.app import Component


@dataclass(frozen=True, slots=True)
class Jobs:
    """What the composition root needs of them."""

    components: tuple[Component, ...] = ()
    """Started after all others, and stopped before them."""


def build_jobs(settings: GatewaySettings) -> Jobs:
    """The jobs' part; nothing runs yet."""
    return Jobs()
