"""Many inside at once, or one alone."""

import threading
import time

from threads import at_once

from torch2rt.runtime.shared_lock import Gate


def test_who_is_alone_waits_and_keeps_others_out():
    gate, events = Gate(), []
    gate.enter("first")

    def alone():
        with gate.alone():
            events.append("alone")
            time.sleep(0.05)
            events.append("still alone")

    def enter():
        gate.enter("second")
        events.append("second")
        gate.leave("second")

    one = threading.Thread(target=alone)
    one.start()
    while not gate.closed:
        time.sleep(0.001)
    many = threading.Thread(target=enter)
    many.start()
    time.sleep(0.02)
    assert events == []  # the first is still inside
    gate.leave("first")
    one.join()
    many.join()
    assert events == ["alone", "still alone", "second"] and not gate.inside and not gate.closed


def test_many_are_inside_at_once():
    gate, together = Gate(), threading.Barrier(3)

    def work(name):
        gate.enter(name)
        together.wait(10)  # breaks if one had to wait for another
        gate.leave(name)

    at_once([lambda name=name: work(name) for name in range(3)])
    assert not together.broken and not gate.inside


def test_nobody_is_beside_who_is_alone():
    gate, inside, stop = Gate(), [], time.monotonic() + 0.5
    seen, turns = [], [0, 0]

    def many(name):
        while time.monotonic() < stop:
            gate.enter(name)
            inside.append(name)
            inside.remove(name)
            gate.leave(name)
            turns[0] += 1

    def alone():
        while time.monotonic() < stop:
            with gate.alone():
                seen.extend(inside)
                turns[1] += 1

    at_once([*(lambda name=name: many(name) for name in range(3)), alone, alone])
    assert not seen and min(turns) > 0


def test_an_error_opens_it_again():
    gate = Gate()
    try:
        with gate.alone():
            raise KeyError
    except KeyError:
        gate.enter("someone")
    assert gate.inside == {"someone"}
