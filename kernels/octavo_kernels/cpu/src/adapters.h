// Low-rank changes of projections, another set of them for each token: out[first ..] += scale * up @ (down @ x).
//
// Rows with adapters are sorted by slot, so that each tile multiplies one adapter's `down`. What that gives lies in
// `low_` one row a token, which is also the layout of a tile of one: `up` reads it where it is.
#pragma once
#include <algorithm>
#include <array>
#include <vector>

#include "kernels.h"
#include "workspace.h"

class Adapters {
 public:
  explicit Adapters(int64_t num_layers) : num_layers_(num_layers) {}

  void place(int64_t slot, const oct_low_rank* changes, int64_t count) {
    if (slot >= (int64_t)slots_.size()) slots_.resize(slot + 1);
    std::vector<Changes> placed(count > 0 ? num_layers_ * kNumPlaces : 0);
    for (int64_t i = 0; i < count; i++) {
      Changes& at = placed[changes[i].layer * kNumPlaces + changes[i].place];
      Change change{changes[i], at.width};
      at.width += change.up.columns;
      at.list.push_back(change);
      width_ = std::max(width_, at.width);
      most_changes_ = std::max<int64_t>(most_changes_, (int64_t)at.list.size());
      down_panels_ = std::max(down_panels_, panels_of(change.down));
      up_chunks_ = std::max(up_chunks_, chunks_of(change));
      kinds_ |= 1 << change.down.activations;
    }
    slots_[slot].swap(placed);
  }

  // Sorts the batch's rows; a slot without an adapter changes nothing.
  void begin(const oct_batch& batch, int max_tile) {
    rows_.clear();
    tiles_.clear();
    if (!batch.adapter_slots || width_ == 0) return;
    for (int64_t t = 0; t < batch.num_tokens; t++) {
      int64_t slot = batch.adapter_slots[t];
      if (slot >= 0 && slot < (int64_t)slots_.size() && !slots_[slot].empty()) rows_.push_back((int32_t)t);
    }
    std::stable_sort(rows_.begin(), rows_.end(),
                     [&](int32_t a, int32_t b) { return batch.adapter_slots[a] < batch.adapter_slots[b]; });
    int32_t count = (int32_t)rows_.size();
    slot_of_.resize(count);
    singles_.resize(count);
    place_of_.assign(batch.num_tokens, -1);
    for (int32_t i = 0; i < count; i++) {
      slot_of_[i] = batch.adapter_slots[rows_[i]];
      singles_[i] = {i, 1};
      place_of_[rows_[i]] = i;
    }
    for (int32_t first = 0; first < count;) {
      int32_t end = first;
      while (end < count && slot_of_[end] == slot_of_[first]) end++;
      cut_tiles(first, end, max_tile, tiles_);
      first = end;
    }
    low_.ensure(count * width_);
  }

  bool any() const { return !rows_.empty(); }
  int kinds() const { return kinds_; }
  const std::vector<Tile>& tiles() const { return tiles_; }
  const int32_t* rows() const { return rows_.data(); }  // token of each sorted row
  int64_t num_rows() const { return (int64_t)rows_.size(); }

  // Pieces of work of the products with `down`, of x in the order of `rows()`.
  int64_t down_items() const { return (int64_t)tiles_.size() * most_changes_ * down_panels_; }
  void multiply_down(const KernelTable& table, int64_t layer, int place, int64_t item, const Activations& x) {
    int64_t panel = item % down_panels_, i = item / down_panels_ / most_changes_;
    const Tile& tile = tiles_[i];
    const Change* change = find(tile.start, layer, place, item / down_panels_ % most_changes_);
    if (!change || panel >= panels_of(change->down)) return;
    float* low = low_.get() + tile.start * width_ + change->low;
    table.linear(change->down, panel, panel + 1, x, tiles_.data(), i, i + 1,
                 {low, width_, nullptr, false, tile.start, 0}, 1);
    bool last = panel + 1 == panels_of(change->down);
    int64_t rank = change->down.rows, end = last ? change->up.columns : (panel + 1) * kPanel;
    for (int m = 0; m < tile.size; m++)
      for (int64_t k = panel * kPanel; k < end; k++)
        low[m * width_ + k] = k < rank ? low[m * width_ + k] * change->scale : 0.0f;  // the padding is multiplied too
  }

  // Pieces of work of the products with `up`, added to rows of `out`.
  int64_t up_items() const { return (int64_t)tiles_.size() * most_changes_ * up_chunks_; }
  void add_up(const KernelTable& table, int64_t layer, int place, int64_t item, float* out, int64_t stride) const {
    int64_t chunk = item % up_chunks_;
    const Tile& tile = tiles_[item / up_chunks_ / most_changes_];
    const Change* change = find(tile.start, layer, place, item / up_chunks_ % most_changes_);
    if (!change || chunk >= chunks_of(*change)) return;
    Output to{out + change->first, stride, nullptr, true, 0, 0};
    to.rows = rows_.data();
    table.linear(change->up, chunk * kChunk, std::min(panels_of(change->up), (chunk + 1) * kChunk), low_of(*change),
                 singles_.data(), tile.start, tile.start + tile.size, to, 1);
  }

  bool changes(int64_t token) const { return place_of_[token] >= 0; }
  // Adds to rows [row, row + 32) of the projection for a token that has an adapter.
  void add_up_rows(const KernelTable& table, int64_t layer, int place, int64_t token, int64_t row, float* out) const {
    int32_t at = place_of_[token];
    for (const Change& change : slots_[slot_of_[at]][layer * kNumPlaces + place].list) {
      int64_t own = row - change.first;
      if (own < 0 || own >= change.up.rows) continue;
      table.linear(change.up, own / kPanel, own / kPanel + kBlock / kPanel, low_of(change), singles_.data(), at, at + 1,
                   {out, kBlock, nullptr, true, at, own}, 1);
    }
  }

 private:
  static constexpr int kNumPlaces = OCT_IN_DOWN + 1;
  static constexpr int64_t kChunk = 8;  // panels of `up` in a piece of work

  struct Change : oct_low_rank {
    int64_t low;  // its first column of `low_`
    Change(const oct_low_rank& change, int64_t low) : oct_low_rank(change), low(low) {}
  };
  struct Changes {
    std::vector<Change> list;
    int64_t width = 0;
  };

  int64_t num_layers_;
  std::vector<std::vector<Changes>> slots_;  // by slot, then layer and place; empty: no adapter
  int64_t width_ = 0, most_changes_ = 0, down_panels_ = 0, up_chunks_ = 0;
  int kinds_ = 0;
  std::vector<int32_t> rows_, slot_of_, place_of_;
  std::vector<Tile> tiles_, singles_;
  Buffer<float> low_;

  static int64_t chunks_of(const Change& change) { return (panels_of(change.up) + kChunk - 1) / kChunk; }
  const Change* find(int64_t row, int64_t layer, int place, int64_t index) const {
    const std::vector<Change>& list = slots_[slot_of_[row]][layer * kNumPlaces + place].list;
    return index < (int64_t)list.size() ? &list[index] : nullptr;
  }
  Activations low_of(const Change& change) const {
    Activations low{};
    low.f32 = low_.get() + change.low;
    low.columns = width_;
    return low;
  }
};
