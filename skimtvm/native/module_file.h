// The file of a module: a shared library with a manifest appended. The counterpart of skimtvm/artifact.py.
#ifndef SKIMTVM_MODULE_FILE_H_
#define SKIMTVM_MODULE_FILE_H_

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "skimtvm.h"

namespace skimtvm {

struct Error : std::runtime_error {
  Error(skimtvm_status status, const std::string& text) : std::runtime_error(text), status(status) {}
  skimtvm_status status;
};

/// A network input or output, see skimtvm_tensor_info.
struct Spec {
  std::string name, dtype;
  std::vector<int64_t> shape;
  int64_t item_bytes;
  size_t bytes;
};

struct Manifest {
  std::string target, tvm_version;
  std::vector<std::string> features;
  std::vector<Spec> inputs, outputs;
  std::vector<int64_t> batches;  // ascending; empty: exactly the shapes of the inputs
  std::vector<double> seconds;   // estimate of a run at each of `batches`
};

/// The manifest of the module `path`, after a check of every byte against the checksums of the file. Throws Error.
Manifest read_manifest(const std::string& path);

/// Throws Error unless this CPU and this TVM runtime can run the module.
void check_compatible(const Manifest& manifest, const std::string& path);

/// The batch sizes to run one after another for `images` >= 1 images: the rule of skimtvm/batching.py.
std::vector<int64_t> plan(int64_t images, const Manifest& manifest);

}  // namespace skimtvm

#endif  // SKIMTVM_MODULE_FILE_H_
