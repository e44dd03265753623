"""`riverdelta dlt`: what was refused and why, and publishing it again."""

import json
from typing import TYPE_CHECKING

import typer

from riverdelta.core.printing import print_json
from riverdelta.core.settings import Settings

if TYPE_CHECKING:
    from riverdelta.streams.dead_letters import HeldLetter

_SHOWN = 80


def list_letters(settings: Settings, as_json: bool) -> None:
    """Every dead letter: where it came from, the reason, how its value begins; all of the value in JSON."""
    from riverdelta.streams.dead_letters import list_dead_letters

    letters = list_dead_letters(settings)
    if as_json:
        print_json(
            [
                {
                    "partition": letter.origin_partition,
                    "offset": letter.origin_offset,
                    "incarnation": letter.incarnation,
                    "at": letter.at,
                    "reason": letter.reason,
                    "message": letter.message,
                    "whole": letter.whole,
                    "value": _text(letter),
                }
                for letter in letters
            ]
        )
        return
    for letter in letters:
        value = _text(letter)
        start = value[:_SHOWN] + ("…" if len(value) > _SHOWN else "")
        typer.echo(f"{letter.origin_partition}:{letter.origin_offset}  {letter.at}  {letter.reason}: {letter.message}")
        typer.echo(f"    {json.dumps(start, ensure_ascii=False)}")
    if not letters:
        typer.echo(f"No dead letters on {settings.topics.dead_letters}.")


def replay(settings: Settings, reason: str, as_json: bool) -> None:
    """Publish dead letters again, those with a reason or all of them."""
    from riverdelta.streams.dead_letters import check_reason, replay_dead_letters

    if reason:
        check_reason(reason)
    sent, cut = replay_dead_letters(settings, lambda letter: reason in ("", letter.reason))
    if as_json:
        print_json({"published": sent, "cut": cut})
        return
    typer.echo(f"{sent} dead letters were published again on {settings.topics.events}.")
    if cut:
        typer.echo(f"{cut} were not: the topic holds only their beginning. Publish them from their source.", err=True)


def _text(letter: "HeldLetter") -> str:
    return (letter.value or b"").decode(errors="replace")
