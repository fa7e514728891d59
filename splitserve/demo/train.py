"""Train the demo model: a tiny Llama on Jane Austen's novels.

This module owns the tokenizer, the model's shape, the order in which samples
are drawn, and the optimisation loop.  Clean text comes from ``prepare_text``,
conversations from ``chat_samples``.  One CPU core suffices; see ``--help``.

    python -m splitserve.demo.train r-cran-janeaustenr_1.0.0-1_all.deb build/model

The output folder loads with ``AutoModelForCausalLM`` and ``AutoTokenizer``.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from splitserve.demo.chat_samples import build_conversations
from splitserve.demo.prepare_text import read_documents

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
VOCABULARY = 2048
POSITIONS = 8192
HELD_OUT = 0.02  # the end of every novel, never trained on

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|assistant|>\\n' + message.content + eos_token + '\\n' }}
{%- elif message.role in ('system', 'developer') %}
{{- '<|system|>\\n' + message.content + '\\n' }}
{%- else %}
{{- '<|user|>\\n' + message.content + '\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>\\n' }}
{%- endif %}"""


@dataclass(frozen=True)
class Phase:
    """From ``start`` (a share of all steps) on, batches have this shape."""

    start: float
    rows: int
    length: int


PHASES = (
    Phase(0.00, rows=8, length=256),
    Phase(0.860, rows=2, length=1024),
    Phase(0.940, rows=1, length=4096),
    Phase(0.995, rows=1, length=8192),
)


@dataclass(frozen=True)
class Stream:
    """Token ids and the places at which a sample may start."""

    ids: np.ndarray
    starts: np.ndarray
    prefix: tuple[int, ...]

    def sample(self, length: int, rng: np.random.Generator) -> list[int]:
        """One row of ``length`` ids, starting at a random permitted place."""
        wanted = length - len(self.prefix)
        usable = int(np.searchsorted(self.starts, len(self.ids) - wanted, side="right"))
        start = int(self.starts[rng.integers(usable)])
        return [*self.prefix, *self.ids[start : start + wanted].tolist()]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; plain encoding puts ``<|bos|>`` in front."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=POSITIONS,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A new model of the demo's shape, about 3.7 million parameters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def split_documents(documents: list[str]) -> tuple[list[str], list[str]]:
    """The documents without their ends, and those ends."""
    cuts = [text.rfind("\n", 0, int(len(text) * (1 - HELD_OUT))) for text in documents]
    pairs = list(zip(documents, cuts, strict=True))
    return [text[:cut] for text, cut in pairs], [text[cut + 1 :] for text, cut in pairs]


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, with no special token added."""
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def novel_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Stream:
    """All documents one after the other; a sample may start anywhere."""
    end = [tokenizer.eos_token_id]
    ids = np.array([token for part in encode(tokenizer, documents) for token in part + end])
    return Stream(ids, np.arange(len(ids)), (tokenizer.bos_token_id,))


def chat_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str], seed: int) -> Stream:
    """Conversations in the chat template; a sample starts where one starts."""
    chats = build_conversations(documents, seed)
    rendered = [str(tokenizer.apply_chat_template(chat, tokenize=False)) for chat in chats]
    ids = np.array([token for part in encode(tokenizer, rendered) for token in part])
    return Stream(ids, np.flatnonzero(ids == tokenizer.bos_token_id), ())


def phase_at(progress: float) -> Phase:
    """The phase in force at ``progress`` between 0 and 1."""
    return [phase for phase in PHASES if phase.start <= progress][-1]


def rate_at(progress: float, peak: float) -> float:
    """Learning rate: a short linear warm-up, then a cosine down to 2%."""
    warm_up = 0.02
    if progress < warm_up:
        return peak * (progress + 1e-3) / (warm_up + 1e-3)
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))
    return peak * (0.02 + 0.98 * cosine)


def make_optimizer(model: LlamaForCausalLM, decay: float) -> torch.optim.Optimizer:
    """AdamW; weight decay applies to matrices only."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def batch_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss over a batch of rows."""
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def held_out_loss(model: LlamaForCausalLM, ids: np.ndarray, bos: int, length: int) -> float:
    """Mean loss over the whole held-out text, in windows of ``length``."""
    count = max(1, len(ids) // (length - 1))
    windows = (ids[at * (length - 1) : (at + 1) * (length - 1)] for at in range(count))
    rows = [torch.tensor([[bos, *window.tolist()]]) for window in windows]
    with torch.no_grad():
        return sum(float(batch_loss(model, row)) for row in rows) / count


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a complete model folder in bfloat16, replacing file by file."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        half = copy.deepcopy(model).to(torch.bfloat16)
        half.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            do_sample=True,
            temperature=0.7,
            top_p=0.95,
        )
        half.save_pretrained(name)
        tokenizer.save_pretrained(name)
        for path in Path(name).iterdir():
            path.chmod(0o644)
            path.replace(folder / path.name)


def train(arguments: argparse.Namespace) -> None:
    """Run the whole training and leave the model in ``arguments.output``."""
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    rng = np.random.default_rng(arguments.seed)
    training, held_out = split_documents(read_documents(arguments.source))
    tokenizer = train_tokenizer(training)
    novels = novel_stream(tokenizer, training)
    chats = chat_stream(tokenizer, training, arguments.seed)
    unseen = novel_stream(tokenizer, held_out).ids
    model = build_model(tokenizer)
    optimizer = make_optimizer(model, arguments.weight_decay)
    print(
        f"parameters {model.num_parameters()}, tokens: novels {len(novels.ids)}, "
        f"chats {len(chats.ids)}, held out {len(unseen)}",
        flush=True,
    )

    began, tokens, average = time.monotonic(), 0, math.log(VOCABULARY)
    for step in range(arguments.steps):
        progress = step / arguments.steps
        phase = phase_at(progress)
        sources = [chats if rng.random() < arguments.chat_share else novels for _ in range(phase.rows)]
        rows = torch.tensor([source.sample(phase.length, rng) for source in sources])
        for group in optimizer.param_groups:
            group["lr"] = rate_at(progress, arguments.learning_rate)
        loss = batch_loss(model, rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tokens += rows.numel()
        average += 0.02 * (float(loss.detach()) - average)
        done = step + 1
        if done % arguments.report_every == 0 or done == arguments.steps:
            seconds = time.monotonic() - began
            print(
                f"step {done}/{arguments.steps} length {phase.length} tokens {tokens} "
                f"loss {average:.4f} {seconds:.0f}s {tokens / seconds:.0f} tokens/s",
                flush=True,
            )
        if done % arguments.save_every == 0 or done == arguments.steps:
            save(model, tokenizer, arguments.output)
            lengths = (256, 4096) if done == arguments.steps else (256,)
            for length in lengths:
                unseen_loss = held_out_loss(model, unseen, tokenizer.bos_token_id, length)
                print(f"step {done} held-out loss {unseen_loss:.4f} at length {length}", flush=True)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train the demo model: a tiny Llama on Jane Austen's novels.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="the .deb, its unpacked folder, or a text file")
    parser.add_argument("output", type=Path, help="model folder to write")
    parser.add_argument("--steps", type=int, default=3800, help="optimiser steps")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="AdamW weight decay")
    parser.add_argument("--chat-share", type=float, default=0.25, help="share of chat samples")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and sample order")
    parser.add_argument("--report-every", type=int, default=50, help="steps between progress lines")
    parser.add_argument("--save-every", type=int, default=400, help="steps between checkpoints")
    return parser.parse_args()


if __name__ == "__main__":
    train(parse_arguments())
