"""What people may ask the planner, as YAML or as options, and how it becomes a `Question`.

`Inputs` is what was written, kept in the plan file so that a plan can be made again; `resolve` looks names up and reads
files. It is neither the search nor the command line.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from splitserve.core.config import Count, Settings, parse, read
from splitserve.core.errors import ConfigError
from splitserve.core.slo import Slo
from splitserve.latency.catalog import Known, costs, unsupported
from splitserve.latency.gpus import Gpu, gpu
from splitserve.latency.shape import ModelShape, shape
from splitserve.planner.deployment import Link, Parallelism
from splitserve.planner.machines import Machines, Node
from splitserve.planner.question import Costs, CostsOf, Effort, Objective, Question
from splitserve.workload.named import workload
from splitserve.workload.workload import Workload

MEMORY_SHARE = 0.9  # of a GPU, what an engine takes for weights and KV (vLLM's gpu_memory_utilization)


class EffortName(StrEnum):
    QUICK = "quick"
    NORMAL = "normal"
    THOROUGH = "thorough"


EFFORTS: Mapping[EffortName, Effort] = {
    EffortName.QUICK: Effort(requests=400, seeds=3, finalists=2, rate_step=0.1),
    EffortName.NORMAL: Effort(),
    EffortName.THOROUGH: Effort(requests=4000, seeds=10, finalists=8, rate_step=0.02),
}


def seconds(said: object) -> float:
    """0.4, "0.4", "0.4s" or "400ms" as seconds. Raises ValueError with a sentence."""
    found = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(us|ms|s)?\s*", str(said))
    try:
        value = float(found[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0, None: 1.0}[found[2]] if found else float("nan")
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise ValueError(f"{said!r} is no time above 0; write seconds, such as 0.4, or 400ms")
    return value


def share(said: object) -> float:
    """0.9 or "90%". Raises ValueError unless it lies between 0 and 1."""
    text = str(said).strip()
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = float("nan")
    if not 0 < value < 1:
        raise ValueError(
            f"{said!r} is no share between 0 and 1; 0.9 means that nine of ten requests meet both objectives"
        )
    return value


def node_groups(said: str) -> tuple[tuple[str, int, int], ...]:
    """'h100:2x8,a100-80g:8' as (GPU, nodes, GPUs of each node). Raises ValueError naming the piece at fault."""
    return tuple(_node_group(piece.strip()) for piece in said.split(","))


def _node_group(piece: str) -> tuple[str, int, int]:
    found = re.fullmatch(r"([^:\s]+):(?:(\d+)x)?(\d+)", piece)
    if not found or not int(found[2] or 1) or not int(found[3]):
        raise ValueError(f"{piece!r} is not KIND:NODESxGPUS, such as h100:2x8 (2 nodes of 8) or a100-80g:8 (one node)")
    return found[1], int(found[2] or 1), int(found[3])


def link_bytes_per_s(said: str) -> float:
    """'200Gbps', '25GB/s', or 'nic:4x400Gbps' for four NICs of a node together, as bytes per second in each direction.

    Decimal prefixes are powers of 1000, those with an i (GiB/s) of 1024. Raises ValueError where bits and bytes can't
    be told apart.
    """
    found = re.fullmatch(r"(?:nic:)?(?:(\d+)x)?([0-9.]+)\s*([kKMGT])(i?)(\w+(?:/s)?)", said.strip())
    bits = _BITS.get(found[5]) if found else None
    if not found or not bits or found[2].count(".") > 1 or found[2] == "." or float(found[2]) == 0:
        raise ValueError(f"{said!r} is no link; write bits as 200Gbps, bytes as 25GB/s, or four NICs as nic:4x400Gbps")
    unit = (1024 if found[4] else 1000) ** ("KMGT".index(found[3].upper()) + 1)
    return int(found[1] or 1) * float(found[2]) * float(unit) * bits / 8


_BITS = {"bps": 1, "bit/s": 1, "b/s": 1, "Bps": 8, "B/s": 8}


def _checked(check: Callable[[str], object]) -> Callable[[str], str]:
    def checked(said: str) -> str:
        check(said)
        return said

    return checked


Duration = Annotated[float, BeforeValidator(seconds)]


class Inputs(Settings):
    """Everything that can be asked. Options carry the same names."""

    model: str = Field(min_length=1, description="a known name, such as opt-66b, or a Hugging Face model directory")
    gpus: Annotated[str, AfterValidator(_checked(node_groups))] = Field(
        description="nodes of each kind: h100:2x8 is 2 nodes of 8; join kinds with commas"
    )
    link: Annotated[str, AfterValidator(_checked(link_bytes_per_s))] = Field(
        "25GB/s", description="between nodes, per node and direction: 200Gbps (bits), 25GB/s (bytes), nic:4x400Gbps"
    )
    ttft: Duration = Field(0.4, description="objective for the time to first token, seconds (or 400ms)")
    tpot: Duration = Field(
        0.1, description="objective for the mean time per output token after the first, seconds (or 100ms)"
    )
    attainment: Annotated[float, BeforeValidator(share)] = Field(
        0.9, description="share of requests that must meet both objectives"
    )
    rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="requests per second that must be served; default: as many as the machines can"
    )
    workload: str = Field(
        "sharegpt", min_length=1, description="a trace file, a named workload, or prompt=512,output=128"
    )
    objective: Objective = Field(
        Objective.PER_GPU, description="what the best placement has most of, or fewest-gpus for the rate"
    )
    dtype: str | None = Field(None, description="activations and weights; default: the model's own")
    quantization: str | None = Field(None, description="of the weights, such as fp8; default: the model's own")
    kv_dtype: str | None = Field(None, description="of the KV cache; default: the activations'")
    expert_parallel: Count = Field(1, description="not supported yet: more than 1 is refused with what to do instead")
    data_parallel: Count = Field(1, description="not supported yet, likewise")
    source: str = Field("auto", description="where latencies come from; auto takes the most trusted there is")
    profile: Path | None = Field(None, description="a file that `splitserve profile` wrote")
    prices: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default_factory=dict, description="per GPU and hour by kind, over the datasheet's"
    )
    max_model_len: Count | None = Field(None, description="longest prompt and output together; default: the workload's")
    effort: EffortName = Field(EffortName.NORMAL, description="quick, normal or thorough")
    seeds: Annotated[int, Field(ge=2)] | None = Field(
        None, description="simulations behind each confidence interval; default: the effort's"
    )
    seed: int = Field(0, ge=0, description="same seed, same plan")


def inputs_of(said: Mapping[str, Any], source: str) -> Inputs:
    """Validates what was said. Raises ConfigError that names the key at fault."""
    missing = [key for key in ("model", "gpus") if not said.get(key)]
    if missing:
        example = {"model": "opt-66b", "gpus": "a100-80g:1x8"}[missing[0]]
        raise ConfigError(f"{source}: {missing[0]}", f"is missing; say which, such as {example}")
    return parse(Inputs, dict(said), source)


def read_inputs(file: Path | None, options: Mapping[str, Any]) -> Inputs:
    """The file's inputs with the options that were given (not None, not empty) over them."""
    given = {key: value for key, value in options.items() if value not in (None, {}, [])}
    return inputs_of({**(read(file) if file else {}), **given}, str(file or "options"))


def assumptions(inputs: Inputs) -> tuple[str, ...]:
    """What the answer rests on and nobody said, a sentence each."""
    unsaid = set(type(inputs).model_fields) - inputs.model_fields_set
    sentences = {
        "link": f"the link between nodes was not given: {inputs.link} per node and direction is assumed (--link)",
        "ttft": f"no TTFT objective was given: {inputs.ttft:g} s is assumed (--ttft)",
        "tpot": f"no TPOT objective was given: {inputs.tpot:g} s is assumed (--tpot)",
        "workload": f"no workload was given: {inputs.workload} is assumed (--workload)",
    }
    one_node = sum(nodes for _, nodes, _ in node_groups(inputs.gpus)) == 1
    return tuple(says for key, says in sentences.items() if key in unsaid and not (key == "link" and one_node))


def resolve(inputs: Inputs) -> Question:
    """Looks up the model, the GPUs and the workload. Raises ConfigError, a sentence naming the field, for an unknown
    one and for machines that can't hold the weights."""
    if refused := unsupported(inputs.expert_parallel, inputs.data_parallel):
        raise ConfigError("expert_parallel" if inputs.expert_parallel > 1 else "data_parallel", refused)
    model = shape(inputs.model, inputs.dtype, inputs.quantization, inputs.kv_dtype)
    machines = machines_of(inputs)
    _check_that_the_weights_fit(model, machines)
    served = workload(inputs.workload, _limit(inputs, model))
    effort = EFFORTS[inputs.effort]
    return Question(
        model=model,
        machines=machines,
        slo=Slo(inputs.ttft, inputs.tpot, inputs.attainment),
        workload=served,
        costs=costs_of(inputs, model),
        objective=inputs.objective,
        rate_rps=inputs.rate,
        max_model_len=inputs.max_model_len or _longest(served, model),
        effort=replace(effort, seeds=inputs.seeds or effort.seeds),
        seed=inputs.seed,
    )


def machines_of(inputs: Inputs) -> Machines:
    """Nodes in the order said, with the prices that were given. Raises ConfigError for an unknown GPU."""
    prices = {gpu(name).name: price for name, price in inputs.prices.items()}
    nodes = [
        Node(_priced(gpu(name), prices), gpus) for name, count, gpus in node_groups(inputs.gpus) for _ in range(count)
    ]
    unused = prices.keys() - {node.gpu.name for node in nodes}
    if unused:
        names = dict.fromkeys(node.gpu.name for node in nodes)
        raise ConfigError("prices", f"{min(unused)} is not among the GPUs: {', '.join(names)}")
    return Machines(tuple(nodes), Link(link_bytes_per_s(inputs.link)))


def _priced(kind: Gpu, prices: Mapping[str, float]) -> Gpu:
    return kind.priced(prices[kind.name]) if kind.name in prices else kind


def costs_of(inputs: Inputs, model: ModelShape) -> CostsOf:
    """What a worker of some parallelism is on some GPU, by the source that was asked for; each is worked out once."""
    found: dict[tuple[str, Parallelism], Costs | str] = {}

    def look_up(kind: Gpu, parallelism: Parallelism) -> Costs | str:
        key = (kind.name, parallelism)
        if key not in found:
            known = _known(inputs, model, kind, parallelism)
            found[key] = known if isinstance(known, str) else Costs(known.latency, known.kv_tokens)
        return found[key]

    return look_up


def caveats(inputs: Inputs, model: ModelShape, kind: Gpu, parallelism: Parallelism) -> tuple[str, ...]:
    """What the source of a worker's latencies assumes, and what is wrong with it: sentences."""
    known = _known(inputs, model, kind, parallelism)
    if isinstance(known, str):
        return ()
    return (*known.notes, *(f"{finding.where}: {finding.sentence}" for finding in known.findings))


def _known(inputs: Inputs, model: ModelShape, kind: Gpu, parallelism: Parallelism) -> Known | str:
    return costs(model, kind, parallelism.tp, parallelism.pp, source=inputs.source, profile=inputs.profile)


def _limit(inputs: Inputs, model: ModelShape) -> int:
    """Prompt and output together, tokens."""
    if inputs.max_model_len and inputs.max_model_len > model.max_model_len:
        raise ConfigError(
            "max_model_len", f"{inputs.max_model_len} is beyond {model.name}'s {model.max_model_len} tokens"
        )
    return inputs.max_model_len or model.max_model_len


def _longest(served: Workload, model: ModelShape) -> int:
    """What the longest request could need: more would ask for KV that nobody uses."""
    summary = served.describe()
    return min(model.max_model_len, max(_LEAST_MODEL_LEN, int(summary.prompt.longest + summary.output.longest)))


_LEAST_MODEL_LEN = 512


def _check_that_the_weights_fit(model: ModelShape, machines: Machines) -> None:
    """Finer reasons (heads that can't be divided, no room for KV) are the search's to tell."""
    counts = {kind: sum(node.gpus for node in machines.nodes if node.gpu == kind) for kind in machines.kinds}
    if any(model.weight_bytes <= MEMORY_SHARE * kind.memory_bytes * count for kind, count in counts.items()):
        return
    kind = max(counts, key=lambda each: each.memory_bytes * counts[each])
    needed = int(-(-model.weight_bytes // (MEMORY_SHARE * kind.memory_bytes)))
    raise ConfigError(
        "gpus",
        f"{machines} can't hold {model.name}: its weights take {model.weight_bytes / 1e9:.0f} GB, "
        f"which needs at least {needed} {kind.name} of {kind.memory_bytes / 1e9:.0f} GB each",
    )
