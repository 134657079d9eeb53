// Large blocks of memory for what lives only for some layers: kept when it goes, and given to the next one.
// At most a quarter more is held than was ever in use at once, so the first pass of a network plans it.
#pragma once
#include "common.h"

namespace fastgen::workspace {

// A block on a cache line, uninitialised, and its way back. Small ones are the C library's.
void* take(int64_t bytes);
void give(void* block, int64_t bytes);

// An uninitialised tensor of four dimensions; large ones have their memory from here.
Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, MemoryFormat format);

}  // namespace fastgen::workspace
