"""/v1/models and /v1/adapters: what there is, as far as the caller may know."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from riverdelta.core.names import BASE

from .api_keys import Caller
from .completions import visible
from .errors import ModelNotFound
from .releases import Release
from .server import Server


def routes(server: Server) -> APIRouter:
    """The listing endpoints."""
    router = APIRouter(tags=["list"])

    def releases(caller: Caller) -> list[tuple[str, Release]]:
        return [(name, release) for name, release in sorted(server.fleet.releases().items()) if caller.sees(name)]

    def model(name: str, created: int, digest: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "riverdelta", "digest": digest}

    @router.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        """The base and every adapter that this key may use. Versions answer too, as `adapter@version`."""
        caller = request.state.caller
        base = server.generator.base_digest
        data = [model(BASE, server.started_at, base)] if caller.sees(None) else []
        data += [model(name, server.fleet.created(name), r.digest or base) for name, r in releases(caller)]
        return {"object": "list", "data": data}

    @router.get("/v1/models/{name}")
    async def one_model(name: str, request: Request) -> dict[str, Any]:
        """One model: `base`, an adapter, or `adapter@version`."""
        ref = visible(name, request.state.caller)
        base = server.generator.base_digest
        if ref.adapter is None:
            return model(BASE, server.started_at, base)
        release = server.fleet.releases().get(ref.adapter)
        if release is None:
            raise ModelNotFound(name)
        digest = release.digest
        if ref.version is not None:
            record = await asyncio.to_thread(server.fleet.version, ref.adapter, ref.version)
            digest = record.digest
        return model(str(ref), server.fleet.created(ref.adapter), digest or base)

    @router.get("/v1/adapters")
    async def adapters(request: Request) -> dict[str, Any]:
        """Per adapter: its release, and where each of its versions lies that this server has used."""
        fleet, stats = server.fleet, server.engine.stats()["adapters"]

        def version(number: int, digest: str) -> dict[str, Any]:
            held = stats.get(digest, {})
            return {
                "version": number,
                "digest": digest or server.generator.base_digest,
                "tier": held.get("tier", "store") if digest else BASE,
                "requests": held.get("requests", 0),
                "draining": held.get("draining", False),
                "error": fleet.failure(digest),
            }

        data = []
        for name, release in releases(request.state.caller):
            numbers = {**fleet.asked_by_number(name), release.version: release.digest}
            versions = [version(number, digest) for number, digest in sorted(numbers.items())]
            data.append({"id": name, "object": "adapter", "release": release.version, "versions": versions})
        return {"object": "list", "data": data}

    return router
