"""The nodes of a CUDA graph while it is being captured, through the driver's C interface."""

from __future__ import annotations

import ctypes
from functools import cache

from dsv4_bench.engine.errors import CannotAnswer

_KERNEL = 0  # CU_GRAPH_NODE_TYPE_KERNEL


class _KernelNode(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2."""

    _fields_ = (
        ("func", ctypes.c_void_p),
        ("sizes", ctypes.c_uint * 7),  # grid, block, dynamic shared memory
        ("parameters", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kern", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CannotAnswer(f"no CUDA driver: {error}") from None


def _check(name: str, status: int) -> None:
    if status:
        raise RuntimeError(f"{name}: CUDA error {status}")


class CapturedNodes:
    """The nodes that the capture on `stream` (a cudaStream_t) has made so far, oldest first.

    Valid until the capture ends.
    """

    def __init__(self, stream: int) -> None:
        status, number, graph = ctypes.c_int(), ctypes.c_uint64(), ctypes.c_void_p()
        name = "cuStreamGetCaptureInfo_v2"
        where = (ctypes.byref(status), ctypes.byref(number), ctypes.byref(graph), None, None)
        _check(name, _driver()[name](ctypes.c_void_p(stream), *where))
        if graph.value is None:
            raise RuntimeError("the stream is not being captured")
        self._graph = graph

    def forget(self, stream: int) -> None:
        """What is captured on `stream` next comes only after what it is made to wait for from now on.

        Saves edges that others imply. A driver that refuses keeps them, which is right as well.
        """
        none, only_these = ctypes.c_size_t(0), ctypes.c_uint(1)
        _driver().cuStreamUpdateCaptureDependencies(ctypes.c_void_p(stream), None, none, only_these)

    def count(self) -> int:
        number = ctypes.c_size_t()
        _check(
            "cuGraphGetNodes", _driver().cuGraphGetNodes(self._graph, None, ctypes.byref(number))
        )
        return number.value

    def names(self) -> list[str]:
        """The mangled name of every node's kernel, "" for nodes that are no kernels."""
        number = ctypes.c_size_t(self.count())
        nodes = (ctypes.c_void_p * number.value)()
        _check(
            "cuGraphGetNodes", _driver().cuGraphGetNodes(self._graph, nodes, ctypes.byref(number))
        )
        return [_kernel_name(node) for node in nodes[: number.value] if node is not None]


def _kernel_name(node: int) -> str:
    driver, kind = _driver(), ctypes.c_int()
    _check(
        "cuGraphNodeGetType", driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind))
    )
    if kind.value != _KERNEL:
        return ""
    params, name = _KernelNode(), ctypes.c_char_p()
    query = driver.cuGraphKernelNodeGetParams_v2
    _check("cuGraphKernelNodeGetParams_v2", query(ctypes.c_void_p(node), ctypes.byref(params)))
    if params.kern:
        status = driver.cuKernelGetName(ctypes.byref(name), ctypes.c_void_p(params.kern))
    else:
        status = driver.cuFuncGetName(ctypes.byref(name), ctypes.c_void_p(params.func))
    _check("name of a kernel", status)
    return (name.value or b"").decode()
