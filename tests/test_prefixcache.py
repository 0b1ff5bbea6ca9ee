"""The prefix cache of a rank against one that keeps every block, its hash, its references and a free list."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from planner.enginespec import EngineSpec
from planner.prefixcache import Prefix, PrefixCache
from planner.scheduler import Rank, Request

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

    def blocks_in_use(self, rank):
        """Different blocks of the running requests, those without a hash yet included."""
        decoding = {r for bucket in rank._finish_at.values() for r in bucket}
        unnamed, named = 0, set()
        for request, blocks in self.blocks.items():
            written = rank.decode_steps - request.joined_decode_step if request in decoding else 0
            unnamed += rank.blocks(request.target + written) - len(blocks)
            named |= set(blocks)
        return unnamed + len(named)

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
        talks.setdefault(talk if talk >= 0 else -1 - index, []).append(
            (index, step, prompt, output, group, shared, talk)
        )
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
            assert request.prefix.cached_tokens < request.target
            assert request.prefix.cached_tokens % rank.block_tokens == 0
        log.append((work.prefill_tokens, work.prefill_pairs, work.decode_seqs, work.decode_context_tokens))
        finished = rank.complete(steps + 0.5)
        cache.shrink(rank.free_blocks) if isinstance(cache, BlockCache) else cache._shrink(rank.free_blocks)
        assert cache.cached <= rank.free_blocks
        if isinstance(cache, BlockCache):
            assert cache.blocks_in_use(rank) + rank.free_blocks == rank.total_blocks
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


def rank_with_cache(**changes):
    spec = EngineSpec(
        1, 1, changes.pop("kv_tokens", 4096), **{"block_tokens": 16, "max_batched_tokens": 8192} | changes
    )
    rank = Rank(spec)
    rank.cache = PrefixCache(spec.block_tokens)
    return rank


def admit(rank, *requests):
    for request in requests:
        rank.enqueue(request)
    rank.plan(0.0)
    found, rank.cache.found_tokens = rank.cache.found_tokens, 0
    rank.complete(1.0)
    return found


def test_hit_is_whole_blocks_and_leaves_the_last_token():
    rank = rank_with_cache()
    assert admit(rank, SharingRequest(0, 100, 5, 0, 70, -1)) == 0
    assert admit(rank, SharingRequest(1, 100, 5, 0, 70, -1)) == 64
    assert (rank.work.prefill_tokens, rank.work.prefill_pairs) == (36, 36 * 64 + 36 * 37 // 2)
    whole = SharingRequest(2, 64, 5, 0, 64, -1)
    assert admit(rank, whole) == 48, "the last token of a prompt is computed, and with it its block"
    assert admit(rank, SharingRequest(3, 100, 5, 0, 10, -1)) == 0, "less than a block is shared"
    assert admit(rank, SharingRequest(4, 100, 5, 1, 70, -1)) == 0, "another group"


def test_running_requests_hold_a_shared_prefix_once():
    rank = rank_with_cache()
    for number in range(3):
        admit(rank, SharingRequest(number, 110, 50, 0, 64, -1))
        assert rank.total_blocks - rank.free_blocks == 4 + 3 * (number + 1)


def test_conversation_finds_prompt_and_answer_but_the_last_token():
    rank = rank_with_cache()
    rank.enqueue(SharingRequest(0, 40, 25, -1, 0, 7))
    finished = []
    while not finished:
        rank.plan(0.0)
        finished = rank.complete(1.0)
    assert admit(rank, SharingRequest(1, 40 + 25 + 30, 5, -1, 0, 7)) == 64, "64 of the 64 tokens in the cache"
    assert admit(rank, SharingRequest(2, 40 + 25 + 30, 5, -1, 0, 8)) == 0


def test_least_recent_prefix_goes_first_and_its_tail_before_its_head():
    rank = rank_with_cache(kv_tokens=16 * 20)

    def serve(group):
        found = admit(rank, SharingRequest(group, 97, 1, group, 96, -1))
        assert not rank.running
        return found

    assert [serve(group) for group in (0, 1, 2)] == [0, 0, 0]
    assert serve(0) == 96
    assert serve(3) == 0, "took the room of group 1, the least recent"
    assert serve(2) == 96
    assert serve(0) == 96
    assert 0 <= serve(1) < 96


def test_preempted_conversation_finds_what_it_left():
    rank = rank_with_cache(kv_tokens=16 * 10)
    first, second = SharingRequest(0, 64, 60, -1, 0, 0), SharingRequest(1, 64, 60, -1, 0, 1)
    for request in (first, second):
        rank.enqueue(request)
    done = []
    for step in range(200):
        rank.plan(float(step))
        done += rank.complete(step + 0.5)
    assert {r.index for r in done} == {0, 1}
    assert second.num_preemptions
    assert second.prefix.cached_tokens == 0, "first admission found nothing"
    assert rank.cache.found_tokens > 0
    assert rank.free_blocks == rank.total_blocks


def test_one_shot_groups_change_nothing_but_the_cache():
    """A cache in which nobody finds anything schedules as no cache does."""
    spec = EngineSpec(1, 1, 2000, block_tokens=16, max_num_seqs=8, max_batched_tokens=200, admission_reserve=1.0)
    arrivals = [(1 + i // 3, 10 + 37 * i % 300, 1 + 11 * i % 40, i, 10 + 37 * i % 300, -1) for i in range(60)]
    _, log = simulate_rank(spec, PrefixCache(16), arrivals)
    _, blind = simulate_rank(spec, NoCache(), arrivals)
    assert [entry[:4] for entry in log[::2]] == [entry[:4] for entry in blind[::2]]
    assert [entry[0] for entry in log[1::2]] == [entry[0] for entry in blind[1::2]]


class NoCache:
    """Finds and keeps nothing."""

    cached = found_tokens = 0

    def held_blocks(self, request, free_blocks):
        return 0

    def admit(self, request):
        return None

    def publish(self, request, tokens):
        return None

    def release(self, request, tokens, free_blocks):
        return 0

    def _shrink(self, free_blocks):
        return None


def test_prefix_names_what_is_shared():
    assert Prefix(-1, 0, -1).segments == []
    assert [key for key, _, _ in Prefix(3, 100, 5).segments] == [("group", 3), ("conversation", 5)]


@settings(max_examples=150, deadline=None)
@given(
    SPECS,
    st.lists(
        st.tuples(
            *(st.integers(1, n) for n in (30, 60, 25)), st.integers(-1, 2), st.integers(1, 50), st.integers(-1, 2)
        ),
        max_size=25,
    ),
)
def test_any_mix_of_groups_and_overlapping_turns_keeps_the_books(spec, arrivals):
    """Traces may share different lengths of one prefix and send turns of a conversation at once."""
    rank, cache = Rank(spec), PrefixCache(spec.block_tokens)
    rank.cache = cache
    arrivals = [(*a[:3], a[5], 7 * a[5] + 3, a[5]) if a[5] >= 0 else a for a in arrivals]  # of one group throughout
    requests = [
        SharingRequest(i, max(prompt, shared if group >= 0 else 0), output, group, shared, talk)
        for i, (_, prompt, output, group, shared, talk) in enumerate(arrivals)
    ]
    due = sorted((a[0], r.index) for a, r in zip(arrivals, requests, strict=True) if rank.can_ever_hold(r))
    total, step, done = len(due), 0, 0
    while done < total:
        step += 1
        assert step < 5000
        while due and due[0][0] <= step:
            rank.enqueue(requests[due.pop(0)[1]])
        rank.plan(float(step))
        done += len(rank.complete(step + 0.5))
        stretches = list(cache._order.values())
        assert cache.cached == sum(s.stop - s.start for s in stretches)
        assert all(s.stop > s.start for s in stretches)
        assert 0 <= rank.free_blocks <= rank.total_blocks
        for chain in cache._chains.values():
            free = [(s.start, s.stop) for s in chain.free]
            assert free == sorted(free)
            assert chain.stop == max([chain.held, *(stop for _, stop in free)])
            stamps = [s.stamp for s in chain.free]
            assert stamps == sorted(stamps, reverse=True)
    cache._shrink(rank.free_blocks)
    assert rank.free_blocks == rank.total_blocks
    assert rank.final_blocks == 0
    assert all(r.prefix.cached_tokens < r.target and r.prefix.cached_tokens % spec.block_tokens == 0 for r in requests)
    cache._shrink(0)
    assert not cache._chains
    assert not cache.cached
