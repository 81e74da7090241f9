// Buffers that live from call to call, and how a batch of tokens is cut into tiles.
#pragma once
#include <cstdlib>
#include <new>
#include <vector>

#include "kernels.h"

// 64-byte aligned storage that only grows.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : data_(other.data_), capacity_(other.capacity_) {
    other.data_ = nullptr;
    other.capacity_ = 0;
  }
  ~Buffer() { std::free(data_); }
  T* ensure(int64_t count) {
    if (count <= capacity_) return data_;
    std::free(data_);
    capacity_ = 0;
    size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (!data_) throw std::bad_alloc();
    capacity_ = count;
    return data_;
  }
  T* get() const { return data_; }

 private:
  T* data_ = nullptr;
  int64_t capacity_ = 0;
};

// Owner of the memory behind an `Activations`.
class ActivationBuffer {
 public:
  const Activations& ensure(int64_t tokens, int64_t columns, int kinds) {
    columns = (columns + kBlock - 1) / kBlock * kBlock;
    int64_t blocks = tokens * (columns / kBlock);
    if (kinds & kActInt8) {
      view_.int8 = int8_.ensure(tokens * columns);
      float* scales = scales_.ensure(3 * blocks + 48);
      int64_t plane = (blocks + 15) / 16 * 16;
      view_.scale = scales, view_.sum = scales + plane, view_.sum_low = scales + 2 * plane;
    }
    if (kinds & kActF32) view_.f32 = f32_.ensure(tokens * columns);
    if (kinds & kActBf16) view_.bf16 = bf16_.ensure(tokens * columns);
    view_.columns = columns;
    return view_;
  }
  const Activations& view() const { return view_; }

 private:
  Buffer<int8_t> int8_;
  Buffer<float> scales_, f32_;
  Buffer<uint16_t> bf16_;
  Activations view_{};
};

// Tiles of the largest size, then ever smaller powers of two.
inline void cut_tiles(int64_t tokens, int largest, std::vector<Tile>& tiles) {
  tiles.clear();
  int32_t start = 0;
  for (int size = largest; size >= 1; size /= 2)
    for (; tokens - start >= size; start += size) tiles.push_back({start, size});
}
