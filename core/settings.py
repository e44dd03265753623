"""Every setting, in one place: `riverdelta.toml` and environment variables (`RIVERDELTA_…`, nested by `__`).

>>> Settings(data="/tmp/d").ledger_url
'sqlite:////tmp/d/ledger.db'
"""

import json
import os
import secrets
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from .errors import BadInput

FILE = "riverdelta.toml"
UP_FILE = "up.json"  # in the data folder, written by `riverdelta up`


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Kafka(_Part):
    """The one description of the cluster, mapped to both clients."""

    bootstrap: str = Field(
        "",
        description="host:port, comma separated; empty means what KAFKA_BOOTSTRAP_SERVERS names, "
        "else the broker that `riverdelta up` runs for the data folder",
    )
    security: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="how clients connect: encrypted or not, with a password or not"
    )
    sasl_mechanism: Literal["", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        "", description="how the password is presented; needed for SASL"
    )
    username: str = Field("", description="SASL user name")
    password: str = Field("", repr=False, description="SASL password")
    ca_file: str = Field("", description="PEM file of the authorities that brokers' certificates are signed by")
    cert_file: str = Field("", description="PEM file of this client's certificate")
    key_file: str = Field("", description="PEM file of this client's key")
    key_password: str = Field("", repr=False, description="password of the key file")
    check_hostname: bool = Field(True, description="whether a broker's certificate must name its host")

    def for_kafka_python(self) -> dict[str, Any]:
        """Keyword arguments of kafka-python's clients."""
        given: dict[str, Any] = {
            "bootstrap_servers": self.bootstrap.split(","),
            "security_protocol": self.security,
            "sasl_mechanism": self.sasl_mechanism,
            "sasl_plain_username": self.username,
            "sasl_plain_password": self.password,
            "ssl_cafile": self.ca_file,
            "ssl_certfile": self.cert_file,
            "ssl_keyfile": self.key_file,
            "ssl_password": self.key_password,
        }
        if "SSL" in self.security:
            given["ssl_check_hostname"] = self.check_hostname
        return {name: value for name, value in given.items() if value not in ("", None)}

    def for_confluent(self) -> dict[str, Any]:
        """Properties of librdkafka, as confluent-kafka takes them."""
        given = {
            "bootstrap.servers": self.bootstrap,
            "security.protocol": self.security,
            "sasl.mechanism": self.sasl_mechanism,
            "sasl.username": self.username,
            "sasl.password": self.password,
            "ssl.ca.location": self.ca_file,
            "ssl.certificate.location": self.cert_file,
            "ssl.key.location": self.key_file,
            "ssl.key.password": self.key_password,
        }
        if "SSL" in self.security and not self.check_hostname:
            given["ssl.endpoint.identification.algorithm"] = "none"
        return {name: value for name, value in given.items() if value}


class Topics(_Part):
    """Names and shape of the topics, created or verified at start."""

    events: str = Field(
        "riverdelta.events", description="what to learn; its dead letters go to the same name with .DLT"
    )
    control: str = Field("riverdelta.control", description="requests to forget and to allow")
    jobs: str = Field("riverdelta.jobs", description="wake-ups for trainers")
    releases: str = Field("riverdelta.releases", description="wake-ups for servers")
    partitions: int = Field(4, ge=1, description="of the events topic, when it is created")
    replication: int = Field(1, ge=1, description="copies of each topic, when it is created")
    retention_hours: float = Field(
        168.0, gt=0, description="how long events, dead letters and requests are kept, when their topics are created"
    )

    @property
    def dead_letters(self) -> str:
        """Where what is not an event goes, with the reason in its headers."""
        return f"{self.events}.DLT"


class Streams(_Part):
    """The dataflow."""

    unknown_adapters: Literal["create", "refuse"] = Field(
        "refuse", description="what an event for an adapter that does not exist does (under `riverdelta up`: create)"
    )
    max_adapters: int = Field(10_000, ge=1, description="cap on adapters created by events")
    dedupe_window: int = Field(
        10_000, ge=0, description="admitted events per adapter in which a producer's duplicate is recognised"
    )
    recipe: str = Field(
        "", description="recipe file of the adapters that events create; empty means the default recipe"
    )
    join_limit: int = Field(
        10_000, ge=1, description="interactions, and feedback, of an adapter that wait for each other at most"
    )
    join_seconds: float = Field(3600.0, gt=0, description="how long they wait; a restart reads Kafka again that far")
    buckets: int = Field(64, ge=1, description="owners that adapters are spread over; fixed for a ledger's life")
    workers: int = Field(1, ge=1, description="processes of the dataflow on this machine")
    cluster: str = Field(
        "", description="where several machines run the dataflow: host:port of each of its processes, comma separated"
    )
    process: int = Field(0, ge=0, description="which of `streams.cluster` this process is, from 0")
    metrics_port: int = Field(0, ge=0, description="port for Prometheus, one more per further worker; 0 is off")
    metrics_adapters: int = Field(
        100, ge=0, description="adapters with series of their own: the first that each process seals for; 0 is none"
    )


class Trainer(_Part):
    """The trainer."""

    device: str = Field("cpu", description="torch device, such as `cuda` or `cuda:1`")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the base model's products")
    threads: int = Field(0, ge=0, description="CPU threads; 0 means all cores. Part of the environment fingerprint")
    poll_seconds: float = Field(0.5, gt=0, description="how often the ledger is read when no wake-up comes")
    metrics_port: int = Field(0, ge=0, description="port for Prometheus; 0 is off")


class Serving(_Part):
    """The server."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 is any free one")
    device: str = Field("cpu", description="torch device, such as `cuda` or `cuda:1`")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="of the base model's products; `auto` is bfloat16 on a GPU, and on a CPU whatever is "
        "measured to be fastest with the same answers",
    )
    max_batch: int = Field(32, ge=1, description="requests computed side by side")
    max_model_len: int = Field(4096, ge=16, description="tokens of a prompt and its answer together")
    kv_tokens: int = Field(16384, ge=256, description="tokens that the KV cache holds over all sequences")
    prefill_chunk: int = Field(128, ge=1, description="tokens of prompts taken into one step; a GPU is worth more")
    adapter_slots: int = Field(32, ge=1, description="adapters ready to compute; memory taken at start")
    max_rank: int = Field(32, ge=1, le=256, description="largest rank served; a slot takes memory for it")
    max_queue: int = Field(1024, ge=1, description="requests that may wait; more are refused (429)")
    threads: int = Field(0, ge=0, description="CPU threads; 0 means all cores")
    batch_invariant: bool = Field(
        False, description="give each answer the bits that it would have alone, whatever else is in the batch; slower"
    )
    api_keys: str = Field("", description="TOML file of keys; needed to bind anything but loopback")
    interactions: list[str] = Field(
        [], description="adapters whose answers are published as interaction events; `*` means all"
    )
    lease_seconds: float = Field(
        10.0, gt=0, description="how long a server may go without the ledger, and a forget waits for one that is gone"
    )
    poll_seconds: float = Field(0.1, gt=0, description="how often the ledger is read when no wake-up comes")


class Registry(_Part):
    """The ledger and its projection."""

    ledger: str = Field("", description="SQLAlchemy URL; empty means SQLite in the data folder")
    mlflow: str = Field("", description="MLflow tracking URI; empty means SQLite in the data folder")
    store: str = Field("", description="object store URL; empty means a folder in the data folder")
    keys: str = Field("", description="SQLAlchemy URL of the key store; empty means SQLite in the folder of secrets")
    kms: str = Field(
        "",
        description="command that guards the key store's root key: called with `wrap` or `unwrap`, base64 in and out; "
        "empty means a file in the folder of secrets",
    )
    poll_seconds: float = Field(0.5, gt=0, description="how often the keeper reads the ledger when no wake-up comes")


class Settings(BaseSettings):
    """Riverdelta's settings. RIVERDELTA_CONFIG may name another file than ./riverdelta.toml."""

    model_config = SettingsConfigDict(
        env_prefix="RIVERDELTA_",
        env_nested_delimiter="__",
        extra="forbid",
        nested_model_default_partial_update=True,
    )

    data: Path = Field(Path("riverdelta-data"), description="folder of everything that lasts, but the secrets")
    keys: Path | None = Field(
        None, description="folder of secrets, outside the data folder; default: beside it, `<data>-keys`"
    )
    base: str = Field("", description="Hugging Face id or folder of the base model; `gemma` is the demo's")
    metrics_host: str = Field(
        "127.0.0.1", description="address on which dataflow and trainers answer Prometheus, if a port is set"
    )
    kafka: Kafka = Kafka()
    topics: Topics = Topics()
    streams: Streams = Streams()
    trainer: Trainer = Trainer()
    serving: Serving = Serving()
    registry: Registry = Registry()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments win over the environment, which wins over the file."""
        path = Path(os.environ.get("RIVERDELTA_CONFIG", FILE))
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, path)

    @classmethod
    def read(cls, **given: Any) -> "Settings":
        """The settings, or `BadInput` naming each that does not fit."""
        config = os.environ.get("RIVERDELTA_CONFIG")
        if config is not None and not Path(config).is_file():
            raise BadInput(f"There is no settings file {config}.", "docs/settings.md shows one.")
        try:
            settings = cls(**given)
            if not settings.kafka.bootstrap:
                known = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "") or settings._told_bootstrap()
                settings.kafka = settings.kafka.model_copy(update={"bootstrap": known})
            return settings
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False)
            )
            raise BadInput(f"The settings do not fit: {problems}.", "docs/settings.md lists every setting.") from error
        except ValueError as error:  # not TOML
            raise BadInput(f"The settings file cannot be read: {error}.", "docs/settings.md shows one.") from error

    def running(self) -> dict[str, str]:
        """What the last `riverdelta up` on the data folder told its clients: `bootstrap`, `embedded`, `serving`,
        `base`, and its own `process`."""
        try:
            held = json.loads((self.data / UP_FILE).read_text())
        except (OSError, ValueError):
            return {}
        return {str(key): str(value) for key, value in held.items()} if isinstance(held, dict) else {}

    def _told_bootstrap(self) -> str:
        """The cluster of the data folder's last `up`; its own broker only while it lives: somebody else may listen
        there by now."""
        told = self.running()
        if told.get("embedded") == "true" and not _lives(told.get("process", "")):
            return ""
        return told.get("bootstrap", "")

    @property
    def ledger_url(self) -> str:
        """SQLAlchemy URL of the ledger."""
        return self.registry.ledger or f"sqlite:///{self.data.absolute()}/ledger.db"

    @property
    def mlflow_uri(self) -> str:
        """MLflow's tracking URI."""
        return self.registry.mlflow or f"sqlite:///{self.data.absolute()}/mlflow.db"

    @property
    def store_url(self) -> str:
        """URL of the object store."""
        return self.registry.store or f"file://{self.data.absolute()}/store"

    @property
    def keys_url(self) -> str:
        """SQLAlchemy URL of the key store."""
        return self.registry.keys or f"sqlite:///{self.keys_dir}/keys.db"

    @property
    def serving_url(self) -> str:
        """Where the server listens."""
        host = self.serving.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.serving.port}"

    @property
    def keys_dir(self) -> Path:
        """Folder of secrets, never inside the data folder."""
        folder = (self.keys or self.data.with_name(f"{self.data.name}-keys")).absolute()
        if folder.is_relative_to(self.data.absolute()):
            raise BadInput(
                f"The key folder {folder} lies inside the data folder.", "Set `keys` to a folder outside it."
            )
        return folder


def new_holder(kind: str) -> str:
    """A name for one run of a process, never used again: it holds leases under it."""
    return f"{kind}-{os.getpid()}-{secrets.token_hex(4)}"


def _lives(process: str) -> bool:
    """Whether a process of this machine is still there."""
    try:
        os.kill(int(process), 0)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True
