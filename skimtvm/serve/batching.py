"""The bounded queue, and the batches that are formed from it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from ..errors import Overloaded, ServingError
from .logs import log
from .pool import Worker, WorkerPool
from .protocol import InferRequest
from .signature import Signature, Slot

ATTEMPTS = 2  # workers that may die under a request before it is given up


@dataclass(eq=False)
class _Pending:
    request: InferRequest
    result: asyncio.Future[list[np.ndarray]]
    since: float = field(default_factory=time.monotonic)
    deaths: int = 0


class Scheduler:
    """Admits at most ``limit`` requests at a time, queues them first come, first served, and runs them in batches.

    A worker with nothing to do gets what there is once the batch is full or its oldest request has waited
    ``max_delay`` seconds; a busy worker gets a second batch only if it is full, so that a batch stays open for as long
    as nobody could run it. ``on_batch(rows, seconds)`` is called for each that has run.
    """

    def __init__(self, pool: WorkerPool, signature: Signature, *, limit: int, max_delay: float) -> None:
        self.pool, self.signature, self.limit, self.max_delay = pool, signature, limit, max_delay
        self.admitted = 0
        self.on_batch: Callable[[int, float], None] = lambda *_: None
        self._queue: deque[_Pending] = deque()
        self._timer: asyncio.TimerHandle | None = None
        pool.on_result, pool.on_lost, pool.on_free = self._result, self._lost, self._pump

    @property
    def queued(self) -> int:
        return len(self._queue)

    def is_queued(self, request: InferRequest) -> bool:
        """Whether ``request`` waits for a worker."""
        return any(pending.request is request for pending in self._queue)

    @contextmanager
    def admission(self) -> Iterator[None]:
        """One request's place, from before its body is read until its answer is sent: this bounds all memory that
        clients can take. Raises Overloaded at once if there is none, or nobody to run the request."""
        if not self.pool.workers:
            raise Overloaded("no worker is ready; try again")
        if self.admitted >= self.limit:
            raise Overloaded(f"all {self.limit} places are taken; try again")
        self.admitted += 1
        try:
            yield
        finally:
            self.admitted -= 1

    async def run(self, request: InferRequest) -> list[np.ndarray]:
        """The outputs of ``request``, only its rows. Raises ServingError; may be cancelled at any time."""
        pending = _Pending(request, asyncio.get_running_loop().create_future())
        self._queue.append(pending)
        self._pump()
        try:
            return await pending.result
        finally:
            if pending in self._queue:
                self._queue.remove(pending)

    def _pump(self) -> None:
        """Give workers what they can take now, and look again when the oldest request has waited long enough."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._queue:
            batch, full = self._head()
            worker = self.pool.idle()
            if worker is None:
                worker = self.pool.with_room() if full else None
                if worker is None:
                    return
            elif not full and (wait := batch[0].since + self.max_delay - time.monotonic()) > 0:
                self._timer = asyncio.get_running_loop().call_later(wait, self._pump)
                return
            for _ in batch:
                self._queue.popleft()
            self._dispatch(worker, batch)

    def _head(self) -> tuple[list[_Pending], bool]:
        """The requests at the head of the queue that fit into one batch, and whether no more would fit."""
        batch: list[_Pending] = []
        rows = 0
        for pending in self._queue:
            if rows + pending.request.rows > self.signature.capacity:
                return batch, True
            batch.append(pending)
            rows += pending.request.rows
        return batch, rows == self.signature.capacity

    def _dispatch(self, worker: Worker, batch: list[_Pending]) -> None:
        slot = worker.free_slot()
        assert slot is not None
        size = self.signature.batch_for(sum(p.request.rows for p in batch))
        for index, target in enumerate(worker.slots[slot].inputs(size)):
            if not self.signature.row_axis:
                target[...] = batch[0].request.inputs[index]
                continue
            row = 0
            for pending in batch:
                target[row : row + pending.request.rows] = pending.request.inputs[index]
                row += pending.request.rows
            target[row:] = 0
        worker.start(slot, size, batch)
        self.pool.arm(worker)

    # ---- what the workers report ---------------------------------------------------------------------------------

    def _result(self, batch: list[_Pending], slot: Slot, failure: str | None, seconds: float) -> None:
        rows = sum(p.request.rows for p in batch)
        if failure is not None:
            log("batch failed", level=logging.ERROR, rows=rows, reason=failure)
        self.on_batch(rows, seconds)
        outputs = slot.outputs(self.signature.batch_for(rows))
        row = 0
        for pending in batch:
            end = row + pending.request.rows
            if pending.result.done():
                pass  # timed out, or its client has gone
            elif failure is not None:
                pending.result.set_exception(ServingError(f"the model failed on this batch: {failure}"))
            else:
                chosen = [array[row:end] if self.signature.row_axis else array for array in outputs]
                pending.result.set_result([array.copy() for array in chosen])
            row = end

    def _lost(self, batches: list[list[_Pending]]) -> None:
        """Put the requests of a worker that died back at the head of the queue, in their order.

        Only its first batch had begun: the others waited in their slots and cannot be what killed it.
        """
        for pending in batches[0] if batches else []:
            pending.deaths += 1
        for pending in reversed([p for batch in batches for p in batch]):
            if pending.result.done():
                continue
            if pending.deaths < ATTEMPTS:
                self._queue.appendleft(pending)
            else:
                pending.result.set_exception(ServingError(f"{ATTEMPTS} workers died while they ran this request"))
        self._pump()
