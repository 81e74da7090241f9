// The attention of one step as a list of tasks of similar cost, the same for every layer.
#pragma once
#include <algorithm>
#include <vector>

#include "kernels.h"

struct AttentionPlan {
  std::vector<AttentionTask> tasks;
  struct Join {
    int32_t seq, kv_head, first, count;
  };
  std::vector<Join> joins;  // decodes whose keys were split
  int64_t num_partials = 0;
  int64_t max_rows = 0;  // of a prefill task

  void build(const oct_batch& batch, int64_t num_heads, int64_t num_kv_heads, int threads) {
    tasks.clear();
    joins.clear();
    num_partials = 0;
    max_rows = 0;
    for (int64_t s = 0; s < batch.num_decodes; s++)
      for (int64_t h = 0; h < num_kv_heads; h++) add_decode(batch, s, h, num_kv_heads, threads);
    int64_t group = num_heads / num_kv_heads;
    for (int64_t s = batch.num_decodes; s < batch.num_seqs; s++)
      for (int64_t h = 0; h < num_kv_heads; h++) add_prefill(batch, s, h, group);
    spread(threads);
  }

 private:
  std::vector<AttentionTask> sorted_;

  void add_decode(const oct_batch& batch, int64_t seq, int64_t head, int64_t num_kv_heads, int threads) {
    constexpr int64_t kLeastKeys = 128;  // below this a split costs more than it gives
    int64_t length = batch.seq_lens[seq], heads = batch.num_decodes * num_kv_heads;
    int64_t wanted = (4 * threads + heads - 1) / heads;
    int64_t splits = threads == 1 ? 1 : std::max<int64_t>(1, std::min(wanted, length / kLeastKeys));
    int64_t step = ((length + splits - 1) / splits + 15) / 16 * 16;
    splits = (length + step - 1) / step;
    if (splits > 1) joins.push_back({(int32_t)seq, (int32_t)head, (int32_t)num_partials, (int32_t)splits});
    for (int64_t i = 0; i < splits; i++) {
      int64_t begin = i * step, end = std::min(length, begin + step);
      int32_t partial = splits > 1 ? (int32_t)num_partials++ : -1;
      tasks.push_back({(int32_t)seq, (int32_t)head, (int32_t)seq, 1, (int32_t)begin, (int32_t)end, partial,
                       (int32_t)(end - begin)});
    }
  }

  void add_prefill(const oct_batch& batch, int64_t seq, int64_t head, int64_t group) {
    int64_t begin = batch.query_start_loc[seq], end = batch.query_start_loc[seq + 1];
    int64_t count = std::max<int64_t>(4, kPrefillRows / group), before = batch.seq_lens[seq] - end;
    for (int64_t first = begin; first < end; first += count) {
      int64_t n = std::min(count, end - first), keys = before + first + n;
      max_rows = std::max(max_rows, n * group);
      tasks.push_back({(int32_t)seq, (int32_t)head, (int32_t)first, (int32_t)n, 0, (int32_t)keys, -1,
                       (int32_t)std::min<int64_t>(keys * n, INT32_MAX)});
    }
  }

  // Costliest first for every member of the team: `Member::each` gives member m the m-th stretch of the list.
  void spread(int threads) {
    std::stable_sort(tasks.begin(), tasks.end(), [](const auto& a, const auto& b) { return a.cost > b.cost; });
    int64_t count = (int64_t)tasks.size(), next = 0;
    sorted_.resize(count);
    for (int64_t round = 0; next < count; round++) {
      for (int owner = 0; owner < threads; owner++) {
        int64_t at = count * owner / threads + round;
        if (at < count * (owner + 1) / threads) sorted_[at] = tasks[next++];
      }
    }
    tasks.swap(sorted_);
  }
};
