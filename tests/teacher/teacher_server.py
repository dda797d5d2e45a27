"""A scripted OpenAI-compatible server on loopback: real sockets, the real protocol, faults on cue."""

import asyncio
import collections
import hashlib
import json
import random
import threading
import time

from aiohttp import web

WORDS = [
    "".join(random.Random(i).choices("bcdfglmnprstv", k=1) + random.Random(i + 7).choices("aeiou", k=1)) + f"{i:x}"
    for i in range(4000)
]


def tasks_for(prompt: str, count: int = 6) -> list[dict[str, str]]:
    """What this teacher answers depends on the prompt alone; a few of its tasks are to be rejected."""
    rng = random.Random(hashlib.sha256(prompt.encode()).hexdigest())
    tasks = []
    for index in range(count):
        words = rng.choices(WORDS, k=rng.randint(5, 12))
        kind = rng.random()
        if kind < 0.1 and tasks:
            words = tasks[-1]["instruction"].split()  # too similar
        elif kind < 0.15:
            words[1:2] = ["the", "diagram"]
        tasks.append(
            {
                "instruction": " ".join(words).capitalize(),
                "input": "" if index % 2 else " ".join(rng.choices(WORDS, k=5)),
                "output": " ".join(rng.choices(WORDS, k=10)),
            }
        )
    return tasks


def answer_text(tasks: list[dict[str, str]], first_number: int = 4) -> str:
    """Tasks as a teacher writes them behind "4. Instruction:"."""
    return "\n###\n".join(
        (f" {task['instruction']}" if not index else f"{number}. Instruction: {task['instruction']}")
        + f"\n{number}. Input:\n{task['input'] or '<noinput>'}\n{number}. Output:\n{task['output']}"
        for index, (number, task) in enumerate(enumerate(tasks, first_number))
    )


def error(status: int, message: str, code: str = "", param: str | None = None, **headers) -> web.Response:
    body = {"error": {"message": message, "type": "invalid_request_error", "code": code, "param": param}}
    return web.json_response(body, status=status, headers={k.replace("_", "-"): v for k, v in headers.items()})


class TeacherServer:
    """`fault(server, body, attempt)` → None to answer, or a Response / the name of a way to fail. attempt counts from 1
    for each prompt. Context manager; `url` is its base URL."""

    def __init__(self, fault=lambda server, body, attempt: None, delay=0.0, count=6, answer=None, expected_key=None):
        self.fault, self.delay, self.count, self.expected_key = fault, delay, count, expected_key
        self.answer = answer or (lambda prompt: answer_text(tasks_for(prompt, count)))
        self.bodies: list[dict] = []
        self.times: list[float] = []
        self.attempts: collections.Counter[str] = collections.Counter()
        self.answered: collections.Counter[str] = collections.Counter()
        self.faults: collections.Counter[str] = collections.Counter()
        self.in_flight = self.most_in_flight = 0
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict] = {}
        self.batch_status = lambda batch, polls: "completed"
        self.batch_line = lambda number, body: None  # a result line of its own, or None for a good answer
        self.polls = collections.Counter()
        self.extra_routes: list[tuple] = []  # path, handler of a POST
        self.answer_after = 0.0  # seconds from granting a request to its answer; a refusal comes at once
        self.lock = threading.Lock()

    # --- completions

    async def completions(self, request: web.Request) -> web.StreamResponse:
        if self.expected_key and request.headers.get("Authorization") != f"Bearer {self.expected_key}":
            sent = request.headers.get("Authorization", "").removeprefix("Bearer ")
            self.bodies.append(await request.json())
            return error(401, f"Incorrect API key provided: {sent}.", "invalid_api_key")
        body = await request.json()
        chat = request.path.endswith("/chat/completions")
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        self.bodies.append(body)
        self.times.append(time.monotonic())
        self.attempts[prompt] += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            delay = self.delay() if callable(self.delay) else self.delay
            if delay:
                await asyncio.sleep(delay)
            fault = self.fault(self, body, self.attempts[prompt])
            if isinstance(fault, web.Response):
                self.faults[f"HTTP {fault.status}"] += 1
                return fault
            good = json.dumps(self.payload(body, chat))
            if fault is None:
                await asyncio.sleep(self.answer_after)
                self.answered[prompt] += 1
                return web.Response(text=good, content_type="application/json")
            self.faults[fault] += 1
            return await self.fail(request, fault, good)
        finally:
            self.in_flight -= 1

    def payload(self, body: dict, chat: bool) -> dict:
        text = self.answer(body["messages"][0]["content"] if chat else body["prompt"])
        choice = {"index": 0, "finish_reason": "stop"}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        usage = {"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 1500}
        return {
            "id": "c",
            "object": "x",
            "model": body["model"],
            "choices": [choice] * body.get("n", 1),
            "usage": usage,
        }

    async def fail(self, request: web.Request, fault: str, good: str) -> web.StreamResponse:
        if fault == "broken JSON":
            return web.Response(text=good[:-20], content_type="application/json")
        if fault == "HTML page":
            return web.Response(text="<html><body>Bad gateway</body></html>", content_type="text/html")
        if fault == "no choices":
            return web.json_response({"choices": [], "usage": None})
        if fault == "null content":
            choice = {"message": {"content": None}, "text": None, "finish_reason": "stop"}
            return web.json_response({"choices": [choice], "usage": {"prompt_tokens": 1000, "completion_tokens": 0}})
        if fault == "connection cut":
            response = web.StreamResponse(
                headers={"Content-Length": str(len(good)), "Content-Type": "application/json"}
            )
            await response.prepare(request)
            await response.write(good[: len(good) // 2].encode())
            request.transport.close()
            return response
        if fault == "no connection":
            request.transport.close()
            return web.Response()
        raise AssertionError(fault)

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "model-b", "object": "model"}, {"id": "model-a"}]})

    # --- Batch API

    async def upload(self, request: web.Request) -> web.Response:
        fields = await request.post()
        file_id = f"file-{len(self.files)}"
        self.files[file_id] = fields["file"].file.read()
        assert fields["purpose"] == "batch"
        return web.json_response({"id": file_id, "object": "file"})

    async def content(self, request: web.Request) -> web.Response:
        return web.Response(body=self.files[request.match_info["id"]])

    async def create_batch(self, request: web.Request) -> web.Response:
        wanted = await request.json()
        batch_id = f"batch-{len(self.batches)}"
        self.batches[batch_id] = {"id": batch_id, "object": "batch", "status": "validating", **wanted}
        return web.json_response(self.batches[batch_id])

    async def list_batches(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": list(self.batches.values()), "has_more": False})

    async def get_batch(self, request: web.Request) -> web.Response:
        batch = self.batches[request.match_info["id"]]
        self.polls[batch["id"]] += 1
        batch["status"] = self.batch_status(batch, self.polls[batch["id"]])
        if batch["status"] in ("completed", "expired") and "output_file_id" not in batch:
            out, errors = [], []
            for line in self.files[batch["input_file_id"]].decode().splitlines():
                wanted = json.loads(line)
                result = self.batch_line(int(wanted["custom_id"].split("-")[1]), wanted["body"])
                if result is None:
                    payload = self.payload(wanted["body"], chat="messages" in wanted["body"])
                    result = {"response": {"status_code": 200, "body": payload}, "error": None}
                    out.append({"custom_id": wanted["custom_id"], **result})
                elif result:
                    errors.append({"custom_id": wanted["custom_id"], **result})
            for name, lines in (("output", out), ("error", errors)):
                self.files[f"{batch['id']}-{name}"] = "\n".join(map(json.dumps, lines)).encode()
                batch[f"{name}_file_id"] = f"{batch['id']}-{name}"
        return web.json_response(batch)

    # --- the server

    def __enter__(self) -> "TeacherServer":
        app = web.Application(client_max_size=2**28)
        app.router.add_post("/v1/chat/completions", self.completions)
        app.router.add_post("/v1/completions", self.completions)
        app.router.add_get("/v1/models", self.models)
        for path, handler in self.extra_routes:
            app.router.add_post(path, handler)
        app.router.add_post("/v1/files", self.upload)
        app.router.add_get("/v1/files/{id}/content", self.content)
        app.router.add_post("/v1/batches", self.create_batch)
        app.router.add_get("/v1/batches", self.list_batches)
        app.router.add_get("/v1/batches/{id}", self.get_batch)
        self._loop = asyncio.new_event_loop()
        started = threading.Event()

        async def start() -> None:
            self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
            await self._runner.setup()
            site = web.TCPSite(self._runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/v1"
            started.set()

        def serve() -> None:
            asyncio.set_event_loop(self._loop)
            self._loop.run_until_complete(start())
            self._loop.run_forever()

        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *exception) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
