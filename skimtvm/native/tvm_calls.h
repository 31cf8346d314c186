// The little of TVM's C API (tvm/ffi/c_api.h) that the library needs, with errors as exceptions and counted references.
#ifndef SKIMTVM_TVM_CALLS_H_
#define SKIMTVM_TVM_CALLS_H_

#include <tvm/ffi/c_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace skimtvm {

struct TvmError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// First line of the error that TVM has set for this thread.
inline std::string raised() {
  TVMFFIObjectHandle error = nullptr;
  TVMFFIErrorMoveFromRaised(&error);
  if (error == nullptr) return "unknown error";
  const TVMFFIByteArray& message = TVMFFIErrorGetCellPtr(error)->message;
  std::string text(message.data, message.size);
  TVMFFIObjectDecRef(error);
  return text.substr(0, text.find('\n'));
}

inline void check(int code) {
  if (code != 0) throw TvmError(raised());
}

/// An owned value of TVM: a number, a string or an object.
class Value {
 public:
  Value() { any_.type_index = kTVMFFINone; any_.zero_padding = 0; any_.v_int64 = 0; }
  Value(Value&& other) noexcept : Value() { std::swap(any_, other.any_); }
  Value& operator=(Value&& other) noexcept { std::swap(any_, other.any_); return *this; }
  Value(const Value&) = delete;
  Value& operator=(const Value&) = delete;
  ~Value() { if (is_object()) TVMFFIObjectDecRef(any_.v_obj); }

  static Value own(TVMFFIObjectHandle handle) {
    Value v;
    if (handle != nullptr) {
      v.any_.v_obj = static_cast<TVMFFIObject*>(handle);
      v.any_.type_index = v.any_.v_obj->type_index;
    }
    return v;
  }
  static Value view_of_text(const char* text) {  // `text` must live as long as the value
    Value v;
    v.any_.type_index = kTVMFFIRawStr;
    v.any_.v_c_str = text;
    return v;
  }
  Value(int64_t number) : Value() { any_.type_index = kTVMFFIInt; any_.v_int64 = number; }  // NOLINT: an argument

  bool is_object() const { return any_.type_index >= kTVMFFIStaticObjectBegin; }
  bool is(int32_t type) const { return any_.type_index == type; }
  const TVMFFIAny& any() const { return any_; }
  TVMFFIAny* out() { return &any_; }
  TVMFFIObjectHandle object() const { return any_.v_obj; }
  const DLTensor& tensor() const { return *TVMFFITensorGetDLTensorPtr(any_.v_obj); }

  std::string text() const {
    if (is(kTVMFFISmallStr)) return std::string(any_.v_bytes, any_.small_str_len);
    if (!is(kTVMFFIStr)) throw TvmError("not a string");
    auto* bytes = reinterpret_cast<const TVMFFIByteArray*>(any_.v_obj + 1);
    return std::string(bytes->data, bytes->size);
  }
  int64_t number() const {
    if (!is(kTVMFFIInt)) throw TvmError("not a whole number");
    return any_.v_int64;
  }
  double real() const {
    if (!is(kTVMFFIFloat)) throw TvmError("not a number");
    return any_.v_float64;
  }

 private:
  TVMFFIAny any_;
};

/// Call `function` with views of `arguments`.
template <typename... Args>
Value call(const Value& function, const Args&... arguments) {
  if (!function.is(kTVMFFIFunction)) throw TvmError("a function is missing");
  TVMFFIAny packed[] = {arguments.any()..., TVMFFIAny{}};
  Value result;
  check(TVMFFIFunctionCall(function.object(), packed, sizeof...(arguments), result.out()));
  return result;
}

inline Value call(const Value& function, const std::vector<TVMFFIAny>& arguments) {
  if (!function.is(kTVMFFIFunction)) throw TvmError("a function is missing");
  Value result;
  check(TVMFFIFunctionCall(function.object(), const_cast<TVMFFIAny*>(arguments.data()),
                           static_cast<int32_t>(arguments.size()), result.out()));
  return result;
}

/// The global function `name` of the TVM runtime.
inline Value global(const std::string& name) {
  TVMFFIByteArray bytes{name.data(), name.size()};
  TVMFFIObjectHandle handle = nullptr;
  check(TVMFFIFunctionGetGlobal(&bytes, &handle));
  if (handle == nullptr) throw TvmError("this TVM runtime lacks " + name);
  return Value::own(handle);
}

inline Value item(const Value& map, const char* key) {
  if (!map.is(kTVMFFIMap)) throw TvmError("not an object");
  return call(global("ffi.MapGetItem"), map, Value::view_of_text(key));
}

inline std::vector<Value> elements(const Value& array) {
  if (!array.is(kTVMFFIArray)) throw TvmError("not a list");
  int64_t size = call(global("ffi.ArraySize"), array).number();
  Value get = global("ffi.ArrayGetItem");
  std::vector<Value> result;
  for (int64_t i = 0; i < size; ++i) result.push_back(call(get, array, Value(i)));
  return result;
}

inline Value method(const Value& module, const char* name) {
  Value query_imports(int64_t{0});
  query_imports.out()->type_index = kTVMFFIBool;
  return call(global("ffi.ModuleGetFunction"), module, Value::view_of_text(name), query_imports);
}

}  // namespace skimtvm

#endif  // SKIMTVM_TVM_CALLS_H_
