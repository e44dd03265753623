"""Who may work on an adapter, decided without I/O: a lease that runs out, with a token that only grows.

A claim is a lease (Gray and Cheriton, 1989) on an adapter's next increment. Its token is a sequencer, as in Chubby
(Burrows, 2006): each new holder has a higher one, and an outcome under any token but the last is refused. So a holder
that was thought dead and goes on can do no harm, whatever any clock says; the ledger's clock, the only one that is
read, decides merely how soon another may try.
"""

from dataclasses import dataclass, replace

from riverdelta.core.errors import Conflict


@dataclass(frozen=True)
class Claim:
    """An adapter's last claim. `holder` is empty once given up; `expires` is in seconds on the ledger's clock."""

    adapter: str
    holder: str
    token: int
    expires: float


def decide_claim(held: Claim | None, adapter: str, holder: str, now: float, seconds: float) -> Claim | None:
    """A claim of `seconds` for `holder`; None while another's lasts. One's own is taken anew, with a new token."""
    if held is not None and held.holder not in ("", holder) and now < held.expires:
        return None
    return Claim(adapter, holder, held.token + 1 if held else 1, now + seconds)


def decide_renewal(held: Claim | None, holder: str, token: int, now: float, seconds: float) -> Claim | None:
    """The claim with a new term, even one that ran out if nobody has taken it since; None when it is lost."""
    if held is None or (held.holder, held.token) != (holder, token):
        return None
    return replace(held, expires=max(held.expires, now + seconds))


def decide_end(held: Claim | None, holder: str, token: int) -> Claim | None:
    """The claim given up: anybody may take it at once. None when it is not the holder's any more."""
    if held is None or (held.holder, held.token) != (holder, token):
        return None
    return replace(held, holder="")


def check_token(held: Claim | None, adapter: str, token: int, holder: str) -> None:
    """Refuse an outcome under any but the last token, or under another's: a ledger that was restored gives tokens out
    again. An adapter that was never claimed has token 0."""
    last = held.token if held else 0
    if token != last or (held is not None and held.holder not in ("", holder)):
        raise Conflict(
            f"{adapter} was claimed by {held.holder or 'another trainer' if held else 'nobody'} since "
            f"(token {last}, not {token}).",
            "Drop the work: whoever holds the claim does it.",
        )
