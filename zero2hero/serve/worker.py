"""The thread in which the model runs.

The event loop answers many clients at once because nothing in it takes long; a step of a model does. So one thread owns
the engine and steps it as long as there is something to write, and events come back to the loop, where each goes to the
queue of the answer that waits for it. The thread also imports torch and loads the model, so the server listens before.

    async with aclosing(worker.write(requests)) as events:
        async for number, event in events:   # event.text is what request `number` has just written
            ...

Leaving the block, whether at its end, by an error or because the client has gone, cancels what still runs.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from zero2hero.serve.errors import ApiError, log
from zero2hero.serve.metrics import Metrics

if TYPE_CHECKING:
    from zero2hero.generate import engine as engines

QUEUE_SECONDS, ANSWER_SECONDS = 30, 600  # how long a request waits for its first token, and for its last

T = TypeVar("T")


class Worker:
    """Loads with `load`, then serves; `failure` holds the error that loading ended with."""

    def __init__(self, load: Callable[[], engines.Engine], metrics: Metrics) -> None:
        self._load, self.metrics = load, metrics
        self._engine: engines.Engine | None = None
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._answers: dict[engines.Sequence, tuple[asyncio.Queue, int]] = {}
        self._jobs: deque[tuple[asyncio.Future, Callable[[], Any]]] = deque()
        self._wake = threading.Event()
        self._stopping = False

    # ---------------------------------------------------------------- in the event loop

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after the step that it is in; a model that is still loading is not waited for."""
        self._stopping = True
        self._wake.set()
        if self._engine is not None:
            await asyncio.to_thread(self._thread.join)

    @property
    def engine(self) -> engines.Engine:
        """Raises `ApiError` (503, which clients retry) while there is nothing yet."""
        if self._engine is None:
            raise ApiError(503, "the model is being loaded", code="loading_model", retry_after=1)
        return self._engine

    async def call(self, function: Callable[[], T]) -> T:
        """The result of a function that uses the model; it runs between two steps."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._jobs.append((future, function))
        self._wake.set()
        return await future

    async def write(self, requests: Sequence[engines.Request]) -> AsyncGenerator[tuple[int, engines.Event], None]:
        """Events of these requests with the request's number, until all have ended.

        Raises:
            ApiError: 429, too many requests wait already; 503, this one waited or wrote too long; 500, a step failed.
            UserError: a request that the engine cannot serve.
        """
        sequences = self._submit(requests)
        queue: asyncio.Queue = asyncio.Queue()
        self._answers |= {sequence: (queue, number) for number, sequence in enumerate(sequences)}
        began = self._loop.time()
        last = [began] * len(sequences)

        def late() -> None:
            if all(sequence.read == 0 for sequence in sequences):
                queue.put_nowait(ApiError(503, f"no place was free for {QUEUE_SECONDS} s", retry_after=5))

        too_long = ApiError(503, f"the answer was not complete after {ANSWER_SECONDS} s")
        timers = [
            self._loop.call_later(QUEUE_SECONDS, late),
            self._loop.call_later(ANSWER_SECONDS, queue.put_nowait, too_long),
        ]
        try:
            left = len(sequences)
            while left:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                number, event = item
                self.metrics.wrote(event, last[number], began)
                last[number] = self._loop.time()
                left -= event.finish_reason is not None
                yield number, event
        finally:
            for timer in timers:
                timer.cancel()
            for sequence in sequences:
                if self._answers.pop(sequence, None):
                    self.engine.cancel(sequence)
            self._wake.set()

    def _submit(self, requests: Sequence[engines.Request]) -> list[engines.Sequence]:
        """All or none."""
        from zero2hero.generate.engine import QueueFull

        engine, sequences = self.engine, []
        try:
            for request in requests:
                sequences.append(engine.submit(request))
        except BaseException as error:
            for sequence in sequences:
                engine.cancel(sequence)
            self._wake.set()
            if isinstance(error, QueueFull):
                raise ApiError(429, "too many requests wait already", code="queue_full", retry_after=1) from None
            raise
        self._wake.set()
        return sequences

    def _hand_out(self, events: list[engines.Event]) -> None:
        for event in events:
            queue, number = self._answers.get(event.sequence, (None, 0))
            if queue is not None:
                queue.put_nowait((number, event))
                if event.finish_reason:
                    del self._answers[event.sequence]

    def _fail(self, error: BaseException) -> None:
        """A step failed: what ran in it has ended."""
        log.error("a step of the engine failed", exc_info=error)
        for sequence, (queue, _) in list(self._answers.items()):
            if sequence.finish_reason:
                del self._answers[sequence]
                queue.put_nowait(ApiError(500, "the model failed to write this answer; the server's log says why"))

    # ---------------------------------------------------------------- in the thread

    def _run(self) -> None:
        try:
            self._engine = self._load()
        except BaseException as error:
            self.failure = error
            self._tell(self.on_failure)
            return
        engine = self._engine
        while not self._stopping:
            if self._jobs:  # one, and then a step: nobody waits for all of them
                self._do(*self._jobs.popleft())
            if not (engine.running or engine.waiting):
                if not self._jobs:
                    self._wake.wait()
                    self._wake.clear()
                continue
            try:
                events = engine.step()
            except Exception as error:
                self._tell(self._fail, error)
            else:
                if events:
                    self._tell(self._hand_out, events)

    def _do(self, future: asyncio.Future, function: Callable[[], Any]) -> None:
        def finish(result: Any, error: BaseException | None) -> None:
            if not future.done():  # nobody waits any more
                future.set_exception(error) if error else future.set_result(result)

        try:
            self._tell(finish, function(), None)
        except Exception as error:
            self._tell(finish, None, error)

    def _tell(self, function: Callable[..., None], *arguments: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)
