// Run a compiled module on raw binary files: needs the bundle that `skimtvm package` makes, and no Python.
//
//   run_model MODULE.so THREADS IMAGES REPEAT OUTPUT_PREFIX INPUT...
//
// Each INPUT holds the elements of one input in C order, in the machine's byte order. IMAGES is 0 for a module of one
// shape. Output k goes to OUTPUT_PREFIX<k>.bin.
#include <skimtvm.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

namespace {

[[noreturn]] void fail(const std::string& text) {
  std::fprintf(stderr, "run_model: %s\n", text.c_str());
  std::exit(1);
}

void check(int status) {
  if (status != SKIMTVM_OK) fail(skimtvm_last_error());
}

struct Destroy {
  void operator()(skimtvm_instance* instance) const { skimtvm_destroy(instance); }
};

std::vector<char> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail("cannot read " + path);
  return std::vector<char>(std::istreambuf_iterator<char>(file), {});
}

void print(const char* what, const skimtvm_tensor_info& info) {
  std::printf("%s %s: %s[", what, info.name, info.dtype);
  for (int k = 0; k < info.rank; ++k) std::printf("%s%lld", k ? "," : "", static_cast<long long>(info.shape[k]));
  std::printf("]\n");
}

size_t bytes_for(const skimtvm_tensor_info& info, bool any_number, long long images) {
  return any_number ? info.bytes / info.shape[0] * images : info.bytes;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 6) fail("usage: run_model MODULE.so THREADS IMAGES REPEAT OUTPUT_PREFIX INPUT...");
  int threads = std::atoi(argv[2]), repeat = std::atoi(argv[4]);
  long long images = std::atoll(argv[3]);

  skimtvm_instance* raw = nullptr;
  check(skimtvm_create(argv[1], threads, &raw));
  std::unique_ptr<skimtvm_instance, Destroy> instance(raw);
  const int64_t* sizes = nullptr;
  int32_t size_count = 0;
  check(skimtvm_batches(raw, &sizes, &size_count));
  if (argc - 6 != skimtvm_input_count(raw)) fail("the module has " + std::to_string(skimtvm_input_count(raw)) + " inputs");

  std::vector<std::vector<char>> in, out;
  std::vector<skimtvm_input> inputs;
  std::vector<skimtvm_output> outputs;
  for (int32_t i = 0; i < skimtvm_input_count(raw); ++i) {
    skimtvm_tensor_info info;
    check(skimtvm_input_info(raw, i, &info));
    print("input", info);
    in.push_back(read_file(argv[6 + i]));
    inputs.push_back({in.back().data(), in.back().size()});
  }
  for (int32_t i = 0; i < skimtvm_output_count(raw); ++i) {
    skimtvm_tensor_info info;
    check(skimtvm_output_info(raw, i, &info));
    print("output", info);
    out.emplace_back(bytes_for(info, size_count > 0, images));
    outputs.push_back({out.back().data(), out.back().size()});
  }

  std::vector<double> milliseconds;
  for (int i = 0; i < std::max(1, repeat); ++i) {
    auto start = std::chrono::steady_clock::now();
    check(skimtvm_run(raw, images, inputs.data(), outputs.data()));
    milliseconds.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(milliseconds.begin(), milliseconds.end());
  std::printf("%.3f ms a run (median of %zu)\n", milliseconds[milliseconds.size() / 2], milliseconds.size());

  for (size_t i = 0; i < out.size(); ++i) {
    std::ofstream file(argv[5] + std::to_string(i) + ".bin", std::ios::binary);
    file.write(out[i].data(), static_cast<std::streamsize>(out[i].size()));
    if (!file.flush()) fail("cannot write output " + std::to_string(i));
  }
  return 0;
}
