"""CuTe-DSL kernels of op linear for many rows: y = x W^T on wgmma, with TMA and clusters, for sm_90a.

A cluster of two blocks multiplies 2 x 128 weight rows with the same 256 (or 128) activation rows, of which
each block reads half and multicasts it. In a block one warp feeds a ring of shared-memory stages, 64
columns each, and two warpgroups multiply 64 weight rows each; the product leaves through shared memory
and bulk-tensor stores. Blocks are persistent: the next tile's loads run under this one's stores.
bfloat16 weights are multiplied from shared memory; coded ones are decoded into registers, which wgmma
takes as its first operand, while the products before are under way. With few tiles the columns are
divided over `splits` blocks, whose float32 parts SumOfParts adds up.

Needs nvidia-cutlass-dsl; `compile.py` compiles it ahead of time, on any machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint32
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.cute.runtime import make_ptr
from cutlass.utils import LayoutEnum, SmemAllocator
from cutlass.utils import hopper_helpers as hopper

from dsv4_bench.engine.dsl.codes import COLUMNS, PRODUCTS, Fp8, Mxfp4, Nvfp4

ROWS = 128  # weight rows of a tile
CLUSTER = 2  # blocks along the weight rows; they share the activations
CHUNK = 32  # activation rows that leave at a time
# Bytes of shared memory a block: all but barriers, and of these what is on its way out.
SHARED, LEAVING = 226 * 1024, 32 * 1024
GROUP = 8  # tiles of activation rows whose weights are read once from L2
WARPGROUP = 128  # threads
MULTIPLIERS = 2  # warpgroups that multiply; one more loads
LOADER_REGISTERS, MULTIPLIER_REGISTERS = 40, 232
# The matrix unit cuts the low bits of a sum at every product. float32 results are added up in float32
# every so many steps, which takes registers: their tiles have half the activation rows.
STEPS_TOGETHER = 8
THREAD = pipeline.Agent.Thread


# ------------------------------------------------------------------------------ the kernel


class TallLinear:
    """y [m, n] = factor * x [m, groups * k] W^T, W [n, k] as stored; x bfloat16, y of `out_dtype`.

    `coded` is the weights' format, None for bfloat16. n is a multiple of 8; k of 8, coded in 4 bits of
    64. Weight rows of group g see columns [g * k, (g + 1) * k) of x; with more than one group, n / groups
    is a multiple of 256 and k of 64.
    """

    def __init__(self, coded: type | None, out_dtype: type[cutlass.Numeric], tokens: int) -> None:
        self.coded = coded
        self.out_dtype = out_dtype
        self.exact = out_dtype is Float32
        self.tokens = tokens  # activation rows of a tile
        self.buffers = LEAVING // (ROWS * CHUNK * out_dtype.width // 8)
        self.stored = BFloat16 if coded is None else Uint8
        self.width = COLUMNS if coded is None else COLUMNS * coded.bits // 8  # of a stage
        self.stage_bytes = ROWS * self.width * self.stored.width // 8 + self.tokens * COLUMNS * 2
        self.stages = (SHARED - LEAVING) // self.stage_bytes

    def layouts(self) -> tuple[cute.ComposedLayout, ...]:
        """Shared memory: stages of stored weights and of activations, chunks on their way out."""
        rows, columns = LayoutEnum.ROW_MAJOR, LayoutEnum.COL_MAJOR
        tile, stages = (ROWS, self.tokens, COLUMNS), self.stages
        of_x = (self.tokens, ROWS, COLUMNS)
        layout_x = hopper.make_smem_layout_a(rows, of_x, BFloat16, stages)
        layout_y = hopper.make_smem_layout_epi(self.out_dtype, columns, (ROWS, CHUNK), self.buffers)
        if self.coded is None:
            return hopper.make_smem_layout_a(rows, tile, BFloat16, stages), layout_x, layout_y
        atom = warpgroup.make_smem_layout_atom(self.coded.swizzle, Uint8)
        layout_w = cute.tile_to_shape(atom, (ROWS, self.width, stages), order=(0, 1, 2))
        return layout_w, layout_x, layout_y

    def tensors(self, w, scale, x, y, n, m, k, groups, splits) -> tuple:
        """Stored weights [n, width], scales, activations [m, groups * k], output [n, m, splits]."""
        columns = cute.assume(k, divby=8)
        width, scales = columns, None
        if self.coded is not None:
            width = cute.assume(k * self.coded.bits // 8, divby=16)
            scales = self.coded.scale_tensor(scale, n, k)
        across, pitch = cute.assume(k * groups, divby=8), cute.assume(n, divby=8)
        out = cute.make_layout((n, m, splits), stride=(1, pitch, Int64(m) * pitch))
        return (
            cute.make_tensor(w, cute.make_layout((n, width), stride=(width, 1))),
            scales,
            cute.make_tensor(x, cute.make_layout((m, across), stride=(across, 1))),
            cute.make_tensor(y, out),
        )

    @cute.jit
    def __call__(
        self,
        w: cute.Pointer,
        scale: cute.Pointer,
        x: cute.Pointer,
        y: cute.Pointer,
        n: Int32,
        m: Int32,
        k: Int32,
        groups: Int32,
        splits: Int32,
        factor: Float32,
        processors: Int32,
        stream: cuda.CUstream,
    ) -> None:
        """Launches on `processors` multiprocessors; all pointers but `scale` are 16-byte aligned."""
        weight, scales, rows, out = self.tensors(w, scale, x, y, n, m, k, groups, splits)
        layout_w, layout_x, layout_y = self.layouts()
        one = (None, None, 0)
        load_w, from_w = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(),
            weight,
            cute.slice_(layout_w, one),
            (ROWS, self.width),
        )
        load_x, from_x = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SMulticastOp(),
            rows,
            cute.slice_(layout_x, one),
            (self.tokens, COLUMNS),
            num_multicast=CLUSTER,
        )
        store_y, to_y = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileS2GOp(), out, cute.slice_(layout_y, one), (ROWS, CHUNK)
        )

        @cute.struct
        class Storage:
            barriers: cute.struct.MemRange[cutlass.Int64, 2 * self.stages]
            w: cute.struct.Align[cute.struct.MemRange[self.stored, cute.cosize(layout_w)], 1024]
            x: cute.struct.Align[cute.struct.MemRange[BFloat16, cute.cosize(layout_x)], 1024]
            y: cute.struct.Align[cute.struct.MemRange[self.out_dtype, cute.cosize(layout_y)], 1024]

        self.storage = Storage
        row_tiles, token_tiles = cute.ceil_div(n, ROWS * CLUSTER), cute.ceil_div(m, self.tokens)
        clusters = min(row_tiles * token_tiles * splits, processors // CLUSTER)
        self.kernel(
            *(load_w, from_w, layout_w, load_x, from_x, layout_x, store_y, to_y, layout_y),
            *(scales, n, groups, splits, row_tiles, token_tiles, factor),
        ).launch(
            grid=(clusters * CLUSTER, 1, 1),
            block=((1 + MULTIPLIERS) * WARPGROUP, 1, 1),
            cluster=(CLUSTER, 1, 1),
            min_blocks_per_mp=1,
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        load_w: cute.CopyAtom,
        from_w: cute.Tensor,
        layout_w: cute.ComposedLayout,
        load_x: cute.CopyAtom,
        from_x: cute.Tensor,
        layout_x: cute.ComposedLayout,
        store_y: cute.CopyAtom,
        to_y: cute.Tensor,
        layout_y: cute.ComposedLayout,
        scales: cute.Tensor | None,
        n: Int32,
        groups: Int32,
        splits: Int32,
        row_tiles: Int32,
        token_tiles: Int32,
        factor: Float32,
    ) -> None:
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            for atom in (load_w, load_x, store_y):
                cpasync.prefetch_descriptor(atom)
        storage = SmemAllocator().allocate(self.storage)
        sw = storage.w.get_tensor(layout_w.outer, swizzle=layout_w.inner)
        stored = sw
        if cutlass.const_expr(self.coded is not None):  # as it lies: decoding undoes the swizzle
            unit = self.coded.unit
            layout = cute.make_ordered_layout(
                (ROWS, self.width * 8 // unit.width, self.stages), order=(1, 0, 2)
            )
            stored = cute.make_tensor(cute.recast_ptr(storage.w.data_ptr(), dtype=unit), layout)
        sx = storage.x.get_tensor(layout_x.outer, swizzle=layout_x.inner)
        sy = storage.y.get_tensor(layout_y.outer, swizzle=layout_y.inner)
        feed = pipeline.PipelineTmaAsync.create(
            barrier_storage=storage.barriers.data_ptr(),
            num_stages=self.stages,
            producer_group=pipeline.CooperativeGroup(THREAD),
            # One arrival a multiplying warp of both blocks: the activations go to both.
            consumer_group=pipeline.CooperativeGroup(THREAD, CLUSTER * MULTIPLIERS * 4),
            tx_count=self.stage_bytes,
            cta_layout_vmnk=cute.make_layout((1, CLUSTER, 1, 1)),
            defer_sync=True,
        )
        pipeline.pipeline_init_arrive(cluster_shape_mn=(CLUSTER, 1), is_relaxed=True)
        gw = cute.local_tile(from_w, (ROWS, self.width), (None, None))
        gx = cute.local_tile(from_x, (self.tokens, COLUMNS), (None, None))
        gy = cute.local_tile(to_y, (ROWS, self.tokens), (None, None, None))
        pipeline.pipeline_init_wait(cluster_shape_mn=(CLUSTER, 1))

        if warp < 4:
            cute.arch.setmaxregister_decrease(LOADER_REGISTERS)
            if warp == 0:
                work = (n // groups, splits, row_tiles, token_tiles)
                self.load(feed, load_w, gw, sw, load_x, gx, sx, *work)
        else:
            cute.arch.setmaxregister_increase(MULTIPLIER_REGISTERS)
            work = (cute.size(gw, mode=[3]), splits, row_tiles, token_tiles)
            self.multiply(feed, stored, sx, sy, store_y, gy, scales, n, factor, *work)

    @cute.jit
    def place(self, tile, steps, splits, row_tiles, token_tiles) -> tuple:
        """Of a cluster's tile: weight and activation tile, part of the columns, its first step and steps.

        GROUP tiles of activations go over all weights together.
        """
        tiles = row_tiles * token_tiles
        split, tile = tile // tiles, tile % tiles
        group = tile // (GROUP * row_tiles)
        within = tile - group * GROUP * row_tiles
        size = cutlass.min(GROUP, token_tiles - group * GROUP)
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
        share = cute.ceil_div(steps, splits)
        start = split * share
        row, token = within // size * CLUSTER + rank, group * GROUP + within % size
        return row, token, split, start, cutlass.min(share, steps - start)

    @cute.jit
    def load(
        self, feed, load_w, gw, sw, load_x, gx, sx, per_group, splits, row_tiles, token_tiles
    ) -> None:
        """What the loading warp does: the stages of all tiles of this block."""
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
        to_sw, of_gw = cpasync.tma_partition(
            load_w, 0, cute.make_layout(1), cute.group_modes(sw, 0, 2), cute.group_modes(gw, 0, 2)
        )
        to_sx, of_gx = cpasync.tma_partition(
            load_x,
            rank,
            cute.make_layout(CLUSTER),
            cute.group_modes(sx, 0, 2),
            cute.group_modes(gx, 0, 2),
        )
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
        first, stride = cute.arch.cluster_idx()[0], cute.arch.grid_dim()[0] // CLUSTER
        steps = cute.size(gw, mode=[3])
        for tile in cutlass.range(first, row_tiles * token_tiles * splits, stride, unroll=1):
            row, token, _, start, count = self.place(tile, steps, splits, row_tiles, token_tiles)
            # Steps of earlier groups; both blocks of a cluster load the same activations.
            before = (row - rank) * ROWS // per_group * steps
            for step in cutlass.range(start, start + count, unroll=1):
                feed.producer_acquire(state)
                barrier = feed.producer_get_barrier(state)
                cute.copy(
                    load_w,
                    of_gw[(None, row, step)],
                    to_sw[(None, state.index)],
                    tma_bar_ptr=barrier,
                )
                cute.copy(
                    load_x,
                    of_gx[(None, token, before + step)],
                    to_sx[(None, state.index)],
                    tma_bar_ptr=barrier,
                    mcast_mask=cutlass.Int16((1 << CLUSTER) - 1),
                )
                feed.producer_commit(state)
                state.advance()
        feed.producer_tail(state)

    @cute.jit
    def multiply(
        self,
        feed,
        sw,
        sx,
        sy,
        store_y,
        gy,
        scales,
        n,
        factor,
        steps,
        splits,
        row_tiles,
        token_tiles,
    ) -> None:
        """What the multiplying warpgroups do: all products of a tile, then its way out."""
        source = (
            warpgroup.OperandSource.SMEM if self.coded is None else warpgroup.OperandSource.RMEM
        )
        k_major, shape = OperandMajorMode.K, (MULTIPLIERS, 1, 1)
        mma = hopper.make_trivial_tiled_mma(
            BFloat16, BFloat16, k_major, k_major, Float32, shape, (64, self.tokens), source
        )
        member = cute.arch.thread_idx()[0] - WARPGROUP
        part = mma.get_slice(cute.make_layout(MULTIPLIERS, stride=WARPGROUP)(member // WARPGROUP))
        b = mma.make_fragment_B(part.partition_B(sx))
        sums = cute.make_rmem_tensor(part.partition_shape_C((ROWS, self.tokens)), Float32)
        part_sums = cute.make_rmem_tensor(sums.shape, Float32) if self.exact else sums
        reading = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
        first, stride = cute.arch.cluster_idx()[0], cute.arch.grid_dim()[0] // CLUSTER
        for tile in cutlass.range(first, row_tiles * token_tiles * splits, stride, unroll=1):
            row, token, split, start, count = self.place(
                tile, steps, splits, row_tiles, token_tiles
            )
            if cutlass.const_expr(self.exact):
                sums.fill(0)
                for before in cutlass.range(0, count, STEPS_TOGETHER, unroll=1):
                    some = cutlass.min(STEPS_TOGETHER, count - before)
                    reading = self.products(
                        feed, mma, sw, b, part_sums, reading, start + before, some, scales, row, n
                    )
                    for i in cutlass.range_constexpr(cute.size(sums)):
                        sums[i] = sums[i] + part_sums[i]
            else:
                reading = self.products(
                    feed, mma, sw, b, sums, reading, start, count, scales, row, n
                )
            of_tile = gy[(None, None, row, token, split)]
            self.leave(mma, sums, factor, sy, store_y, of_tile, member)
        cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def products(
        self, feed, mma, sw, b, sums, reading, start, count, scales, tile_row, n
    ) -> pipeline.PipelineState:
        """sums = the products of steps [start, start + count)."""
        mma.set(warpgroup.Field.ACCUMULATE, False)
        if cutlass.const_expr(self.coded is None):
            member = cute.arch.thread_idx()[0] - WARPGROUP
            thread = cute.make_layout(MULTIPLIERS, stride=WARPGROUP)(member // WARPGROUP)
            a = mma.make_fragment_A(mma.get_slice(thread).partition_A(sw))
            reading = self.stored_products(feed, mma, a, b, sums, reading, count)
        else:
            reading = self.coded_products(
                feed, mma, sw, b, sums, reading, start, count, scales, tile_row, n
            )
        return reading

    @cute.jit
    def stored_products(self, feed, mma, a, b, sums, reading, count) -> pipeline.PipelineState:
        """Of bfloat16 weights."""
        freeing = reading.clone()
        for step in cutlass.range(count, unroll=1):
            feed.consumer_wait(reading)
            warpgroup.fence()
            for i in cutlass.range_constexpr(PRODUCTS):
                at = (None, None, i, reading.index)
                cute.gemm(mma, sums, a[at], b[at], sums)
                mma.set(warpgroup.Field.ACCUMULATE, True)
            warpgroup.commit_group()
            reading.advance()
            if step > 0:  # the step before has been multiplied
                warpgroup.wait_group(1)
                feed.consumer_release(freeing)
                freeing.advance()
        warpgroup.wait_group(0)
        feed.consumer_release(freeing)
        return reading

    @cute.jit
    def coded_products(
        self, feed, mma, codes, b, sums, reading, start, count, scales, tile_row, n
    ) -> pipeline.PipelineState:
        """The same of coded weights, decoded product by product behind those under way."""
        member = cute.arch.thread_idx()[0] - WARPGROUP
        row = member // 32 * 16 + member % 32 // 4
        part = mma.get_slice(0)
        a = cute.make_rmem_tensor(part.partition_shape_A((ROWS, COLUMNS)), BFloat16)
        words = cute.recast_tensor(a, Uint32)  # of a product: rows r, r + 8, then 8 columns on
        stored = [cutlass.min(tile_row * ROWS + row + 8 * h, n - 1) for h in range(2)]
        low = self.coded.read_scale(scales, stored[0], start)
        high = self.coded.read_scale(scales, stored[1], start)
        for step in cutlass.range(count, unroll=1):
            factors = [self.coded.factors(low), self.coded.factors(high)]
            ahead = start + cutlass.min(step + 1, count - 1)
            low = self.coded.read_scale(scales, stored[0], ahead)
            high = self.coded.read_scale(scales, stored[1], ahead)
            feed.consumer_wait(reading)
            for i in cutlass.range_constexpr(PRODUCTS):
                pairs = [
                    self.coded.operand(codes, row + 8 * h, i, reading.index, member, factors[h][i])
                    for h in range(2)
                ]
                for j in cutlass.range_constexpr(4):
                    words[4 * i + j] = pairs[j % 2][j // 2]
                warpgroup.fence()
                cute.gemm(mma, sums, a[(None, None, i)], b[(None, None, i, reading.index)], sums)
                mma.set(warpgroup.Field.ACCUMULATE, True)
                warpgroup.commit_group()
            # ptxas keeps the operands' registers as they are up to here, but not around the loop, where
            # the matrix unit may read them still. The other warpgroup uses it in the meantime.
            warpgroup.wait_group(0)
            feed.consumer_release(reading)
            reading.advance()
        return reading

    @cute.jit
    def leave(self, mma, sums, factor, sy, store_y, of_tile, member) -> None:
        """Write a tile's sums times `factor`, CHUNK activation rows at a time."""
        atom = hopper.get_smem_store_op(LayoutEnum.COL_MAJOR, self.out_dtype, Float32)
        narrow = cute.make_copy_atom(cute.nvgpu.warp.StMatrix8x8x16bOp(True, 4), self.out_dtype)
        store = cute.make_tiled_copy_S(atom, cute.make_tiled_copy_C_atom(narrow, mma))
        mine = store.get_slice(member)
        to_sy, from_sums = mine.partition_D(sy), store.retile(sums)
        chunk = cute.make_rmem_tensor(cute.shape(mine.partition_S(sy))[:3], Float32)
        rounded = cute.make_rmem_tensor(chunk.shape, self.out_dtype)
        together = pipeline.NamedBarrier(barrier_id=1, num_threads=MULTIPLIERS * WARPGROUP)
        chunks = cute.zipped_divide(of_tile, (ROWS, CHUNK))
        from_sy, to_gy = cpasync.tma_partition(
            store_y, 0, cute.make_layout(1), cute.group_modes(sy, 0, 2), chunks
        )
        for i in cutlass.range_constexpr(self.tokens // CHUNK):
            buffer = i % self.buffers
            for j in cutlass.range_constexpr(cute.size(chunk)):
                chunk[j] = from_sums[i * cute.size(chunk) + j] * factor
            rounded.store(chunk.load().to(self.out_dtype))
            cute.copy(store, rounded, to_sy[(None, None, None, buffer)])
            cute.arch.fence_proxy("async.shared", space="cta")
            together.arrive_and_wait()
            if member < 32:
                cute.copy(store_y, from_sy[(None, buffer)], to_gy[(None, (0, i))])
                cute.arch.cp_async_bulk_commit_group()
                # What the chunk after next overwrites has been read; the next barrier tells all.
                cute.arch.cp_async_bulk_wait_group(self.buffers - 2, read=True)


class SumOfParts:
    """y [size] = the sum of parts [splits, size] float32, added in order; size is a multiple of 8."""

    THREADS, EACH = 256, 8

    @cute.jit
    def __call__(
        self,
        parts: cute.Pointer,
        y: cute.Pointer,
        size: Int64,
        splits: Int32,
        stream: cuda.CUstream,
    ) -> None:
        runs = cute.ceil_div(size, self.EACH)
        stride = cute.assume(size, divby=self.EACH)
        shape = (self.EACH, runs, splits)
        given = cute.make_tensor(parts, cute.make_layout(shape, stride=(1, self.EACH, stride)))
        out = cute.make_tensor(y, cute.make_layout(shape[:2], stride=(1, self.EACH)))
        blocks = cute.ceil_div(runs, self.THREADS)
        self.kernel(given, out).launch(
            grid=(blocks, 1, 1), block=(self.THREADS, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(self, given: cute.Tensor, out: cute.Tensor) -> None:
        run = cute.arch.block_idx()[0] * self.THREADS + cute.arch.thread_idx()[0]
        if run < cute.size(out, mode=[1]):
            total = cute.make_rmem_tensor(self.EACH, Float32)
            part = cute.make_rmem_tensor(self.EACH, Float32)
            total.fill(0)
            for split in cutlass.range(cute.size(given, mode=[2])):
                cute.autovec_copy(given[(None, run, split)], part)
                total.store(total.load() + part.load())
            rounded = cute.make_rmem_tensor(self.EACH, out.element_type)
            rounded.store(total.load().to(out.element_type))
            cute.autovec_copy(rounded, out[(None, run)])


OUTPUTS = {"bf16": BFloat16, "f32": Float32}


def pointer(dtype: type[cutlass.Numeric], alignment: int = 16) -> cute.Pointer:
    """Stands for any address of that type and alignment."""
    return make_ptr(dtype, alignment, cute.AddressSpace.gmem, assumed_align=alignment)


def exports() -> Iterator[tuple[str, Any, list[Any]]]:
    """What is compiled: (name, host function, arguments to compile it for)."""
    stream = cuda.CUstream(0)
    for kind, coded in (("bf16", None), ("nvfp4", Nvfp4), ("mxfp4", Mxfp4), ("fp8", Fp8)):
        scale_type = Uint8 if coded is None else coded.scale_type
        for out, tokens in (("bf16", 256), ("bf16", 128), ("f32", 128)):
            kernel, name = TallLinear(coded, OUTPUTS[out], tokens), f"linear_{kind}_{out}_{tokens}"
            name_kernel(TallLinear, name)
            pointers = [
                pointer(kernel.stored),
                pointer(scale_type, scale_type.width // 8),
                pointer(BFloat16),
                pointer(OUTPUTS[out]),
            ]
            rest = [Int32(64)] * 5 + [Float32(1), Int32(2), stream]
            yield name, kernel, pointers + rest
    for out, out_dtype in OUTPUTS.items():
        name_kernel(SumOfParts, f"sum_{out}")
        pointers = [pointer(Float32), pointer(out_dtype)]
        yield f"sum_{out}", SumOfParts(), [*pointers, Int64(8), Int32(2), stream]


def name_kernel(kernels: type, name: str) -> None:
    """What profilers show of the next kernel that is compiled."""
    kernels.kernel.set_name_prefix(
        f"dsv4_{name}", remove_cutlass_symbol=True, keep_mangled_name=False
    )
