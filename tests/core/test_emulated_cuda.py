"""The stand-in for CUDA finds what it is there to find, and finds nothing where nothing is wrong."""

import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from emulated_cuda import CudaTensor, emulated_cuda


@pytest.fixture
def gpu():
    with emulated_cuda(2) as gpu:
        yield gpu


def ones(*shape, device="cuda:0", dtype=torch.float32):
    return torch.ones(shape, device=device, dtype=dtype)


# --- what a tensor is -----------------------------------------------------------------------------------------


def test_a_tensor_says_where_it_is_and_computes_as_on_the_cpu(gpu):
    x = torch.arange(12.0).view(3, 4)
    there = x.to("cuda:1")
    assert (there.device, there.is_cuda, x.is_cuda) == (torch.device("cuda:1"), True, False)
    assert torch.zeros(2, device="cuda").device == torch.device("cuda:0")
    for work in (
        lambda x: x.softmax(-1) @ x.mT,
        lambda x: F.layer_norm(x, (4,)).clamp_(0, 1),
        lambda x: x[1:, None, ::2] + 1,
        lambda x: x[torch.tensor([2, 0], device=x.device)],
        lambda x: torch.einsum("ij,kj->ik", x, x).flatten(),
        lambda x: torch.zeros_like(x).index_select(0, torch.tensor([1], device=x.device)),
        lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    ):
        made = work(there)
        assert type(made) is CudaTensor
        assert made.device == there.device
        torch.testing.assert_close(made.cpu(), work(x))
    filled = torch.zeros(3, 4, device="cuda:0")
    filled[1] = torch.arange(4.0).to("cuda:0")
    filled[:, 2] = 7
    assert filled.tolist() == [[0, 0, 7, 0], [0, 1, 7, 3], [0, 0, 7, 0]]
    assert not gpu.faults


def test_a_network_moves_there_and_back(gpu):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Flatten(2), nn.Linear(16, 2)).requires_grad_(False)
    image = torch.rand(1, 3, 6, 6)
    expected = network(image)
    network.to("cuda:0").to(memory_format=torch.channels_last)
    assert {parameter.device for parameter in network.parameters()} == {torch.device("cuda:0")}
    torch.testing.assert_close(network(image.cuda()).cpu(), expected)


def test_inference_mode_or_not_is_the_same(gpu):
    outside = ones(4)
    with torch.inference_mode():
        inside = outside.view(2, 2) + 1
        outside.mul_(3)
    inside.add_(outside.view(2, 2))
    assert inside.tolist() == [[5, 5], [5, 5]]


def test_devices_are_not_mixed(gpu):
    here, there = ones(3), ones(3, device="cuda:1")
    for other in (there, torch.ones(3)):
        with pytest.raises(RuntimeError, match="same device"):
            here + other
        with pytest.raises(RuntimeError, match="same device"):
            torch.cat([here, other])
    assert (here + torch.tensor(2.0)).tolist() == [3, 3, 3]  # a scalar of the CPU may be
    with pytest.raises(RuntimeError, match="ordinal"):
        torch.zeros(1, device="cuda:2")
    with pytest.raises(TypeError, match="cpu"):
        here.numpy()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_products_are_summed_in_float32_and_rounded_once(gpu, dtype):
    a, b = torch.randn(2, 16, 4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    product = a.cuda() @ b.cuda().mT
    assert torch.equal(product.cpu(), (a.float() @ b.float().mT).to(dtype))


def test_layouts_are_those_of_the_device_and_changes_are_counted(gpu):
    image = torch.rand(1, 8, 6, 6).cuda().to(memory_format=torch.channels_last)
    convolution = nn.Conv2d(8, 8, 3, device="cuda:0").requires_grad_(False).to(memory_format=torch.channels_last)
    gpu.reset_counts()
    assert convolution(image).is_contiguous(memory_format=torch.channels_last)
    assert gpu.counts["layout change"] == 0
    normed = F.group_norm(image, 2)
    assert normed.is_contiguous()  # PyTorch's own on CUDA returns channels first, whatever comes in
    assert gpu.counts["layout change"] == 1
    convolution(normed)
    assert gpu.counts["layout change"] == 2  # cuDNN's
    normed + image
    assert gpu.counts["layout change"] == 3


def test_memory_can_run_out(gpu):
    gpu.memory_limit = 4000
    with pytest.raises(torch.OutOfMemoryError):
        ones(1001)
    kept = [ones(400), ones(400)]
    with pytest.raises(torch.OutOfMemoryError):
        ones(400)
    kept.clear()
    ones(900)
    assert torch.cuda.memory_allocated() == 0


# --- waiting ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "waits"),
    [
        (lambda x: x + x, []),
        (lambda x: x.sum().item(), [".item()"]),
        (lambda x: bool(x.any()), [".item()"]),
        (lambda x: x.cpu(), ["copy to the host"]),
        (lambda x: x.tolist(), ["copy to the host"]),
        (lambda x: x.nonzero(), ["nonzero"]),
        (lambda x: x[x > 0], ["index by a mask"]),
        (lambda x: torch.tensor([1, 2], device=x.device), ["copy to the device"]),
        (lambda x: torch.as_tensor(np.ones(3), device=x.device), ["copy to the device"]),
        (lambda x: torch.ones(3).to(x.device, non_blocking=True), ["copy to the device"]),  # not from pinned memory
        (lambda x: torch.ones(3).pin_memory().to(x.device), ["copy to the device"]),  # not non_blocking
        (lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True), []),
        (lambda x: torch.empty(3, pin_memory=True).copy_(x, non_blocking=True), []),
        (lambda x: torch.empty(3).copy_(x, non_blocking=True), ["copy to the host"]),
        (lambda x: x.to("cuda:1"), []),
        (lambda x: torch.cuda.synchronize(), ["device.synchronize"]),
        (lambda x: torch.cuda.current_stream().synchronize(), ["stream.synchronize"]),
        (lambda x: torch.cuda.current_stream().record_event().synchronize(), ["event.synchronize"]),
    ],
)
def test_waits_are_counted(gpu, work, waits):
    x = ones(3)
    gpu.reset_counts()
    work(x)
    assert gpu.waits == waits


def test_a_wait_for_what_has_ended_is_none(gpu):
    x = ones(3)
    torch.cuda.synchronize()
    done = torch.cuda.current_stream().record_event()
    gpu.reset_counts()
    torch.cuda.synchronize()
    done.synchronize()
    assert gpu.waits == []
    x.add_(1)
    torch.cuda.synchronize()
    assert gpu.waits == ["device.synchronize"]


def test_hidden_waits_can_be_forbidden(gpu):
    x = ones(3)
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing"):
        x.sum().item()
    torch.cuda.set_sync_debug_mode("warn")
    with pytest.warns(UserWarning, match="synchronizing"):
        x.cpu()
    torch.cuda.set_sync_debug_mode("default")
    x.cpu()


def test_a_copy_to_pinned_memory_arrives_when_the_host_waits(gpu):
    target = torch.empty(3, pin_memory=True)
    target.copy_(ones(3), non_blocking=True)
    assert np.isnan(target.numpy()).all()
    assert len(gpu.faults) == 1
    torch.cuda.current_stream().synchronize()
    assert (target.numpy() == 1).all()
    assert len(gpu.faults) == 1


def test_pinned_memory_stays_as_it_is_until_the_device_has_read_it(gpu):
    source = torch.empty(3, pin_memory=True)
    for early in (False, True):
        source.numpy()[...] = 1
        source.to("cuda:0", non_blocking=True)
        if not early:
            torch.cuda.synchronize()
        source.numpy()[...] = 2
        torch.cuda.synchronize()
        assert bool(gpu.faults) is early


def test_events_tell_times_of_what_is_done(gpu):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    ones(3)
    end.record()
    with pytest.raises(RuntimeError, match="not ready"):
        begin.elapsed_time(end)
    end.synchronize()
    assert begin.elapsed_time(end) > 0


# --- streams ---------------------------------------------------------------------------------------------------


def test_a_race_is_noticed_and_an_order_is_none(gpu):
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    x = ones(3)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        x + 1  # reads what main has written before
    assert not gpu.faults
    x.add_(1)  # main writes what side may still read
    assert len(gpu.faults) == 1
    assert "add_ on stream" in gpu.faults[0]
    assert "test_emulated_cuda.py" in gpu.faults[0]
    with torch.cuda.stream(side):
        x + 1  # side reads what main may not have written yet
    assert len(gpu.faults) == 2
    with torch.cuda.stream(side):
        side.wait_event(main.record_event())
        x.mul_(2)
    main.wait_stream(side)
    x.mul_(2)
    assert len(gpu.faults) == 2


def test_a_wait_of_the_host_orders_too(gpu):
    side, x = torch.cuda.Stream(), ones(3)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        x.add_(1)
        x.sum().item()
    x.add_(1)
    assert not gpu.faults


def test_two_streams_may_read_at_once(gpu):
    side, x = torch.cuda.Stream(), ones(3)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x + 1
    x + 1
    assert not gpu.faults


@pytest.mark.parametrize("remedy", ["none", "record_stream", "joined", "host waits"])
def test_memory_that_is_freed_while_another_stream_uses_it_is_noticed(gpu, remedy):
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    x = ones(3)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        x + 1
    if remedy == "record_stream":
        x.record_stream(side)
    elif remedy == "joined":
        main.wait_stream(side)
    elif remedy == "host waits":
        side.synchronize()
    del x
    assert not gpu.faults
    ones(5)  # the allocator may give the same memory
    assert bool(gpu.faults) is (remedy == "none")


def test_devices_have_streams_of_their_own(gpu):
    other = torch.cuda.Stream("cuda:1")
    with torch.cuda.stream(other):
        assert torch.cuda.current_device() == 1
        assert torch.cuda.current_stream() is other
        assert torch.cuda.current_stream("cuda:0") is torch.cuda.default_stream("cuda:0")
    assert torch.cuda.current_device() == 0
    with torch.cuda.device(torch.device("cuda:1")):
        assert torch.zeros(1, device="cuda").device.index == 1
    assert torch.cuda.current_device() == 0


# --- graphs ----------------------------------------------------------------------------------------------------


def captured(work, **options):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, **options):
        made = work()
    return graph, made


def test_a_capture_runs_nothing_and_a_replay_all(gpu):
    x, total = ones(3), torch.zeros(3, device="cuda:0")

    def work():
        total.add_(x)
        return (x * 2).view(3, 1), (x > 0).to(torch.uint8)

    graph, (doubled, positive) = captured(work)
    assert doubled.isnan().all()
    assert positive.tolist() == [0xA5] * 3
    assert total.tolist() == [0, 0, 0]
    for times in (1, 2):
        x.fill_(times)
        graph.replay()
        assert doubled.tolist() == [[2 * times]] * 3
        assert positive.tolist() == [1, 1, 1]
        assert total.tolist() == [1 if times == 1 else 3] * 3
    assert not gpu.faults


def test_a_capture_may_fork_and_has_to_join(gpu):
    main_of, side = torch.cuda.current_stream, torch.cuda.Stream()
    x = ones(3)

    def work(join):
        side.wait_stream(main_of())
        with torch.cuda.stream(side):
            made = x + 1
        if join:
            main_of().wait_stream(side)
        return made

    graph, made = captured(lambda: work(True))
    graph.replay()
    assert made.tolist() == [2, 2, 2]
    torch.cuda.empty_cache()
    with pytest.raises(RuntimeError, match="unjoined"):
        captured(lambda: work(False))
    with pytest.raises(RuntimeError, match="captures_underway"):
        torch.cuda.empty_cache()
    with pytest.raises(RuntimeError, match="previous error"), torch.cuda.stream(side):
        x + 1
    assert torch.cuda.current_stream() is not torch.cuda.default_stream()  # torch.cuda.graph leaves its stream behind


def test_a_race_within_a_capture_is_noticed(gpu):
    side, x = torch.cuda.Stream(), ones(3)

    def work():
        here = torch.cuda.current_stream()
        side.wait_stream(here)
        y = x + 1
        with torch.cuda.stream(side):
            y * 2
        here.wait_stream(side)

    captured(work)
    assert any("race" in fault for fault in gpu.faults)


@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), lambda x: torch.cuda.synchronize(), lambda x: x.cpu()])
def test_a_wait_breaks_a_capture(gpu, wait):
    x = ones(3)
    with pytest.raises(RuntimeError, match="previous error") as caught:
        captured(lambda: wait(x + 1))
    assert "not permitted when stream is capturing" in str(caught.value.__context__)
    with pytest.raises(RuntimeError, match="captures_underway"):
        torch.cuda.empty_cache()


@pytest.mark.parametrize("mode", ["global", "thread_local"])
def test_another_thread_breaks_a_capture_of_mode_global(gpu, mode):
    x, errors = ones(3), []

    def other():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            errors.append(error)

    def work():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return x + 1

    if mode == "global":
        with pytest.raises(RuntimeError, match="previous error"):
            captured(work, capture_error_mode=mode)
    else:
        captured(work, capture_error_mode=mode)
    assert bool(errors) is (mode == "global")


def test_a_capture_is_on_the_device_that_the_first_one_was_on_unless_told(gpu):
    captured(lambda: ones(3))
    with torch.cuda.device(1):
        x = ones(3, device="cuda:1")
        with pytest.warns(UserWarning, match="empty"):
            graph, made = captured(lambda: x + 1)
        assert made.tolist() == [2, 2, 2]
        x.fill_(5)
        graph.replay()
        assert made.tolist() == [2, 2, 2]  # nothing was captured
        graph, made = captured(lambda: x + 1, stream=torch.cuda.Stream())
        graph.replay()
        assert made.tolist() == [6, 6, 6]


def test_a_replay_overwrites_what_later_graphs_of_its_pool_returned(gpu):
    pool, x = torch.cuda.graph_pool_handle(), ones(3)
    one, first = captured(lambda: x + 1, pool=pool)
    other, second = captured(lambda: x + 2, pool=pool)
    apart, third = captured(lambda: x + 3)
    for graph in (one, other, apart):
        graph.replay()
    assert [made.tolist() for made in (first, second, third)] == [[2] * 3, [3] * 3, [4] * 3]
    one.replay()
    assert first.tolist() == [2] * 3
    assert second.isnan().all()
    assert third.tolist() == [4] * 3


def test_a_pool_whose_graphs_are_gone_is_not_used_again_while_it_holds_memory(gpu):
    pool, x = torch.cuda.graph_pool_handle(), ones(3)
    graph, made = captured(lambda: x + 1, pool=pool)
    del graph
    with pytest.raises(RuntimeError, match="use_count > 0"):
        captured(lambda: x + 1, pool=pool)
    torch.cuda.set_stream(torch.cuda.default_stream())
    del made
    captured(lambda: x + 1, pool=pool)  # the capture itself has emptied the cache


def test_what_a_graph_reads_has_to_live(gpu):
    x = ones(3)
    graph, _ = captured(lambda: x + 1)
    graph.replay()
    assert not gpu.faults
    x.memory = None  # as if the tensor were gone: the graph's function holds it
    graph.replay()
    assert "freed" in gpu.faults[0]


def test_a_replay_is_ordered_as_any_operator(gpu):
    x = ones(3)
    graph, made = captured(lambda: x + 1)
    graph.replay()
    with torch.cuda.stream(torch.cuda.Stream()):
        made * 2
    assert "race" in gpu.faults[0]


# --- the block -------------------------------------------------------------------------------------------------


def test_afterwards_torch_is_as_it_was():
    before = {name: getattr(torch.cuda, name) for name in ("is_available", "Stream", "empty_cache", "current_stream")}
    with emulated_cuda() as gpu:
        x = ones(3)
        assert torch.cuda.is_available()
    assert before == {name: getattr(torch.cuda, name) for name in before}
    with pytest.raises(RuntimeError, match="no emulated CUDA"):
        x + 1
    del x
    assert not gpu.faults
