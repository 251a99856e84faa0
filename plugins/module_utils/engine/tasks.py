# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Send tasks, wait for them, and prove with canaries that workers take tasks from their queues."""

from __future__ import annotations

import contextlib
import difflib
import json
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from . import signing
from .connection import Broker, LinkedStore, import_app, read_operator_file, scrub
from .control import Control, Replies
from .errors import (
    CeleryOpsError,
    ConnectionFailed,
    NodeUnknown,
    NoReply,
    PreconditionFailed,
    QueueUnknown,
    WaitTimeout,
)

CANARY_TASK = "celeryops.canary"
CANARY_TTL = 300
PUBLISHED_HEADER = "celeryops_published"
CANARIES_A_ROUND = 32
CANARIES_A_QUEUE = 1000


class TaskUnknown(CeleryOpsError):
    category = "task_unknown"


class TaskFailed(CeleryOpsError):
    category = "task_failed"


class CanaryFailed(CeleryOpsError):
    category = "canary"


# Settings only the application knows


def application(app: str, app_dir: str | None, environment_file: str | None) -> Any:
    """The imported application, with the environment it would have as a service."""
    return import_app(app, app_dir, read_operator_file(environment_file) if environment_file else None)


def route(app: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """The queue the application itself would send the task to."""
    queue = app.amqp.router.route({}, name, tuple(args), dict(kwargs)).get("queue")
    return str(getattr(queue, "name", queue) or app.conf.task_default_queue)


# Sending


def parse_eta(text: str) -> datetime:
    eta: datetime | None = None
    with contextlib.suppress(ValueError):
        eta = datetime.fromisoformat(text.replace("Z", "+00:00"))
    if eta is None or eta.tzinfo is None:
        raise PreconditionFailed(
            f"eta: {text!r} is not a time with a zone. Write it as 2026-11-21T06:00:00+00:00 or use countdown."
        )
    return eta.astimezone(timezone.utc)


@dataclass(frozen=True)
class Order:
    """One task to be sent."""

    name: str
    queue: str
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    priority: int | None = None
    countdown: float | None = None
    eta: datetime | None = None
    expires: float | None = None
    task_id: str | None = None
    headers: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        for option, value in (("name", self.name), ("queue", self.queue)):
            if not value.strip():
                raise PreconditionFailed(f"{option}: must not be empty.")
        if self.task_id is not None and not self.task_id.strip():
            raise PreconditionFailed("task_id: must not be empty; leave it out and one is made.")
        if self.priority is not None and not 0 <= self.priority <= 9:
            raise PreconditionFailed(
                f"priority: must be 0 to 9, not {self.priority}. On Redis 0 is the most urgent and 9 the least."
            )
        if self.countdown is not None and self.eta is not None:
            raise PreconditionFailed("countdown and eta exclude each other; give one of them.")
        for option, number in (("countdown", self.countdown), ("expires", self.expires)):
            if number is not None and number < 0:
                raise PreconditionFailed(f"{option}: must not be below 0 seconds, not {number}.")


def registered_names(replies: Replies, nodes: Collection[str] | None = None) -> set[str]:
    """Task names out of the answers (of these nodes) to `registered`, which may carry a rate limit behind the name."""
    return {
        str(text).split(" ", 1)[0]
        for reply in replies.replies
        if reply.error is None and (nodes is None or reply.node in nodes)
        for text in reply.value or ()
    }


def alike(name: str, known: Iterable[str]) -> str:
    """A sentence with the names that come close, or nothing."""
    close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    return f"Close to it: {', '.join(close)}. " if close else ""


def queue_names(value: Any) -> list[str]:
    """Queue names out of one answer to `active_queues`."""
    return [str(queue.get("name")) for queue in value or () if isinstance(queue, dict)]


def ask_registered(broker: Broker, timeout: float) -> tuple[Replies, list[tuple[str, list[str]]]]:
    """What workers have registered, and the queues of each."""
    with Control(broker, timeout=timeout) as control:
        asked = control.many([("registered", {}), ("active_queues", {})])
    if not asked["registered"].replies:
        raise NoReply(
            "registered_only: no worker answers, so nobody can tell which tasks are known. Start a worker, or set it "
            "to false."
        )
    return asked["registered"], [(reply.node, queue_names(reply.value)) for reply in asked["active_queues"].replies]


def demand_known(broker: Broker, control: Control, name: str, queue: str) -> None:
    """Refuse a task no worker has registered, and a queue neither workers nor broker know."""
    asked = control.many([("registered", {}), ("active_queues", {})])
    registered, consumed = asked["registered"], asked["active_queues"]
    if not registered.replies:
        raise NoReply(
            f"name: no worker answers, so nobody can tell whether {name} is registered. Start a worker, or set "
            f"registered_only to false."
        )
    silent = f" ({registered.silent_count} subscribed worker(s) did not answer)" if registered.silent_count else ""
    if name not in registered_names(registered):
        raise TaskUnknown(
            f"name: task {name} is not registered on any of the {len(registered.nodes)} worker(s) that answer{silent}: "
            f"they would drop it. {alike(name, registered_names(registered))}Correct the name, deploy the release that "
            f"has it, or set registered_only to false.",
            task=name,
        )
    known = {found for reply in consumed.replies if reply.error is None for found in queue_names(reply.value)}
    if queue not in known and not _queue_exists(broker, queue):
        raise QueueUnknown(
            f"queue: no worker consumes {queue} and the broker has no such queue{silent}. Correct the name (consumed "
            f"are {', '.join(sorted(known)) or 'none'}), or set registered_only to false.",
            queue=queue,
        )


def _queue_exists(broker: Broker, queue: str) -> bool:
    if broker.kind != "redis":
        return False
    lists = [f"{queue}{broker.sep}{step}" if step else queue for step in broker.priority_steps]
    return bool(broker.redis.exists(*(broker.key_prefix + name for name in [*lists, f"_kombu.binding.{queue}"])))


def _target(queue: str) -> Any:
    """The queue itself, past exchanges and bindings, so that nothing is declared."""
    from kombu import Exchange, Queue

    return Queue(queue, Exchange(""), routing_key=queue, no_declare=True)


def send(broker: Broker, order: Order, *, producer: Any = None, ignore_result: bool = False) -> str:
    order.check()
    if broker.spec.signing_file:
        signing.sign_with(broker.spec.signing_file)
    with broker.guard():
        result = broker.celery_app.send_task(
            order.name,
            args=list(order.args),
            kwargs=dict(order.kwargs),
            queue=_target(order.queue),
            priority=order.priority,
            countdown=order.countdown,
            eta=order.eta,
            expires=order.expires,
            task_id=order.task_id,
            headers={**order.headers, PUBLISHED_HEADER: time.time()},
            producer=producer,
            retry=False,
            # The result is read later, if at all: no subscription now.
            **({"ignore_result": True} if ignore_result else {}),
        )
    return str(result.id)


# Results


def demand_backend(broker: Broker) -> None:
    if not broker.spec.result_backend or broker.spec.result_backend.startswith("disabled"):
        raise PreconditionFailed(
            "the result backend is disabled or not known, so states cannot be read. Set CELERY_RESULT_BACKEND in "
            "environment_file, give result_backend, or give app whose configuration names one."
        )


@contextlib.contextmanager
def backend_guard(broker: Broker) -> Iterator[Any]:
    app = broker.celery_app
    app.conf.update(
        redis_socket_connect_timeout=broker.spec.connect_timeout,
        redis_socket_timeout=broker.spec.socket_timeout,
        result_backend_always_retry=False,
    )
    try:
        yield app.backend
    except CeleryOpsError:
        raise
    except Exception as exc:
        raise ConnectionFailed(
            f"result backend: {type(exc).__name__}: {scrub(exc, *broker.spec.secrets)}. Check CELERY_RESULT_BACKEND."
        ) from exc


def states(broker: Broker, task_ids: Iterable[str], *, with_result: bool = False) -> list[dict[str, Any]]:
    """What the result backend says, in the order asked. PENDING is both: waiting, and unheard of."""
    demand_backend(broker)
    with backend_guard(broker) as backend:
        return [_meta(task_id, backend.get_task_meta(task_id), with_result) for task_id in task_ids]


def _meta(task_id: str, meta: Mapping[str, Any], with_result: bool) -> dict[str, Any]:
    from celery import states as names

    state = str(meta.get("status") or names.PENDING)
    done = meta.get("date_done")
    found: dict[str, Any] = {
        "task_id": task_id,
        "state": state,
        "ready": state in names.READY_STATES,
        "name": meta.get("name"),
        "node": meta.get("worker"),
        "queue": meta.get("queue"),
        "retries": meta.get("retries"),
        "date_done": done.isoformat() if isinstance(done, datetime) else done,
        "error": type(meta.get("result")).__name__ if isinstance(meta.get("result"), BaseException) else None,
    }
    if with_result:
        result = meta.get("result")
        found["result"] = str(result) if isinstance(result, BaseException) else result
    return found


def wait(broker: Broker, task_id: str, timeout: float, *, with_result: bool = False) -> dict[str, Any]:
    """The final state of a task, or WaitTimeout with the last one seen."""
    deadline = time.monotonic() + timeout
    pause = 0.02
    while True:
        found = states(broker, [task_id], with_result=with_result)[0]
        if found["ready"]:
            return found
        left = deadline - time.monotonic()
        if left <= 0:
            hint = ""
            if found["state"] == "PENDING":
                hint = " PENDING also means that nobody has heard of it, or that its results are ignored."
            raise WaitTimeout(
                f"wait_timeout: task {task_id} is {found['state']} after {timeout} s.{hint} Raise wait_timeout, or "
                f"look for it with celery_inspect and redis_queue_info.",
                **found,
            )
        time.sleep(min(pause, left))
        pause = min(pause * 1.5, 0.5)


def wait_all(
    broker: Broker, task_ids: Sequence[str], timeout: float, *, with_result: bool = False
) -> list[dict[str, Any]]:
    """The states of all, once all have ended; without a timeout as they are."""
    deadline = time.monotonic() + timeout
    while True:
        found = states(broker, task_ids, with_result=with_result)
        left = [item["task_id"] for item in found if not item["ready"]]
        if not left or timeout <= 0:
            return found
        if time.monotonic() >= deadline:
            raise WaitTimeout(
                f"wait_timeout: {len(left)} of {len(task_ids)} task(s) have not ended after {timeout:g} s: "
                f"{', '.join(left[:5])}. Raise it, or leave it out and look where they are.",
                tasks=found,
            )
        time.sleep(min(0.2, max(0.0, deadline - time.monotonic())))


# Canaries


def canary_key(key_prefix: str, token: str) -> str:
    return f"{key_prefix}celeryops:canary:{token}"


def answer_canary(connection: Any, token: str, answer: dict[str, Any]) -> None:
    """Worker side: leave the answer on the broker behind a kombu connection, for CANARY_TTL seconds."""
    text = json.dumps(answer, default=repr)
    store = LinkedStore.of(connection)
    if store is not None:
        key = canary_key(store.key_prefix, token)
        store.redis.pipeline(transaction=True).lpush(key, text).expire(key, CANARY_TTL).execute()
    else:
        queue = _canary_queue(token)
        connection.Producer(serializer="json").publish(
            {"answer": text}, exchange="", routing_key=queue.name, declare=[queue]
        )


def _canary_queue(token: str) -> Any:
    from kombu import Queue

    name = canary_key("", token)
    return Queue(name, exchange="", routing_key=name, durable=False, auto_delete=False, expires=CANARY_TTL)


class _Answers:
    """Reader side: the answers to one token. All canaries of a run share it."""

    def __init__(self, broker: Broker, token: str, connection: Any) -> None:
        self.broker = broker
        self.key = canary_key(broker.key_prefix, token)
        self.queue = None if broker.kind == "redis" else _canary_queue(token)(connection.default_channel)
        if self.queue is not None:
            self.queue.declare()

    def take(self) -> list[dict[str, Any]]:
        if self.queue is None:
            texts, _deleted = (
                self.broker.redis.pipeline(transaction=True).lrange(self.key, 0, -1).delete(self.key).execute()
            )
            return [json.loads(text) for text in reversed(texts)]
        found = []
        while (message := self.queue.get(no_ack=True)) is not None:
            found.append(json.loads(message.payload["answer"]))
        return found

    def forget(self) -> None:
        if self.queue is None:
            self.broker.redis.delete(self.key)
        else:
            self.queue.delete()


@dataclass
class Proof:
    """What the canaries showed."""

    answers: list[dict[str, Any]] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    elapsed: float = 0.0


@dataclass(frozen=True)
class Canary:
    """What every worker must answer."""

    run: str | None = None
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    expect: Any = None
    release: str | None = None

    def wrong(self, answer: Mapping[str, Any]) -> str | None:
        if answer.get("error"):
            return str(answer["error"])
        if self.release and answer.get("release") != self.release:
            return f"runs release {answer.get('release') or 'unknown'}, not {self.release}"
        if self.expect is not None and answer.get("value") != self.expect:
            return f"answers {answer.get('value')!r}, not {self.expect!r}"
        return None


def pairs(
    control: Control, queues: Sequence[str] | Mapping[str, Sequence[str]] | None, nodes: Sequence[str], run: str | None
) -> dict[str, list[str]]:
    """queue -> nodes which must answer from it (none named: any one). Refuses what cannot come true."""
    if isinstance(queues, Mapping):
        wanted = {queue: list(dict.fromkeys(named)) for queue, named in queues.items()}
        if nodes:
            raise PreconditionFailed("nodes: not together with queues as a dict, which names the nodes itself.")
    else:
        wanted = {queue: list(dict.fromkeys(nodes)) for queue in queues or ()}
    if not wanted and not nodes:
        raise PreconditionFailed("queues: name the queues to prove, or the nodes whose queues are to be proved.")
    named = list(dict.fromkeys([*nodes, *(node for group in wanted.values() for node in group)]))
    anybody = not named or not all(wanted.values())
    asked = control.many([("registered", {}), ("active_queues", {})], destination=None if anybody else named)
    consumed: dict[str, list[str]] = {
        reply.node: queue_names(reply.value) for reply in asked["active_queues"].replies if reply.error is None
    }
    tasks = {reply.node: registered_names(Replies([reply])) for reply in asked["registered"].replies}
    for node in named:
        if node not in consumed and node not in tasks:
            raise NodeUnknown(
                f"nodes: {node} does not answer. Correct the name, or start or unblock the worker.", node=node
            )
    if not tasks:
        raise NoReply("queues: no worker answers. Start one.")
    if not wanted:
        for node in nodes:
            if not consumed.get(node):
                raise QueueUnknown(
                    f"nodes: {node} consumes no queue. Resume its consumers or name the queues.", node=node
                )
            for queue in consumed[node]:
                wanted.setdefault(queue, []).append(node)
    for queue, group in wanted.items():
        for node in group:
            if node in consumed and queue not in consumed[node]:
                raise QueueUnknown(
                    f"queues: {node} does not consume {queue}, only {', '.join(consumed[node]) or 'no queue'}.",
                    node=node,
                    queue=queue,
                )
        if not group and not any(queue in found for found in consumed.values()):
            raise QueueUnknown(f"queues: no worker that answers consumes {queue}.", queue=queue)
    takers = {queue for queue, group in wanted.items() if not group}
    concerned = [*named, *(node for node, found in consumed.items() if takers & set(found))]
    for node in concerned:
        for name, cure in ((CANARY_TASK, "start it with --include celeryops.worker"), (run, "correct run")):
            if name and node in tasks and name not in tasks[node]:
                raise TaskUnknown(f"{node} has no task {name}; {cure}.", node=node, task=name)
    return wanted


def prove(broker: Broker, wanted: Mapping[str, Sequence[str]], canary: Canary, timeout: float) -> Proof:
    """Send canaries until every wanted (node, queue) pair has answered, or raise CanaryFailed with who did not.

    Any consumer of a queue may take a canary, so a few more than needed are sent in each round.
    """
    started = time.monotonic()
    deadline = started + timeout
    token = uuid.uuid4().hex
    missing = {queue: set(nodes) for queue, nodes in wanted.items()}
    proof = Proof(sent=dict.fromkeys(wanted, 0))
    wrong: list[dict[str, Any]] = []
    open_canaries = dict.fromkeys(wanted, 0)
    burst = 2
    kwargs: dict[str, Any] = {"token": token}
    if canary.run:
        kwargs |= {"run": canary.run, "args": list(canary.args), "kwargs": dict(canary.kwargs)}
    with broker.guard(), contextlib.ExitStack() as stack:
        connection = stack.enter_context(broker.celery_app.connection_for_write())
        producer = stack.enter_context(broker.celery_app.amqp.Producer(connection))
        answers = _Answers(broker, token, connection)
        stack.callback(answers.forget)
        while missing and time.monotonic() < deadline:
            for queue, nodes in missing.items():
                count = min(burst * max(1, len(nodes)), CANARIES_A_ROUND) - open_canaries[queue]
                count = max(0, min(count, CANARIES_A_QUEUE - proof.sent[queue]))
                for _number in range(count):
                    order = Order(CANARY_TASK, queue, kwargs=kwargs, priority=0, expires=max(1.0, timeout))
                    send(broker, order, producer=producer, ignore_result=True)
                proof.sent[queue] += count
                open_canaries[queue] += count
            round_end = min(deadline, time.monotonic() + 0.5)
            while missing and time.monotonic() < round_end:
                time.sleep(0.02)
                for answer in answers.take():
                    queue, node = str(answer.get("queue")), str(answer.get("node"))
                    if queue in open_canaries:
                        open_canaries[queue] -= 1
                    if queue not in missing or (wanted[queue] and node not in missing[queue]):
                        continue
                    missing[queue].discard(node)
                    if not missing[queue]:
                        del missing[queue]
                    answer = {key: answer.get(key) for key in ("node", "queue", "release", "value", "error")}
                    answer["seconds"] = round(time.monotonic() - started, 3)
                    proof.answers.append(answer)
                    reason = canary.wrong(answer)
                    if reason:
                        wrong.append({"node": node, "queue": queue, "reason": reason})
                if all(open_canaries[queue] <= 0 for queue in missing):
                    time.sleep(0.03)
                    break
            burst = min(burst * 2, CANARIES_A_ROUND)
    proof.elapsed = round(time.monotonic() - started, 3)
    nobody: list[str | None] = [None]
    silent = [{"node": node, "queue": queue} for queue in missing for node in sorted(missing[queue]) or nobody]
    if wrong or silent:
        parts = [f"{item['node']} from queue {item['queue']}: {item['reason']}" for item in wrong]
        parts += [
            f"{item['node'] or 'no node'} did not answer from queue {item['queue']} within {timeout} s"
            for item in silent
        ]
        raise CanaryFailed(
            "canary: " + "; ".join(parts) + ".",
            wrong=wrong,
            missing=silent,
            answers=proof.answers,
            sent=proof.sent,
            elapsed=proof.elapsed,
        )
    return proof
