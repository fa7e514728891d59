"""Brings a structured output's grammar to where its request stands, before vLLM schedules the request.

A request that was begun elsewhere has prompt and output so far as its prompt here, and vLLM would let its grammar begin
anew. It compiles grammars on a thread of its own and schedules a request once its grammar is there; so what was
accepted elsewhere is accepted on that thread, as the last step of compiling. Called on the scheduler's thread.
"""

from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

from splitserve.kv.job_params import grammar_of

if TYPE_CHECKING:
    from vllm.v1.request import Request


def start_grammar(request: "Request") -> None:
    """Does nothing for a request without one."""
    structured = request.structured_output_request
    start = grammar_of(request.sampling_params.extra_args) if request.sampling_params is not None else None
    if structured is None or start is None:
        return
    structured.reasoning_ended = start.constrains  # else vLLM would look for the reasoning's end in the output, too
    if start.accepted:
        tokens = list(request.prompt_token_ids or ())[-start.accepted :]
        structured.grammar = _after(structured._grammar, request.request_id, tokens)


def _after(grammar: Any, request_id: str, tokens: list[int]) -> "Future[Any]":
    """The grammar that is being compiled, or is there, once it has accepted these."""
    advanced: Future[Any] = Future()
    if isinstance(grammar, Future):
        grammar.add_done_callback(partial(_accept, advanced, request_id, tokens))
    else:
        compiled: Future[Any] = Future()
        compiled.set_result(grammar)
        _accept(advanced, request_id, tokens, compiled)
    return advanced


def _accept(advanced: "Future[Any]", request_id: str, tokens: list[int], compiled: "Future[Any]") -> None:
    error = compiled.exception()
    if error is not None:
        advanced.set_exception(error)
    elif compiled.result().accept_tokens(request_id, tokens):
        advanced.set_result(compiled.result())
    else:
        advanced.set_exception(ValueError("the output so far does not keep to the structured output"))
