// Experts of few pairs: every weight row in use is streamed from memory once, at the memory's pace.
//
// A launch is one product. A block is persistent and walks over its share of all (piece, row tile) items.
// Sixteen warps share the columns, or eight those of one half of the rows and eight the other's: a stage is
// 128 bytes of each of 32 weight rows a warp, as rows of fewer bytes take as many wavefronts of shared
// memory. Every warp keeps a ring of stages of its own there, copied ahead of the products, so that nothing
// but the end of an item makes warps wait for one another. The activations of up to eight pairs lie in
// shared memory as the matrix unit wants them. Four more warps add up the sums of an item and finish it,
// while the others go on.
//
// For the hidden vector, 16 rows of a tile are eight rows of w1 above the same eight of w3.
#pragma once

#include "experts_products.cuh"

namespace dsv4 {

constexpr int kMultipliers = 16, kFinishers = 4;  // warps; whole warpgroups, for their registers
constexpr int kFewThreads = (kMultipliers + kFinishers) * 32;
constexpr int kFewPairs = 8, kDepth = 2;              // of a piece; stages of a ring
constexpr int kUnits = 8, kSteps = kUnits / 4;        // 16 bytes of a row in a stage; steps of a quad
constexpr int kPeaks = 2;                             // pieces: finishers may be one item behind
constexpr int kGroups = 2, kFewRows = 16 * kGroups;   // of a warp: 16-row products
constexpr int kSumStride = kFewRows + 4;              // floats from column to column
constexpr int kColumns = 8;                           // of a product's second operand
constexpr int kAtOnce = 2;                            // loads of activations, a thread
constexpr int kSplitLanes = 8;                        // of a warp that have a pair, of at most two
constexpr int kMeeting = 1;                           // named barrier

// A warp's part of a stage.
template <class Policy> struct Stage {
    uint4 codes[kFewRows][kUnits];  // at unit_of
    typename Policy::Scale scales[kRowScales<Policy> ? kFewRows : 1][kUnits];  // of every chunk

    // Rows of 128 bytes would otherwise share their banks with their neighbours.
    __device__ static int unit_of(int row, int unit) { return unit ^ row % 2 * 4; }
};

struct FewShared {
    uint64_t summed, taken;
    uint32_t peaks[kPeaks][kFewPairs];  // bits of the largest finite activation of each pair
};

// In front of the activations.
struct FewBuffers {
    float sums[kMultipliers][kColumns][kSumStride];
    alignas(128) char ring[kMultipliers][kDepth][sizeof(Stage<Nvfp4>)];
};

// One product with kAcross warps to a row.
template <class Policy, Product kProduct, int kAcross> struct Few {
    static constexpr bool kGated = kProduct == Product::kHidden;
    static constexpr int kTileRows = kFewRows * kMultipliers / kAcross;
    static constexpr int kOutputs = kGated ? kTileRows / 2 : kTileRows;  // rows of the result
    static constexpr int kSlice = kUnits * kAcross;                      // chunks of a row in a stage
    static constexpr int kVectors = Policy::kChunk / 8;  // 16 bytes of activations, a chunk
    static_assert(sizeof(Stage<Policy>) <= sizeof(Stage<Nvfp4>));
    using Scale = typename Policy::Scale;
    // Where whole groups of 16 rows of a matrix exist or do not, one pointer serves two of them.
    static constexpr int kPointers = kRowScales<Policy> ? kGroups : 2 * kGroups;

    const Moe& m;
    FewShared& s;
    FewBuffers& buffers;
    const int lanes;   // of a warp that have a pair
    uint4 *x, *zeros;  // activations: place_of_x; where products are split, zeros for lanes that have none
    int rows, chunks, slices, tiles;
    Items items;

    __device__ Few(const Moe& m, FewShared& s, char* memory)
        : m(m), s(s), buffers(*(FewBuffers*)memory), lanes(lanes_of(m)),
          x((uint4*)(memory + sizeof(FewBuffers))), rows(kGated ? m.inner : m.d),
          chunks((kGated ? m.d : m.inner) / Policy::kChunk), slices((chunks + kSlice - 1) / kSlice),
          tiles((rows + kOutputs - 1) / kOutputs), items(m.piece_count() * tiles) {
        zeros = x + steps_of(chunks) * kVectors * kSplitLanes;
    }

    __device__ static int warp() { return threadIdx.x / 32; }
    __device__ static int across() { return warp() % kAcross; }
    __device__ static int first_row() { return warp() / kAcross * kFewRows; }  // of a tile
    __device__ static int group() { return threadIdx.x % 32 / 4; }  // weight row
    __device__ static int member() { return threadIdx.x % 4; }      // chunk of a step
    // Of shared memory.
    __host__ static int64_t bytes(const Moe& m) {
        const int64_t steps = steps_of((kGated ? m.d : m.inner) / Policy::kChunk);
        const int64_t whole = steps * lanes_of(m), split = (steps + kSteps) * kSplitLanes;
        return sizeof(FewBuffers) + kVectors * sizeof(uint4) * (whole > split ? whole : split);
    }
    // Whole stages.
    __host__ __device__ static int steps_of(int64_t chunks) {
        return (chunks + kUnits - 1) / kUnits * kSteps;
    }
    // Of activations that lie together: four of each pair, and no fewer than where products are split.
    __host__ __device__ static int lanes_of(const Moe& m) {
        return 4 * m.most < kSplitLanes ? kSplitLanes : 4 * m.most;
    }
    __device__ static bool split(const Work& work) { return work.count <= kMostSplit<Policy>; }
    // Whether its activations are fp16 times a power of two.
    __device__ static bool halves(const Work& work) { return kInHalves<Policy> || split(work); }

    __device__ const dsv4_weight& matrix(int expert, int row) const {
        const Expert& all = m.table[expert];
        return kGated ? (row % 16 < 8 ? all.w1 : all.w3) : all.w2;
    }
    // Instead of one behind the last, a row that has another four below it: copies take both.
    __device__ int64_t weight_row(int tile, int row) const {
        int r = tile * kOutputs + (kGated ? row / 16 * 8 + row % 8 : row);
        return r < rows ? r : rows - 5;
    }
    // Rows of scales that do not start at a whole stage are read where they are needed.
    __device__ bool scales_staged() const { return kRowScales<Policy> && chunks % kUnits == 0; }

    // body(piece, tile) for each item of this block.
    template <class Body> __device__ void for_each_item(Body body) const {
        int piece = items.first / tiles, tile = items.first % tiles;
        for (int left = items.last - items.first; left > 0; left--) {
            body(piece, tile);
            if (++tile == tiles) tile = 0, piece++;
        }
    }

    // ---- the multiplying warps: copies

    // The stage that is copied next, and this thread's part of it: unit `unit` of two of every eight rows,
    // and the scales of one row.
    struct Ahead {
        int left, piece, tile, slice = 0;  // left: items
        int expert, own;                   // own: slices in which this thread has a chunk
        const char *codes[kPointers], *scales;
        int apart;  // bytes from the rows of one group of 16 to those of the next

        __device__ explicit Ahead(const Few& few)
            : left(few.items.last - few.items.first), piece(few.items.first / few.tiles),
              tile(few.items.first % few.tiles), own(left > 0 ? few.slices_of(unit()) : 0) {
            if (left == 0) return;
            expert = few.m.work_of(piece).expert;
            find(few);
        }
        __device__ static int unit() { return threadIdx.x % kUnits; }
        __device__ static int row() { return threadIdx.x % 32 / kUnits; }  // and four below
        // The first stage of the current tile of the current expert.
        __device__ void find(const Few& few) {
            const int of_scales = first_row() + threadIdx.x % 32, first = across() * kUnits;
#pragma unroll
            for (int i = 0; i < kPointers; i++)
                codes[i] = (const char*)few.matrix(expert, 8 * i).data +
                           (few.weight_row(tile, first_row() + row() + 8 * i) * few.chunks + first +
                            unit()) * 16;
            const int next = (kGated ? 8 : 16);  // matrix rows
            apart = few.weight_row(tile, first_row() + 24) - few.weight_row(tile, first_row() + 8) == next
                        ? next * few.chunks * 16 : 0;
            scales = (const char*)few.matrix(expert, of_scales).scale +
                     (few.weight_row(tile, of_scales) * few.chunks + first) * sizeof(Scale);
        }
        __device__ void skip(int chunks) {
#pragma unroll
            for (int i = 0; i < kPointers; i++) codes[i] += chunks * 16;
            scales += chunks * (int)sizeof(Scale);
        }
        __device__ void next(const Few& few) {
            if (++slice < few.slices) return skip(kSlice);
            slice = 0, tile++;
            if (--left <= 0) {
                own = 0;
                return;
            }
            if ((tile + 1) * kOutputs <= few.rows)  // no row is beyond the last
                return skip(kOutputs * few.chunks - kSlice * (few.slices - 1));
            if (tile == few.tiles) tile = 0, expert = few.m.work_of(++piece).expert;
            find(few);
        }
    };

    // Of a row, as far as this warp has a chunk of them for unit `of`.
    __device__ int slices_of(int of) const {
        return (chunks - across() * kUnits - of + kSlice - 1) / kSlice;
    }

    __device__ void copy(Ahead& ahead, Stage<Policy>& to) const {
        const bool valid = ahead.slice < ahead.own;
        const uint32_t four_rows = 4 * 16 * chunks;
        uint4* const mine = &to.codes[Ahead::row()][to.unit_of(Ahead::row(), Ahead::unit())];
#pragma unroll
        for (int i = 0; i < 2 * kGroups; i++) {
            const char* from = ahead.codes[i % kPointers] + (i < kPointers ? 0 : ahead.apart);
            copy_async(mine + 8 * i * kUnits, from, valid);
            copy_async(mine + (8 * i + 4) * kUnits, from + four_rows, valid);
        }
        if constexpr (kRowScales<Policy>)
            copy_small<kUnits * sizeof(Scale)>(to.scales[threadIdx.x % 32], ahead.scales,
                                               valid && scales_staged());
        ahead.next(*this);
        copy_commit();
    }

    // ---- the multiplying warps: activations

    __device__ static void meet() { named_barrier(kMeeting, kMultipliers * 32); }

    __device__ const bf16* activations(const Work& work, int t) const {
        int pair = m.pair(work.first + t);
        return kGated ? m.x_of(pair) : m.hidden_of(pair);
    }

    // Where vector v of a chunk of pair t lies: beside those that a warp reads with it.
    __device__ int place_of_x(bool split, int chunk, int v, int t) const {
        return (chunk / 4 * kVectors + v) * (split ? kSplitLanes : lanes) + t * 4 + chunk % 4;
    }
    // Zeros for a thread that has no pair of a split product, in other banks than what its neighbours read.
    __device__ const uint4* zeros_of() const { return zeros + (group() / 2 + 1) % 4; }

    // Activation rows of a piece, zeros behind the last column of each.
    __device__ void stage_x(const Work& work, uint32_t (&peaks)[kFewPairs]) const {
        const int total = work.count * x_blocks();
        uint4 v[kAtOnce];
        load_x(work, 0, v);
        meet();  // what lies there is no longer used
        if (split(work) && threadIdx.x < kSteps * kVectors * kSplitLanes)
            zeros[threadIdx.x] = make_uint4(0, 0, 0, 0);
        if (halves(work)) {
            if (threadIdx.x < kFewPairs) peaks[threadIdx.x] = 0;
            meet();
            for (int first = 0; first < total; first += kAtOnce * kMultipliers) {
                if (first > 0) load_x(work, first, v);
                raise_peaks(work, first, v, peaks);
            }
            meet();
            if (total > kAtOnce * kMultipliers) load_x(work, 0, v);
        }
        for (int first = 0; first < total; first += kAtOnce * kMultipliers) {
            if (first > 0) load_x(work, first, v);
            store_x(work, first, v, peaks);
        }
        meet();
    }

    // Activations go in blocks of 16 bytes a thread of a warp: `first` and on, several under way at once.
    __device__ int x_units() const { return steps_of(chunks) * 4 * kVectors; }
    __device__ int x_blocks() const { return (x_units() + 31) / 32; }  // of a pair

    __device__ void load_x(const Work& work, int first, uint4 (&v)[kAtOnce]) const {
#pragma unroll
        for (int j = 0; j < kAtOnce; j++) {
            const int block = first + j * kMultipliers + warp(), t = block / x_blocks();
            const int u = block % x_blocks() * 32 + threadIdx.x % 32;
            v[j] = make_uint4(0, 0, 0, 0);
            if (t < work.count && u < chunks * kVectors)
                v[j] = *(const uint4*)(activations(work, t) + u * 8);
        }
    }

    __device__ void raise_peaks(const Work& work, int first, const uint4 (&v)[kAtOnce],
                                uint32_t (&peaks)[kFewPairs]) const {
#pragma unroll
        for (int j = 0; j < kAtOnce; j++) {
            const int t = (first + j * kMultipliers + warp()) / x_blocks();
            const uint32_t most = __reduce_max_sync(~0u, largest_of(v[j]));
            if (t < work.count && threadIdx.x % 32 == 0) atomicMax(&peaks[t], most);
        }
    }

    __device__ void store_x(const Work& work, int first, const uint4 (&v)[kAtOnce],
                            const uint32_t (&peaks)[kFewPairs]) const {
#pragma unroll
        for (int j = 0; j < kAtOnce; j++) {
            const int block = first + j * kMultipliers + warp(), t = block / x_blocks();
            const int u = block % x_blocks() * 32 + threadIdx.x % 32;
            if (t < work.count && u < x_units())
                x[place_of_x(split(work), u / kVectors, u % kVectors, t)] =
                    FewProducts<Policy>::operand_order(halves(work), v[j], peaks[t]);
        }
    }

    // ---- the multiplying warps: products

    __device__ void multiply() const {
        uint32_t turn = 0;
        Ahead ahead(*this);
        copy(ahead, stage_of(turn));
        if (!kGated) wait_for_previous();
        Work work;
        int number = 0, known = -1, pieces = 0;
        for_each_item([&](int piece, int tile) {
            if (piece != known) {
                work = m.work_of(piece), known = piece;
                stage_x(work, s.peaks[pieces++ % kPeaks]);
            }
            if constexpr (kMostSplit<Policy> > 0)
                if (split(work)) return multiply_item<true>(ahead, turn, tile, number++, work);
            multiply_item<false>(ahead, turn, tile, number++, work);
        });
        copy_wait<0>();
    }

    __device__ Stage<Policy>& stage_of(uint32_t turn) const {
        return *(Stage<Policy>*)buffers.ring[warp()][turn % kDepth];
    }

    template <bool kSplit>
    __device__ void multiply_item(Ahead& ahead, uint32_t& turn, int tile, int number,
                                  const Work& work) const {
        const int present = slices_of(0);
        const int apart = kSplit ? kSplitLanes : lanes, stride = kAcross * kSteps * kVectors * apart;
        // Columns of a product that is not split do not touch each other: those behind the last pair may
        // hold anything.
        const int t = kSplit ? group() % 2 : min(group(), work.count - 1);
        const bool has = !kSplit || (group() / 2 == member() && t < work.count);
        const uint4* from = has ? x + place_of_x(kSplit, across() * kUnits + member(), 0, t) : zeros_of();
        float sum[kGroups][4] = {};
        BlockScales known;
        known.load(*this, tile, work, 0);
        for (int slice = 0; slice < slices; slice++) {
            const BlockScales now = known;
            if (slice + 1 < slices) known.load(*this, tile, work, slice + 1);
            copy_wait<kDepth - 2>();
            __syncwarp();
            copy(ahead, stage_of(turn + 1));
            if (slice < present)
#pragma unroll
                for (int step = 0; step < kSteps; step++)
                    multiply_step<kSplit>(stage_of(turn), now, slice, step, tile, work,
                                          from + step * kVectors * apart, sum);
            from += has ? stride : 0;
            turn++;
        }
        keep_sums<kSplit>(sum, number, work.count);
    }

    // Where a tile's rows of one matrix have one scale: those of a stage, read while the stage before is
    // multiplied.
    struct BlockScales {
        Scale of[kGated ? 2 : 1];
        __device__ void load(const Few& few, int tile, const Work& work, int slice) {
            if constexpr (Policy::kBlockScale)
#pragma unroll
                for (int i = 0; i < (kGated ? 2 : 1); i++)
                    of[i] = few.scale_of(few.matrix(work.expert, 8 * i),
                                         few.weight_row(tile, first_row() + group() + 8 * i), slice, 0);
        }
    };

    template <bool kSplit>
    __device__ void multiply_step(const Stage<Policy>& stage, const BlockScales& block, int slice, int step,
                                  int tile, const Work& work, const uint4* from,
                                  float (&sum)[kGroups][4]) const {
        const int unit = step * 4 + member();
        Scale scales[kGroups][2];
        if constexpr (Policy::kBlockScale)
#pragma unroll
            for (int i = 0; i < 2 * kGroups; i++) scales[i / 2][i % 2] = block.of[kGated ? i % 2 : 0];
        else if (scales_staged())
#pragma unroll
            for (int i = 0; i < 2 * kGroups; i++)
                scales[i / 2][i % 2] = stage.scales[group() + 8 * i][unit];
        else
#pragma unroll
            for (int i = 0; i < 2 * kGroups; i++)
                scales[i / 2][i % 2] =
                    scale_of(matrix(work.expert, 8 * i),
                             weight_row(tile, first_row() + group() + 8 * i), slice, step);
        uint4 b[kVectors];
#pragma unroll
        for (int v = 0; v < kVectors; v++) b[v] = from[v * (kSplit ? kSplitLanes : lanes)];
#pragma unroll
        for (int q = 0; q < kGroups; q++) {
            const uint4* row = &stage.codes[16 * q + group()][stage.unit_of(group(), unit)];
            const uint4 codes[2] = {row[0], row[8 * kUnits]};
            FewProducts<Policy>::template multiply<kSplit>(codes, scales[q], b, sum[q]);
        }
    }

    __device__ Scale scale_of(const dsv4_weight& w, int64_t row, int slice, int step) const {
        const int chunk = slice * kSlice + across() * kUnits + step * 4 + member();
        if (chunk >= chunks && !Policy::kBlockScale) return Scale{};
        return Policy::load_scale(Policy::scale_row(w, row), chunk < chunks ? chunk : chunks - 1);
    }

    // Leaves a warp's sums with the finishers.
    template <bool kSplit>
    __device__ void keep_sums(const float (&sum)[kGroups][4], int number, int count) const {
        barrier_wait(&s.taken, number % 2 ^ 1);
        float* to = &buffers.sums[warp()][2 * member()][group()];
#pragma unroll
        for (int p = 0; p < 2; p++)
            if (kSplit ? p < count : 2 * member() + p < count)
#pragma unroll
                for (int i = 0; i < 2 * kGroups; i++)
                    to[p * kSumStride + 8 * i] = sum[i / 2][i % 2 * 2 + p];
        barrier_arrive(&s.summed);
    }

    // ---- the finishing warps

    __device__ void finish() const {
        Work work;
        int number = 0, known = -1, pieces = 0;
        for_each_item([&](int piece, int tile) {
            if (piece != known) work = m.work_of(piece), known = piece, pieces++;
            const uint32_t(&peaks)[kFewPairs] = s.peaks[(pieces - 1) % kPeaks];
            barrier_wait(&s.summed, number++ % 2);
            for (int i = threadIdx.x - kMultipliers * 32; i < kOutputs * work.count; i += kFinishers * 32) {
                int64_t row = tile * kOutputs + i % kOutputs;
                if (row < rows) finish_value(work, row, i % kOutputs, i / kOutputs, peaks);
            }
            barrier_arrive(&s.taken);
        });
    }

    // Of row `row` of a tile and a pair: all warps' sums, but for the global scale.
    __device__ float total(const Work& work, int pair, int row,
                           const uint32_t (&peaks)[kFewPairs]) const {
        float total = 0;
        const float* from =
            &buffers.sums[row / kFewRows * kAcross][pair][row % kFewRows];
        if (split(work)) {
#pragma unroll 4
            for (int w = 0; w < kAcross; w++)
#pragma unroll
                for (int member = 0; member < 4; member++)
                    total += from[(kColumns * w + 2 * member) * kSumStride];
        } else {
#pragma unroll
            for (int w = 0; w < kAcross; w++) total += from[kColumns * w * kSumStride];
        }
        if (!halves(work)) return total * Policy::kFactor;
        return RowScale::undo(total, RowScale::exponent_of(peaks[pair])) * HalfFp4::kFactor;
    }

    __device__ void finish_value(const Work& work, int64_t row, int at, int which,
                                 const uint32_t (&peaks)[kFewPairs]) const {
        const int64_t pair = m.pair(work.first + which);
        const Expert& e = m.table[work.expert];
        if constexpr (kGated) {
            const int gate = at / 8 * 16 + at % 8;
            const float g = rounded(total(work, which, gate, peaks) * e.w1.global_scale);
            const float u = rounded(total(work, which, gate + 8, peaks) * e.w3.global_scale);
            m.hidden[pair * rows + row] = __float2bfloat16_rn(swiglu(g, u, m.limit) * m.weight_of(pair));
        } else {
            m.partial[pair * rows + row] = total(work, which, at, peaks) * e.w2.global_scale;
        }
    }
};

template <class Policy, Product kProduct, int kAcross>
__global__ void __launch_bounds__(kFewThreads, 1) few_kernel(const __grid_constant__ Moe m) {
    extern __shared__ __align__(128) char memory[];
    __shared__ FewShared s;
    if (threadIdx.x == 0) {
        barrier_init(&s.summed, kMultipliers * 32);
        barrier_init(&s.taken, kFinishers * 32);
        fence_barrier_init();
    }
    // The second product may start only once the first one has waited: ids and list are complete by then,
    // and the weights are copied before the hidden vectors are there.
    if (kProduct == Product::kHidden) wait_for_previous();
    __syncthreads();
    let_next_start();
    const Few<Policy, kProduct, kAcross> product(m, s, memory);
    const int warp = threadIdx.x / 32;
    if (warp < kMultipliers) {
        more_registers<104>();
        product.multiply();
    } else {
        fewer_registers<64>();
        wait_for_previous();
        product.finish();
    }
}

// The most pairs of a piece, as fit in shared memory; 0: none do.
template <class Policy> int few_size(Moe m) {
    constexpr int64_t kRoom = 227 * 1024 - sizeof(FewShared);
    if (m.d >= 1 << 20 || m.inner >= 1 << 20) return 0;
    for (m.most = m.n == 1 ? 1 : kFewPairs; m.most > 0; m.most /= 2)
        if (Few<Policy, Product::kHidden, kMultipliers>::bytes(m) <= kRoom &&
            Few<Policy, Product::kDown, kMultipliers>::bytes(m) <= kRoom)
            break;
    return m.most;
}

template <class Policy, Product kProduct, int kAcross>
int launch_few(const Moe& m, int blocks, void* stream) {
    const auto kernel = few_kernel<Policy, kProduct, kAcross>;
    const int64_t bytes = Few<Policy, kProduct, kAcross>::bytes(m);
    const int status = allow_shared(kernel, bytes);
    return status == cudaSuccess ? launch(kernel, blocks, kFewThreads, bytes, stream, m) : status;
}

// Both products; m.most is few_size(m). A tile of the shared expert has the fewest rows: there are few.
template <class Policy, int kAcross> int few_products(const Moe& m, int blocks, void* stream) {
    const int status = launch_few<Policy, Product::kHidden, kAcross>(m, blocks, stream);
    return status == cudaSuccess ? launch_few<Policy, Product::kDown, kAcross>(m, blocks, stream) : status;
}

}  // namespace dsv4
