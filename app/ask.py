"""`riverdelta ask`: one question to the serving endpoint, and who answered it."""

import sys
from dataclasses import dataclass
from typing import Any

import httpx
import typer

from riverdelta.core.errors import BadInput, NotFound, Refused, RiverdeltaError, Unavailable, Unsupported
from riverdelta.core.printing import print_json
from riverdelta.core.settings import Settings

_SECONDS = 300.0
# What a status means for the exit code; all others mean that the server cannot answer for now.
_KINDS: dict[int, type[RiverdeltaError]] = {
    400: BadInput,
    401: Refused,
    403: Refused,
    404: NotFound,
    410: Refused,
    413: BadInput,
    422: Unsupported,
}


@dataclass(frozen=True)
class Question:
    """What is asked, and how the answer is drawn (temperature 0: the likeliest token each time)."""

    model: str
    prompt: str
    chat: bool = False
    max_tokens: int = 64
    temperature: float = 0.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What the server said; `fingerprint` is the digest of the weights that wrote it."""

    text: str
    model: str
    fingerprint: str
    finish_reason: str
    raw: dict[str, Any]


class Client:
    """The serving endpoint's completions and chat completions."""

    def __init__(self, url: str, api_key: str = "") -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.Client(base_url=self._url, headers=headers, timeout=_SECONDS)

    def ask(self, question: Question) -> Answer:
        """The answer, or an error in the words of the server."""
        body: dict[str, Any] = {
            "model": question.model,
            "max_tokens": question.max_tokens,
            "temperature": question.temperature,
            **({"stop": list(question.stop)} if question.stop else {}),
        }
        if question.chat:
            body["messages"] = [{"role": "user", "content": question.prompt}]
        else:
            body["prompt"] = question.prompt
        said = self._post("/v1/chat/completions" if question.chat else "/v1/completions", body)
        choice = said["choices"][0]
        text = choice["message"]["content"] if question.chat else choice["text"]
        return Answer(text, said["model"], said.get("system_fingerprint") or "", choice["finish_reason"], said)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = self._http.post(path, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unavailable(
                f"No server answers at {self._url} ({error}).", "Start it with riverdelta up, or give its --url."
            ) from error
        if answer.is_success:
            held: dict[str, Any] = answer.json()
            return held
        try:
            message = str(answer.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            message = f"The server answered {answer.status_code}."
        raise _KINDS.get(answer.status_code, Unavailable)(message)


def ask(question: Question, url: str, settings: Settings, api_key: str, as_json: bool) -> None:
    """Ask and print."""
    prompt = sys.stdin.read() if question.prompt == "-" else question.prompt.replace("\\n", "\n")
    question = Question(**{**vars(question), "prompt": prompt})
    client = Client(url or settings.running().get("serving") or settings.serving_url, api_key)
    answer = client.ask(question)
    if as_json:
        print_json(answer.raw)
        return
    typer.echo(answer.text.strip())
    typer.echo(f"{answer.model}  fingerprint {answer.fingerprint}", err=True)
