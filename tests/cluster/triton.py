"""What Triton's own client makes of a router: run as a script, since no process can import it beside our messages.

`triton.py ADDRESS CALL`, with the call's arguments as JSON on standard input; the result is JSON on standard output. A
request is {"inputs": [[name, datatype, shape, values], ...]} and other arguments of the client's `infer`.
"""

import asyncio
import importlib
import json
import queue
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import numpy as np

grpcclient: Any = importlib.import_module("tritonclient.grpc")
aioclient: Any = importlib.import_module("tritonclient.grpc.aio")
InferenceServerException: Any = importlib.import_module("tritonclient.utils").InferenceServerException

WAIT_S = 30.0
DTYPES = {
    "BYTES": np.object_,
    "BOOL": bool,
    "INT64": np.int64,
    "INT32": np.int32,
    "UINT32": np.uint32,
    "FP32": np.float32,
}


# What the client is asked, by name ----------------------------------------------------------------------------------
def status(address: str, model: str) -> dict[str, Any]:
    with grpcclient.InferenceServerClient(address) as client:
        return {
            "live": client.is_server_live(),
            "ready": client.is_server_ready(),
            "model_ready": client.is_model_ready(model),
            "version_1_ready": client.is_model_ready(model, "1"),
            "server": client.get_server_metadata(as_json=True),
            "model": client.get_model_metadata(model, as_json=True),
            "unknown": [
                _refusal(lambda: client.is_model_ready("gpt-9")),
                _refusal(lambda: client.is_model_ready(model, "2")),
                _refusal(lambda: client.get_model_metadata("gpt-9")),
            ],
        }


def aio_status(address: str, model: str) -> dict[str, Any]:
    async def ask() -> dict[str, Any]:
        async with aioclient.InferenceServerClient(address) as client:
            return {
                "live": await client.is_server_live(),
                "ready": await client.is_server_ready(),
                "model_ready": await client.is_model_ready(model),
                "server": await client.get_server_metadata(as_json=True),
                "model": await client.get_model_metadata(model, as_json=True),
            }

    return asyncio.run(ask())


def infer(address: str, requests: list[dict[str, Any]]) -> list[Any]:
    """One after the other; what is refused becomes its error."""
    with grpcclient.InferenceServerClient(address) as client:
        return [_answer_or_refusal(partial(client.infer, **_arguments(one))) for one in requests]


def async_infer(address: str, requests: list[dict[str, Any]]) -> list[Any]:
    """All at once, by callbacks."""
    results: queue.Queue[tuple[int, Any, Any]] = queue.Queue()
    with grpcclient.InferenceServerClient(address) as client:
        for at, one in enumerate(requests):
            client.async_infer(
                callback=lambda result, error, at=at: results.put((at, result, error)), **_arguments(one)
            )
        came = [results.get(timeout=WAIT_S) for _ in requests]
    return [
        _answer(result) if error is None else _error(error) for _, result, error in sorted(came, key=lambda one: one[0])
    ]


def aio_infer(address: str, requests: list[dict[str, Any]]) -> list[Any]:
    async def ask() -> list[Any]:
        async with aioclient.InferenceServerClient(address) as client:
            return await asyncio.gather(*(client.infer(**_arguments(one)) for one in requests))

    return [_answer(result) for result in asyncio.run(ask())]


def stream(address: str, requests: list[dict[str, Any]], headers: dict[str, str] | None = None) -> list[Any]:
    """All on one stream; what came, in its order, when the stream has ended."""
    came: list[Any] = []
    with grpcclient.InferenceServerClient(address) as client:
        client.start_stream(
            lambda result, error: came.append(_answer(result) if error is None else _error(error)), headers=headers
        )
        for one in requests:
            client.async_stream_infer(**_arguments(one))
        client.stop_stream()
    return came


def cancelled_stream(address: str, request: dict[str, Any], responses: int) -> list[Any]:
    """Cancelled after so many responses."""
    came: queue.Queue[Any] = queue.Queue()
    with grpcclient.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: came.put(_answer(result) if error is None else _error(error)))
        client.async_stream_infer(**_arguments(request))
        seen = [came.get(timeout=WAIT_S) for _ in range(responses)]
        client.stop_stream(cancel_requests=True)
    while not came.empty():
        seen.append(came.get_nowait())
    return seen


def cancelled_infer(address: str, request: dict[str, Any]) -> Any:
    """Given up after a while in which nothing can have come."""
    with grpcclient.InferenceServerClient(address) as client:
        return _answer_or_refusal(partial(client.infer, client_timeout=0.5, **_arguments(request)))


def aio_stream(address: str, requests: list[dict[str, Any]]) -> list[Any]:
    async def said() -> AsyncIterator[dict[str, Any]]:
        for one in requests:
            yield _arguments(one)

    async def ask() -> list[Any]:
        async with aioclient.InferenceServerClient(address) as client:
            responses = client.stream_infer(said(), stream_timeout=WAIT_S)
            return [_answer(result) if error is None else _error(error) async for result, error in responses]

    return asyncio.run(ask())


# From JSON and back -------------------------------------------------------------------------------------------------
def _arguments(request: dict[str, Any]) -> dict[str, Any]:
    said = dict(request)
    said["inputs"] = [_input(*one) for one in said["inputs"]]
    if "outputs" in said:
        said["outputs"] = [grpcclient.InferRequestedOutput(name) for name in said["outputs"]]
    return {"model_name": "demo", **said}


def _input(name: str, datatype: str, shape: list[int], values: list[Any]) -> Any:
    tensor = grpcclient.InferInput(name, shape, datatype)
    tensor.set_data_from_numpy(np.array(values, dtype=DTYPES[datatype]).reshape(shape))
    return tensor


def _answer(result: Any) -> dict[str, Any]:
    response = result.get_response()
    outputs = {output.name: _values(result.as_numpy(output.name)) for output in response.outputs}
    kinds = {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in response.parameters.items()}
    return {
        "id": response.id,
        "model": [response.model_name, response.model_version],
        "outputs": outputs,
        "shapes": {output.name: [output.datatype, *output.shape] for output in response.outputs},
        "parameters": kinds,
    }


def _values(array: Any) -> list[Any]:
    return [value.decode() if isinstance(value, bytes) else value for value in array.tolist()]


def _answer_or_refusal(call: Callable[[], Any]) -> dict[str, Any]:
    try:
        return _answer(call())
    except InferenceServerException as error:
        return _error(error)


def _refusal(call: Callable[[], object]) -> dict[str, Any]:
    try:
        return {"answer": call()}
    except InferenceServerException as error:
        return _error(error)


def _error(error: Any) -> dict[str, Any]:
    return {"status": error.status(), "message": error.message()}


CALLS = (status, aio_status, infer, async_infer, aio_infer, stream, cancelled_stream, cancelled_infer, aio_stream)

if __name__ == "__main__":
    chosen: Any = next(call for call in CALLS if call.__name__ == sys.argv[2])
    json.dump(chosen(sys.argv[1], **json.load(sys.stdin)), sys.stdout)
