// Scratch memory that outlives a call: fresh pages cost as much as the work of a small matrix.
#pragma once

#include <cstdint>

namespace lipkernels {

class Scratch {
 public:
  explicit Scratch(int64_t bytes);  // data() is null if there is no memory
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return data_; }

 private:
  char* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace lipkernels
