"""`splitserve profile`: measures what the steps of an engine cost, into a file that the planner reads.

The engine runs in this process, configured as a worker of `splitserve up` would be. Every point is written as soon as
it is measured: a run that was stopped goes on where it was.
"""

import itertools
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from uuid import uuid4

import typer

from splitserve.core.config import WorkerConfig, read
from splitserve.core.errors import ConfigError
from splitserve.core.worker import Pool

if TYPE_CHECKING:
    from splitserve.core.model import ModelInfo
    from splitserve.engine.protocol import EngineInfo
    from splitserve.latency.profile import Profile
    from splitserve.planner.measure import Point

_EXECUTED = "SPLITSERVE_PROFILE_ENVIRONMENT"  # set once the process has the environment that a worker gets


def profile(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CLUSTER.YAML]", help="As for `splitserve up`; its engine is measured."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hugging Face model directory, or `demo`.")] = None,
    engine: Annotated[str | None, typer.Option(help="vllm or sim.")] = None,
    pool: Annotated[Pool, typer.Option(help="Whose engine options, where the pools differ.")] = Pool.DECODE,
    out: Annotated[Path, typer.Option(help="The profile. One that is there already is continued.")] = Path(
        "profile.json"
    ),
    hardware: Annotated[
        str | None, typer.Option(help="The GPU's name in the planner's datasheet, such as h100. Default on a CPU: cpu.")
    ] = None,
    longest: Annotated[int | None, typer.Option(min=64, help="Longest context, tokens. Default: the engine's.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each point; their median counts.")] = 3,
    minutes: Annotated[
        float, typer.Option(min=0.1, help="No new point after so long; the dearest come last. Run again for the rest.")
    ] = 20.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end instead of a table.")] = False,
) -> None:
    """Measure what an engine's steps cost, for the planner.

    Prompts alone, decodes alone, and both in one step, over a grid of lengths and batch sizes. A fifth of the points is
    held out of the fit; their error is what a plan made with this profile says of itself. Nothing else should run on
    the machine meanwhile.
    """
    from splitserve.cli.build import build_engine, read_model
    from splitserve.cli.planning import progress
    from splitserve.planner.measure import Instrument, grid

    settings, environment = _plan(config, model, engine, pool)
    _take_on(environment)
    described = read_model(settings.model, "")
    named = _hardware(hardware)
    with Instrument(build_engine(settings, described, uuid4().hex), described.vocab_size) as instrument:
        points = grid(instrument.info, longest)
        begun = _Begun.read_or_new(out, _facts(described, named, instrument.info, settings), len(points))
        last = time.monotonic() + 60 * minutes
        with progress() as report:
            for point in itertools.takewhile(lambda _: time.monotonic() < last, begun.left(points)):
                report(str(point), begun.share)
                begun.note(point, instrument.measure(point, repeats))
    _tell(begun, as_json)


def _plan(
    config: Path | None, model: str | None, engine: str | None, pool: Pool
) -> tuple[WorkerConfig, Mapping[str, str]]:
    """Of the first worker of that pool: its settings, and what its process starts with. Raises ConfigError."""
    from splitserve.cli.cluster import this_machine
    from splitserve.cli.local import Overrides, cluster_of, plan_workers

    counts = {each: int(each is pool) for each in Pool}
    over = Overrides(model, engine, counts[Pool.PREFILL], counts[Pool.DECODE])
    source = str(config or "options")
    cluster = cluster_of(read(config) if config else {}, over, source)
    plan = plan_workers(cluster, "127.0.0.1:1", this_machine(), source)[0]
    assert isinstance(plan.config, WorkerConfig)
    return plan.config, plan.environment


def _take_on(environment: Mapping[str, str]) -> None:
    """What a worker's process starts with can't be set later: allocators and OpenMP read it once."""
    if environment and _EXECUTED not in os.environ:
        sys.stdout.flush()
        command = [sys.executable, "-m", "splitserve", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **environment, _EXECUTED: "1"})


def _hardware(said: str | None) -> str:
    from splitserve.cli.cluster import this_machine
    from splitserve.latency.gpus import gpu

    if said is None and this_machine().gpus:
        raise ConfigError("--hardware", "say which GPU this is, such as h100, so that plans find the profile")
    return "cpu" if said in (None, "cpu") else gpu(str(said)).name


def _facts(model: "ModelInfo", hardware: str, info: "EngineInfo", of: WorkerConfig) -> "Profile":
    """An empty profile of this worker."""
    from splitserve.latency.profile import Profile
    from splitserve.latency.shape import shape

    kv, engine = info.kv, of.engine
    settings: dict[str, Any] = {
        "block_tokens": kv.block_size,
        "total_blocks": info.total_blocks,
        "max_sequences": info.max_sequences,
        "max_batched_tokens": info.max_batched_tokens,
        "max_model_len": info.max_model_len,
        "kv_bytes_per_token": kv.layers * kv.block_bytes // kv.block_size,
        "layers": kv.layers,
        "vocabulary": model.vocab_size,
        "engine": engine.model_dump(mode="json", exclude_unset=True),
        "measured": [],
    }
    return Profile(
        model=shape(str(model.path)).name,
        hardware=hardware,
        worker=f"{info.kind} engine",
        tp=getattr(engine, "tensor_parallel_size", 1),
        pp=getattr(engine, "pipeline_parallel_size", 1),
        kv_tokens=info.total_blocks * kv.block_size,
        settings=settings,
    )


@dataclass
class _Begun:
    """A profile as it grows, in its file. `settings["measured"]` names the points that are in it."""

    profile: "Profile"
    file: Path
    points: int

    @classmethod
    def read_or_new(cls, file: Path, facts: "Profile", points: int) -> "_Begun":
        """Raises ConfigError if the file holds the profile of another worker."""
        from splitserve.latency.profile import read as read_profile

        if not file.exists():
            facts.write(file)  # a file that can't be written is said before anything is measured
            return cls(facts, file, points)
        found = read_profile(file)
        known = replace(found, samples=(), settings={**found.settings, "measured": []})
        if known != facts:
            raise ConfigError(str(file), "is the profile of another worker or other settings; choose another --out")
        return cls(found, file, points)

    @property
    def share(self) -> float:
        return len(self.profile.settings["measured"]) / max(1, self.points)

    def left(self, points: "tuple[Point, ...]") -> "list[Point]":
        return [point for point in points if str(point) not in self.profile.settings["measured"]]

    def note(self, point: "Point", measured: "tuple[Any, ...]") -> None:
        from splitserve.latency.fit import Sample

        done = {**self.profile.settings, "measured": [*self.profile.settings["measured"], str(point)]}
        samples = (Sample(each.step, each.seconds) for each in measured)
        self.profile = replace(self.profile, settings=done).with_samples(*samples)
        self.profile.write(self.file)


def _tell(begun: _Begun, as_json: bool) -> None:
    import json

    from rich.console import Console

    from splitserve.view.table import table

    profile, out = begun.profile, begun.file
    left = begun.points - len(profile.settings["measured"])
    fitted = profile.latency()
    errors = {kind: {"samples": held.samples, "mean": held.mean, "worst": held.worst} for kind, held in fitted.held_out}
    if as_json:
        print(
            json.dumps(
                {"out": str(out), "samples": len(profile.samples), "points_left": left, "held_out_error": errors}
            )
        )
        return
    console = Console()
    console.print(f"{len(profile.samples)} steps measured, written to {out}. Error on steps held out of the fit:")
    rows = [(kind, str(of["samples"]), f"{of['mean']:.1%}", f"{of['worst']:.1%}") for kind, of in errors.items()]
    console.print(table(("steps",), ("held out", "mean", "worst"), rows))
    if left:
        console.print(f"The {left} dearest of {begun.points} points are not measured yet: run it again to go on.")
    if profile.hardware != "cpu":
        console.print(f"Next: splitserve plan --model ... --gpus {profile.hardware}:1x8 --profile {out}")
