"""What a run has paid for: the log that keeps every answer, and the meter that counts against limits."""

import collections
import hashlib
import json
import os
import threading
from collections.abc import Iterable
from typing import Any

from alpaca.common import ExitCode, ExpectedError, sync_directory

BATCH_PRICE = 0.5  # what the Batch API costs of the usual price


class Meter:
    """Requests, tokens and money of a run, against its limits (None: no limit). Prices are per million tokens."""

    def __init__(
        self,
        max_requests: int | None = None,
        max_tokens_total: int | None = None,
        price_in: float | None = None,
        price_out: float | None = None,
        max_cost: float | None = None,
    ):
        self.max_requests, self.max_tokens_total, self.max_cost = max_requests, max_tokens_total, max_cost
        self.prices = {"prompt_tokens": price_in or 0.0, "completion_tokens": price_out or 0.0}
        self.requests = self.in_flight = self.tokens = 0
        self.unknown = 0  # requests that may have been paid for, such as those that timed out; nobody knows how much
        self.cost = 0.0
        self.faults: collections.Counter[str] = collections.Counter()
        self.largest = {"prompt_tokens": 0, "completion_tokens": 0}  # what one request may use at most

    def price(self, usage: dict[str, int], batch: bool = False) -> float:
        """What `usage` costs; the Batch API takes half."""
        cost = sum(usage[name] * price for name, price in self.prices.items()) / 1e6
        return cost * BATCH_PRICE if batch else cost

    def exhausted(self, more: int = 1, batch: bool = False) -> str | None:
        """The flag whose limit `more` further requests could exceed, those in flight included; None if there is none.

        Each request whose cost is not known is taken for the largest possible, so that no limit is ever exceeded.
        """
        unsettled = self.in_flight + self.unknown + more
        if self.max_requests is not None and self.requests + more > self.max_requests:
            return "max_requests"
        if self.max_tokens_total is not None:
            if self.tokens + unsettled * sum(self.largest.values()) > self.max_tokens_total:
                return "max_tokens_total"
        if self.max_cost is not None and self.cost + unsettled * self.price(self.largest, batch) > self.max_cost:
            return "max_cost"
        return None

    def count_request(self) -> None:
        """Count an attempt before it is sent. Raises ExpectedError (BUDGET) where max_requests forbids it."""
        if self.max_requests is not None and self.requests >= self.max_requests:
            raise budget_error("max_requests")
        self.requests += 1

    def count_usage(self, usage: dict[str, int] | None, batch: bool = False) -> None:
        """Count what a request has cost; None: nobody knows."""
        if usage is None:
            self.unknown += 1
            return
        self.largest = {name: max(most, usage[name]) for name, most in self.largest.items()}
        self.tokens += sum(usage.values())
        self.cost += self.price(usage, batch)

    def count_logged(self, records: Iterable[dict[str, Any]]) -> None:
        """Count what the log holds: limits are for the whole output directory, over all its processes."""
        asked: collections.Counter[int] = collections.Counter()  # request → attempts of which nothing came back
        for record in records:
            if "asked" in record:
                asked[record["asked"]] += 1
            if "request" in record:
                asked[record["request"]] -= not record["batch"]
                self.requests += 1
                self.count_usage(record["usage"], record["batch"])
            if "fault" in record:
                self.faults[record["fault"]] += 1
        never_received = sum(count for count in asked.values() if count > 0)  # by a process that was killed
        self.requests += never_received
        self.unknown += never_received


class UsedUp(ExpectedError):
    """A limit of the run is reached; what is in flight may still come in."""


def budget_error(flag: str) -> UsedUp:
    return UsedUp(
        f"--{flag} is used up; everything so far is saved: raise it and run the same command again to go on",
        ExitCode.BUDGET,
    )


_CHECKSUM = b', "checksum": "%b"}\n'
_CHECKSUM_LENGTH = len(_CHECKSUM % bytes(16))


def _checksum(line: bytes) -> bytes:
    return hashlib.blake2b(line, digest_size=8).hexdigest().encode()


class Log:
    """An append-only file of JSON records, each synced before `append` returns, each with a checksum of its own line.

    Private (0600), since answers are in it. Opening it cuts off a torn last line, which a killed process may leave;
    damage anywhere else raises ExpectedError (INTEGRITY). `records` holds what is in it, with None for the fields
    `left_on_disk`, which may be large: `read` brings a whole record, `places` says where each one is.
    """

    def __init__(self, path: str, left_on_disk: Iterable[str] = ()):
        self._left_on_disk = {*left_on_disk}
        new = not os.path.exists(path)
        self._path = path
        self._lock = threading.Lock()
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.fchmod(self._handle, 0o600)
        if new:
            sync_directory(os.path.dirname(path) or ".")
        self.records: list[dict[str, Any]] = []
        self.places: list[tuple[int, str]] = []  # of the records: byte, checksum
        self.cut_off = 0  # bytes of a torn last line
        self._end = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    self.cut_off = len(line)
                    self.cut_at(self._end)
                    break
                content = line[:-_CHECKSUM_LENGTH]
                if line != content + _CHECKSUM % (checksum := _checksum(content)):
                    os.close(self._handle)
                    raise ExpectedError(
                        f"{path}: line {number} (at byte {self._end}) is damaged; restore the file from a copy, or cut "
                        f"it off there to ask again for what follows: truncate -s {self._end} {path}",
                        ExitCode.INTEGRITY,
                    )
                self._add(json.loads(content + b"}"), checksum, len(line))

    def _add(self, record: dict[str, Any], checksum: bytes, length: int) -> None:
        self.records.append({**record, **dict.fromkeys(record.keys() & self._left_on_disk)})
        self.places.append((self._end, checksum.decode()))
        self._end += length

    @property
    def first_checksum(self) -> str:
        """Of the first record, which says what kind of run this is; "" in an empty log."""
        return self.places[0][1] if self.places else ""

    def read(self, byte: int) -> dict[str, Any]:
        """The whole record that begins at this byte."""
        with open(self._path, "rb") as file:
            file.seek(byte)
            return json.loads(file.readline()[:-_CHECKSUM_LENGTH] + b"}")

    def append(self, record: dict[str, Any], sync: bool = True) -> tuple[int, str]:
        """Write a record and sync it. → its place. Where the disk is full nothing of it stays, and OSError is raised.

        `sync` False: it survives the end of this process, but perhaps not that of the machine. Threads may append at
        the same time; one that waits for the disk holds up no other.
        """
        content = json.dumps(record).encode()[:-1]
        line = content + _CHECKSUM % (checksum := _checksum(content))
        try:
            with self._lock:
                try:
                    written = 0
                    while written < len(line):
                        written += os.write(self._handle, line[written:])
                except OSError:
                    os.ftruncate(self._handle, self._end)
                    raise
                self._add(record, checksum, len(line))
                place = self.places[-1]
            if sync:
                os.fsync(self._handle)
        except OSError as error:
            error.filename = self._path
            raise
        return place

    def cut_at(self, byte: int) -> None:
        """Drop what begins at this byte and all that follows."""
        os.ftruncate(self._handle, byte)
        os.fsync(self._handle)
        self._end = byte
        while self.places and self.places[-1][0] >= byte:
            self.places.pop()
            self.records.pop()

    def close(self) -> None:
        os.close(self._handle)
