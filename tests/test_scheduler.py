"""The scheduler with its sums and buckets against one that walks every request and every token."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.enginespec import EngineSpec
from planner.errors import InputError
from planner.scheduler import SCHEDULERS, Rank, Request


class NaiveRank:
    """The same rules, written with one dict per request and no bookkeeping across steps."""

    def __init__(self, spec):
        self.spec = spec
        self.waiting, self.running = [], []

    def blocks(self, tokens):
        return -(-tokens // self.spec.block_tokens)

    def held(self, r):
        return self.blocks(max(r["target"], r["kv"]))

    def final(self, r):
        return self.blocks(r["prompt"] + r["output"] - 1)

    def free(self):
        return self.spec.kv_blocks_per_rank - sum(self.held(r) for r in self.running)

    def decoding(self):
        return [r for r in self.running if r["done"]]

    def decode(self):
        preempted = False
        while sum(self.blocks(r["kv"] + 1) - self.held(r) for r in self.decoding()) > self.free():
            r = self.running.pop()
            r |= {"target": r["prompt"] + r["produced"], "kv": 0, "done": False, "preemptions": r["preemptions"] + 1}
            self.waiting.insert(0, r)
            preempted = True
        batch = self.decoding()
        for r in batch:
            r["kv"] += 1
        return batch, preempted

    def prefill(self, budget, admit):
        chunks = []
        for r in [r for r in self.running if not r["done"]]:
            chunks.append(self.chunk(r, budget))
            budget -= chunks[-1][1]
        while admit and budget > 0 and self.waiting and len(self.running) < self.spec.max_num_seqs:
            r = self.waiting[0]
            after = [*self.running, r]
            unwritten = sum(self.final(x) - self.held(x) for x in after)
            if self.free() - self.held(r) < self.spec.admission_reserve * unwritten:
                break
            self.running.append(self.waiting.pop(0))
            chunks.append(self.chunk(r, budget))
            budget -= chunks[-1][1]
        return [c for c in chunks if c[1]]

    def chunk(self, r, budget):
        past, size = r["kv"], min(r["target"] - r["kv"], budget)
        r["kv"] += size
        return r, size, sum(past + i + 1 for i in range(size))

    def step(self):
        """One step; returns prefill tokens, pairs, chunks, decodes, context, and the requests that finish."""
        batch, chunks = [], []
        if self.spec.policy == "mixed":
            batch, preempted = self.decode()
            chunks = self.prefill(self.spec.max_batched_tokens - len(batch), not preempted)
        else:
            chunks = self.prefill(self.spec.max_batched_tokens, True)
            if not chunks:
                batch, _ = self.decode()
        work = [sum(c[1] for c in chunks), sum(c[2] for c in chunks), len(chunks), len(batch)]
        work.append(sum(r["kv"] for r in batch))
        ready = [c[0] for c in chunks if c[0]["kv"] == c[0]["target"]]
        finished = []
        for r in batch + ready:
            r["done"] = True
            r["produced"] += 1
            if r["produced"] == r["output"]:
                finished.append(r["index"])
                self.running.remove(r)
        return work, sorted(finished)


def run_both(spec, arrivals):
    """Step both schedulers until all of `arrivals` [(step, prompt, output)] are answered; compare all along."""
    rank, naive = Rank(spec), NaiveRank(spec)
    requests = [Request(i, p, o, 0.0) for i, (_, p, o) in enumerate(arrivals)]
    pending = sorted(range(len(arrivals)), key=lambda i: arrivals[i][0])
    rejected, done, step, prefilled = set(), set(), 0, 0
    while len(done) + len(rejected) < len(arrivals):
        assert step < 20_000, "the scheduler makes no progress"
        while pending and arrivals[pending[0]][0] <= step:
            i = pending.pop(0)
            if not rank.can_ever_hold(requests[i]):
                rejected.add(i)
                continue
            rank.enqueue(requests[i])
            prompt, output = arrivals[i][1:]
            fresh = {"index": i, "prompt": prompt, "output": output, "target": prompt}
            naive.waiting.append(fresh | {"kv": 0, "produced": 0, "done": False, "preemptions": 0})
        step += 1
        if not rank.running and not rank.waiting:
            continue
        rank.plan(float(step))
        expected, expected_finished = naive.step()
        w = rank.work
        work = [w.prefill_tokens, w.prefill_pairs, w.num_prefills, w.decode_seqs, w.decode_context_tokens]
        assert work == expected
        assert w.prefill_tokens + w.decode_seqs > 0
        assert w.prefill_tokens + w.decode_seqs <= spec.max_batched_tokens
        assert len(rank.running) <= spec.max_num_seqs
        assert 0 <= rank.free_blocks <= rank.total_blocks
        finished = sorted(r.index for r in rank.complete(step + 0.5))
        assert finished == expected_finished
        assert rank.free_blocks == naive.free()
        done |= set(finished)
        prefilled += w.prefill_tokens
    assert rank.free_blocks == rank.total_blocks
    assert (rank.num_decoding, rank.context_tokens, rank.final_blocks, rank._finish_at) == (0, 0, 0, {})
    assert not any(rank._residues)
    for i in done:
        assert requests[i].produced == requests[i].output_tokens
    return rank, requests, rejected, prefilled


SPECS = st.builds(
    EngineSpec,
    num_groups=st.just(1),
    ranks_per_group=st.just(1),
    kv_tokens_per_rank=st.integers(16, 400),
    block_tokens=st.sampled_from([1, 3, 8, 16]),
    max_num_seqs=st.integers(1, 12),
    max_batched_tokens=st.integers(12, 80),
    policy=st.sampled_from(sorted(SCHEDULERS)),
    admission_reserve=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
)
REQUESTS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 90), st.integers(1, 60)), min_size=1, max_size=25)


@settings(deadline=None, derandomize=True, max_examples=250)
@given(spec=SPECS, arrivals=REQUESTS)
def test_sums_and_buckets_equal_walking_every_token(spec, arrivals):
    rank, requests, rejected, prefilled = run_both(spec, arrivals)
    kept = [r for r in requests if r.index not in rejected]
    assert prefilled >= sum(r.prompt_tokens for r in kept)
    if not rank.num_preemptions:
        assert prefilled == sum(r.prompt_tokens for r in kept)
    if spec.admission_reserve == 1:
        assert rank.num_preemptions == 0
    assert rank.num_preemptions == sum(r.num_preemptions for r in requests)


def test_preemption_takes_the_last_admitted_and_recomputes_it():
    spec = EngineSpec(1, 1, kv_tokens_per_rank=64, block_tokens=16, max_num_seqs=4, max_batched_tokens=64)
    rank, requests, _, prefilled = run_both(spec, [(0, 16, 30), (0, 16, 30)])
    assert [r.num_preemptions for r in requests] == [0, 1]
    assert requests[1].first_token_s == 1.5
    # Both hold 2 blocks at 32 tokens; the second gives way with 17 tokens produced and recomputes 16 + 17 tokens.
    assert prefilled == 16 + 16 + 33
    assert rank.num_preemptions == 1


def test_mixed_serves_decodes_before_prompts_and_chunks_the_prompt():
    spec = EngineSpec(1, 1, kv_tokens_per_rank=1000, max_num_seqs=8, max_batched_tokens=8)
    rank = Rank(spec)
    rank.enqueue(Request(0, 4, 10, 0.0))
    rank.enqueue(Request(1, 12, 2, 0.0))
    seen = []
    for step in range(4):
        rank.plan(step)
        seen.append((rank.work.decode_seqs, rank.work.prefill_tokens, rank.work.prefill_pairs))
        rank.complete(step + 1)
    assert seen[0] == (0, 8, 10 + 10)
    assert seen[1] == (1, 7, 7 * 4 + 28)
    assert seen[2] == (1, 1, 12)
    assert seen[3] == (2, 0, 0)


def test_prefill_first_stalls_decodes():
    spec = EngineSpec(1, 1, kv_tokens_per_rank=1000, max_batched_tokens=256, policy="prefill_first")
    rank = Rank(spec)
    rank.enqueue(Request(0, 4, 10, 0.0))
    rank.plan(0)
    rank.complete(1)
    rank.enqueue(Request(1, 12, 2, 1.0))
    rank.plan(1)
    assert (rank.work.decode_seqs, rank.work.prefill_tokens) == (0, 12)
    rank.complete(2)
    rank.plan(2)
    assert (rank.work.decode_seqs, rank.work.decode_context_tokens) == (2, 5 + 13)


def test_idle_rank_does_nothing():
    rank = Rank(EngineSpec(1, 1, kv_tokens_per_rank=1000))
    rank.plan(0.0)
    assert rank.work.prefill_tokens == rank.work.decode_seqs == 0
    assert rank.complete(1.0) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 0}, "num_groups = 0"),
        ({"kv_tokens_per_rank": 15}, "holds no block"),
        ({"max_num_seqs": 9000}, "exceeds max_batched_tokens"),
        ({"policy": "mixd"}, "did you mean mixed"),
        ({"admission_reserve": 1.5}, "must lie in"),
    ],
)
def test_impossible_specs_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        EngineSpec(**({"num_groups": 1, "ranks_per_group": 1, "kv_tokens_per_rank": 1000} | change))
