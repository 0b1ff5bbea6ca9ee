"""The prefix cache of a rank against one that keeps every block, its hash, its references and a free list."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.prefixcache import Prefix, PrefixCache
from planner.scheduler import EngineSpec, Rank, Request

PRIVATE = None


class Block:
    def __init__(self, content):
        self.content, self.references = content, 0


class BlockCache:
    """vLLM's rules one block at a time: full blocks by content, freed deepest first, the longest free one reused."""

    def __init__(self, block_tokens):
        self.size = block_tokens
        self.free = []  # blocks with content, least recent first
        self.known = {}  # content -> block
        self.blocks = {}  # request -> its blocks in order
        self.found_tokens = 0

    def content(self, request, number):
        """What makes block `number` of `request` findable, PRIVATE if nothing does."""
        end = (number + 1) * self.size
        prefix = request.prefix
        if prefix is None:
            return PRIVATE
        if prefix.group >= 0 and end <= request.shared:
            return ("group", prefix.group, number)
        if prefix.conversation >= 0:
            return ("conversation", prefix.conversation, number)
        return PRIVATE

    def shrink(self, free_blocks):
        while len(self.free) > free_blocks:
            block = self.free.pop(0)
            if self.known.get(block.content) is block:
                del self.known[block.content]

    def match(self, request):
        found = []
        for number in range((request.target - 1) // self.size):
            block = self.known.get(self.content(request, number))
            if block is None:
                break
            found.append(block)
        return found

    def held_blocks(self, request, free_blocks):
        self.shrink(free_blocks)
        return sum(block.references > 0 for block in self.match(request))

    def admit(self, request):
        found = self.match(request)
        for block in found:
            if not block.references:
                self.free.remove(block)
            block.references += 1
        self.blocks[request] = found
        request.computed = len(found) * self.size
        self.found_tokens += request.computed

    def publish(self, request, tokens):
        mine = self.blocks[request]
        for number in range(len(mine), tokens // self.size):
            block = Block(self.content(request, number))
            block.references = 1
            mine.append(block)
        for block in mine:
            if block.content is not PRIVATE:
                self.known.setdefault(block.content, block)

    def release(self, request, tokens, free_blocks):
        self.shrink(free_blocks)
        self.publish(request, tokens)
        kept = 0
        for block in reversed(self.blocks.pop(request)):
            block.references -= 1
            if block.references:
                kept += 1
            else:
                self.free.append(block)
        return kept

    @property
    def cached(self):
        return len(self.free)


class SharingRequest(Request):
    """A request that remembers what it shares for the cache that walks blocks."""

    __slots__ = ("shared",)

    def __init__(self, index, prompt, output, group, shared, conversation):
        super().__init__(index, prompt, output, 0.0)
        self.prefix = Prefix(group, shared if group >= 0 else 0, conversation)
        self.shared = shared if group >= 0 else 0


def simulate_rank(spec, cache, arrivals):
    """Everything a rank does in each step until all of `arrivals` [(step, prompt, output, group, shared, talk)] end."""
    rank = Rank(spec)
    rank.cache = cache
    talks, pending, history, log, steps = {}, [], {}, [], 0
    for index, (step, prompt, output, group, shared, talk) in enumerate(arrivals):
        talks.setdefault(talk if talk >= 0 else -1 - index, []).append((index, step, prompt, output, group, shared, talk))
    pending = [turns.pop(0) for turns in talks.values()]
    waiting = {turns_key: turns for turns_key, turns in talks.items() if turns}
    alive = 0
    while pending or alive:
        steps += 1
        assert steps < 5000, "no progress"
        for entry in [e for e in pending if e[1] <= steps]:
            pending.remove(entry)
            index, _, prompt, output, group, shared, talk = entry
            past = shared
            if talk >= 0:
                past, group, shared = history.get(talk, (shared, group, shared))
            request = SharingRequest(index, past + prompt, output, group, shared, talk)
            if talk >= 0:
                history[talk] = (request.prompt_tokens + output, group, shared)
            if rank.can_ever_hold(request):
                rank.enqueue(request)
                alive += 1
        if not alive:
            continue
        rank.plan(float(steps))
        work = rank.work
        assert 0 <= rank.free_blocks <= rank.total_blocks
        for request in rank.running:
            assert request.computed <= request.target
        log.append((work.prefill_tokens, work.prefill_pairs, work.decode_seqs, work.decode_context_tokens))
        finished = rank.complete(steps + 0.5)
        cache.shrink(rank.free_blocks) if isinstance(cache, BlockCache) else cache._shrink(rank.free_blocks)
        assert cache.cached <= rank.free_blocks
        log.append((rank.free_blocks, cache.cached, cache.found_tokens, [r.index for r in finished]))
        for request in finished:
            assert request.produced == request.output_tokens
            alive -= 1
            turns = waiting.get(request.prefix.conversation) if request.prefix.conversation >= 0 else None
            if turns:
                index, _, *rest = turns.pop(0)
                pending.append((index, steps + 2, *rest))
    return rank, log


SPECS = st.builds(
    EngineSpec,
    num_groups=st.just(1),
    ranks_per_group=st.just(1),
    kv_tokens_per_rank=st.integers(40, 300),
    block_tokens=st.sampled_from([1, 3, 4, 8]),
    max_num_seqs=st.integers(1, 8),
    max_batched_tokens=st.integers(8, 80),
    policy=st.sampled_from(["mixed", "prefill_first"]),
    admission_reserve=st.sampled_from([0.0, 0.0, 0.4, 1.0]),
)
SHARED = (0, 5, 16, 40)
"""Prefix of each group, so that all requests of a group share as much."""
ARRIVALS = st.lists(
    st.tuples(
        st.integers(1, 40), st.integers(1, 60), st.integers(1, 25), st.integers(-1, 3), st.just(0), st.integers(-1, 4)
    ).map(lambda a: (*a[:4], SHARED[a[3]] if a[3] >= 0 else 0, a[5])),
    min_size=1,
    max_size=25,
)


@settings(max_examples=400, deadline=None)
@given(SPECS, ARRIVALS)
def test_stretches_of_chains_do_what_single_blocks_do(spec, arrivals):
    _, expected = simulate_rank(spec, BlockCache(spec.block_tokens), arrivals)
    rank, log = simulate_rank(spec, PrefixCache(spec.block_tokens), arrivals)
    assert log == expected
    assert rank.free_blocks == rank.total_blocks
    assert rank.final_blocks == 0
