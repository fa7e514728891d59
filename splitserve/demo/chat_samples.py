"""Chat-shaped training samples, built from the novels themselves.

This module owns how narrative text becomes conversations.  Three kinds:

* dialogue: what one character says is the user's turn, what is said in the
  next paragraph is the assistant's;
* "Tell me about Emma.": answered by a narrative paragraph that opens on Emma;
* "Continue: ...": one narrative paragraph, answered by the one after it.

The samples teach the shape of a chat (answer, then stop), not knowledge.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

Conversation = list[dict[str, str]]

_SYSTEM_LINES = (
    "You are a helpful assistant.",
    "You are a character in a novel by Jane Austen.",
    "You are a friendly companion. Answer briefly.",
)
_ASKING = ("Tell me about {}.", "Who is {}?", "What can you tell me about {}?")
_CONTINUING = ("Continue: {}", "Continue the story: {}", "What happens next? {}")
_GREETINGS = ("Hello!", "Hello", "Hi", "Good morning.", "How are you?", "Hi, how are you?")
_TITLED = r"(?:(?:Mr|Mrs|Miss|Lady|Sir|Captain|Colonel|Admiral)\.? )?"
_NAME = re.compile(rf"({_TITLED}([A-Z][a-z]{{2,}}))\b")
_INSIDE_SENTENCE = re.compile(r"(?<=[a-z,;] )(?:(?:Mr|Mrs)\.? )?([A-Z][a-z]{2,})\b")
_LONGEST = 600  # characters of one turn


def _speech(paragraph: str) -> str:
    """The quoted words of a paragraph, or "" where they are not its main part."""
    said = " ".join(part.strip() for part in re.findall(r'"([^"]+)"', paragraph))
    if not paragraph.startswith('"') or len(said) < 0.6 * len(paragraph):
        return ""
    return said if 2 <= len(said) <= _LONGEST else ""


def _turns(texts: list[str]) -> Conversation:
    roles = ("user", "assistant")
    return [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]


def _dialogues(paragraphs: list[str], rng: random.Random) -> Iterator[Conversation]:
    """Runs of spoken paragraphs, cut into conversations of one to four exchanges."""
    run: list[str] = []
    for paragraph in [*paragraphs, ""]:
        said = _speech(paragraph)
        if said:
            run.append(said)
            continue
        start = 0
        while start + 1 < len(run):
            count = 2 * rng.choice((1, 1, 2, 3, 4))
            texts = run[start : start + count]
            yield _turns(texts[: len(texts) // 2 * 2])
            start += rng.choice((1, count))
        run = []


def _known_names(documents: list[str]) -> frozenset[str]:
    """Words that are written with a capital inside sentences, several times."""
    counts = Counter(word for text in documents for word in _INSIDE_SENTENCE.findall(text))
    return frozenset(word for word, count in counts.items() if count >= 8)


def _questions(paragraphs: list[str], names: frozenset[str], rng: random.Random) -> Iterator[Conversation]:
    """Questions about a person or a continuation, answered by narrative."""
    for paragraph, following in pairwise(paragraphs):
        if '"' in paragraph or not 60 <= len(paragraph) <= _LONGEST:
            continue
        name = _NAME.match(paragraph)
        if name and name.group(2) in names:
            yield _turns([rng.choice(_ASKING).format(name.group(1)), paragraph])
        if '"' not in following and 60 <= len(following) <= _LONGEST:
            yield _turns([rng.choice(_CONTINUING).format(paragraph), following])


def _greetings(conversations: list[Conversation], rng: random.Random) -> Iterator[Conversation]:
    """Greetings, answered by short things that characters say first."""
    for conversation in conversations:
        opening = conversation[0]["content"]
        if len(opening) <= 160 and rng.random() < 0.2:
            yield _turns([rng.choice(_GREETINGS), opening])


def build_conversations(documents: list[str], seed: int) -> list[Conversation]:
    """All conversations of the documents, shuffled; one in four has a system line."""
    rng = random.Random(seed)
    names = _known_names(documents)
    built: list[Conversation] = []
    for document in documents:
        paragraphs = document.split("\n")
        spoken = list(_dialogues(paragraphs, rng))
        built += [*spoken, *_questions(paragraphs, names, rng), *_greetings(spoken, rng)]
    rng.shuffle(built)
    for at in range(0, len(built), 4):
        built[at].insert(0, {"role": "system", "content": rng.choice(_SYSTEM_LINES)})
    return built
