"""`helm test`: asks the portal whether it is ready, and for its API, as somebody without a key."""

# ruff: noqa: S310, T201 - the address is the release's own Service; the output is the pod's log

import json
import sys
import time
import urllib.error
import urllib.request
from http import HTTPStatus

# Seconds; a network policy may need some to learn of this pod.
PATIENCE = 60

base, policy = sys.argv[1:]


def ask(path: str) -> tuple[int, bytes]:
    """Status and body; asks again while nothing answers there."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(f"{base}{path}", timeout=PATIENCE) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError as error:
            if time.monotonic() > deadline:
                sys.exit(f"{base} does not answer: {error}")
            time.sleep(1)


status, body = ask("/health/ready")
if status != HTTPStatus.OK:
    sys.exit(f"The portal is not ready: {status} {body.decode()}")
status, body = ask("/v1/models")
if policy == "required":
    if status != HTTPStatus.UNAUTHORIZED:
        sys.exit(f"/v1/models answered {status} without a key, not 401.")
    print(f"ready; without a key: {json.loads(body)['type']}")
else:
    if status != HTTPStatus.OK:
        sys.exit(f"/v1/models answered {status}: {body.decode()}")
    print(f"ready; the model: {json.loads(body)['models'][0]['name']}")
