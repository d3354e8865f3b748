"""CuTe-DSL kernel of op linear for many rows: y = x W^T on wgmma, with TMA and clusters, for sm_90a.

A cluster of two blocks multiplies 2 x 128 weight rows with the same 256 activation rows, which each
block reads half of and multicasts. In a block one warp feeds a ring of shared-memory stages, 64
columns each, and two warpgroups multiply 64 weight rows each; the product leaves through shared memory
and bulk-tensor stores. Blocks are persistent: the next tile's loads run under this one's stores.

Needs nvidia-cutlass-dsl; `engine/dsl/build.py` compiles it ahead of time, on any machine.
"""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.cute.runtime import make_ptr
from cutlass.utils import LayoutEnum, SmemAllocator
from cutlass.utils import hopper_helpers as hopper

ROWS, TOKENS, COLUMNS = 128, 256, 64  # of a tile: weight rows, activation rows, contracted columns
CLUSTER = 2  # blocks along the weight rows; they share the activations
STAGES = 4
CHUNK = 32  # activation rows that leave at a time
GROUP = 8  # tiles of activation rows whose weights are read once from L2
WARPGROUP = 128  # threads
MULTIPLIERS = 2  # warpgroups that multiply; one more loads
LOADER_REGISTERS, MULTIPLIER_REGISTERS = 40, 232


class TallLinear:
    """y [m, n] = factor * x [m, k] W^T, W [n, k]; x and W bfloat16, y of `out_dtype`; k, n multiples of 8."""

    def __init__(self, out_dtype: type[cutlass.Numeric]) -> None:
        self.dtype = cutlass.BFloat16
        self.out_dtype = out_dtype
        self.buffers = 64 // out_dtype.width  # chunks in flight on their way out: 32 KB

    @cute.jit
    def __call__(
        self,
        w: cute.Pointer,
        x: cute.Pointer,
        y: cute.Pointer,
        n: cutlass.Int32,
        m: cutlass.Int32,
        k: cutlass.Int32,
        factor: cutlass.Float32,
        processors: cutlass.Int32,
        stream: cuda.CUstream,
    ) -> None:
        """Launches on `processors` multiprocessors; every pointer is 16-byte aligned."""
        columns = cute.assume(k, divby=8)
        weight = cute.make_tensor(w, cute.make_layout((n, columns), stride=(columns, 1)))
        rows = cute.make_tensor(x, cute.make_layout((m, columns), stride=(columns, 1)))
        out = cute.make_tensor(y, cute.make_layout((n, m), stride=(1, cute.assume(n, divby=8))))
        row_major, column_major = LayoutEnum.ROW_MAJOR, LayoutEnum.COL_MAJOR
        layout_w = hopper.make_smem_layout_a(row_major, (ROWS, TOKENS, COLUMNS), self.dtype, STAGES)
        layout_x = hopper.make_smem_layout_a(row_major, (TOKENS, ROWS, COLUMNS), self.dtype, STAGES)
        layout_y = hopper.make_smem_layout_epi(
            self.out_dtype, column_major, (ROWS, CHUNK), self.buffers
        )
        load, multicast = (
            cpasync.CopyBulkTensorTileG2SOp(),
            cpasync.CopyBulkTensorTileG2SMulticastOp(),
        )
        load_w, from_w = cpasync.make_tiled_tma_atom(
            load, weight, cute.slice_(layout_w, (None, None, 0)), (ROWS, COLUMNS)
        )
        load_x, from_x = cpasync.make_tiled_tma_atom(
            multicast,
            rows,
            cute.slice_(layout_x, (None, None, 0)),
            (TOKENS, COLUMNS),
            num_multicast=CLUSTER,
        )
        store_y, to_y = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileS2GOp(),
            out,
            cute.slice_(layout_y, (None, None, 0)),
            (ROWS, CHUNK),
        )
        major = cute.nvgpu.OperandMajorMode.K
        mma = hopper.make_trivial_tiled_mma(
            self.dtype, self.dtype, major, major, cutlass.Float32, (MULTIPLIERS, 1, 1), (64, TOKENS)
        )

        @cute.struct
        class Storage:
            barriers: cute.struct.MemRange[cutlass.Int64, 2 * STAGES]
            w: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(layout_w)], 1024]
            x: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(layout_x)], 1024]
            y: cute.struct.Align[cute.struct.MemRange[self.out_dtype, cute.cosize(layout_y)], 1024]

        self.storage = Storage
        row_tiles = cute.ceil_div(n, ROWS * CLUSTER)
        token_tiles = cute.ceil_div(m, TOKENS)
        clusters = min(row_tiles * token_tiles, processors // CLUSTER)
        self.kernel(
            load_w,
            from_w,
            layout_w,
            load_x,
            from_x,
            layout_x,
            store_y,
            to_y,
            layout_y,
            mma,
            row_tiles,
            token_tiles,
            factor,
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
        mma: cute.TiledMma,
        row_tiles: cutlass.Int32,
        token_tiles: cutlass.Int32,
        factor: cutlass.Float32,
    ):
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
        if warp == 0:
            for atom in (load_w, load_x, store_y):
                cpasync.prefetch_descriptor(atom)

        storage = SmemAllocator().allocate(self.storage)
        sw = storage.w.get_tensor(layout_w.outer, swizzle=layout_w.inner)
        sx = storage.x.get_tensor(layout_x.outer, swizzle=layout_x.inner)
        sy = storage.y.get_tensor(layout_y.outer, swizzle=layout_y.inner)

        thread = pipeline.Agent.Thread
        feed = pipeline.PipelineTmaAsync.create(
            barrier_storage=storage.barriers.data_ptr(),
            num_stages=STAGES,
            producer_group=pipeline.CooperativeGroup(thread),
            # One arrival a multiplying warp of both blocks: the activations go to both.
            consumer_group=pipeline.CooperativeGroup(thread, CLUSTER * MULTIPLIERS * 4),
            tx_count=(ROWS + TOKENS) * COLUMNS * self.dtype.width // 8,
            cta_layout_vmnk=cute.make_layout((1, CLUSTER, 1, 1)),
            defer_sync=True,
        )
        pipeline.pipeline_init_arrive(cluster_shape_mn=(CLUSTER, 1), is_relaxed=True)

        gw = cute.local_tile(from_w, (ROWS, COLUMNS), (None, None))
        gx = cute.local_tile(from_x, (TOKENS, COLUMNS), (None, None))
        gy = cute.local_tile(to_y, (ROWS, TOKENS), (None, None))
        alone = cute.make_layout(1)
        to_sw, of_gw = cpasync.tma_partition(
            load_w, 0, alone, cute.group_modes(sw, 0, 2), cute.group_modes(gw, 0, 2)
        )
        to_sx, of_gx = cpasync.tma_partition(
            load_x,
            rank,
            cute.make_layout(CLUSTER),
            cute.group_modes(sx, 0, 2),
            cute.group_modes(gx, 0, 2),
        )
        steps = cute.size(gw, mode=[3])
        first = cute.arch.block_idx()[0] // CLUSTER
        stride = cute.arch.grid_dim()[0] // CLUSTER
        tiles = row_tiles * token_tiles
        pipeline.pipeline_init_wait(cluster_shape_mn=(CLUSTER, 1))

        if warp < 4:
            cute.arch.setmaxregister_decrease(LOADER_REGISTERS)
            if warp == 0:
                state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, STAGES)
                for tile in cutlass.range(first, tiles, stride, unroll=1):
                    row, token = self.place(tile, row_tiles, token_tiles)
                    of_row = of_gw[(None, row * CLUSTER + rank, None)]
                    of_token = of_gx[(None, token, None)]
                    for step in cutlass.range(steps, unroll=1):
                        feed.producer_acquire(state)
                        barrier = feed.producer_get_barrier(state)
                        cute.copy(
                            load_w,
                            of_row[(None, step)],
                            to_sw[(None, state.index)],
                            tma_bar_ptr=barrier,
                        )
                        cute.copy(
                            load_x,
                            of_token[(None, step)],
                            to_sx[(None, state.index)],
                            tma_bar_ptr=barrier,
                            mcast_mask=cutlass.Int16((1 << CLUSTER) - 1),
                        )
                        feed.producer_commit(state)
                        state.advance()
                feed.producer_tail(state)
        else:
            cute.arch.setmaxregister_increase(MULTIPLIER_REGISTERS)
            self.multiply(
                feed,
                mma,
                sw,
                sx,
                sy,
                gy,
                store_y,
                warp,
                rank,
                first,
                stride,
                row_tiles,
                token_tiles,
                steps,
                factor,
            )

    @cute.jit
    def place(self, tile, row_tiles, token_tiles):
        """Coordinates of a cluster's tile; GROUP tiles of activation rows go over all weight rows together."""
        group = tile // (GROUP * row_tiles)
        within = tile - group * GROUP * row_tiles
        size = cutlass.min(GROUP, token_tiles - group * GROUP)
        return within // size, group * GROUP + within % size

    @cute.jit
    def multiply(
        self,
        feed,
        mma,
        sw,
        sx,
        sy,
        gy,
        store_y,
        warp,
        rank,
        first,
        stride,
        row_tiles,
        token_tiles,
        steps,
        factor,
    ):
        """What the multiplying warpgroups do: all products of a tile, then its way out."""
        member = cute.arch.thread_idx()[0] - WARPGROUP
        part = mma.get_slice(cute.make_layout(MULTIPLIERS, stride=WARPGROUP)(member // WARPGROUP))
        a = mma.make_fragment_A(part.partition_A(sw))
        b = mma.make_fragment_B(part.partition_B(sx))
        sums = cute.make_rmem_tensor(part.partition_shape_C((ROWS, TOKENS)), cutlass.Float32)

        atom = hopper.get_smem_store_op(LayoutEnum.COL_MAJOR, self.out_dtype, cutlass.Float32)
        narrow = cute.make_copy_atom(cute.nvgpu.warp.StMatrix8x8x16bOp(True, 4), self.out_dtype)
        leave = cute.make_tiled_copy_S(atom, cute.make_tiled_copy_C_atom(narrow, mma))
        mine = leave.get_slice(member)
        to_sy, from_sums = mine.partition_D(sy), leave.retile(sums)
        chunk = cute.make_rmem_tensor(cute.shape(mine.partition_S(sy))[:3], cutlass.Float32)
        rounded = cute.make_rmem_tensor(chunk.shape, self.out_dtype)
        together = pipeline.NamedBarrier(barrier_id=1, num_threads=MULTIPLIERS * WARPGROUP)
        leaving = pipeline.PipelineTmaStore.create(
            num_stages=self.buffers,
            producer_group=pipeline.CooperativeGroup(
                pipeline.Agent.Thread, MULTIPLIERS * WARPGROUP
            ),
        )

        reading = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, STAGES)
        freeing = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, STAGES)
        for tile in cutlass.range(first, row_tiles * token_tiles, stride, unroll=1):
            row, token = self.place(tile, row_tiles, token_tiles)
            mma.set(warpgroup.Field.ACCUMULATE, False)
            for step in cutlass.range(steps, unroll=1):
                feed.consumer_wait(reading)
                warpgroup.fence()
                for i in cutlass.range_constexpr(cute.size(a, mode=[2])):
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
            freeing.advance()

            of_tile = cute.zipped_divide(
                gy[(None, None, row * CLUSTER + rank, token)], (ROWS, CHUNK)
            )
            from_sy, to_gy = cpasync.tma_partition(
                store_y, 0, cute.make_layout(1), cute.group_modes(sy, 0, 2), of_tile
            )
            for i in cutlass.range_constexpr(TOKENS // CHUNK):
                for j in cutlass.range_constexpr(cute.size(chunk)):
                    chunk[j] = from_sums[i * cute.size(chunk) + j] * factor
                rounded.store(chunk.load().to(self.out_dtype))
                buffer = i % self.buffers
                cute.copy(leave, rounded, to_sy[(None, None, None, buffer)])
                cute.arch.fence_proxy("async.shared", space="cta")
                together.arrive_and_wait()
                if warp == 4:
                    cute.copy(store_y, from_sy[(None, buffer)], to_gy[(None, (0, i))])
                    leaving.producer_commit()
                    leaving.producer_acquire()
                together.arrive_and_wait()
        leaving.producer_tail()


def exports() -> dict[str, tuple[TallLinear, list[object]]]:
    """What is compiled: name -> (host function, arguments to compile it for)."""
    found = {}
    for name, out_dtype in (("bf16", cutlass.BFloat16), ("f32", cutlass.Float32)):
        pointers = [
            make_ptr(dtype, 16, cute.AddressSpace.gmem, assumed_align=16)
            for dtype in (cutlass.BFloat16, cutlass.BFloat16, out_dtype)
        ]
        sizes = [cutlass.Int32(8)] * 3
        found[f"linear_bf16_{name}"] = (
            TallLinear(out_dtype),
            [*pointers, *sizes, cutlass.Float32(1), cutlass.Int32(2), cuda.CUstream(0)],
        )
    return found
