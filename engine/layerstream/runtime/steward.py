"""The scheduler decides, the steward does: the files of suspended pages and states, and what the store holds for those
that run.

Whoever runs sweeps asks the steward where the scheduler would decide something that is to be carried out, so nothing
decided is left undone when a row is computed.

| what fails | then |
|---|---|
| keeping pages: the disk is full | the sequence is computed again when its turn comes, and scheduling begins anew |
| bringing them back: the disk does not give them | the same, and a sweep without it is scheduled |
| bringing them back: anything else | the same, and the sequence has failed (``Scheduler.take_failed``) |
| holding stored pages: the store | nothing here; the sweep that wants them finds them lost |
"""

from __future__ import annotations

from layerstream.core.sequence import Sequence
from layerstream.core.sweep import Sweep
from layerstream.kv.swap import PageSwap
from layerstream.scheduling.composing import NO_DRAFTING, Drafting
from layerstream.scheduling.decisions import Forget, Hold, LetGo, Resume, Suspend
from layerstream.scheduling.scheduler import Scheduler
from layerstream.store.store import PrefixStore


class Steward:
    """Carries out what *scheduler* decides; one thread."""

    def __init__(self, scheduler: Scheduler, swap: PageSwap, state_swap: PageSwap, store: PrefixStore | None) -> None:
        self.scheduler = scheduler
        self.store = store
        self._swap = swap
        self._state_swap = state_swap

    def schedule(self, drafting: Drafting = NO_DRAFTING) -> Sweep | None:
        """The next sweep, ready to run; ``None`` when nothing is there to run."""
        while True:
            sweep = self.scheduler.schedule(drafting)
            if self._carry_out():
                return sweep

    def remove(self, sequence: Sequence) -> None:
        """Forget *sequence*, and what is kept of it elsewhere."""
        self.scheduler.remove(sequence)
        self._carry_out()

    def fork(self, parent: Sequence, child: Sequence) -> tuple[int, int] | None:
        """Let *child* run on the pages of *parent*; the page to copy and its copy, if there is one."""
        copied = self.scheduler.fork(parent, child)
        self._carry_out()
        return copied

    def reset(self) -> None:
        """Forget all sequences, and what is kept of them elsewhere."""
        self.scheduler.reset()
        self._carry_out()

    def lose(self, key: bytes) -> None:
        """The stored page or snapshot *key* turned out damaged or gone: it is computed again."""
        assert self.store is not None
        self.store.lose(key)
        self.scheduler.lose(key)
        self._carry_out()

    def _carry_out(self) -> bool:
        """Do all that was decided; False if pages were lost over it, so that a sweep with them cannot be run."""
        is_done = True
        while (decision := self.scheduler.next_decision()) is not None:
            match decision:
                case Suspend(sequence):
                    if not self._keep(decision):
                        self._drop(sequence)
                        self.scheduler.lose_kept(sequence)
                        is_done = False
                case Resume(sequence):
                    is_done &= self._resume(decision)
                case Forget(sequence):
                    self._drop(sequence)
                case Hold(sequence, keys) if self.store is not None:
                    self.store.hold(sequence.sequence_id, keys)
                case LetGo(sequence) if self.store is not None:
                    self.store.unhold(sequence.sequence_id)
        return is_done

    def _keep(self, decision: Suspend) -> bool:
        """Whether pages and states are kept."""
        number, state = decision.sequence.sequence_id, decision.state
        is_kept = self._swap.write(number, decision.pages)
        return is_kept and (state is None or self._state_swap.write(number, [state]))

    def _drop(self, sequence: Sequence) -> None:
        self._swap.drop(sequence.sequence_id)
        self._state_swap.drop(sequence.sequence_id)

    def _resume(self, decision: Resume) -> bool:
        """Whether pages and states came back."""
        sequence, state, is_back = decision.sequence, decision.state, False
        number = sequence.sequence_id
        try:
            is_back = self._swap.read(number, decision.first, decision.pages)
            is_back = is_back and (state is None or self._state_swap.read(number, 0, [state]))
        except Exception as error:  # noqa: BLE001  # its own misfortune: nothing has changed for the others
            self.scheduler.fail(sequence, error)
        self._drop(sequence)
        if not is_back:
            self.scheduler.lose_kept(sequence)
        return is_back
