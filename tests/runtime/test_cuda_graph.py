"""What stands around torch's recording of CUDA graphs, which is a mock here; tests/training/test_step_graph.py has the real one."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from utils.runtime import cuda_graph
from utils.runtime.cuda_graph import CudaRecorder


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Mocks of the functions of torch.cuda that are used, by name."""
    names = ("Stream", "stream", "current_stream", "set_stream", "graph_pool_handle", "CUDAGraph", "get_sync_debug_mode",
             "set_sync_debug_mode")
    mocks: dict[str, Any] = {name: mock.MagicMock(name=name) for name in names}
    mocks["graph"] = mock.MagicMock(side_effect=lambda graph, **options: contextlib.nullcontext())
    mocks["stream"].side_effect = lambda stream: contextlib.nullcontext()
    mocks["default_generators"] = (mock.MagicMock(),)
    for name, value in mocks.items():
        monkeypatch.setattr(torch.cuda, name, value)
    cuda_graph._stream.cache_clear()
    yield mocks
    cuda_graph._stream.cache_clear()


def test_a_rehearsal_names_what_waits_and_passes_other_warnings_on(cuda: dict[str, Any]) -> None:
    def work() -> int:
        warnings.warn("called a synchronizing CUDA operation (Triggered internally at x.cpp:1.)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        return 3

    recorder = CudaRecorder(torch.device("cuda", 0))
    with pytest.warns(UserWarning, match="something else") as told:
        result, obstacle = recorder.rehearse(work)
    assert result == 3 and "test_cuda_graph.py, line " in obstacle and len(told) == 1
    assert [call.args for call in cuda["set_sync_debug_mode"].call_args_list] == [("warn",), (cuda["get_sync_debug_mode"](),)]
    assert recorder.rehearse(lambda: None) == (None, "")
    stream, current = recorder.stream, cuda["current_stream"]()
    stream.wait_stream.assert_called_with(current)
    current.wait_stream.assert_called_with(stream)


def test_recordings_share_memory_and_a_stream(cuda: dict[str, Any]) -> None:
    recorder = CudaRecorder(torch.device("cuda", 0))
    replay, result = recorder.record(lambda: 5)
    assert result == 5 and replay == cuda["CUDAGraph"]().replay
    assert CudaRecorder(torch.device("cuda", 0)).stream is recorder.stream
    _, options = cuda["graph"].call_args
    assert options == dict(pool=recorder.pool, stream=recorder.stream, capture_error_mode="thread_local")
    with pytest.raises(RuntimeError, match="on the host"):
        recorder.record(lambda: torch.rand(()))
    assert not cuda["set_stream"].called


def test_what_breaks_leaves_the_streams_and_the_generator_usable(cuda: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ended, released = mock.MagicMock(), mock.MagicMock()
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", released, raising=False)
    recorder, generator = CudaRecorder(torch.device("cuda", 0)), cuda["default_generators"][0]
    for clean, times in ((False, 1), (True, 1)):
        ended.side_effect = RuntimeError("has ended") if clean else None
        with pytest.raises(RuntimeError, match="broken"):
            recorder.record(mock.MagicMock(side_effect=RuntimeError("broken")))
        assert released.call_count == times
    cuda["set_stream"].assert_called_with(cuda["current_stream"]())
    generator.graphsafe_set_state.assert_called_with(generator.clone_state())
