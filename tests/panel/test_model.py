"""Jobs of several users of one model."""

import threading
from pathlib import Path

from c2r.panel.model import Panel


def test_only_the_user_of_a_job_cancels_it_and_one_runs_at_a_time():
    panel = Panel(None, {}, None, None, Path())
    order, started = [], threading.Event()

    def wait(session):
        with panel.job(session) as cancelled:
            order.append(session)
            started.set()
            assert cancelled.wait(30)

    threads = [threading.Thread(target=wait, args=[session]) for session in ("a", "b")]
    threads[0].start()
    assert started.wait(30)
    threads[1].start()
    while len(panel.jobs) < 2:
        pass
    panel.cancel("c")
    assert order == ["a"]
    assert not any(cancelled.is_set() for cancelled in panel.jobs)
    panel.cancel("b")  # it waits; it is cancelled when it begins
    panel.cancel("a")
    for thread in threads:
        thread.join(30)
    assert order == ["a", "b"]
    assert panel.jobs == {}
