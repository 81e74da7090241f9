"""Subscribes to the KV events of every replica that offers them, and feeds the prefix index. Nothing waits for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import zmq
import zmq.asyncio

from octavo_gateway.cache_events.feed import CacheFeed, Resync
from octavo_gateway.cache_events.wire import SNAPSHOT_REQUEST, MalformedEventError, Update, read_event, read_snapshot
from octavo_gateway.registry import CacheEvents, EndpointState, Registry, Snapshot
from octavo_gateway.routing import PrefixIndex

log = logging.getLogger("octavo.gateway.cache_events")

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
QUEUED_MESSAGES = 1_000
MESSAGES_PER_TURN = 64
MESSAGES_PER_S = 2_000
SNAPSHOT_TIMEOUT_S = 10.0
RESYNC_EVERY_S = 1.0  # at most, of one replica
RETRY_S = (0.2, 30.0)
_HEARTBEAT_MS = 10_000


class CacheFollower:
    """One subscription for each replica; `run` keeps them current until it is cancelled.

    `on_resync` hears why a replica's cache is asked for anew. What a replica sends can cost it its place in the index,
    and nothing more: messages are bounded in size, number and rate, what cannot be read is dropped and asked for anew,
    and without a feed routing goes on by what was sent.
    """

    def __init__(self, registry: Registry, index: PrefixIndex, on_resync: Callable[[str], None]) -> None:
        self._registry = registry
        self._index = index
        self._on_resync = on_resync
        self._followed: dict[str, tuple[_Following, asyncio.Task[None]]] = {}
        self._changed = asyncio.Event()
        registry.subscribe(self._on_change)

    async def run(self) -> None:
        """Follow until cancelled."""
        context = _context()
        try:
            while True:
                self._changed.clear()
                self._adjust(context)
                await self._changed.wait()
        finally:
            tasks = [task for _, task in self._followed.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            context.destroy(linger=0)

    def replica_restarted(self, endpoint_id: str) -> None:
        """Another process answers there, with an empty cache."""
        followed = self._followed.get(endpoint_id)
        if followed is not None:
            followed[0].restarted()
        else:
            self._index.forget(endpoint_id)

    def _on_change(self, snapshot: Snapshot) -> None:
        self._changed.set()

    def _adjust(self, context: zmq.asyncio.Context) -> None:
        wanted = {
            endpoint.id: endpoint.cache_events
            for entry in self._registry.snapshot.models.values()
            for endpoint in entry.endpoints
            if endpoint.cache_events is not None and endpoint.state is not EndpointState.STARTING
        }
        for endpoint_id, (following, task) in list(self._followed.items()):
            if wanted.get(endpoint_id) != following.where:
                task.cancel()
                del self._followed[endpoint_id]
        for endpoint_id, where in wanted.items():
            if endpoint_id not in self._followed:
                following = _Following(context, endpoint_id, where, self._index, self._on_resync)
                self._followed[endpoint_id] = (following, asyncio.create_task(following.run()))


class _Following:
    """One replica."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        endpoint_id: str,
        where: CacheEvents,
        index: PrefixIndex,
        on_resync: Callable[[str], None],
    ) -> None:
        self.where = where
        self._context = context
        self._id = endpoint_id
        self._index = index
        self._on_resync = on_resync
        self._feed = CacheFeed()
        self._asking: asyncio.Task[None] | None = None
        self._asked_at = -RESYNC_EVERY_S

    async def run(self) -> None:
        try:
            events = _connect(self._context, zmq.SUB, self.where.events)
        except zmq.ZMQError as error:
            log.error("replica %s: its KV events cannot be followed (%s)", self._id, error)
            return
        events.subscribe(b"")
        try:
            while True:
                self._ask_if_needed()
                began_at, count = asyncio.get_running_loop().time(), 0
                self._push(await events.recv_multipart())
                while count < MESSAGES_PER_TURN and await events.poll(0):
                    self._push(await events.recv_multipart())
                    count += 1
                left_s = count / MESSAGES_PER_S - (asyncio.get_running_loop().time() - began_at)
                if left_s > 0:
                    await asyncio.sleep(left_s)
        finally:
            if self._asking is not None:
                self._asking.cancel()
                await asyncio.gather(self._asking, return_exceptions=True)
            events.close(linger=0)
            self._index.unfollow(self._id)

    def restarted(self) -> None:
        self._feed.needs = Resync.RESTART
        self._ask_if_needed()

    def _push(self, frames: list[bytes]) -> None:
        try:
            update = self._feed.push(read_event(frames))
        except MalformedEventError as error:
            if self._feed.needs is None:
                log.warning("replica %s: a KV event cannot be read (%s)", self._id, error)
            self._feed.malformed()
            return
        if update is not None:
            self._apply(update)

    def _apply(self, update: Update) -> None:
        if update.cleared:
            self._index.follow(self._id)
        self._index.removed(self._id, update.removed)
        self._index.stored(self._id, update.stored)

    def _ask_if_needed(self) -> None:
        if self._feed.needs is not None and (self._asking is None or self._asking.done()):
            self._asking = asyncio.create_task(self._ask())

    async def _ask(self) -> None:
        """Ask for snapshots until one closes the hole; a replica that gives none is routed to by what was sent."""
        pause_s, longest_s = RETRY_S
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._asked_at + RESYNC_EVERY_S - loop.time())
        while (why := self._feed.needs) is not None:
            self._on_resync(why)
            self._asked_at = loop.time()
            problem = ""
            try:
                told = await self._snapshot()
                problem = "it keeps no prefix labels" if told is None else ""
                for update in self._feed.snapshot(*told) if told is not None else ():
                    self._apply(update)
            except TimeoutError:
                problem = f"no answer within {SNAPSHOT_TIMEOUT_S:g} s"
            except (MalformedEventError, zmq.ZMQError) as error:
                problem = str(error)
            if self._feed.needs is None:
                return
            if problem and pause_s == RETRY_S[0]:  # once for each hole
                log.warning("replica %s tells nothing of its prefix cache (%s)", self._id, problem)
            self._index.unfollow(self._id)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, longest_s)

    async def _snapshot(self) -> tuple[int, Update] | None:
        replay = _connect(self._context, zmq.DEALER, self.where.replay)
        try:
            async with asyncio.timeout(SNAPSHOT_TIMEOUT_S):
                await replay.send_multipart([b"", SNAPSHOT_REQUEST])
                return read_snapshot(await replay.recv_multipart())
        finally:
            replay.close(linger=0)


def _context() -> zmq.asyncio.Context:
    context = zmq.asyncio.Context()
    context.set(zmq.MAX_SOCKETS, min(65_535, context.get(zmq.SOCKET_LIMIT)))
    return context


def _connect(context: zmq.asyncio.Context, kind: int, address: str) -> zmq.asyncio.Socket:
    socket = context.socket(kind)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.RCVHWM, QUEUED_MESSAGES)
    socket.setsockopt(zmq.SNDHWM, QUEUED_MESSAGES)
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)  # a silent connection is made anew
    socket.setsockopt(zmq.RECONNECT_IVL, 100)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 5_000)
    socket.setsockopt(zmq.IPV6, "[" in address)
    socket.connect(address)
    return socket
