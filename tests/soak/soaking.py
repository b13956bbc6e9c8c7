"""Traffic for a whole node with real workers, seeded, for as long as one likes; and what must hold after it.

Callers ask, stream, branch, stop, leave and ask for too much; somebody kills workers. Every request must be
answered exactly once, by a reply, an error or our leaving, within a bound; at the end nothing is left of it.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import random
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import psutil

from cortex.config import AdmissionSection, HarnessSection, NeuronConfig, TorchSection
from cortex.hookspecs import EngineStep, LoadedModel, LoadPlan
from cortex.neuron.app import build_neuron
from cortex.neuron.torch_engine import TorchFactory
from cortex.testing import AsgiClient, AsgiExchange, AsgiReply
from cortex.wire.node import Progress

MODEL: Final = "tiny"
MEMORY_MB: Final = 385
"""Cache for one context of 3,520 tokens beside weights and process, so that it is always short."""
CALLERS: Final = 10
RUNNING, WAITING = 4, 8
WAIT_S: Final = 2.0
PROBE: Final = {
    "max_tokens": 24,
    "temperature": 0,
    "messages": [{"role": "user", "content": "Who is there?"}],
}
"""Always asked in the same words, and always to be answered in the same."""
KINDS: Final = {
    "whole": 4,
    "stream": 4,
    "choices": 2,
    "stop": 2,
    "turns": 3,
    "leave": 4,
    "endless": 3,
    "oversize": 1,
    "nonsense": 1,
    "probe": 2,
}
"""What callers do, and how often."""
REFUSALS: Final = frozenset({"busy", "too_many_requests_in_flight"})
"""Codes of refusals that a busy node may give at any time."""
LOSSES: Final = frozenset({"engine_ended", "load_failed"})
"""Codes of errors that a killed worker explains."""


class WatchedFactory(TorchFactory):
    """Remembers what the engine said last."""

    last = EngineStep()
    preemptions = 0
    hits = 0

    async def load(self, plan: LoadPlan, report: Callable[[Progress], None]) -> LoadedModel:
        model: Any = await super().load(plan, report)
        plain = model.watch

        def watch(seen: Callable[[EngineStep], None]) -> None:
            def both(step: EngineStep) -> None:
                self.last = step
                self.preemptions += step.preemptions
                self.hits += step.prefix_hit_tokens
                seen(step)

            plain(both)

        model.watch = watch
        loaded: LoadedModel = model
        return loaded


class Soak:
    """A node, its callers, and the count of what became of their requests."""

    def __init__(self, models_dir: Path, *, seed: int, bound_s: float) -> None:
        self.seed = seed
        self.bound_s = bound_s
        """Seconds in which every request is answered."""
        self.factory = WatchedFactory(dtype="float32")
        self.node = build_neuron(
            NeuronConfig(
                models_dir=str(models_dir),
                memory_limit_mb=2 * MEMORY_MB,
                harness=HarnessSection(torch=TorchSection(threads=1)),
                admission=AdmissionSection(max_running=RUNNING, max_waiting=WAITING, max_wait_s=WAIT_S),
            ),
            factories={"torch": self.factory},
        )
        self.client = AsgiClient(self.node.app)
        self.asked = 0
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.kinds: collections.Counter[str] = collections.Counter()
        self.kills = 0
        self.surprises: list[str] = []
        self.slowest = 0.0
        self._probe: str | None = None
        self._until = 0.0
        self._calling = asyncio.Event()

    @contextlib.asynccontextmanager
    async def started(self) -> AsyncIterator[None]:
        await self.node.start()
        try:
            await self.load()
            yield
        finally:
            await self.node.stop()

    async def load(self) -> None:
        """As an operator asks for it, who need not wait until the model has rested."""
        reply = await self.client.post("/models/load", json={"model_id": MODEL, "memory_mb": MEMORY_MB})
        assert reply.status == 200, reply.body

    async def traffic(self, seconds: float, *, kill_every_s: float | None) -> None:
        """All callers for so long, and as often a killed worker; returns when everybody is answered."""
        self._until = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for caller in range(CALLERS):
                group.create_task(self._call(random.Random(f"{self.seed} {caller} {self.asked}")))
            if kill_every_s is not None:
                group.create_task(self._kill(random.Random(self.seed), kill_every_s))

    def workers(self) -> list[psutil.Process]:
        children = psutil.Process().children(recursive=True)
        servers = [child for child in children if "forkserver" in " ".join(child.cmdline())]
        pids = {server.pid for server in servers}
        return [
            child for child in children if child.ppid() in pids and child.status() != psutil.STATUS_ZOMBIE
        ]

    # --- one caller ---

    async def _call(self, chance: random.Random) -> None:
        history: list[dict[str, str]] = []
        kinds, weights = list(KINDS), list(KINDS.values())
        while time.monotonic() < self._until:
            (kind,) = chance.choices(kinds, weights)
            self.asked += 1
            self.kinds[kind] += 1
            began = time.monotonic()
            try:
                async with asyncio.timeout(self.bound_s):
                    outcome = await self._one(kind, chance, history)
            except TimeoutError:
                outcome = "hung"
                self.surprises.append(f"{kind} was not answered within {self.bound_s} s")
            self.slowest = max(self.slowest, time.monotonic() - began)
            self.outcomes[outcome] += 1
            if outcome in ("refused", "failed"):
                await asyncio.sleep(chance.uniform(0.05, 0.3))

    async def _one(self, kind: str, chance: random.Random, history: list[dict[str, str]]) -> str:
        body = self._body(kind, chance, history)
        body["stream"] = kind in ("stream", "endless") or (
            kind in ("leave", "choices") and chance.random() < 0.5
        )
        async with self.client.open("POST", "/v1/chat/completions", json=body) as exchange:
            if kind in ("leave", "endless"):
                return await self._leave(exchange, body, chance)
            reply = await exchange.reply()
            await exchange.ended()
            return self._judge(kind, body, reply, history)

    def _body(self, kind: str, chance: random.Random, history: list[dict[str, str]]) -> dict[str, Any]:
        if kind == "probe":
            return {"model": MODEL, **PROBE}
        words = " ".join(
            chance.choice(("tell", "me", "of", "the", "sea", "again")) for _ in range(chance.randrange(1, 90))
        )
        messages = [{"role": "user", "content": words}]
        body: dict[str, Any] = {"model": MODEL, "messages": messages, "max_tokens": chance.randrange(1, 120)}
        if chance.random() < 0.5:
            body |= {"temperature": chance.choice([0, 0.7, 1.3]), "top_p": 0.95, "seed": chance.randrange(99)}
        if chance.random() < 0.2:
            body |= {"frequency_penalty": 0.5, "repetition_penalty": 1.1, "logprobs": True, "top_logprobs": 2}
        if kind == "choices":
            body["n"] = chance.randrange(2, 4)
        elif kind == "stop":
            body["stop"] = ["a", "qu", "7"]
        elif kind == "turns":
            if sum(len(message["content"]) for message in history) > 1500:
                history.clear()
            history += messages
            body["messages"] = list(history)
        elif kind == "endless":
            del body["max_tokens"]
        elif kind == "oversize":
            messages[0]["content"] = "x" * chance.randrange(8192, 20000)
        elif kind == "nonsense":
            body |= chance.choice([{"temperature": -1}, {"n": 0}, {"messages": []}, {"top_p": "much"}])
        return body

    async def _leave(self, exchange: AsgiExchange, body: dict[str, Any], chance: random.Random) -> str:
        """Go away in any phase: at once, while waiting, or after some chunks. Without max_tokens, there are
        many: such a reply outgrows what was set aside for it.
        """
        endless = "max_tokens" not in body
        stays = [1.0, min(8.0, self.bound_s / 5)] if endless else [0.0, 0.01, 0.1, 0.5]
        try:
            async with asyncio.timeout(chance.choice(stays)):
                if body["stream"]:
                    for _ in range(5000 if endless else chance.randrange(200)):
                        if await exchange.chunk() is None:
                            break
                else:
                    await exchange.reply()
        except TimeoutError:
            pass
        exchange.disconnect()
        await exchange.ended()
        return "left"

    # --- what came of it ---

    def _judge(self, kind: str, body: dict[str, Any], reply: AsgiReply, history: list[dict[str, str]]) -> str:
        if kind in ("oversize", "nonsense"):
            code = reply.json()["error"]["code"]
            expected = kind == "nonsense" or code == "context_length_exceeded"
            if reply.status == 400 and expected:
                return "bad"
            return self._error(kind, reply.status, code)
        if reply.status != 200:
            return self._error(kind, reply.status, reply.json()["error"]["code"])
        texts, reasons, error = _streamed(reply.body) if body["stream"] else _whole(reply)
        if error is not None:
            return self._error(kind, reply.status, error)
        wanted = body.get("n", 1)
        if sorted(reasons) != list(range(wanted)):
            self.surprises.append(f"{kind}: {wanted} choices, and these have ended: {reasons}")
        for stop in body.get("stop", ()):
            if any(stop in text for text in texts.values()):
                self.surprises.append(f"{kind}: the stop string {stop!r} is in the text")
        if kind == "turns":
            history.append({"role": "assistant", "content": texts[0]})
        if kind == "probe":
            self._probe = self._probe or texts[0]
            if texts[0] != self._probe:
                self.surprises.append(f"the probe was answered {texts[0]!r} and before {self._probe!r}")
        return "ok"

    def _error(self, kind: str, status: int, code: str) -> str:
        if code in REFUSALS:
            return "refused"
        if code in LOSSES and self.kills:
            return "failed"
        self.surprises.append(f"{kind} got {status} {code}")
        return "failed"

    async def _kill(self, chance: random.Random, every_s: float) -> None:
        """The model comes back because somebody asks for it, or because an operator loads it."""
        while True:
            pause = chance.uniform(0.5, 1.5) * every_s
            if time.monotonic() + pause > self._until:
                break
            await asyncio.sleep(pause)
            for worker in self.workers():
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.kill()
                    self.kills += 1
            await asyncio.sleep(chance.choice([0.0, 0.3, 1.0]))
            await self.load()

    async def settled(self) -> dict[str, Any]:
        """One last request on an idle node, and what /health says after it."""
        await self.load()
        reply = await self.client.post("/v1/chat/completions", json={"model": MODEL, **PROBE})
        assert reply.status == 200, reply.body
        health: dict[str, Any] = (await self.client.get("/health")).json()
        return health

    async def check(self) -> None:
        """Raises AssertionError unless every request was answered once and nothing is left of any."""
        health = await self.settled()
        assert not self.surprises, self.surprises[:20]
        assert sum(self.outcomes.values()) == self.asked
        assert health["requests"] == []
        (load,) = health["models"]
        assert (load["in_flight"], load["queue_depth"], load["cache_usage_ratio"]) == (0, 0, 0.0)
        step = self.factory.last
        assert (step.running, step.waiting, step.cache_used_tokens) == (0, 0, 0)
        assert len(self.workers()) == 1
        assert len(asyncio.all_tasks()) < 20, asyncio.all_tasks()

    def memory(self) -> dict[str, int]:
        """Bytes that are the processes' own: of this one, of the warm server with all workers, and what of
        it workers do not share with the warm server.
        """
        children = psutil.Process().children(recursive=True)
        return {
            "node": _bytes(os.getpid(), "status", "RssAnon"),
            "engine": sum(_bytes(child.pid, "status", "RssAnon") for child in children),
            "workers": sum(_bytes(worker.pid, "smaps_rollup", "Private_Dirty") for worker in self.workers()),
        }

    def told(self) -> str:
        """For whoever watches."""
        done = ", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items()))
        return (
            f"{self.asked} requests ({done}), {self.kills} kills, {self.factory.preemptions} preemptions, "
            f"{self.factory.hits} tokens from the prefix cache, slowest {self.slowest:.1f} s, "
            + ", ".join(f"{name} {size / 2**20:.1f} MB" for name, size in self.memory().items())
        )


def _bytes(pid: int, file: str, field: str) -> int:
    """Pages of libraries are in no field that is asked for: they come and go as others map them too."""
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _whole(reply: AsgiReply) -> tuple[dict[int, str], list[int], str | None]:
    """Texts by choice, the choices that have ended, and the code of an error."""
    choices = reply.json()["choices"]
    texts = {choice["index"]: choice["message"]["content"] or "" for choice in choices}
    return texts, [choice["index"] for choice in choices if choice["finish_reason"]], None


def _streamed(body: bytes) -> tuple[dict[int, str], list[int], str | None]:
    texts: dict[int, str] = collections.defaultdict(str)
    reasons: list[int] = []
    assert body.count(b"data: [DONE]") == 1, "a stream has one end"
    assert body.endswith(b"data: [DONE]\n\n")
    for line in body.splitlines():
        if line.startswith(b"data: {"):
            event = msgspec.json.decode(line[6:])
            if "error" in event:
                return texts, reasons, event["error"]["code"]
            for choice in event["choices"]:
                texts[choice["index"]] += choice["delta"].get("content") or ""
                reasons += [choice["index"]] if choice["finish_reason"] else []
    return texts, reasons, None
