"""How long brokers wait for a dead consumer: as short as all of them allow."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import pytest
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, ConfigResource

from penstock.queue.kafka_client import DEFAULT_SESSION_S, SESSION_S, SHORTEST_SESSION, session_s

pytestmark = pytest.mark.unit


class Brokers:
    """What an administration client hears of brokers with these shortest sessions; None: it may not ask; 0: they have
    no such setting."""

    def __init__(self, shortest_ms: list[int | None]) -> None:
        self._shortest_ms = dict(enumerate(shortest_ms, start=1))

    def list_topics(self, timeout: float) -> Any:
        return SimpleNamespace(brokers=self._shortest_ms)

    def describe_configs(self, resources: list[ConfigResource], request_timeout: float) -> dict[str, Future[Any]]:
        return {resource.name: self._answer(self._shortest_ms[int(resource.name)]) for resource in resources}

    @staticmethod
    def _answer(shortest_ms: int | None) -> Future[Any]:
        answer: Future[Any] = Future()
        if shortest_ms is None:
            answer.set_exception(KafkaException(KafkaError(KafkaError.CLUSTER_AUTHORIZATION_FAILED)))
        else:
            answer.set_result({SHORTEST_SESSION: SimpleNamespace(value=str(shortest_ms))} if shortest_ms else {})
        return answer


@pytest.mark.parametrize(
    ("shortest_ms", "expected_s"),
    [
        ([1000], SESSION_S),
        ([1000, 6000, 1000], 6.0),
        ([30_000], 30.0),
        ([None], DEFAULT_SESSION_S),
        ([1000, None], DEFAULT_SESSION_S),
        ([0], DEFAULT_SESSION_S),
    ],
)
def test_session(shortest_ms: list[int | None], expected_s: float) -> None:
    assert session_s(cast("AdminClient", Brokers(shortest_ms))) == expected_s
