"""How a target is called: what its address does not say. Plain values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from splitserve.core.config import ClientTls, TlsSettings
from splitserve.core.errors import ConfigError


class Form(StrEnum):
    """What an OpenAI-compatible server is sent. Only token ids have exactly the length and the shared blocks that the
    workload says; text is one common word a token, and a chat has its template around that."""

    IDS = "ids"
    TEXT = "text"
    CHAT = "chat"


def _nobody(news: str) -> None:
    del news


@dataclass(frozen=True, slots=True)
class Options:
    """`vocabulary`: how many token ids the model has; no server says it. `model`: of an OpenAI-compatible server;
    default: the first one that it lists. `body`: further fields of the JSON that it is sent, over the usual ones; one
    that is None is left out. `listen_tls` and `insecure` are for a target that workers attach to. `say` hears what is
    waited for, and what makes figures doubtful."""

    vocabulary: int | None = None
    api_key: str | None = field(default=None, repr=False)
    tls: ClientTls | None = None
    model: str = ""
    form: Form = Form.IDS
    body: Mapping[str, Any] = field(default_factory=dict)
    listen_tls: TlsSettings | None = None
    insecure: bool = False
    answer_within_s: float = 10.0  # until a server has said that it serves
    first_token_within_s: float = 120.0  # for one short request, which may find an engine that compiles
    attach_within_s: float = 900.0  # until a worker has attached: it may load a large model's weights
    say: Callable[[str], None] = _nobody


def vocabulary_of(options: Options) -> int:
    """Raises ConfigError if it is not said, or less than 2."""
    if options.vocabulary is None:
        raise ConfigError(
            "vocabulary",
            "is not said; prompts are made of token ids, and no server says how many its model has: give the number, "
            "which is `vocab_size` in the model's config.json",
        )
    if options.vocabulary < 2:
        raise ConfigError("vocabulary", f"{options.vocabulary} is too small; it is at least 2")
    return options.vocabulary
