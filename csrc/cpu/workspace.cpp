#include "workspace.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include <mutex>
#include <new>
#include <unordered_map>

namespace fastgen::workspace {
namespace {

constexpr std::align_val_t line{64};
constexpr int64_t least = 1 << 20;  // bytes; below, the C library does well

struct Block {
  void* memory;
  int64_t bytes;
};

struct State {
  std::mutex mutex;
  std::unordered_map<void*, int64_t> taken;
  std::vector<Block> idle;  // the longest idle one first
  int64_t in_use = 0, most_in_use = 0, idle_bytes = 0;

  void release(int64_t bytes) {
    while (!idle.empty() && in_use + idle_bytes > bytes) {
      idle_bytes -= idle.front().bytes;
      ::operator delete(idle.front().memory, line);
      idle.erase(idle.begin());
    }
  }
};

State* make_state();

State& state() {
  static State* forever = make_state();  // tensors may outlive every static
  return *forever;
}

State* make_state() {
#if defined(__unix__) || defined(__APPLE__)
  // A fork in the middle of another thread's take or give would leave the child's mutex locked.
  pthread_atfork([] { state().mutex.lock(); }, [] { state().mutex.unlock(); },
                 [] { state().mutex.unlock(); });
#endif
  return new State;
}

void empty_workspace() {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  s.release(0);
  s.most_in_use = s.in_use;
}

}  // namespace

void* take(int64_t bytes) {
  if (bytes < least) return ::operator new(bytes, line);
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  Block block{nullptr, bytes};
  auto best = s.idle.end();
  for (auto i = s.idle.begin(); i != s.idle.end(); ++i) {
    const bool fits = i->bytes >= bytes && i->bytes <= bytes + bytes / 4;
    if (fits && (best == s.idle.end() || i->bytes <= best->bytes)) best = i;
  }
  if (best != s.idle.end()) {
    block = *best;
    s.idle.erase(best);
    s.idle_bytes -= block.bytes;
  } else {
    s.release(std::max<int64_t>(s.most_in_use / 4 * 5 - bytes, 0));
    block.memory = ::operator new(bytes, line);
  }
  s.taken[block.memory] = block.bytes;
  s.in_use += block.bytes;
  s.most_in_use = std::max(s.most_in_use, s.in_use);
  return block.memory;
}

void give(void* memory, int64_t asked) {
  if (asked < least) return ::operator delete(memory, line);
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  const auto found = s.taken.find(memory);
  const int64_t bytes = found->second;  // which may be more than was asked for
  s.taken.erase(found);
  s.idle.push_back({memory, bytes});
  s.in_use -= bytes;
  s.idle_bytes += bytes;
  s.release(s.most_in_use / 4 * 5);
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, MemoryFormat format) {
  int64_t bytes = static_cast<int64_t>(like.element_size());
  for (int64_t n : shape) bytes *= n;
  if (bytes < least) return fastgen::empty(like, shape, format);
  std::vector<int64_t> strides(4);
  int64_t stride = 1;
  for (int i = 0; i < 4; ++i) {
    const int axis = (format == MemoryFormat::ChannelsLast ? "1320" : "3210")[i] - '0';
    strides[axis] = stride;
    stride *= shape[axis];
  }
  return torch::stable::from_blob(take(bytes), shape, strides, like.device(), like.scalar_type(),
                                  [bytes](void* memory) { give(memory, bytes); });
}

}  // namespace fastgen::workspace

namespace fastgen {

STABLE_TORCH_LIBRARY_IMPL(fastgen, CompositeExplicitAutograd, m) {
  m.impl("empty_workspace", TORCH_BOX(&workspace::empty_workspace));
}

}  // namespace fastgen
