#pragma once

#include <cstdint>
#include <vector>

namespace meddiff {

// Numbers in bfloat16, zeros at first, that begin at a cache line.
class Numbers {
 public:
  explicit Numbers(int64_t count) : memory_(count + 32) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    data_ = memory_.data() + (64 - address % 64) % 64 / 2;
  }
  uint16_t* data() { return data_; }

 private:
  std::vector<uint16_t> memory_;
  uint16_t* data_;
};

}  // namespace meddiff
