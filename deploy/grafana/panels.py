"""What is on the dashboard. `deploy/generate.py` writes overview.json from it.

A panel is a title, a sentence, a unit and its queries; where it goes on the grid follows from its row. Queries use the
recording rules of ../prometheus/rules.yml wherever there is one, so that the dashboard and the alerts can't disagree.
"""

from dataclasses import dataclass

SCOPE = 'cluster=~"$cluster",namespace=~"$namespace"'


@dataclass(frozen=True, slots=True)
class Query:
    """`{}` in an expression is where the selection by cluster and namespace goes; `legend` as Grafana takes it."""

    expression: str
    legend: str

    @property
    def scoped(self) -> str:
        return self.expression.replace("{}", "{" + SCOPE + "}").replace("{,", "{" + SCOPE + ",")


@dataclass(frozen=True, slots=True)
class Panel:
    """`kind` is Grafana's. `least` and `most`: where the axis ends; None: where the values do."""

    title: str
    says: str
    unit: str
    queries: tuple[Query, ...]
    kind: str = "timeseries"
    least: float | None = 0
    most: float | None = None
    stacked: bool = False
    red_above: float | None = None
    red_below: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


def _percentiles(metric: str) -> tuple[Query, ...]:
    return tuple(Query(f"splitserve:{metric}_seconds:{p}{{}}", f"{p} {{{{slo_class}}}}") for p in ("p50", "p90", "p99"))


def _worker_histogram(metric: str, quantile: float, side: str) -> Query:
    rate = f'rate(splitserve_worker_kv_{metric}_bucket{{,side="{side}"}}[$__rate_interval])'
    return Query(f"histogram_quantile({quantile}, sum by (le) ({rate}))", f"p{quantile * 100:g}")


ROWS = (
    Row(
        "Objectives",
        (
            Panel(
                "Attainment by class",
                "Share of the outputs of the last five minutes that met every objective of their class.",
                "percentunit",
                (
                    Query("splitserve:attainment:ratio_rate5m{}", "{{slo_class}}"),
                    Query("splitserve:attainment_target:ratio", "target"),
                ),
                most=1,
            ),
            Panel(
                "Goodput by class",
                "Outputs per second that met every objective of their class.",
                "reqps",
                (Query("splitserve:goodput:rate5m{}", "{{slo_class}}"),),
                stacked=True,
            ),
            Panel(
                "Budget burn",
                "Misses over what the target leaves room for: at 1 a month's budget lasts a month. Alerts: 6 and 3.",
                "none",
                (
                    Query(
                        "splitserve:slo_missed:ratio_rate1h{} / (1 - scalar(splitserve:attainment_target:ratio))",
                        "1h {{slo_class}}",
                    ),
                    Query(
                        "splitserve:slo_missed:ratio_rate6h{} / (1 - scalar(splitserve:attainment_target:ratio))",
                        "6h {{slo_class}}",
                    ),
                ),
            ),
        ),
    ),
    Row(
        "Latency and traffic",
        (
            Panel("TTFT", "Time to first token, waiting included.", "s", _percentiles("ttft")),
            Panel("TPOT", "Mean time per output token after the first, per output.", "s", _percentiles("tpot")),
            Panel(
                "Requests by outcome",
                "gRPC status codes. OK, CANCELLED and INVALID_ARGUMENT are no fault of the cluster's.",
                "reqps",
                (Query("splitserve:requests:rate5m{}", "{{code}}"),),
                stacked=True,
            ),
            Panel(
                "Tokens",
                "Prompt tokens read and output tokens made, of finished requests.",
                "short",
                (
                    Query("sum(rate(splitserve_prompt_tokens_total{}[$__rate_interval]))", "prompt"),
                    Query("sum(rate(splitserve_output_tokens_total{}[$__rate_interval]))", "output"),
                ),
            ),
            Panel(
                "Lengths",
                "Half of the finished requests are shorter, and nine tenths.",
                "short",
                tuple(
                    Query(
                        f"histogram_quantile({quantile}, sum by (le) "
                        f"(rate(splitserve_request_{of}_tokens_bucket{{}}[$__rate_interval])))",
                        f"p{quantile * 100:g} {of}",
                    )
                    for of in ("prompt", "output")
                    for quantile in (0.5, 0.9)
                ),
            ),
            Panel(
                "HTTP",
                "Requests of OpenAI's clients by status, and event streams open.",
                "short",
                (
                    Query("sum by (code) (rate(splitserve_http_requests_total{}[$__rate_interval]))", "{{code}} /s"),
                    Query("sum(splitserve_http_streams{})", "streams open"),
                ),
            ),
        ),
    ),
    Row(
        "Pools and queues",
        (
            Panel(
                "Workers ready",
                "What the routers use each worker for now. Red: none.",
                "none",
                (Query("splitserve:workers_ready:count{}", "{{pool}}"),),
                kind="stat",
                red_below=1,
            ),
            Panel(
                "Workers not ready",
                "silent: no heartbeat; failing: asked for a token and made none; draining: on its way out.",
                "none",
                (Query('splitserve:workers:count{,health!="ready"}', "{{pool}} {{health}}"),),
                kind="stat",
                red_above=1,
            ),
            Panel(
                "Routers",
                "Scraped now.",
                "none",
                (Query("splitserve:routers:count{}", "routers"),),
                "stat",
                red_below=1,
            ),
            Panel(
                "Requests in the routers",
                "Running, and of these those that still wait for a route.",
                "short",
                (
                    Query("sum(splitserve_running_requests{})", "running"),
                    Query("sum(splitserve_waiting_requests{})", "waiting"),
                ),
            ),
            Panel(
                "Time in the queue",
                "Arrival until a route was bound (p90), and how long the line takes to pass at the present rate.",
                "s",
                (
                    Query("splitserve:queue_seconds:p90{}", "p90"),
                    Query("splitserve:queue_drain:seconds{}", "line"),
                ),
            ),
            Panel(
                "Jobs per worker",
                "Those that compute, and decodes that wait for their KV (parked).",
                "short",
                (
                    Query("splitserve_worker_running_jobs{}", "{{instance}} running"),
                    Query("splitserve_worker_parked_jobs{}", "{{instance}} parked"),
                ),
            ),
            Panel(
                "Jobs per step",
                "Jobs that an engine step gave news of, mean.",
                "short",
                (
                    Query(
                        "rate(splitserve_worker_step_jobs_sum{}[$__rate_interval])"
                        " / rate(splitserve_worker_step_jobs_count{}[$__rate_interval])",
                        "{{instance}}",
                    ),
                ),
            ),
            Panel(
                "Tokens per worker",
                "Produced, per second.",
                "short",
                (Query("rate(splitserve_worker_tokens_total{}[$__rate_interval])", "{{instance}}"),),
            ),
            Panel(
                "Drift from the plan",
                "Of a router that has one: rate is live over planned; prompt and output, distance between lengths.",
                "none",
                (Query("max by (of) (splitserve_workload_drift{})", "{{of}}"),),
            ),
        ),
    ),
    Row(
        "KV memory and links",
        (
            Panel(
                "KV memory in use",
                "Share of each worker's blocks that are not free.",
                "percentunit",
                (Query("splitserve:kv_used:ratio{}", "{{instance}}"),),
                most=1,
            ),
            Panel(
                "KV blocks held for others",
                "parked: reserved for KV to come; pinned: being sent; quarantined: a silent peer may still write them.",
                "short",
                (Query('splitserve_worker_kv_blocks{,state!~"free|total"}', "{{instance}} {{state}}"),),
            ),
            Panel(
                "KV written",
                "Bytes per second to other workers.",
                "Bps",
                (Query("rate(splitserve_worker_kv_written_bytes_total{}[$__rate_interval])", "{{instance}}"),),
                stacked=True,
            ),
            Panel(
                "KV in flight",
                "WRITEs that have not ended.",
                "bytes",
                (Query("splitserve_worker_kv_in_flight_bytes{}", "{{instance}}"),),
            ),
            Panel(
                "Throughput of a link",
                "Bytes of a transfer over the time that its WRITEs took, at the source.",
                "Bps",
                tuple(_worker_histogram("link_bytes_per_second", quantile, "source") for quantile in (0.1, 0.5)),
            ),
            Panel(
                "Waiting for the link",
                "Longest that a WRITE of a transfer waited for room on its link.",
                "s",
                tuple(_worker_histogram("write_queue_seconds", quantile, "source") for quantile in (0.5, 0.99)),
            ),
            Panel(
                "Overlap",
                "Share of the bytes that were moved before their prefill had ended.",
                "percentunit",
                (
                    Query(
                        "sum(rate(splitserve_kv_moved_before_prefill_ended_bytes_total{}[$__rate_interval]))"
                        " / sum(rate(splitserve_kv_moved_bytes_total{}[$__rate_interval]))",
                        "overlapped",
                    ),
                ),
                most=1,
            ),
            Panel(
                "Last byte after prefill",
                "How long after the end of its prefill the last WRITE of a transfer was done: TTFT grows by that.",
                "s",
                tuple(_worker_histogram("uncovered_seconds", quantile, "source") for quantile in (0.5, 0.9, 0.99)),
                least=None,
            ),
            Panel(
                "Size of a transfer",
                "Bytes (p50), and WRITEs it took (p50).",
                "short",
                (
                    _worker_histogram("transfer_bytes", 0.5, "source"),
                    _worker_histogram("transfer_writes", 0.5, "source"),
                ),
            ),
        ),
    ),
    Row(
        "Failures and moves",
        (
            Panel(
                "Requests that fail or are refused",
                "Share of all requests.",
                "percentunit",
                (
                    Query("splitserve:requests_failed:ratio_rate5m{}", "failed"),
                    Query("splitserve:requests_refused:ratio_rate5m{}", "refused"),
                ),
            ),
            Panel(
                "Failed attempts",
                "By reason. The request itself goes on elsewhere. not_now: a worker was full, at no cost.",
                "reqps",
                (Query("sum by (reason) (rate(splitserve_failed_attempts_total{}[$__rate_interval]))", "{{reason}}"),),
            ),
            Panel(
                "Failed transfers",
                "By side and reason; and share of all that fails.",
                "short",
                (
                    Query(
                        "sum by (side, reason) (rate(splitserve_worker_kv_failed_transfers_total{}[$__rate_interval]))",
                        "{{side}} {{reason}} /s",
                    ),
                    Query("splitserve:transfers_failed:ratio_rate5m{}", "share"),
                ),
            ),
            Panel(
                "KV given up",
                "Leases that ended unclaimed, cancels, and messages that fitted no state, per second.",
                "short",
                (
                    Query("sum(rate(splitserve_worker_kv_expired_leases_total{}[$__rate_interval]))", "expired leases"),
                    Query("sum(rate(splitserve_worker_kv_leases_total{}[$__rate_interval]))", "leases"),
                    Query("sum(rate(splitserve_worker_kv_cancels_total{}[$__rate_interval]))", "cancels"),
                    Query(
                        "sum by (kind) (rate(splitserve_worker_kv_dropped_messages_total{}[$__rate_interval]))",
                        "dropped: {{kind}}",
                    ),
                ),
            ),
            Panel(
                "Preemptions",
                "Requests that lost their KV blocks to others and were computed anew, per second.",
                "short",
                (Query("rate(splitserve_worker_preemptions_total{}[$__rate_interval])", "{{instance}}"),),
            ),
            Panel(
                "Taken up and moved",
                "resumed: its worker was lost; moved: its KV went along; refused: it stays. Per second.",
                "short",
                (
                    Query("sum(rate(splitserve_resumed_requests_total{}[$__rate_interval]))", "resumed"),
                    Query("sum by (outcome) (rate(splitserve_migrations_total{}[$__rate_interval]))", "{{outcome}}"),
                ),
            ),
            Panel(
                "Stall of a move",
                "Between the last token of the one worker and the first of the other.",
                "s",
                (
                    Query(
                        "histogram_quantile(0.9, sum by (le) "
                        "(rate(splitserve_migration_stall_seconds_bucket{}[$__rate_interval])))",
                        "p90",
                    ),
                ),
            ),
            Panel(
                "Probes",
                "Workers that were asked for a token, by what came, per second.",
                "short",
                (Query("sum by (answer) (rate(splitserve_worker_probes_total{}[$__rate_interval]))", "{{answer}}"),),
            ),
            Panel(
                "CPU",
                "Cores that each process uses. A router at 1 is at its end: start another.",
                "none",
                (Query('rate(process_cpu_seconds_total{,job=~".*splitserve.*"}[$__rate_interval])', "{{instance}}"),),
            ),
        ),
    ),
)


def queries(rows: tuple[Row, ...] = ROWS) -> tuple[tuple[str, str], ...]:
    """Title of the panel and expression, of every query."""
    return tuple((panel.title, query.scoped) for row in rows for panel in row.panels for query in panel.queries)
