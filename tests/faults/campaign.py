"""Runs trials, and looks at what each has left behind."""

from __future__ import annotations

import random
import shutil
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from layerstream import LayerStreamError
from layerstream.api.request import Request

from tests.faults import dying, invariants
from tests.faults.kinds import KINDS, Kind, Scene
from tests.faults.trials import Trial
from tests.faults.wires import Planted, Tripwire
from tests.faults.world import World, bits_of, copy_store

PATIENCE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trial went.

    Attributes:
        num_hit: operations that failed (0: the trial's moment never came).
        num_failed: requests that ended with a typed error, as they may.
        wrong: what should not have been, a line each.
    """

    trial: Trial
    num_hit: int
    num_failed: int
    wrong: tuple[str, ...]


def run(trial: Trial, world: World) -> Outcome:
    """Run *trial*; nothing of it is left behind."""
    folder = Path(tempfile.mkdtemp(prefix="fault-"))
    wrong: list[str] = []
    kind, wire = KINDS[trial.kind], Tripwire(trial.at, trial.times)
    failed = 0
    try:
        if trial.is_warm:
            copy_store(world, trial.mode, folder / "kv")
        if kind.kills:
            wire.num_hit = int(dying.run_and_die(trial, world, str(folder / "kv")))
        else:
            with pytest.MonkeyPatch.context() as patch:
                scene = Scene(trial, world, folder / "kv", patch, wire, random.Random(trial.salt), wrong=wrong)
                failed = _run(scene, kind)
        wrong += invariants.of_the_store(trial, world, folder / "kv")
    except Exception:  # noqa: BLE001  # whatever it is, it is this trial's finding
        wrong.append(traceback.format_exc(limit=-4))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Outcome(trial, wire.num_hit, failed, tuple(wrong))


def _run(scene: Scene, kind: Kind) -> int:
    """Have the fault meet the requests; how many of them failed as they may."""
    trial, world = scene.trial, scene.world
    before = invariants.Traces.now(world.model, scene.store)
    kind.prepare(scene)
    scene.engine = world.engine(trial.mode, scene.store, progress=scene.listen)
    try:
        asked = {scene.submit(number): number for number in trial.early}
        scene.wire.arm()
        kind.strike(scene)
        for number in trial.late:
            try:
                request = scene.submit(number)
            except LayerStreamError:
                if not kind.closes:
                    raise
                continue
            asked[request] = number
            if kind.closes:
                scene.named.add(request)
        failed = _judge(scene, kind, asked)
        scene.wire.disarm()
        scene.hooks.clear()
        for undo in scene.undo:
            undo()
        if not kind.closes:
            scene.wrong += invariants.of_the_engine(trial, world, scene.engine)
    finally:
        scene.engine.close()
    scene.wrong += before.left_since()
    return failed


def _judge(scene: Scene, kind: Kind, asked: Mapping[Request, int]) -> int:
    """Look at every answer; how many requests failed as they may."""
    failed, wrong = 0, scene.wrong
    for request in scene.requests:
        number = asked.get(request)
        what = "the request of the fault" if number is None else f"prompt {number}"
        try:
            completions = request.completions(PATIENCE_SECONDS)
        except Exception as error:  # noqa: BLE001  # judged below
            failed += 1
            if not request.done():
                wrong.append(f"{what} hangs")
            elif not _is_typed(error):
                wrong.append(f"{what} failed with {type(error).__name__}, which is no typed error: {error}")
            elif not _may_fail(kind, scene, request):
                wrong.append(f"{what} failed: {type(error).__name__}: {error}")
            continue
        if any(completion.finish_reason == "cancelled" for completion in completions):
            failed += 1
            if request not in scene.named:
                wrong.append(f"{what} was cancelled")
        elif number is not None and bits_of(completions) != scene.world.right[scene.trial.mode][number]:
            wrong.append(f"{what} was answered wrongly")
    if kind.who == "one" and failed > scene.wire.num_hit:
        wrong.append(f"{failed} requests failed of {scene.wire.num_hit} faults")
    return failed


def _may_fail(kind: Kind, scene: Scene, request: Request) -> bool:
    if kind.who == "nobody" or not (scene.wire.num_hit or kind.who == "named"):
        return False
    return kind.who != "named" or request in scene.named


def _is_typed(error: BaseException | None) -> bool:
    """Whether the error is of the tree, or stems from what the trial planted."""
    while error is not None:
        if isinstance(error, LayerStreamError | Planted):
            return True
        error = error.__cause__
    return False
