#include "huge_pages.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>

namespace skimtvm {
namespace {

constexpr uintptr_t kHuge = 2 << 20;
constexpr int kHugePage = 14, kCollapse = 25;  // MADV_HUGEPAGE; MADV_COLLAPSE, which older headers lack

bool wanted() {
  const char* user = std::getenv("SKIMTVM_HUGE_PAGES");
  if (user != nullptr && std::strcmp(user, "0") == 0) return false;
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string state;
  return std::getline(file, state) && state.find("[never]") == std::string::npos;
}

/// Whether most pages from `start` on, of one huge page, are in memory: those of stacks and of the ends of heaps are not.
bool in_use(uintptr_t start) {
  const size_t pages = kHuge / static_cast<size_t>(sysconf(_SC_PAGESIZE));
  std::vector<unsigned char> resident(pages);
  if (mincore(reinterpret_cast<void*>(start), kHuge, resident.data()) != 0) return false;
  size_t count = 0;
  for (unsigned char page : resident) count += page & 1;
  return 4 * count >= 3 * pages;
}

}  // namespace

HugePages::Spans HugePages::anonymous() {
  Spans spans;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    uintptr_t begin, end;
    char access[5], name[8] = "";
    unsigned long inode;
    const int fields =
        std::sscanf(line.c_str(), "%" SCNxPTR "-%" SCNxPTR " %4s %*s %*s %lu %7s", &begin, &end, access, &inode, name);
    if (fields >= 4 && std::strcmp(access, "rw-p") == 0 && inode == 0 && (!name[0] || std::strcmp(name, "[heap]") == 0))
      spans.emplace_back(begin, end);
  }
  return spans;
}

HugePages::HugePages() : wanted_(wanted()) {
  if (wanted_) before_ = anonymous();
}

void HugePages::apply() const {
  if (!wanted_) return;
  const auto old = [this](uintptr_t start) {
    for (const auto& span : before_)
      if (span.first < start + kHuge && start < span.second) return true;
    return false;
  };
  for (const auto& span : anonymous())
    for (uintptr_t at = (span.first + kHuge - 1) / kHuge * kHuge; at + kHuge <= span.second; at += kHuge) {
      if (old(at) || !in_use(at)) continue;
      madvise(reinterpret_cast<void*>(at), kHuge, kHugePage);
      madvise(reinterpret_cast<void*>(at), kHuge, kCollapse);
    }
}

}  // namespace skimtvm
