"""Which requests share a batch, when it starts, and what becomes of them: with workers that only pretend."""

import asyncio

import numpy as np
import pytest

from skimtvm.errors import Overloaded, ServingError
from skimtvm.report import TensorSpec
from skimtvm.serve.batching import Scheduler
from skimtvm.serve.protocol import InferRequest, OutputRequest
from skimtvm.serve.signature import Signature, Slot, slot_bytes

SPECS = (TensorSpec("x", (4, 2), "float32"),), (TensorSpec("y", (4, 2), "float32"),)
ROWS = Signature("m", "p", *SPECS, (2, 4), True)
FIXED = Signature("m", "p", *SPECS, (1,), False)


class Worker:
    """Two slots; ``finish`` doubles the oldest batch."""

    def __init__(self, signature):
        self.slots = [Slot(signature, memoryview(bytearray(slot_bytes(signature)))) for _ in range(2)]
        self.busy, self.batches = {}, []

    def free_slot(self):
        return next((k for k in range(2) if k not in self.busy), None)

    def start(self, slot, batch, work):
        self.busy[slot] = work
        self.batches.append(batch)
        for source, target in zip(self.slots[slot].inputs(batch), self.slots[slot].outputs(batch), strict=True):
            target[...] = 2 * source


class Pool:
    def __init__(self, *workers):
        self.workers = dict(enumerate(workers))

    def idle(self):
        return next((w for w in self.workers.values() if not w.busy), None)

    def with_room(self):
        return next((w for w in self.workers.values() if w.free_slot() is not None), None)

    def arm(self, worker):
        pass

    def finish(self, worker, failure=None):
        slot = next(iter(worker.busy))
        self.on_result(worker.busy[slot], worker.slots[slot], failure, 0.0)
        del worker.busy[slot]
        self.on_free()

    def die(self, index):
        worker = self.workers.pop(index)
        lost, worker.busy = list(worker.busy.values()), {}
        self.on_lost(lost)


def request(value, rows=1, signature=ROWS):
    array = np.full(signature.shape(signature.inputs[0], rows), value, np.float32)
    return InferRequest(None, rows, (array,), (OutputRequest(0, True),))


def scheduler(pool, signature=ROWS, limit=100, max_delay=0.0):
    return Scheduler(pool, signature, limit=limit, max_delay=max_delay)


async def submit(s, *requests):
    tasks = [asyncio.ensure_future(s.run(r)) for r in requests]
    await asyncio.sleep(0)
    return tasks


async def results(tasks):
    return [(await t)[0].tolist() for t in tasks]


def test_waiting_requests_share_the_next_batch():
    async def main():
        worker = Worker(ROWS)
        pool = Pool(worker)
        s = scheduler(pool)
        first = await submit(s, request(1))
        assert worker.batches == [2] and s.queued == 0  # at once, padded to the smallest batch
        rest = await submit(s, request(2), request(3, rows=2))
        assert s.queued == 2 and len(worker.batches) == 1  # not full: open for as long as the worker is busy
        pool.finish(worker)
        assert worker.batches == [2, 4] and s.queued == 0
        assert worker.slots[next(iter(worker.busy))].inputs(4)[0].tolist() == [[2, 2], [3, 3], [3, 3], [0, 0]]
        pool.finish(worker)
        assert await results(first + rest) == [[[2, 2]], [[4, 4]], [[6, 6], [6, 6]]]

    asyncio.run(main())


def test_a_full_batch_follows_in_the_second_slot():
    async def main():
        worker = Worker(ROWS)
        pool = Pool(worker)
        s = scheduler(pool)
        tasks = await submit(s, *(request(k) for k in range(12)))
        # The first went alone, the next four are ready to follow, the others wait.
        assert worker.batches == [2, 4] and s.queued == 7
        while worker.busy:
            pool.finish(worker)
        assert await results(tasks) == [[[2 * k] * 2] for k in range(12)]
        assert worker.batches == [2, 4, 4, 4]

    asyncio.run(main())


def test_first_come_first_served_even_if_a_later_one_would_fit():
    async def main():
        worker = Worker(ROWS)
        pool = Pool(worker)
        s = scheduler(pool)
        tasks = await submit(s, request(0), request(1, rows=3), request(2, rows=2), request(3))
        pool.finish(worker)
        assert [p.request.rows for p in next(iter(worker.busy.values()))] == [3]
        while worker.busy:
            pool.finish(worker)
        assert [len(r) for r in await results(tasks)] == [1, 3, 2, 1]

    asyncio.run(main())


def test_delay_holds_a_batch_open_until_it_is_full_or_old():
    async def main():
        worker = Worker(ROWS)
        pool = Pool(worker)
        s = scheduler(pool, max_delay=30.0)
        tasks = await submit(s, *(request(k) for k in range(3)))
        assert not worker.batches
        tasks += await submit(s, request(3))
        assert worker.batches == [4]
        pool.finish(worker)
        await results(tasks)
        s.max_delay = 0.01
        late = await submit(s, request(9))
        assert len(worker.batches) == 1
        await asyncio.sleep(0.05)
        assert worker.batches == [4, 2]
        pool.finish(worker)
        assert await results(late) == [[[18, 18]]]

    asyncio.run(main())


def test_without_row_axis_each_request_runs_alone():
    async def main():
        workers = Worker(FIXED), Worker(FIXED)
        pool = Pool(*workers)
        s = scheduler(pool, FIXED, max_delay=30.0)
        tasks = await submit(s, *(request(k, signature=FIXED) for k in range(3)))
        assert [w.batches for w in workers] == [[1, 1], [1]] and s.queued == 0
        for worker in workers:
            while worker.busy:
                pool.finish(worker)
        assert await results(tasks) == [[[2 * k] * 2] * 4 for k in range(3)]

    asyncio.run(main())


def test_a_request_that_goes_away_leaves_the_queue():
    async def main():
        worker = Worker(ROWS)
        pool = Pool(worker)
        s = scheduler(pool)
        running, waiting = await submit(s, request(1), request(2))
        for task in (running, waiting):
            task.cancel()
        await asyncio.sleep(0)
        assert s.queued == 0
        pool.finish(worker)  # nobody waits for it
        assert len(worker.batches) == 1

    asyncio.run(main())


def test_a_failed_batch_fails_its_requests_only():
    async def main():
        worker = Worker(ROWS)
        pool = Pool(worker)
        s = scheduler(pool)
        bad, good = await submit(s, request(1), request(2))
        pool.finish(worker, "boom")
        pool.finish(worker)
        with pytest.raises(ServingError, match="boom") as caught:
            await bad
        assert caught.value.status == 500
        assert await results([good]) == [[[4, 4]]]

    asyncio.run(main())


def test_requests_of_a_dead_worker_run_again_in_order_and_only_once_more():
    """What a worker was running when it died counts against a request, what waited in its second slot does not."""

    async def main():
        workers = Worker(ROWS), Worker(ROWS)
        pool = Pool(workers[0])
        s = scheduler(pool)
        tasks = await submit(s, *(request(k) for k in range(6)))
        assert [len(batch) for batch in workers[0].busy.values()] == [1, 4]
        pool.die(0)
        assert s.queued == 6
        with pytest.raises(Overloaded, match="no worker"), s.admission():
            pass
        pool.workers[1] = workers[1]
        pool.on_free()
        assert [p.request.inputs[0][0, 0] for batch in workers[1].busy.values() for p in batch] == [0, 1, 2, 3]
        pool.die(1)
        with pytest.raises(ServingError, match="2 workers died"):
            await tasks[0]
        pool.workers[2] = worker = Worker(ROWS)
        pool.on_free()
        assert [p.request.inputs[0][0, 0] for batch in worker.busy.values() for p in batch] == [1, 2, 3, 4]
        pool.finish(worker)
        pool.finish(worker)
        assert await results(tasks[1:]) == [[[2 * k, 2 * k]] for k in range(1, 6)]

    asyncio.run(main())


def test_places_are_bounded_and_come_back():
    async def main():
        s = scheduler(Pool(Worker(ROWS)), limit=2)
        with s.admission(), s.admission():
            with pytest.raises(Overloaded, match="all 2 places") as caught, s.admission():
                pass
            assert caught.value.status == 503 and s.admitted == 2
        with pytest.raises(KeyError), s.admission():
            raise KeyError
        assert s.admitted == 0

    asyncio.run(main())
