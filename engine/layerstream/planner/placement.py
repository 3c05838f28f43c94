"""Which of several accelerators computes which layers. Pure.

| ``device_map`` | layers |
|---|---|
| ``"balanced"`` | a range for each device, in proportion to its memory |
| ``"sequential"`` | as many as stay on the first device, then on the second; what is left passes through the last |
| ``"auto"`` | balanced where everything stays; where weights stream, devices take turns |

Taking turns is what several links are good for: while one device computes a layer, the next layers are crossing to the
others, so that a sweep's weights arrive over all links at once. Over ranges they arrive over one link after the other,
because a ring holds a layer or two and not a range. What it costs is a crossing of the hidden states per layer:
kilobytes, beside hundreds of megabytes of weights.

What stands before the layers goes with the first of them; what follows, and the head, with the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


def in_ranges(sizes: Sequence[int], shares: Sequence[int]) -> tuple[int, ...]:
    """For each of *sizes* the device of its range, ranges being in proportion to *shares* as closely as sizes allow."""
    total, all_shares = sum(sizes), sum(shares)
    ends = [total * sum(shares[: device + 1]) / all_shares for device in range(len(shares))]
    places: list[int] = []
    passed = 0
    for size in sizes:
        middle = passed + size / 2
        places.append(next((device for device, end in enumerate(ends) if middle < end), len(shares) - 1))
        passed += size
    return tuple(places)


def in_turns(sizes: Sequence[int], rooms: Sequence[int], last: int = 0) -> tuple[int, ...]:
    """For each of *sizes* a device, so that the same number of bytes streams to each of them, all along the sweep.

    Args:
        rooms: what may stay on each device.
        last: the device of the last one, which has the head with it; the others are spread over what that leaves.
    """
    streamed = max(0, sum(sizes) - sum(rooms)) / len(rooms)
    shares = [room + streamed for room in rooms]
    shares[last] -= sizes[-1]
    taken = [0.0] * len(rooms)
    places: list[int] = []
    for size in sizes[:-1]:
        device = min(range(len(rooms)), key=lambda at: ((taken[at] + size) / max(1.0, shares[at]), at))
        taken[device] += size
        places.append(device)
    return (*places, last)


def in_order(num_layers: int, num_devices: int, stays: Callable[[int, range], bool]) -> tuple[int, ...]:
    """For each layer a device: as many as stay on the first, and so on; all that is left on the last.

    Args:
        stays: whether all layers of a range stay on a device.
    """
    places: list[int] = []
    for device in range(num_devices):
        first = len(places)
        if device == num_devices - 1:
            places += [device] * (num_layers - first)
            break
        low, high = 0, num_layers - first
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if stays(device, range(first, first + middle)) else (low, middle - 1)
        places += [device] * low
    return tuple(places)
