// Threads that wait in three stages, spinning, yielding, sleeping, and the buffers they work in.
#include "threads.h"

#include <immintrin.h>
#include <sched.h>

#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace kv {
namespace {

constexpr int kBarrierSpins = 500;

class AlignedBytes {
 public:
  void* at_least(size_t bytes) {
    if (bytes > size_) {
      // A quarter more than asked, so that a slowly growing need doesn't allocate each time.
      const size_t wanted = (bytes + bytes / 4 + 4095) / 4096 * 4096;
      data_.reset(std::aligned_alloc(4096, wanted));
      if (!data_) throw std::bad_alloc();
      size_ = wanted;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(void* data) const { std::free(data); }
  };
  std::unique_ptr<void, Free> data_;
  size_t size_ = 0;
};

class Pool {
 public:
  ~Pool() { resize(1); }

  int size() const { return team_.size(); }

  void resize(int size) {
    stop();
    team_.resize(size);
    thread_buffers_.resize(size);
    stopping_ = false;
    const uint32_t seen = epoch_.load();
    for (int thread = 1; thread < size; ++thread) {
      workers_.emplace_back([this, thread, seen] { work(thread, seen); });
    }
  }

  void run(Region region, void* context) {
    region_ = region;
    context_ = context;
    announce();
    region(team_, 0, context);
    team_.barrier();
  }

  void set_waiting(int spin_turns, int yield_turns) {
    spin_turns_ = spin_turns;
    yield_turns_ = yield_turns;
  }

  void* shared_buffer(Buffer buffer, size_t bytes) { return shared_[static_cast<int>(buffer)].at_least(bytes); }
  void* thread_buffer(int thread, size_t bytes) { return thread_buffers_[thread].at_least(bytes); }

 private:
  void stop() {
    stopping_ = true;
    announce();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
  }

  void announce() {
    epoch_.fetch_add(1);
    if (sleepers_.load() > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
  }

  void work(int thread, uint32_t seen) {
    while (true) {
      seen = wait_for_news(seen);
      if (stopping_) return;
      region_(team_, thread, context_);
      team_.barrier();
    }
  }

  uint32_t wait_for_news(uint32_t seen) {
    for (int turn = 0; turn < spin_turns_; ++turn) {
      if (epoch_.load() != seen) return epoch_.load();
      _mm_pause();
    }
    for (int turn = 0; turn < yield_turns_; ++turn) {
      if (epoch_.load() != seen) return epoch_.load();
      sched_yield();
    }
    // Counted before the epoch is read again, as the epoch is raised before the count is read: one of both sees the
    // other's.
    sleepers_.fetch_add(1);
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return epoch_.load() != seen; });
    sleepers_.fetch_sub(1);
    return epoch_.load();
  }

  Team team_;
  std::vector<std::thread> workers_;
  Region region_ = nullptr;
  void* context_ = nullptr;
  std::atomic<uint32_t> epoch_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stopping_{false};
  std::atomic<int> spin_turns_{500};
  std::atomic<int> yield_turns_{2000};
  std::mutex mutex_;
  std::condition_variable wake_;
  AlignedBytes shared_[static_cast<int>(Buffer::kCount)];
  std::vector<AlignedBytes> thread_buffers_ = std::vector<AlignedBytes>(1);
};

Pool& pool() {
  static Pool instance;
  return instance;
}

}  // namespace

void Team::barrier() {
  const uint32_t generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    next_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  for (int turn = 0; generation_.load(std::memory_order_acquire) == generation; ++turn) {
    if (turn < kBarrierSpins) {
      _mm_pause();
    } else {
      sched_yield();
    }
  }
}

int Team::next() { return next_.fetch_add(1, std::memory_order_relaxed); }

void run(Region region, void* context) { pool().run(region, context); }
int num_threads() { return pool().size(); }
void set_threads(int num_threads) { pool().resize(num_threads); }
void set_waiting(int spin_turns, int yield_turns) { pool().set_waiting(spin_turns, yield_turns); }
void* shared_buffer(Buffer buffer, size_t bytes) { return pool().shared_buffer(buffer, bytes); }
void* thread_buffer(int thread, size_t bytes) { return pool().thread_buffer(thread, bytes); }

}  // namespace kv
