// Large blocks of memory for what lives only for some layers: kept when it goes, and given to the next one.
// At most a quarter more is held than was ever in use at once, so the first pass of a network plans it.
#pragma once
#include "common.h"

namespace fastgen::workspace {

void* take(int64_t bytes);  // on a cache line, uninitialised; small blocks are the C library's
void give(void* block);

// An uninitialised tensor of four dimensions; large ones have their memory from here.
Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, MemoryFormat format);

}  // namespace fastgen::workspace
