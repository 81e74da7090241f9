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
    try:
        code = asyncio.run(_chat(url.rstrip("/").removesuffix("/v1"), api_key, model, question, system, options))
    except KeyboardInterrupt:
        code = 130
    raise typer.Exit(code)


async def _chat(
    url: str, api_key: str | None, model: str | None, question: str, system: str | None, options: dict[str, Any]
) -> int:
    async with open_session(api_key) as http:
        try:
            name = model or (await list_models(http, url))[0]
            conversation = Conversation(system)

            async def ask(text: str) -> str:
                body = {"model": name, "messages": conversation.messages(text), "stream": True, **options}
                return await _print_answer(stream_events(http, f"{url}/v1/chat/completions", body))

            if question:
                await ask(question)
                return 0
            typer.echo(f"{name} at {url}. {HELP_TEXT}", err=True)
            await _converse(conversation, ask)
        except IndexError:
            typer.echo(f"octavo chat: {url} serves no model", err=True)
            return 1
        except EndpointError as error:
            typer.echo(f"octavo chat: {error}", err=True)
            return 1
    return 0


async def _converse(conversation: Conversation, ask: Any) -> None:
    """Read questions until the end of input; Ctrl-C ends only the answer under way."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    while True:
        try:
            line = (await asyncio.to_thread(input, "> ")).strip()
        except EOFError:
            typer.echo("")
            return
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
                try:
                    conversation.add(line, await ask(line))
                except EndpointError as error:
                    typer.echo(f"octavo chat: {error}", err=True)


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
