"""When a stage's device has no memory left: what is said of it, and who must not wait any longer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine

from model.engine import OutOfRoomError, StageEngine
from model.relief import Relief, brief, out_of_memory
from neurons.telemetry import SteppedDown, Telemetry

log = logging.getLogger("orion.neurons.shortage")


class Shortage:
    """Of one engine. Create it inside the running event loop."""

    def __init__(self, engine: StageEngine, telemetry: Telemetry) -> None:
        self._engine = engine
        self._telemetry = telemetry
        loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = loop.create_future()

        def relieved(relief: Relief) -> None:
            loop.call_soon_threadsafe(self._say, relief)

        engine.relieved = relieved

    async def until(self, mark: Coroutine[object, object, None]) -> None:
        """Wait for `mark`. Raises `OutOfRoomError` as soon as the stage cannot go on."""
        waiting = asyncio.ensure_future(mark)
        try:
            await asyncio.wait({waiting, self._over}, return_when=asyncio.FIRST_COMPLETED)
            await (self._over if self._over.done() else waiting)
        finally:
            waiting.cancel()

    def ends(self, error: BaseException) -> bool:
        """Whether this error of a unit is the end of the stage; who waits `until` something hears of it then."""
        if not isinstance(error, OutOfRoomError) and not out_of_memory(error):
            return False
        if not self._over.done():
            self._over.set_exception(error if isinstance(error, OutOfRoomError) else self._engine.spent(brief(error)))
        return True

    def _say(self, relief: Relief) -> None:
        stage, before, after = self._engine.plan.index, relief.before, relief.after
        log.warning(
            "stage %d ran out of memory on %s: stepped down from %s to %s (%s)",
            stage,
            relief.device,
            before,
            after,
            relief.reason,
        )
        self._telemetry.emit(
            SteppedDown(
                stage=stage,
                device=relief.device,
                recompute=after.recompute.value,
                graphs=after.graphs,
                reason=relief.reason,
            )
        )
