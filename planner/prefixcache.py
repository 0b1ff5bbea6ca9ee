"""The prefix cache of one scheduler rank: KV blocks that stay in the pool after their request, until room is needed.

The cache is the KV pool less the blocks of running requests. Full blocks only are found again, the last token of a
prompt is always computed, and the least recently used block goes first, of one request the deepest one: the rules of
vLLM's hash chains and LRU free list (handbook serving 2.2, 2.11; vLLM `docs/design/prefix_caching.md`) and of SGLang's
radix tree, whose page is one token. What a finished request leaves that nobody shares is kept, and displaces, too.

A running request holds the blocks it found by reference, so those of a shared prefix are in the pool once. A request
that is admitted needs no new blocks for what others hold, and reads them all in attention like its own.

Nothing here is done per block: the blocks of one group or conversation are a chain whose requests hold and leave
stretches from its beginning on, so that the free stretches of a chain are the less recent the deeper they lie.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from planner.scheduler import Request

_ENDLESS = 1 << 62
_Key = tuple[str, int]


class Prefix:
    """What a request shares: the first `shared_tokens` with its group, everything with later turns of its conversation.

    `group` and `conversation` are -1 where there is none. `held` are the blocks it holds of each chain, counted from
    the beginning of the prompt; 0 while it is not admitted. `cached_tokens` of it were found when it was first
    admitted.
    """

    __slots__ = ("cached_tokens", "conversation", "group", "held", "segments")

    def __init__(self, group: int, shared_tokens: int, conversation: int) -> None:
        self.group, self.conversation = group, conversation
        segments: list[tuple[_Key, int, int]] = []
        if group >= 0:
            segments.append((("group", group), 0, shared_tokens))
        if conversation >= 0:
            segments.append((("conversation", conversation), shared_tokens, _ENDLESS))
        self.segments = segments
        self.held = [0] * len(segments)
        self.cached_tokens = 0

    def forget(self) -> None:
        """Hold nothing: the rank is gone, and its cache with it."""
        self.held = [0] * len(self.segments)


class _Stretch:
    """Blocks `start` to `stop` of `chain` that no running request holds; without a chain, blocks nobody will find."""

    __slots__ = ("chain", "stamp", "start", "stop")

    def __init__(self, chain: _Chain | None, start: int, stop: int, stamp: int) -> None:
        self.chain, self.start, self.stop, self.stamp = chain, start, stop, stamp


class _Chain:
    """Blocks `base` to `stop` of a prompt that are in the pool; `holds` counts the running requests by where they end.

    `free` are the stretches nobody holds, shallowest and most recent first.
    """

    __slots__ = ("base", "free", "holds", "key", "stop")

    def __init__(self, key: _Key, base: int) -> None:
        self.key, self.base, self.stop = key, base, base
        self.holds: dict[int, int] = {}
        self.free: list[_Stretch] = []

    @property
    def held(self) -> int:
        """Where the longest hold ends."""
        return max(self.holds, default=self.base)

    def hold(self, stop: int) -> None:
        """Count a hold up to `stop`."""
        self.holds[stop] = self.holds.get(stop, 0) + 1

    def leave(self, stop: int) -> None:
        """Take back a hold up to `stop`."""
        self.holds[stop] -= 1
        if not self.holds[stop]:
            del self.holds[stop]


class PrefixCache:
    """Cache of a rank with blocks of `block_tokens`; the rank counts `cached` blocks among its free ones.

    `found_tokens` adds up the prompt tokens that admitted requests found since it was last read.
    """

    __slots__ = ("_chains", "_order", "_stamp", "block_tokens", "cached", "found_tokens")

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.cached = 0
        self.found_tokens = 0
        self._chains: dict[_Key, _Chain] = {}
        self._order: OrderedDict[int, _Stretch] = OrderedDict()
        self._stamp = 0

    def held_blocks(self, request: Request, free_blocks: int) -> int:
        """Blocks `request` would find that running requests hold: it needs no room for them."""
        if request.prefix is None:
            return 0
        self._shrink(free_blocks)
        hit, held = self._hit_blocks(request), 0
        for key, base_tokens, end_tokens in request.prefix.segments:
            chain = self._chains.get(key)
            if chain is not None:
                own = min(hit, chain.held, end_tokens // self.block_tokens)
                held += max(0, own - base_tokens // self.block_tokens)
        return held

    def admit(self, request: Request) -> None:
        """Let `request` hold what it finds; its prefill starts behind it. Follows `held_blocks` at once."""
        prefix = request.prefix
        if prefix is None:
            return
        hit = self._hit_blocks(request)
        for position, (key, _, end_tokens) in enumerate(prefix.segments):
            chain = self._chains.get(key)
            stop = min(hit, end_tokens // self.block_tokens)
            if chain is not None and stop > chain.base:
                self._touch(chain, stop)
                chain.hold(stop)
                prefix.held[position] = stop
        request.computed = hit * self.block_tokens
        if request.admitted_s != request.admitted_s:
            prefix.cached_tokens = request.computed
        self.found_tokens += request.computed

    def publish(self, request: Request, tokens: int) -> None:
        """Let others find the first `tokens` of `request`, as far as it shares them.

        Blocks that another request has made known meanwhile stay its own: a second copy, as in vLLM.
        """
        prefix = request.prefix
        if prefix is None:
            return
        full = tokens // self.block_tokens
        for position, (key, base_tokens, end_tokens) in enumerate(prefix.segments):
            base, stop = base_tokens // self.block_tokens, min(full, end_tokens // self.block_tokens)
            before = max(prefix.held[position], base)
            chain = self._chains.get(key)
            if stop <= before or (chain is not None and chain.stop != before):
                continue
            if chain is None:
                chain = self._chains[key] = _Chain(key, base)
            chain.stop = stop
            chain.hold(stop)
            if prefix.held[position]:
                chain.leave(before)
            prefix.held[position] = stop

    def release(self, request: Request, tokens: int, free_blocks: int) -> int:
        """Leave the blocks of `request`, whose first `tokens` are computed, to the cache.

        `free_blocks` is the count before. Returns how many of its blocks other running requests go on holding.
        """
        self._shrink(free_blocks)
        self.publish(request, tokens)
        own, kept = tokens // self.block_tokens, 0
        left: list[tuple[_Chain, int, int]] = []
        if request.prefix is not None:
            for position, (key, _, _) in enumerate(request.prefix.segments):
                stop = request.prefix.held[position]
                if not stop:
                    continue
                chain = self._chains[key]
                chain.leave(stop)
                request.prefix.held[position] = 0
                held = chain.held
                own -= stop - chain.base
                kept += min(stop, held) - chain.base
                if stop > held:
                    left.append((chain, held, stop))
        if own:
            self._append(None, 0, own)
        for chain, start, stop in reversed(left):
            chain.free.insert(0, self._append(chain, start, stop))
        return kept

    def _hit_blocks(self, request: Request) -> int:
        hit, most = 0, (request.target - 1) // self.block_tokens
        assert request.prefix is not None
        for key, _, end_tokens in request.prefix.segments:
            end = end_tokens // self.block_tokens
            chain = self._chains.get(key)
            if chain is not None:
                hit = max(hit, min(chain.stop, end, most))
            if hit < end:
                break
        return hit

    def _append(self, chain: _Chain | None, start: int, stop: int) -> _Stretch:
        self._stamp += 1
        stretch = self._order[self._stamp] = _Stretch(chain, start, stop, self._stamp)
        self.cached += stop - start
        return stretch

    def _touch(self, chain: _Chain, stop: int) -> None:
        """Blocks of `chain` up to `stop` are held again."""
        while chain.free and chain.free[0].start < stop:
            stretch = chain.free[0]
            taken = min(stop, stretch.stop) - stretch.start
            stretch.start += taken
            self.cached -= taken
            if stretch.start == stretch.stop:
                del self._order[stretch.stamp]
                chain.free.pop(0)

    def _shrink(self, free_blocks: int) -> None:
        """Forget the least recent blocks until `free_blocks` hold the rest; the deepest of a chain first."""
        while self.cached > free_blocks:
            stamp, stretch = next(iter(self._order.items()))
            lost = min(self.cached - free_blocks, stretch.stop - stretch.start)
            self.cached -= lost
            stretch.stop -= lost
            chain = stretch.chain
            if chain is not None:
                chain.stop = stretch.stop
            if stretch.start == stretch.stop:
                del self._order[stamp]
                if chain is not None:
                    chain.free.pop()
                    if chain.stop == chain.base:
                        del self._chains[chain.key]
