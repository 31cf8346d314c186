// Pages of 2 MiB for memory that TVM allocates. The counterpart of skimtvm/huge_pages.py, which says what they bring.
#ifndef SKIMTVM_HUGE_PAGES_H_
#define SKIMTVM_HUGE_PAGES_H_

#include <cstdint>
#include <utility>
#include <vector>

namespace skimtvm {

/// Made before a piece of work, it knows what is mapped then; `apply` gives huge pages to what was mapped since and is in
/// use. Does nothing where the user or the system does not want it; never fails.
class HugePages {
 public:
  HugePages();
  void apply() const;

 private:
  using Spans = std::vector<std::pair<uintptr_t, uintptr_t>>;  // begin and end, ascending
  static Spans anonymous();
  bool wanted_;
  Spans before_;
};

}  // namespace skimtvm

#endif  // SKIMTVM_HUGE_PAGES_H_
