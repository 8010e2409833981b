"""Who may call: API keys, tokens of an issuer, and how much each may ask for."""

import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from cxr_portal.settings import Scope
from integration.portal.test_portal_api import GOOD, PREDICTIONS, ask, assert_problem
from support.portals import Portal, files, keys, portal
from support.servers import Server

AUDIENCE = "cxr-portal"


@dataclass
class Issuer:
    """An OpenID provider as far as anybody asks it here."""

    url: str = ""
    keys: dict[str, ec.EllipticCurvePrivateKey] = field(default_factory=dict)

    def add_key(self, name: str) -> None:
        self.keys[name] = ec.generate_private_key(ec.SECP256R1())

    def document(self, path: str) -> dict[str, Any] | None:
        if path == "/.well-known/openid-configuration":
            return {"issuer": self.url, "jwks_uri": f"{self.url}/keys"}
        if path != "/keys":
            return None
        public = {name: key.public_key() for name, key in self.keys.items()}
        return {
            "keys": [
                json.loads(ECAlgorithm.to_jwk(key)) | {"kid": name, "alg": "ES256", "use": "sig"}
                for name, key in public.items()
            ]
        }

    def token(self, key: str = "first", **changes: Any) -> str:
        claims = {
            "iss": self.url,
            "aud": AUDIENCE,
            "sub": "Dr SECRET",
            "exp": time.time() + 60,
            "scope": "openid predict",
        } | changes
        claims = {name: value for name, value in claims.items() if value is not None}
        return jwt.encode(claims, self.keys[key], algorithm="ES256", headers={"kid": key})


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    made = Issuer()
    made.add_key("first")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            document = made.document(self.path)
            self.send_response(404 if document is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps(document).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        made.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield made
        server.shutdown()


@pytest.fixture(scope="module")
def closed(model: Server, issuer: Issuer) -> Iterator[Portal]:
    """A gateway that asks who calls."""
    with portal(
        f"--server={model.grpc}",
        "--auth=required",
        f"--oidc-issuer={issuer.url}",
        f"--oidc-audience={AUDIENCE}",
    ) as running:
        yield running


class TestKeys:
    def test_without_one(self, closed: Portal) -> None:
        with closed.http() as http:
            for answer in (ask(http, GOOD), http.get("/v1/models"), http.get("/v1/jobs")):
                assert_problem(answer, 401, "credentials-missing", "Authorization: Bearer")
                assert answer.headers["www-authenticate"].startswith("Bearer")
            assert http.get("/health/ready").status_code == 200

    def test_nothing_is_read_of_a_stranger(self, closed: Portal) -> None:
        """The refusal comes before the body."""
        head = (
            f"POST {PREDICTIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n"
            "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
        )
        host, _, port = closed.url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=5) as plain:
            plain.sendall(head.encode())
            assert plain.recv(100).startswith(b"HTTP/1.1 401")

    def test_a_life(self, closed: Portal) -> None:
        made = closed.keys("create", "viewer", "--scope=predict", "--scope=jobs", "--days=1")
        assert made["key"].startswith("cxr_")
        with closed.http(made["key"]) as http:
            assert ask(http, GOOD).status_code == 200
            job = http.post("/v1/jobs", files=files(GOOD)).json()
        rotated = closed.keys("rotate", made["id"], "--overlap-hours=0")
        with closed.http(rotated["key"]) as http:
            assert ask(http, GOOD).status_code == 200
            assert http.get(f"/v1/jobs/{job['id']}").status_code == 200, "its jobs stay its own"
        with closed.http(made["key"]) as http:
            await_refusal(http, "credentials-expired", "has expired")
        done = keys("revoke", rotated["id"], f"--database={closed.database}")
        assert done.returncode == 0, done.stderr
        with closed.http(rotated["key"]) as http:
            await_refusal(http, "credentials-revoked", "has been revoked")
        listed = {key["id"]: key for key in closed.keys("list")["keys"]}
        assert listed[rotated["id"]]["revoked"]
        assert "key" not in listed[rotated["id"]]

    def test_the_database_does_not_have_it(self, closed: Portal) -> None:
        _, _, secret = closed.key().split("_", 2)
        folder = closed.folder
        kept = b"".join(path.read_bytes() for path in folder.glob("portal.db*"))
        assert secret.encode() not in kept

    def test_an_expired_one(self, closed: Portal) -> None:
        key = closed.key(lifetime=timedelta(seconds=0.5))
        time.sleep(0.6)
        with closed.http(key) as http:
            assert_problem(ask(http, GOOD), 401, "credentials-expired", "has expired")

    @pytest.mark.parametrize("text", ["cxr_", "cxr_0_0", "cxr_é", "nonsense", "a.b.c", "x" * 9000])
    def test_invalid_ones(self, closed: Portal, text: str) -> None:
        with closed.http() as http:
            headers = {"Authorization": f"Bearer {text}".encode()}
            answer = ask(http, GOOD, headers=headers)
        assert_problem(answer, 401, "credentials-invalid", "not valid")

    def test_a_wrong_secret(self, closed: Portal) -> None:
        with closed.http(closed.key()[:-1] + "?") as http:
            assert_problem(ask(http, GOOD), 401, "credentials-invalid", "not valid")

    def test_scopes(self, closed: Portal) -> None:
        with closed.http(closed.key(Scope.PREDICT)) as http:
            assert ask(http, GOOD).status_code == 200
            assert http.get("/v1/models").status_code == 200
            assert_problem(http.get("/v1/jobs"), 403, "missing-scope", "'jobs'")
            answer = http.post("/v1/jobs", files=files(GOOD))
            assert_problem(answer, 403, "missing-scope", "'jobs'")

    def test_jobs_are_their_owners(self, closed: Portal) -> None:
        with (
            closed.http(closed.key()) as mine,
            closed.http(closed.key()) as other,
        ):
            job = mine.post("/v1/jobs", files=files(GOOD)).json()
            for path in ("", "/result", "/events"):
                answer = other.get(f"/v1/jobs/{job['id']}{path}")
                assert_problem(answer, 404, "not-found", "no such job")
            assert other.post(f"/v1/jobs/{job['id']}/cancel").status_code == 404
            assert other.delete(f"/v1/jobs/{job['id']}").status_code == 404
            assert other.get("/v1/jobs").json() == {"jobs": []}
            assert mine.get(f"/v1/jobs/{job['id']}").status_code == 200

    def test_its_own_limit(self, closed: Portal) -> None:
        with closed.http(closed.key(images_per_minute=3)) as http:
            assert ask(http, GOOD, GOOD).status_code == 200
            answer = ask(http, GOOD, GOOD)
            assert_problem(answer, 429, "too-many-images", "3 images a minute")
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert ask(http, GOOD).status_code == 200, "the refused ones do not count"
            assert_problem(ask(http, GOOD), 429, "too-many-images", "3 images a minute")
        assert 'cxr_portal_refused_callers_total{reason="rate"}' in closed.metrics

    def test_unknown_ids(self, closed: Portal) -> None:
        for command in ("rotate", "revoke"):
            done = keys(command, "nobody", f"--database={closed.database}")
            assert done.returncode == 1
            assert "There is no" in done.stderr


def await_refusal(http: httpx.Client, kind: str, words: str) -> None:
    """A gateway may believe a key for some seconds."""
    deadline = time.monotonic() + 30
    while (answer := ask(http, GOOD)).status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.3)
    assert_problem(answer, 401, kind, words)


class TestTokens:
    def test_scopes_of_the_token_count(self, closed: Portal, issuer: Issuer) -> None:
        with closed.http(issuer.token()) as http:
            assert ask(http, GOOD).status_code == 200
            assert_problem(http.get("/v1/jobs"), 403, "missing-scope", "'jobs'")
        with closed.http(issuer.token(scope=None, scp=["jobs"])) as http:
            assert http.get("/v1/jobs").status_code == 200
        assert "SECRET" not in closed.log

    def test_new_keys_of_the_issuer_are_found(self, closed: Portal, issuer: Issuer) -> None:
        issuer.add_key("second")
        with closed.http(issuer.token("second")) as http:
            deadline = time.monotonic() + 30
            while ask(http, GOOD).status_code == 401:
                assert time.monotonic() < deadline
                time.sleep(0.3)
            assert ask(http, GOOD).status_code == 200

    @pytest.mark.parametrize(
        ("changes", "kind"),
        [
            ({"exp": 1}, "credentials-expired"),
            ({"aud": "another"}, "credentials-invalid"),
            ({"iss": "http://another"}, "credentials-invalid"),
            ({"exp": None}, "credentials-invalid"),
            ({"sub": None}, "credentials-invalid"),
        ],
    )
    def test_those_that_do_not_count(
        self, closed: Portal, issuer: Issuer, changes: dict[str, Any], kind: str
    ) -> None:
        with closed.http(issuer.token(**changes)) as http:
            assert_problem(ask(http, GOOD), 401, kind, "token")

    def test_forged_ones(self, closed: Portal, issuer: Issuer) -> None:
        claims = {"iss": issuer.url, "aud": AUDIENCE, "sub": "x", "exp": time.time() + 60}
        headers = {"kid": "first"}
        stranger = ec.generate_private_key(ec.SECP256R1())
        forged = (
            jwt.encode(claims, stranger, algorithm="ES256", headers=headers),
            jwt.encode(claims, "", algorithm="none", headers=headers),
            jwt.encode(claims, "s" * 64, algorithm="HS256", headers=headers),
        )
        for token in forged:
            with closed.http(token) as http:
                assert_problem(ask(http, GOOD), 401, "credentials-invalid", "not valid")

    def test_an_issuer_that_is_away(self, model: Server, issuer: Issuer) -> None:
        options = (f"--server={model.grpc}", "--auth=required", f"--oidc-audience={AUDIENCE}")
        away = ("--oidc-issuer=http://127.0.0.1:9",)
        with portal(*options, *away) as running, running.http(issuer.token()) as http:
            assert_problem(ask(http, GOOD), 503, "issuer-unavailable", "does not answer")


def test_limit_of_unfinished_jobs(model: Server) -> None:
    with portal(f"--server={model.grpc}", "--max-active-jobs=1") as running:
        for worker in model.workers():
            worker.suspend()
        try:
            with running.http() as http:
                assert http.post("/v1/jobs", files=files(GOOD)).status_code == 202
                answer = http.post("/v1/jobs", files=files(GOOD))
                assert_problem(answer, 429, "too-many-jobs", "At most 1 jobs")
        finally:
            for worker in model.workers():
                worker.resume()


def test_who_can_be_reached_by_others_asks_who_they_are(model: Server) -> None:
    with portal(f"--server={model.grpc}", "--host=0.0.0.0") as running:
        url = running.url.replace("0.0.0.0", "127.0.0.1")  # noqa: S104 - an address to replace
        assert httpx.get(f"{url}/v1/models").status_code == 401
