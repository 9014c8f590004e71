"""Runs the application as replicas under Ray Serve: `python -m deploy.ray_serve --replicas 2`.

On a cluster, use `import_path: deploy.ray_serve:application` with the fields of `Scale` as `args`.
"""

from __future__ import annotations

import argparse
import math
import os
import pickle
import random
import signal
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import BaseModel, Field
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig, RequestRouterConfig
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RunningReplica
from starlette.types import Message, Scope

from deploy.replicas import ReplicaApp, ReplicaHealth, ReplicaLease, owner_of, ranked, sticks_to, work_of
from stable_diffusion_server.app import ServingHooks, create_app
from stable_diffusion_server.settings import read_settings

ROOT = Path(__file__).resolve().parent.parent
APPLICATION, DEPLOYMENT = "draw", "Replica"
# Concurrent requests per replica, of any kind. The replica's own queue is shorter and refuses first.
_MOST_AT_A_TIME = 1000
_ASKED_OF_ALL_SECONDS = 5.0


class Scale(BaseModel, extra="forbid"):
    """Number and size of replicas, and when to scale."""

    replicas: int = Field(2, ge=1, description="Replicas at the start, and always where `most` is not larger.")
    most: int = Field(0, ge=0, description="Most replicas, by pictures that wait and are drawn; 0: always `replicas`.")
    cpus: float = Field(1.0, gt=0, description="CPU cores that each replica reserves.")
    gpus: float = Field(0.0, ge=0, description="GPUs that each replica reserves and sees.")
    pictures_each: float = Field(8.0, gt=0, description="Pictures to wait or be drawn at each replica, when scaling.")
    up_seconds: float = Field(5.0, ge=0, description="Seconds of need before there are more replicas.")
    down_seconds: float = Field(300.0, ge=0, description="Seconds without need before there are fewer.")
    drain_seconds: float = Field(600.0, gt=0, description="Seconds a replica may take to end its jobs before it stops.")


class StickyRequestRouter(ConsistentHashRouter):
    """Routes a request to the replica that holds its job or session, and any other to the less busy of two.

    Derived from Ray's session router, which ensures that a request reaches exactly the replica chosen for it.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas in the order in which they are tried, grouped by rank."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas] if candidate_replicas else []
        pending_request.routing_context.should_backoff = True
        key = _key_of(pending_request)
        if key is None:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        by_folder = {replica.replica_metadata.get("folder", -1): replica for replica in candidate_replicas}
        owner = owner_of(key)
        order = [owner] if owner in by_folder else ranked(key, list(by_folder))
        return [[by_folder[number]] for number in order]


def _key_of(pending: PendingRequest) -> str | None:
    """The routing key: Ray's session id (`x-session-id`) if there is one, otherwise that of `sticks_to`."""
    if pending.metadata.session_id:
        return str(pending.metadata.session_id)
    if not pending.metadata.is_http_request or not pending.args or not isinstance(pending.args[0], bytes):
        return None
    # Ray's proxy, in this process, pickled this request for the replica.
    return sticks_to(pickle.loads(pending.args[0]).asgi_scope)  # noqa: S301  # pickled by this process


def by_work(context: Any, pictures_each: float = 8.0) -> tuple[int, dict[str, Any]]:
    """Ray autoscaling policy: enough replicas for at most `pictures_each` waiting or running images each.

    Waiting jobs are included.
    """
    reported = context.aggregated_metrics.get("pictures", {})
    return max(1, math.ceil(sum(reported.values()) / pictures_each)), {}


class ByWork:
    """`by_work` with its own number, in the form that Ray expects of a policy class."""

    def __init__(self, pictures_each: float) -> None:
        self._pictures_each = pictures_each

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The wanted number of replicas."""
        return by_work(context, self._pictures_each)


class Others:
    """The other replicas, reached through Ray."""

    def __init__(self, own: int) -> None:
        self._own = own
        self._handle: DeploymentHandle | None = None

    @property
    def handle(self) -> DeploymentHandle:
        """A handle to this replica's own deployment, created on first use: Ray does not know the deployment earlier."""
        if self._handle is None:
            self._handle = serve.get_deployment_handle(DEPLOYMENT, APPLICATION)
        return self._handle

    async def holding(self, scope: Scope) -> dict[int, bool]:
        """Folder number → whether that replica has what a request asks for, for the replicas that respond."""
        reported = await self.handle.broadcast("holds", scope).results_async(timeout_s=_ASKED_OF_ALL_SECONDS)
        return {answer[0]: answer[1] for answer in reported if isinstance(answer, tuple) and answer[0] != self._own}

    async def ask(self, number: int, scope: Scope) -> AsyncIterator[Message]:
        """The response of the replica with that folder."""
        one = self.handle.options(session_id=f"r{number}-", stream=True)
        async for message in one.answer.remote(scope):
            yield message


@serve.deployment(name=DEPLOYMENT)
@serve.ingress()
class Replica:
    """One process with its own models and its own folder below DATA_DIR."""

    def __init__(self, drain_seconds: float, engine_workers: int) -> None:
        shared = read_settings()
        if shared.engine_workers == 0:  # automatic detection counts the machine's cores, not those of this replica
            shared = shared.model_copy(update={"engine_workers": engine_workers})
        self._claim = ReplicaLease(shared.data_dir)
        self._settings = self._claim.settings(shared)
        self._drain_seconds = drain_seconds
        self._health = ReplicaHealth(self._settings)
        self._app: FastAPI | None = None
        self._hosted: ReplicaApp | None = None

    def __serve_build_asgi_app__(self) -> ReplicaApp:
        """The application; its lifespan startup ends when the models are loaded."""
        self._app = create_app(self._settings, hooks=ServingHooks())
        self._hosted = ReplicaApp(
            self._app,
            self._claim,
            Others(self._claim.number),
            drain_seconds=self._drain_seconds,
            release=self._claim.release,
        )
        return self._hosted

    def record_replica_metadata(self) -> dict[str, int]:
        """Metadata by which the router identifies this replica."""
        return {"folder": self._claim.number}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The load that `by_work` reads."""
        return {"pictures": float(work_of(self._app))} if self._app is not None else {}

    async def check_health(self) -> None:
        """Raise `RuntimeError` if only a new process can help; Ray then starts one."""
        if self._app is not None and (fault := self._health.fault(self._app)):
            raise RuntimeError(fault)

    async def holds(self, scope: Scope) -> tuple[int, bool] | None:
        """Folder number of this replica, and whether it has what a request asks for; `None` before it has started."""
        return (self._claim.number, await self._hosted.has(scope)) if self._hosted is not None else None

    async def answer(self, scope: Scope) -> AsyncIterator[Message]:
        """Response of this replica to a request that another replica received."""
        if self._hosted is not None:
            async for message in self._hosted.answer(scope):
                yield message


def application(scale: Scale) -> serve.Application:
    """The Serve application at this scale, for `serve.run` and for Serve's configuration files."""
    options: dict[str, Any] = {"num_replicas": scale.replicas}
    if scale.most > scale.replicas:
        policy = AutoscalingPolicy(
            policy_function="deploy.ray_serve:ByWork", policy_kwargs={"pictures_each": scale.pictures_each}
        )
        scaling = AutoscalingConfig(
            min_replicas=scale.replicas,
            max_replicas=scale.most,
            upscale_delay_s=scale.up_seconds,
            downscale_delay_s=scale.down_seconds,
            look_back_period_s=max(15.0, scale.up_seconds),  # more than the 10 s between the replicas' reports
            policy=policy,
        )
        options = {"autoscaling_config": scaling}
    return Replica.options(
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus},
        max_ongoing_requests=_MOST_AT_A_TIME,
        # Reached only after the replicas' own queues, which refuse first and give the reason.
        max_queued_requests=_MOST_AT_A_TIME,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=5),
        request_router_config=RequestRouterConfig(request_router_class="deploy.ray_serve:StickyRequestRouter"),
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=scale.drain_seconds + read_settings().shutdown_grace_seconds + 5,
        **options,
    ).bind(scale.drain_seconds, 0 if scale.cpus >= 2 else 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Start a local Ray and the application on it; run until a signal stops both."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, field in Scale.model_fields.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=field.annotation, default=field.default, help=field.description
        )
    scale = Scale(**vars(parser.parse_args(arguments)))
    settings = read_settings()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Replicas import this package and read these settings too.
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    ray.init(
        address="local",  # a separate instance, even if another Ray runs on this machine
        num_cpus=math.ceil(max(scale.most, scale.replicas) * scale.cpus),
        include_dashboard=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
    serve.start(http_options={"host": settings.host, "port": settings.port})
    serve.run(application(scale), name=APPLICATION)
    print(f"{scale.replicas} replicas draw at http://{settings.host}:{settings.port}", flush=True)  # noqa: T201  # its output
    stopping = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    while not stopping:
        time.sleep(0.2)
    serve.delete(APPLICATION, _blocking=False)
    end = time.monotonic() + scale.drain_seconds
    while APPLICATION in serve.status().applications and time.monotonic() < end:
        time.sleep(0.5)  # `serve.shutdown` alone waits only 30 s; accepted jobs run meanwhile
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
