"""What every Kafka client of a pool shares: topics, group, timeouts, and errors turned into ours.

The library is librdkafka's own Python binding: its threads are not Python's, so that neither heartbeats nor publishing
wait for the interpreter (``docs/decisions/kafka-client.md``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, cast

import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic

from penstock.queue.errors import QueueUnavailable
from penstock.queue.records import PriorityClass
from penstock.queue.settings import QueueSettings

BOOTSTRAP_TIMEOUT_S = 3.0
"""A reachable broker answers the first call within milliseconds; a caller wants its 503 within seconds."""
REQUEST_TIMEOUT_S = 2.0
"""A replicated write takes tens of milliseconds; a broker silent for two seconds is stuck or gone."""
RECONNECT_BACKOFF_MAX_MS = 500
"""Find a restarted broker again at once. The library's 10 s is kind to a cluster of thousands of clients."""
METADATA_PAUSE_S = 0.05
"""Between looks at whether new topics have leaders, which takes the brokers tens of milliseconds."""
SETTLE_S = 4.0
"""Making the topic for offsets takes the brokers a second, and an election after a broker's death a few."""
UNSETTLED = frozenset(
    {
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.FENCED_LEADER_EPOCH,
        KafkaError.UNKNOWN_LEADER_EPOCH,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.NOT_COORDINATOR,
    }
)
"""Errors that pass by themselves once every broker knows who leads what. The library's ``retriable`` is about
transactions only."""
SESSION_S = 1.6
"""What a dispatcher's lease is on the Redis queue, too: its successors have what it pulled after about two seconds. Its
heartbeats come from the library's own thread, so that a busy interpreter does not miss them."""
DEFAULT_SESSION_S = 6.0
"""The shortest that brokers allow unless ``group.min.session.timeout.ms`` says otherwise."""
NOTE_EVERY_S = 5.0
"""One line per error and process in this time."""
TOKENS_HEADER = "t"
"""Prompt tokens in decimal, so that the backlog is counted without decoding records."""
REASON_HEADER = "reason"
SHORTEST_SESSION = "group.min.session.timeout.ms"

K = TypeVar("K")
T = TypeVar("T")
C = TypeVar("C", bound=Any)

log = structlog.get_logger()


class Partition(NamedTuple):
    """One partition of a topic."""

    topic: str
    number: int


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
    """Raise :class:`QueueUnavailable` for whatever the broker or the way to it did wrong.

    A full buffer means the same: nothing has left it for as long as it took to fill.
    """
    try:
        yield
    except TimeoutError as error:
        raise QueueUnavailable("Kafka did not answer in time") from error
    except (KafkaException, BufferError) as error:
        raise QueueUnavailable(f"Kafka did not accept: {error}") from error


def open_client(kind: Callable[[dict[str, Any]], C], queue: QueueSettings, config: dict[str, Any] | None = None) -> C:
    """A producer, consumer or administration client, connected. Blocks.

    ``config``: librdkafka's properties besides the common ones.

    Raises:
        QueueUnavailable: no broker within :data:`BOOTSTRAP_TIMEOUT_S`.
    """
    common = {
        "bootstrap.servers": queue.bootstrap,
        "client.id": "penstock",
        "socket.timeout.ms": int(REQUEST_TIMEOUT_S * 1000),
        "socket.connection.setup.timeout.ms": int(BOOTSTRAP_TIMEOUT_S * 1000),
        "socket.nagle.disable": True,
        "reconnect.backoff.max.ms": RECONNECT_BACKOFF_MAX_MS,
        "error_cb": _noted,
        "log_level": 2,  # what it would say of connections below that comes to error_cb, too
    }
    with broker_errors():
        client = kind(common | (config or {}))
        client.list_topics(timeout=BOOTSTRAP_TIMEOUT_S)
    return client


class _Notes:
    """Logs what clients say of their connections: in an outage each tries again several times a second."""

    def __init__(self) -> None:
        self._noted_at: dict[int, float] = {}

    def __call__(self, error: KafkaError) -> None:
        code, now = error.code(), time.monotonic()
        if code == KafkaError._TRANSPORT:  # followed by _ALL_BROKERS_DOWN if it matters
            return
        if now - self._noted_at.get(code, -NOTE_EVERY_S) >= NOTE_EVERY_S:
            self._noted_at[code] = now
            log.warning("kafka_trouble", code=error.name(), error=error.str())


_noted = _Notes()


def take(consumer: Consumer, most: int, wait_s: float) -> list[Message]:
    """What is there, at most ``most``; waits for the first only. ``consume`` by itself waits until it has ``most``.

    Raises :class:`KafkaException` for an error after which the consumer does nothing more; notes any other.
    """
    first = consumer.poll(wait_s)
    if first is None:
        return []
    messages = [first, *consumer.consume(most - 1, 0)]
    for message in messages:
        error = message.error()
        if error is not None:
            if error.fatal():
                raise KafkaException(error)
            _noted(error)
    return [message for message in messages if message.error() is None]


def place(message: Message) -> tuple[Partition, int]:
    """Where a message that was read lies: partition and offset."""
    topic, number, offset = message.topic(), message.partition(), message.offset()
    assert topic is not None
    assert number is not None
    assert offset is not None
    return Partition(topic, number), offset


def sound(offsets: list[TopicPartition]) -> list[TopicPartition]:
    """These, if each was read or committed. Raises :class:`KafkaException`."""
    for offset in offsets:
        if offset.error is not None:
            raise KafkaException(offset.error)
    return offsets


def settled(client: Consumer | AdminClient, call: Callable[[], T]) -> T:
    """What ``call`` returns, once the brokers have settled who answers it: after an election, and when a topic (the
    brokers' own for offsets, too) is new. After :data:`SETTLE_S`, and for other errors, raises :class:`KafkaException`.
    """
    deadline = time.monotonic() + SETTLE_S
    while True:
        try:
            return call()
        except KafkaException as error:
            if error.args[0].code() not in UNSETTLED or time.monotonic() > deadline:
                raise
            time.sleep(METADATA_PAUSE_S)
            client.list_topics(timeout=REQUEST_TIMEOUT_S)  # these calls do not learn by themselves who leads now


def answers(admin: AdminClient, call: Callable[[], dict[K, Future[T]]]) -> dict[K, T]:
    """The results of an administrative call, by what it was asked for."""
    return settled(admin, lambda: {key: future.result(SETTLE_S) for key, future in call().items()})


def ensure_topics(admin: AdminClient, queue: QueueSettings, topics: Topics) -> None:
    """Make the topics that are missing; those that exist keep their partitions and settings."""
    wanted = {*topics.classes, topics.dead}
    missing = wanted - set(admin.list_topics(timeout=REQUEST_TIMEOUT_S).topics)
    config = {"min.insync.replicas": str(queue.min_insync_replicas)}
    new = [NewTopic(name, queue.partitions, queue.replication, config=config) for name in sorted(missing)]
    for future in (admin.create_topics(new, request_timeout=SETTLE_S) if new else {}).values():
        try:
            future.result()
        except KafkaException as error:  # another process was faster
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise
    _await_leaders(admin, missing)
    _warn_of_few_copies(admin, queue, wanted)


def session_s(admin: AdminClient) -> float:
    """The shortest session that all brokers allow, and no shorter than :data:`SESSION_S`.

    Where their settings cannot be read (it takes the right to describe the cluster's configuration, and brokers that
    are Kafka's own), their default.
    """
    brokers = admin.list_topics(timeout=REQUEST_TIMEOUT_S).brokers
    wanted = [ConfigResource(ConfigResource.Type.BROKER, str(broker)) for broker in brokers]
    try:
        asked = admin.describe_configs(wanted, request_timeout=REQUEST_TIMEOUT_S)
        return max(SESSION_S, *(int(future.result()[SHORTEST_SESSION].value) / 1000 for future in asked.values()))
    except (KafkaException, KeyError) as error:
        log.info("session_by_default", session_s=DEFAULT_SESSION_S, error=repr(error))
        return DEFAULT_SESSION_S


def _await_leaders(admin: AdminClient, names: set[str]) -> None:
    deadline = time.monotonic() + BOOTSTRAP_TIMEOUT_S
    while not names <= {name for name, found in _partitions(admin).items() if all(p.leader >= 0 for p in found)}:
        if time.monotonic() > deadline:
            raise KafkaException(KafkaError(KafkaError.LEADER_NOT_AVAILABLE))
        time.sleep(METADATA_PAUSE_S)


def _warn_of_few_copies(admin: AdminClient, queue: QueueSettings, names: set[str]) -> None:
    """Topics that were there before may have fewer copies than asked for; and whoever has several brokers expects to
    survive the loss of one."""
    brokers = len(admin.list_topics(timeout=REQUEST_TIMEOUT_S).brokers)
    for name, partitions in _partitions(admin).items():
        copies = min(len(partition.replicas) for partition in partitions)
        if name in names and copies < max(queue.replication, min(2, brokers)):
            log.warning("topic_has_few_copies", topic=name, copies=copies, wanted=queue.replication)


def _partitions(admin: AdminClient) -> dict[str, list[Any]]:
    """Metadata of the partitions of every topic that has any."""
    found = admin.list_topics(timeout=REQUEST_TIMEOUT_S).topics
    return {name: list(topic.partitions.values()) for name, topic in found.items() if topic.partitions}


def header(message: Message, name: str) -> bytes:
    """A header's value; empty when the message has none of that name."""
    return dict(cast("list[tuple[str, bytes]]", message.headers() or ())).get(name, b"")


def tokens_of(message: Message) -> int:
    """Prompt tokens of a record, 0 for one that is not ours."""
    value = header(message, TOKENS_HEADER)
    return int(value) if value.isdigit() else 0
