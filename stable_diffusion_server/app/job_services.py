"""Builds what keeps jobs: the journal, who draws from it, who tells webhooks."""

from __future__ import annotations

from stable_diffusion_server.api.schemas.wire import job_body
from stable_diffusion_server.app.storage import Stores
from stable_diffusion_server.generation.service import Service
from stable_diffusion_server.jobs.events import Standing
from stable_diffusion_server.jobs.manager import Jobs
from stable_diffusion_server.jobs.policy import Rules
from stable_diffusion_server.jobs.store.records import Entry
from stable_diffusion_server.jobs.store.sqlite_store import Journal
from stable_diffusion_server.net.url_policy import Allowance
from stable_diffusion_server.net.webhook_client import Poster
from stable_diffusion_server.observability.crash_reports import DeviceRecord
from stable_diffusion_server.parsing.strict_json import dumps
from stable_diffusion_server.settings import Settings
from stable_diffusion_server.types import Caller


def build_jobs(settings: Settings, service: Service, stores: Stores, record: DeviceRecord) -> Jobs:
    """The jobs over a service, nothing opened or started."""

    def describe(entry: Entry) -> str:
        return dumps(job_body(Standing.of(entry), lambda key: stores.url_at(entry.base, key)))

    rules = Rules(
        most_waiting=settings.jobs_waiting,
        journal_bytes=settings.journal_bytes,
        at_once=settings.jobs_at_once,
        keep_hours=settings.job_hours,
        repeat_hours=settings.idempotency_hours,
        id_prefix=settings.job_id_prefix,
        longest=settings.max_timeout,
        webhook_secret=settings.webhook_secret.get_secret_value(),
    )
    journal = Journal(settings.data_dir / "journal.db", settings.journal_bytes)
    poster = Poster(settings.fetch_timeout, [Allowance.parse(entry) for entry in settings.fetch_allow])
    callers = {key.name: Caller(key.name, key.prefix, key.admin) for key in settings.read_keys()}

    def current(caller: Caller) -> Caller:
        return callers.get(caller.name, caller)

    return Jobs(service, journal, rules, describe, poster, record, current)
