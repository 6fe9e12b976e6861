# SPDX-License-Identifier: Apache-2.0
"""Versions of an adapter on a server: a new name each time, no gap, and failures that change nothing."""

import threading
import time
from itertools import count

import pytest
import torch

import graft
from graft import UnknownModelError
from graft.core.errors import AdapterNotFoundError, ConfigError, PeftWarning, ServerTimeoutError
from graft.model.adapter_tensors import AdapterTensors
from graft.serving import Versions


class Server:
    """A server with so many places, which refuses names that it has had."""

    def __init__(self, places):
        self.places, self.held, self.ever = places, {}, set()
        self.fails = lambda what, name: False

    def load(self, name, tensors):
        if self.fails("load", name):
            raise TimeoutError(name)
        assert name not in self.ever, "a name comes again"
        assert len(self.held) < self.places, "no place"
        self.held[name] = tensors
        self.ever.add(name)

    def unload(self, name):
        if self.fails("unload", name):
            raise OSError(name)
        self.held.pop(name, None)


def tensors(n):
    return AdapterTensors({"a": torch.full((1,), float(n))}, {}, {}, f"{n:04d}beef", None, {})


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_each_has_a_name_of_its_own_and_the_newest_stay(keep):
    server = Server(keep + 1)
    versions = Versions("policy", server.load, server.unload, keep)
    assert versions.current is None
    names = []
    for n in range(1, 7):
        names.append(versions.publish(tensors(n)))
        assert versions.current == names[-1] == f"policy-v{n}-{n:04d}"
        assert list(server.held) == versions.names == names[-keep:]
        assert server.held[names[-1]].tensors["a"] == n


def test_a_load_that_fails():
    server = Server(3)
    versions = Versions("policy", server.load, server.unload, 2)
    first = versions.publish(tensors(1))
    server.fails = lambda what, name: what == "load"
    with pytest.raises(TimeoutError):
        versions.publish(tensors(2))
    assert versions.current == first and list(server.held) == versions.names == [first]
    server.fails = lambda what, name: False
    assert versions.publish(tensors(2)) == "policy-v3-0002"  # the name that failed may have been seen


def test_a_server_that_hangs():
    """An error after the time is up, with nothing changed; what is loaded too late goes again by itself."""
    server, goes_on, loading = Server(3), threading.Event(), threading.Event()

    def load(name, made):
        if "0002" in name:
            loading.set()
            assert goes_on.wait(60)
        server.load(name, made)

    versions = Versions("policy", load, server.unload, 2, timeout=0.2)
    first = versions.publish(tensors(1))
    with pytest.raises(
        ServerTimeoutError, match=r"did not load version 'policy-v2-0002' within 0.2 s; a late success is undone"
    ):
        versions.publish(tensors(2))
    assert loading.is_set() and versions.current == first and list(server.held) == versions.names == [first]
    third = versions.publish(tensors(3))  # the server answers others
    assert list(server.held) == versions.names == [first, third]
    goes_on.set()
    late = "policy-v2-0002"
    for _ in range(600):
        if late in server.ever and late not in server.held:
            break
        time.sleep(0.05)
    assert late in server.ever and list(server.held) == versions.names == [first, third]


def test_an_unload_that_hangs():
    """The version stays in the list, and goes the next time."""
    server, goes_on = Server(4), threading.Event()

    def unload(name):
        if not goes_on.is_set():
            goes_on.wait(60)
            return
        server.unload(name)

    versions = Versions("policy", server.load, unload, timeout=0.1)
    first = versions.publish(tensors(1))
    with pytest.warns(PeftWarning, match=f"Version '{first}' could not be unloaded"):
        second = versions.publish(tensors(2))
    assert versions.names == [first, second]
    goes_on.set()
    third = versions.publish(tensors(3))
    assert versions.names == [third] == list(server.held)


def test_a_load_that_says_so_itself():
    """TimeoutError of a socket, say."""
    server = Server(3)
    server.fails = lambda what, name: what == "load"
    with pytest.raises(ServerTimeoutError, match="did not load version 'policy-v1-0001' in time"):
        Versions("policy", server.load, server.unload).publish(tensors(1))
    with pytest.raises(ConfigError, match="timeout=0"):
        Versions("policy", server.load, server.unload, timeout=0)


def test_half_of_the_replicas():
    """What was loaded before the failure goes again."""
    server = Server(3)

    def load(name, made):
        server.load(name, made)
        raise ConnectionError("the second replica")

    versions = Versions("policy", load, server.unload)
    with pytest.raises(ConnectionError):
        versions.publish(tensors(1))
    assert not server.held and versions.current is None


class Half(Server):
    """A server of which one replica loads a version, and the next one fails; both do not unload."""

    def __init__(self, places):
        super().__init__(places)
        self.broken = False

    def load(self, name, made):
        super().load(name, made)
        if self.broken:
            raise ConnectionError("the second replica")


def test_a_failed_load_that_cannot_be_undone_is_told_and_tried_again():
    server = Half(2)
    versions = Versions("policy", server.load, server.unload)
    first = versions.publish(tensors(1))
    server.broken, server.fails = True, lambda what, name: what == "unload"
    with (
        pytest.warns(PeftWarning, match=r"'policy-v2-0002' could not be unloaded, .* next publish\(\) tries it again"),
        pytest.raises(ConnectionError, match="the second replica"),
    ):
        versions.publish(tensors(2))
    assert versions.names == [first] and versions.leftovers == ["policy-v2-0002"]
    with versions.using() as name:  # requests do not wait for it
        assert name == first
    assert list(server.held) == [first, "policy-v2-0002"]
    server.broken, server.fails = False, lambda what, name: what == "unload" and "0002" in name
    with pytest.warns(PeftWarning, match="'policy-v2-0002'"), pytest.raises(AssertionError, match="no place"):
        versions.publish(tensors(3))
    assert versions.leftovers[-1] == "policy-v2-0002"
    server.fails = lambda what, name: False
    fourth = versions.publish(tensors(4))  # the leftover goes first, and leaves its place
    assert list(server.held) == versions.names == [fourth] and not versions.leftovers


@pytest.mark.parametrize("error", [AdapterNotFoundError, UnknownModelError])
def test_what_the_server_does_not_have_is_no_leftover(error):
    def refuse(name, made):
        raise ConnectionError("refused")

    def unload(name):
        raise error(f"There is no {name}.")

    versions = Versions("policy", refuse, unload)
    with pytest.raises(ConnectionError, match="refused"):
        versions.publish(tensors(1))
    assert not versions.leftovers


def test_a_late_load_that_cannot_be_undone_is_tried_again():
    server, goes_on, tried = Server(3), threading.Event(), threading.Event()

    def load(name, made):
        if "0002" in name:
            assert goes_on.wait(60)
        server.load(name, made)

    def unload(name):
        try:
            server.unload(name)
        finally:
            tried.set()

    versions = Versions("policy", load, unload, 2, timeout=0.1)
    first = versions.publish(tensors(1))
    with pytest.raises(ServerTimeoutError):
        versions.publish(tensors(2))
    server.fails = lambda what, name: what == "unload"
    goes_on.set()
    assert tried.wait(60)
    for _ in range(600):
        if versions.leftovers:
            break
        time.sleep(0.01)
    late = "policy-v2-0002"
    assert versions.leftovers == [late] and list(server.held) == [first, late]
    server.fails = lambda what, name: False
    third = versions.publish(tensors(3))
    assert list(server.held) == versions.names == [first, third] and not versions.leftovers


def test_requests_do_not_unload_what_others_leave():
    """Leaving a block unloads the version that it used, not those that could not be unloaded before."""
    server, asked = Server(9), []
    versions = Versions("policy", server.load, lambda name: (asked.append(name), server.unload(name)))
    first = versions.publish(tensors(1))
    server.fails = lambda what, name: what == "unload"
    with pytest.warns(PeftWarning):
        versions.publish(tensors(2))
    with versions.using():
        pass
    assert asked == [first]


def test_one_in_use_stays():
    server = Server(4)
    versions = Versions("policy", server.load, server.unload)
    first = versions.publish(tensors(1))
    with versions.using() as name, versions.using(first):
        assert name == first
        second = versions.publish(tensors(2))
        assert list(server.held) == [first, second]
        with versions.using() as now:
            assert now == second
    assert list(server.held) == [second]
    with pytest.raises(AdapterNotFoundError, match="no version 'policy-v1-0001' of 'policy'"), versions.using(first):
        raise AssertionError


def test_an_unload_that_fails_is_tried_again():
    server = Server(3)
    versions = Versions("policy", server.load, server.unload)
    first = versions.publish(tensors(1))
    server.fails = lambda what, name: what == "unload"
    with pytest.warns(PeftWarning, match=f"'{first}' could not be unloaded"):
        second = versions.publish(tensors(2))
    assert versions.names == [first, second] and versions.current == second
    server.fails = lambda what, name: False
    third = versions.publish(tensors(3))
    assert list(server.held) == versions.names == [third]


def test_numbers_go_on_after_a_resume():
    server = Server(2)
    versions = Versions("policy", server.load, server.unload)
    versions.publish(tensors(1))
    state = versions.state_dict()
    again = Versions("policy", server.load, server.unload)
    again.load_state_dict(state)
    assert again.publish(tensors(1)) == "policy-v2-0001"
    with pytest.raises(ConfigError, match="at version 2, and"):
        again.load_state_dict(state)


def test_bad_calls():
    with pytest.raises(ConfigError, match="keep=0"):
        Versions("policy", print, print, keep=0)
    versions = Versions("policy", print, print)
    with pytest.raises(ConfigError, match="no tensors to publish"):
        versions.publish(AdapterTensors({}, {}, {}, "", None, {}))
    with pytest.raises(AdapterNotFoundError, match="no version None"), versions.using():
        raise AssertionError


def test_threads_never_see_a_name_that_is_gone():
    server, stop = Server(20), threading.Event()
    versions = Versions("policy", server.load, server.unload, 2)
    versions.publish(tensors(0))
    seen, wrong = set(), []

    def ask():
        while not stop.is_set():
            with versions.using() as name:
                if name not in server.held:
                    wrong.append(name)
                seen.add(name)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for n in count(1):
        versions.publish(tensors(n))
        if n >= 200 and len(seen) > 1:  # a busy machine may not have run the threads yet
            break
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong and len(server.held) == 2
    assert graft.serving.Versions is Versions
