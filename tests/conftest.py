"""Shared by all tests: no network, two threads at most in all, and the skips that need a GPU."""

import os
import socket

import pytest
import torch

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, min(2, torch.get_num_threads()) // WORKERS))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any attempt to open an internet connection fails the test: nothing is fetched unless asked."""

    def refuse(self, address, *rest):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            raise AssertionError(f"a test tried to connect to {address}")
        return connect(self, address, *rest)

    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", refuse)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name != "test_triton.py")  # minutes in one test: begun last, they come on top
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords would also be the names of folders
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU on this machine"))
