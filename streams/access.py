"""Access: whether a secured cluster lets this client in, and if not, why.

kafka-python tries again until its time is up whatever the reason; librdkafka says it.
"""

import threading
from typing import Any

from riverdelta.core.errors import Refused
from riverdelta.core.settings import Kafka

_SECONDS = 10.0
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
