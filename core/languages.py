"""Languages: which one a text is in, by py3langid's naive Bayes model, which comes with it and asks nobody."""

from functools import cache
from typing import Any

_SURE = 0.5
_READ = 2000  # characters at most: what one text costs is bounded


def known() -> frozenset[str]:
    """The codes of the languages that are told apart, such as `en`."""
    return frozenset(_identifier().labels)


def language_of(text: str) -> str:
    """The code of its language; empty where that is not sure, as with a name, a number or a single word.

    >>> language_of("Die Heizung im Lager ist seit gestern aus.")
    'de'
    >>> language_of("Bo.")
    ''
    """
    code, probability = _identifier().classify(text[:_READ])
    return code if probability >= _SURE else ""


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
