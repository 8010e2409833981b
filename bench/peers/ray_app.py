"""Ray Serve: one replica per core behind its proxy, the image as the body."""

import os
import signal

import ray
from common import PORT, WORKERS, answer, load_engine
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

ENVIRONMENT = {name: os.environ[name] for name in ("PYTHONPATH", "CXR_BENCH_MODEL")}


@serve.deployment(
    num_replicas=WORKERS,
    ray_actor_options={"num_cpus": 1, "runtime_env": {"env_vars": ENVIRONMENT}},
)
class Cxr:
    """One model in one replica."""

    def __init__(self) -> None:
        self.engine = load_engine()

    async def __call__(self, request: Request) -> Response:
        body = await request.body()
        return Response(answer(self.engine, body), media_type="application/json")


if __name__ == "__main__":
    # A token for a cluster that listens on this machine only, and lives for a minute.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(Cxr.bind())
    signal.pause()
