"""What was decided of each answer, kept beside the log: comparing 52,000 instructions again would take minutes.

decisions.jsonl is safe to delete, and is trusted only as far as it fits: it begins with the log's first checksum, the
limits and the rules (a digest of the code), and each line names its answer by byte and checksum in the log. Where it
does not fit, that line and all behind it are decided again.
"""

import contextlib
import functools
import hashlib
import json
import os
from typing import Any

from alpaca.common import ROOT, ExpectedError
from alpaca.generation.parsing import Limits
from alpaca.generation.self_instruct import Collection
from alpaca.teacher.request_log import Log


class Decisions:
    """Uses a collection's waiting answers, with what was decided earlier where that is known."""

    def __init__(self, log: Log, output_dir: str | None, limits: Limits):
        """`output_dir` None: nothing is known and nothing is kept. Raises nothing: the file can be made again."""
        self.log = log
        self._file: Log | None = None
        self._known: list[tuple[int, dict[str, Any]]] = []  # byte in decisions.jsonl, decision; the next is the last
        if output_dir is None:
            return
        path = os.path.join(output_dir, "decisions.jsonl")
        first = {"decided": {"log": log.first_checksum, "rules": _rules(), "limits": limits}}
        with contextlib.suppress(ExpectedError):  # damaged
            self._file = Log(path, left_on_disk=("kept",))
        if not self._file or self._file.records[:1] != [json.loads(json.dumps(first))]:
            if self._file:
                self._file.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            self._file = Log(path, left_on_disk=("kept",))
            self._file.append(first, sync=False)
        bytes_ = [byte for byte, _ in self._file.places]
        self._known = list(zip(bytes_, self._file.records, strict=True))[:0:-1]

    def advance(self, collection: Collection) -> None:
        """Collection.advance, without deciding anew what is known."""
        while not collection.full and collection.answers in collection.waiting:
            record = collection.waiting.pop(collection.answers)
            if known := self._take(record):
                collection.restore(known["kept"], known["rejected"])
                continue
            place, before, rejected = record["place"], len(collection.entries), collection.rejected.copy()
            collection.add(self.log.read(place[0]) if record["answer"] is None else record)
            names = [name for name in collection.rejected if collection.rejected[name] > rejected[name]]
            self._keep(
                {
                    "request": record["request"],
                    "place": place,
                    "kept": list(zip(collection.new_instructions(before), collection.entries[before:], strict=True)),
                    "rejected": {name: collection.rejected[name] - rejected[name] for name in names},
                }
            )

    def _take(self, record: dict[str, Any]) -> dict[str, Any] | None:
        if not self._known:
            return None
        byte, known = self._known.pop()
        if known["request"] == record["request"] and known["place"] == list(record["place"]):
            return self._file.read(byte)
        self._known = []
        self._file.cut_at(byte)
        return None

    def _keep(self, decision: dict[str, Any]) -> None:
        if self._file and not self._known:
            try:
                self._file.append(decision, sync=False)
            except OSError:  # the disk is full: the log will say so, and can do without
                self.close()

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None


@functools.cache
def _rules() -> str:
    """A digest of the code that decides: another version may decide otherwise."""
    digest = hashlib.sha256()
    for room in ("data", "generation"):
        for path in sorted((ROOT / "alpaca" / room).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
