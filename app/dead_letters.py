"""`riverdelta dlt`: what was refused and why, and publishing it again."""

import json

import typer

from riverdelta.core.settings import Settings

_SHOWN = 80


def list_letters(settings: Settings, as_json: bool) -> None:
    """One line a dead letter: where it came from, the reason, how its value begins."""
    from riverdelta.streams.dead_letters import list_dead_letters

    letters = list_dead_letters(settings)
    for letter in letters:
        value = (letter.value or b"").decode(errors="replace")
        if as_json:
            held = {
                "partition": letter.origin_partition,
                "offset": letter.origin_offset,
                "incarnation": letter.incarnation,
                "at": letter.at,
                "reason": letter.reason,
                "message": letter.message,
                "whole": letter.whole,
                "value": value,
            }
            typer.echo(json.dumps(held, ensure_ascii=False))
        else:
            start = value[:_SHOWN] + ("…" if len(value) > _SHOWN else "")
            typer.echo(
                f"{letter.origin_partition}:{letter.origin_offset}  {letter.at}  {letter.reason}: {letter.message}"
            )
            typer.echo(f"    {json.dumps(start, ensure_ascii=False)}")
    if not letters and not as_json:
        typer.echo(f"No dead letters on {settings.topics.dead_letters}.")


def replay(settings: Settings, reason: str) -> None:
    """Publish dead letters again, those with a reason or all of them."""
    from riverdelta.streams.dead_letters import replay_dead_letters

    sent, cut = replay_dead_letters(settings, lambda letter: reason in ("", letter.reason))
    typer.echo(f"{sent} dead letters were published again on {settings.topics.events}.")
    if cut:
        typer.echo(f"{cut} were not: the topic holds only their beginning. Publish them from their source.", err=True)
