"""Builds what keeps jobs: the journal, who draws from it, who tells webhooks."""

from __future__ import annotations

from stable_diffusion_server.api import job_body
from stable_diffusion_server.app.storage import StorageStack
from stable_diffusion_server.generation import GenerationService
from stable_diffusion_server.jobs import JobManager, JobPolicy, JobRecord, JobStatus, SqliteJobStore
from stable_diffusion_server.net import AllowedTarget, WebhookClient
from stable_diffusion_server.observability import DeviceRecord
from stable_diffusion_server.parsing import dumps
from stable_diffusion_server.settings import Settings
from stable_diffusion_server.types import Caller


def build_jobs(
    settings: Settings, service: GenerationService, stores: StorageStack, record: DeviceRecord
) -> JobManager:
    """The jobs over a service, nothing opened or started."""

    def describe(job: JobRecord) -> str:
        return dumps(job_body(JobStatus.from_record(job), lambda key: stores.url_at(job.base_url, key)))

    policy = JobPolicy(
        max_queued=settings.jobs_max_queued,
        store_bytes=settings.job_store_bytes,
        concurrency=settings.jobs_concurrency,
        retention_hours=settings.job_retention_hours,
        idempotency_hours=settings.idempotency_hours,
        id_prefix=settings.job_id_prefix,
        max_seconds=settings.max_timeout,
        webhook_secret=settings.webhook_secret.get_secret_value(),
    )
    store = SqliteJobStore(settings.data_dir / "journal.db", settings.job_store_bytes)
    transport = WebhookClient(settings.fetch_timeout, [AllowedTarget.parse(entry) for entry in settings.fetch_allow])
    callers = {key.name: Caller(key.name, key.prefix, key.admin) for key in settings.read_keys()}

    def refresh(caller: Caller) -> Caller:
        return callers.get(caller.name, caller)

    return JobManager(service, store, policy, describe, transport, record, refresh)
