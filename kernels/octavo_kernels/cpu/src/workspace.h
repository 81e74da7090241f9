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

// Owner of the memory behind `Activations`.
class ActivationBuffer {
 public:
  void ensure(int64_t tokens, int64_t columns, int kinds) {
    int64_t count = tokens * padded(columns);
    if (kinds & kActInt8) int8_.ensure(count), scales_.ensure(3 * count / kBlock + 48);
    if (kinds & kActF32) f32_.ensure(count);
    if (kinds & kActBf16) bf16_.ensure(count);
  }
  // As large as was ensured, or smaller.
  Activations view(int64_t tokens, int64_t columns) const {
    columns = padded(columns);
    int64_t plane = (tokens * (columns / kBlock) + 15) / 16 * 16;
    Activations view{int8_.get(), scales_.get(), nullptr, nullptr, f32_.get(), bf16_.get(), columns};
    if (view.scale) view.sum = view.scale + plane, view.sum_low = view.scale + 2 * plane;
    return view;
  }

 private:
  Buffer<int8_t> int8_;
  Buffer<float> scales_, f32_;
  Buffer<uint16_t> bf16_;

  static int64_t padded(int64_t columns) { return (columns + kBlock - 1) / kBlock * kBlock; }
};

// Rows [first, end) in tiles of the largest size, then ever smaller powers of two.
inline void cut_tiles(int64_t first, int64_t end, int largest, std::vector<Tile>& tiles) {
  int32_t start = (int32_t)first;
  for (int32_t size = largest; size >= 1; size /= 2)
    for (; end - start >= size; start += size) tiles.push_back({start, size});
}
