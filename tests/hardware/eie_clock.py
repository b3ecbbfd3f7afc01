"""EIE clocked one cycle at a time: the slow, obvious machine that the recurrence must equal."""

from collections import deque


class Fetch:
    """Looks through the activations group by group; one that is not zero goes to all queues."""

    def __init__(self, active, elements):
        self.groups = [active[i : i + elements] for i in range(0, len(active), elements)]
        self.group, self.place = 0, 0

    @property
    def done(self):
        return self.group >= len(self.groups)

    def clock(self, one_is_full):
        """The column broadcast in this cycle, if any."""
        group = self.groups[self.group]
        found = next((i for i in range(self.place, len(group)) if group[i]), None)
        if found is None:
            self.group, self.place = self.group + 1, 0
            return None
        if one_is_full:
            return None
        column = self.group * len(self.groups[0]) + found
        self.place = found + 1
        if self.place == len(self.groups[0]):
            self.group, self.place = self.group + 1, 0
        return column


def clocked_cycles(work, active, capacity, pipeline=7):
    """`work` is (elements, columns) entries; the cycle after which the last element is free."""
    elements = len(work)
    fetch = Fetch(list(active), elements)
    queues = [deque() for _ in range(elements)]
    busy = [0] * elements
    cycle = last = 0
    while not fetch.done or any(queues) or any(busy):
        full = any(len(queue) >= capacity for queue in queues)
        column = None if fetch.done else fetch.clock(full)
        for p in range(elements):
            if not busy[p] and queues[p]:
                busy[p] = max(1, int(work[p][queues[p].popleft()]))
            if busy[p]:
                busy[p] -= 1
                last = cycle + 1
        if column is not None:
            for queue in queues:
                queue.append(column)
        cycle += 1
    return last + pipeline
