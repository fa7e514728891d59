"""`splitserve generate`: one request; its text streams to stdout, its timings go to stderr."""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from splitserve.cli.talk import (
    DEFAULT_ROUTER,
    ApiKey,
    AsJson,
    CaFile,
    CertificateFile,
    KeyFile,
    RouterAddress,
    router_at,
)
from splitserve.core.errors import ConfigError
from splitserve.core.request import Chat, ChatMessage, Chunk, GenerateRequest, SamplingParams, StructuredOutput

SAMPLING, LIMITS = "Sampling", "Request"


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; `-` reads it from stdin.")] = "",
    file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message: use the chat template.")
    ] = False,
    system: Annotated[str, typer.Option(help="With --chat: the system message.")] = "",
    router: RouterAddress = DEFAULT_ROUTER,
    ca: CaFile = None,
    cert: CertificateFile = None,
    key: KeyFile = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
    max_tokens: Annotated[int | None, typer.Option(rich_help_panel=SAMPLING, help="Default: all that fit.")] = None,
    min_tokens: Annotated[int, typer.Option(rich_help_panel=SAMPLING)] = 0,
    temperature: Annotated[float, typer.Option(rich_help_panel=SAMPLING, help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(rich_help_panel=SAMPLING)] = 1.0,
    top_k: Annotated[int, typer.Option(rich_help_panel=SAMPLING, help="0: all tokens.")] = 0,
    min_p: Annotated[float, typer.Option(rich_help_panel=SAMPLING)] = 0.0,
    presence_penalty: Annotated[float, typer.Option(rich_help_panel=SAMPLING, help="-2 to 2.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(rich_help_panel=SAMPLING, help="-2 to 2.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(rich_help_panel=SAMPLING, help="Above 0.")] = 1.0,
    seed: Annotated[int | None, typer.Option(rich_help_panel=SAMPLING, help="Default: random.")] = None,
    stop: Annotated[list[str] | None, typer.Option(rich_help_panel=SAMPLING, help="Stop string; repeat it.")] = None,
    stop_token_id: Annotated[list[int] | None, typer.Option(rich_help_panel=SAMPLING, help="Repeat it.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", rich_help_panel=SAMPLING)] = False,
    logprobs: Annotated[int | None, typer.Option(rich_help_panel=SAMPLING, help="Shown with --json.")] = None,
    n: Annotated[int, typer.Option("-n", min=1, rich_help_panel=SAMPLING, help="So many outputs.")] = 1,
    regex: Annotated[str, typer.Option(rich_help_panel=SAMPLING, help="The output matches it.")] = "",
    json_schema: Annotated[
        Path | None, typer.Option(rich_help_panel=SAMPLING, help="File: the output is JSON of this schema.")
    ] = None,
    model: Annotated[str, typer.Option(rich_help_panel=LIMITS, help="Default: the one the router serves.")] = "",
    lora: Annotated[str, typer.Option(rich_help_panel=LIMITS, help="LoRA adapter that the workers have.")] = "",
    request_id: Annotated[str, typer.Option(rich_help_panel=LIMITS, help="Default: the router makes one.")] = "",
    priority: Annotated[int, typer.Option(rich_help_panel=LIMITS, help="Lower runs sooner.")] = 0,
    deadline: Annotated[float | None, typer.Option(rich_help_panel=LIMITS, help="Seconds for all of it.")] = None,
    token_deadline: Annotated[
        float | None, typer.Option("--inter-token-deadline", rich_help_panel=LIMITS, help="Seconds between tokens.")
    ] = None,
) -> None:
    """Generate text for one prompt, streaming."""
    request = GenerateRequest(
        prompt=_prompt(_text(prompt, file), chat, system),
        sampling=SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=tuple(stop or ()),
            stop_token_ids=tuple(stop_token_id or ()),
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            n=n,
            structured_output=_structured(regex, json_schema),
        ),
        model=model,
        lora=lora,
        request_id=request_id,
        priority=priority,
        deadline_s=deadline,
        inter_token_deadline_s=token_deadline,
    )
    with router_at(router, ca, cert, key, api_key) as client:
        show = _print_json if as_json else _print_text if n == 1 else _print_texts
        show(client.send(request))


def _text(prompt: str, file: Path | None) -> str:
    if prompt and file:
        raise ConfigError("--file", "give a PROMPT or a file, not both")
    if file is None:
        return sys.stdin.read() if prompt == "-" else prompt
    return _read("--file", file)


def _structured(regex: str, json_schema: Path | None) -> StructuredOutput | None:
    if json_schema is None:
        return StructuredOutput(regex=regex) if regex else None
    if regex:
        raise ConfigError("--json-schema", "give a schema or a regex, not both")
    return StructuredOutput(json_schema=_read("--json-schema", json_schema))


def _read(option: str, file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {file}", str(error)) from error


def _prompt(text: str, chat: bool, system: str) -> str | Chat:
    if system and not chat:
        raise ConfigError("--system", "only with --chat; a plain prompt has no system message")
    if not chat:
        return text
    instructions = (ChatMessage("system", system),) if system else ()
    return Chat((*instructions, ChatMessage("user", text)))


def _print_json(chunks: Iterable[Chunk]) -> None:
    for chunk in chunks:
        print(json.dumps(asdict(chunk), ensure_ascii=False), flush=True)


def _print_text(chunks: Iterable[Chunk]) -> None:
    for chunk in chunks:
        print(chunk.text, end="", flush=True)
        if chunk.finish_reason is not None:
            print(flush=True)
            print(_summary(chunk), file=sys.stderr)


def _print_texts(chunks: Iterable[Chunk]) -> None:
    """Several outputs, one after the other when all have come."""
    texts: dict[int, list[str]] = {}
    for chunk in chunks:
        texts.setdefault(chunk.choice, []).append(chunk.text)
        if chunk.usage is not None:
            for choice, pieces in sorted(texts.items()):
                print(f"--- {choice}\n{''.join(pieces)}", flush=True)
            print(_summary(chunk), file=sys.stderr)


def _summary(last: Chunk) -> str:
    assert last.usage is not None
    assert last.timings is not None
    timings = last.timings
    route = f"{timings.prefill_worker} → {timings.decode_worker}" if timings.prefill_worker else timings.decode_worker
    moved = f", {timings.kv_bytes / 1e6:.1f} MB of KV moved" if timings.kv_bytes else ""
    tokens = f"{last.usage.prompt_tokens} prompt + {last.usage.output_tokens} output tokens, {last.finish_reason}"
    parts = f"queue {_ms(timings.queue_s)}, prefill {_ms(timings.prefill_s)}, transfer {_ms(timings.transfer_s)}"
    return f"[{tokens}; TTFT {_ms(timings.ttft_s)} ({parts}), TPOT {_ms(timings.tpot_s)}; {route}{moved}]"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
