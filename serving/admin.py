"""/admin: acts on the registry over HTTP, for callers with the admin role."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from riverdelta.core.errors import NotFound, Refused
from riverdelta.core.names import check_adapter
from riverdelta.registry.ledger import AdapterRecord, Forget, Mode
from riverdelta.registry.operations import LONGEST_SECONDS, Operations, begun_forget, forget_json

from .api_keys import Caller
from .server import Server

Name = Annotated[str, StringConstraints(min_length=1, max_length=63)]
Reason = Annotated[str, StringConstraints(max_length=1000)]


class _Act(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    reason: Reason = ""


class SubjectAct(_Act):
    """About one subject, in one adapter or explicitly in all."""

    subject: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    adapter: Name | None = None
    all_adapters: bool = False

    @model_validator(mode="after")
    def _one_or_all(self) -> "SubjectAct":
        if (self.adapter is None) != self.all_adapters:
            raise PydanticCustomError("adapters", "give adapter, or all_adapters: true, one of them")
        return self

    def adapters(self, caller: Caller) -> list[str] | None:
        """As the ledger takes them, as far as they exist for the caller."""
        if self.adapter is not None:
            return [_own(self.adapter, caller)]
        if not caller.everything:
            raise Refused("This key may not act on all adapters.", "Name one of its own.")
        return None


class ForgetAct(SubjectAct):
    """Repeating a `request_id` repeats nothing. `serve_until_rebuilt`: for so many seconds at most, servers go on with
    what learned from the subject until it is rebuilt."""

    request_id: Annotated[str, StringConstraints(min_length=1, max_length=128)] | None = None
    serve_until_rebuilt: Annotated[float, Field(ge=0, le=LONGEST_SECONDS)] = 0.0


class RollbackAct(_Act):
    """To `version` (0: the base), or to the one before the release."""

    adapter: Name
    version: Annotated[int, Field(ge=0, lt=2**31)] | None = None


class ResumeAct(_Act):
    """`continue` with new segments, `replay` those set aside, or back to the `tip`."""

    adapter: Name
    mode: Mode = "continue"


def routes(server: Server) -> APIRouter:
    """The admin endpoints. The envelope has checked the caller's role; what is another tenant's looks absent."""
    router = APIRouter(prefix="/admin", tags=["admin"])

    def acts(asked: Request) -> Operations:
        actor = f"http:{asked.state.caller.name}"
        return Operations(server.ledger, server.settings, actor, server.wakeups, server.key_store)

    @router.post("/forget")
    async def forget(body: ForgetAct, request: Request) -> dict[str, Any]:
        """Fence a subject off; answers when no server can produce a token from what learned from it, but for the
        releases that `serve_until_rebuilt` leaves them."""
        caller = request.state.caller
        asked = caller.namespace + body.request_id if body.request_id else ""
        about = body.subject, body.adapters(caller), body.reason, asked, body.serve_until_rebuilt
        report = await asyncio.to_thread(acts(request).forget, *about)
        return {**_forget(report.forget, caller), "lost_servers": report.lost, "seconds": round(report.seconds, 4)}

    @router.get("/forgets/{request_id:path}")
    async def one_forget(request_id: str, request: Request) -> dict[str, Any]:
        """How far a forget has come: lending, fenced, acknowledged, rebuilt, purged. One that somebody else asked for
        is known by its whole id where it concerns the caller's adapters."""
        caller = request.state.caller
        for each in dict.fromkeys((caller.namespace + request_id, request_id)):
            held = await asyncio.to_thread(begun_forget, server.ledger, each)
            if held is not None and (caller.everything or any(map(caller.sees, held.adapters))):
                return _forget(held, caller)
        raise NotFound("There is no such forget.", "Give the request_id that the forget was asked for with.")

    @router.post("/allow")
    async def allow(body: SubjectAct, request: Request) -> dict[str, Any]:
        """Let a forgotten subject be learned again, from now on."""
        adapters = body.adapters(request.state.caller)
        return {"allowed": await asyncio.to_thread(acts(request).allow, body.subject, adapters, body.reason)}

    @router.post("/rollback")
    async def rollback(body: RollbackAct, request: Request) -> dict[str, Any]:
        """Move a release to an earlier version and hold it there."""
        name = _own(body.adapter, request.state.caller)
        return _head(await asyncio.to_thread(acts(request).rollback, name, body.version, body.reason))

    @router.post("/resume")
    async def resume(body: ResumeAct, request: Request) -> dict[str, Any]:
        """End a hold."""
        name = _own(body.adapter, request.state.caller)
        return _head(await asyncio.to_thread(acts(request).resume, name, body.mode, body.reason))

    return router


def _own(adapter: str, caller: Caller) -> str:
    name = check_adapter(adapter)
    if not caller.sees(name):
        raise NotFound(f"There is no adapter {name}.", "`riverdelta registry list` shows those there are.")
    return name


def _forget(held: Forget, caller: Caller) -> dict[str, Any]:
    """A forget as far as the caller may know of it, by the id that it gave."""
    return {**forget_json(held, caller.sees), "request_id": held.id.removeprefix(caller.namespace)}


def _head(head: AdapterRecord) -> dict[str, Any]:
    return {"adapter": head.name, "release": head.release, "tip": head.tip, "held": head.held, "epoch": head.epoch}
