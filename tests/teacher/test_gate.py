"""The gate: what a server grants is what it gets, by a simulated clock; and rate limits in whole runs, over sockets."""

import asyncio
import random
import time

import pytest

from alpaca.common import ExitCode
from alpaca.teacher.gate import Gate, Stopped
from tests.generation.runs import answers, fails, generate, records
from tests.teacher.teacher_server import TeacherServer, error


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Its clock jumps to the next event, so that minutes take milliseconds."""

    def __init__(self):
        super().__init__()
        self.now, select = 0.0, self._selector.select

        def jump(timeout=None):
            self.now += timeout or 0.0
            return select(0)

        self._selector.select = jump

    def time(self):
        return self.now


class Server:
    """Grants `burst` at once and `rate` a second; a refusal takes 20 ms, an answer `seconds`."""

    exactly = False  # or else it says whole seconds, as the header has them

    def __init__(self, rate, burst, seconds, says_how_long):
        self.rate, self.burst, self.seconds, self.says_how_long = rate, burst, seconds, says_how_long
        self.tokens, self.at, self.inside, self.most_inside = burst, 0.0, 0, 0
        self.asked, self.refused = [], []

    async def ask(self, gate):
        now = asyncio.get_running_loop().time
        again = False
        while True:
            async with gate.place(again) as place:
                self.asked.append(now())
                self.tokens = min(self.burst, self.tokens + (now() - self.at) * self.rate)
                self.at = now()
                if self.tokens >= 1 - 1e-9:
                    self.tokens -= 1
                    self.inside += 1
                    await asyncio.sleep(self.seconds)
                    self.inside -= 1
                    place.succeeded()
                    return
                wait = max(0.0 if self.exactly else 1.0, (1 - self.tokens) / self.rate)
                await asyncio.sleep(0.02)
                self.refused.append(now())
                again = True
                place.limited(wait if self.says_how_long else None)


def simulate(server, count, concurrency=64):
    """→ requests a second."""

    async def run():
        gate, places = Gate(2.0), asyncio.Semaphore(concurrency)

        async def one():
            async with places:
                await server.ask(gate)

        await one()  # the first goes alone
        await asyncio.gather(*(one() for _ in range(count - 1)))
        return count / (asyncio.get_running_loop().time() - server.seconds)

    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(run())


@pytest.mark.parametrize("says_how_long", [True, False])
@pytest.mark.parametrize(("burst", "seconds"), [(4, 0.05), (4, 1.0), (40, 1.0)])
def test_four_a_second_are_granted_and_asked_for(burst, seconds, says_how_long):
    server = Server(4, burst, seconds, says_how_long)
    assert 3.5 <= simulate(server, 600) <= 4 + burst / 100
    assert len(server.refused) < 150  # of the 600; most of them are of the first moment, when 64 left together


def test_a_server_that_saves_nothing_up_is_asked_evenly():
    """Each refusal of it costs four requests, since waits are whole seconds."""
    server = Server(4, 1, 0.5, says_how_long=True)
    assert 3.5 <= simulate(server, 400) <= 4
    assert len(server.refused) < 63 + 15


def test_a_server_that_says_exactly_how_long_loses_nothing_by_a_refusal():
    server = Server(4, 1, 0.5, says_how_long=True)
    server.exactly = True
    assert 3.7 <= simulate(server, 400) <= 4
    assert len(server.refused) < 63 + 15


def test_refusals_that_cost_nothing_keep_nobody_slow():
    """A server that is slow at first, and turns down one request of sixteen for 5 ms all the time."""
    draw, answered = random.Random(3), []

    async def one(gate):
        now, again = asyncio.get_running_loop().time, False
        while True:
            async with gate.place(again) as place:
                await asyncio.sleep(0.002)
                if draw.random() >= 1 / 16:
                    await asyncio.sleep(6 if len(answered) < 100 else 0.02)
                    answered.append(now())
                    place.succeeded()
                    return
                again = True
                place.limited(0.005)

    async def run():
        gate, places = Gate(0.01), asyncio.Semaphore(32)

        async def placed():
            async with places:
                await one(gate)

        await asyncio.gather(*(placed() for _ in range(2000)))

    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        runner.run(run())
    assert 500 / (answered[-1] - answered[-501]) > 100  # a second


def test_without_a_limit_there_is_no_pace():
    server = Server(1e9, 1e9, 1.0, True)
    assert simulate(server, 640) == pytest.approx(64, rel=0.2)


def test_nobody_asks_while_the_server_says_to_wait():
    server = Server(4, 1, 0.05, True)
    simulate(server, 100)
    for refused in server.refused:  # those under way together come back until 40 ms later
        assert not [asked for asked in server.asked if refused + 0.03 < asked < refused + 0.99]


def test_half_as_many_are_in_flight_after_a_limit_and_more_again_after_answers():
    async def run():
        gate = Gate()
        places = [await gate.place().__aenter__() for _ in range(16)]
        places[0].limited(1.0)
        places[1].limited(1.0)  # together with the first: not halved again
        assert gate.most == 8
        for _ in range(16):
            gate.leave()
        for _ in range(20):
            most = gate.most
            async with gate.place() as place:
                await asyncio.sleep(0.1)
                place.succeeded()
            assert most < gate.most <= most + 1
        assert asyncio.get_running_loop().time() > 1.0

    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        runner.run(run())


def test_who_waits_at_the_gate_is_stopped():
    async def run():
        gate = Gate()
        async with gate.place() as place:
            place.limited(1e6)
        waiting = [asyncio.create_task(gate.place().__aenter__()) for _ in range(3)]
        await asyncio.sleep(1)
        gate.stopping.set()
        assert [type(result) for result in await asyncio.gather(*waiting, return_exceptions=True)] == [Stopped] * 3

    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        runner.run(run())


# ----------------------------------------------------------------------------------------------------- in whole runs


@pytest.mark.parametrize(
    "limit",
    [
        lambda: error(429, "slow down", "rate_limit_exceeded", Retry_After_Ms="100"),
        lambda: error(503, "busy", Retry_After_Ms="100"),
        lambda: error(413, "tokens per minute (TPM): Limit 6000, Used 5000, Requested 2000", "rate_limit_exceeded"),
        lambda: error(429, "You exceeded your current quota: 10 requests per minute. Please retry in 0.1s."),
    ],
)
def test_rate_limits_count_neither_as_attempts_nor_as_requests(tmp_path, undisturbed, capsys, limit):
    def fault(server, body, attempt):
        return limit() if attempt < 3 else None

    with TeacherServer(fault=fault) as server:
        generate(server, tmp_path, concurrency=8, max_attempts=2, max_requests=14)
    assert (tmp_path / "regen.json").read_bytes() == undisturbed
    assert not [record for record in records(tmp_path) if "fault" in record]
    out, err = capsys.readouterr()
    assert f"{len(answers(tmp_path))} requests, of them faults: none; answered with a rate limit and asked again" in out
    assert err.count("limits the rate") == 1


def test_a_server_that_only_limits_ends_the_run(tmp_path):
    with TeacherServer(fault=lambda *_: error(429, "Rate limit reached", Retry_After="0")) as server:
        with fails(ExitCode.BUDGET, "nothing but its rate limit 10 times in a row.*Rate limit reached.*saved"):
            generate(server, tmp_path)
        assert len(server.bodies) == 10


def test_a_request_that_fits_no_minute_is_shortened(tmp_path):
    def fault(server, body, attempt):
        message = f"tokens per minute (TPM): Limit 2000, Requested {body['max_tokens']}, please reduce it"
        return error(413, message, "rate_limit_exceeded", Retry_After="0") if body["max_tokens"] > 2000 else None

    with TeacherServer(fault=fault) as server:
        generate(server, tmp_path, num_instructions_to_generate=1)
    assert server.bodies[-1]["max_tokens"] < 2000 and len(answers(tmp_path)) == 1


def test_a_pause_is_for_everybody(tmp_path):
    def fault(server, body, attempt):
        if len(server.times) == 5:
            return error(429, "slow down", Retry_After="1")
        return None

    with TeacherServer(fault=fault, delay=0.05) as server:
        began = time.monotonic()
        generate(server, tmp_path, concurrency=4)
        assert time.monotonic() - began >= 1
    gaps = [after - before for before, after in zip(server.times, server.times[1:], strict=False)]
    assert max(gaps) >= 0.85
