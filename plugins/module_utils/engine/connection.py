# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import parse_qsl, unquote, urlsplit

from . import certificates
from .errors import AuthenticationFailed, CeleryOpsError, ConnectionFailed, PreconditionFailed, WrongType

REDIS_SCHEMES = ("redis", "rediss", "redis+socket", "sentinel")
OTHER_SCHEMES = ("amqp", "amqps", "pyamqp", "memory")
DEFAULT_PRIORITY_STEPS = (0, 3, 6, 9)
DEFAULT_SEP = "\x06\x16"

_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*://"
# Up to the last "@" in front of white space, a quote or the next URL: passwords may hold "/" and "@" unquoted.
_USERINFO = re.compile(rf"({_SCHEME})((?!{_SCHEME})(?!;{_SCHEME})[^\s'\"])*@")
_QUERY_SECRET = re.compile(r"([?&][A-Za-z_]*(?:password|passwd|secret|token|api_key)=)[^&;\s'\"]*", re.IGNORECASE)
_SECRET_NAME = re.compile(r"passw|passphrase|secret|token|api_?key|private_?key", re.IGNORECASE)
_PIPELINE = re.compile(r"Command # \d+ \((.*?)\) of pipeline caused error: ", re.DOTALL)
MASK = "***"
OPERATOR_FILE = "CELERYOPS_OPERATOR_FILE"  # names a file that only root reads


def scrub(text: object, *secrets: str) -> str:
    """The text without the credentials of any URL in it, and without the given secrets."""
    out = str(text)
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        out = out.replace(secret, MASK)
    out = _USERINFO.sub(rf"\g<1>{MASK}@", out)
    return _QUERY_SECRET.sub(rf"\g<1>{MASK}", out)


def scrub_data(value: Any, *secrets: str) -> Any:
    """The same for every string inside lists and dicts."""
    if isinstance(value, str):
        return scrub(value, *secrets) if "://" in value or secrets else value
    if isinstance(value, dict):
        return {scrub_data(key, *secrets): scrub_data(item, *secrets) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrub_data(item, *secrets) for item in value]
    return value


def secret_values(value: Any, name: str = "") -> list[str]:
    """The strings kept under names such as password, at any depth."""
    if isinstance(value, Mapping):
        return [found for key, item in value.items() for found in secret_values(item, str(key))]
    if isinstance(value, (list, tuple)):
        return [found for item in value for found in secret_values(item, name)]
    return [value] if isinstance(value, str) and value and _SECRET_NAME.search(name) else []


def parse_environment(text: str) -> dict[str, str]:
    """Read what systemd would read from an EnvironmentFile: quotes, escapes, continuation lines, comments."""
    result: dict[str, str] = {}
    key = value = ""
    state = "pre_key"
    kept = 0  # length of the value that trailing white space is not stripped from
    for char in text + "\n":
        if state == "pre_key":
            if char in "#;":
                state = "comment"
            elif not char.isspace():
                key, value, kept, state = char, "", 0, "key"
        elif state == "key":
            if char == "\n":
                state = "pre_key"  # no "=": systemd ignores the line
            elif char == "=":
                key, state = key.strip(), "pre_value"
            else:
                key += char
        elif state in ("pre_value", "value"):
            if char == "\n":
                result[key] = value[:kept] + value[kept:].rstrip()
                state = "pre_key"
            elif char == "\\":
                state = "value_escape"
            elif state == "pre_value" and char in "'\"":
                state = "single" if char == "'" else "double"
            elif state == "value" or not char.isspace():
                value += char
                state = "value"
        elif state == "value_escape":
            state = "value"
            if char != "\n":
                value += char
                kept = len(value)
        elif state == "single":
            if char == "'":
                kept, state = len(value), "pre_value"
            else:
                value += char
        elif state == "double":
            if char == '"':
                kept, state = len(value), "pre_value"
            elif char == "\\":
                state = "double_escape"
            else:
                value += char
        elif state == "double_escape":
            state = "double"
            if char in '"\\`$':
                value += char
            elif char != "\n":
                value += "\\" + char
        elif state == "comment":
            if char == "\n":
                state = "pre_key"
            elif char == "\\":
                state = "comment_escape"
        else:
            state = "comment"
    return {name: item for name, item in result.items() if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)}


def read_environment_file(path: str) -> dict[str, str]:
    try:
        with open(path, encoding="utf-8") as handle:
            return parse_environment(handle.read())
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "not UTF-8 text"
        raise PreconditionFailed(
            f"environment_file: cannot read {path}: {reason}. Give the application's EnvironmentFile on this host and "
            f"run as a user who may read it (become)."
        ) from exc


def read_operator_file(path: str) -> dict[str, str]:
    """The same, with the operator's own user of the broker where there is one."""
    values = read_environment_file(path)
    own = values.get(OPERATOR_FILE)
    return {**values, **read_environment_file(own)} if own else values


def import_app(app: str, app_dir: str | None = None, environment: Mapping[str, str] | None = None) -> Any:
    """Import the application the way `celery -A` does, with app_dir as working directory."""
    try:
        from celery.app.utils import find_app
    except ImportError as exc:
        raise PreconditionFailed(
            f"app: the library celery is missing in {sys.executable}: set virtualenv, the application's own."
        ) from exc
    before = os.getcwd()
    if app_dir:
        if not os.path.isdir(app_dir):
            raise PreconditionFailed(f"app_dir: {app_dir} is not a directory on this host.")
        os.chdir(app_dir)
    try:
        where = os.getcwd()
        if where not in sys.path:
            sys.path.insert(0, where)
        importlib.invalidate_caches()
        os.environ.update(environment or {})
        return find_app(app)
    except BaseException as exc:  # an application may raise anything, SystemExit included
        if isinstance(exc, KeyboardInterrupt):
            raise
        raise PreconditionFailed(
            f"app: {app} cannot be imported from {where}: {type(exc).__name__}: {scrub(exc)}. "
            f"Check app, app_dir and virtualenv."
        ) from exc
    finally:
        os.chdir(before)


@dataclass(frozen=True)
class Endpoint:
    """One URL of a broker, taken apart as kombu does it."""

    scheme: str
    host: str
    port: int
    username: str | None
    password: str | None = field(repr=False)
    database: str
    path: str
    query: Mapping[str, str] = field(repr=False)


def split_url(url: str) -> list[Endpoint]:
    """The endpoints of a URL or a `;` list of them; one clear error for what cannot be understood."""
    result = []
    for part in url.split(";"):
        scheme, _sep, rest = part.strip().partition("://")
        if scheme not in REDIS_SCHEMES + OTHER_SCHEMES:
            given = f"scheme {scheme}" if re.fullmatch(r"[a-z0-9+.-]{1,30}", scheme) and rest else "what was given"
            raise PreconditionFailed(
                f"broker_url: {given} is not supported. Use one of {', '.join(REDIS_SCHEMES + OTHER_SCHEMES[:2])}, "
                f"as in redis://host:6379/0."
            )
        try:
            parts = urlsplit("http://" + rest)
            port = parts.port
        except ValueError:
            raise PreconditionFailed(
                f"broker_url: {scheme}://... cannot be understood. It is {scheme}://user:password@host:port/0; quote "
                f"special characters of user and password as %XX."
            ) from None
        query = dict(parse_qsl(parts.query))
        path = unquote(parts.path)
        socket_path = scheme == "redis+socket"
        if socket_path and not path.strip("/"):
            raise PreconditionFailed(
                "broker_url: give the socket's path, as in redis+socket:///run/redis.sock?virtual_host=0."
            )
        database = query.get("virtual_host", "") if socket_path else path.lstrip("/")
        if scheme in REDIS_SCHEMES and database and not database.isdigit():
            raise PreconditionFailed(f"broker_url: the Redis database must be a number, not {database!r}.")
        default_port = {"sentinel": 26379, "amqp": 5672, "pyamqp": 5672, "amqps": 5671}.get(scheme, 6379)
        result.append(
            Endpoint(
                scheme=scheme,
                host=unquote(parts.hostname or "") or "127.0.0.1",
                port=port or default_port,
                username=unquote(parts.username or "") or None,
                password=unquote(parts.password or "") or None,
                database=database,
                path=path if socket_path else "",
                query=query,
            )
        )
    kinds = {endpoint.scheme for endpoint in result}
    if len(kinds) > 1 and not kinds <= {"redis", "rediss"}:
        raise PreconditionFailed(
            f"broker_url: the URLs of one broker must share a scheme, not mix {', '.join(sorted(kinds))}."
        )
    return result


def _options_from_text(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise PreconditionFailed(
            f'CELERYOPS_TRANSPORT_OPTIONS in {where} must be a JSON object, as in {{"priority_steps": [0, 5]}}.'
        )
    return value


def tls_from_app(use_ssl: Any) -> dict[str, Any] | None:
    if not use_ssl:
        return None
    if not isinstance(use_ssl, Mapping):
        return {}
    plain = {str(key).removeprefix("ssl_"): value for key, value in use_ssl.items()}
    tls = {key: plain[key] for key in ("ca_certs", "certfile", "keyfile") if plain.get(key)}
    reqs = plain.get("cert_reqs")
    if reqs is not None:
        tls["verify"] = str(getattr(reqs, "name", reqs)).lower() not in ("cert_none", "none", "0")
    return tls


class RedisStore(Protocol):
    """Where records are kept: a client that answers bytes, and the prefix of every key. A Broker is one."""

    @property
    def redis(self) -> Any: ...

    @property
    def key_prefix(self) -> str: ...


@dataclass(frozen=True)
class LinkedStore:
    """The records of the Redis behind a kombu connection, for the runtime package."""

    redis: Any
    key_prefix: str

    @classmethod
    def of(cls, connection: Any) -> LinkedStore | None:
        """None where the broker is not Redis."""
        if connection.transport.driver_type != "redis":
            return None
        import redis

        channel = connection.default_channel
        # kombu's own client prefixes some commands and not others.
        return cls(
            redis.Redis(connection_pool=channel.client.connection_pool), getattr(channel, "global_keyprefix", "") or ""
        )


@dataclass(frozen=True)
class BrokerSpec:
    """All that is needed to reach a broker. Its repr holds no secret."""

    url: str = field(repr=False)
    key_prefix: str = ""
    transport_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    tls: Mapping[str, Any] | None = None
    connect_timeout: float = 5.0
    socket_timeout: float = 10.0
    result_backend: str = field(default="", repr=False)
    control_exchange: str = "celery"
    signing_file: str = ""  # keys that sign what is sent
    management_url: str = field(default="", repr=False)  # RabbitMQ's management API

    @classmethod
    def build(
        cls,
        *,
        url: str | None = None,
        app: str | None = None,
        app_dir: str | None = None,
        environment_file: str | None = None,
        environment: Mapping[str, str] | None = None,
        key_prefix: str | None = None,
        transport_options: Mapping[str, Any] | None = None,
        tls: Mapping[str, Any] | None = None,
        connect_timeout: float = 5.0,
        socket_timeout: float = 10.0,
    ) -> BrokerSpec:
        """The URL given wins, then the environment file, then the application, which is imported only if asked."""
        for name, seconds in (("connect_timeout", connect_timeout), ("socket_timeout", socket_timeout)):
            if seconds <= 0:
                raise PreconditionFailed(f"{name}: must be above 0 seconds, not {seconds}.")
        values = dict(environment or {})
        where = "the environment"
        if environment_file:
            where = environment_file
            values.update(read_operator_file(environment_file))
        result_backend = values.get("CELERY_RESULT_BACKEND", "")
        control_exchange = "celery"
        if key_prefix is None:
            key_prefix = values.get("CELERYOPS_KEY_PREFIX")
        if transport_options is None and values.get("CELERYOPS_TRANSPORT_OPTIONS"):
            transport_options = _options_from_text(values["CELERYOPS_TRANSPORT_OPTIONS"], where)
        url = url or values.get("CELERY_BROKER_URL")
        if not url and app:
            conf = import_app(app, app_dir, values).conf
            found = conf.broker_write_url or conf.broker_url
            url = found if isinstance(found, str) else ";".join(found or [])
            if transport_options is None:
                transport_options = dict(conf.broker_transport_options or {})
            if tls is None:
                tls = tls_from_app(conf.broker_use_ssl)
            result_backend = result_backend or conf.result_backend or ""
            control_exchange = conf.control_exchange
        if not url:
            cure = f"{environment_file} has no CELERY_BROKER_URL" if environment_file else "none of them is set"
            raise PreconditionFailed(f"broker_url, environment_file or app must name the broker; {cure}.")
        options = dict(transport_options or {})
        if key_prefix is None:
            key_prefix = str(options.get("global_keyprefix") or "")
        options.pop("global_keyprefix", None)
        spec = cls(
            url=url,
            key_prefix=key_prefix,
            transport_options=options,
            tls=tls,
            connect_timeout=connect_timeout,
            socket_timeout=socket_timeout,
            result_backend=result_backend,
            control_exchange=control_exchange,
            signing_file=values.get("CELERYOPS_SIGNING_FILE", ""),
            management_url=values.get("CELERYOPS_MANAGEMENT_URL", ""),
        )
        spec.check()
        return spec

    @property
    def endpoints(self) -> list[Endpoint]:
        return split_url(self.url)

    @property
    def secrets(self) -> list[str]:
        """Every secret string in here, for masking: URLs that hold one, passwords, and those in transport options."""
        found = secret_values(self.transport_options)
        for url in (self.url, self.result_backend, self.management_url):
            if scrub(url) != url:
                found.append(url)
        for endpoint in self.endpoints:
            found += [endpoint.password or "", *secret_values(endpoint.query)]
        for url in (self.result_backend, self.management_url):
            with contextlib.suppress(ValueError):
                found.append(unquote(urlsplit(url).password or ""))
        return [item for item in dict.fromkeys(found) if item]

    @property
    def address(self) -> str:
        """Where the broker is, for messages."""
        return ", ".join(
            f"{item.scheme}://{item.path}" if item.path else f"{item.scheme}://{item.host}:{item.port}"
            for item in self.endpoints
        )

    def check(self) -> None:
        endpoints = self.endpoints
        steps = self.transport_options.get("priority_steps", DEFAULT_PRIORITY_STEPS)
        whole = isinstance(steps, (list, tuple)) and all(isinstance(s, int) and not isinstance(s, bool) for s in steps)
        if not steps or not whole:
            raise PreconditionFailed(
                f"transport_options.priority_steps: must be a list of whole numbers, not {steps!r}."
            )
        if endpoints[0].scheme == "sentinel" and not self.transport_options.get("master_name"):
            raise PreconditionFailed(
                "transport_options.master_name: must name the master for a sentinel:// broker_url."
            )


class Broker:
    """One broker, opened on first use. A context manager."""

    def __init__(self, spec: BrokerSpec) -> None:
        self.spec = spec
        self.endpoint = spec.endpoints[0]
        self.kind = "redis" if self.endpoint.scheme in REDIS_SCHEMES else "amqp"
        options = spec.transport_options
        self.key_prefix = spec.key_prefix
        self.db = int(self.endpoint.database or 0) if self.kind == "redis" else 0
        self.priority_steps: tuple[int, ...] = tuple(sorted(options.get("priority_steps", DEFAULT_PRIORITY_STEPS)))
        self.sep: str = options.get("sep", DEFAULT_SEP)
        self.unacked_key: str = options.get("unacked_key", "unacked")
        self.unacked_index_key: str = options.get("unacked_index_key", "unacked_index")
        self.unacked_mutex_key: str = options.get("unacked_mutex_key", "unacked_mutex")
        self._redis: Any = None
        self._app: Any = None
        self._sentinel: Any = None

    def __enter__(self) -> Broker:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._redis is not None:
            self._redis.close()
            self._redis.connection_pool.disconnect()
            self._redis = None
        if self._sentinel is not None:
            for node in self._sentinel.sentinels:
                node.close()
            self._sentinel = None
        if self._app is not None:
            self._app.close()
            self._app = None

    @property
    def redis(self) -> Any:
        """A redis.Redis that answers bytes, proven to answer. Only for Redis brokers."""
        if self.kind != "redis":
            raise PreconditionFailed(f"broker_url: {self.endpoint.scheme}:// is not Redis; this needs a Redis broker.")
        if self._redis is None:
            self._redis = self._open_redis()
        return self._redis

    @property
    def celery_app(self) -> Any:
        """A bare celery.Celery for this broker; it knows none of the application's tasks."""
        if self._app is None:
            try:
                import celery
            except ImportError as exc:
                raise PreconditionFailed(
                    f"the library celery is missing in {sys.executable}: set virtualenv, the application's own."
                ) from exc
            options = dict(self.spec.transport_options)
            if self.key_prefix:
                options["global_keyprefix"] = self.key_prefix
            if self.kind == "redis":
                options.setdefault("socket_timeout", self.spec.socket_timeout)
                options.setdefault("socket_connect_timeout", self.spec.connect_timeout)
            if self.endpoint.scheme == "sentinel":
                options["sentinel_kwargs"] = self._sentinel_arguments(self._client_arguments(self.endpoint))
            app = celery.Celery("celeryops", set_as_current=False, fixups=[])
            app.conf.update(
                broker_url=self.spec.url,
                result_backend=self.spec.result_backend or None,
                broker_transport_options=options,
                broker_connection_timeout=self.spec.connect_timeout,
                broker_connection_max_retries=0,
                control_exchange=self.spec.control_exchange,
            )
            if self.spec.tls is not None:
                app.conf.broker_use_ssl = self._celery_tls()
            self._app = app
        return self._app

    def _celery_tls(self) -> dict[str, Any]:
        import ssl

        tls = dict(self.spec.tls or {})
        values = {key: tls[key] for key in ("ca_certs", "certfile", "keyfile") if tls.get(key)}
        values["cert_reqs"] = ssl.CERT_NONE if tls.get("verify") is False else ssl.CERT_REQUIRED
        return {f"ssl_{key}": value for key, value in values.items()} if self.kind == "redis" else values

    def _tls_arguments(self, endpoint: Endpoint) -> dict[str, Any]:
        names = ("ca_certs", "certfile", "keyfile", "cert_reqs", "check_hostname", "keyfile_password")
        found: dict[str, Any] = {
            f"ssl_{key}": endpoint.query[f"ssl_{key}"] for key in names if f"ssl_{key}" in endpoint.query
        }
        found.pop("ssl_keyfile_password", None)
        if "ssl_check_hostname" in found:
            found["ssl_check_hostname"] = str(found["ssl_check_hostname"]).lower() != "false"
        tls = self.spec.tls or {}
        found.update({f"ssl_{key}": tls[key] for key in ("ca_certs", "certfile", "keyfile") if tls.get(key)})
        reqs = str(found.get("ssl_cert_reqs", "required")).lower().removeprefix("cert_")
        if tls.get("verify") is not None:
            reqs = "required" if tls["verify"] else "none"
        found["ssl_cert_reqs"] = reqs
        if reqs == "none":
            found["ssl_check_hostname"] = False
        found.setdefault("ssl_check_hostname", True)  # redis-py before 6 does not by itself
        return found

    def certificate(self) -> certificates.Facts | None:
        """What Redis shows; None without TLS, where nothing is verified, and behind Sentinels."""
        endpoint = self.endpoint
        if endpoint.scheme != "rediss" and (self.spec.tls is None or endpoint.scheme != "redis"):
            return None
        told = self._tls_arguments(endpoint)
        if told["ssl_cert_reqs"] == "none":
            return None
        return certificates.look(
            endpoint.host, endpoint.port, ca_file=told.get("ssl_ca_certs"), pair=told.get("ssl_certfile", ""),
            key_file=told.get("ssl_keyfile"), timeout=self.spec.connect_timeout,
        )  # fmt: skip

    def _client_arguments(self, endpoint: Endpoint) -> dict[str, Any]:
        from redis import Redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        arguments: dict[str, Any] = {
            "db": int(endpoint.database or 0),
            "username": endpoint.username,
            "password": endpoint.password,
            "socket_timeout": self.spec.socket_timeout,
            "decode_responses": False,
            "client_name": self.spec.transport_options.get("client_name"),
            # Redis-py's own retries would multiply every timeout by three.
            "retry": Retry(NoBackoff(), 0),
        }
        if "protocol" in inspect.signature(Redis.__init__).parameters:  # since redis-py 5
            arguments["protocol"] = 2
        if endpoint.scheme == "redis+socket":
            arguments["password"] = endpoint.password or endpoint.query.get("password")
            arguments["unix_socket_path"] = endpoint.path
            return arguments
        arguments["socket_connect_timeout"] = self.spec.connect_timeout
        if endpoint.scheme == "rediss" or (self.spec.tls is not None and endpoint.scheme in ("redis", "sentinel")):
            arguments["ssl"] = True
            arguments.update(self._tls_arguments(endpoint))
        return arguments

    def _open_redis(self) -> Any:
        try:
            import redis
        except ImportError as exc:
            raise PreconditionFailed(
                f"the library redis is missing in {sys.executable}: set virtualenv, the application's own, "
                f"or install it (Debian: python3-redis)."
            ) from exc
        endpoints = self.spec.endpoints
        if self.endpoint.scheme == "sentinel":
            with self.guard():
                client = self._open_sentinel(endpoints)
                client.ping()
            return client
        for index, endpoint in enumerate(endpoints):
            client = redis.Redis(host=endpoint.host, port=endpoint.port, **self._client_arguments(endpoint))
            try:
                with self.guard():
                    client.ping()
            except AuthenticationFailed:
                client.close()
                raise
            except ConnectionFailed:
                client.close()
                if index + 1 == len(endpoints):
                    raise
                continue
            except BaseException:
                client.close()
                raise
            self.endpoint, self.db = endpoint, int(endpoint.database or 0)
            return client
        raise AssertionError("a URL has at least one endpoint")

    def _open_sentinel(self, endpoints: Sequence[Endpoint]) -> Any:
        from redis.sentinel import Sentinel

        options = self.spec.transport_options
        arguments = self._client_arguments(endpoints[0])
        self._sentinel = Sentinel(
            [(endpoint.host, endpoint.port) for endpoint in endpoints],
            min_other_sentinels=options.get("min_other_sentinels", 0),
            sentinel_kwargs=self._sentinel_arguments(arguments),
            **arguments,
        )
        return self._sentinel.master_for(options["master_name"])

    def _sentinel_arguments(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        found = dict(self.spec.transport_options.get("sentinel_kwargs") or {})
        found.setdefault("retry", arguments["retry"])
        found.setdefault("socket_timeout", self.spec.socket_timeout)
        found.setdefault("socket_connect_timeout", self.spec.connect_timeout)
        return found

    def sentinels(self) -> dict[str, Any]:
        """Address -> client of each Sentinel of the URL, none of them asked yet. The caller closes them."""
        import redis

        if self.endpoint.scheme != "sentinel":
            raise PreconditionFailed(
                f"broker_url: {self.endpoint.scheme}:// names no Sentinel. Use sentinel://HOST:26379/0;sentinel://..., "
                f"and transport_options.master_name."
            )
        arguments = self._sentinel_arguments(self._client_arguments(self.endpoint))
        return {
            f"{endpoint.host}:{endpoint.port}": redis.Redis(host=endpoint.host, port=endpoint.port, **arguments)
            for endpoint in self.spec.endpoints
        }

    def node(self, host: str, port: int) -> Any:
        """A client of one Redis behind the Sentinels, not asked yet. The caller closes it."""
        import redis

        return redis.Redis(host=host, port=port, **self._client_arguments(self.endpoint))

    def fanout_topics(self, exchange: str) -> list[str]:
        """The PUB/SUB channels a broadcast must go to, key prefix included."""
        options = self.spec.transport_options
        raw = options.get("fanout_prefix", True)
        prefix = raw if isinstance(raw, str) else ("/{db}." if raw else "")
        topics = [prefix.format(db=self.db) + exchange]
        if (
            self.endpoint.scheme == "sentinel"
            and options.get("sentinel_fanout_compat")
            and prefix + exchange != topics[0]
        ):
            topics.append(prefix + exchange)
        return [self.key_prefix + topic for topic in topics]

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Turn what redis-py, kombu or the socket raise into one clear error with its cure."""
        try:
            yield
        except CeleryOpsError:
            raise
        except Exception as exc:
            known = self._explain(exc)
            if known is None:
                raise
            raise known from exc

    def _explain(self, exc: Exception) -> CeleryOpsError | None:
        where = self.spec.address
        text = scrub(exc, *self.spec.secrets)
        names = {cls.__name__ for cls in type(exc).__mro__}
        command = ""
        in_pipeline = _PIPELINE.match(text)
        if in_pipeline:
            command, text = f" ({in_pipeline[1][:80]})", text[in_pipeline.end() :]
        low = text.lower()
        if "AuthenticationError" in names or low.startswith(("wrongpass", "noauth")) or "AccessRefused" in names:
            missing = not self.endpoint.password
            hint = "gives no password" if missing else "gives a user or password the broker refuses"
            return AuthenticationFailed(
                f"{where}: authentication failed: broker_url {hint}. Correct the credentials. ({text})"
            )
        if "NotAllowed" in names and "connection limit" in low:
            return ConnectionFailed(
                f"{where}: RabbitMQ takes no more connections of this user or virtual host: {text}. End those that are "
                f"not needed (rabbitmqctl list_connections), or raise the limit (rabbitmqctl set_vhost_limits, "
                f"set_user_limits).",
                cause="connection_limit",
            )
        if "NotAllowed" in names and "vhost" in low:
            return ConnectionFailed(
                f"{where}: {text}. Correct the virtual host at the end of broker_url, or give the user rights to it "
                f"(rabbitmqctl set_permissions)."
            )
        if "NoPermissionError" in names or low.startswith("noperm"):
            return AuthenticationFailed(
                f"{where}: the broker's ACL refuses a command this needs: {text}. Extend the user's rights."
            )
        if "db index" in low or "invalid db index" in low or "invalid database" in low:
            return ConnectionFailed(
                f"{where}: database {self.db} does not exist: {text}. Correct the number at the end of broker_url."
            )
        if "BusyLoadingError" in names or low.startswith("loading"):
            return ConnectionFailed(
                f"{where}: Redis is still loading its data set. Wait until it is done and run again."
            )
        if "misconf" in low:
            return ConnectionFailed(
                f"{where}: Redis refuses writes because its last snapshot failed (MISCONF). Free disk space or mend "
                f"its data directory, then run BGSAVE."
            )
        if "ReadOnlyError" in names or low.startswith("readonly"):
            return ConnectionFailed(f"{where}: this Redis is a read-only replica. Point broker_url at the master.")
        if "OutOfMemoryError" in names or low.startswith("oom "):
            return ConnectionFailed(
                f"{where}: Redis is out of memory (maxmemory) and refuses writes. Free memory first. ({text})"
            )
        if low.startswith("wrongtype"):
            return WrongType(
                f"{where}: a key of the broker holds a foreign type{command}: {text}. Check key_prefix and "
                f"the database."
            )
        if "MasterNotFoundError" in names:
            master = self.spec.transport_options.get("master_name")
            return ConnectionFailed(
                f"{where}: no Sentinel knows a reachable master {master!r}. Check transport_options.master_name."
            )
        if "certificate" in low or "ssl" in low or "tls" in low or "wrong version number" in low:
            return ConnectionFailed(
                f"{where}: the TLS connection failed: {text}. Check tls.ca_certs, tls.certfile, tls.keyfile, and that "
                f"the port speaks TLS."
            )
        if "TimeoutError" in names or "timeout" in names:
            return ConnectionFailed(
                f"{where}: no answer in time (connect_timeout {self.spec.connect_timeout} s, socket_timeout "
                f"{self.spec.socket_timeout} s). Check host, port, firewall and whether the port speaks TLS, or raise "
                f"the timeouts."
            )
        if names & {"ConnectionError", "OperationalError", "OSError", "ConnectionRefusedError"}:
            return ConnectionFailed(
                f"{where}: cannot be reached: {text}. Check that the broker runs and broker_url is right."
            )
        if "RedisError" in names or "KombuError" in names:
            return ConnectionFailed(f"{where}: the broker answered with an error: {text}.")
        return None
