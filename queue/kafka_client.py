"""What every Kafka client of a pool shares: topics, group, timeouts, and errors turned into ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import structlog
from kafka import KafkaAdminClient
from kafka.errors import KafkaError, TopicAlreadyExistsError
from kafka.net.compat import KafkaNetClient

from penstock.queue.errors import QueueUnavailable
from penstock.queue.records import PriorityClass
from penstock.queue.settings import QueueSettings

BOOTSTRAP_TIMEOUT_MS = 3000
"""A reachable broker answers the first call within milliseconds; a caller wants its 503 within seconds."""
REQUEST_TIMEOUT_MS = 2000
"""A replicated write takes tens of milliseconds; a broker silent for two seconds is stuck or gone."""
RECONNECT_BACKOFF_MAX_MS = 500
"""Find a restarted broker again at once. The library's 30 s is kind to a cluster of thousands of clients."""
TOKENS_HEADER = "t"
"""Prompt tokens in decimal, so that the backlog is counted without decoding records."""
REASON_HEADER = "reason"

log = structlog.get_logger()


class Topics(NamedTuple):
    """Names of one pool's topics, classes in order of rank, and of its consumer group."""

    classes: tuple[str, ...]
    dead: str
    group: str

    @classmethod
    def of(cls, pool: str) -> Topics:
        """The names for ``pool``."""
        classes = tuple(f"requests.{pool}.{name}" for name in PriorityClass)
        return cls(classes, f"requests.{pool}.dead", f"penstock.{pool}")


@contextmanager
def broker_errors() -> Iterator[None]:
    """Raise :class:`QueueUnavailable` for whatever the broker or the way to it did wrong."""
    try:
        yield
    except (KafkaError, OSError) as error:
        raise QueueUnavailable(f"Kafka did not accept: {error!r}") from error


def open_client(kind: Callable[..., Any], queue: QueueSettings, **config: Any) -> Any:
    """A producer, consumer or administration client, connected. Blocks.

    Raises:
        QueueUnavailable: no broker within :data:`BOOTSTRAP_TIMEOUT_MS`. The library would leave the I/O thread of a
            client that could not connect running, so it is ended here.
    """
    networks: list[KafkaNetClient] = []

    def network(**settings: Any) -> KafkaNetClient:
        networks.append(KafkaNetClient(**settings))
        return networks[-1]

    try:
        with broker_errors():
            return kind(
                bootstrap_servers=queue.bootstrap.split(","),
                client_id="penstock",
                bootstrap_timeout_ms=BOOTSTRAP_TIMEOUT_MS,
                request_timeout_ms=REQUEST_TIMEOUT_MS,
                reconnect_backoff_max_ms=RECONNECT_BACKOFF_MAX_MS,
                kafka_client=network,
                **config,
            )
    except QueueUnavailable:
        for client in networks:
            client.close()
        raise


def ensure_topics(admin: KafkaAdminClient, queue: QueueSettings, topics: Topics) -> None:
    """Make the topics that are missing; those that exist keep their partitions and settings."""
    wanted = {*topics.classes, topics.dead}
    missing = wanted - set(admin.list_topics())
    shape = {
        "num_partitions": queue.partitions,
        "replication_factor": queue.replication,
        "configs": {"min.insync.replicas": str(queue.min_insync_replicas)},
    }
    for name in sorted(missing):
        with suppress(TopicAlreadyExistsError):
            admin.create_topics({name: shape})
    if missing:
        admin.wait_for_topics(sorted(missing), timeout_ms=BOOTSTRAP_TIMEOUT_MS)
    _warn_of_few_copies(admin, queue, sorted(wanted))


def _warn_of_few_copies(admin: KafkaAdminClient, queue: QueueSettings, names: list[str]) -> None:
    """Topics that were there before may have fewer copies than asked for; and whoever has several brokers expects to
    survive the loss of one."""
    brokers = len(admin.describe_cluster()["brokers"])
    for topic in admin.describe_topics(names):
        copies = min((len(partition["replica_nodes"]) for partition in topic["partitions"]), default=0)
        if copies < max(queue.replication, min(2, brokers)):
            log.warning("topic_has_few_copies", topic=topic["name"], copies=copies, wanted=queue.replication)


def header(record: Any, name: str) -> bytes:
    """A header's value; empty when the record has none of that name."""
    return next((value for key, value in record.headers if key == name), b"")


def tokens_of(record: Any) -> int:
    """Prompt tokens of a record, 0 for one that is not ours."""
    value = header(record, TOKENS_HEADER)
    return int(value) if value.isdigit() else 0
