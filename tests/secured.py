"""An Apache Kafka whose clients must prove who they are: SASL over TLS, and TLS with certificates of both sides."""

import os
import subprocess
from pathlib import Path

import pytest

from riverdelta.core.settings import Kafka

from .brokers import ScriptBroker, free_port

PASSWORD = 'r;v"er, delta'  # what a settings file, a shell and a list of properties each treat in their own way
USER, STRANGER = "river", "stranger"

_PROPERTIES = """
listeners=PLAINTEXT://127.0.0.1:@PORT@,CONTROLLER://127.0.0.1:@CONTROLLER_PORT@,\
SECURED://127.0.0.1:{secured},MUTUAL://127.0.0.1:{mutual}
advertised.listeners=PLAINTEXT://127.0.0.1:@PORT@,SECURED://127.0.0.1:{secured},MUTUAL://127.0.0.1:{mutual}
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SECURED:SASL_SSL,MUTUAL:SSL
sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512
listener.name.secured.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required \
user_{user}="{password}" user_{stranger}="{password}";
listener.name.secured.scram-sha-256.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.secured.scram-sha-512.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.mutual.ssl.client.auth=required
ssl.principal.mapping.rules=RULE:^CN=(.*)$/$1/
ssl.keystore.type=PEM
ssl.keystore.location={folder}/broker.both.pem
ssl.truststore.type=PEM
ssl.truststore.location={folder}/authority.pem
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS;User:{user}
auto.create.topics.enable=false
"""


class SecuredBroker:
    """It, and the settings by which `USER` may do everything and `STRANGER` nothing."""

    def __init__(self, script: str, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._make_certificates()
        secured, mutual = free_port(), free_port()
        properties = folder / "secured.properties"
        properties.write_text(
            _PROPERTIES.format(
                secured=secured,
                mutual=mutual,
                folder=folder,
                user=USER,
                stranger=STRANGER,
                password=PASSWORD.replace('"', '\\\\"'),
            )
        )
        self._broker = ScriptBroker(script, folder / "kafka", "--properties", str(properties))
        self._addresses = {"SASL_SSL": f"127.0.0.1:{secured}", "SSL": f"127.0.0.1:{mutual}"}
        try:
            self._add_scram_users()
        except BaseException:
            self.stop()
            raise

    def kafka(self, mechanism: str, user: str = USER, password: str = PASSWORD) -> Kafka:
        """The settings of a client; `mechanism` is SASL's, or empty for a certificate."""
        if mechanism:
            return Kafka(
                bootstrap=self._addresses["SASL_SSL"],
                security="SASL_SSL",
                sasl_mechanism=mechanism,  # type: ignore[arg-type]
                username=user,
                password=password,
                ca_file=str(self.folder / "authority.pem"),
            )
        return Kafka(
            bootstrap=self._addresses["SSL"],
            security="SSL",
            ca_file=str(self.folder / "authority.pem"),
            cert_file=str(self.folder / f"{user}.pem"),
            key_file=str(self.folder / f"{user}.key"),
            key_password=PASSWORD,
        )

    def stop(self) -> None:
        """End it."""
        self._broker.stop()

    def _add_scram_users(self) -> None:
        from confluent_kafka.admin import (
            AdminClient,
            ScramCredentialInfo,
            ScramMechanism,
            UserScramCredentialUpsertion,
        )

        admin = AdminClient({"bootstrap.servers": self._broker.bootstrap})
        for mechanism in (ScramMechanism.SCRAM_SHA_256, ScramMechanism.SCRAM_SHA_512):
            wanted = [
                UserScramCredentialUpsertion(user, ScramCredentialInfo(mechanism, 4096), PASSWORD.encode())
                for user in (USER, STRANGER)
            ]
            for done in admin.alter_user_scram_credentials(wanted).values():
                done.result(timeout=30)

    def _make_certificates(self) -> None:
        self._openssl("authority", "authority", "-nodes")
        signed = ("-CA", "authority.pem", "-CAkey", "authority.key")
        self._openssl("broker", "localhost", "-nodes", *signed, "-addext", "subjectAltName=IP:127.0.0.1")
        both = (self.folder / "broker.key").read_text() + (self.folder / "broker.pem").read_text()
        (self.folder / "broker.both.pem").write_text(both)
        for user in (USER, STRANGER):
            self._openssl(user, user, "-passout", f"pass:{PASSWORD}", *signed)

    def _openssl(self, name: str, subject: str, *options: str) -> None:
        made = ["-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={subject}", "-days", "2"]
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
        subprocess.run(
            ["openssl", "req", "-x509", *curve, *made, *options], cwd=self.folder, check=True, capture_output=True
        )


def start(folder: Path) -> SecuredBroker:
    """It, where RIVERDELTA_TEST_KAFKA names a script that starts Apache Kafka; else the test is skipped."""
    script = os.environ.get("RIVERDELTA_TEST_KAFKA")
    if not script:
        pytest.skip("needs Apache Kafka with settings of its own: set RIVERDELTA_TEST_KAFKA")
    return SecuredBroker(script, folder)
