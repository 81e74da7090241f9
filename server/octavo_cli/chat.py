"""`octavo chat`: talk to a model from the terminal, once or in a conversation."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from octavo_cli.openai_client import EndpointError, list_models, open_session, stream_events

HELP_TEXT = "/reset forgets the conversation, /system TEXT sets the instructions, /exit or Ctrl-D leaves."


@dataclass
class Conversation:
    """The messages so far; `system` always comes first."""

    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self, question: str) -> list[dict[str, str]]:
        """What to send for the next question."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return [*head, *self.turns, {"role": "user", "content": question}]

    def add(self, question: str, answer: str) -> None:
        self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def chat(
    text: Annotated[
        list[str] | None, typer.Argument(help="One question; without it a conversation begins.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model name; the endpoint's first one if left out.")
    ] = None,
    url: Annotated[
        str, typer.Option("--url", envvar="OCTAVO_URL", help="Address of a replica or the gateway.")
    ] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="OCTAVO_API_KEY", help="Sent as a bearer token.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="Instructions for the model.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", "-t", min=0, max=2)] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Longest answer.")] = None,
) -> None:
    """Talk to a model. The answer is printed as it comes; a question may also be piped in."""
    options = {
        name: value for name, value in (("temperature", temperature), ("max_tokens", max_tokens)) if value is not None
    }
    question = " ".join(text or ())
    if not question and not sys.stdin.isatty():
        question = sys.stdin.read().strip()
        if not question:
            raise typer.BadParameter("nothing was asked: give a question or run it in a terminal", param_hint="TEXT")
    base_url = url.rstrip("/").removesuffix("/v1")
    try:
        name = model or asyncio.run(_first_model(base_url, api_key))
        target = Target(base_url, api_key, name, options)
        if question:
            asyncio.run(target.ask(Conversation(system), question))
        else:
            typer.echo(f"{name} at {base_url}. {HELP_TEXT}", err=True)
            _converse(Conversation(system), target)
    except EndpointError as error:
        typer.echo(f"octavo chat: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@dataclass(frozen=True)
class Target:
    """Where questions go, and with which options."""

    base_url: str
    api_key: str | None
    model: str
    options: dict[str, Any]

    async def ask(self, conversation: Conversation, question: str) -> str:
        """Print the answer as it comes and return it; raises `EndpointError`."""
        messages = conversation.messages(question)
        body = {"model": self.model, "messages": messages, "stream": True, **self.options}
        async with open_session(self.api_key) as http:
            return await _print_answer(stream_events(http, f"{self.base_url}/v1/chat/completions", body))


async def _first_model(base_url: str, api_key: str | None) -> str:
    async with open_session(api_key) as http:
        models = await list_models(http, base_url)
    if not models:
        raise EndpointError(f"{base_url} serves no model")
    return models[0]


def _converse(conversation: Conversation, target: Target) -> None:
    """Read questions until the end of input; Ctrl-C ends only the answer under way."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            typer.echo("")
            return
        except KeyboardInterrupt:
            typer.echo("\nCtrl-D leaves.", err=True)
            continue
        command, _, rest = line.partition(" ")
        match command:
            case "":
                continue
            case "/exit" | "/quit":
                return
            case "/reset":
                conversation.turns.clear()
            case "/system":
                conversation.system = rest.strip() or None
            case "/help":
                typer.echo(HELP_TEXT)
            case _:
                _answer(conversation, target, line)


def _answer(conversation: Conversation, target: Target, question: str) -> None:
    """One turn; what goes wrong ends the turn and not the conversation."""
    try:
        conversation.add(question, asyncio.run(target.ask(conversation, question)))
    except EndpointError as error:
        typer.echo(f"octavo chat: {error}", err=True)
    except KeyboardInterrupt:
        typer.echo("\nstopped", err=True)


async def _print_answer(events: Any) -> str:
    """Print text as it comes, reasoning dimmed; returns the answer without its reasoning."""
    answer: list[str] = []
    async for event in events:
        for choice in event.get("choices", ()):
            delta = choice.get("delta") or {}
            thought = delta.get("reasoning") or delta.get("reasoning_content")
            if thought:
                typer.secho(thought, dim=True, nl=False)
            if delta.get("content"):
                answer.append(delta["content"])
                typer.echo(delta["content"], nl=False)
                sys.stdout.flush()
    typer.echo("")
    return "".join(answer)
