// Choosing one token a row: filters decided on as many of the best tokens as they need, never on a sorted vocabulary.
#include <algorithm>
#include <cmath>
#include <vector>

#include "dispatch.h"
#include "errors.h"
#include "pool.h"

namespace {

constexpr float kGreedyTemperature = 1e-5f;
constexpr int64_t kNotFinite = -1, kAllExcluded = -2;

struct Row {
  const float* logits;
  int64_t vocab;
  float temperature, top_p, min_p;
  int64_t top_k;  // 0: no limit
  uint64_t seed;
  uint32_t counter;
};

struct Candidate {
  float logit;  // scaled by temperature
  int32_t id;
  bool operator<(const Candidate& other) const {  // best first, equal ones by id
    return logit != other.logit ? logit > other.logit : id < other.id;
  }
};

// Every token within `width` of the best one, unordered.
void gather(const Row& row, float top, float width, std::vector<Candidate>& found) {
  found.clear();
  float least = top - width, unscaled = (least - 1e-3f * std::fabs(least) - 1e-3f) * row.temperature;
  for (int64_t i = 0; i < row.vocab; i++) {
    if (row.logits[i] < unscaled) continue;  // spares most the division
    float scaled = row.logits[i] / row.temperature;
    if (scaled >= least && scaled > -INFINITY) found.push_back({scaled, (int32_t)i});
  }
}

// How many of the best tokens the filters keep; `found` is put in order as far as that. Negative: `found` does not
// reach far enough to tell.
int64_t num_kept(const Row& row, float top, float width, double total, bool all, std::vector<Candidate>& found) {
  int64_t count = (int64_t)found.size();
  float least = row.min_p > 0 ? top + std::log(row.min_p) : -INFINITY;
  bool reaches_k = row.top_k > 0 && count >= row.top_k;
  double mass = 0;
  if (!reaches_k)
    for (const Candidate& c : found) mass += std::exp((double)(c.logit - top));
  bool needs_k = row.top_k > 0 && row.top_p < 1;  // top-p is a share of what top-k leaves
  bool reaches_p = row.top_k == 0 && row.top_p < 1 && mass >= row.top_p * total;
  bool reaches_min = !needs_k && top - width <= least;
  if (!all && !reaches_k && !reaches_p && !reaches_min) return -1;
  if (reaches_k) {
    std::partial_sort(found.begin(), found.begin() + row.top_k, found.end());
    count = row.top_k;
    for (int64_t i = 0; i < count; i++) mass += std::exp((double)(found[i].logit - top));
  } else {
    std::sort(found.begin(), found.end());
  }
  double limit = row.top_p < 1 ? row.top_p * (row.top_k > 0 ? mass : total) : INFINITY, before = 0;
  for (int64_t i = 0; i < count; i++) {
    if (i > 0 && (before >= limit || found[i].logit < least)) return i;
    before += std::exp((double)(found[i].logit - top));
  }
  return count;
}

int64_t choose_filtered(const Row& row, float best, const KernelTable& table) {
  float top = best / row.temperature;
  double total = row.top_p < 1 && row.top_k == 0 ? table.mass_of(row.logits, row.vocab, row.temperature, top) : 0;
  std::vector<Candidate> found;
  for (float width = 8; ; width *= 2) {
    bool all = width > 64;
    gather(row, top, all ? INFINITY : width, found);
    int64_t kept = num_kept(row, top, width, total, all, found);
    if (kept < 0) continue;
    std::vector<float> logits(kept);
    std::vector<int32_t> ids(kept);
    for (int64_t i = 0; i < kept; i++) logits[i] = found[i].logit, ids[i] = found[i].id;
    return ids[table.draw(logits.data(), ids.data(), kept, 1.0f, row.seed, row.counter)];
  }
}

int64_t choose(const Row& row, const KernelTable& table) {
  float best;
  int64_t token = table.best_of(row.logits, row.vocab, &best);
  if (!std::isfinite(best)) return best == -INFINITY ? kAllExcluded : kNotFinite;
  if (row.temperature < kGreedyTemperature) return token;
  if (row.top_k > 0 || row.top_p < 1 || row.min_p > 0) return choose_filtered(row, best, table);
  return table.draw(row.logits, nullptr, row.vocab, row.temperature, row.seed, row.counter);
}

}  // namespace

extern "C" int oct_sample(const float* logits, int64_t rows, int64_t vocab, const float* temperature,
                          const int32_t* top_k, const float* top_p, const float* min_p, const int64_t* seeds,
                          const int64_t* counters, int64_t* tokens) {
  if (vocab < 1) return fail("a row of logits has %lld entries", (long long)vocab), -1;
  const KernelTable& table = kernels();
  auto one = [&](int64_t r) {
    int64_t k = top_k[r] > 0 && top_k[r] < vocab ? top_k[r] : 0;
    Row row{logits + r * vocab, vocab,   temperature[r], top_p[r], min_p[r], k,
            (uint64_t)seeds[r], (uint32_t)counters[r]};
    tokens[r] = choose(row, table);
  };
  auto body = [&](Member& member) { member.each(rows, one); };
  if (rows == 1) one(0);  // not worth waking the others
  else run_team(body);
  return 0;
}
