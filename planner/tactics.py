"""What an engine may do beyond plain batching: draft tokens, and hide the exchange behind compute."""

from __future__ import annotations

from dataclasses import dataclass, replace

from planner.engine import Engine, Limits
from planner.errors import InputError
from planner.layout import Layout
from planner.model import ModelConfig
from planner.overlap import Overlap, parse_overlap
from planner.speculation import Speculation, parse_speculation


@dataclass(frozen=True, slots=True)
class Tactics:
    """Chosen tactics; both None is plain serving."""

    speculation: Speculation | None = None
    overlap: Overlap | None = None

    @property
    def query_tokens(self) -> int:
        """Tokens of a running sequence in one step: 1, or the drafts and the next token."""
        return self.speculation.query_tokens if self.speculation else 1

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens by which a running sequence advances in one step."""
        return self.speculation.tokens_per_step if self.speculation else 1.0

    @property
    def acceptance(self) -> tuple[float, ...]:
        """Chance of acceptance per draft, empty without drafts."""
        return self.speculation.acceptance if self.speculation else ()

    @property
    def num_batches(self) -> int:
        """Parts into which a step's batch is cut."""
        return 2 if self.overlap is not None and self.overlap.is_two_batch else 1

    @property
    def names(self) -> list[str]:
        """What a deployment's name adds."""
        return [str(part) for part in (self.speculation, self.overlap) if part is not None]

    def dispatched_tokens(self, num_seqs: int) -> int:
        """Tokens that a rank sends to experts at once when it decodes `num_seqs` sequences."""
        return -(-num_seqs // self.num_batches) * self.query_tokens

    def serving(self, model: ModelConfig) -> Tactics:
        """These tactics for a variant of the model with other precisions."""
        return self if self.speculation is None else replace(self, speculation=self.speculation.serving(model))

    def limits(self, limits: Limits, layout: Layout, most_dispatched: int | None) -> Limits:
        """An engine's default `limits` with as few sequences as a step, or an exchange buffer, has room for."""
        seqs = min(limits.max_num_seqs, limits.max_batched_tokens // self.query_tokens * layout.pp)
        if most_dispatched is not None:
            seqs = min(seqs, max(1, most_dispatched // self.query_tokens) * layout.pp)
        return replace(limits, max_num_seqs=max(1, seqs))

    def check(self, model: ModelConfig, layout: Layout, limits: Limits, backend: str) -> None:
        """InputError where the tactics cannot run, or a step has no room for the drafts of all sequences."""
        if self == PLAIN:
            return
        if any(layer.stack == "encoder" for layer in model.layers):
            option = "--speculative" if self.speculation else "--overlap"
            raise InputError(f"{option}: {model.name} is an encoder-decoder model, for which no engine does that")
        if self.speculation is not None:
            problem = self.speculation.problem(layout)
            if problem:
                raise InputError(f"--speculative: {problem}")
            running = -(-limits.max_num_seqs // layout.pp)
            if running * self.query_tokens > limits.max_batched_tokens:
                raise InputError(
                    f"{running} sequences of {self.query_tokens} tokens each do not fit a step of "
                    f"{limits.max_batched_tokens:,} tokens. Use --max-num-seqs "
                    f"{limits.max_batched_tokens // self.query_tokens * layout.pp} or fewer drafts."
                )
        if self.overlap is not None:
            if model.moe is None:
                raise InputError(f"--overlap {self.overlap.kind}: {model.name} is dense and exchanges nothing to hide")
            self.overlap.check(layout, backend)


PLAIN = Tactics()


def parse_tactics(
    speculative: str | None, acceptance: str | None, overlap: str | None, model: ModelConfig, engine: Engine
) -> Tactics:
    """Tactics from the options of a command; InputError as `parse_speculation` and `parse_overlap`."""
    return Tactics(parse_speculation(speculative, acceptance, model), parse_overlap(overlap, engine))
