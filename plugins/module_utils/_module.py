# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import site
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.common.respawn import has_respawned, respawn_module

from .engine.connection import (
    Broker,
    BrokerSpec,
    import_app,
    read_operator_file,
    scrub,
    scrub_data,
    secret_values,
)
from .engine.errors import CeleryOpsError, PreconditionFailed


def connection_argument_spec() -> dict[str, Any]:
    return {
        "broker_url": {"type": "str", "no_log": True},
        "app": {"type": "str"},
        "app_dir": {"type": "path"},
        "virtualenv": {"type": "path"},
        "environment_file": {"type": "path"},
        "key_prefix": {"type": "str", "no_log": False},
        "transport_options": {"type": "dict"},
        "tls": {
            "type": "dict",
            "options": {
                "ca_certs": {"type": "path"},
                "certfile": {"type": "path"},
                "keyfile": {"type": "path", "no_log": False},
                "verify": {"type": "bool", "default": True},
            },
        },
        "connect_timeout": {"type": "float", "default": 5.0},
        "socket_timeout": {"type": "float", "default": 10.0},
    }


def above_zero(params: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if params[name] <= 0:
            raise PreconditionFailed(f"{name}: must be above 0 seconds, not {params[name]:g}.")


def confirmed(params: Mapping[str, Any], meant: str, why: str) -> None:
    """`why` ends before "must equal"."""
    if params["confirm"] != meant:
        given = f"not {params['confirm']!r}" if params["confirm"] is not None else "and is not set"
        raise PreconditionFailed(f"confirm: {why} must equal {meant!r}, {given}.")


class _Module(AnsibleModule):
    def _log_invocation(self) -> None:
        # Passwords deep inside transport_options must reach neither the system log nor the returned invocation.
        self.no_log_values.update(secret_values(self.params.get("transport_options")))
        super()._log_invocation()


class CeleryModule:
    """An Ansible module of this collection: arguments, the application's venv, the broker, failures."""

    def __init__(self, argument_spec: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.ansible = _Module(argument_spec={**connection_argument_spec(), **(argument_spec or {})}, **kwargs)
        self.params: dict[str, Any] = self.ansible.params
        self.check_mode: bool = self.ansible.check_mode
        self.secrets: list[str] = secret_values(self.params["transport_options"])

    def broker_spec(self) -> BrokerSpec:
        params = self.params
        spec = BrokerSpec.build(
            url=params["broker_url"],
            app=params["app"],
            app_dir=params["app_dir"],
            environment_file=params["environment_file"],
            key_prefix=params["key_prefix"],
            transport_options=params["transport_options"],
            tls=params["tls"],
            connect_timeout=params["connect_timeout"],
            socket_timeout=params["socket_timeout"],
        )
        self.secrets = [*self.secrets, *spec.secrets]
        return spec

    def result_spec(self) -> BrokerSpec:
        """The same with the result backend: the option `result_backend`, the environment file, or the application."""
        spec = self.broker_spec()
        backend = self.params["result_backend"] or spec.result_backend
        if not backend and self.params["app"]:
            file = self.params["environment_file"]
            app = import_app(self.params["app"], self.params["app_dir"], read_operator_file(file) if file else None)
            backend = app.conf.result_backend or ""
        spec = dataclasses.replace(spec, result_backend=backend)
        self.secrets = [*self.secrets, *spec.secrets]
        return spec

    @contextlib.contextmanager
    def broker(self) -> Iterator[Broker]:
        with Broker(self.broker_spec()) as broker, broker.guard():
            yield broker

    def require(self, *libraries: str) -> None:
        """Make the libraries importable: from virtualenv, in process where its Python is ours, else respawned there."""
        virtualenv = self.params["virtualenv"]
        if virtualenv and not has_respawned():
            activate(virtualenv)
        for library in libraries:
            # An application on RabbitMQ may have no redis; a Redis broker without it says so when it is opened.
            if library == "redis" and importlib.util.find_spec("celery") is not None:
                continue
            if importlib.util.find_spec(library) is None:
                where = f"virtualenv {virtualenv}" if virtualenv else f"{sys.executable}, and virtualenv is not set"
                raise PreconditionFailed(
                    f"the Python library {library} is missing in {where}. Set virtualenv to the application's virtual "
                    f"environment on this host."
                )

    def warn(self, text: str) -> None:
        self.ansible.warn(scrub(text, *self.secrets))

    def exit(self, result: dict[str, Any]) -> NoReturn:
        self.ansible.exit_json(**scrub_data(result))
        raise SystemExit  # for type checkers: exit_json does not return

    def fail(self, error: CeleryOpsError) -> NoReturn:
        data = {key: scrub_data(value) for key, value in error.data.items() if key not in ("msg", "failed")}
        self.ansible.fail_json(msg=scrub(error.msg, *self.secrets), category=error.category, **data)
        raise SystemExit

    def crash(self, error: Exception) -> NoReturn:
        text = scrub("".join(traceback.format_exception(type(error), error, error.__traceback__)), *self.secrets)
        self.ansible.fail_json(
            msg=f"unexpected {type(error).__name__}: {scrub(error, *self.secrets)}",
            category="unexpected",
            exception=text,
        )
        raise SystemExit


def run(
    body: Callable[[CeleryModule], dict[str, Any]],
    argument_spec: dict[str, Any] | None = None,
    *,
    libraries: tuple[str, ...] = ("redis",),
    **kwargs: Any,
) -> None:
    """Run one module: `body` returns the result or raises CeleryOpsError."""
    module = CeleryModule(argument_spec, **kwargs)
    try:
        module.require(*libraries)
        result = body(module)
    except CeleryOpsError as exc:
        module.fail(exc)
    except Exception as exc:  # pylint: disable=broad-except
        module.crash(exc)
    module.exit(result)


def activate(virtualenv: str) -> None:
    """Use the packages of a virtual environment: in this process if it is of this Python, else respawn in it."""
    python = os.path.join(virtualenv, "bin", "python")
    if not os.path.exists(python):
        raise PreconditionFailed(
            f"virtualenv: there is no {python} on this host. Give the directory of the application's virtual "
            f"environment."
        )
    here = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    packages = os.path.join(virtualenv, "lib", here, "site-packages")
    if os.path.realpath(sys.prefix) == os.path.realpath(virtualenv):
        return
    if not os.path.isdir(packages):
        respawn_module(python)
    before = list(sys.path)
    site.addsitedir(packages)  # honours .pth files, but appends: the application's versions must come first
    added = [path for path in sys.path if path not in before]
    sys.path[:] = added + before
    importlib.invalidate_caches()
