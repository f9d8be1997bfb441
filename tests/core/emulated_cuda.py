"""A stand-in for CUDA, not a GPU: CPU tensors that say `cuda:k`, watched for what goes wrong on a real device.

`emulated_cuda()` replaces the functions and classes of `torch.cuda` that nerve_core uses; the real `torch.cuda.graph`,
`torch.cuda.stream` and `torch.cuda.device` run on top of them. Every operator on such a tensor is computed at once on
the CPU, and checked and counted as if a device ran it later:

- Tensors of two devices in one operator are refused, a CPU scalar excepted.
- Sums of float16 and bfloat16 products are taken in float32 and rounded once, as tensor cores do.
- Streams, events and the host carry vector clocks. Two uses of one tensor's memory of which one writes, and which no
  event orders, are a race. So is memory that is given out again while another stream may still use it; a block that was
  freed counts as given out again by the next allocation of its stream, whatever its size: the worst case.
- The host's waits are counted by cause. A wait for what has ended already is none.
- An asynchronous copy to pinned memory arrives when the host waits for it; before, the memory holds NaN or 0xA5 and
  reading it is a fault. Pinned memory that the host changes before the device has read it is a fault.
- A capture records operators. Afterwards what it returned holds NaN or 0xA5, and what it changed outside of its own
  memory is as before. A replay runs the operators again into the same memory. A wait inside a capture, or in another
  thread while the mode is "global", makes it invalid. A capture that ends invalid, or with a stream that was forked and
  never joined, fails as PyTorch's does: the allocator goes on as if it were under way, and `empty_cache` asserts.
- Graphs that share a pool share memory: a replay overwrites whatever graphs captured later return. A pool whose graphs
  are all gone cannot be used again while it holds memory.
- `memory_limit` makes allocations fail as out of memory.

What it cannot show: speed; kernels of cuDNN, cuBLAS and PyTorch for CUDA, whose rounding and choice of algorithm
differ; real overlap (everything runs in the order in which the host enqueues it, so a race is found by its clocks, not
by wrong values); fragmentation of the allocator; two uses of different parts of one tensor, which count as the same
place; capture by several threads at once; anything tracked by autograd; `torch.compile`.

PyTorch for the CPU has no device guards for CUDA. What takes one before PyTorch's dispatcher is asked is replaced too:
indexing by ints, slices, None and Ellipsis, or by tensors alone, `torch.tensor(..., device=)`, `Tensor.to`, `cuda`,
`copy_`, `contiguous`, `nonzero`, `~` and attention. Operators whose result's shape depends on values, and so wait for a
device, are listed in `_WAITING`; a new one has to be added there. Tensors cannot be pickled, and `data_ptr` is no
address. After the first use the process remembers that CUDA was initialised: an error of PyTorch for the CPU about CUDA
has other words then.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import time
import traceback
import warnings
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CPU = torch.device("cpu")
_NARROW = (torch.float16, torch.bfloat16)
_POISON_BYTE = 0xA5

# One kernel each on the device, though PyTorch can take them apart.
_WHOLE = {aten.conv2d.default, aten.scaled_dot_product_attention.default}

# Sums over many products or values, which a device takes in float32.
_ACCUMULATING = {
    "conv2d",
    "convolution",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "mv",
    "dot",
    "linear",
    "scaled_dot_product_attention",
    "_softmax",
    "native_layer_norm",
    "native_group_norm",
    "mean",
    "sum",
    "var_mean",
    "gelu",
    "silu",
    "sigmoid",
    "addcmul",
}

# What the host has to wait for: the shape, or an error, depends on values.
_WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "equal",
    "bincount",
    "repeat_interleave",
    "_linalg_solve_ex",
    "_linalg_svd",
    "linalg_inv_ex",
    "linalg_qr",
    "linalg_pinv",
}


@torch.inference_mode()
def poison_(x: Tensor) -> Tensor:
    """Fill with what nothing should ever read."""
    if x.is_floating_point():
        return x.fill_(torch.nan)
    if x.dtype == torch.bool:
        return x.fill_(True)
    return x.fill_(_POISON_BYTE if x.dtype == torch.uint8 else -0x5A5A5A5A if x.dtype.itemsize > 2 else -0x5A)


# --- time ---------------------------------------------------------------------------------------------------


class Stream:
    """In place of torch.cuda.Stream: an order of operators, with a vector clock of all that happens before the next."""

    _count = 0

    def __init__(self, device: Any = None, priority: int = 0, **more: Any) -> None:
        """device: as for torch.cuda.Stream; None is the current one. Always a new stream: there is no pool of 32."""
        self.gpu = _running()
        index = self.gpu.current if device is None else _index(device, self.gpu)
        self.device, self.device_index, self.priority = torch.device("cuda", index), index, priority
        Stream._count += 1
        self.stream_id = self.cuda_stream = Stream._count
        self.device_type = 1
        self.clock: dict[int, int] = {}
        self.ticks = 0
        self.capture: _Capture | None = None
        self.broken = False  # its capture ended without it, or invalid
        self._host_seen = -1
        self.gpu.streams.append(self)

    def tick(self) -> int:
        """The time of one more operator, behind all that the host has waited for."""
        if self.broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        if self._host_seen != self.gpu.host_waits:
            _merge(self.clock, self.gpu.host)
            self._host_seen = self.gpu.host_waits
        self.ticks += 1
        self.clock[self.stream_id] = self.ticks
        return self.ticks

    def record_event(self, event: Event | None = None) -> Event:
        """An event behind all operators so far."""
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        """What comes next on this stream comes after the event."""
        if event.stream is None:
            return
        if self.broken or event.stream.broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        if event.capture is not self.capture:
            if event.capture is None or self.capture is not None:
                capture = self.capture or event.capture
                capture.invalid = True
                raise RuntimeError("CUDA error: dependency created on uncaptured work in another stream")
            if not event.capture.open:
                raise RuntimeError("CUDA error: event was recorded in a capture that has ended")
            self.capture = event.capture  # forked: it captures too, until the end
            self.capture.streams.append(self)
        _merge(self.clock, event.clock)

    def wait_stream(self, other: Stream) -> None:
        """What comes next on this stream comes after all operators of `other` so far."""
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        """The host waits for all operators so far."""
        self.gpu.wait("stream.synchronize", self, flagged=True)

    def query(self) -> bool:
        """Whether the host knows that all operators are done."""
        self.gpu.refuse_in_capture("stream.query")
        return self.gpu.host_knows(self.clock)

    def __repr__(self) -> str:
        return f"stream {self.stream_id} of {self.device}"


class Event:
    """In place of torch.cuda.Event: a stream's clock at one time."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, **_: Any):
        """enable_timing: needed for elapsed_time, as on a device."""
        self.gpu, self.timing = _running(), enable_timing
        self.stream: Stream | None = None
        self.capture: _Capture | None = None
        self.clock: dict[int, int] = {}
        self.time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        """Behind all operators of a stream so far; None is the current stream of the current device."""
        stream = stream or self.gpu.stream_of(self.gpu.current)
        if stream.broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.stream, self.capture, self.clock = stream, stream.capture, dict(stream.clock)
        self.time = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        """What comes next on the stream comes after this."""
        (stream or self.gpu.stream_of(self.gpu.current)).wait_event(self)

    def query(self) -> bool:
        """Whether the host knows that it is done."""
        self.gpu.refuse_in_capture("event.query")
        return self.gpu.host_knows(self.clock)

    def synchronize(self) -> None:
        """The host waits until it is done."""
        if self.stream is not None:
            self.gpu.wait("event.synchronize", self)

    def elapsed_time(self, other: Event) -> float:
        """Milliseconds; both must be done, and recorded on one device."""
        if not (self.timing and other.timing):
            raise RuntimeError("both events must be created with argument 'enable_timing=True'")
        if self.stream is None or other.stream is None or self.stream.device != other.stream.device:
            raise RuntimeError("CUDA error: invalid resource handle")
        if not (self.gpu.host_knows(self.clock) and self.gpu.host_knows(other.clock)):
            raise RuntimeError("CUDA error: device not ready")
        return 1e3 * (other.time - self.time)


def _merge(clock: dict[int, int], other: dict[int, int]) -> None:
    for stream, tick in other.items():
        if clock.get(stream, 0) < tick:
            clock[stream] = tick


# --- memory -------------------------------------------------------------------------------------------------


_numbers = itertools.count()


class _Memory:
    """What tensors of one storage share on the device: who used it when. Freed when the last of them goes."""

    def __init__(self, gpu: EmulatedCuda, stream: Stream, pool: _Pool | None, inner: Tensor) -> None:
        storage = inner.untyped_storage()
        self.gpu, self.stream, self.pool = gpu, stream, pool
        self.nbytes, self.storage = storage.nbytes(), storage._cdata
        self.device, self.number = stream.device_index, next(_numbers)
        self.written: tuple[Stream, int, str] | None = None
        self.read: dict[Stream, tuple[int, str]] = {}  # since it was written
        self.used: dict[Stream, tuple[int, str]] = {}  # all uses, the last of each stream
        self.recorded: set[Stream] = set()  # by record_stream

    def access(self, stream: Stream, tick: int, what: str, *, write: bool) -> None:
        """Note a use, and a fault where it is not ordered with one before."""
        if stream.capture is not None:
            stream.capture.before_use(self)
        before = [self.written] if self.written is not None else []
        if write:
            before += [(other, at, whose) for other, (at, whose) in self.read.items()]
        for other, at, whose in before:
            if other is not stream and stream.clock.get(other.stream_id, 0) < at:
                kind = "writes" if write else "reads"
                self.gpu.fault(f"race: {what} on {stream} {kind} what {whose} uses on {other}")
        if write:
            self.written, self.read = (stream, tick, what), {}
        else:
            self.read[stream] = tick, what
        self.used[stream] = tick, what

    def uses(self) -> tuple:
        """(written, read, used), to be put back."""
        return self.written, dict(self.read), dict(self.used)

    def __del__(self) -> None:
        self.gpu.freed(self)


class _Pool:
    """Memory of graphs that share it, as the caching allocator keeps it."""

    def __init__(self) -> None:
        self.uses = 1
        self.graphs: list[weakref.ref[CUDAGraph]] = []
        self.memories: weakref.WeakSet[_Memory] = weakref.WeakSet()


class CudaTensor(Tensor):
    """A CPU tensor that says it is on `cuda:k`."""

    @staticmethod
    def __new__(cls, inner: Tensor, memory: _Memory) -> CudaTensor:
        """inner: where the values are. memory: of its storage."""
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("cuda", memory.device),
        )
        made.inner, made.memory = inner, memory
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"CudaTensor({list(self.inner.shape)}, {self.dtype}, {self.device})"

    def record_stream(self, stream: Stream) -> None:
        """Free the memory only when what the stream does with it now has ended."""
        self.memory.recorded.add(stream)

    def __tensor_flatten__(self) -> tuple[list[str], None]:  # so that nn.Module swaps parameters whole
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: None, size: object, stride: object) -> CudaTensor:
        raise NotImplementedError("nothing takes an emulated tensor apart")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return _running().call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _running().dispatch(func, args, kwargs or {})


# --- graphs -------------------------------------------------------------------------------------------------


class _Capture:
    """A capture under way, and what it has recorded."""

    def __init__(self, stream: Stream, pool: _Pool, mode: str) -> None:
        self.origin, self.pool, self.mode = stream, pool, mode
        self.thread = threading.get_ident()
        self.streams = [stream]
        self.open, self.invalid = True, False
        self.records: list[tuple[Callable, tuple, dict, list[Tensor | None]]] = []
        self.made: list[Tensor] = []  # inner tensors of its own memory
        self.storages: set[int] = set()
        self.saved: dict[int, tuple[Tensor, Tensor]] = {}  # what it changed of others' memory, and what was there
        self.outside: dict[tuple[int, bool], tuple[weakref.ref[_Memory], str]] = {}
        self.touched: dict[int, tuple[weakref.ref[_Memory], tuple]] = {}  # uses of it before the capture

    def before_write(self, inner: Tensor) -> None:
        """Keep what is about to be changed, where it is not the capture's own."""
        storage = inner.untyped_storage()
        if storage._cdata not in self.storages and storage._cdata not in self.saved:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self.saved[storage._cdata] = whole, whole.clone()

    def before_use(self, memory: _Memory) -> None:
        """Keep who used it before: what a capture records does not happen yet."""
        if memory.number not in self.touched:
            self.touched[memory.number] = weakref.ref(memory), memory.uses()

    def record(self, func: Callable, args: tuple, kwargs: dict, fresh: list[Tensor | None]) -> None:
        """Keep an operator, with what it returned in memory of its own."""
        self.records.append((func, args, kwargs, fresh))
        for inner in fresh:
            if inner is not None:
                self.made.append(inner)
                self.storages.add(inner.untyped_storage()._cdata)

    @torch.inference_mode()
    def undo(self) -> None:
        """As on a device nothing has run yet: own memory is poisoned, others' as it was."""
        for inner in self.made:
            poison_(inner)
        for whole, before in self.saved.values():
            whole.copy_(before)
        self.saved.clear()
        for reference, uses in self.touched.values():
            memory = reference()
            if memory is not None:
                memory.written, memory.read, memory.used = uses
        self.touched.clear()


class CUDAGraph:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self, keep_graph: bool = False) -> None:
        """keep_graph: has no effect."""
        self.gpu = _running()
        self.captured: _Capture | None = None
        self._pool: _Pool | None = None
        self._key: Any = None

    def capture_begin(
        self, pool: Any = None, capture_error_mode: str = "global", check_input_liveness: bool = False
    ) -> None:
        """Record the operators of the current stream, and of those that wait for it, from now on."""
        gpu = self.gpu
        stream = gpu.stream_of(gpu.current)
        if stream is gpu.default_stream(gpu.current):
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        if stream.broken or stream.capture is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        self._key = (gpu.current, pool if pool is not None else gpu.graph_pool_handle())
        self._pool = gpu.take_pool(self._key)
        stream.capture = _Capture(stream, self._pool, capture_error_mode)
        gpu.captures.append(stream.capture)

    def capture_end(self) -> None:
        """Stop. Raises RuntimeError where the capture is invalid or a stream was not joined, as PyTorch does: the
        allocator then goes on as if it were under way."""
        stream = self.gpu.stream_of(self.gpu.current)
        capture = stream.capture
        if capture is None or capture.origin is not stream:
            raise RuntimeError("Capture must end on the same stream it began on.")
        capture.open = False
        capture.undo()
        for key in [key for key in self.gpu.given_back if key[1] is capture.pool]:
            del self.gpu.given_back[key]
        stream.capture = None
        left = [other for other in capture.streams[1:] if stream.clock.get(other.stream_id, 0) < other.ticks]
        for other in capture.streams[1:]:
            other.capture, other.broken = None, other in left or capture.invalid
        if capture.invalid:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        if left:
            raise RuntimeError("CUDA error: capturing stream has unjoined work")
        self.gpu.captures.remove(capture)
        if not capture.records:
            warnings.warn("The CUDA Graph is empty.", stacklevel=2)
        self.captured = capture
        self._pool.graphs.append(weakref.ref(self))

    @torch.inference_mode()
    def replay(self) -> None:
        """Run it on the current stream of the device that it was captured on."""
        capture = self.captured
        if capture is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        gpu, device = self.gpu, capture.origin.device_index
        stream = gpu.stream_of(device)
        tick = stream.tick()
        for (_, write), (reference, what) in capture.outside.items():
            memory = reference()
            if memory is None:
                gpu.fault(f"a graph uses memory that was freed since ({what})")
            else:
                memory.access(stream, tick, "a graph", write=write)
        made = {inner.untyped_storage()._cdata for inner in capture.made}
        for memory in self._pool.memories:
            if memory.storage in made:
                memory.access(stream, tick, "a graph", write=True)
        later = False
        for other in list(self._pool.graphs):
            graph = other()
            if later and graph is not None and graph.captured is not None:
                for inner in graph.captured.made:
                    poison_(inner)
            later = later or graph is self
        with torch._C._DisableTorchDispatch():
            for func, args, kwargs, fresh in capture.records:
                results = func(*args, **kwargs)
                results = results if isinstance(results, (tuple, list)) else [results]
                for mine, result in zip(fresh, results, strict=True):
                    if mine is not None:
                        mine.copy_(result)
        gpu.counts["replay"] += 1

    def reset(self) -> None:
        """Give it up."""
        if self.captured is not None:
            self.captured = None
            self._pool.uses -= 1

    def pool(self) -> Any:
        """The handle of its pool."""
        return self._key[1]

    def __del__(self) -> None:
        self.reset()


# --- the device ---------------------------------------------------------------------------------------------


class EmulatedCuda:
    """All emulated devices of a process, and what was seen of them.

    faults: races and the like, one text each; none is good. waits: causes of the host's waits, in order. counts: how
    often each operator ran, "layout change" (a copy between channels last and channels first, or an operator that has
    to make one) and "replay". memory_limit: bytes of a device beyond which an allocation fails, or None.
    """

    def __init__(self, devices: int) -> None:
        self.devices, self.current = devices, 0
        self.faults: list[str] = []
        self.waits: list[str] = []
        self.counts: Counter[str] = Counter()
        self.memory_limit: int | None = None
        self.in_use: Counter[int] = Counter()
        self.host: dict[int, int] = {}
        self.host_waits = 0
        self.captures: list[_Capture] = []
        self.sync_debug_mode = 0
        self.closed = False
        self.streams: list[Stream] = []
        self._defaults: dict[int, Stream] = {}
        self._currents: dict[int, Stream] = {}
        self._pools: dict[Any, _Pool] = {}
        self._handles = 0
        self.given_back: defaultdict[tuple, list[dict[Stream, tuple[int, str]]]] = defaultdict(list)
        self._pinned: dict[int, Tensor] = {}  # kept, so that no address comes again
        self._arriving: list[tuple[Tensor, Tensor, Stream, int]] = []
        self._leaving: list[tuple[Tensor, Tensor, Stream, int]] = []

    def fault(self, what: str) -> None:
        """Note something that would go wrong on a device."""
        if not self.closed:
            own = [line for line in traceback.extract_stack() if line.filename != __file__]
            own = [line for line in own if "/torch/" not in line.filename]
            self.faults.append(f"{what}, at {own[-1].filename}:{own[-1].lineno}" if own else what)

    def recover(self) -> None:
        """Forget captures that failed, after which the allocator takes them to be under way for good, as a new process
        would."""
        self.captures = [capture for capture in self.captures if capture.open]

    def reset_counts(self) -> None:
        """Begin to count anew; what was found wrong stays."""
        self.waits.clear()
        self.counts.clear()

    # Streams.

    def default_stream(self, device: int) -> Stream:
        if device not in self._defaults:
            self._defaults[device] = Stream(torch.device("cuda", device))
        return self._defaults[device]

    def stream_of(self, device: int) -> Stream:
        return self._currents.get(device) or self.default_stream(device)

    def set_stream(self, stream: Stream) -> None:
        self._currents[stream.device_index] = stream
        self.current = stream.device_index  # as PyTorch's own does

    # Waiting.

    def host_knows(self, clock: dict[int, int]) -> bool:
        return all(self.host.get(stream, 0) >= tick for stream, tick in clock.items())

    def refuse_in_capture(self, what: str) -> None:
        """Raise where a capture forbids what the host is about to do, and make it invalid."""
        for capture in self.captures:
            mine = capture.thread == threading.get_ident()
            if capture.open and capture.mode != "relaxed" and (mine or capture.mode == "global"):
                capture.invalid = True
                raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")

    def wait(self, what: str, *until: Stream | Event, always: bool = False, flagged: bool = False) -> None:
        """The host waits. always: even where all is done it takes a while. flagged: set_sync_debug_mode sees it."""
        self.refuse_in_capture(what)
        if flagged and self.sync_debug_mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")
        if flagged and self.sync_debug_mode == 1:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=3)
        if always or not all(self.host_knows(one.clock) for one in until):
            self.waits.append(what)
        for one in until:
            _merge(self.host, one.clock)
        self.host_waits += 1
        self._deliver()

    def _done(self, stream: Stream, tick: int) -> bool:
        return self.host.get(stream.stream_id, 0) >= tick

    @torch.inference_mode()
    def _deliver(self) -> None:
        arrived = [copy for copy in self._arriving if self._done(*copy[2:])]
        left = [copy for copy in self._leaving if self._done(*copy[2:])]
        self._arriving = [copy for copy in self._arriving if not self._done(*copy[2:])]
        self._leaving = [copy for copy in self._leaving if not self._done(*copy[2:])]
        for target, values, *_ in arrived:
            target.copy_(values)
        if any(not torch.equal(source, values) for source, values, *_ in left):
            self.fault("pinned memory was changed before the device had read it")

    def _check_arrived(self, host: Tensor) -> None:
        """Note a fault where the host reads what may not have arrived."""
        if self._arriving:
            address = host.untyped_storage().data_ptr()
            if any(target.untyped_storage().data_ptr() == address for target, *_ in self._arriving):
                self.fault("the host reads pinned memory before a copy to it has ended")

    def is_pinned(self, x: Tensor) -> bool:
        return type(x) is not CudaTensor and x.untyped_storage().data_ptr() in self._pinned

    # Memory.

    def new_memory(self, device: int, inner: Tensor) -> _Memory:
        stream, nbytes = self.stream_of(device), inner.untyped_storage().nbytes()
        pool = stream.capture.pool if stream.capture is not None else None
        if self.memory_limit is not None and self.in_use[device] + nbytes > self.memory_limit:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {nbytes} bytes (emulated).")
        self.in_use[device] += nbytes
        for uses in self.given_back.pop((device, pool, stream), ()):
            for other, (at, whose) in uses.items():
                if stream.clock.get(other.stream_id, 0) < at and not self._done(other, at):
                    self.fault(f"memory is given out again on {stream} while {whose} on {other} may use it")
        memory = _Memory(self, stream, pool, inner)
        if pool is not None:
            pool.memories.add(memory)
        return memory

    def freed(self, memory: _Memory) -> None:
        if self.closed:
            return
        self.in_use[memory.device] -= memory.nbytes
        kept = {memory.stream, *memory.recorded}
        others = {stream: use for stream, use in memory.used.items() if stream not in kept}
        if others:
            self.given_back[memory.device, memory.pool, memory.stream].append(others)

    def graph_pool_handle(self) -> tuple[int, int]:
        self._handles += 1
        return 0, self._handles

    def take_pool(self, key: Any) -> _Pool:
        """The pool of a handle, one use more. Raises RuntimeError where its graphs are all gone and it is there yet."""
        pool = self._pools.get(key)
        if pool is None:
            pool = self._pools[key] = _Pool()
        elif pool.uses == 0:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        else:
            pool.uses += 1
        return pool

    def empty_cache(self) -> None:
        if self.captures:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")
        self._pools = {key: pool for key, pool in self._pools.items() if pool.uses or len(pool.memories)}
        self.given_back.clear()  # after a wait for the device

    # Operators.

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """A function of torch, before PyTorch's own binding sees it."""
        special = _SPECIAL.get(func)
        if special is not None:
            return special(self, func, args, kwargs)
        if func is not torch.device and any(_names_cuda(x) for x in (*args, *kwargs.values())):
            args = tuple(self._pinned_index(x) for x in args)
            kwargs = {name: self._pinned_index(x) for name, x in kwargs.items()}
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def _pinned_index(self, x: Any) -> Any:
        return torch.device("cuda", _index(x, self)) if _names_cuda(x) else x

    def dispatch(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """An operator, as PyTorch's dispatcher hands it out."""
        device = kwargs.get("device") or next((x for x in args if isinstance(x, torch.device)), None)
        tensors = [x for x in _leaves((args, kwargs)) if isinstance(x, Tensor)]
        ours = [x for x in tensors if type(x) is CudaTensor]
        if not ours and (device is None or torch.device(device).type != "cuda"):
            return self._on_host(func, args, kwargs, tensors)
        with torch.inference_mode(False):  # what is made here may be used outside of inference mode too
            if func in _WHOLE or not _composite(func):
                return self._run(func, args, kwargs, tensors, ours)
            with _Dispatch(self):
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)

    def _on_host(self, func: Any, args: tuple, kwargs: dict, tensors: Sequence[Tensor]) -> Any:
        if not (func.is_view or func is aten.detach.default):
            for x in tensors:
                self._check_arrived(x)
        if not kwargs.get("pin_memory"):
            return func(*args, **kwargs)
        made = func(*args, **{**kwargs, "pin_memory": False})
        self._pinned[made.untyped_storage().data_ptr()] = made
        return made

    def _run(self, func: Any, args: tuple, kwargs: dict, tensors: list[Tensor], ours: list[CudaTensor]) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in ("_to_copy", "copy_"):
            moved = self._transfer(name, func, args, kwargs)
            if moved is not NotImplemented:
                return moved
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cpu":
            raise NotImplementedError(f"{func} from a CUDA tensor to the CPU is not emulated")
        places = {x.device.index for x in ours} or {_index(device, self)}
        others = [x for x in tensors if type(x) is not CudaTensor and x.ndim]
        if len(places) > 1 or others:
            found = sorted({str(x.device) for x in tensors})
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {', '.join(found)}! "
                f"({func})"
            )
        where = places.pop()
        stream = self.stream_of(where)
        if any(x.dtype == torch.bool for x in tensors[1:]) and name in ("index", "index_put_"):
            self.wait(f"{name} by a mask", stream, always=True, flagged=True)
        if name in _WAITING:
            if name == "_local_scalar_dense":
                self.wait(".item()", stream, always=True, flagged=True)
                self.counts[name] += 1
                args[0].memory.access(stream, stream.tick(), name, write=False)
                return func(args[0].inner)
            self.wait(name, stream, always=True, flagged=True)
        inner_args, inner_kwargs = _each(_inner, args), _each(_inner, kwargs)
        inner_kwargs.pop("pin_memory", None)
        if "device" in inner_kwargs:
            inner_kwargs["device"] = CPU
        written = _written(func, args, kwargs)
        capture = stream.capture
        if capture is not None:
            for x in written:
                capture.before_write(x.inner)
        compute = functools.partial(_compute, func, name)
        results = compute(*inner_args, **inner_kwargs)
        listed = results if isinstance(results, (tuple, list)) else [results]
        known = {x.inner.untyped_storage()._cdata: x for x in ours}
        wrapped: list[Any] = []
        fresh: list[Tensor | None] = []
        for result in listed:
            base = known.get(result.untyped_storage()._cdata) if isinstance(result, Tensor) else None
            same = next((x for x in written if x.inner is result), None)
            if not isinstance(result, Tensor):
                wrapped.append(result)
            elif same is not None:
                wrapped.append(same)
            elif base is not None:
                wrapped.append(CudaTensor(result, base.memory))
            else:
                wrapped.append(CudaTensor(result, self.new_memory(where, result)))
            is_new = isinstance(result, Tensor) and same is None and base is None
            fresh.append(result if is_new else None)
        if written or any(x is not None for x in fresh):  # else it is a view, and nothing runs
            self._launched(func, name, stream, ours, written, wrapped, fresh)
            if capture is not None:
                capture.record(compute, inner_args, inner_kwargs, fresh)
        return (list if isinstance(results, list) else tuple)(wrapped) if listed is results else wrapped[0]

    def _launched(
        self,
        func: Any,
        name: str,
        stream: Stream,
        ours: Sequence[CudaTensor],
        written: Sequence[CudaTensor],
        results: Sequence[Any],
        fresh: Sequence[Tensor | None],
    ) -> None:
        """Note one operator on a stream."""
        tick = stream.tick()
        changed = {id(x) for x in written}
        uses = [(x.memory, id(x) in changed) for x in ours]
        for memory, write in uses:
            memory.access(stream, tick, name, write=write)
            if stream.capture is not None and memory.storage not in stream.capture.storages:
                stream.capture.outside.setdefault((memory.number, write), (weakref.ref(memory), name))
        for result, new in zip(results, fresh, strict=True):
            if new is not None:
                result.memory.access(stream, tick, name, write=True)
        self.counts[name] += 1
        made = [x for x in fresh if x is not None]
        self.counts["layout change"] += _layout_changes(name, [x.inner for x in ours], made)

    def _transfer(self, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
        """A copy between host and device or two devices; NotImplemented where it is none."""
        if name == "copy_":
            target, source = args[:2]
            free = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            there = target.device
        else:
            source, free = args[0], bool(kwargs.get("non_blocking", False))
            there = torch.device(kwargs.get("device") or source.device)
            there = torch.device("cuda", _index(there, self)) if there.type == "cuda" else there
        if there == source.device:
            return NotImplemented
        values = _inner(source)
        if name == "_to_copy":
            options = {key: x for key, x in kwargs.items() if key not in ("device", "non_blocking", "pin_memory")}
            values = func(values, **options) if options else values.clone()
        if there.type == "cpu":
            return self._to_host(source, values, target if name == "copy_" else None, free)
        stream = self.stream_of(there.index)
        if source.device.type == "cpu":
            self._check_arrived(source)
            pinned = free and self.is_pinned(source)
            if not pinned:
                self.wait("copy to the device", stream, always=True, flagged=True)
        else:
            other, pinned = self.stream_of(source.device.index), False
            source.memory.access(other, other.tick(), "copy", write=False)
            stream.wait_stream(other)
        if name == "_to_copy":
            target, new = CudaTensor(values, self.new_memory(there.index, values)), values
        else:
            if stream.capture is not None:
                stream.capture.before_write(target.inner)
            target.inner.copy_(values)
            new = None
        self._launched(func, "copy", stream, [] if new is not None else [target], [target], [target], [new])
        if stream.capture is not None:
            stream.capture.record(lambda to, x: to.copy_(x), (target.inner, _inner(source)), {}, [None])
            if new is not None:
                stream.capture.made.append(new)
                stream.capture.storages.add(new.untyped_storage()._cdata)
        if pinned:
            self._leaving.append((source, source.clone(), stream, stream.ticks))
        return target

    def _to_host(self, source: CudaTensor, values: Tensor, target: Tensor | None, free: bool) -> Tensor:
        stream = self.stream_of(source.device.index)
        pinned = target is not None and free and self.is_pinned(target)
        if not pinned:  # also a non-blocking copy to pageable memory waits
            self.wait("copy to the host", stream, always=True, flagged=not free)
        source.memory.access(stream, stream.tick(), "copy", write=False)
        self.counts["copy"] += 1
        if not pinned:
            _merge(self.host, stream.clock)
            with torch.inference_mode():
                return values if target is None else target.copy_(values)
        poison_(target)
        if target.numel():
            self._arriving.append((target, values.clone(), stream, stream.ticks))
        return target


_RUNNING: list[EmulatedCuda] = []


def _running() -> EmulatedCuda:
    if not _RUNNING:
        raise RuntimeError("no emulated CUDA is running")
    return _RUNNING[-1]


def _inner(x: Any) -> Any:
    return x.inner if type(x) is CudaTensor else x


def _names_cuda(x: Any) -> bool:
    if isinstance(x, torch.device):
        return x.type == "cuda"
    return isinstance(x, str) and x.startswith("cuda")


def _index(device: Any, gpu: EmulatedCuda) -> int:
    """The index of a device given as to torch.cuda's functions."""
    if isinstance(device, int):
        return device
    device = torch.device(device) if device is not None else torch.device("cuda")
    index = gpu.current if device.index is None else device.index
    if index >= gpu.devices:
        raise RuntimeError("CUDA error: invalid device ordinal")
    return index


@functools.cache
def _composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


@functools.cache
def _writes(func: Any) -> tuple[tuple[int, str], ...]:
    """(position, name) of the arguments that an operator writes to."""
    arguments = enumerate(func._schema.arguments)
    return tuple((k, x.name) for k, x in arguments if x.alias_info is not None and x.alias_info.is_write)


def _written(func: Any, args: tuple, kwargs: dict) -> list[CudaTensor]:
    found = [kwargs[name] if name in kwargs else args[k] if k < len(args) else None for k, name in _writes(func)]
    return [x for x in _leaves(found) if type(x) is CudaTensor]


def _compute(func: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """An operator on the CPU as the device computes it: narrow products summed in float32, convolutions in the layout
    that cuDNN takes."""
    narrow = None
    if name in _ACCUMULATING:
        narrow = next((x.dtype for x in _leaves(args) if isinstance(x, Tensor) and x.dtype in _NARROW), None)
    with torch._C._DisableTorchDispatch():
        if narrow is None:
            results = func(*args, **kwargs)
        else:
            out = kwargs.pop("out", None)
            args, kwargs = _each(_widened, args), _each(_widened, kwargs)
            results = func(*args, **kwargs) if out is None else func.overloadpacket(*args, **kwargs)
            dtype = kwargs.get("dtype") or narrow
            results = _each(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.dtype == torch.float32 else x, results)
            results = results if out is None else out.copy_(results)
        if name == "conv2d":
            last = any(_layout(x) == "last" for x in args[:2])
            results = results.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return results


def _leaves(x: Any) -> Iterator[Any]:
    """What lies in nested lists, tuples and dictionaries."""
    if isinstance(x, (list, tuple)):
        for item in x:
            yield from _leaves(item)
    elif isinstance(x, dict):
        yield from _leaves(list(x.values()))
    else:
        yield x


def _each(function: Callable[[Any], Any], x: Any) -> Any:
    """Nested lists, tuples and dictionaries with a function applied to what lies in them."""
    if isinstance(x, dict):
        return {key: _each(function, item) for key, item in x.items()}
    if isinstance(x, (list, tuple)):
        return (list if isinstance(x, list) else tuple)(_each(function, item) for item in x)
    return function(x)


def _widened(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype in _NARROW else x


def _layout(x: Tensor) -> str:
    """ "last" or "first" of an image's channels; "" where there is no telling or it is no image."""
    if x.ndim != 4 or x.shape[1] == 1 or x.shape[2:].numel() == 1:
        return ""
    if x.is_contiguous():
        return "first"
    return "last" if x.is_contiguous(memory_format=torch.channels_last) else ""


def _layout_changes(name: str, inputs: Sequence[Tensor], made: Sequence[Tensor]) -> int:
    """How many images an operator copies, or has to read, in another layout than it has."""
    images = [layout for x in inputs if (layout := _layout(x))]
    if name == "conv2d":
        used = "last" if "last" in [_layout(x) for x in inputs[:2]] else "first"
        return int(_layout(inputs[0]) not in (used, ""))
    results = [layout for x in made if (layout := _layout(x))]
    if name == "cat" or len(made) <= 1:
        return sum(layout != (results or images)[0] for layout in images) if images else 0
    return 0


# --- what PyTorch's bindings would do before they dispatch ----------------------------------------------------


def _tensor(gpu: EmulatedCuda, func: Callable, args: tuple, kwargs: dict) -> Any:
    if not _names_cuda(kwargs.get("device")):
        return func(*args, **kwargs)
    return func(*args, **{**kwargs, "device": CPU}).to(kwargs["device"])


def _cuda(gpu: EmulatedCuda, func: Callable, args: tuple, kwargs: dict) -> Any:
    where = torch.device("cuda", _index(kwargs.pop("device", None), gpu))
    return args[0].to(where, *args[1:], **kwargs)


def _attend(gpu: EmulatedCuda, func: Callable, args: tuple, kwargs: dict) -> Any:
    if not any(type(x) is CudaTensor for x in _leaves((args, kwargs))):
        return func(*args, **kwargs)
    return gpu.dispatch(aten.scaled_dot_product_attention.default, args, kwargs)


def _view(x: Tensor, index: Any) -> Any:
    """x at ints, slices, None and Ellipsis: a view; or by index tensors alone: a copy."""
    if all(isinstance(one, Tensor) for one in _listed(index)):
        return aten.index.Tensor(x, list(_listed(index)))
    plain = all(isinstance(one, (int, slice, type(None), type(Ellipsis))) for one in _listed(index))
    if not plain:
        raise NotImplementedError(f"indexing by {index} is not emulated")
    if type(x) is not CudaTensor:
        return x[index]
    with torch.inference_mode(False):
        return CudaTensor(x.inner[index], x.memory)


def _listed(index: Any) -> tuple:
    return index if isinstance(index, tuple) else (index,)


def _get(gpu: EmulatedCuda, func: Callable, args: tuple, kwargs: dict) -> Any:
    x, index = args
    if type(x) is CudaTensor or any(type(one) is CudaTensor for one in _listed(index)):
        return _view(x, index)
    with torch._C.DisableTorchFunctionSubclass():
        return func(x, index)


def _set(gpu: EmulatedCuda, func: Callable, args: tuple, kwargs: dict) -> None:
    x, index, value = args
    if type(x) is not CudaTensor:
        func(x, index, value)
    elif isinstance(index, Tensor):
        aten.index_put_(x, [index], torch.as_tensor(value, dtype=x.dtype, device=x.device))
    elif isinstance(value, Tensor):
        _view(x, index).copy_(value)
    else:
        _view(x, index).fill_(value)


def _contiguous(gpu: EmulatedCuda, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    x, layout = args[0], kwargs.get("memory_format", args[1] if len(args) > 1 else torch.contiguous_format)
    if type(x) is not CudaTensor:
        return func(*args, **kwargs)
    return x if x.inner.is_contiguous(memory_format=layout) else x.clone(memory_format=layout)


def _invert(gpu: EmulatedCuda, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    return torch.bitwise_not(args[0])


def _copy(gpu: EmulatedCuda, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    if not any(type(x) is CudaTensor for x in args):
        return func(*args, **kwargs)
    return gpu.dispatch(aten.copy_.default, args, kwargs)


def _numpy(gpu: EmulatedCuda, func: Callable, args: tuple, kwargs: dict) -> Any:
    if type(args[0]) is CudaTensor:
        raise TypeError(f"can't convert {args[0].device} device type tensor to numpy. Use Tensor.cpu() first.")
    gpu._check_arrived(args[0])
    return func(*args, **kwargs)


def _is_pinned(gpu: EmulatedCuda, func: Callable, args: tuple, kwargs: dict) -> bool:
    return gpu.is_pinned(args[0])


def _pin(gpu: EmulatedCuda, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    return torch.empty(args[0].shape, dtype=args[0].dtype, pin_memory=True).copy_(args[0])


def _nonzero(gpu: EmulatedCuda, func: Callable, args: tuple, kwargs: dict) -> Any:
    return gpu.dispatch(aten.nonzero.default, args[:1], {}) if type(args[0]) is CudaTensor else func(*args, **kwargs)


def _list(gpu: EmulatedCuda, func: Callable, args: tuple, kwargs: dict) -> Any:
    x = args[0].cpu() if type(args[0]) is CudaTensor else args[0]
    gpu._check_arrived(x)
    with torch._C.DisableTorchFunctionSubclass():
        return func(x)


_SPECIAL: dict[Any, Callable] = {
    torch.tensor: _tensor,
    torch.as_tensor: _tensor,
    Tensor.cuda: _cuda,
    Tensor.__getitem__: _get,
    Tensor.__setitem__: _set,
    Tensor.contiguous: _contiguous,
    Tensor.__invert__: _invert,
    Tensor.copy_: _copy,
    Tensor.numpy: _numpy,
    Tensor.tolist: _list,
    Tensor.is_pinned: _is_pinned,
    Tensor.pin_memory: _pin,
    Tensor.nonzero: _nonzero,
    torch.nonzero: _nonzero,
    F.scaled_dot_product_attention: _attend,
}


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return _running().call(func, args, kwargs or {})


class _Dispatch(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here; the default costs time at every operator

    def __init__(self, gpu: EmulatedCuda) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.gpu.dispatch(func, args, kwargs or {})


@contextlib.contextmanager
def emulated_cuda(devices: int = 1) -> Iterator[EmulatedCuda]:
    """`torch.cuda` with so many devices that are none, in this thread, while the block runs."""
    gpu = EmulatedCuda(devices)

    def exchange(device: int) -> int:
        before, gpu.current = gpu.current, device if device >= 0 else gpu.current
        return before

    def device_wait(device: Any = None) -> None:
        index = _index(device, gpu)
        gpu.wait("device.synchronize", *(stream for stream in gpu.streams if stream.device_index == index))

    def debug(mode: int | str) -> None:
        gpu.sync_debug_mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)

    stand_ins = {
        "is_available": lambda: True,
        "device_count": lambda: gpu.devices,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "current_device": lambda: gpu.current,
        "set_device": lambda device: exchange(_index(device, gpu)),
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
        "get_device_name": lambda device=None: "no GPU, emulated",
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "graph_pool_handle": gpu.graph_pool_handle,
        "is_current_stream_capturing": lambda: gpu.stream_of(gpu.current).capture is not None,
        "current_stream": lambda device=None: gpu.stream_of(_index(device, gpu)),
        "default_stream": lambda device=None: gpu.default_stream(_index(device, gpu)),
        "set_stream": gpu.set_stream,
        "synchronize": device_wait,
        "empty_cache": gpu.empty_cache,
        "memory_reserved": lambda device=None: gpu.in_use[_index(device, gpu)],
        "memory_allocated": lambda device=None: gpu.in_use[_index(device, gpu)],
        "max_memory_allocated": lambda device=None: gpu.in_use[_index(device, gpu)],
        "max_memory_reserved": lambda device=None: gpu.in_use[_index(device, gpu)],
        "reset_peak_memory_stats": lambda device=None: None,
        "set_sync_debug_mode": debug,
        "get_sync_debug_mode": lambda: gpu.sync_debug_mode,
    }
    with contextlib.ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(mock.patch.object(torch._C, "_host_emptyCache", create=True))
        stack.enter_context(mock.patch.object(torch.cuda.graph, "default_capture_stream", None))
        _RUNNING.append(gpu)
        stack.callback(_RUNNING.remove, gpu)
        stack.enter_context(_Functions())
        stack.enter_context(_Dispatch(gpu))
        try:
            yield gpu
        finally:
            gpu.closed = True
