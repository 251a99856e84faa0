# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The way back of dead letters on an AMQP broker, where a queue can only be read by taking messages out of it.

What is read and not acknowledged goes back to its place when the channel closes, marked as redelivered.
"""

from __future__ import annotations

import base64
import json
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from .deadletters import HEADER, DeadSelection, Revival, compose, origin_queue, send_amqp, survey
from .errors import BadMessage, QueueUnknown
from .message import PUBLISHED_HEADER
from .queues import Outcome

BATCH = 100
_RENEWED = ("retries", "expires", PUBLISHED_HEADER)


class AmqpDeadLetters:
    """Dead-letter queues behind a kombu connection that is not opened yet."""

    def __init__(self, connection: Any) -> None:
        # A channel has transactions or confirms, not both.
        connection.transport_options = {**(connection.transport_options or {}), "confirm_publish": False}
        self.connection = connection

    def depth(self, queue: str) -> int | None:
        """None where there is no such queue."""
        channel = self.connection.channel()
        try:
            count = int(channel.queue_declare(queue, passive=True).message_count)
        except self.connection.channel_errors:
            return None  # and the broker has closed the channel
        channel.close()
        return count

    def require(self, queue: str) -> int:
        """Entries of a queue that exists; none where only the queue exists that it belongs to."""
        count = self.depth(queue)
        if count is None and self.depth(origin_queue(queue)) is None:
            raise QueueUnknown(
                f"queue: there is neither a queue {origin_queue(queue)!r} nor dead letters of it.", queue=queue
            )
        return count or 0

    def look(self, queue: str, selection: DeadSelection, **options: Any) -> dict[str, Any]:
        with self.connection.channel() as channel:
            return survey((raw for raw, _message in self._read(channel, queue)), selection, time.time(), **options)

    def requeue(self, queue: str, selection: DeadSelection, *, limit: int | None = None, rate: float = 0.0) -> Outcome:
        """Send the selected entries back to where they came from. Each batch is one transaction of the broker: a run
        that is killed leaves an entry either here or there. A broker that dies in a commit may have both."""
        started = time.monotonic()
        origin = origin_queue(queue)
        if self.depth(origin) is None:
            raise QueueUnknown(
                f"queue: there is no queue {origin!r} to send them to. Start a worker of it.", queue=origin
            )
        outcome = Outcome("requeued", queue)
        counts: Counter[str] = Counter()
        revive = Revival(origin, (0,), time.time())
        with self.connection.channel() as channel:
            channel.tx_select()
            producer = self.connection.Producer(channel)
            for raw, message in self._read(channel, queue):
                if limit is not None and outcome.count == limit:
                    break
                try:
                    wanted, task, _unknown = selection.judge(raw, time.time())
                    if not wanted:
                        continue
                    _task, _step, revived = revive(raw)
                except (BadMessage, ValueError):
                    outcome.undecodable += 1
                    continue
                self._send(producer, origin, message, json.loads(revived))
                channel.basic_ack(message.delivery_tag)
                outcome.count += 1
                counts[task] += 1
                if outcome.count % (min(BATCH, max(1, int(rate / 2))) if rate else BATCH) == 0:
                    channel.tx_commit()
                    while rate and time.monotonic() - started < outcome.count / rate:
                        time.sleep(0.01)
            channel.tx_commit()
        outcome.tasks = dict(counts.most_common())
        outcome.elapsed = time.monotonic() - started
        return outcome

    def _send(self, producer: Any, queue: str, message: Any, revived: dict[str, Any]) -> None:
        """The headers stay those of AMQP, which knows more kinds than JSON, but for the ones that are new."""
        headers = {name: value for name, value in message.headers.items() if name != HEADER}
        headers |= {name: revived["headers"][name] for name in _RENEWED if name in headers}
        send_amqp(producer, queue, message, base64.b64decode(revived["body"]), headers)

    def _read(self, channel: Any, queue: str) -> Iterator[tuple[bytes, Any]]:
        """What is there now, those that failed first in front: as text, and the message."""
        import kombu

        found = kombu.Queue(queue, channel=channel)
        for _number in range(self.depth(queue) or 0):
            message = found.get(no_ack=False)
            if message is None:
                return
            yield compose(message, message.headers or {}, queue), message
