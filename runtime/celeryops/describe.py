# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""python -m celeryops.describe -A pkg.module:app: what an application is made of, as JSON on stdout."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import traceback
from collections.abc import Callable
from typing import Any

from ._environment import release


def load_app(name: str) -> Any:
    """The application with every task its workers would know: included, autodiscovered and our own."""
    from celery.app.utils import find_app

    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    app = find_app(name)
    app.set_default()
    importlib.import_module("celeryops.worker")
    app.loader.import_default_modules()
    app.finalize()
    return app


def serve(title: str, work: Callable[[Any, Any], Any], *first: str) -> int:
    """A program that is told its application by --app and its order as JSON on stdin, and answers with JSON.

    `first`: modules that the application's tasks need before they are imported. The exit code is 1 when it does not
    import.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("-A", "--app", required=True, metavar="pkg.module:app")
    options = parser.parse_args()
    order = json.load(sys.stdin)
    # What the application prints must not get into our answer.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        for name in first:
            importlib.import_module(name)
        app = load_app(options.app)
    except BaseException as exc:  # an application may raise anything, SystemExit included
        traceback.print_exc()
        print(f"{options.app} cannot be imported: {type(exc).__name__}: {exc}", file=sys.stderr)
        return 1
    json.dump(work(app, order), answer, default=repr)
    answer.flush()
    return 0


def describe(app: Any) -> dict[str, Any]:
    import celery

    conf = app.conf
    schedule = {name: _entry(app, entry) for name, entry in sorted(dict(conf.beat_schedule or {}).items())}
    queues = {conf.task_default_queue, *app.amqp.queues, *(entry["queue"] for entry in schedule.values())}
    queues |= {queue_of(app, name) for name in app.tasks}
    return {
        "release": release(),
        "celery": celery.__version__,
        "python": platform.python_version(),
        "tasks": sorted(app.tasks),
        "schedule": schedule,
        "queues": sorted(queues),
        "acks_late": bool(conf.task_acks_late),
        "acks_late_tasks": sorted(
            name for name, task in app.tasks.items() if task.acks_late and not name.startswith("celeryops.")
        ),
        "visibility_timeout": (conf.broker_transport_options or {}).get("visibility_timeout"),
        "settings": _settings(conf, app.namespace),
    }


# Harmless values: release.json can be read by everybody on the host.
_TOLD = (
    "accept_content",
    "result_accept_content",
    "task_serializer",
    "result_serializer",
    "broker_connection_retry",
    "control_queue_durable",
    "control_queue_exclusive",
    "event_queue_durable",
    "event_queue_exclusive",
)


def _settings(conf: Any, namespace: str | None) -> dict[str, Any]:
    """The names of what is configured, as it is written there, and the values that an upgrade depends on."""
    prefix = f"{namespace.rstrip('_')}_" if namespace else ""
    names = {name for name in conf.table(with_defaults=False, censored=False) if isinstance(name, str)}
    if prefix:
        # Other names in capitals are the settings of something else.
        names = {name[len(prefix) :].lower() if name.startswith(prefix) else name for name in names}
        names = {name for name in names if name.islower()}
    options = conf.broker_transport_options or {}
    values = {name: conf.get(name) for name in _TOLD}
    for name in ("accept_content", "result_accept_content"):
        values[name] = None if values[name] is None else sorted(_content_type(kind) for kind in values[name])
    for name in ("task_serializer", "result_serializer"):
        values[name] = _content_type(values[name])
    values["transport_options"] = sorted(options)
    values["sentinel_fanout_compat"] = bool(options.get("sentinel_fanout_compat"))
    values["visibility_timeout"] = options.get("visibility_timeout")
    return {"names": sorted(names - {"deprecated_settings"}), "values": values}


def _content_type(serializer: str) -> str:
    from kombu.serialization import registry

    return str(registry.name_to_type.get(serializer, serializer))


def queue_of(app: Any, name: str, args: Any = (), kwargs: Any = None, options: Any = None) -> str:
    """Where the application sends the task."""
    queue = app.amqp.router.route(dict(options or {}), name, args or (), kwargs or {}).get("queue")
    return str(getattr(queue, "name", queue) or app.conf.task_default_queue)


def _entry(app: Any, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        entry = {"task": entry.task, "args": entry.args, "kwargs": entry.kwargs, "options": entry.options}
    queue = queue_of(app, entry["task"], entry.get("args"), entry.get("kwargs"), entry.get("options"))
    return {"task": entry["task"], "queue": queue}


def _reason(exc: BaseException) -> str:
    frames = traceback.extract_tb(exc.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return " ".join(f"{type(exc).__name__}: {exc}".split()) + place


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m celeryops.describe", description=__doc__)
    parser.add_argument("-A", "--app", required=True, metavar="PKG.MODULE:APP")
    options = parser.parse_args(argv)
    # Only the JSON may reach stdout, whatever the application prints while it is imported.
    answer = os.dup(1)
    os.dup2(2, 1)
    try:
        text = json.dumps(describe(load_app(options.app)), indent=2)
    except (Exception, SystemExit) as exc:
        print(f"celeryops.describe: {options.app} does not import: {_reason(exc)}", file=sys.stderr)
        return 1
    sys.stdout.flush()
    with os.fdopen(answer, "w") as out:
        print(text, file=out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
