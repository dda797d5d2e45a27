"""One gate for all requests to a server: how many are in flight, how fast they go out, and when all of them wait.

A server that has had enough has had enough of all of us, not of one request. After such an answer nobody asks for as
long as the server says, half as many requests are in flight, and they leave at a pace. The pace at which it was too
much is remembered: the next one is a little below, and creeps up from there. So a server that grants 4 requests a
second gets nearly 4, whether it counts by the second or by the minute, and whether or not it says how long to wait.
"""

import asyncio
import math
import random

FAST = 1.15  # the pace grows so much with each answer, until it is too much for the first time
CREEP = 0.004  # from then on by this share in a second, half as fast each time the limit proves to be known
QUIET = 25.0  # seconds without a limit; then it creeps twice as fast, after 75 ten times: the limit may be another
FEW, MANY = 8, 32  # answers since the last limit
# What is left of the pace after a limit: soon (or the first one), later, and after many answers. Those after many may
# come of two requests that arrived together, which no other pace would prevent.
SLOWEST, SLOWER, SLOW = 0.82, 0.9, 0.96
SHORT = 0.02  # seconds; pauses that short, three in a row, cost nothing: the pace grows with them
LONGEST_WAIT = 60.0  # seconds, where the server does not say


class Stopped(Exception):
    """The run is ending; this request was waiting to be sent and is given up."""


class Place:
    """A request on its way. It tells how it went: `succeeded`, `limited`, or nothing where it failed otherwise."""

    def __init__(self, gate: "Gate", again: bool):
        self.gate, self.again, self.sent = gate, again, 0.0

    async def __aenter__(self) -> "Place":
        await self.gate.enter(self.again)
        self.sent = asyncio.get_running_loop().time()
        return self

    async def __aexit__(self, *exception) -> None:
        self.gate.leave()

    def succeeded(self) -> None:
        self.gate.count_success(self.sent)

    def limited(self, seconds: float | None) -> None:
        """The server takes no more for so many seconds; None where it does not say for how long."""
        self.gate.count_limit(self.sent, seconds)


class Gate:
    """`async with gate.place() as place:` around each request; raises Stopped once `stopping` is set."""

    def __init__(self, sleep_time: float = 2.0):
        self.stopping = asyncio.Event()
        self.sleep_time = sleep_time  # seconds to the next request, where the server does not say
        self.limits_in_a_row = 0  # with no answer between them; of requests that were under way together one counts
        self.in_flight = 0
        self.most = math.inf  # in flight
        self.pace = math.inf  # requests a second
        self.too_much = math.inf  # requests a second at which the server last had enough
        self.creep = CREEP
        self.open_at = 0.0  # when the pause ends, by the event loop's clock
        self.latency = 0.0  # seconds that an answer takes, about
        self._next = 0.0  # when the next request may leave
        self._limited_at: float | None = None  # when the server last had enough, until requests leave again
        self._begun: float | None = None  # when requests began to leave, since it last had enough
        self._sent = self._refused = 0  # since then
        self._pauses = [math.inf] * 3  # seconds, the last ones
        self._grown_at = 0.0
        self._steady = False  # whether many answers had come before the last limit
        self._turns = asyncio.Lock(), asyncio.Lock()  # of new requests, and of those that come again
        self._again = 0  # how many come again
        self._changed = asyncio.Event()

    def place(self, again: bool = False) -> Place:
        """`again`: the request has met a rate limit, and goes before those that have not been sent yet."""
        return Place(self, again)

    async def enter(self, again: bool) -> None:
        now = asyncio.get_running_loop().time
        self._again += again
        try:
            async with self._turns[again]:  # first come, first served
                while not self.stopping.is_set():
                    self._changed.clear()
                    if self.in_flight >= self.most or (self._again and not again):
                        await self._wait(1.0)
                    elif (ready := max(self.open_at, self._next)) > now():
                        await self._wait(ready - now())
                    else:
                        break
                else:
                    raise Stopped
                if self._limited_at is not None:
                    self.choose_pace(now())
                if self._begun is None:
                    self._begun = self._grown_at = now()
                self.in_flight += 1
                self._sent += 1
                self._next = max(now(), self._next) + 1 / self.pace
        finally:
            self._again -= again
            self._changed.set()

    def leave(self) -> None:
        self.in_flight -= 1
        self._changed.set()

    async def _wait(self, seconds: float) -> None:
        """Until something changes, but no longer than this."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self._changed, self.stopping)]
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def count_success(self, sent: float) -> None:
        """The pace grows, and so does what may be in flight."""
        now = asyncio.get_running_loop().time()
        self.latency += (now - sent - self.latency) * (0.2 if self.latency else 1.0)
        self.limits_in_a_row = 0
        if self._limited_at is not None or sent < self._begun:
            return
        if self.too_much == math.inf:
            self.pace *= FAST
        else:
            quiet = (now - self._begun) / QUIET
            self.pace *= math.exp(self.creep * (1 + quiet**2) * min(1.0, now - self._grown_at))
        self._grown_at = now
        self.most += 1 / self.most if self.most > 2 * self.pace * self.latency else 1

    def count_limit(self, sent: float, seconds: float | None) -> None:
        """Everybody waits, and half as many go on; once for all requests that were under way together."""
        now = asyncio.get_running_loop().time()
        if self._limited_at is not None or sent < self._begun:
            # It left before we knew. What the server says of the time holds all the same.
            self._refused += self._limited_at is not None
            self.open_at = max(self.open_at, now + (seconds or 0.0))
            return
        self._limited_at = now
        self._refused += 1
        self.limits_in_a_row += 1
        backoff = self.sleep_time * 2 ** max(0, self.limits_in_a_row - (1 if seconds is None else 3))
        backoff = min(LONGEST_WAIT, backoff) * random.uniform(0.5, 1.0)
        if seconds is None or self.limits_in_a_row > 2:  # a server that has been wrong twice is not believed
            seconds = max(seconds or 0.0, backoff)
        self.open_at = max(self.open_at, now + seconds)
        self._pauses = [*self._pauses[1:], seconds]
        self._next = now  # the next one leaves as soon as the pause ends
        self.most = max(1, math.ceil(self.in_flight / 2))

    def choose_pace(self, now: float) -> None:
        """As requests leave again: not below what the server has granted since they last did, pause included."""
        passed = self._sent - self._refused
        if passed > 0:  # or else the pause was too short, which says nothing of the pace
            granted = passed / (now - self._begun)
            self.most = max(self.most, math.ceil(granted * self.latency))  # what that pace needs (Little's law)
            if (pause := max(self._pauses)) < SHORT:
                self.pace = max(granted, min(self.pace * FAST, 1 / max(pause, 1e-3)))
            elif self.pace == math.inf:
                self.pace = granted
            else:
                soon = self.too_much == math.inf or (passed < FEW and not self._steady)
                down = SLOWEST if soon else SLOW if passed >= MANY or self._steady else SLOWER
                known = 1 / 1.15 < self.pace / self.too_much < 1.15
                self.creep = max(CREEP / 8, self.creep / 2) if known else CREEP
                self.too_much = self.pace
                self.pace = max(granted, self.pace * down)
                self._steady = passed >= MANY
        self._limited_at = self._begun = None
        self._sent = self._refused = 0
        self._next = now
