// The C library of a bundle over TVM's runtime, see skimtvm.h. The counterpart of skimtvm/runtime.py.
#include <sched.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <tuple>

#include "module_file.h"
#include "skimtvm.h"
#include "tvm_calls.h"

namespace skimtvm {
namespace {

constexpr size_t kAlignment = 64;  // bytes; kernels use aligned vector moves, which fault on anything less
constexpr int kMaxThreads = 1024;
constexpr int kShareCpus = -3;  // TVM's mode in which all workers may run on all the CPUs listed
constexpr int kPooledAllocator = 2;

// TVM reads this when it first starts a pool: workers that spin for the default 0.15 s after each run take a core away
// from whatever runs next. Set while the library is loaded, when other threads do not yet read the environment.
__attribute__((constructor)) void set_pool_defaults() {
  setenv("TVM_BIND_THREADS", "0", 0);
  setenv("TVM_THREAD_POOL_SPIN_COUNT", "20000", 0);
}

/// One thread that does all the work of an instance. TVM gives every calling thread a pool of workers of its own, whose
/// size is set once: with a thread of its own, the instance has exactly the workers that it was made with.
class Worker {
 public:
  Worker() : thread_([this] { loop(); }) {}
  ~Worker() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  /// Run `work` in the thread and wait for it; what it throws is thrown here.
  void call(std::function<void()> work) {
    std::unique_lock<std::mutex> lock(mutex_);
    work_ = std::move(work);
    changed_.notify_all();
    changed_.wait(lock, [this] { return !work_; });
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  void loop() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return stop_ || work_; });
      if (stop_) return;
      lock.unlock();
      std::exception_ptr error;
      try {
        work_();
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
      error_ = error;
      work_ = nullptr;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::function<void()> work_;
  std::exception_ptr error_;
  bool stop_ = false;
  std::thread thread_;  // last: it starts when the rest is there
};

/// A module file in memory, shared by its instances.
struct Library {
  Manifest manifest;
  Value module;
};

std::shared_ptr<Library> load(const std::string& path) {
  using Identity = std::tuple<dev_t, ino_t, off_t, time_t, long>;
  static auto* lock = new std::mutex;  // never destroyed: a thread may still run when static objects go
  static auto* loaded = new std::map<Identity, std::weak_ptr<Library>>;
  struct stat s;
  char* resolved = realpath(path.c_str(), nullptr);
  if (resolved == nullptr || stat(resolved, &s) != 0) {
    std::string reason = std::strerror(errno);
    free(resolved);
    throw Error(SKIMTVM_BAD_MODULE, "module '" + path + "' cannot be read: " + reason);
  }
  std::string real = resolved;
  free(resolved);
  if (real.size() < 3 || real.compare(real.size() - 3, 3, ".so") != 0)
    throw Error(SKIMTVM_BAD_MODULE, "module '" + path + "': the name of the file must end in .so; rename it");
  std::lock_guard<std::mutex> guard(*lock);
  Identity identity{s.st_dev, s.st_ino, s.st_size, s.st_mtim.tv_sec, s.st_mtim.tv_nsec};
  for (auto it = loaded->begin(); it != loaded->end();) it = it->second.expired() ? loaded->erase(it) : std::next(it);
  if (auto found = loaded->find(identity); found != loaded->end())
    if (auto library = found->second.lock()) return library;
  auto library = std::make_shared<Library>();
  library->manifest = read_manifest(real);
  check_compatible(library->manifest, path);
  library->module = call(global("ffi.ModuleLoadFromFile"), Value::view_of_text(real.c_str()));
  (*loaded)[identity] = library;
  return library;
}

/// TVM's tensor of `bytes` bytes over `data`, or over an aligned copy where `data` is not aligned or holds but `given`
/// bytes: the rest is zeros.
Value tensor_of(const Spec& spec, int64_t images, const void* data, size_t given, size_t bytes) {
  struct Owner {
    DLManagedTensor managed;
    std::vector<int64_t> shape;
    void* copy = nullptr;
    ~Owner() { free(copy); }
  };
  auto owner = std::make_unique<Owner>();
  owner->shape = spec.shape;
  if (images) owner->shape[0] = images;
  if (reinterpret_cast<uintptr_t>(data) % kAlignment != 0 || given < bytes || bytes == 0) {
    owner->copy = std::aligned_alloc(kAlignment, (bytes + kAlignment) / kAlignment * kAlignment);
    if (owner->copy == nullptr) throw std::bad_alloc();
    if (given) std::memcpy(owner->copy, data, given);
    std::memset(static_cast<char*>(owner->copy) + given, 0, bytes - given);
    data = owner->copy;
  }
  uint8_t code = spec.dtype == "bool"      ? kDLBool
                 : spec.dtype[0] == 'f'    ? kDLFloat
                 : spec.dtype[0] == 'u'    ? kDLUInt
                                           : kDLInt;
  DLTensor& t = owner->managed.dl_tensor;
  t.data = const_cast<void*>(data);  // kernels do not write to their inputs
  t.device = {kDLCPU, 0};
  t.ndim = static_cast<int32_t>(owner->shape.size());
  t.dtype = {code, static_cast<uint8_t>(8 * spec.item_bytes), 1};
  t.shape = owner->shape.data();
  t.strides = nullptr;
  t.byte_offset = 0;
  owner->managed.manager_ctx = owner.get();
  owner->managed.deleter = [](DLManagedTensor* self) { delete static_cast<Owner*>(self->manager_ctx); };
  TVMFFIObjectHandle handle = nullptr;
  check(TVMFFITensorFromDLPack(&owner->managed, kAlignment, 1, &handle));
  owner.release();  // the tensor's now
  return Value::own(handle);
}

void copy_out(const Spec& spec, int64_t images, const Value& result, char* to, size_t bytes) {
  if (!result.is(kTVMFFITensor)) throw TvmError("an output is not a tensor");
  const DLTensor& t = result.tensor();
  bool same = t.ndim == static_cast<int32_t>(spec.shape.size()) && t.dtype.bits == 8 * spec.item_bytes;
  int64_t stride = 1;
  for (int32_t k = t.ndim; same && k-- > 0;) {
    same = t.shape[k] == (k == 0 && images ? images : spec.shape[k]) &&
           (t.shape[k] == 1 || t.strides == nullptr || t.strides[k] == stride);
    stride *= t.shape[k];
  }
  if (!same) throw TvmError("output '" + spec.name + "' has another shape than the manifest says");
  if (bytes) std::memcpy(to, static_cast<char*>(t.data) + t.byte_offset, bytes);
}

}  // namespace
}  // namespace skimtvm

using namespace skimtvm;

struct skimtvm_instance {
  std::shared_ptr<Library> library;
  std::mutex busy;
  std::map<int64_t, Value> functions;  // by batch size; 0: the only one
  Worker worker;

  const Manifest& manifest() const { return library->manifest; }

  void start(int threads, const cpu_set_t& cpus) {
    std::vector<std::string> names;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &cpus)) names.push_back(std::to_string(cpu));
    std::vector<TVMFFIAny> list;
    for (int i = 0; i < threads; ++i) list.push_back(Value::view_of_text(names[i % names.size()].c_str()).any());
    call(global("runtime.config_threadpool"), Value(int64_t{kShareCpus}), Value(int64_t{threads}),
         call(global("ffi.Array"), list));
    if (call(global("runtime.NumThreads")).number() != threads)
      throw Error(SKIMTVM_FAILED, "TVM does not start " + std::to_string(threads) + " threads here; ask for fewer");
    Value machine = call(method(library->module, "vm_load_executable"));
    call(method(machine, "vm_initialization"), Value(int64_t{kDLCPU}), Value(int64_t{0}),
         Value(int64_t{kPooledAllocator}));
    if (manifest().batches.empty()) functions[0] = method(machine, "main");
    for (int64_t n : manifest().batches)
      functions[n] = method(machine, n == manifest().batches.back() ? "main" : ("main_" + std::to_string(n)).c_str());
    for (auto& f : functions)
      if (!f.second.is(kTVMFFIFunction)) throw Error(SKIMTVM_BAD_MODULE, "the module lacks a function of its manifest");
  }

  /// Run images `from` to `from` + `batch` (0: the module's only shapes) of `images`; those beyond the end are zeros.
  void run_one(int64_t batch, int64_t from, int64_t images, const skimtvm_input* inputs, const skimtvm_output* outputs) {
    std::vector<Value> tensors;
    std::vector<TVMFFIAny> arguments;
    int64_t valid = std::min(batch, images - from);
    for (size_t i = 0; i < manifest().inputs.size(); ++i) {
      const Spec& spec = manifest().inputs[i];
      size_t one = batch ? spec.bytes / spec.shape[0] : 0, bytes = batch ? one * batch : spec.bytes;
      const char* data = static_cast<const char*>(inputs[i].data) + from * one;
      tensors.push_back(tensor_of(spec, batch, data, batch ? one * valid : bytes, bytes));
      arguments.push_back(tensors.back().any());
    }
    Value result = call(functions.at(batch), arguments);
    std::vector<Value> several;
    if (result.is(kTVMFFIArray)) several = elements(result);
    else several.push_back(std::move(result));
    if (several.size() != manifest().outputs.size()) throw TvmError("another number of outputs than the manifest says");
    for (size_t i = 0; i < several.size(); ++i) {
      const Spec& spec = manifest().outputs[i];
      size_t one = batch ? spec.bytes / spec.shape[0] : 0;
      copy_out(spec, batch, several[i], static_cast<char*>(outputs[i].data) + from * one,
               batch ? one * valid : spec.bytes);
    }
  }
};

namespace {

thread_local std::string last_error;

int failed(skimtvm_status status, const std::string& text) noexcept {
  try {
    last_error = text;
  } catch (...) {  // out of memory for the message: the status must do
    last_error.clear();
  }
  return status;
}

/// `body()`; what it throws becomes a status and the error text of this thread.
template <typename Body>
int guarded(Body body) noexcept {
  try {
    body();
    return SKIMTVM_OK;
  } catch (const Error& e) {
    return failed(e.status, e.what());
  } catch (const std::bad_alloc&) {
    return failed(SKIMTVM_FAILED, "out of memory");
  } catch (const std::exception& e) {
    return failed(SKIMTVM_FAILED, e.what());
  } catch (...) {
    return failed(SKIMTVM_FAILED, "unknown error");
  }
}

void need(bool condition, const std::string& text) {
  if (!condition) throw Error(SKIMTVM_BAD_ARGUMENT, text);
}

void describe(const std::vector<Spec>& specs, int32_t index, const char* what, skimtvm_tensor_info* info) {
  need(info != nullptr, "info is null");
  need(index >= 0 && static_cast<size_t>(index) < specs.size(),
       "there is no " + std::string(what) + " " + std::to_string(index) + "; there are " + std::to_string(specs.size()));
  const Spec& s = specs[index];
  *info = {s.name.c_str(), s.dtype.c_str(), s.shape.data(), static_cast<int32_t>(s.shape.size()), s.bytes};
}

template <typename Buffer>
void check_buffers(const std::vector<Spec>& specs, int64_t images, const Buffer* buffers, const char* what) {
  need(buffers != nullptr || specs.empty(), std::string(what) + "s is null");
  for (size_t i = 0; i < specs.size(); ++i) {
    size_t want = specs[i].bytes;
    if (images) {
      want /= specs[i].shape[0];
      need(!__builtin_mul_overflow(want, static_cast<size_t>(images), &want), "images: too many");
    }
    std::string name = std::string(what) + " '" + specs[i].name + "'";
    need(buffers[i].bytes == want, name + " has " + std::to_string(buffers[i].bytes) + " bytes; the module expects " +
                                       std::to_string(want));
    need(buffers[i].data != nullptr || want == 0, name + " is null");
  }
}

}  // namespace

int skimtvm_create(const char* path, int threads, skimtvm_instance** instance) {
  return guarded([&] {
    need(instance != nullptr, "instance is null");
    *instance = nullptr;
    need(path != nullptr, "path is null");
    need(threads >= 0 && threads <= kMaxThreads, "threads: give a number from 0 to 1024");
    cpu_set_t cpus;
    if (sched_getaffinity(0, sizeof cpus, &cpus) != 0 || CPU_COUNT(&cpus) == 0)
      throw Error(SKIMTVM_FAILED, "the CPUs of this thread cannot be read");
    auto library = load(path);
    auto made = std::make_unique<skimtvm_instance>();
    made->library = library;
    made->worker.call([&] { made->start(threads ? threads : CPU_COUNT(&cpus), cpus); });
    *instance = made.release();
  });
}

void skimtvm_destroy(skimtvm_instance* instance) {
  if (instance == nullptr) return;
  guarded([&] { instance->worker.call([&] { instance->functions.clear(); }); });
  delete instance;
}

int32_t skimtvm_input_count(const skimtvm_instance* instance) {
  return instance ? static_cast<int32_t>(instance->manifest().inputs.size()) : 0;
}

int32_t skimtvm_output_count(const skimtvm_instance* instance) {
  return instance ? static_cast<int32_t>(instance->manifest().outputs.size()) : 0;
}

int skimtvm_input_info(const skimtvm_instance* instance, int32_t index, skimtvm_tensor_info* info) {
  return guarded([&] {
    need(instance != nullptr, "instance is null");
    describe(instance->manifest().inputs, index, "input", info);
  });
}

int skimtvm_output_info(const skimtvm_instance* instance, int32_t index, skimtvm_tensor_info* info) {
  return guarded([&] {
    need(instance != nullptr, "instance is null");
    describe(instance->manifest().outputs, index, "output", info);
  });
}

int skimtvm_batches(const skimtvm_instance* instance, const int64_t** sizes, int32_t* count) {
  return guarded([&] {
    need(instance != nullptr && sizes != nullptr && count != nullptr, "instance, sizes or count is null");
    *sizes = instance->manifest().batches.data();
    *count = static_cast<int32_t>(instance->manifest().batches.size());
  });
}

int skimtvm_run(skimtvm_instance* instance, int64_t images, const skimtvm_input* inputs,
                const skimtvm_output* outputs) {
  return guarded([&] {
    need(instance != nullptr, "instance is null");
    const Manifest& m = instance->manifest();
    if (m.batches.empty()) {
      for (const Spec& s : m.inputs)
        need(images == 0 || (!s.shape.empty() && s.shape[0] == images),
             "images: the module takes exactly the shapes of its inputs; pass 0");
      images = 0;
    } else {
      need(images >= 1, "images: give a number from 1");
    }
    check_buffers(m.inputs, images, inputs, "input");
    check_buffers(m.outputs, images, outputs, "output");
    std::lock_guard<std::mutex> lock(instance->busy);
    instance->worker.call([&] {
      if (images == 0) return instance->run_one(0, 0, 0, inputs, outputs);
      int64_t from = 0;
      for (int64_t batch : plan(images, m)) {
        instance->run_one(batch, from, images, inputs, outputs);
        from += batch;
      }
    });
  });
}

const char* skimtvm_last_error(void) { return last_error.c_str(); }
