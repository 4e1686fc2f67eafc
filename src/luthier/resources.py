"""What a run takes from the machine: peak memory while it runs, a writable folder and free disk before it
starts.

Torch-free: these are asked before anything heavy is imported.
"""

import ctypes
import errno
import mmap
import os
import platform
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import ResourceError

if TYPE_CHECKING:
    from torch import nn

_STATUS = Path("/proc/self/status")
_PAGES = Path("/proc/self/pagemap")
_CLEAR = Path("/proc/self/clear_refs")
_OF_FILE = re.compile(r"^(\w+)-(\w+) \S+ \S+ \S+ [1-9]", re.MULTILINE)  # the last is the inode
_MADV_DONTNEED, _MADV_PAGEOUT = 4, 21
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST_MMAP_THRESHOLD = 32 << 20  # that glibc takes
KEPT = 512 << 20  # bytes that are free and stay, inside `kept_heap`
_measuring: list["PeakMemory"] = []


def resident_memory() -> int:
    """Bytes of memory that this process holds now (RSS)."""
    import psutil

    return psutil.Process().memory_info().rss


def release_memory() -> None:
    """Give freed memory back to the system, so that the next measurement does not count the last stage's."""
    import gc

    gc.collect()
    trim_heap()
    cuda = _cuda()
    if cuda is not None:
        cuda.empty_cache()


def trim_heap() -> None:
    """Give back what glibc keeps of freed blocks in its arenas, where RSS still counts them."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextmanager
def kept_heap() -> Iterator[None]:
    """Inside, glibc keeps the memory of freed tensors at hand; at the end what is free is given back.

    Else much of it goes to the system at once and is had again page by page. Tensors of more than 32 MB still
    have memory of their own.
    """
    # glibc's own limits follow the blocks that are freed, up to these; setting them ends that.
    _limit_heap(trim=KEPT)
    try:
        yield
    finally:
        _limit_heap(trim=2 * _MOST_MMAP_THRESHOLD)
        trim_heap()


def _limit_heap(trim: int) -> None:
    """Let glibc keep so many free bytes at the end of a heap; see mallopt(3)."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, _MOST_MMAP_THRESHOLD)
        set_option(_M_TRIM_THRESHOLD, trim)


@contextmanager
def replaces_weights(module: "nn.Module") -> Iterator[None]:
    """Around what puts others in the place of a module's weights: give the memory of the old ones back."""
    before = _spans(module.parameters())
    yield
    _drop(before - _spans(module.parameters()))


def not_needed_now(parameters: "Iterable[nn.Parameter]") -> None:
    """Give back the memory of weights that nobody will read for a while; they stay what they are."""
    _drop(_spans(parameters))


def _drop(spans: set[tuple[int, int]]) -> None:
    """Tell the system to drop ranges of memory that are parts of mapped files, as loaded weights are.

    Such pages else stay in memory as long as any weight of the file is used; whoever reads them again gets
    them from the file. Memory of other kinds is left alone: the heap may have given it to somebody else.
    """
    mapped = _mapped_files()
    for start, size in spans:
        if any(first <= start and start + size <= last for first, last in mapped):
            _page_out(start, size)


def _mapped_files() -> list[tuple[int, int]]:
    """Address ranges of this process that are parts of files; see proc(5)."""
    maps = Path("/proc/self/maps")
    text = maps.read_text() if maps.exists() else ""
    return [(int(first, 16), int(last, 16)) for first, last in _OF_FILE.findall(text)]


def _spans(parameters: "Iterable[nn.Parameter]") -> set[tuple[int, int]]:
    """Address and bytes of every parameter in the computer's own memory."""
    return {(p.data_ptr(), p.nbytes) for p in parameters if p.device.type == "cpu"}


def _page_out(start: int, size: int) -> None:
    """Ask Linux (5.4 and later) to drop whole pages of an address range; see madvise(2)."""
    advise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
    first, last = -(-start // mmap.PAGESIZE), (start + size) // mmap.PAGESIZE
    if advise is not None and last > first:
        span = ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t((last - first) * mmap.PAGESIZE)
        advise(*span, _MADV_DONTNEED if _as_in_the_file(first, last) else _MADV_PAGEOUT)


def _as_in_the_file(first: int, last: int) -> bool:
    """Whether no page of a mapped file was written to: such pages can be dropped, which is faster.

    Of each page 64 bits; the last says that it is in memory, the third last that it is the file's own.
    """
    try:
        with _PAGES.open("rb", buffering=0) as pages:
            pages.seek(8 * first)
            flags = memoryview(pages.read(8 * (last - first))).cast("Q")
    except OSError:
        return False
    return len(flags) == last - first and {flag >> 61 for flag in flags} <= {0b000, 0b101}


class PeakMemory:
    """The most memory that this process held inside a `with` block; blocks may be nested.

    Linux keeps the peak of the resident set (VmHWM) and resets it on request (`/proc/self/clear_refs`, see
    proc(5)). Where that is not possible the peak is that of the process's whole life, and `exact` is False.

    Attributes:
        bytes: peak resident memory inside the block, in bytes.
        start_bytes: resident memory when the block began.
        cuda_bytes: peak of memory allocated by torch on the GPUs, 0 without one.
        exact: whether `bytes` is the peak of this block alone.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.start_bytes = 0
        self.cuda_bytes = 0
        self.exact = False

    def __enter__(self) -> "PeakMemory":
        _update()
        self.exact = _reset_high_water_mark()
        _measuring.append(self)
        self.start_bytes = resident_memory()
        return self

    def __exit__(self, *_: Any) -> None:
        _update()
        _measuring.remove(self)

    def now(self) -> int:
        """The peak so far, in bytes, while the block still runs."""
        _update()
        return self.bytes


def _update() -> None:
    """Let every open block see the high-water mark: a block that starts inside resets it for all."""
    peak = _high_water_mark()
    gpu = _cuda_peak()
    for block in _measuring:
        block.bytes = max(block.bytes, peak)
        block.cuda_bytes = max(block.cuda_bytes, gpu)


def _high_water_mark() -> int:
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _reset_high_water_mark() -> bool:
    cuda = _cuda()
    if cuda is not None:
        for device in range(cuda.device_count()):
            cuda.reset_peak_memory_stats(device)
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _cuda() -> Any:
    """torch.cuda where torch is loaded and uses a GPU; this module never imports torch itself."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    return cuda if cuda is not None and cuda.is_available() and cuda.is_initialized() else None


def _cuda_peak() -> int:
    cuda = _cuda()
    return sum(cuda.max_memory_allocated(d) for d in range(cuda.device_count())) if cuda is not None else 0


def require_writable(folder: Path | str) -> None:
    """Prove that files can be written in `folder` (which need not exist yet) by writing one.

    Raises:
        ResourceError: naming the part of the path that cannot be written and why.
    """
    place = _existing(Path(folder))
    if not place.is_dir():
        raise ResourceError(
            f"Cannot make the folder {folder}: {place} is a file.",
            fix="Choose another folder with --output.",
        )
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"\0")
    except OSError as error:
        raise explain(error, place) from error


def require_space(folder: Path | str, bytes: int) -> None:
    """Prove that `bytes` fit on the disk of `folder` (which need not exist yet).

    Raises:
        ResourceError: with what is needed and what is free.
    """
    place = _existing(Path(folder))
    free = shutil.disk_usage(place).free
    if free < bytes:
        raise ResourceError(
            f"The disk of {place} has {show_bytes(free)} free, and the run writes up to {show_bytes(bytes)}.",
            fix="Free some space, choose another disk with --output, or keep fewer checkpoints "
            "(training: {save_total_limit: 1}).",
        )


def explain(error: OSError, where: Path | str, fix: str | None = None) -> ResourceError:
    """The `ResourceError` that says in words what the system answered while writing at `where`.

    Args:
        fix: what to do about a place that cannot be written; by default what helps a run.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            f"The disk is full: writing in {where} failed ({error.strerror}).",
            fix="Free some space or choose another disk with --output, then start the same command again.",
        )
    return ResourceError(
        f"Cannot write in {where}: {error.strerror or error}.",
        fix=fix or "Choose a folder that you may write in with --output, or change its permissions.",
    )


def is_resource(error: BaseException) -> bool:
    """Whether an error means that a folder cannot be written or that its disk is full."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
    return isinstance(error, OSError) and error.errno in codes


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on the CPU or on a GPU."""
    # torch's allocator for the CPU raises a plain RuntimeError.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def environment() -> dict[str, Any]:
    """The machine, for the record of a run; memory in bytes."""
    import psutil

    cuda = _cuda()
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [cuda.get_device_name(i) for i in range(cuda.device_count())] if cuda is not None else [],
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def show_bytes(count: float) -> str:
    """Bytes for a reader: '1.5 GB' (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def folder_bytes(folder: Path | str) -> int:
    """Bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _existing(path: Path) -> Path:
    """The nearest part of `path` that exists."""
    path = Path(os.path.abspath(path))
    # os.path.exists is False, not an error, below a folder that may not be entered.
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    return path
