"""One job inside the simulated engine, from its arrival until nothing holds its blocks. Engine's thread."""

from dataclasses import dataclass, field

from splitserve.core.worker import Job, Ticket, TransferStats
from splitserve.engine.sim.output import DecodeOutput
from splitserve.engine.sim.schedule import Sequence
from splitserve.engine.sim.ticket import Side


@dataclass(slots=True, eq=False)
class Running:
    """`side`: of the job's own ticket; `holds`: the transfers that may read or write its blocks; `stats`: of its own
    ticket's, once it has ended. `computed`: a prefill's prompt is. `leaves_with`: a decode stops at its next token and
    is handed over under this ticket."""

    job: Job
    sequence: Sequence
    side: Side | None
    output: DecodeOutput | None = None
    stats: TransferStats | None = None
    leaves_with: Ticket | None = None
    holds: set[Side] = field(default_factory=set)
    computed: bool = False
    ended: bool = False

    @property
    def decodes(self) -> bool:
        """It has made a token here."""
        return self.output is not None and self.output.made > 0
