"""Which requests run in the next step, in plain Python.

Prompts are computed in chunks, in the same steps in which other requests decode. A request is
admitted when the pool holds its prompt and what the running ones are expected to need. Where that
was too hopeful, the youngest is retracted: it goes back to waiting, and is computed again. The
oldest is never retracted, so that somebody always gets on.
"""

import itertools
import logging
from typing import Literal

import msgspec

from jaxserve.admission import OutputEstimate
from jaxserve.errors import QueueFull
from jaxserve.live_request import Chunk, LiveRequest, PageCopy, Schedule
from jaxserve.page_allocator import PageAllocator
from jaxserve.radix_cache import Match, RadixCache
from jaxserve.request import FinishReason, Logprobs, Request, RequestUpdate
from jaxserve.step_plan import NOT_FINITE
from jaxserve.step_result import StepResult
from jaxserve.stop_checker import StopChecker

logger = logging.getLogger(__name__)
LOOKAHEAD = 32  # tokens: rows get pages for so many at once, so that they rarely need any
LEAST_SHARED = 32  # tokens: fewer are sooner computed twice than waited for
MOST_PASSED_OVER = 1024  # requests in a step
MOST_MATCHED_WAITING = 128  # beyond so many, lpm does not look prefixes up

Policy = Literal["fcfs", "lpm"]


class Scheduler:
    def __init__(
        self,
        allocator: PageAllocator,
        cache: RadixCache | None,
        *,
        page_size: int,
        max_rows: int,
        max_prefill_tokens: int,
        may_chunk: bool = True,
        num_decode_steps: int = 1,
        policy: Policy = "fcfs",
        max_waiting: int | None = None,
        conservativeness: float = 1.0,
        least_shared: int = LEAST_SHARED,
    ):
        """Without a cache, no request uses what another has computed.

        Args:
          may_chunk: a prompt may take several steps. Where it may not, none has more tokens than
            `max_prefill_tokens`.
          num_decode_steps: in one dispatch, while no prompt is being computed.
          max_waiting: requests beyond which new ones are refused.
          least_shared: tokens for which a request waits for somebody else to compute them.
        """
        self.allocator, self.cache = allocator, cache
        self.max_rows = max_rows
        self.waiting: list[LiveRequest] = []
        self.held: list[LiveRequest] = []  # came after `hold`: not to be admitted before `release`
        self.running: list[LiveRequest] = []  # in order of admission
        self.num_retractions = 0
        self._page_size, self._max_prefill_tokens = page_size, max_prefill_tokens
        self._may_chunk = may_chunk
        self._num_decode_steps, self._policy = num_decode_steps, policy
        self._max_waiting, self._least_shared = max_waiting, least_shared
        self._estimate = OutputEstimate(conservativeness)
        self._is_holding = False
        self._free_rows = list(range(max_rows - 1, -1, -1))
        self._by_rid: dict[str, LiveRequest] = {}
        self._changed: dict[LiveRequest, None] = {}  # with other pages than the device knows
        self._arrivals = itertools.count()

    # What callers ask for.

    def add(self, request: Request, stop_checker: StopChecker) -> None:
        """Raises ValueError where the pool could never hold the request, or its id is taken;
        QueueFull where too many are waiting."""
        if self._pages_for(self._most_tokens(request)) > self.allocator.num_pages - 1:
            raise ValueError(f"{request.rid} needs more pages than the KV cache has")
        if request.rid in self._by_rid:
            raise ValueError(f"Duplicate request ID detected: {request.rid}")
        num_waiting = len(self.waiting) + len(self.held)
        if self._max_waiting is not None and num_waiting >= self._max_waiting:
            raise QueueFull
        live = LiveRequest(
            request, stop_checker, next(self._arrivals), tokens=list(request.prompt_ids)
        )
        self._by_rid[request.rid] = live
        (self.held if self._is_holding else self.waiting).append(live)

    def abort(self, rid: str, reason: FinishReason | None = None) -> RequestUpdate | None:
        """Ends the request; None where it is not known, which is no error: it may have finished."""
        live = self._by_rid.get(rid)
        if live is None:
            return None
        if live.row >= 0:
            return self._end(live, [], reason or FinishReason("abort", message="Aborted"))
        (self.waiting if live in self.waiting else self.held).remove(live)
        del self._by_rid[rid]
        words = "Abort in waiting queue"
        return self._news(live, [], reason or FinishReason("abort", message=words))

    def abort_all(self, reason: FinishReason | None = None) -> list[RequestUpdate]:
        return [self.abort(rid, reason) for rid in list(self._by_rid)]

    def hold(self) -> None:
        """What comes from now on is not admitted before `release`."""
        self._is_holding = True

    def release(self) -> None:
        self._is_holding = False
        self.waiting += self.held
        self.held = []

    def schedule(self) -> Schedule | None:
        """The next step, or None where there is nothing to dispatch: what is in flight must be
        read first, or nobody is here."""
        self._make_room()
        admitted, copies = self._admit()
        changed = [live for live in self._changed if live.row >= 0 and live not in admitted]
        self._changed = {}
        is_decode = all(live.is_decoding for live in self.running)
        num_steps = self._num_decode_steps if is_decode else 1
        decode = self._decode_chunks(num_steps)  # before prompts, whose last chunks sample too
        prefill = self._prefill_chunks()
        if not decode and not prefill:
            return None
        if decode:
            self._estimate.on_decode()
        return Schedule(
            chunks=decode + prefill,
            num_steps=num_steps,
            new_rows=admitted,
            changed_rows=changed,
            copies=copies,
            num_cached_tokens=sum(live.num_matched for live in admitted),
        )

    def update(self, schedule: Schedule, result: StepResult) -> list[RequestUpdate]:
        """Takes in what a step has drawn and scored."""
        updates, num_scores, num_packed = [], 0, 0
        for chunk in schedule.chunks:
            first_score, num_scores = num_scores, num_scores + chunk.num_scores
            first_token, num_packed = num_packed, num_packed + chunk.num_packed
            if chunk.is_stale:
                continue
            try:
                expert_ids = self._take_experts(chunk, first_token, result)
                update = self._take_in(chunk, first_score, result)
                if expert_ids:
                    update = update or self._news(chunk.live, [])
                    update = msgspec.structs.replace(update, expert_ids=expert_ids)
            except Exception as error:  # of its text, say: nobody else's concern
                logger.exception("%s ends", chunk.live.request.rid)
                reason = FinishReason.internal_error(f"{type(error).__name__}: {error}")
                update = self._end(chunk.live, [], reason)
            if update is not None:
                updates.append(update)
        return updates

    def retract_all(self, *, keep: bool = False) -> None:
        """Nothing on the device is to be trusted any more, unless `keep` says so."""
        for live in list(self.running):
            self._retract(live, keep=keep)
        if self.cache is not None and not keep:
            self.cache.reset()

    def change_weights(self) -> None:
        """To be called with no step in flight. What was computed until now is matched no more, and
        what is running goes on with it but leaves nothing to the cache."""
        for live in self.running:
            live.is_mixed = live.num_computed > 0
        if self.cache is not None:
            self.cache.forget()

    def flush(self) -> bool:
        """Empties the prefix cache; False, and nothing done, unless all is idle."""
        if self._by_rid:
            return False
        if self.cache is not None:
            self.cache.reset()
        return True

    @property
    def num_tokens_in_rows(self) -> int:
        """Tokens of running requests whose keys and values are in the cache."""
        return sum(live.num_committed for live in self.running)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens that waiting requests have to compute, but for what is cached."""
        return sum(len(live.tokens) for live in (*self.waiting, *self.held))

    @property
    def oldest(self) -> LiveRequest | None:
        """The one that nobody keeps from getting on."""
        return min(self.running or self.waiting, key=lambda live: live.order, default=None)

    @property
    def is_idle(self) -> bool:
        return not self._by_rid

    @property
    def is_quiet(self) -> bool:
        """Nobody is here but those held."""
        return len(self._by_rid) == len(self.held)

    def check_integrity(self) -> None:
        self.allocator.check_integrity()
        private = [page for live in self.running for page in live.pages[live.num_shared :]]
        cached = 0
        if self.cache is not None:
            self.cache.check_integrity()
            cached = self.cache.total_pages
        assert len(set(private)) == len(private), "each page has one owner"
        assert len(private) + cached == self.allocator.num_used, "no page is lost"
        rows = [live.row for live in self.running] + self._free_rows
        assert sorted(rows) == list(range(self.max_rows)), "each row has one owner"
        assert len(self._by_rid) == len(self.waiting) + len(self.held) + len(self.running)
        for live in self.running:
            assert live.num_computed <= len(live.pages) * self._page_size

    # Decoding.

    def _make_room(self) -> None:
        """Pages for the next tokens of every decoding row, oldest first."""
        for live in sorted(self.running, key=lambda live: live.order):
            if not live.is_decoding or live.num_left <= 0:
                continue
            while live.row >= 0 and not self._grow(live):
                self._retract(max(self.running, key=lambda live: live.order))

    def _grow(self, live: LiveRequest) -> bool:
        """False where there are not enough pages."""
        needed = live.num_computed + min(self._num_decode_steps, live.num_left)
        missing = self._pages_for(needed) - len(live.pages)
        if missing <= 0:
            return True
        wanted = min(needed + LOOKAHEAD, self._most_tokens(live.request))
        # What lies ahead is taken from free pages only: nobody's cache goes for it.
        pages = self.allocator.allocate(self._pages_for(wanted) - len(live.pages))
        if pages is None:
            self._evict_for(missing)
            pages = self.allocator.allocate(missing)
        if pages is None:
            return False
        live.pages += pages
        self._changed[live] = None
        return True

    def _decode_chunks(self, num_steps: int) -> list[Chunk]:
        chunks = []
        for live in self.running:
            if not live.is_decoding or live.num_left <= 0:
                continue
            count = min(num_steps, live.num_left)
            start = live.num_computed
            live.num_computed += count
            live.num_inflight += count
            chunks.append(Chunk(live, live.epoch, [], count, start))
        return chunks

    # Prompts.

    def _admit(self) -> tuple[list[LiveRequest], list[PageCopy]]:
        admitted, copies, passed_over = [], [], []
        if not self.running:
            self._estimate.on_idle()
        self._sort_waiting()
        while self.waiting and self._free_rows:
            may_pass = len(passed_over) < MOST_PASSED_OVER
            if may_pass and self.waits_for_prompt(self.waiting[0]):
                passed_over.append(self.waiting.pop(0))
                continue
            copy = self._try_to_admit(self.waiting[0])
            if copy is None:
                break
            live = self.waiting.pop(0)
            live.row = self._free_rows.pop()
            self.running.append(live)
            admitted.append(live)
            if copy.num_tokens:
                copies.append(copy)
        self.waiting[:0] = passed_over
        return admitted, copies

    def waits_for_prompt(self, live: LiveRequest) -> bool:
        """Whether a waiting request had better not be admitted yet: somebody is computing a prompt
        that will save it half of its work. So it is with samples of one prompt, and with questions
        about one text, that come together."""
        if self.cache is None:
            return False
        if live.waits_for is not None:  # prompts are long: they are compared once
            other, epoch = live.waits_for
            if other.epoch == epoch and self._num_to_share(other):
                return True
        found = (other for other in self.running if self._saves_half(other, live))
        other = next(found, None)
        live.waits_for = other and (other, other.epoch)
        return other is not None

    def _saves_half(self, other: LiveRequest, live: LiveRequest) -> bool:
        # What the one found in the cache, the other will find there too.
        cached, tokens = other.num_matched, live.tokens
        wanted = cached + max(self._least_shared, (len(tokens) - cached) // 2)
        return (
            wanted <= min(self._num_to_share(other), live.most_matched)
            and other.request.namespace == live.request.namespace
            and tokens[: self._least_shared] == other.tokens[: self._least_shared]
            and tokens[:wanted] == other.tokens[:wanted]
        )

    def _num_to_share(self, live: LiveRequest) -> int:
        """Tokens that others will find in the cache once its prompt is computed, and do not yet."""
        num_full = live.prefill_len // self._page_size
        return 0 if live.is_mixed or num_full == live.num_shared else num_full * self._page_size

    def _sort_waiting(self) -> None:
        if len(self.waiting) < 2 or not self._free_rows:
            return
        lpm = self._policy == "lpm" and self.cache is not None
        if lpm and len(self.waiting) <= MOST_MATCHED_WAITING:
            matched = {
                id(live): self.cache.match_prefix(
                    live.tokens, namespace=live.request.namespace
                ).num_tokens
                for live in self.waiting
            }
            self.waiting.sort(
                key=lambda live: (-live.request.priority, -matched[id(live)], live.arrival)
            )
        else:
            self.waiting.sort(key=lambda live: live.order)

    def _try_to_admit(self, live: LiveRequest) -> PageCopy | None:
        """Gives a request its pages, those of the cache among them; None where they lack."""
        match = self._match(live)
        missing = self._pages_for(len(live.tokens)) - len(match.pages)
        expected = sum(self._estimate.tokens_to_come(one) for one in (*self.running, live))
        fresh = None
        if not self.running or missing + self._pages_for(expected) <= self._num_available:
            self._evict_for(missing)
            fresh = self.allocator.allocate(missing)
        if fresh is None:
            if self.cache is not None:
                self.cache.unlock(match.node)
            return None
        live.node, live.num_shared = match.node, len(match.pages)
        live.pages = match.pages + fresh
        live.num_matched = live.num_computed = match.num_tokens
        live.prefill_len = len(live.tokens)
        live.next_score = live.num_scored
        if live.cached_tokens is None:
            live.cached_tokens = match.num_tokens
        return PageCopy(match.donor_page, fresh[0], match.donor_tokens)

    def _match(self, live: LiveRequest) -> Match:
        """What of a request is cached, locked. At least one token is left to compute."""
        if self.cache is None:
            return Match(node=None, pages=[], num_tokens=0)
        match = self.cache.match_prefix(
            live.tokens, namespace=live.request.namespace, most=live.most_matched
        )
        self.cache.lock(match.node)
        return match

    def _share_prefix(self, live: LiveRequest) -> None:
        """Lets others use the full pages of a prompt as soon as it is known to be sound."""
        if self.cache is None or live.is_mixed:
            return
        num_full = live.prefill_len // self._page_size
        if num_full == live.num_shared:
            return
        shared = self.cache.insert(
            live.tokens[: num_full * self._page_size],
            live.pages[:num_full],
            namespace=live.request.namespace,
            is_running=True,
        )
        self.cache.lock(shared.node)
        self.cache.unlock(live.node)
        if shared.pages != live.pages[:num_full]:
            # Somebody was faster with the same tokens: theirs from the next step on, ours are free.
            self._changed[live] = None
        live.node, live.num_shared = shared.node, num_full
        live.pages[:num_full] = shared.pages

    def _prefill_chunks(self) -> list[Chunk]:
        chunks, budget = [], self._max_prefill_tokens
        for live in self.running:
            if live.is_decoding or not budget:
                continue
            start = live.num_computed
            tokens = live.tokens[start : start + budget]
            if not self._may_chunk and len(tokens) < live.prefill_len - start:
                continue  # the oldest of those left out has the whole next step
            budget -= len(tokens)
            live.num_computed += len(tokens)
            num_samples = 0
            if live.is_decoding:  # with this chunk the prompt is complete
                num_samples = 1
                live.num_inflight += 1
            # A token's scores come from the one before it.
            first = live.next_score
            live.next_score = max(first, min(live.num_computed + 1, len(live.request.prompt_ids)))
            scores = first, live.next_score - first
            chunks.append(Chunk(live, live.epoch, tokens, num_samples, start, *scores))
        return chunks

    # The end of a request, and of a stay in a row.

    def _take_in(self, chunk: Chunk, first_score: int, result: StepResult) -> RequestUpdate | None:
        """What a step has done for one request; None where it is no news."""
        live, scored = chunk.live, None
        if chunk.num_scores:
            live.num_scored = chunk.first_score + chunk.num_scores
            scored = result.prompt_logprobs(first_score, chunk.num_scores, live.logprobs)
        if chunk.num_samples:
            if chunk.tokens and result.drawn[0][live.row][1] != NOT_FINITE:
                self._share_prefix(live)
            return self._take(live, chunk.num_samples, result, scored)
        return scored and self._news(live, [], prompt_logprobs=scored)

    @staticmethod
    def _take_experts(chunk: Chunk, first_token: int, result: StepResult) -> bytes:
        """Of the tokens whose experts were not known yet, where anybody wants to know."""
        live = chunk.live
        if live.request.experts_from is None:
            return b""
        chosen = result.experts_of(first_token, chunk.num_packed)
        known = max(live.num_routed - chunk.start, 0)
        live.num_routed = max(live.num_routed, chunk.start + len(chosen))
        return chosen[known:].tobytes()

    def _take(
        self, live: LiveRequest, count: int, result: StepResult, scored: Logprobs | None
    ) -> RequestUpdate:
        """Takes in the tokens that a row has drawn, up to its end."""
        live.num_inflight -= count
        row, request = live.row, live.request
        taken: list[int] = []
        reason, is_sound = None, True
        for step in result.drawn[:count]:
            token, finish = step[row][:2]
            if finish == NOT_FINITE:
                reason = FinishReason.internal_error("the model's scores are not finite")
                is_sound = False
            elif request.max_new_tokens == 0:  # only its prompt was wanted
                reason = FinishReason("length", length=0)
            else:
                live.tokens.append(token)
                taken.append(token)
                reason = live.stop_checker.push(token)
            if reason is not None:
                break
        logprobs = None
        if request.logprobs is not None:
            logprobs = result.drawn_logprobs(row, len(taken), request.logprobs)
        if reason is None:
            return self._news(live, taken, None, logprobs, scored)
        update = self._end(live, taken, reason, logprobs, scored, keep=is_sound)
        if not request.is_pooled or not is_sound:
            return update
        return msgspec.structs.replace(update, embedding=result.embedding(row))

    def _end(
        self,
        live: LiveRequest,
        token_ids: list[int],
        reason: FinishReason,
        logprobs: Logprobs | None = None,
        prompt_logprobs: Logprobs | None = None,
        *,
        keep: bool = True,
    ) -> RequestUpdate:
        self._leave_row(live, keep=keep)
        del self._by_rid[live.request.rid]
        return self._news(live, token_ids, reason, logprobs, prompt_logprobs)

    def _retract(self, live: LiveRequest, *, keep: bool = True) -> None:
        self._leave_row(live, keep=keep)
        live.num_retractions += 1
        self.num_retractions += 1
        live.num_computed = live.num_inflight = live.prefill_len = 0
        self.waiting.insert(0, live)
        self._estimate.on_retract(self.running)

    def _leave_row(self, live: LiveRequest, *, keep: bool) -> None:
        """The one way out of a row. What was computed goes to the cache unless `keep` is false, or
        it is of different weights."""
        self.running.remove(live)
        self._free_rows.append(live.row)
        num_kept = live.num_shared
        if keep and self.cache is not None and not live.is_mixed:
            num_kept = self._pages_for(live.num_committed)
            self.cache.insert(
                live.tokens[: live.num_committed],
                live.pages[:num_kept],
                namespace=live.request.namespace,
            )
        self.allocator.free(live.pages[num_kept:])
        if self.cache is not None:
            self.cache.unlock(live.node)
        live.row, live.pages, live.node, live.num_shared = -1, [], None, 0
        live.is_mixed = False
        live.epoch += 1

    @staticmethod
    def _news(
        live: LiveRequest,
        token_ids: list[int],
        reason: FinishReason | None = None,
        logprobs: Logprobs | None = None,
        prompt_logprobs: Logprobs | None = None,
    ) -> RequestUpdate:
        return RequestUpdate(
            live.request.rid,
            token_ids,
            reason,
            cached_tokens=live.cached_tokens or 0,
            num_retractions=live.num_retractions,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    # Memory.

    @property
    def _num_available(self) -> int:
        evictable = self.cache.evictable_pages if self.cache is not None else 0
        return self.allocator.num_free + evictable

    def _evict_for(self, count: int) -> None:
        """Makes `count` pages free, as far as nobody needs them."""
        missing = count - self.allocator.num_free
        if missing > 0 and self.cache is not None:
            self.cache.evict(missing)

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)

    @staticmethod
    def _most_tokens(request: Request) -> int:
        """That are ever computed: all but the last, which is only sampled."""
        return len(request.prompt_ids) + max(request.max_new_tokens - 1, 0)
