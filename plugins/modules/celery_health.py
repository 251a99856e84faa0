#!/usr/bin/python
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_health
short_description: Judge the health of a Celery fleet and its broker by thresholds
version_added: 0.1.0
author:
  - celeryops contributors (@celeryops)
description:
  - Asks the broker and, through it, every worker, once, and judges what it finds together with what
    M(celeryops.runbook.celery_host_info) saw on the hosts.
  - Every check says C(ok), C(warning), C(critical) or C(unknown). What cannot be seen is C(unknown), never a guess.
  - A broker that does not answer is a finding, not an error of the module.
  - The module reads only. It does not switch on task events either; without them the rates are C(unknown).
options:
  hosts:
    description:
      - A dictionary from host name to the result of M(celeryops.runbook.celery_host_info) there.
      - An entry C(reachable=false) marks a host that could not be looked at.
    type: dict
    default: {}
  application:
    description: The application's name, the variable C(celeryops_app_name), under which its beat leaves a heartbeat.
    type: str
  queues:
    description: Queues to judge beside those which the hosts' workers are configured for or consume.
    type: list
    elements: str
    default: []
  thresholds:
    description:
      - A dictionary from the name of a check to C(warning) and C(critical), in place of the defaults.
      - Null switches a step off.
      - A value at C(warning) is a warning, one beyond C(critical) is critical.
    type: dict
    default: {}
  queue_thresholds:
    description: A dictionary from queue to C(depth), C(latency), C(consumers), each with C(warning) and C(critical).
    type: dict
    default: {}
  task_thresholds:
    description: A dictionary from a pattern of task names to C(warning) and C(critical) in seconds of run time.
    type: dict
    default: {}
  beat_expected:
    description: Whether beat has to run.
    type: bool
    default: true
  beat_standby:
    description: How many more beats have to run and stand by for the one.
    type: int
    default: 0
  visibility_timeout:
    description:
      - The broker's visibility timeout in seconds. Default is the one of the transport options, else 3600.
    type: float
  window:
    description: Seconds to listen to the event stream for the rates, 0 for not at all.
    type: float
    default: 3.0
  window_minimum:
    description: Tasks that must have been seen in O(window) before a rate is judged.
    type: int
    default: 20
  timeout:
    description: Seconds to wait for the answers of all workers.
    type: float
    default: 2.0
  scope:
    description: What to judge, the whole fleet or only the broker and its queues.
    type: str
    choices: [fleet, broker]
    default: fleet
extends_documentation_fragment:
  - celeryops.runbook.connection
  - celeryops.runbook.attributes.info
seealso:
  - module: celeryops.runbook.celery_host_info
  - module: celeryops.runbook.celery_inspect
"""

EXAMPLES = r"""
- name: Judge the fleet
  celeryops.runbook.celery_health:
    environment_file: /etc/celeryops/shop/secret.env
    virtualenv: /srv/shop/current/venv
    hosts:
      worker1: "{{ seen }}"
    thresholds:
      queue_depth: {warning: 100, critical: 500}
    queue_thresholds:
      reports:
        depth: {warning: 500, critical: 1000}
        latency: {warning: 60, critical: 300}
    task_thresholds:
      shop.sales_report: {warning: 30, critical: 60}
  register: health
  failed_when: health.verdict == 'critical'
"""

RETURN = r"""
verdict:
  description: V(critical) or V(warning) if any check is, else V(healthy).
  returned: success
  type: str
  sample: healthy
causes:
  description: The messages that decided the verdict, worst first.
  returned: success
  type: list
  elements: str
  sample: ["queue bulk: 1200 messages wait"]
counts:
  description: How many checks ended in each severity.
  returned: success
  type: dict
  sample: {ok: 24, unknown: 2, warning: 0, critical: 0}
checks:
  description: One entry for each check, or one for each subject of a check that is not well.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: The check.
      type: str
      sample: queue_depth
    severity:
      description: V(ok), V(unknown), V(warning) or V(critical).
      type: str
    subject:
      description: The queue, node, unit or host it is about, if it is about one.
      type: str
      sample: bulk
    value:
      description: What was found.
      type: raw
      sample: 1200
    warning:
      description: The threshold of a warning.
      type: float
    critical:
      description: The threshold of a critical finding.
      type: float
    unit:
      description: The unit of value and thresholds.
      type: str
      sample: messages
    message:
      description: The finding in words.
      type: str
    cure:
      description: The playbook of this collection that helps.
      type: str
      sample: scale
broker:
  description: V(redis) or V(amqp), which is RabbitMQ; empty where it does not answer.
  returned: success
  type: str
fleet:
  description: The nodes that answered, with the queues they consume and their release.
  returned: success
  type: dict
queues:
  description: Messages waiting in each queue, and for how long the oldest has waited, in seconds.
  returned: success
  type: dict
  sample: {bulk: {depth: 1200, oldest_age: 31.5}}
unacked:
  description: Messages with workers and not acknowledged.
  returned: success
  type: dict
  sample: {count: 3, oldest_age: 4.2}
dead:
  description: Dead letters by dead-letter queue, where there are any.
  returned: success
  type: dict
  sample: {email.dead: 12}
paused:
  description: The queues that are paused, each with who paused it, since when and why, in words.
  returned: success
  type: dict
disabled:
  description: The entries of beat's schedule that are disabled, each with who did so, since when and why, in words.
  returned: success
  type: dict
beat:
  description: Host, process, C(age) in seconds of the last tick, and the task sent last, as beat told the broker.
  returned: success
  type: dict
  sample: {host: worker1, pid: 712, age: 3.1, task: shop.report, sent_ago: 41.0}
"""

from typing import Any

from ansible_collections.celeryops.runbook.plugins.module_utils._module import CeleryModule, above_zero, run
from ansible_collections.celeryops.runbook.plugins.module_utils.engine import health, survey
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.deadletters import SUFFIX
from ansible_collections.celeryops.runbook.plugins.module_utils.engine.errors import CeleryOpsError, PreconditionFailed


def look(module: CeleryModule, facts: health.Facts) -> None:
    """Fill in what the broker and the workers tell; what fails stays None."""
    params = module.params
    units = [unit for host in facts.hosts.values() for unit in host.get("units", []) if unit.get("kind") == "worker"]
    expected = sorted({unit["node"] for unit in units if unit.get("node") and unit.get("enabled")})
    with module.broker() as broker:
        names = {queue for unit in units if unit.get("enabled") for queue in unit.get("queues", [])}
        names.update(params["queues"])
        facts.broker = survey.broker_facts(broker, names)
        options = broker.spec.transport_options
        facts.visibility_timeout = float(params["visibility_timeout"] or options.get("visibility_timeout") or 3600)
        if broker.kind != "redis":
            facts.events_reason = facts.queues_reason = "on RabbitMQ it is not to be had"
            if not facts.broker["blocked"]:  # or nothing can be asked
                facts.fleet = survey.fleet_facts(broker, expected, params["timeout"])
                names.update(*(node["queues"] for node in facts.fleet["answered"].values()))
            told = facts.broker["queues"]
            facts.queues = survey.rabbitmq_queues(facts.broker, names)
            facts.dead = {name: row["ready"] for name, row in told.items() if name.endswith(SUFFIX) and row["ready"]}
            return
        window = survey.EventWindow(broker) if params["window"] > 0 and params["scope"] == "fleet" else None
        try:
            facts.fleet = survey.fleet_facts(broker, expected, params["timeout"])
            names.update(*(node["queues"] for node in facts.fleet["answered"].values()))
            facts.queues = survey.queue_facts(broker, names)
            facts.dead = survey.dead_facts(broker)
            facts.unacked = survey.unacked_facts(broker)
            facts.paused = survey.pause_facts(broker)
            facts.disabled = {}
            if params["application"]:
                facts.heartbeat = survey.beat_facts(broker, params["application"])
                facts.disabled = survey.rest_facts(broker, params["application"])
            if window is not None:
                facts.events = window.read(params["window"])
                facts.events_reason = "no task events came: the workers send none (start them with -E) or nothing ran"
        finally:
            if window is not None:
                window.close()


def body(module: CeleryModule) -> dict[str, Any]:
    params = module.params
    above_zero(params, "timeout")
    if params["window"] < 0:
        raise PreconditionFailed(f"window: must not be below 0 seconds, not {params['window']:g}.")
    for name, host in params["hosts"].items():
        if not isinstance(host, dict):
            raise PreconditionFailed(f"hosts.{name}: give the result of celery_host_info, not {type(host).__name__}.")
    try:
        thresholds = health.Thresholds(params["thresholds"], params["queue_thresholds"], params["task_thresholds"])
    except health.BadThreshold as error:
        raise PreconditionFailed(str(error)) from error
    facts = health.Facts(
        hosts=params["hosts"],
        beat_expected=params["beat_expected"],
        standby=params["beat_standby"],
        events_minimum=params["window_minimum"],
    )
    if params["window"] == 0:
        facts.events_reason = "the event stream was not read (window is 0)"
    module.broker_spec()  # a wrong option is an error, not a broker that is down
    try:
        look(module, facts)
    except CeleryOpsError as error:
        if facts.broker is None:
            facts.broker_error = error.msg
            facts.events_reason = facts.queues_reason
        else:
            module.warn(f"the broker went away during the survey: {error.msg}")
    verdict = health.judge(facts, thresholds, params["scope"])
    return {
        "changed": False,
        **verdict.as_dict(),
        "causes": verdict.causes,
        "broker": str((facts.broker or {}).get("kind", "")),
        "fleet": dict((facts.fleet or {}).get("answered", {})),
        "queues": dict(facts.queues or {}),
        "dead": dict(facts.dead or {}),
        "unacked": dict(facts.unacked or {}),
        "paused": {name: pause["text"] for name, pause in facts.paused.items()},
        "disabled": dict(facts.disabled or {}),
        "beat": dict(facts.heartbeat or {}),
    }


def main() -> None:
    run(
        body,
        {
            "hosts": {"type": "dict", "default": {}},
            "application": {"type": "str"},
            "queues": {"type": "list", "elements": "str", "default": []},
            "thresholds": {"type": "dict", "default": {}},
            "queue_thresholds": {"type": "dict", "default": {}},
            "task_thresholds": {"type": "dict", "default": {}},
            "beat_expected": {"type": "bool", "default": True},
            "beat_standby": {"type": "int", "default": 0},
            "visibility_timeout": {"type": "float"},
            "window": {"type": "float", "default": 3.0},
            "window_minimum": {"type": "int", "default": 20},
            "timeout": {"type": "float", "default": 2.0},
            "scope": {"type": "str", "choices": ["fleet", "broker"], "default": "fleet"},
        },
        supports_check_mode=True,
    )


if __name__ == "__main__":
    main()
