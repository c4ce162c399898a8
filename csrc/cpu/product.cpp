// out [M, N] float32 (+)= left [M, K] @ right [K, N] (+ bias [N]): the matrix product whose sums, and result, stay float32.
//
// torch.mm rounds a bfloat16 product to bfloat16, which costs a logit of 30 up to 0.06. Here every product of two factors is
// added in float32 and stays there. left and right are matrices of any strides, of one dtype: float32, bfloat16 or float16.
//
// Work: 2 M N K operations. Bytes: right is read once and written once, packed, then read from cache M / 128 times.
//
// How: right is packed into panels of 64 columns, 4 MB of them at a time; out is cut into blocks of 128 rows; a block times a panel is one call of
// oneDNN's brgemm, as ATen exports it, which is what picks AMX, AVX512-BF16 or AVX2 instructions. bfloat16 (float16, where
// the machine multiplies it) goes in as it is; a machine that cannot is given float32 copies of the panels, made while packing,
// so that the arithmetic is the same to a float32's rounding. Without AVX2 a loop of at::vec does the multiplication.
//
// An element of out is summed by one thread in an order that depends on K alone: the same bits with any number of threads.
//
// Plain ABI: at::native::cpublas::brgemm and at::vec are not part of LibTorch's stable one.
//
// Measured on an AMD EPYC (Zen 4, 2 cores), M 2048, N 2048, K 1024: bfloat16 420 GFLOP/s (torch.mm: 420), float32 205
// (torch.mm: 185). Rows 32 to 256 and panels 32 to 256 columns differ by less than 10 %.
#include <ATen/Context.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <type_traits>

#include "cpu/tensors.h"

namespace fastd2o {
namespace {

using at::BFloat16;
using at::Half;

constexpr int64_t kPanel = 64;    // columns of a panel of right
constexpr int64_t kRows = 128;    // rows of a block of out
constexpr int64_t kStep = 32;     // packed matrices are padded with zeros to a multiple of this many terms

constexpr int64_t kFewRows = 512;  // of left: up to there it is cheaper to turn out's blocks than to pack right
constexpr int64_t kPackedBytes = 4 << 20;  // of panels packed at a time: they shall stay in the last-level cache

// Elements from row to row up to which brgemm reads and writes a matrix in place: it counts the bytes of a block in 32 bits.
constexpr int64_t kFar = (int64_t{1} << 31) / (kRows * sizeof(float));

// Terms added in one call, one after the other in a register. A panel of 16-bit factors, 128 KB, stays in the second-level
// cache; such sums are more precise than their terms by far. Sums of float32 factors are not, and are kept short. Log p's
// error against that of torch.mm, and the product's time, at K 1024 to 2048: 0.9 and 0.88 with 128 terms, 1.15 and 0.9 with
// 256, 2.5 and 0.82 with 1024.
template <typename Factor>
constexpr int64_t kDepth = sizeof(Factor) == 2 ? 1024 : 128;

// brgemm takes 16-bit panels with consecutive terms of a sum side by side.
template <typename Factor>
constexpr int64_t kPair = sizeof(Factor) == 2 ? 2 : 1;

int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

template <typename T>
struct Matrix {
  const T* data;
  int64_t rows, columns, row_stride, column_stride;

  const T* at(int64_t row, int64_t column) const {
    return data + row * row_stride + column * column_stride;
  }
};

template <typename T>
Matrix<T> matrix(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.size(0), tensor.size(1), tensor.stride(0), tensor.stride(1)};
}

// Whether brgemm multiplies this type here: ATen knows, and says so by throwing.
template <typename Factor>
bool brgemm_serves() {
#if defined(CPU_CAPABILITY_AVX512) || (defined(CPU_CAPABILITY_AVX2))
#if !defined(CPU_CAPABILITY_AVX512)
  if (sizeof(Factor) == 2) return false;
#endif
  if (!at::globalContext().userEnabledMkldnn()) return false;  // torch.backends.mkldnn.flags, which may change
  static const bool serves = [] {
    alignas(64) Factor left[kStep], right[kStep * kPanel];
    alignas(64) float out[kPanel];
    std::fill(left, left + kStep, Factor(1));
    std::fill(right, right + kStep * kPanel, Factor(1));
    try {
      at::native::cpublas::brgemm(1, kPanel, kStep, kStep, kPanel, kPanel, false, left, right, out, kPair<Factor> == 2);
      at::native::cpublas::brgemm_release(kPair<Factor> == 2);
    } catch (const std::exception&) {
      return false;
    }
    return out[0] == kStep && out[kPanel - 1] == kStep;
  }();
  return serves;
#else
  return false;
#endif
}

// A block of `rows` x `columns`, converted to Factor, in a tile of zeros that the caller owns: what packing works on where a
// block is not whole, is not contiguous either way, or has another dtype. `transposed`: tile[column][row].
template <typename Factor, typename T>
void stage(const Matrix<T>& source, int64_t row, int64_t column, int64_t rows, int64_t columns, bool transposed, Factor* tile,
           int64_t tile_rows, int64_t tile_columns) {
  std::memset(static_cast<void*>(tile), 0, tile_rows * tile_columns * sizeof(Factor));
  const int64_t outer = transposed ? columns : rows, inner = transposed ? rows : columns;
  const int64_t outer_stride = transposed ? source.column_stride : source.row_stride;
  const int64_t inner_stride = transposed ? source.row_stride : source.column_stride;
  const int64_t tile_stride = transposed ? tile_rows : tile_columns;
  for (int64_t i = 0; i < outer; i++) {
    const T* from = source.at(row, column) + i * outer_stride;
    Factor* to = tile + i * tile_stride;
    if (inner_stride == 1) {
      at::vec::convert(from, to, inner);
    } else {
      for (int64_t j = 0; j < inner; j++) to[j] = static_cast<Factor>(static_cast<float>(from[j * inner_stride]));
    }
  }
}

// Transpose a block of `rows` x `columns`, both multiples of 16, by the widest registers there are.
template <typename T>
void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows, int64_t columns) {
  constexpr int kBlock = sizeof(T) == 2 ? 16 : at::vec::Vectorized<float>::size();
  for (int64_t i = 0; i < rows; i += kBlock) {
    for (int64_t j = 0; j < columns; j += kBlock) {
      at::vec::transpose_mxn<T, kBlock, kBlock>(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
    }
  }
}

// kStep terms of a panel: packed[term / pair][column][term % pair], zeros where right has ended.
template <typename Factor, typename T>
void pack_right(const Matrix<T>& right, int64_t term, int64_t column, Factor* packed) {
  constexpr int64_t pair = kPair<Factor>;
  const int64_t terms = std::min(kStep, right.rows - term), columns = std::min(kPanel, right.columns - column);
  const bool by_column = right.column_stride != 1 || right.columns == 1;  // what is contiguous is one column's terms
  const int64_t stride = by_column ? right.column_stride : right.row_stride;
  alignas(64) Factor tile[kStep * kPanel];
  const Factor* from = tile;
  int64_t from_stride = by_column ? kStep : kPanel;
  const bool whole = terms == kStep && columns == kPanel && (!by_column || right.row_stride == 1) && stride % pair == 0;
  if (std::is_same_v<T, Factor> && whole) {
    from = reinterpret_cast<const Factor*>(right.at(term, column));
    from_stride = stride;
  } else {
    stage(right, term, column, terms, columns, by_column, tile, kStep, kPanel);
  }
  if (by_column) {
    // A pair travels as one 32-bit word; nothing looks into it.
    transpose(reinterpret_cast<const float*>(from), from_stride / pair, reinterpret_cast<float*>(packed), kPanel, kPanel,
              kStep / pair);
  } else if constexpr (pair == 1) {
    for (int64_t k = 0; k < kStep; k++) std::copy_n(from + k * from_stride, kPanel, packed + k * kPanel);
  } else {
    // As integers, which compilers turn into whole registers.
    uint32_t* const words = reinterpret_cast<uint32_t*>(packed);
    for (int64_t k = 0; k < kStep; k += 2) {
      const uint16_t* const low = reinterpret_cast<const uint16_t*>(from + k * from_stride);
      const uint16_t* const high = low + from_stride;
      for (int64_t n = 0; n < kPanel; n++) words[k / 2 * kPanel + n] = low[n] | static_cast<uint32_t>(high[n]) << 16;
    }
  }
}

// Rows of left, contiguous and padded: packed[row][term].
template <typename Factor, typename T>
void pack_left(const Matrix<T>& left, int64_t row, int64_t rows, int64_t term, int64_t terms, Factor* packed) {
  for (int64_t i = 0; i < rows; i += kStep) {
    for (int64_t k = 0; k < terms; k += kStep) {
      const int64_t tile_rows = std::min(kStep, rows - i), tile_terms = std::min(kStep, left.columns - term - k);
      Factor* to = packed + i * terms + k;
      const bool transposed = left.column_stride != 1;
      alignas(64) Factor tile[kStep * kStep], turned[kStep * kStep];
      const Factor* from = tile;
      int64_t from_stride = kStep;
      if (std::is_same_v<T, Factor> && transposed && left.row_stride == 1 && tile_rows == kStep && tile_terms == kStep) {
        from = reinterpret_cast<const Factor*>(left.at(row + i, term + k));
        from_stride = left.column_stride;
      } else {
        stage(left, row + i, term + k, tile_rows, tile_terms, transposed, tile, kStep, kStep);
      }
      if (transposed && tile_rows == kStep) {
        transpose(from, from_stride, to, terms, kStep, kStep);
        continue;
      }
      if (transposed) {
        transpose(from, from_stride, turned, kStep, kStep, kStep);
        from = turned;
      }
      for (int64_t r = 0; r < tile_rows; r++) std::copy_n(from + r * kStep, kStep, to + r * terms);
    }
  }
}

// What brgemm does, for the machines it does not serve.
void multiply_by_hand(int64_t rows, int64_t terms, const float* left, int64_t left_stride, const float* panel, float* out,
                      int64_t out_stride, bool accumulate) {
  using Vec = at::vec::Vectorized<float>;
  constexpr int64_t kVectors = kPanel / Vec::size();
  for (int64_t row = 0; row < rows; row++) {
    Vec sum[kVectors];
    for (int64_t v = 0; v < kVectors; v++) {
      sum[v] = accumulate ? Vec::loadu(out + row * out_stride + v * Vec::size()) : Vec(0.0f);
    }
    for (int64_t k = 0; k < terms; k++) {
      const Vec factor(left[row * left_stride + k]);
      for (int64_t v = 0; v < kVectors; v++) {
        sum[v] = at::vec::fmadd(factor, Vec::loadu(panel + k * kPanel + v * Vec::size()), sum[v]);
      }
    }
    for (int64_t v = 0; v < kVectors; v++) sum[v].store(out + row * out_stride + v * Vec::size());
  }
}

// out [rows, kPanel] += left [rows, terms] @ panel [terms, kPanel]. brgemm compiles itself anew for every number of rows: powers
// of two keep that to eight.
template <typename Factor>
void multiply(int64_t rows, int64_t terms, const Factor* left, int64_t left_stride, const Factor* panel, float* out,
              int64_t out_stride, bool accumulate) {
  for (int64_t block = kRows; rows > 0; block /= 2) {
    for (; rows >= block; rows -= block, left += block * left_stride, out += block * out_stride) {
      if constexpr (std::is_same_v<Factor, float>) {
        if (!brgemm_serves<float>()) {
          multiply_by_hand(block, terms, left, left_stride, panel, out, out_stride, accumulate);
          continue;
        }
      }
      at::native::cpublas::brgemm(block, kPanel, terms, left_stride, kPanel, out_stride, accumulate, left, panel, out,
                                  kPair<Factor> == 2);
    }
  }
}

// A block of out on its way through a buffer [kRows, kPanel]: where the last panel is not whole, or where out is written
// column by column.
struct Block {
  float* out;
  int64_t rows, columns, row_stride, column_stride;

  void read(float* buffer) const {
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t c = 0; c < columns; c++) buffer[r * kPanel + c] = out[r * row_stride + c * column_stride];
    }
  }

  void write(const float* buffer) const {
    if (column_stride == 1) {
      for (int64_t r = 0; r < rows; r++) std::copy_n(buffer + r * kPanel, columns, out + r * row_stride);
      return;
    }
    alignas(64) float turned[kPanel * kRows];
    transpose(buffer, kPanel, turned, kRows, kRows, kPanel);
    for (int64_t c = 0; c < columns; c++) std::copy_n(turned + c * kRows, rows, out + c * column_stride);
  }
};

// What one call multiplies, and where its result goes.
template <typename T>
struct Task {
  Matrix<T> left, right;
  float* out;
  int64_t out_row_stride, out_column_stride;
  const float* bias;  // one for each column of out, or for each row where the product is the transposed one
  bool accumulate;
  bool transposed;
};

template <typename Factor, typename T>
void product_of(const Task<T>& task) {
  const Matrix<T>&left = task.left, &right = task.right;
  const int64_t rows = left.rows, columns = right.columns, terms = left.columns;
  // A left matrix of whole rows, of the right dtype, needs no packing.
  const bool direct = std::is_same_v<T, Factor> && left.column_stride == 1 && left.row_stride < kFar &&
                      terms % kPair<Factor> == 0;
  const int64_t padded = round_up(terms, kStep), steps = padded / kStep;
  // A block that is turned in a buffer stays there for all of its terms; left has to be whole rows for that.
  const int64_t span = direct && task.transposed ? std::max<int64_t>(terms, 1) : kDepth<Factor>;
  const int64_t panel_size = kPanel * padded, panels = round_up(columns, kPanel) / kPanel;
  const int64_t chunk_panels = std::clamp<int64_t>(kPackedBytes / (panel_size * sizeof(Factor)), 1, panels);
  const Tensor packed_memory = scratch(chunk_panels * panel_size * sizeof(Factor));
  Factor* const packed = static_cast<Factor*>(packed_memory.mutable_data_ptr());

  for (int64_t start = 0; start < panels; start += chunk_panels) {
    const int64_t here = std::min(chunk_panels, panels - start);
    parallel_for(here * steps, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t panel = i / steps, term = i % steps * kStep;
        pack_right<Factor>(right, term, (start + panel) * kPanel, packed + panel * panel_size + term * kPanel);
      }
    });

    // Enough pieces for all threads even where the rows make but one block.
    const int64_t blocks = round_up(rows, kRows) / kRows;
    const int64_t groups = std::clamp<int64_t>(4 * get_num_threads() / blocks, 1, here);
    const int64_t group_panels = (here + groups - 1) / groups;
    parallel_for(blocks * groups, 1, [&](int64_t begin, int64_t end) {
      const Tensor left_memory = scratch(direct ? 0 : kRows * kDepth<Factor> * sizeof(Factor));
      Factor* const packed_left = static_cast<Factor*>(left_memory.mutable_data_ptr());
      alignas(64) float buffer[kRows * kPanel];
      for (int64_t piece = begin; piece < end; piece++) {
        const int64_t row = piece / groups * kRows, block_rows = std::min(kRows, rows - row);
        const int64_t first = piece % groups * group_panels, last = std::min(first + group_panels, here);
        for (int64_t term = 0; term < terms; term += span) {
          const int64_t end_term = std::min(term + span, direct ? terms : padded);
          if (!direct) pack_left<Factor>(left, row, block_rows, term, end_term - term, packed_left);
          const Factor* const block_left = direct ? reinterpret_cast<const Factor*>(left.at(row, term)) : packed_left;
          const int64_t left_stride = direct ? left.row_stride : end_term - term;
          for (int64_t panel = first; panel < last; panel++) {
            const int64_t column = (start + panel) * kPanel, width = std::min(kPanel, columns - column);
            const Block block{task.out + row * task.out_row_stride + column * task.out_column_stride, block_rows, width,
                              task.out_row_stride, task.out_column_stride};
            const bool through_buffer = width < kPanel || task.transposed || task.out_row_stride >= kFar;
            float* const sums = through_buffer ? buffer : block.out;
            const int64_t sums_stride = through_buffer ? kPanel : task.out_row_stride;
            const bool from_bias = task.bias && term == 0, add = task.accumulate || term > 0;
            if (from_bias) {
              for (int64_t r = 0; r < block_rows; r++) {
                if (task.transposed) std::fill_n(sums + r * sums_stride, width, task.bias[row + r]);
                else std::copy_n(task.bias + column, width, sums + r * sums_stride);
              }
            } else if (add && through_buffer) {
              block.read(buffer);
            }
            for (int64_t part = term; part < end_term; part += kDepth<Factor>) {
              const int64_t depth = std::min(kDepth<Factor>, end_term - part);
              multiply(block_rows, depth, block_left + (part - term), left_stride,
                       packed + panel * panel_size + part * kPanel, sums, sums_stride, add || from_bias || part > term);
            }
            if (through_buffer) block.write(buffer);
          }
        }
      }
      if constexpr (kPair<Factor> == 2) at::native::cpublas::brgemm_release();
    });
  }
}

template <typename Factor, typename T>
void product_of(const Tensor& out, const Tensor& left, const Tensor& right, const float* bias, bool accumulate) {
  Task<T> task{matrix<T>(left), matrix<T>(right), static_cast<float*>(out.mutable_data_ptr()), out.stride(0), 1, bias,
               accumulate, false};
  // Few rows do not pay for the packing of a large right. Where its transpose has whole rows, the transposed product packs
  // left instead, and turns the blocks of its result.
  if (task.left.rows <= kFewRows && task.left.rows < task.right.columns && task.right.row_stride == 1) {
    std::swap(task.left, task.right);
    for (Matrix<T>* factor : {&task.left, &task.right}) {
      std::swap(factor->rows, factor->columns);
      std::swap(factor->row_stride, factor->column_stride);
    }
    std::swap(task.out_row_stride, task.out_column_stride);
    task.transposed = true;
  }
  product_of<Factor>(task);
}

void product_(Tensor out, Tensor left, Tensor right, std::optional<Tensor> bias, bool accumulate) {
  STD_TORCH_CHECK(out.dim() == 2 && left.dim() == 2 && right.dim() == 2, "product_: out, left and right must be matrices");
  STD_TORCH_CHECK(out.size(0) == left.size(0) && out.size(1) == right.size(1) && left.size(1) == right.size(0),
                  "product_: out [", out.size(0), ", ", out.size(1), "] does not fit left [", left.size(0), ", ", left.size(1),
                  "] @ right [", right.size(0), ", ", right.size(1), "]");
  STD_TORCH_CHECK(left.size(1) > 0, "product_: a sum of no terms: expected left [M, K] with K of at least 1");
  STD_TORCH_CHECK(left.size(1) < int64_t{1} << 48, "product_: no memory holds a panel of the K = ", left.size(1), " rows of right");
  check_dtype("product_", "out", out, {ScalarType::Float});
  check_dtype("product_", "left", left, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  check_dtype("product_", "right", right, {left.scalar_type()});
  check_rows("product_", "out", out, true);
  STD_TORCH_CHECK(!(bias && accumulate), "product_: a bias starts a sum: expected no bias where accumulate is true");
  const float* bias_data = nullptr;
  if (bias) {
    check_dtype("product_", "bias", *bias, {ScalarType::Float});
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out.size(1) && bias->is_contiguous(),
                    "product_: expected a contiguous bias [", out.size(1), "]");
    bias_data = static_cast<const float*>(bias->const_data_ptr());
  }
  if (out.numel() == 0) return;
  switch (left.scalar_type()) {
    case ScalarType::Float:
      return product_of<float, float>(out, left, right, bias_data, accumulate);
    case ScalarType::BFloat16:
      if (brgemm_serves<BFloat16>()) return product_of<BFloat16, BFloat16>(out, left, right, bias_data, accumulate);
      return product_of<float, BFloat16>(out, left, right, bias_data, accumulate);
    default:
      if (brgemm_serves<Half>()) return product_of<Half, Half>(out, left, right, bias_data, accumulate);
      return product_of<float, Half>(out, left, right, bias_data, accumulate);
  }
}

}  // namespace
}  // namespace fastd2o

STABLE_TORCH_LIBRARY_IMPL(fastd2o_native, CPU, m) {
  m.impl("product_", TORCH_BOX(&fastd2o::product_));
}
