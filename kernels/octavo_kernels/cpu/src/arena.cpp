// Memory for weights: 64-byte aligned pieces of large chunks, so that huge pages can back them.
#include <sys/mman.h>

#include <cstdint>
#include <map>
#include <mutex>

#include "octavo_cpu.h"

namespace {

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kChunkBytes = 32 << 20;

struct Chunk {
  char* memory;
  int64_t size;
  int64_t used;
  int64_t pieces;
};

std::mutex g_lock;
std::map<char*, Chunk> g_chunks;  // by address
char* g_current = nullptr;

Chunk* new_chunk(int64_t bytes) {
  int64_t size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  // One page more, to cut out an aligned stretch.
  char* raw = static_cast<char*>(
      mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (raw == MAP_FAILED) return nullptr;
  char* aligned = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(raw) + kHugePage - 1) & ~(uintptr_t)(kHugePage - 1));
  if (aligned > raw) munmap(raw, aligned - raw);
  if (raw + kHugePage > aligned) munmap(aligned + size, raw + kHugePage - aligned);
#ifdef MADV_HUGEPAGE
  madvise(aligned, size, MADV_HUGEPAGE);  // advice: without huge pages all works the same
#endif
  return &(g_chunks[aligned] = Chunk{aligned, size, 0, 0});
}

void release_if_empty(std::map<char*, Chunk>::iterator at) {
  if (at->second.pieces > 0 || at->first == g_current) return;
  munmap(at->second.memory, at->second.size);
  g_chunks.erase(at);
}

}  // namespace

extern "C" void* oct_alloc(int64_t bytes) {
  std::lock_guard<std::mutex> lock(g_lock);
  bytes = (bytes + 63) / 64 * 64;
  auto current = g_current ? g_chunks.find(g_current) : g_chunks.end();
  Chunk* chunk = current == g_chunks.end() ? nullptr : &current->second;
  if (!chunk || chunk->used + bytes > chunk->size) {
    bool alone = bytes > kChunkBytes / 2;  // keeps the current chunk open for small pieces
    Chunk* fresh = new_chunk(alone ? bytes : kChunkBytes);
    if (!fresh) return nullptr;
    if (!alone) {
      char* before = g_current;
      g_current = fresh->memory;
      if (before) release_if_empty(g_chunks.find(before));
    }
    chunk = fresh;
  }
  void* piece = chunk->memory + chunk->used;
  chunk->used += bytes;
  chunk->pieces++;
  return piece;
}

extern "C" void oct_free(void* memory) {
  if (!memory) return;
  std::lock_guard<std::mutex> lock(g_lock);
  auto after = g_chunks.upper_bound(static_cast<char*>(memory));
  if (after == g_chunks.begin()) return;
  auto at = --after;
  at->second.pieces--;
  release_if_empty(at);
}
