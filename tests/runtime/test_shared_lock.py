"""Many holders at once, or one alone."""

import threading
import time

from harness.threads import at_once

from torch2rt.runtime.shared_lock import TURNS, SharedLock


def test_who_is_alone_waits_and_keeps_others_out():
    lock, events = SharedLock(), []
    lock.acquire("first")

    def alone():
        with lock.exclusive():
            events.append("alone")
            time.sleep(0.05)
            events.append("still alone")

    def enter():
        lock.acquire("second")
        events.append("second")
        lock.release("second")

    one = threading.Thread(target=alone)
    one.start()
    while not lock.is_exclusive:
        time.sleep(0.001)
    many = threading.Thread(target=enter)
    many.start()
    time.sleep(0.02)
    assert events == []  # the first is still inside
    lock.release("first")
    one.join()
    many.join()
    assert events == ["alone", "still alone", "second"] and not lock.holders and not lock.is_exclusive


def test_many_are_inside_at_once():
    lock, together = SharedLock(), threading.Barrier(3)

    def work(name):
        lock.acquire(name)
        together.wait(10)  # breaks if one had to wait for another
        lock.release(name)

    at_once([lambda name=name: work(name) for name in range(3)])
    assert not together.broken and not lock.holders


def test_nobody_is_beside_who_is_alone():
    lock, inside, stop = SharedLock(), [], time.monotonic() + 0.5
    seen, turns = [], [0, 0]

    def many(name):
        while time.monotonic() < stop:
            lock.acquire(name)
            inside.append(name)
            inside.remove(name)
            lock.release(name)
            turns[0] += 1

    def alone():
        while time.monotonic() < stop:
            with lock.exclusive():
                seen.extend(inside)
                turns[1] += 1

    at_once([*(lambda name=name: many(name) for name in range(3)), alone, alone])
    assert not seen and min(turns) > 0


def test_an_error_opens_it_again():
    lock = SharedLock()
    try:
        with lock.exclusive():
            raise KeyError
    except KeyError:
        lock.acquire("someone")
    assert lock.holders == {"someone"}


def test_a_meeting_has_the_next_calls_take_turns():
    lock, met = SharedLock(), threading.Event()
    assert lock.alone(lambda: 3) == 3 and lock.turns == 0

    def second():
        met.set()
        lock.alone(met.set)

    other = threading.Thread(target=second)
    lock.alone(lambda: (other.start(), met.wait(10), time.sleep(0.05)))
    other.join()
    assert lock.turns == TURNS
