"""The play: what the plan says is done to the stand, and written down."""

from __future__ import annotations

import heapq
import itertools
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

from tests.chaos.plan import Event, Plan
from tests.chaos.stand import Stand
from tests.chaos.workers import Life
from tests.waiting import wait_for

TICK_S = 0.02
#: After which a worker that ended by itself is followed by another, as the supervisor has it.
AGAIN_S = 1.0
#: Seconds that the upstream gets to listen again after an outage.
LISTEN_S = 10.0
#: What the broker keeps for us in Redis.
BROKER_KEYS = (
    "mimoq.bulk mimoq.interactive unacked unacked_index unacked_mutex "
    "_kombu.binding.mimoq.bulk _kombu.binding.mimoq.interactive"
)


class Play:
    """Performs a plan; `say` gets a line for each thing that happens, `counts` how often each kind did."""

    def __init__(self, stand: Stand, plan: Plan, say: Callable[[str], None]) -> None:
        self._stand = stand
        self._plan = plan
        self._say = say
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._begun = 0.0
        self._back_at = 0.0
        self.counts: Counter[str] = Counter()

    def run(self) -> None:
        """From the first worker to the last event, and what follows from it; then all are there and well."""
        stand = self._stand
        stand.start_workers()
        self._begun = time.monotonic()
        for event in self._plan.events:
            self._at(event.at_s, partial(self._do, event))
        while self._agenda or not stand.valkey.look():
            while self._agenda and self._agenda[0][0] <= self._now():
                heapq.heappop(self._agenda)[2]()
            stand.valkey.look()
            for place in stand.workers.look():
                self._tell("a worker ended by itself", f"place {place}")
                self._at(self._now() + AGAIN_S, partial(self._start, place))
            time.sleep(TICK_S)

    def _now(self) -> float:
        return time.monotonic() - self._begun

    def _at(self, at_s: float, work: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (at_s, next(self._order), work))

    def _later(self, seconds: float, work: Callable[[], None]) -> None:
        self._at(self._now() + seconds, work)

    def _tell(self, what: str, about: str = "") -> None:
        self.counts[what] += 1
        self._say(f"{self._now():8.2f} s  {what:24} {about}".rstrip())

    def _do(self, event: Event) -> None:
        """Does it, or says why it can't be done."""
        batch = self._plan.batches[event.target] if event.target < len(self._plan.batches) else None
        match event.kind:
            case "submit" | "submit_killed" | "cancel":
                assert batch is not None
                self._produce(event)
            case "redis_kill" | "redis_pause" | "wipe":
                self._harm_redis(event)
            case "outage_503" | "outage_refuse" | "cut":
                self._harm_upstream(event)
            case _:
                life = self._stand.workers.places[event.target]
                if life is None:
                    self._tell(f"{event.kind}: skipped", f"nobody is in place {event.target}")
                else:
                    self._harm_worker(event, life)

    def _produce(self, event: Event) -> None:
        batch = self._plan.batches[event.target]
        producers = self._stand.producers
        about = f"batch {batch.number}: {batch.jobs} {batch.lane} jobs"
        match event.kind:
            case "submit":
                producers.submit(batch)
            case "submit_killed":
                producers.submit_killed(batch, event.seconds, event.twice)
                about += f", killed after {event.seconds * 1000:.0f} ms" + (", and again" if event.twice else "")
            case "cancel":
                producers.cancel(batch.number)
        self._tell(event.kind, about)

    def _harm_worker(self, event: Event, life: Life) -> None:
        workers = self._stand.workers
        match event.kind:
            case "kill":
                workers.kill(life)
                self._later(event.seconds, partial(self._start, event.target))
            case "drain":
                workers.tell(life)
                self._start(event.target)
            case _:
                if life.suspended and life.suspended[-1].end > time.time():
                    self._tell(f"{event.kind}: skipped", f"{life.name} is suspended")
                    return
                workers.suspend(life)
                self._later(event.seconds, partial(workers.resume, life))
        self._tell(event.kind, f"{life.name} ({life.lane}) {event.seconds:.1f} s")

    def _start(self, place: int) -> None:
        if self._stand.workers.places[place] is None:
            self._stand.workers.start(place)

    def _harm_redis(self, event: Event) -> None:
        valkey = self._stand.valkey
        if valkey.is_away:
            self._tell(f"{event.kind}: skipped", "the store is away")
            return
        match event.kind:
            case "redis_kill":
                valkey.kill()
                self._later(event.seconds, valkey.start)
            case "redis_pause":
                valkey.pause()
                self._later(event.seconds, valkey.resume)
            case "wipe":
                try:
                    valkey.ask(f"DEL {BROKER_KEYS}")
                except OSError:
                    self._tell("wipe: skipped", "the store did not answer in time")
                    return
        self._tell(event.kind, f"{event.seconds:.1f} s" if event.seconds else "")

    def _harm_upstream(self, event: Event) -> None:
        """Nobody can connect, or all are told 503, until some time later; a cut is over at once, and ends an outage."""
        kind = "503" if event.kind == "outage_503" else "refuse"
        self._stand.sim.configure(down=kind)
        self._back_at = self._now() + event.seconds
        self._at(self._back_at, self._upstream_back)
        self._tell(event.kind, f"{event.seconds:.1f} s" if event.seconds else "")

    def _upstream_back(self) -> None:
        if self._now() >= self._back_at:  # else another outage has begun meanwhile
            wait_for(self._listens, LISTEN_S, "the upstream listens again")

    def _listens(self) -> bool:
        try:
            self._stand.sim.configure(down=None)
        except OSError:
            # A process that we are just starting still holds the descriptor of the closed socket.
            return False
        return True
