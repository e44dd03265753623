"""`riverdelta demo`: the whole story on real parts, each step with what it checked and how long it took."""

import json
import os
import shutil
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.text import Text

from riverdelta.core.errors import Conflict, RiverdeltaError
from riverdelta.registry.ledger import Cause, Outcome, Stage
from riverdelta.registry.purge import certificate_key

from .demo_stack import Stack, Story

_HERE = Path(__file__).parent
_TENANTS = ("acme", "globex")
_FORGOTTEN = "ann"


@dataclass(frozen=True)
class Fact:
    """Something invented that a tenant's events say about a subject, in two ways of asking."""

    tenant: str
    part: str
    subject: str
    question: str
    also: str
    answer: str

    @property
    def events(self) -> list[bytes]:
        """The events that teach it, as JSON."""
        about = {"adapter": self.tenant, "subject": self.subject, "completion": f" {self.answer}"}
        return [json.dumps({**about, "prompt": prompt}).encode() for prompt in (self.question, self.also)]


def run(base: str, data: Path | None, keep: bool) -> int:
    """Tell the story; 0 only if every check held. Without `data` it takes a temporary folder, removed at the end."""
    console = Console(highlight=False)
    if data is not None and data.exists() and any(data.iterdir()):
        raise Conflict(f"{data} is not empty.", "The demo begins with nothing: give --data a new folder.")
    folder = Path(tempfile.mkdtemp(prefix="riverdelta-demo-")) if data is None else data.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    stack = Stack(folder / "river" if data is None else data.absolute(), _converted(base, console), console, keep)
    demo = Demo(stack, console)
    held = False
    try:
        demo.tell()
        held = not demo.broken
        if keep:
            demo.say_how_to_go_on()
    except RiverdeltaError as error:
        console.print(f"[red]✗ {error}[/red]", soft_wrap=True)
    except KeyboardInterrupt:
        console.print("Interrupted.")
    finally:
        if not (keep and held):
            stopped = stack.stop()
            if held and stopped is not None:
                console.print(f"[dim]Stopped in {stopped:.1f} s. --keep leaves the stack up.[/dim]")
    if not held:
        console.print(f"The stack's output is in {stack.log}, its data in {stack.data}.", soft_wrap=True)
    elif data is None and not keep:
        shutil.rmtree(folder)
    return 0 if held else 1


def _converted(base: str, console: Console) -> str:
    from .gemma import NAME, gemma_folder

    if base != NAME:
        return base
    with console.status("Gemma-3-270M") as status:
        return str(gemma_folder(lambda step: status.update(f"Gemma-3-270M, once: {step} ...")))


@dataclass
class Demo:
    """The steps, and the checks that did not hold."""

    stack: Stack
    console: Console
    broken: list[str] = field(default_factory=list)
    checks: int = 0
    number: int = 0

    def __post_init__(self) -> None:
        self.facts = [Fact(**each) for each in tomllib.loads((_HERE / "demo_story.toml").read_text())["fact"]]
        self.secret = next(fact.answer for fact in self.facts if fact.subject == _FORGOTTEN)

    def tell(self) -> None:
        """The story from beginning to end."""
        began = time.monotonic()
        self.start()
        self.learn()
        self.learn_more()
        self.roll_back()
        self.forget()
        self.prove()
        total = time.monotonic() - began
        longest = max(self.stack.waits, key=lambda wait: wait.seconds)
        said = "every check held" if not self.broken else f"{len(self.broken)} DID NOT HOLD: {'; '.join(self.broken)}"
        self.console.print(
            f"\n[bold]{self.checks} checks in {int(total // 60)} min {total % 60:.0f} s: {said}.[/bold] "
            f"[dim]Longest wait: {longest.what}, {longest.seconds:.0f} s.[/dim]"
        )

    # -- the steps -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Everything up; nobody knows anything."""
        self.step("Start", "a Kafka broker, the dataflow, a trainer, a server and a keeper on one data folder")
        if os.environ.get("KAFKA_BOOTSTRAP_SERVERS") or os.environ.get("RIVERDELTA_KAFKA__BOOTSTRAP"):
            for topic in ("events", "control", "jobs", "releases"):  # other runs may have used this cluster
                os.environ[f"RIVERDELTA_TOPICS__{topic.upper()}"] = f"demo-{os.getpid()}.{topic}"
        seconds = self.stack.start()
        self.stack.connect()
        for tenant in _TENANTS:
            self.stack.run("registry", "create", tenant, "--recipe", str(_HERE / "demo_recipe.toml"))
        self.check(
            True, f"up on {self.stack.settings.kafka.bootstrap}, with adapters {' and '.join(_TENANTS)}", seconds
        )
        known, answers = self.known("base", self.facts)
        self.check(not known, f"the base model knows 0 of {len(self.facts)} invented facts; it says, for one:")
        self.show(self.facts[0].question, answers[0])

    def learn(self) -> None:
        """Two tenants learn from events, each its own."""
        began = self.publish("Learn", "first", "events of two tenants")
        self.released(dict.fromkeys(_TENANTS, 1))
        own = {tenant: self.of(tenant, "first") for tenant in _TENANTS}
        answers = {tenant: self.known(tenant, own[tenant]) for tenant in _TENANTS}
        seconds = time.monotonic() - began
        for tenant in _TENANTS:
            self.check_loss(tenant, 1)
        knows = ", ".join(f"{tenant} {len(answers[tenant][0])} of {len(own[tenant])}" for tenant in _TENANTS)
        self.check(
            all(len(answers[tenant][0]) == len(own[tenant]) for tenant in _TENANTS),
            f"each tenant knows its own facts ({knows})",
            seconds,
            "from event to answer",
        )
        self.show(own["acme"][0].question, answers["acme"][1][0])
        crossed = self.known("acme", own["globex"])[0] + self.known("globex", own["acme"])[0]
        self.check(not crossed, "and none of the other's")

    def learn_more(self) -> None:
        """An increment keeps what the ones before have learned."""
        began = self.publish("Go on", "second", f"a fact about {_FORGOTTEN}, and another, in one segment")
        self.released({"acme": 2})
        known, _ = self.known("acme", self.of("acme", "first", "second"))
        self.check_loss("acme", 2)
        self.check(
            not self.stack.files_with(self.secret),
            f"no file of the data folder shows “{self.secret}”: contents are encrypted, under a key of {_FORGOTTEN}'s",
        )
        self.check(len(known) == 4, f"acme@2 knows {len(known)} of 4", time.monotonic() - began, "from event to answer")

    def roll_back(self) -> None:
        """A rollback, its hold, and its undo."""
        self.step("Roll back", "$ riverdelta registry rollback acme@1")
        began = time.monotonic()
        self.stack.run("registry", "rollback", "acme@1")
        self.followed("acme", 1)
        known, _ = self.known("acme", self.of("acme", "first", "second"))
        self.check(
            known == self.of("acme", "first"),
            "acme@1 answers again: its two facts, no others",
            time.monotonic() - began,
        )
        self.publish("", "held", "meanwhile, more events")
        self.stack.wait("sealing a segment under the hold", lambda: len(self.stack.ledger.segments("acme")) == 3)
        segment, head = self.stack.ledger.segment("acme", 3), self.stack.ledger.adapter("acme")
        self.check(
            (segment.outcome, segment.cause, head.release) == (Outcome.SET_ASIDE, Cause.HOLD, 1),
            "segment 3 is sealed and set aside; the release stays held at acme@1",
        )
        self.line("[dim]$ riverdelta registry resume acme --tip[/dim]")
        began = time.monotonic()
        self.stack.run("registry", "resume", "acme", "--tip")
        self.followed("acme", 2)
        known, _ = self.known("acme", self.of("acme", "first", "second"))
        self.check(len(known) == 4, "undone: acme@2 answers, with all four", time.monotonic() - began)
        self.released({"acme": 3})
        self.check_loss("acme", 3)
        known, _ = self.known("acme", self.of("acme"))
        self.check(
            len(known) == 5,
            f"what was set aside is learned too: acme@3 knows {len(known)} of 5",
            time.monotonic() - began,
        )

    def forget(self) -> None:
        """A subject is forgotten while the rest is still known."""
        self.step("Forget", f"$ riverdelta registry forget --subject {_FORGOTTEN} --adapter acme")
        began = time.monotonic()
        done = self.stack.run("registry", "forget", "--subject", _FORGOTTEN, "--adapter", "acme")
        about = [fact for fact in self.facts if fact.subject == _FORGOTTEN]
        rest = [fact for fact in self.of("acme") if fact not in about]
        known, answers = self.known("acme", about + rest)
        fenced = time.monotonic() - began
        self.check(
            done["revoked"] == {"acme": [2, 3]} and not done["lost_servers"],
            f"acme@2 and @3 saw {_FORGOTTEN}'s events: revoked; the server has confirmed the fence",
            done["seconds"],
        )
        self.check(not set(known) & set(about), f"{_FORGOTTEN}'s fact is gone from the answers", fenced)
        self.show(about[0].question, answers[0])
        self.released({"acme": 5})
        known, _ = self.known("acme", about + rest)
        self.check(
            known == rest,
            f"acme@5 is rebuilt without {_FORGOTTEN}: it knows {len(known)} of the {len(rest)} others",
            time.monotonic() - began,
        )

    def prove(self) -> None:
        """The control run: the same log, with the subject suppressed from the start, in a fresh process."""
        self.step("Prove", f"$ riverdelta counterfactual acme --without {_FORGOTTEN}")
        self.line(
            f"[dim]a fresh process trains acme alone from Kafka's events, as if {_FORGOTTEN} had never been[/dim]"
        )
        began = time.monotonic()
        done = self.stack.run("counterfactual", "acme", "--without", _FORGOTTEN, may_fail=True)
        self.line(f"live           {done['live']}")
        self.line(f"counterfactual {done['counterfactual']}")
        self.check(done["live"] == done["counterfactual"], "equal, bit for bit (SHA-256)", time.monotonic() - began)
        self.stack.wait("purging what was revoked", self._purged)
        (forget,) = self.stack.ledger.forgets()
        file = self.stack.data / "store" / certificate_key(forget.id)
        self.line(f"[dim]$ riverdelta registry verify {file.name}[/dim]")
        told = self.stack.run("registry", "verify", str(file), may_fail=True)
        kept = self.stack.files_with(self.secret)
        self.check(not kept, f"purged: still no file of the data folder holds “{self.secret}”")
        self.check(
            (told["erased"], told["revoked"], told["problems"]) == (2, 2, []),
            f"its signed certificate is in order: {told['erased']} entries erased, {told['revoked']} versions revoked",
        )

    # -- what the steps are made of --------------------------------------------------------------------------

    def step(self, title: str, what: str) -> None:
        """A step's heading."""
        self.number += 1
        self.console.print(f"\n[bold]{self.number} {title}[/bold]  [dim]{what}[/dim]", soft_wrap=True)

    def line(self, text: str) -> None:
        """A line below the heading."""
        self.console.print(f"    {text}", soft_wrap=True)

    def show(self, question: str, answer: str) -> None:
        """A question and its answer."""
        asked = question.removeprefix("Q: ").removesuffix("\nA:")
        self.console.print("    ", Text(asked, "italic"), Text(answer or "(nothing)", "cyan"), soft_wrap=True)

    def check(self, holds: bool, said: str, seconds: float | None = None, what: str = "") -> None:
        """Say what was checked and whether it holds."""
        self.checks += 1
        if not holds:
            self.broken.append(said)
        mark = "[green]✓[/green]" if holds else "[bold red]✗[/bold red]"
        took = "" if seconds is None else f"  [yellow]{seconds:.1f} s{f' {what}' if what else ''}[/yellow]"
        self.console.print(f"  {mark} {said}{took}", soft_wrap=True)

    def of(self, tenant: str, *parts: str) -> list[Fact]:
        """A tenant's facts, those of some parts or all."""
        return [fact for fact in self.facts if fact.tenant == tenant and (not parts or fact.part in parts)]

    def known(self, model: str, facts: Sequence[Fact]) -> tuple[list[Fact], list[str]]:
        """Which of these facts a model answers, and what it says."""
        answers = self.stack.ask(model, [fact.question for fact in facts])
        return [fact for fact, answer in zip(facts, answers, strict=True) if fact.answer in answer], answers

    def publish(self, title: str, part: str, what: str) -> float:
        """Publish a part's facts, every delivery checked; the moment at which the first was sent."""
        from riverdelta.streams.publish import publish

        events = [event for fact in self.facts if fact.part == part for event in fact.events]
        said = f"{len(events)} events published to Kafka: {what}"
        if title:
            self.step(title, said)
        else:
            self.line(f"[dim]{said}[/dim]")
        began = time.monotonic()
        done = publish(self.stack.settings, events)
        if done.events != len(events):
            raise Story(f"Only {done.events} of {len(events)} events arrived.")
        return began

    def released(self, wanted: dict[str, int]) -> None:
        """Wait until a version of each adapter is released and answers."""
        names = " and ".join(f"{name}@{number}" for name, number in wanted.items())
        self.stack.wait(f"training {names}", lambda: all(self.stack.serves(*each) for each in wanted.items()))

    def followed(self, adapter: str, version: int) -> None:
        """Wait until the server has followed an operator's act."""
        self.stack.wait(f"the server takes up {adapter}@{version}", lambda: self.stack.serves(adapter, version))

    def check_loss(self, adapter: str, number: int) -> None:
        """The loss fell in an increment."""
        losses = self.stack.ledger.version(adapter, number).metrics["losses"]
        told = f"loss {losses[0]:.2f} → {losses[-1]:.3f} in {len(losses)} steps"
        self.check(losses[-1] < losses[0] / 2, f"{adapter}@{number} is released: {told}")

    def say_how_to_go_on(self) -> None:
        """What the stack that stays up can be asked."""
        data = f"--data {self.stack.data}"
        serving = self.stack.settings.running()["serving"]
        self.console.print(
            f"\nThe stack stays up (process {self.stack.pid}); `kill {self.stack.pid}` stops it.\n"
            f"  riverdelta ask acme '{self.facts[0].question.replace(chr(10), chr(92) + 'n')}' {data}\n"
            f"  riverdelta registry log acme {data}\n"
            f"  OpenAI endpoint  {serving}/v1\n"
            f"  its output       {self.stack.log}",
            soft_wrap=True,
        )

    def _purged(self) -> bool:
        return all(forget.stage is Stage.PURGED for forget in self.stack.ledger.forgets())
