// The library's own threads. Knows nothing of what they compute.
//
// A region is one function that all threads run together. Between its phases they meet at barriers; within a phase they
// take numbered parts. Which thread takes which part never changes a result, only its time.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace kv {

class Team {
 public:
  int size() const { return size_; }

  // Waits for all threads of the region. Spins briefly, then yields: another process may hold a thread's core.
  void barrier();

  // The next part's number. Counting starts again after a barrier.
  int next();

  void resize(int size) { size_ = size; }

 private:
  int size_ = 1;
  alignas(64) std::atomic<int> next_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
};

using Region = void (*)(Team& team, int thread, void* context);

// Runs a region on all threads, the caller being thread 0; returns when all have finished.
void run(Region region, void* context);

int num_threads();
void set_threads(int num_threads);
void set_waiting(int spin_turns, int yield_turns);

// Memory shared by a call's threads, and memory of one thread: 64-byte aligned, kept for later calls, never cleared.
// A larger request may move it.
enum class Buffer { kActivations, kProjected, kGated, kTokens, kItems, kStates, kCount };
void* shared_buffer(Buffer buffer, size_t bytes);
void* thread_buffer(int thread, size_t bytes);

}  // namespace kv
