// Which instruction set runs: the best that the processor and the operating system offer, or a lower one on request.
#include "dispatch.h"

#include <atomic>
#include <cstring>
#include <string>

namespace {

struct Choice {
  const char* name;
  const KernelTable* (*table)();
  bool (*usable)();
};

bool always() { return true; }

#if defined(OCT_HAS_AVX2) || defined(OCT_HAS_AVX512)
[[maybe_unused]] bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
[[maybe_unused]] bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

const Choice kChoices[] = {
#ifdef OCT_HAS_AVX512_BF16
    {"avx512_bf16", kernels_avx512_bf16, has_avx512_bf16},
#endif
#ifdef OCT_HAS_AVX512
    {"avx512", kernels_avx512, has_avx512},
#endif
#ifdef OCT_HAS_AVX2
    {"avx2", kernels_avx2, has_avx2},
#endif
    {"portable", kernels_portable, always},
};
// From best to least, with the names that this build leaves out: a limit may name any of them.
const char* const kLadder[] = {"amx", "avx512_bf16", "avx512", "avx2", "portable"};

int rank(const char* name) {
  int i = 0;
  for (const char* known : kLadder) {
    if (std::strcmp(known, name) == 0) return i;
    i++;
  }
  return -1;
}

std::atomic<const KernelTable*> g_table{nullptr};

const Choice& best(int least_rank) {
  for (const Choice& choice : kChoices)
    if (rank(choice.name) >= least_rank && choice.usable()) return choice;
  return kChoices[sizeof kChoices / sizeof kChoices[0] - 1];
}

}  // namespace

const KernelTable& kernels() {
  const KernelTable* table = g_table.load(std::memory_order_acquire);
  if (!table) {
    table = best(0).table();
    g_table.store(table, std::memory_order_release);
  }
  return *table;
}

extern "C" const char* oct_select_isa(const char* limit) {
  int least = limit && *limit ? rank(limit) : 0;
  if (least < 0) return nullptr;
  const Choice& choice = best(least);
  g_table.store(choice.table(), std::memory_order_release);
  return choice.name;
}

extern "C" const char* oct_isa() { return kernels().name; }

extern "C" const char* oct_available_isas() {
  static const std::string names = [] {
    std::string joined;
    for (const Choice& choice : kChoices)
      if (choice.usable()) joined += (joined.empty() ? "" : " ") + std::string(choice.name);
    return joined;
  }();
  return names.c_str();
}

extern "C" int oct_has_bf16_dot() { return kernels().bf16_dot; }
