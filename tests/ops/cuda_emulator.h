// Runs CUDA kernels on the CPU, thread by thread, so that their logic is tested where there is no GPU.
//
// Every thread of a block is a fiber. A fiber runs until it waits for its warp or its block, and all of them take turns
// in an order that the caller chooses: a kernel whose result depends on that order lacks a barrier. Warps whose lanes
// meet at different operations, or never, are an error. It shows nothing of speed, nor of what the memory of a GPU does
// between barriers.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10;

struct Index {
  unsigned x, y;
};

// Where several threads meet. Two sets of slots: one thread may be at the next meeting while another reads of this one.
struct Meeting {
  int expected, arrived = 0, round = 0;
  const char* operation = "";
  uint64_t slots[2][kWarp] = {};
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  Index index;
  bool done = false;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Meeting> warps;
  Meeting all;
  ucontext_t scheduler;
  Thread* current = nullptr;
  int progress = 0;
  const char* error = nullptr;
};

inline Block* block;
inline std::function<void()> body;

inline Index threadIdx, blockIdx, blockDim;

inline void give_way() {
  Thread* self = block->current;
  swapcontext(&self->context, &block->scheduler);
}

inline int position() { return static_cast<int>(threadIdx.x + threadIdx.y * blockDim.x); }

// Returns the round that was met in, when all have come.
inline int meet(Meeting& meeting, const char* operation) {
  const int round = meeting.round;
  if (meeting.arrived == 0) meeting.operation = operation;
  if (std::strcmp(meeting.operation, operation) != 0) block->error = "lanes of a warp meet at different operations";
  ++block->progress;
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    ++meeting.round;
  }
  while (meeting.round == round) give_way();
  return round % 2;
}

// Every lane brings a value and can read those of all.
template <typename T>
const uint64_t* exchange(uint32_t mask, T value, const char* operation) {
  if (mask != 0xFFFFFFFFu) block->error = "expected a mask of all lanes";
  Meeting& warp = block->warps[position() / kWarp];
  std::memcpy(&warp.slots[warp.round % 2][position() % kWarp], &value, sizeof value);
  return warp.slots[meet(warp, operation)];
}

template <typename T>
T read(const uint64_t* slots, int lane) {
  T value;
  std::memcpy(&value, &slots[lane], sizeof value);
  return value;
}

inline void enter() {
  body();
  block->current->done = true;
  ++block->progress;
  --block->all.expected;
  give_way();
}

inline void prepare(Thread& thread, unsigned number) {
  thread.index = {number % blockDim.x, number / blockDim.x};
  getcontext(&thread.context);
  thread.context.uc_stack = {thread.stack.get(), 0, kStack};
  makecontext(&thread.context, enter, 0);
}

// Runs `kernel` on every block of the grid, one after the other; `order` seeds the turns of the threads.
inline void launch(unsigned blocks, unsigned row_threads, unsigned rows, uint32_t order, std::function<void()> kernel) {
  body = std::move(kernel);
  blockDim = {row_threads, rows};
  std::mt19937 shuffle(order);
  for (unsigned b = 0; b < blocks; ++b) {
    const unsigned count = row_threads * rows;
    Block now;
    block = &now;
    blockIdx = {b, 0};
    now.threads = std::vector<Thread>(count);
    now.warps = std::vector<Meeting>(count / kWarp, Meeting{kWarp});
    now.all.expected = static_cast<int>(count);
    std::vector<Thread*> turns;
    for (unsigned i = 0; i < count; ++i) {
      prepare(now.threads[i], i);
      turns.push_back(&now.threads[i]);
    }
    for (bool alive = true; alive;) {
      std::shuffle(turns.begin(), turns.end(), shuffle);
      const int before = now.progress;
      alive = false;
      for (Thread* thread : turns) {
        if (thread->done) continue;
        alive = true;
        now.current = thread;
        threadIdx = thread->index;
        swapcontext(&now.scheduler, &thread->context);
        if (now.error) throw std::runtime_error(now.error);
      }
      if (alive && now.progress == before) throw std::runtime_error("threads wait for others that never come");
    }
  }
}

}  // namespace emulator

using emulator::blockDim;
using emulator::blockIdx;
using emulator::threadIdx;

template <typename T>
T __shfl_sync(uint32_t mask, T value, int lane) {
  return emulator::read<T>(emulator::exchange(mask, value, "shfl"), lane);
}

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  return emulator::read<T>(emulator::exchange(mask, value, "shfl_xor"), emulator::position() % emulator::kWarp ^ lanes);
}

inline uint32_t __ballot_sync(uint32_t mask, bool value) {
  const uint64_t* slots = emulator::exchange(mask, value, "ballot");
  uint32_t ballot = 0;
  for (int lane = 0; lane < emulator::kWarp; ++lane) ballot |= uint32_t{emulator::read<bool>(slots, lane)} << lane;
  return ballot;
}

inline bool __any_sync(uint32_t mask, bool value) { return __ballot_sync(mask, value) != 0; }

template <typename T>
T __reduce_min_sync(uint32_t mask, T value) {
  const uint64_t* slots = emulator::exchange(mask, value, "reduce_min");
  for (int lane = 0; lane < emulator::kWarp; ++lane) value = std::min(value, emulator::read<T>(slots, lane));
  return value;
}

inline void __syncwarp() { emulator::exchange(0xFFFFFFFFu, 0, "syncwarp"); }
inline void __syncthreads() { emulator::meet(emulator::block->all, "syncthreads"); }
inline int __ffs(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)); }
