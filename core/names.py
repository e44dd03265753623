"""Names of adapters and versions, as users write them: `acme-support`, `acme-support@7`, `base`."""

import re
import unicodedata
from dataclasses import dataclass

from .errors import BadInput

BASE = "base"
ADAPTER = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


def check_adapter(name: str) -> str:
    """The name itself, if it may name an adapter.

    >>> check_adapter("acme-support")
    'acme-support'
    >>> check_adapter("Acme")
    Traceback (most recent call last):
    riverdelta.core.errors.BadInput: 'Acme' cannot name an adapter. Use 1 to 63 of a-z, 0-9 and '-', not '-' first.
    """
    if not isinstance(name, str) or not ADAPTER.fullmatch(name):
        raise BadInput(f"{str(name)[:80]!r} cannot name an adapter.", "Use 1 to 63 of a-z, 0-9 and '-', not '-' first.")
    if name == BASE:
        raise BadInput("'base' names the base model.", "Choose another name for the adapter.")
    return name


def subject_name(given: str) -> str:
    """A subject's name as it is compared: in Unicode's form NFC, so that a letter and its accent are one letter."""
    return given if given.isascii() else unicodedata.normalize("NFC", given)


@dataclass(frozen=True)
class ModelRef:
    """What a request asks for: the base (`adapter` None), an adapter's release (`version` None), or one version."""

    adapter: str | None
    version: int | None = None

    @classmethod
    def parse(cls, text: str) -> "ModelRef":
        """Read `base`, `acme` or `acme@7`.

        >>> ModelRef.parse("acme@7")
        ModelRef(adapter='acme', version=7)
        >>> str(ModelRef.parse("base"))
        'base'
        """
        if text == BASE:
            return cls(None)
        name, at, number = text.partition("@")
        check_adapter(name)
        if not at:
            return cls(name)
        if not re.fullmatch(r"[1-9][0-9]{0,8}", number):
            raise BadInput(f"{number[:20]!r} is not a version number.", f"Write {name}@7, for instance.")
        return cls(name, int(number))

    def __str__(self) -> str:
        if self.adapter is None:
            return BASE
        return self.adapter if self.version is None else f"{self.adapter}@{self.version}"
