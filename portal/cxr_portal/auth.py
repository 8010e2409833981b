"""Who calls, and what they may do: API keys of the database, and tokens of an OIDC issuer."""

import asyncio
import hashlib
import json
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

import jwt
from sqlalchemy.exc import SQLAlchemyError

from cxr_portal.metrics import Metrics
from cxr_portal.problems import ProblemError, unavailable
from cxr_portal.settings import AuthPolicy, Scope, Settings
from cxr_portal.store import KEY_PREFIX, ApiKey, Store

# Seconds that a key is believed without a look into the database, and works once it is revoked.
_KEY_LIFE = 5.0
_KEYS_KEPT = 1000
# Seconds that the issuer's keys are kept, after which an unknown one may make us ask again, and
# that the issuer has for an answer.
_JWKS_LIFE = 300
_JWKS_COOLDOWN = 5
_ISSUER_TIMEOUT = 5
# Public keys only: a shared secret would let the gateway forge tokens.
_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA")
_LONGEST_TOKEN = 8192


@dataclass(frozen=True, kw_only=True)
class Principal:
    """Who calls.

    Attributes:
        id: stands in the log and owns jobs; tells nothing of a person.
        scopes: what they may do.
        images_per_minute: their own limit, if they have one.
    """

    id: str
    scopes: frozenset[Scope]
    images_per_minute: int | None = None


_EVERYBODY = Principal(id="local", scopes=frozenset(Scope))


class Authenticator:
    """Tells who calls."""

    def __init__(self, settings: Settings, store: Store, metrics: Metrics) -> None:
        self._settings = settings
        self._store = store
        self._metrics = metrics
        self._keys: dict[bytes, tuple[ApiKey, float]] = {}
        self._jwks: jwt.PyJWKClient | None = None

    async def authenticate(self, token: str | None) -> Principal:
        """Who sent that bearer token.

        Raises:
            ProblemError: nobody who may call (401); issuer or database do not answer (503).
        """
        if self._settings.auth is AuthPolicy.NONE:
            return _EVERYBODY
        if token is None:
            raise self._refusal("missing", "Send an API key: Authorization: Bearer KEY.")
        if len(token) > _LONGEST_TOKEN:
            raise self._refusal("invalid", "The credentials are not valid.")
        if token.startswith(KEY_PREFIX):
            return await self._by_key(token)
        if self._settings.oidc_issuer:
            return await self._by_jwt(token)
        raise self._refusal("invalid", "The credentials are not valid.")

    def require(self, principal: Principal, scope: Scope) -> None:
        """Make sure that they may do that.

        Raises:
            ProblemError: they may not (403).
        """
        if scope not in principal.scopes:
            self._metrics.refused_callers.labels("scope").inc()
            raise ProblemError(
                HTTPStatus.FORBIDDEN,
                "missing-scope",
                f"These credentials do not have the scope {scope.value!r}.",
            )

    async def _by_key(self, token: str) -> Principal:
        digest, now = hashlib.sha256(token.encode()).digest(), time.monotonic()
        key, read_at = self._keys.get(digest, (None, 0.0))
        if key is None or now - read_at > _KEY_LIFE:
            self._keys.pop(digest, None)
            try:
                key = await asyncio.to_thread(self._store.find_key, token)
            except SQLAlchemyError:
                raise unavailable(
                    "database-unavailable", "The gateway's database does not answer."
                ) from None
            if key is None:
                raise self._refusal("invalid", "The API key is not valid.")
            if len(self._keys) >= _KEYS_KEPT:
                self._keys.clear()
            self._keys[digest] = (key, now)
        if not key.valid(datetime.now(UTC)):
            ended = "revoked" if key.revoked else "expired"
            raise self._refusal(ended, f"The API key has {'been ' * (ended == 'revoked')}{ended}.")
        return Principal(
            id=f"key:{key.owner}", scopes=key.scopes, images_per_minute=key.images_per_minute
        )

    async def _by_jwt(self, token: str) -> Principal:
        try:
            claims = await asyncio.to_thread(self._claims, token)
        except jwt.ExpiredSignatureError:
            raise self._refusal("expired", "The token has expired.") from None
        except (jwt.PyJWKClientConnectionError, OSError):
            raise unavailable(
                "issuer-unavailable", "The issuer of tokens does not answer; try again later."
            ) from None
        except (jwt.PyJWTError, ValueError):
            raise self._refusal("invalid", "The token is not valid.") from None
        named = claims.get("scope", claims.get("scp", ()))
        words = set(named.split() if isinstance(named, str) else map(str, named))
        person = f"{claims['iss']} {claims['sub']}"
        return Principal(
            id=f"oidc:{hashlib.sha256(person.encode()).hexdigest()[:16]}",
            scopes=frozenset(scope for scope in Scope if scope.value in words),
        )

    def _claims(self, token: str) -> Mapping[str, Any]:
        if self._jwks is None:
            self._jwks = jwt.PyJWKClient(
                self._settings.oidc_jwks or self._discovered(),
                lifespan=_JWKS_LIFE,
                cooldown_duration=_JWKS_COOLDOWN,
                timeout=_ISSUER_TIMEOUT,
            )
        key = self._jwks.get_signing_key_from_jwt(token)
        claims: Mapping[str, Any] = jwt.decode(
            token,
            key,
            algorithms=list(_ALGORITHMS),
            audience=self._settings.oidc_audience,
            issuer=self._settings.oidc_issuer,
            options={"require": ["exp", "iss", "aud", "sub"]},
        )
        return claims

    def _discovered(self) -> str:
        """Where the issuer says that its keys are."""
        url = f"{self._settings.oidc_issuer.rstrip('/')}/.well-known/openid-configuration"
        # The scheme is checked where the setting is read.
        with urllib.request.urlopen(url, timeout=_ISSUER_TIMEOUT) as answer:  # noqa: S310
            return str(json.load(answer)["jwks_uri"])

    def _refusal(self, reason: str, detail: str) -> ProblemError:
        self._metrics.refused_callers.labels(reason).inc()
        challenge = 'Bearer realm="cxr"'
        if reason != "missing":
            challenge += ', error="invalid_token"'
        return ProblemError(
            HTTPStatus.UNAUTHORIZED,
            f"credentials-{reason}",
            detail,
            headers={"WWW-Authenticate": challenge},
        )
