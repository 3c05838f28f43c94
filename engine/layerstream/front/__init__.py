"""What callers ask of an engine, by what they want of it: :class:`~layerstream.LayerStream` inherits from each.

Each file has the methods of one subject, with all that is said about them, and what they need beside what every open
engine has (:mod:`layerstream.front.opened`). Arguments are checked here and in :mod:`layerstream.intake`; the work is
done by the loop, the scheduler and the store.
"""
