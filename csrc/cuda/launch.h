// What the host decides before a tile kernel starts: whether the tensors fit, how a row is cut into vectors, how many
// threads work on it. Plain C++, without CUDA and without torch, so that it is tested where there is no GPU.
//
// Letters: T rows (tokens) of a tile, N columns, K candidates. Per-token state: [T, 1], at any distance between rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <type_traits>

#include "online_softmax.h"
#include "portable.h"

namespace fastd2o::cuda {

enum class Dtype : int32_t { kFloat32, kBFloat16, kFloat16, kInt64, kOther };

inline int64_t bytes_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32: return 4;
    case Dtype::kBFloat16:
    case Dtype::kFloat16: return 2;
    default: return 8;
  }
}

inline const char* name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32: return "float32";
    case Dtype::kBFloat16: return "bfloat16";
    case Dtype::kFloat16: return "float16";
    case Dtype::kInt64: return "int64";
    default: return "another dtype";
  }
}

// What the host knows of a tensor; size and stride are those of at most two dimensions.
struct TensorView {
  void* data;
  Dtype dtype;
  int32_t device;  // of CUDA; -1 for any other
  int32_t dim;
  int64_t size[2];
  int64_t stride[2];
};

using OptionalView = std::optional<TensorView>;

// ---- what the kernels receive ---------------------------------------------------------------------------------------

// A [T, 1] column of per-token state.
template <typename T>
struct Column {
  T* data;
  int64_t stride;
  FASTD2O_HD T& operator[](int64_t row) const { return data[row * stride]; }
};

// A tile whose rows are contiguous. Its kernels move `vector` elements at a time, from the boundaries of 16 bytes of
// the logits: the first element of row r lies (phase + r * stride) mod vector elements behind such a boundary.
struct Tile {
  void* data;
  Dtype dtype;
  int64_t stride;
  uint32_t phase;
};

// `whole`: vectors of the tile that is written lie at the same boundaries as those that are read, and are stored whole.
struct FoldArguments {
  Tile logits;
  int64_t tokens;
  int32_t columns;
  Column<const int64_t> target;
  int64_t vocab_start;
  LogitTransform transform;
  Column<float> max, sum, target_logit, rescale;
  Column<float> weighted, total;  // null without statistics
  Column<int64_t> argmax;
  Tile weights;  // null if not asked for
  bool whole;
};

struct GradArguments {
  Tile out;
  Tile logits;
  int64_t tokens;
  int32_t columns;
  Column<const int64_t> target;
  int64_t vocab_start;
  LogitTransform transform;
  Column<const float> lse_others, coef;
  bool whole;
};

struct TopKArguments {
  Tile logits;
  int64_t tokens;
  int32_t columns;
  Column<const int64_t> target;
  int64_t vocab_start;
  LogitTransform transform;
  float* values;
  int64_t* index;
  int32_t k;
};

struct DrawArguments {
  const float* values;
  const int64_t* index;
  Column<const int64_t> counter;
  uint64_t seed;
  int64_t tokens;
  int32_t k;
  int64_t* positive;
  float* positive_logit;
};

// Blocks of `row_threads` x `rows` threads: several rows have a warp each, a single row may have many.
struct Grid {
  uint32_t blocks;
  uint32_t row_threads;
  uint32_t rows;
};

template <typename Arguments>
struct Launch {
  Grid grid;
  Arguments arguments;
};

// ---- how rows are cut and shared out --------------------------------------------------------------------------------

constexpr int kWarp = 32;
constexpr int kRowsPerBlock = 4;      // where a warp serves a row
constexpr int kThreadLogits = 16;     // that a thread holds in registers: 4 vectors of float32, 2 of 16 bits
constexpr int kMaxRowWarps = 32;      // of a block: rows up to 16384 columns fit its registers
constexpr int kMaxTopKWarps = 8;
constexpr int kMaxCandidates = 64;    // two for each lane of a warp
constexpr int64_t kBusyWarps = 4096;  // that keep a GPU busy: 31 for each of 132 multiprocessors
constexpr int64_t kMaxTokens = INT32_MAX;
constexpr int64_t kMaxColumns = int64_t{1} << 30;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements of 16 bytes of logits.
inline int64_t vector_of(Dtype logits) { return 16 / bytes_of(logits); }

inline Tile tile_of(const TensorView& view, int64_t vector) {
  const auto address = reinterpret_cast<uintptr_t>(view.data);
  const auto phase = static_cast<uint32_t>(address / bytes_of(view.dtype) % vector);
  // The stride of a single row is of no consequence and may be anything.
  return {view.data, view.dtype, view.size[0] > 1 ? view.stride[0] : 0, phase};
}

inline bool same_boundaries(const Tile& a, const Tile& b, int64_t vector) {
  return a.phase == b.phase && (a.stride - b.stride) % vector == 0;
}

// Columns that a row's vectors cover, those before its first and after its last element counted.
inline int64_t covered_columns(const Tile& logits, int64_t columns, int64_t vector) {
  const bool aligned = logits.phase == 0 && logits.stride % vector == 0;
  return aligned ? columns : columns + vector - 1;
}

inline Grid grid_of(int64_t tokens, int64_t row_warps) {
  const int64_t rows = row_warps == 1 ? kRowsPerBlock : 1;
  return {static_cast<uint32_t>(ceil_div(tokens, rows)), static_cast<uint32_t>(row_warps * kWarp),
          static_cast<uint32_t>(rows)};
}

// Warps that hold a row in registers.
inline int64_t warps_of_row(const Tile& logits, int64_t columns) {
  return ceil_div(covered_columns(logits, columns, vector_of(logits.dtype)), kThreadLogits * kWarp);
}

// As many warps for a row as hold it, if a block has that many.
inline Grid resident_grid(const Tile& logits, int64_t tokens, int64_t columns) {
  return grid_of(tokens, std::clamp<int64_t>(warps_of_row(logits, columns), 1, kMaxRowWarps));
}

// One warp for a row; more only where rows are too few to fill a GPU and long enough to be shared.
inline Grid busy_grid(const Tile& logits, int64_t tokens, int64_t columns, int64_t max_warps) {
  const int64_t useful = std::clamp<int64_t>(warps_of_row(logits, columns), 1, max_warps);
  return grid_of(tokens, std::clamp<int64_t>(kBusyWarps / std::max<int64_t>(tokens, 1), 1, useful));
}

// The kernel for the dtype of a tile of logits.
template <typename Kernel>
Kernel* of_dtype(Dtype dtype, Kernel* float32, Kernel* bfloat16, Kernel* float16) {
  return dtype == Dtype::kFloat32 ? float32 : dtype == Dtype::kBFloat16 ? bfloat16 : float16;
}

// ---- checks ---------------------------------------------------------------------------------------------------------

template <typename... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A tensor's shape, put into words only if somebody reads them.
struct Shape {
  const TensorView& of;
};

inline std::ostream& operator<<(std::ostream& text, const Shape& shape) {
  if (shape.of.dim != 2) return text << shape.of.dim << " dimensions";
  return text << "shape [" << shape.of.size[0] << ", " << shape.of.size[1] << "]";
}

// The checks of one operator's tensors against its tile of logits, or whatever comes first.
class Door {
 public:
  Door(const char* op, const TensorView& first)
      : op_(op), device_(first.device), tokens_(first.size[0]), columns_(first.size[1]) {}

  // A matrix with contiguous rows, of a dtype that the kernels know.
  void tile(const char* name, const TensorView& view, bool written) const {
    placed(name, view);
    require(view.dim == 2 && view.size[0] == tokens_ && view.size[1] == columns_, op_, ": ", name, " has ",
            Shape{view}, ", expected a tile [", tokens_, ", ", columns_, "]");
    require(view.dtype == Dtype::kFloat32 || view.dtype == Dtype::kBFloat16 || view.dtype == Dtype::kFloat16, op_, ": ",
            name, " is ", name_of(view.dtype),
            ", the kernels take float32, bfloat16 and float16. Fix: backend=\"torch\"");
    require(tokens_ <= kMaxTokens && columns_ <= kMaxColumns, op_, ": a tile of ", Shape{view}, " is more than the ",
            kMaxTokens, " rows or ", kMaxColumns, " columns that the kernels take. Fix: smaller tiles");
    require(columns_ <= 1 || view.stride[1] == 1, op_, ": the rows of ", name, " are not contiguous (stride ",
            view.stride[1], "). Fix: .contiguous()");
    require(!written || tokens_ <= 1 || view.stride[0] >= columns_, op_, ": the rows of ", name, " overlap (stride ",
            view.stride[0], " for ", columns_, " columns), and are written. Fix: memory of its own for each row");
    require(reinterpret_cast<uintptr_t>(view.data) % bytes_of(view.dtype) == 0, op_, ": ", name,
            " lies at an address that is no multiple of its elements' size. Fix: .clone()");
  }

  // A tile that is written may be the tile that is read, element by element.
  void alias(const char* name, const TensorView& written, const TensorView& read) const {
    const bool same = written.dtype == read.dtype && (tokens_ <= 1 || written.stride[0] == read.stride[0]);
    require(written.data != read.data || same || tokens_ * columns_ == 0, op_, ": ", name,
            " shares memory with logits but has another dtype or row stride. Fix: the same tensor, or memory apart");
  }

  // A [T, 1] column.
  template <typename T>
  Column<T> column(const char* name, const TensorView& view) const {
    constexpr Dtype dtype = std::is_same_v<std::remove_const_t<T>, float> ? Dtype::kFloat32 : Dtype::kInt64;
    placed(name, view);
    require(view.dim == 2 && view.size[0] == tokens_ && view.size[1] == 1, op_, ": ", name, " has ", Shape{view},
            ", expected a column [", tokens_, ", 1]");
    require(view.dtype == dtype, op_, ": ", name, " is ", name_of(view.dtype), ", expected ", name_of(dtype));
    require(std::is_const_v<T> || tokens_ <= 1 || view.stride[0] != 0, op_, ": the rows of ", name,
            " are one and the same (stride 0), and are written. Fix: memory of its own for each row");
    return {static_cast<T*>(view.data), view.stride[0]};
  }

  // K candidates of every token, K at most 64.
  template <typename T>
  T* candidates(const char* name, const TensorView& view, int64_t k) const {
    constexpr Dtype dtype = std::is_same_v<std::remove_const_t<T>, float> ? Dtype::kFloat32 : Dtype::kInt64;
    placed(name, view);
    require(view.dim == 2 && view.size[0] == tokens_ && view.size[1] == k, op_, ": ", name, " has ", Shape{view},
            ", expected [", tokens_, ", ", k, "]");
    require(1 <= k && k <= kMaxCandidates, op_, ": k=", k, ", the kernels take 1 to ", kMaxCandidates,
            ". Fix: a smaller k, or backend=\"torch\"");
    require(view.dtype == dtype, op_, ": ", name, " is ", name_of(view.dtype), ", expected ", name_of(dtype));
    require((k == 1 || view.stride[1] == 1) && (tokens_ <= 1 || view.stride[0] == k), op_, ": ", name,
            " is not contiguous. Fix: .contiguous()");
    return static_cast<T*>(view.data);
  }

  void vocab_start(int64_t start) const {
    require(start >= 0 && start <= UINT32_MAX - columns_, op_, ": vocab_start=", start, " with ", columns_,
            " columns, expected columns in [0, 2^32)");
  }

  void placed(const char* name, const TensorView& view) const {
    require(view.device >= 0, op_, ": ", name, " is not on a CUDA device");
    require(view.device == device_, op_, ": ", name, " is on cuda:", view.device,
            ", but the first tensor is on cuda:", device_);
  }

 private:
  const char* op_;
  int32_t device_;
  int64_t tokens_;
  int64_t columns_;
};

// ---- one function for each operator ---------------------------------------------------------------------------------

struct FoldTensors {
  TensorView logits, target, max, sum, target_logit, rescale;
  OptionalView weights, weighted, argmax, total;
};

inline Launch<FoldArguments> plan_fold(const FoldTensors& t, int64_t vocab_start, const LogitTransform& transform) {
  const Door door("fold_", t.logits);
  door.tile("logits", t.logits, false);
  door.vocab_start(vocab_start);
  const int64_t tokens = t.logits.size[0], columns = t.logits.size[1], vector = vector_of(t.logits.dtype);
  FoldArguments a{};
  a.logits = tile_of(t.logits, vector);
  a.tokens = tokens;
  a.columns = static_cast<int32_t>(columns);
  a.target = door.column<const int64_t>("target", t.target);
  a.vocab_start = vocab_start;
  a.transform = transform;
  a.max = door.column<float>("max", t.max);
  a.sum = door.column<float>("sum", t.sum);
  a.target_logit = door.column<float>("target_logit", t.target_logit);
  a.rescale = door.column<float>("rescale", t.rescale);
  require(t.weighted.has_value() == t.argmax.has_value() && t.weighted.has_value() == t.total.has_value(),
          "fold_: weighted, argmax and total come together or not at all");
  if (t.weighted) {
    a.weighted = door.column<float>("weighted", *t.weighted);
    a.argmax = door.column<int64_t>("argmax", *t.argmax);
    a.total = door.column<float>("total", *t.total);
  }
  if (t.weights) {
    door.tile("weights", *t.weights, true);
    door.alias("weights", *t.weights, t.logits);
    a.weights = tile_of(*t.weights, vector);
    a.whole = same_boundaries(a.logits, a.weights, vector);
  }
  const Grid grid = t.weights ? resident_grid(a.logits, tokens, columns)
                              : busy_grid(a.logits, tokens, columns, kMaxRowWarps);
  return {grid, a};
}

struct GradTensors {
  TensorView out, logits, target, lse_others, coef;
};

inline Launch<GradArguments> plan_grad(const GradTensors& t, int64_t vocab_start, const LogitTransform& transform) {
  const Door door("grad_", t.logits);
  door.tile("logits", t.logits, false);
  door.tile("out", t.out, true);
  door.alias("out", t.out, t.logits);
  door.vocab_start(vocab_start);
  const int64_t tokens = t.logits.size[0], columns = t.logits.size[1], vector = vector_of(t.logits.dtype);
  GradArguments a{};
  a.out = tile_of(t.out, vector);
  a.logits = tile_of(t.logits, vector);
  a.tokens = tokens;
  a.columns = static_cast<int32_t>(columns);
  a.target = door.column<const int64_t>("target", t.target);
  a.vocab_start = vocab_start;
  a.transform = transform;
  a.lse_others = door.column<const float>("lse_others", t.lse_others);
  a.coef = door.column<const float>("coef", t.coef);
  a.whole = same_boundaries(a.logits, a.out, vector);
  return {busy_grid(a.logits, columns == 0 ? 0 : tokens, columns, kMaxRowWarps), a};
}

struct TopKTensors {
  TensorView logits, target, values, index;
};

inline Launch<TopKArguments> plan_topk(const TopKTensors& t, int64_t vocab_start, const LogitTransform& transform) {
  const Door door("topk_", t.logits);
  door.tile("logits", t.logits, false);
  door.vocab_start(vocab_start);
  const int64_t tokens = t.logits.size[0], columns = t.logits.size[1], k = t.values.size[1];
  TopKArguments a{};
  a.logits = tile_of(t.logits, vector_of(t.logits.dtype));
  a.tokens = tokens;
  a.columns = static_cast<int32_t>(columns);
  a.target = door.column<const int64_t>("target", t.target);
  a.vocab_start = vocab_start;
  a.transform = transform;
  a.values = door.candidates<float>("values", t.values, k);
  a.index = door.candidates<int64_t>("index", t.index, k);
  a.k = static_cast<int32_t>(k);
  return {busy_grid(a.logits, columns == 0 ? 0 : tokens, columns, kMaxTopKWarps), a};
}

struct DrawTensors {
  TensorView values, index, counter;
};

// The results, [T] each, are not known yet: the caller allocates them and completes the arguments.
inline Launch<DrawArguments> plan_draw(const DrawTensors& t, int64_t seed) {
  const Door door("draw", t.values);
  const int64_t tokens = t.values.size[0], k = t.values.size[1];
  DrawArguments a{};
  a.values = door.candidates<const float>("values", t.values, k);
  a.index = door.candidates<const int64_t>("index", t.index, k);
  door.placed("counter", t.counter);
  require(t.counter.dim == 1 && t.counter.size[0] == tokens && t.counter.dtype == Dtype::kInt64,
          "draw: counter is expected as int64 [", tokens, "], one for each row of values");
  require(tokens <= kMaxTokens, "draw: ", tokens, " rows are more than the ", kMaxTokens, " that the kernel takes");
  a.counter = {static_cast<const int64_t*>(t.counter.data), t.counter.stride[0]};
  a.seed = static_cast<uint64_t>(seed);
  a.tokens = tokens;
  a.k = static_cast<int32_t>(k);
  return {grid_of(tokens, 1), a};
}

}  // namespace fastd2o::cuda
