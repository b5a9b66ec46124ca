// Memory between two pages that no one may touch (POSIX: mmap). A load or store one element outside
// a tensor ends the test, in any build: sanitizers do not see the masked intrinsics.
//
// Software prefetches of invalid addresses do nothing by design, and stay allowed.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

class Guarded {
 public:
  explicit Guarded(size_t capacity) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    size_ = (capacity + page - 1) / page * page;
    void* mapped = mmap(nullptr, size_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    begin_ = static_cast<char*>(mapped) + page;
    if (mapped == MAP_FAILED || mprotect(begin_, size_, PROT_READ | PROT_WRITE) != 0) {
      std::perror("mmap");
      std::exit(EXIT_FAILURE);
    }
  }
  Guarded(const Guarded&) = delete;

  // Returns a block that ends where the guard page begins, or begins where the other one ends. On
  // its open side lies NaN (of any type), which in_place() checks.
  void* block(size_t bytes, bool flush_end) {
    if (bytes > size_) {
      std::printf("a block of %zu bytes, room for %zu\n", bytes, size_);
      std::exit(EXIT_FAILURE);
    }
    block_ = flush_end ? begin_ + size_ - bytes : begin_;
    const size_t room = size_ - bytes;
    margin_size_ = room < kMargin ? room : kMargin;
    margin_ = flush_end ? block_ - margin_size_ : block_ + bytes;
    std::memset(margin_, 0xff, margin_size_);
    return block_;
  }

  // Returns whether nobody wrote on the open side.
  bool in_place() const {
    for (size_t i = 0; i < margin_size_; ++i) {
      if (margin_[i] != '\xff') return false;
    }
    return true;
  }

 private:
  static constexpr size_t kMargin = 512;

  size_t size_, margin_size_ = 0;
  char *begin_, *block_ = nullptr, *margin_ = nullptr;
};
