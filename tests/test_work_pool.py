"""Processes that die at any moment, even in the middle of an answer, cost the pool one image or nothing."""

from __future__ import annotations

import os
import signal
import time
from contextlib import closing
from functools import partial
from multiprocessing import connection, forkserver

import pytest

from fastssl.data_prep.convert import prepare_place
from fastssl.data_prep.prepare import Store
from fastssl.data_prep.work_pool import Died, WorkPool
from fastssl.data_prep.worker import Worker


def half_an_answer(number: int) -> bytes:
    """Negative numbers kill the process when half of its answer is on its way."""

    def send(pipe: connection.Connection, answer: bytes) -> None:
        os.write(pipe.fileno(), answer[: len(answer) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    if number < 0:
        connection.Connection._send = send
    return bytes(abs(number))


def root(number: int) -> float:
    if number < 0:
        raise ArithmeticError(f"{number} has none")
    return number**0.5


def wait_and_name(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_death_in_the_middle_of_an_answer_costs_its_image_only(workers):
    with closing(WorkPool(half_an_answer, workers)) as pool:
        tickets = [pool.submit(items) for items in ([1, 2], [3, -4, 5], [6, 7], [], [-8])]
        found = [pool.results(ticket) for ticket in tickets]
    assert found == [[bytes(1), bytes(2)], [bytes(3), Died(), bytes(5)], [bytes(6), bytes(7)], [], [Died()]]


def test_what_the_function_raises_is_raised_and_tells_where():
    with closing(WorkPool(root, 1)) as pool:
        ticket = pool.submit([4, -1])
        with pytest.raises(ArithmeticError, match="-1 has none") as caught:
            pool.results(ticket)
        assert "in root" in str(caught.value.__cause__)
        assert pool.results(pool.submit([4])) == [2]


def test_tickets_are_worked_on_side_by_side_by_no_more_processes_than_asked():
    with closing(WorkPool(wait_and_name, 2)) as pool:
        names = [pool.results(ticket)[0] for ticket in [pool.submit([0.2]) for _ in range(6)]]
    assert len(set(names)) == 2


@pytest.fixture
def own_server(monkeypatch):
    """A server to kill: the processes of other tests are forked from theirs, which has imported much more."""
    server = forkserver.ForkServer()
    monkeypatch.setattr(forkserver, "_forkserver", server)
    for name in ("ensure_running", "connect_to_new_process", "set_forkserver_preload"):
        monkeypatch.setattr(forkserver, name, getattr(server, name))
    yield
    server._stop()


@pytest.mark.usefixtures("own_server")
def test_the_death_of_the_server_that_starts_processes_costs_nothing():
    with closing(WorkPool(wait_and_name, 2)) as pool:
        first = pool.results(pool.submit([0]))
        os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
        names = [pool.results(ticket)[0] for ticket in [pool.submit([0.2]) for _ in range(6)]]
    assert set(first) < set(names) and len(set(names)) == 2  # the first process lives on, and another is started


def test_the_server_imports_what_the_function_needs_for_all_processes(monkeypatch):
    from fastssl.data_prep import static_views  # not above: every process here imports this file, and that torchvision

    preload = []
    monkeypatch.setattr(forkserver, "set_forkserver_preload", preload.append)
    for function in (static_views.draw, partial(prepare_place, store=Store())):
        Worker(function).end()
    assert preload == [["torch", "fastssl.data_prep.static_views"], ["torch", "fastssl.data_prep.convert"]]


@pytest.mark.usefixtures("own_server")
def test_a_server_that_is_slow_to_be_gone_costs_nothing(monkeypatch):
    """A killed process closes its files before its parent is told, and a busy machine can stop it in between."""
    wait_pid = os.waitpid
    with closing(WorkPool(abs, 1)) as pool:
        assert pool.results(pool.submit([-1])) == [1]
    server = forkserver._forkserver._forkserver_pid
    os.kill(server, signal.SIGKILL)
    os.waitid(os.P_PID, server, os.WEXITED | os.WNOWAIT)
    with closing(WorkPool(abs, 1)) as pool:
        told = time.monotonic() + 0.3
        monkeypatch.setattr(
            os, "waitpid", lambda pid, how: (0, 0) if pid == server and time.monotonic() < told else wait_pid(pid, how)
        )
        assert pool.results(pool.submit([-3, 4])) == [3, 4]
        assert time.monotonic() > told
