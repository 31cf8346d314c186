#include "module_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <set>
#include <sstream>

#include "tvm_calls.h"

namespace skimtvm {
namespace {

constexpr char kStart[] = "\0SKIMTVM";  // 8 bytes before the manifest
constexpr char kMagic[] = "SkimTVM\x1a";
constexpr uint32_t kFormat = 1;
constexpr size_t kMark = 8, kFooter = 40, kElfHeader = 64;
constexpr int kMaxDepth = 32;  // of nested JSON: the parser of the runtime recurses without a limit

/// A whole file, read-only.
class Mapping {
 public:
  explicit Mapping(const std::string& path, const std::string& where) {
    int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe must not wait for its writer
    struct stat s;
    if (fd < 0 || fstat(fd, &s) != 0) {
      std::string reason = std::strerror(errno);
      if (fd >= 0) close(fd);
      throw Error(SKIMTVM_BAD_MODULE, where + " cannot be read: " + reason);
    }
    if (!S_ISREG(s.st_mode)) {
      close(fd);
      throw Error(SKIMTVM_BAD_MODULE, where + " is not a regular file");
    }
    size_ = static_cast<size_t>(s.st_size);
    void* data = size_ ? mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0) : nullptr;
    close(fd);
    if (data == MAP_FAILED) throw Error(SKIMTVM_BAD_MODULE, where + " cannot be mapped: " + std::strerror(errno));
    data_ = static_cast<const uint8_t*>(data);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() { if (data_) munmap(const_cast<uint8_t*>(data_), size_); }
  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

/// CRC-32 of ISO-HDLC (that of zlib), eight bytes a step.
uint32_t crc32(const uint8_t* data, size_t size, uint32_t crc = 0) {
  static const auto tables = [] {
    std::array<std::array<uint32_t, 256>, 8> t{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int k = 0; k < 8; ++k) c = (c >> 1) ^ (c & 1 ? 0xEDB88320u : 0);
      t[0][i] = c;
    }
    for (uint32_t i = 0; i < 256; ++i)
      for (int k = 1; k < 8; ++k) t[k][i] = (t[k - 1][i] >> 8) ^ t[0][t[k - 1][i] & 0xff];
    return t;
  }();
  crc = ~crc;
  for (; size >= 8; data += 8, size -= 8) {
    uint64_t word;
    std::memcpy(&word, data, 8);
    word ^= crc;
    crc = 0;
    for (int k = 0; k < 8; ++k) crc ^= tables[7 - k][(word >> (8 * k)) & 0xff];
  }
  for (; size > 0; ++data, --size) crc = (crc >> 8) ^ tables[0][(crc ^ *data) & 0xff];
  return ~crc;
}

template <typename T>
T read(const uint8_t* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

/// The JSON text of the manifest. Throws Error for a file that is not exactly what was written.
std::string manifest_text(const Mapping& file, const std::string& where) {
  auto fail = [&](const char* why) { return Error(SKIMTVM_BAD_MODULE, where + why); };
  const uint8_t* data = file.data();
  size_t size = file.size();
  if (size < 4 || std::memcmp(data, "\x7f" "ELF", 4) != 0) throw fail(" is not a SkimTVM module (no shared library)");
  if (size < kElfHeader + kMark + kFooter || std::memcmp(data + size - kMark, kMagic, kMark) != 0)
    throw fail(" is truncated, or a shared library that is not a SkimTVM module");
  const uint8_t* footer = data + size - kFooter;
  auto text_size = read<uint64_t>(footer), elf_size = read<uint64_t>(footer + 8);
  auto format = read<uint32_t>(footer + 28);
  if (format != kFormat) throw fail((" has module format " + std::to_string(format) + ", not 1; compile it again").c_str());
  auto damaged = fail(" is damaged (its checksum does not match); copy the file again");
  uint32_t own = crc32(footer + 28, kFooter - 28, crc32(footer, 24));
  size_t room = size - kMark - kFooter;
  if (own != read<uint32_t>(footer + 24) || elf_size > room || text_size != room - elf_size) throw damaged;
  const uint8_t* start = data + elf_size;
  if (std::memcmp(start, kStart, kMark) != 0) throw damaged;
  if (crc32(start + kMark, text_size) != read<uint32_t>(footer + 16)) throw damaged;
  if (crc32(data, elf_size) != read<uint32_t>(footer + 20)) throw damaged;
  return std::string(reinterpret_cast<const char*>(start + kMark), text_size);
}

/// Throws TvmError where the text nests deeper than any manifest.
void check_depth(const std::string& text) {
  int depth = 0;
  bool quoted = false;
  for (size_t i = 0; i < text.size(); ++i) {
    char c = text[i];
    if (quoted) {
      if (c == '\\') ++i;
      else if (c == '"') quoted = false;
    } else if (c == '"') {
      quoted = true;
    } else if (c == '[' || c == '{') {
      if (++depth > kMaxDepth) throw TvmError("nested too deep");
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
}

int64_t item_bytes(const std::string& dtype) {
  if (dtype == "bool") return 1;
  size_t digits = dtype.find_first_of("123456789");
  std::string kind = dtype.substr(0, digits), bits = digits == std::string::npos ? "" : dtype.substr(digits);
  if (kind != "float" && kind != "int" && kind != "uint") throw TvmError("unknown dtype");
  if (bits != "8" && bits != "16" && bits != "32" && bits != "64") throw TvmError("unknown dtype");
  return std::stoi(bits) / 8;
}

std::vector<Spec> specs(const Value& list) {
  std::vector<Spec> result;
  for (const Value& raw : elements(list)) {
    Spec spec;
    spec.name = item(raw, "name").text();
    spec.dtype = item(raw, "dtype").text();
    spec.item_bytes = item_bytes(spec.dtype);
    uint64_t bytes = static_cast<uint64_t>(spec.item_bytes);
    for (const Value& d : elements(item(raw, "shape"))) {
      int64_t extent = d.number();
      if (extent < 0 || __builtin_mul_overflow(bytes, static_cast<uint64_t>(extent), &bytes) ||
          bytes > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()))
        throw TvmError("a shape is impossible");
      spec.shape.push_back(extent);
    }
    spec.bytes = bytes;
    result.push_back(std::move(spec));
  }
  return result;
}

void check_batches(const Manifest& m) {
  if (m.seconds.size() != m.batches.size()) throw TvmError("batches contradict");
  if (m.batches.empty()) return;
  for (size_t i = 0; i < m.batches.size(); ++i) {
    if (m.batches[i] < 1 || (i && m.batches[i] <= m.batches[i - 1])) throw TvmError("batches contradict");
    if (!std::isfinite(m.seconds[i]) || m.seconds[i] <= 0) throw TvmError("batches contradict");
  }
  if (m.inputs.empty()) throw TvmError("batches contradict");
  for (auto* list : {&m.inputs, &m.outputs})
    for (const Spec& s : *list)
      if (s.shape.empty() || s.shape[0] != m.batches.back()) throw TvmError("batches contradict");
}

std::string first_two(const std::string& version) {
  size_t dot = version.find('.');
  return version.substr(0, dot == std::string::npos ? dot : version.find('.', dot + 1));
}

}  // namespace

Manifest read_manifest(const std::string& path) {
  std::string where = "module '" + path + "'";
  Mapping file(path, where);
  std::string text = manifest_text(file, where);
  try {
    check_depth(text);
    if (text.find('\0') != std::string::npos) throw TvmError("a zero byte");
    Value raw = call(global("ffi.json.Parse"), Value::view_of_text(text.c_str()));
    Manifest m;
    m.target = item(raw, "target").text();
    m.tvm_version = item(raw, "tvm_version").text();
    for (const Value& f : elements(item(raw, "features"))) m.features.push_back(f.text());
    m.inputs = specs(item(raw, "inputs"));
    m.outputs = specs(item(raw, "outputs"));
    for (const Value& b : elements(item(raw, "batches"))) m.batches.push_back(b.number());
    for (const Value& s : elements(item(raw, "seconds"))) m.seconds.push_back(s.real());
    check_batches(m);
    return m;
  } catch (const TvmError&) {
    throw Error(SKIMTVM_BAD_MODULE, where + " has a manifest that this library cannot read; compile it again");
  }
}

void check_compatible(const Manifest& manifest, const std::string& path) {
  if (first_two(manifest.tvm_version) != first_two(SKIMTVM_TVM_VERSION))
    throw Error(SKIMTVM_BAD_MODULE, "module '" + path + "' was made with TVM " + manifest.tvm_version +
                                        ", this is TVM " SKIMTVM_TVM_VERSION "; compile it again");
  std::ifstream cpuinfo("/proc/cpuinfo");
  std::set<std::string> have;
  for (std::string line; std::getline(cpuinfo, line);) {
    if (line.rfind("flags", 0) != 0) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    for (std::string word; words >> word;) have.insert(word);
    break;
  }
  std::string missing;
  for (const std::string& feature : manifest.features)
    if (!have.count(feature)) missing += (missing.empty() ? "" : ", ") + feature;
  if (!have.empty() && !missing.empty())
    throw Error(SKIMTVM_INCOMPATIBLE_CPU, "module '" + path + "' was compiled for " + manifest.target +
                                              "; this CPU lacks " + missing);
}

std::vector<int64_t> plan(int64_t images, const Manifest& m) {
  size_t bulk = m.batches.size() - 1;  // cheapest for an image; batching.py says how many of it need no weighing
  for (size_t k = bulk; k-- > 0;)
    if (m.seconds[k] * m.batches[bulk] < m.seconds[bulk] * m.batches[k]) bulk = k;
  int64_t size = m.batches[bulk];
  int64_t full = std::max<int64_t>(0, (images - size * m.batches.back()) / size);
  int64_t rest = images - full * size;
  std::vector<double> best(rest + 1, std::numeric_limits<double>::infinity());
  std::vector<int64_t> first(rest + 1, 0), sizes;
  best[0] = 0;
  for (int64_t n = 1; n <= rest; ++n)
    for (size_t k = m.batches.size(); k-- > 0;) {
      double total = best[std::max<int64_t>(0, n - m.batches[k])] + m.seconds[k];
      if (total < best[n]) best[n] = total, first[n] = m.batches[k];
    }
  for (; rest > 0; rest -= sizes.back()) sizes.push_back(first[rest]);
  sizes.insert(sizes.end(), full, size);
  std::sort(sizes.rbegin(), sizes.rend());
  return sizes;
}

}  // namespace skimtvm
