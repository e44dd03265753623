"""Access: whether a secured cluster lets this client in, and if not, why.

kafka-python tries again until its time is up whatever the reason; librdkafka says it.
"""

import socket
import threading
import time
from typing import Any

from riverdelta.core.errors import Refused, Unavailable
from riverdelta.core.settings import Kafka

_SECONDS = 10.0
_LISTEN_SECONDS = 5.0
_AGAIN_SECONDS = 0.5
_WHO = "Correct kafka.username, kafka.password and kafka.sasl_mechanism, or the certificate in kafka.cert_file."
_FILES = (
    "kafka.ca_file must hold the authority of the brokers' certificate, and kafka.cert_file, kafka.key_file and "
    "kafka.key_password belong together."
)


def check_access(kafka: Kafka) -> None:
    """`Refused` when the cluster does not accept this client's password or certificate, or its own is not trusted.

    A broker that does not answer is not this function's business.
    """
    if kafka.security == "PLAINTEXT":
        return
    from confluent_kafka import KafkaError, KafkaException
    from confluent_kafka.admin import AdminClient

    told: list[Any] = []
    heard = threading.Event()

    def tell(error: Any) -> None:
        if error.code() in (KafkaError._AUTHENTICATION, KafkaError._SSL):
            told.append(error)
            heard.set()

    try:
        client = AdminClient({**kafka.for_confluent(), "error_cb": tell, "log_level": 0, "socket.timeout.ms": 5000})
    except KafkaException as error:
        raise Refused(f"The [kafka] settings cannot be used: {error.args[0].str()}.", _FILES) from error
    asked = client.describe_cluster(request_timeout=_SECONDS)
    while not asked.done() and not heard.is_set():
        client.poll(0.05)
    if told:
        why = told[0]
        if why.code() == KafkaError._AUTHENTICATION:
            raise Refused(f"{kafka.bootstrap} does not let this client in: {why.str()}.", _WHO)
        raise Refused(f"TLS with {kafka.bootstrap} fails: {why.str()}.", _FILES)


def check_listens(kafka: Kafka) -> None:
    """`Unavailable` when nothing accepts connections at any of the cluster's addresses, for a few seconds."""
    ends = time.monotonic() + _LISTEN_SECONDS
    addresses = [address.strip() for address in kafka.bootstrap.split(",")]
    while not any(_listens(address, max(0.1, ends - time.monotonic())) for address in addresses):
        if time.monotonic() + _AGAIN_SECONDS > ends:
            raise Unavailable(
                f"Nothing listens at {kafka.bootstrap}.", "Start it with riverdelta up, or correct --kafka."
            )
        time.sleep(_AGAIN_SECONDS)


def _listens(address: str, seconds: float) -> bool:
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        return True  # a form that only the Kafka client understands
    try:
        with socket.create_connection((host.strip("[]"), int(port)), seconds):
            return True
    except (OSError, OverflowError):
        return False
