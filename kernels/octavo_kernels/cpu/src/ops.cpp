// Single ops on the team of threads, for models and batches that no whole step covers.
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <exception>

#include "attention_plan.h"
#include "dispatch.h"
#include "errors.h"
#include "pool.h"
#include "workspace.h"

namespace {

thread_local char t_error[512];

// Runs `body`, turning what it throws into a recorded error.
template <class Body>
int guarded(const Body& body) {
  try {
    return body() ? 0 : -1;
  } catch (const std::exception& error) {
    fail("%s", error.what());
    return -1;
  }
}

}  // namespace

bool fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(t_error, sizeof t_error, format, arguments);
  va_end(arguments);
  return false;
}

extern "C" const char* oct_last_error() { return t_error; }
extern "C" int oct_abi_version() { return OCT_ABI_VERSION; }
extern "C" int oct_threads() { return team_size(); }
extern "C" int oct_set_threads(int threads, int pin) {
  return guarded([&] {
    set_team_size(threads, pin != 0);
    return true;
  });
}

extern "C" int oct_linear(const oct_matrix* matrix, const float* x, int64_t tokens, int64_t columns, const float* bias,
                          float* out) {
  return guarded([&] {
    const KernelTable& table = kernels();
    const oct_matrix& w = *matrix;
    std::vector<Tile> tiles;
    cut_tiles(0, tokens, table.max_tile, tiles);
    static thread_local ActivationBuffer buffer;
    int kinds = 1 << w.activations;
    buffer.ensure(tokens, w.columns, kinds);
    Activations acts = buffer.view(tokens, w.columns);
    Output to{out, w.rows, bias, false, 0, 0};
    int64_t num_tiles = (int64_t)tiles.size(), panels = panels_of(w), at_once = 32;
    auto body = [&](Member& member) {
      member.each(num_tiles, [&](int64_t i) {
        table.prepare(x, columns, columns, nullptr, 0, tiles[i], nullptr, kinds, acts);
      });
      member.barrier();
      member.each(panels * ((num_tiles + at_once - 1) / at_once), [&](int64_t i) {
        int64_t first = i / panels * at_once, last = std::min(num_tiles, first + at_once);
        table.linear(w, i % panels, i % panels + 1, acts, tiles.data(), first, last, to, last - first);
      });
    };
    run_team(body);
    return true;
  });
}

extern "C" int oct_rms_norm(const float* x, const float* weight, int64_t tokens, int64_t dim, float eps, float* out) {
  return guarded([&] {
    const KernelTable& table = kernels();
    auto body = [&](Member& member) {
      member.each(tokens, [&](int64_t t) { table.rms_norm(x + t * dim, weight, dim, eps, out + t * dim); });
    };
    run_team(body);
    return true;
  });
}

extern "C" int oct_gated(const float* gate_up, int64_t tokens, int64_t dim, int gelu, float* out) {
  return guarded([&] {
    const KernelTable& table = kernels();
    auto body = [&](Member& member) {
      member.each(tokens, [&](int64_t t) {
        const float* row = gate_up + 2 * t * dim;
        table.gated(row, row + dim, dim, gelu != 0, out + t * dim);
      });
    };
    run_team(body);
    return true;
  });
}

extern "C" int oct_rope_and_store(const oct_attention* attention, const oct_batch* batch, const oct_kv_cache* cache,
                                  float* query, float* key, const float* value) {
  return guarded([&] {
    const oct_attention& a = *attention;
    const KernelTable& table = kernels();
    auto body = [&](Member& member) {
      member.each(batch->num_tokens, [&](int64_t t) {
        int64_t width = (int64_t)a.num_kv_heads * a.head_dim;
        table.rope_heads(a, a.q_norm, a.num_heads, batch->positions[t], query + t * a.num_heads * a.head_dim);
        table.rope_heads(a, a.k_norm, a.num_kv_heads, batch->positions[t], key + t * width);
        if (!cache) return;
        for (int64_t h = 0; h < a.num_kv_heads; h++)
          table.store_kv(a, batch->kv_dtype, batch->block_size, batch->slot_mapping[t], *cache, h,
                         key + t * width + h * a.head_dim, value + t * width + h * a.head_dim);
      });
    };
    run_team(body);
    return true;
  });
}

extern "C" int oct_paged_attention(const oct_attention* attention, const oct_batch* batch, const oct_kv_cache* cache,
                                   const float* query, float* out) {
  return guarded([&] {
    const oct_attention& a = *attention;
    if (!check_batch(*batch, INT64_MAX)) return false;
    const KernelTable& table = kernels();
    int64_t group = a.num_heads / a.num_kv_heads, dim = a.head_dim, stride = a.num_heads * dim;
    int threads = team_size();
    AttentionPlan plan;
    plan.build(*batch, a.num_heads, a.num_kv_heads, threads);
    Buffer<float> partials;
    partials.ensure(plan.num_partials * group * (dim + 2));
    std::vector<Buffer<float>> scratch(threads);
    int64_t needed = prefill_scratch(plan.max_rows, dim);
    for (auto& own : scratch) own.ensure(plan.max_rows ? needed : 1);
    auto body = [&](Member& member) {
      member.each((int64_t)plan.tasks.size(), [&](int64_t i) {
        AttentionTask task = plan.tasks[i];
        if (task.seq >= batch->num_decodes) {
          int64_t start = batch->seq_lens[task.seq] - batch->query_start_loc[task.seq + 1];
          if (a.sliding_window)
            task.key_begin = (int32_t)std::max<int64_t>(0, start + task.first - a.sliding_window + 1);
          table.attend_prefill(a, *batch, *cache, task, query, stride, out, stride, scratch[member.id].get());
          return;
        }
        int64_t at = task.first * stride + task.kv_head * group * dim, length = batch->seq_lens[task.seq];
        if (a.sliding_window) task.key_begin = (int32_t)std::max<int64_t>(task.key_begin, length - a.sliding_window);
        table.attend_decode(a, *batch, *cache, task, nullptr, query + at, out + at, partials.get());
      });
      member.barrier();
      member.each((int64_t)plan.joins.size(), [&](int64_t i) {
        const AttentionPlan::Join& join = plan.joins[i];
        table.combine(a, join.kv_head, partials.get(), join.first, join.count,
                      out + join.seq * stride + join.kv_head * group * dim);
      });
    };
    run_team(body);
    return true;
  });
}
