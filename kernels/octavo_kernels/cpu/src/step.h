// A whole decoder step on the team of threads: every member walks through the same phases, barriers between them.
#pragma once
#include <chrono>
#include <cstring>

#include "adapters.h"
#include "attention_plan.h"
#include "dispatch.h"
#include "pool.h"
#include "workspace.h"

constexpr int64_t kPrivateTokens = 2;    // up to here every member prepares activations for itself: no barrier
constexpr int64_t kTilesAtOnce = 32;     // tiles that share one pass over a panel: their activations stay in L2
constexpr int64_t kMaxGatedTokens = 8;   // the largest tile

enum Phase { kEmbed, kPrepare, kQkv, kRope, kAttend, kOutput, kGateUp, kDown, kLogits, kNumPhases };

struct Layer : oct_layer {
  int64_t index;
  int qkv_kinds, output_kinds, gate_up_kinds, down_kinds;
  int64_t qkv_rows;
};

struct Private {  // of one member
  ActivationBuffer acts, adapted;
  Buffer<float> scratch;
};

int kind_of(const oct_matrix& w) { return 1 << w.activations; }
int64_t padded(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

class Step {
 public:
  explicit Step(const oct_model& model) : model_(model), table_(kernels()), adapters_(model.num_layers) {
    for (int64_t i = 0; i < model.num_layers; i++) {
      Layer layer{};
      static_cast<oct_layer&>(layer) = model.layers[i];
      layer.index = i;
      for (int p = 0; p < layer.num_qkv; p++) {
        layer.qkv_kinds |= kind_of(layer.qkv[p]);
        layer.qkv_rows += layer.qkv[p].rows;
      }
      for (int p = 0; p < layer.num_gate_up; p++) layer.gate_up_kinds |= kind_of(layer.gate_up[p]);
      layer.output_kinds = kind_of(layer.output);
      layer.down_kinds = kind_of(layer.down);
      norms_blocks_ |= layer.attention_out_norm || layer.mlp_out_norm;
      qkv_stride_ = std::max(qkv_stride_, padded(layer.qkv_rows, kPanel));
      attn_stride_ = std::max<int64_t>(attn_stride_, (int64_t)layer.attention.num_heads * layer.attention.head_dim);
      hidden_kinds_ |= layer.qkv_kinds | layer.output_kinds | layer.gate_up_kinds | layer.down_kinds;
      layers_.push_back(layer);
    }
    hidden_kinds_ |= kind_of(model.lm_head);
    model_.layers = nullptr;
  }

  void run(const oct_batch& batch, const oct_kv_cache* caches, const int64_t* wanted, int64_t num_wanted,
           float* logits) {
    batch_ = batch;
    caches_ = caches;
    wanted_ = wanted;
    num_wanted_ = num_wanted;
    logits_ = logits;
    reserve();
    auto body = [this](Member& member) { walk(member); };
    run_team(body);
  }

  // Whether a change fits the projection it is of.
  bool takes(const oct_low_rank& change) const {
    if (change.layer < 0 || change.layer >= model_.num_layers) return false;
    const Layer& layer = layers_[change.layer];
    int64_t hidden = model_.hidden_size, inner = model_.intermediate_size, rows = hidden, columns = hidden;
    switch (change.place) {
      case OCT_IN_QKV: rows = layer.qkv_rows; break;
      case OCT_IN_OUTPUT: columns = (int64_t)layer.attention.num_heads * layer.attention.head_dim; break;
      case OCT_IN_GATE_UP: rows = 2 * inner; break;
      case OCT_IN_DOWN: columns = inner; break;
      default: return false;
    }
    bool blocks = change.place != OCT_IN_GATE_UP || (change.first % kBlock == 0 && change.up.rows % kBlock == 0);
    return change.first >= 0 && blocks && change.first + change.up.rows <= rows &&
           change.down.columns == padded(columns, kBlock) &&
           change.up.columns == padded(change.down.rows, kBlock) && change.up.activations == OCT_ACT_F32;
  }
  void place_adapter(int64_t slot, const oct_low_rank* changes, int64_t count) { adapters_.place(slot, changes, count); }

  const oct_model& model() const { return model_; }
  const oct_attention& attention() const { return layers_[0].attention; }
  bool profiling = false;
  int64_t spent[kNumPhases] = {0};

 private:
  oct_model model_;
  const KernelTable& table_;
  Adapters adapters_;
  std::vector<Layer> layers_;
  int64_t qkv_stride_ = 0, attn_stride_ = 0;
  int hidden_kinds_ = 0;

  oct_batch batch_{};
  const oct_kv_cache* caches_ = nullptr;
  const int64_t* wanted_ = nullptr;
  int64_t num_wanted_ = 0;
  float* logits_ = nullptr;
  std::vector<Tile> tiles_, logit_tiles_;
  AttentionPlan plan_;
  bool norms_blocks_ = false;  // some layer norms what joins the residual stream
  Buffer<float> x_, block_, qkv_, attn_, last_, partials_;
  Buffer<float> gated_;  // of tokens with adapters: what `down_` holds in other layouts
  ActivationBuffer shared_, down_, adapted_;
  std::vector<Private> private_;
  std::chrono::steady_clock::time_point mark_;

  void reserve() {
    int64_t tokens = batch_.num_tokens, threads = team_size(), widest = std::max(model_.hidden_size, attn_stride_);
    int64_t rows = std::max(tokens, num_wanted_);
    tiles_.clear(), cut_tiles(0, tokens, table_.max_tile, tiles_);
    logit_tiles_.clear(), cut_tiles(0, num_wanted_, table_.max_tile, logit_tiles_);
    adapters_.begin(batch_, table_.max_tile);
    const oct_attention& a = attention();
    plan_.build(batch_, a.num_heads, a.num_kv_heads, (int)threads);
    int64_t group = a.num_heads / a.num_kv_heads;
    x_.ensure(tokens * model_.hidden_size);
    if (norms_blocks_) block_.ensure(tokens * model_.hidden_size);
    qkv_.ensure(tokens * qkv_stride_);
    attn_.ensure(tokens * attn_stride_);
    last_.ensure(num_wanted_ * model_.hidden_size);
    partials_.ensure(plan_.num_partials * group * (a.head_dim + 2));
    shared_.ensure(rows, widest, hidden_kinds_);
    down_.ensure(tokens, model_.intermediate_size, hidden_kinds_);
    int64_t adapted = adapters_.num_rows(), adapted_columns = std::max(widest, model_.intermediate_size);
    if (adapted) {
      gated_.ensure(tokens * model_.intermediate_size);
      adapted_.ensure(adapted, adapted_columns, adapters_.kinds());
    }
    if ((int64_t)private_.size() < threads) private_.resize(threads);
    int64_t scratch = prefill_scratch(plan_.max_rows, a.head_dim);
    for (Private& own : private_) {
      own.acts.ensure(std::min(rows, kPrivateTokens), widest, hidden_kinds_);
      own.scratch.ensure(std::max(scratch, group * a.head_dim));
      if (adapted) own.adapted.ensure(std::min(adapted, kPrivateTokens), adapted_columns, adapters_.kinds());
    }
  }

  void count(Member& member, Phase phase) {
    if (!profiling || member.id != 0) return;
    auto now = std::chrono::steady_clock::now();
    spent[phase] += std::chrono::duration_cast<std::chrono::nanoseconds>(now - mark_).count();
    mark_ = now;
  }

  void walk(Member& member) {
    if (member.id == 0) mark_ = std::chrono::steady_clock::now();
    int64_t hidden = model_.hidden_size;
    member.each(batch_.num_tokens, [&](int64_t t) {
      table_.unpack_row(model_.embedding, batch_.token_ids[t], hidden, model_.embedding_scale, x_.get() + t * hidden);
    });
    member.barrier();
    count(member, kEmbed);
    for (size_t i = 0; i < layers_.size(); i++) {
      attention_half(member, layers_[i], caches_[i]);
      mlp_half(member, layers_[i]);
    }
    if (num_wanted_ > 0) lm_head(member);
  }

  // Norm and layout of the activations a product needs: alone for a few tokens, together for many.
  Activations prepare(Member& member, const float* x, int64_t stride, int64_t dim, const float* norm,
                      const std::vector<Tile>& tiles, int64_t tokens, int kinds) {
    bool alone = tokens <= kPrivateTokens;
    Activations acts = (alone ? private_[member.id].acts : shared_).view(tokens, dim);
    lay_out(member, alone, tiles, [&](const Tile& tile) {
      table_.prepare(x, stride, dim, norm, model_.eps, tile, nullptr, kinds, acts);
    });
    return acts;
  }

  // The same for the tokens with adapters, sorted by adapter.
  Activations prepare_adapted(Member& member, const float* x, int64_t dim, const float* norm) {
    bool alone = batch_.num_tokens <= kPrivateTokens;
    Activations acts = (alone ? private_[member.id].adapted : adapted_).view(adapters_.num_rows(), dim);
    lay_out(member, alone, adapters_.tiles(), [&](const Tile& tile) {
      table_.prepare(x, dim, dim, norm, model_.eps, tile, adapters_.rows(), adapters_.kinds(), acts);
    });
    return acts;
  }

  template <class Body>
  static void lay_out(Member& member, bool alone, const std::vector<Tile>& tiles, const Body& body) {
    if (alone) {
      for (const Tile& tile : tiles) body(tile);
      return;
    }
    member.each((int64_t)tiles.size(), [&](int64_t i) { body(tiles[i]); });
    member.barrier();
  }

  // Calls body(panel, first tile, last tile) for all of `panels` and `tiles` over the team, and more(i) for `num_more`.
  template <class Body, class More>
  static void each_panel(Member& member, int64_t panels, const std::vector<Tile>& tiles, const Body& body,
                         int64_t num_more, const More& more) {
    int64_t num_tiles = (int64_t)tiles.size(), stretches = (num_tiles + kTilesAtOnce - 1) / kTilesAtOnce;
    member.each(panels * stretches + num_more, [&](int64_t i) {
      if (i >= panels * stretches) return more(i - panels * stretches);
      int64_t first = i / panels * kTilesAtOnce;
      body(i % panels, first, std::min(num_tiles, first + kTilesAtOnce));
    });
  }

  template <class Body>
  static void each_panel(Member& member, int64_t panels, const std::vector<Tile>& tiles, const Body& body) {
    each_panel(member, panels, tiles, body, 0, [](int64_t) {});
  }

  // A projection's second half for the tokens with adapters, once the phase that made the first is over.
  void add_adapters(Member& member, const Layer& layer, int place, float* out, int64_t stride) {
    if (!adapters_.any()) return;
    member.each(adapters_.up_items(),
                [&](int64_t i) { adapters_.add_up(table_, layer.index, place, i, out, stride); });
    member.barrier();
  }

  void attention_half(Member& member, const Layer& layer, const oct_kv_cache& cache) {
    int64_t hidden = model_.hidden_size;
    Activations x = prepare(member, x_.get(), hidden, hidden, layer.input_norm, tiles_, batch_.num_tokens,
                            layer.qkv_kinds);
    Activations adapted{};
    if (adapters_.any()) adapted = prepare_adapted(member, x_.get(), hidden, layer.input_norm);
    count(member, kPrepare);
    int64_t parts_panels[OCT_MAX_PARTS + 1] = {0};
    for (int p = 0; p < layer.num_qkv; p++) parts_panels[p + 1] = parts_panels[p] + panels_of(layer.qkv[p]);
    auto project = [&](int64_t panel, int64_t first, int64_t last) {
      int p = 0;
      int64_t row = 0;
      for (; panel >= parts_panels[p + 1]; p++) row += layer.qkv[p].rows;
      Output out{qkv_.get() + row, qkv_stride_, layer.qkv_bias ? layer.qkv_bias + row : nullptr, false, 0, 0};
      int64_t own = panel - parts_panels[p];
      table_.linear(layer.qkv[p], own, own + 1, x, tiles_.data(), first, last, out, last - first);
    };
    each_panel(member, parts_panels[layer.num_qkv], tiles_, project, adapters_.down_items(), [&](int64_t i) {
      adapters_.multiply_down(table_, layer.index, OCT_IN_QKV, i, adapted);
    });
    member.barrier();
    add_adapters(member, layer, OCT_IN_QKV, qkv_.get(), qkv_stride_);
    count(member, kQkv);
    attend(member, layer.attention, cache);
    Activations o = prepare(member, attn_.get(), attn_stride_, attn_stride_, nullptr, tiles_, batch_.num_tokens,
                            layer.output_kinds);
    if (adapters_.any()) adapted = prepare_adapted(member, attn_.get(), attn_stride_, nullptr);
    count(member, kPrepare);
    join(member, layer, OCT_IN_OUTPUT, layer.output, o, adapted, layer.output_bias, layer.attention_out_norm);
    count(member, kOutput);
  }

  // A block's last product, added to the residual stream, normed first where the layer has a norm for it.
  void join(Member& member, const Layer& layer, int place, const oct_matrix& w, const Activations& x,
            const Activations& adapted, const float* bias, const float* norm) {
    int64_t hidden = model_.hidden_size;
    Output out{norm ? block_.get() : x_.get(), hidden, bias, !norm, 0, 0};
    auto project = [&](int64_t panel, int64_t first, int64_t last) {
      table_.linear(w, panel, panel + 1, x, tiles_.data(), first, last, out, last - first);
    };
    each_panel(member, panels_of(w), tiles_, project, adapters_.down_items(), [&](int64_t i) {
      adapters_.multiply_down(table_, layer.index, place, i, adapted);
    });
    member.barrier();
    add_adapters(member, layer, place, out.data, hidden);
    if (!norm) return;
    member.each(batch_.num_tokens, [&](int64_t t) {
      float* from = block_.get() + t * hidden;
      float* to = x_.get() + t * hidden;
      table_.rms_norm(from, norm, hidden, model_.eps, from);
      for (int64_t i = 0; i < hidden; i++) to[i] += from[i];
    });
    member.barrier();
  }

  void attend(Member& member, const oct_attention& a, const oct_kv_cache& cache) {
    int64_t group = a.num_heads / a.num_kv_heads, dim = a.head_dim;
    const float* q_norm = a.row_norms ? nullptr : a.q_norm;  // of each head
    if (a.row_norms) {
      member.each(batch_.num_tokens, [&](int64_t t) {
        float* q = qkv_.get() + t * qkv_stride_;
        float* k = q + a.num_heads * dim;
        table_.rms_norm(q, a.q_norm, a.num_heads * dim, a.eps, q);
        table_.rms_norm(k, a.k_norm, a.num_kv_heads * dim, a.eps, k);
      });
      member.barrier();
    }
    int64_t prefills = batch_.num_tokens - batch_.num_decodes;
    if (prefills > 0) {  // other tasks read these keys: all must be there first
      member.each(prefills, [&](int64_t i) {
        int64_t token = batch_.num_decodes + i;
        float* q = qkv_.get() + token * qkv_stride_;
        table_.rope_heads(a, q_norm, a.num_heads, batch_.positions[token], q);
        for (int64_t h = 0; h < a.num_kv_heads; h++) store(a, cache, token, h);
      });
      member.barrier();
      count(member, kRope);
    }
    member.each((int64_t)plan_.tasks.size(), [&](int64_t i) {
      AttentionTask task = plan_.tasks[i];
      float* scratch = private_[member.id].scratch.get();
      if (task.seq >= batch_.num_decodes) {
        int64_t start = batch_.seq_lens[task.seq] - batch_.query_start_loc[task.seq + 1];
        if (a.sliding_window) task.key_begin = std::max<int64_t>(0, start + task.first - a.sliding_window + 1);
        table_.attend_prefill(a, batch_, cache, task, qkv_.get(), qkv_stride_, attn_.get(), attn_stride_, scratch);
        return;
      }
      int64_t token = task.first, length = batch_.seq_lens[task.seq];
      memcpy(scratch, qkv_.get() + token * qkv_stride_ + task.kv_head * group * dim, sizeof(float) * group * dim);
      table_.rope_heads(a, q_norm, group, batch_.positions[token], scratch);
      if (task.key_end == length) store(a, cache, token, task.kv_head);  // only this task reads the newest key
      if (a.sliding_window) task.key_begin = std::max<int64_t>(task.key_begin, length - a.sliding_window);
      float* out = attn_.get() + token * attn_stride_ + task.kv_head * group * dim;
      const AttentionTask* next = i + 1 < (int64_t)plan_.tasks.size() ? &plan_.tasks[i + 1] : nullptr;
      table_.attend_decode(a, batch_, cache, task, next, scratch, out, partials_.get());
    });
    member.barrier();
    if (!plan_.joins.empty()) {
      member.each((int64_t)plan_.joins.size(), [&](int64_t i) {
        const AttentionPlan::Join& join = plan_.joins[i];
        float* out = attn_.get() + join.seq * attn_stride_ + join.kv_head * group * dim;
        table_.combine(a, join.kv_head, partials_.get(), join.first, join.count, out);
      });
      member.barrier();
    }
    count(member, kAttend);
  }

  void store(const oct_attention& a, const oct_kv_cache& cache, int64_t token, int64_t head) {
    float* key = qkv_.get() + token * qkv_stride_ + (a.num_heads + head) * (int64_t)a.head_dim;
    const float* value = key + a.num_kv_heads * (int64_t)a.head_dim;
    table_.rope_heads(a, a.row_norms ? nullptr : a.k_norm, 1, batch_.positions[token], key);
    table_.store_kv(a, batch_.kv_dtype, batch_.block_size, batch_.slot_mapping[token], cache, head, key, value);
  }

  void mlp_half(Member& member, const Layer& layer) {
    int64_t hidden = model_.hidden_size, inner = model_.intermediate_size;
    Activations x = prepare(member, x_.get(), hidden, hidden, layer.post_attention_norm, tiles_, batch_.num_tokens,
                            layer.gate_up_kinds);
    if (adapters_.any()) {  // gates are used as soon as they are there: what is added to them comes first
      Activations adapted = prepare_adapted(member, x_.get(), hidden, layer.post_attention_norm);
      member.each(adapters_.down_items(), [&](int64_t i) {
        adapters_.multiply_down(table_, layer.index, OCT_IN_GATE_UP, i, adapted);
      });
      member.barrier();
    }
    count(member, kPrepare);
    Activations h = down_.view(batch_.num_tokens, inner);
    const oct_matrix& gate = layer.gate_up[0];
    const oct_matrix& up = layer.gate_up[layer.num_gate_up - 1];
    int64_t up_panel = layer.num_gate_up == 1 ? inner / kPanel : 0;
    const float* up_bias = layer.gate_up_bias;  // of the first row of `up`
    if (up_bias && up_panel == 0) up_bias += inner;
    each_panel(member, inner / kBlock, tiles_, [&](int64_t block, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i++) {
        const Tile& tile = tiles_[i];
        alignas(64) float gates[kMaxGatedTokens * kBlock], ups[kMaxGatedTokens * kBlock];
        Output to_gate{gates, kBlock, layer.gate_up_bias, false, tile.start, block * kBlock};
        Output to_up{ups, kBlock, up_bias, false, tile.start, block * kBlock + up_panel * kPanel};
        table_.linear(gate, 2 * block, 2 * block + 2, x, tiles_.data(), i, i + 1, to_gate, last - first);
        table_.linear(up, up_panel + 2 * block, up_panel + 2 * block + 2, x, tiles_.data(), i, i + 1, to_up, last - first);
        if (adapters_.any()) adapt_gated(layer, tile, block, gates, ups);
        table_.gate(gates, ups, model_.gelu, tile, block * kBlock, layer.down_kinds, h);
      }
    });
    member.barrier();
    count(member, kGateUp);
    Activations adapted{};
    if (adapters_.any()) adapted = prepare_adapted(member, gated_.get(), inner, nullptr);
    join(member, layer, OCT_IN_DOWN, layer.down, h, adapted, layer.down_bias, layer.mlp_out_norm);
    count(member, kDown);
  }

  // What adapters add to 32 gates and ups of a tile's tokens, and their product for the adapters of `down`.
  void adapt_gated(const Layer& layer, const Tile& tile, int64_t block, float* gates, float* ups) {
    int64_t row = block * kBlock, inner = model_.intermediate_size;
    for (int m = 0; m < tile.size; m++, gates += kBlock, ups += kBlock) {
      int64_t token = tile.start + m;
      if (!adapters_.changes(token)) continue;
      adapters_.add_up_rows(table_, layer.index, OCT_IN_GATE_UP, token, row, gates);
      adapters_.add_up_rows(table_, layer.index, OCT_IN_GATE_UP, token, inner + row, ups);
      table_.gated(gates, ups, kBlock, model_.gelu, gated_.get() + token * inner + row);
    }
  }

  void lm_head(Member& member) {
    int64_t hidden = model_.hidden_size;
    if (member.id == 0)
      for (int64_t i = 0; i < num_wanted_; i++)
        memcpy(last_.get() + i * hidden, x_.get() + wanted_[i] * hidden, sizeof(float) * hidden);
    member.barrier();
    Activations x = prepare(member, last_.get(), hidden, hidden, model_.final_norm, logit_tiles_, num_wanted_,
                            kind_of(model_.lm_head));
    Output out{logits_, model_.vocab_size, nullptr, false, 0, 0, model_.final_soft_cap};
    each_panel(member, panels_of(model_.lm_head), logit_tiles_, [&](int64_t panel, int64_t first, int64_t last) {
      table_.linear(model_.lm_head, panel, panel + 1, x, logit_tiles_.data(), first, last, out, last - first);
    });
    count(member, kLogits);
  }
};
