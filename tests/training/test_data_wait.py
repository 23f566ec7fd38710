"""The share of time spent waiting for data: the device's, not the host's, which runs ahead of it."""

from __future__ import annotations

import time

import pytest
import torch

from data.loading.device_prefetch import to_device
from utils.training.data_wait import DataWait, DeviceDataWait, data_wait


class Device:
    """A GPU as its stream sees it: work follows work, and a batch that is still being copied; the clock is the host's, in ms."""

    def __init__(self) -> None:
        self.host = self.busy_until = 0.0
        self.events: list[Event] = []

    def event(self) -> Event:
        self.events.append(Event(self))
        return self.events[-1]

    def launch(self, ms: float) -> None:
        self.busy_until = max(self.host, self.busy_until) + ms

    def wait_for(self, when: float) -> None:
        self.busy_until = max(self.host, self.busy_until, when)


class Event:
    def __init__(self, device: Device):
        self.device, self.at = device, 0.0

    def record(self) -> None:
        self.at = max(self.device.host, self.device.busy_until)

    def query(self) -> bool:
        return self.at <= self.device.host

    def synchronize(self) -> None:
        self.device.host = max(self.device.host, self.at)

    def elapsed_time(self, other: Event) -> float:
        assert self.query() and other.query()  # as CUDA refuses to tell otherwise
        return other.at - self.at


def run(device: Device, wait: DeviceDataWait, steps: int, step: float, loading: float, copying: float = 0.0) -> float:
    """Milliseconds waited over ``steps`` steps that take the device ``step``, the loader ``loading`` and a copy ``copying``."""
    before = wait.seconds()
    for _ in range(steps):
        with wait:
            device.host += loading
            device.wait_for(device.host + copying)
        device.host += 1  # launching
        device.launch(step)
    device.host = max(device.host, device.busy_until)  # a line is written
    return 1000 * (wait.seconds() - before)


def test_the_device_waits_only_as_far_as_it_has_nothing_to_do() -> None:
    device = Device()
    wait = DeviceDataWait(device.event)
    assert run(device, wait, 1, step=100, loading=7) == pytest.approx(7)  # nothing has been launched yet
    assert run(device, wait, 10, step=100, loading=90) == pytest.approx(90)  # but for the first after a line, all is hidden
    assert run(device, wait, 10, step=20, loading=50) == pytest.approx(50 + 9 * 30)
    assert run(device, wait, 10, step=100, loading=0, copying=30) == pytest.approx(30)
    assert run(device, wait, 4, step=10, loading=15, copying=30) == pytest.approx(15 + 30 + 3 * 6)  # a batch every 16


def test_events_are_used_again_and_read_only_when_they_are_over() -> None:
    device = Device()
    wait = DeviceDataWait(device.event)
    assert run(device, wait, 1000, step=5, loading=11) == pytest.approx(11 + 999 * 6)
    assert len(device.events) < 200
    far_ahead = Device()  # a host that never waits: nothing may be read, however many there are
    wait = DeviceDataWait(far_ahead.event)
    for _ in range(300):
        with wait:
            pass
        far_ahead.launch(50)
    assert far_ahead.host == 0 and len(far_ahead.events) == 600
    assert wait.seconds() == 0 and far_ahead.host == 299 * 50  # the last batch was there when the 299th step had ended


def test_a_cpu_counts_the_time_of_fetching(monkeypatch: pytest.MonkeyPatch) -> None:
    wait, now = data_wait(torch.device("cpu")), 0.0
    assert isinstance(wait, DataWait)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    for _ in range(2):
        with wait:
            now += 20
        now += 3
    assert wait.seconds() == 40


@pytest.mark.gpu
@pytest.mark.parametrize(("loading", "least", "most"), [(0.0, 0.0, 0.1), (0.15, 0.5, 1.0)])
def test_a_gpu_waits_for_a_slow_loader_alone(loading: float, least: float, most: float) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    matrix = torch.randn(4096, 4096, device=device)

    def step() -> None:
        for _ in range(10):
            torch.mm(matrix, matrix)

    step()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    step()
    torch.cuda.synchronize()
    repeats = max(1, round(0.03 / (time.perf_counter() - begun)))  # a step of some 30 ms

    def host_batches():
        for _ in range(9):
            time.sleep(loading)
            yield (torch.zeros(8, 8),)

    wait = data_wait(device)
    batches = to_device(host_batches(), lambda parts, device: parts[0].to(device, non_blocking=True), device)
    next(batches)
    begun = time.perf_counter()
    for _ in range(6):
        with wait:
            next(batches)
        for _ in range(repeats):
            step()
    torch.cuda.synchronize()
    share = wait.seconds() / (time.perf_counter() - begun)
    assert least <= share <= most, share
