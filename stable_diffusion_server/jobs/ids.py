"""Ids of jobs: whose they are, what others are shown of them, and keys that were used before. No I/O."""

from __future__ import annotations

from dataclasses import replace

from stable_diffusion_server.errors import InFlight, KeyReused
from stable_diffusion_server.jobs.events import Standing
from stable_diffusion_server.jobs.store.records import Claim, Entry, Repeat
from stable_diffusion_server.jobs.tracked_job import Live
from stable_diffusion_server.types import Caller


def scoped(job_id: str, caller: Caller) -> str:
    """The whole id of a job whose caller chose its id: keys have their own, and know nothing of one another's."""
    return f"{caller.owner}:{job_id}" if caller.owner else job_id


def taken() -> InFlight:
    """The error for an id that its caller has given to another job already."""
    return InFlight("There is a job of this id already.", field="X-Job-ID")


def shown_to(caller: Caller, found: Live | Entry) -> Standing:
    """How a job stands; one of another caller under its whole id, since the other may have chosen its end."""
    entry = found.entry if isinstance(found, Live) else found
    standing = found.standing if isinstance(found, Live) else Standing.of(found)
    return standing if entry.caller.owner == caller.owner else replace(standing, id=entry.id)


def repeated(claim: Claim, before: Repeat) -> Repeat:
    """What a key was answered with. Raises `KeyReused` for another request, `InFlight` while nothing is."""
    if before.fingerprint != claim.fingerprint:
        raise KeyReused("This key came with another request before.", field="Idempotency-Key")
    if before.job_id is None and before.outcome is None:
        raise InFlight("The request with this key is being answered.", field="Idempotency-Key", retry_after=1)
    return before
