// The C interface of whole steps: what callers pass in is checked here, before any kernel trusts it.
#include "step.h"

#include <exception>

#include "errors.h"

namespace {

constexpr int64_t kMaxSlots = 65536;

bool within(const int64_t* values, int64_t count, int64_t limit, const char* what) {
  for (int64_t i = 0; i < count; i++)
    if (values[i] < 0 || values[i] >= limit)
      return fail("%s of token %lld is %lld, must be at least 0 and below %lld", what, (long long)i,
                  (long long)values[i], (long long)limit);
  return true;
}

bool tables_fit(const oct_batch& b) {
  for (int64_t s = 0; s < b.num_seqs; s++) {
    int64_t blocks = (b.seq_lens[s] + b.block_size - 1) / b.block_size;
    if (b.seq_lens[s] < 1 || blocks > b.max_blocks)
      return fail("sequence %lld has length %d, its block table covers %lld tokens", (long long)s, b.seq_lens[s],
                  (long long)(b.max_blocks * b.block_size));
    for (int64_t i = 0; i < blocks; i++) {
      int32_t block = b.block_tables[s * b.max_blocks + i];
      if (block < 0 || block >= b.num_blocks)
        return fail("block %lld of sequence %lld is %d, the cache has %lld", (long long)i, (long long)s, block,
                    (long long)b.num_blocks);
    }
  }
  return true;
}

}  // namespace

bool check_batch(const oct_batch& b, int64_t max_positions) {
  return within(b.positions, b.num_tokens, max_positions, "position") &&
         within(b.slot_mapping, b.num_tokens, b.num_blocks * b.block_size, "slot") && tables_fit(b);
}

extern "C" void* oct_step_create(const oct_model* model) {
  try {
    return new Step(*model);
  } catch (const std::exception& error) {
    fail("%s", error.what());
    return nullptr;
  }
}

extern "C" void oct_step_destroy(void* step) { delete static_cast<Step*>(step); }

extern "C" int oct_step_run(void* handle, const oct_batch* batch, const oct_kv_cache* caches, const int64_t* wanted,
                            int64_t num_wanted, float* logits) {
  Step& step = *static_cast<Step*>(handle);
  if (batch->num_tokens == 0) return 0;
  if (!within(batch->token_ids, batch->num_tokens, step.model().vocab_size, "id") ||
      !check_batch(*batch, step.attention().max_positions) ||
      !within(wanted, num_wanted, batch->num_tokens, "logits index"))
    return -1;
  try {
    step.run(*batch, caches, wanted, num_wanted, logits);
  } catch (const std::exception& error) {
    fail("%s", error.what());
    return -1;
  }
  return 0;
}

extern "C" int oct_step_place_adapter(void* handle, int64_t slot, const oct_low_rank* changes, int64_t count) {
  Step& step = *static_cast<Step*>(handle);
  if (slot < 0 || slot >= kMaxSlots)
    return fail("adapter slot %lld: must be at least 0 and below %lld", (long long)slot, (long long)kMaxSlots), -1;
  for (int64_t i = 0; i < count; i++)
    if (!step.takes(changes[i]))
      return fail("change %lld of the adapter does not fit projection %d of layer %d", (long long)i, changes[i].place,
                  changes[i].layer), -1;
  try {
    step.place_adapter(slot, changes, count);
  } catch (const std::exception& error) {
    fail("%s", error.what());
    return -1;
  }
  return 0;
}

extern "C" void oct_step_profile(void* handle, int on, int64_t* nanoseconds, int count) {
  Step& step = *static_cast<Step*>(handle);
  step.profiling = on != 0;
  for (int i = 0; i < kNumPhases; i++) {
    if (i < count) nanoseconds[i] = step.spent[i];
    step.spent[i] = 0;
  }
}
